"""Every door that reads an adapter, as one call each; none of them may change the model when it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import PeftModel
from torch import nn
from typer.testing import CliRunner

import kt_sft
from kt_sft.adapters import forms
from kt_sft.cli import app
from kt_sft.errors import FormatError, KTError
from kt_sft.integrations.llamafactory import exporting
from kt_sft.integrations.merge.checkpoint import MergedCheckpoint
from kt_sft.integrations.merge.inspecting import open_with_base
from kt_sft.integrations.peft import adapter_dir, reloading
from kt_sft.integrations.transformers.base_model import describe
from tests.helpers import adapters, parity


class Doors:
    """A base model in `root/base`, its adapter in `root/adapter`, and what reads adapters of it.

    Args:
        root: directory for both.
    """

    def __init__(self, root: Path):
        self.root, self.base = root, root / "base"
        self.adapter = adapters.make("qwen3_moe", root)
        self.model = parity.load_ours(self.base)
        self.trained = kt_sft.load_adapter(parity.load_ours(self.base), self.adapter)
        self.described = describe(self.model, str(self.base))
        self.quick: dict[str, Callable[[Path], object]] = {
            "kt_sft.load_adapter": lambda path: kt_sft.load_adapter(self.model, path),
            "open_adapter": lambda path: forms.open_adapter(path, self.described),
        }
        self.calls = self.quick | {
            "PeftModel.from_pretrained": lambda path: PeftModel.from_pretrained(self.model, str(path)),
            "load_adapter again": lambda path: reloading.load_adapter(self.trained, path, "default"),
            "check of LLaMA-Factory's runs": lambda path: adapter_dir.check_adapter(self.model, path),
            "convert": self._convert,
            "merge": lambda path: MergedCheckpoint(self.base, [path]),
            "export": lambda path: exporting.open_merged(
                SimpleNamespace(
                    model_name_or_path=str(self.base), adapter_name_or_path=[str(path)], adapter_folder=None
                )
            ),
            "inspect": self._inspect,
        }

    def _convert(self, path: Path) -> None:
        target = self.root / "converted"
        forms.convert(open_with_base(path, str(self.base)), "peft-0.18", target)
        raise AssertionError(f"written: {sorted(target.glob('*'))}")

    def _inspect(self, path: Path) -> None:
        """Its exit code says that there is a problem; the words are one line of JSON, or of an error."""
        words = ["adapter", "inspect", "--json", "--base-model", str(self.base), str(path)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code in (1, 2) and "Traceback" not in result.output, result.output
        if result.exit_code == 1:
            raise FormatError(path, "; ".join(json.loads(result.stdout)["problems"]))
        raise FormatError(path, result.output.replace("\n", " "))

    def refuse(self, path: Path, words: str, *, is_quick: bool = False) -> None:
        """At every door one line of a KTError with these words, and a model that is as it was.

        Args:
            is_quick: at two doors, which stand for PEFT's and ours.
        """
        for name, call in (self.quick if is_quick else self.calls).items():
            with pytest.raises(KTError) as caught:
                call(path)
            text = str(caught.value)
            is_listed = name == "inspect" and "with NaN or infinity" in text
            assert (words in text or is_listed) and "\n" not in text and len(text) < 1500, f"{name}: {text}"
        assert not _lora_of(self.model)

    def take(self, path: Path) -> None:
        """Loads, and lets go again."""
        for name in ("kt_sft.load_adapter", "PeftModel.from_pretrained"):
            self.calls[name](path).unload()
        self.calls["merge"](path)


def _lora_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if "lora" in name]

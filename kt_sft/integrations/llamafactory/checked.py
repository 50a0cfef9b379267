"""What a run has opened before its data is read, kept for the loads that follow."""

from __future__ import annotations

import importlib
from collections import defaultdict
from typing import Any

import torch

from kt_sft.config import KTConfig
from kt_sft.formats.gguf import GgufIndex
from kt_sft.integrations.gguf.model import is_gguf_model, model_directory
from kt_sft.integrations.llamafactory import args
from kt_sft.integrations.transformers.loading import check_model
from kt_sft.integrations.transformers.opened import OpenedModel, open_model
from kt_sft.runtime import prepare_native


class CheckedModels:
    """Models by name and settings. Each is given out once; one whose files were written since is opened again.

    It hangs on the model arguments of a run and is handed to those of its reference model: no other run sees it.
    """

    def __init__(self) -> None:
        self._kept: defaultdict[tuple[Any, ...], list[OpenedModel]] = defaultdict(list)
        self._changed: list[OpenedModel] = []
        self._gguf: dict[str, GgufIndex] = {}

    def use_directory(self, model_args: Any) -> None:
        """For a GGUF file as the model: LLaMA-Factory gets the directory that stands for it, the experts stay there.

        Raises:
            KTError: see `GgufIndex.from_path` and `model_directory`.
        """
        file = model_args.model_name_or_path
        if not is_gguf_model(file):
            return
        settings = args.kt_config(model_args)
        prepare_native(settings)  # before anything is written: it may be refused
        index = self._gguf_of(file)
        if index is None:
            index = self._gguf[str(file)] = GgufIndex.from_path(file)
        model_args.model_name_or_path = str(model_directory(index, settings.weight_cache))
        if not (model_args.kt_weight_path or model_args.kt_expert_checkpoint_path):
            model_args.kt_weight_path = str(file)

    def check(self, model_args: Any) -> OpenedModel:
        """See `check_model`, for these arguments.

        Raises:
            KTError: what `load_model` would raise.
        """
        on_cpu = model_args.export_dir is not None and model_args.export_device == "cpu"
        kwargs = _arguments(model_args, torch.device("cpu") if on_cpu else None)
        settings = args.kt_config(model_args)
        gguf = self._gguf_of(settings.weight_path)
        opened = check_model(model_args.model_name_or_path, settings, gguf=gguf, **kwargs)
        self._kept[_key(opened)].append(opened)
        self._changed.append(opened)
        return opened

    def open_base(self, model_args: Any) -> OpenedModel:
        """The checkpoint that an export merges into; kept until it is asked for again."""
        opened = OpenedModel(
            model_args.model_name_or_path, trust_remote_code=bool(getattr(model_args, "trust_remote_code", False))
        )
        kept = self._given_out(opened) or opened
        self._kept[_key(opened)].append(kept)
        return kept

    def forget_models(self) -> None:
        """Free the models without weights, which checks have changed; what was read of files stays."""
        for opened in self._changed:
            opened.forget_model()
        self._changed.clear()

    def take(self, model_args: Any, device: torch.device) -> OpenedModel:
        """What was checked, for its load, or the same opened now.

        Args:
            device: of everything about which no rule says anything.
        Raises:
            KTError: see `open_model`.
        """
        settings, kwargs = args.kt_config(model_args), _arguments(model_args, device)
        path = model_args.model_name_or_path
        kept = self._given_out(OpenedModel(path, settings, **kwargs))
        gguf = self._gguf_of(settings.weight_path)
        if not any(self._kept.values()):
            self._gguf.clear()  # no load is to come: vocabularies and lists of tensors go with this one
        if kept is None:
            return open_model(path, settings, gguf=gguf, **kwargs)
        prepare_native(kept.given)  # another model's settings may have come between
        return kept

    def _given_out(self, like: OpenedModel) -> OpenedModel | None:
        """The first that is kept of this name and these settings, since a policy and its reference may be the same
        model; None also of one whose files were written since.
        """
        kept = self._kept[_key(like)]
        found = kept.pop(0) if kept else None
        return found if found is not None and found.is_current() else None

    def _gguf_of(self, file: str | None) -> GgufIndex | None:
        index = self._gguf.get(str(file))
        return index if index is not None and index.unchanged.all() else None


def of(model_args: Any) -> CheckedModels:
    """Those of a run."""
    if getattr(model_args, "kt_checked", None) is None:
        model_args.kt_checked = CheckedModels()
    return model_args.kt_checked


def _arguments(model_args: Any, device: torch.device | None) -> dict[str, Any]:
    """Of `from_pretrained`."""
    if device is None:
        device = importlib.import_module("llamafactory.extras.misc").get_current_device()
    return {"device_map": {"": device}, "trust_remote_code": model_args.trust_remote_code, **hub(model_args)}


def hub(model_args: Any) -> dict[str, Any]:
    """Arguments that say which files of a hub are meant, and where they lie."""
    return {
        "revision": model_args.model_revision,
        "cache_dir": model_args.cache_dir,
        "token": model_args.hf_hub_token,
    }


def _key(opened: OpenedModel) -> tuple[Any, ...]:
    settings: KTConfig = opened.given
    return (str(opened.path), settings, *(f"{name}={value}" for name, value in sorted(opened.kwargs.items())))

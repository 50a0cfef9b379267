"""Doors to adapters: every form, opened by what converts and merges them, and loaded onto a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import kt_sft
from kt_sft.adapters import forms
from kt_sft.adapters.model import Adapter
from kt_sft.integrations.transformers.base_model import find_base_model
from tests.fuzz.case import Door, Subject
from tests.fuzz.documents import Document, Json, Tensors, TorchArchive
from tests.fuzz.gguf_document import Gguf
from tests.helpers import adapters, ktransformers_adapters, tiny_models

_CONFIG_WORDS = (
    "LORA", "IA3", "none", "all", "lora_only", "all-linear", "q_proj", "experts", "gate", "lm_head", "embed_tokens",
    "norm", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", ".*", r".*q_proj", "(a+)+$", "(.*)*(.*)*(.*)*x",
    "megatron_config", "megatron_core", "tests.fuzz.tripwire", "auto_mapping", "base_model_class", "parent_library",
    "eva_config", "layers", "corda_config", "lora_ga_config", "loftq_config", "runtime_config", "arrow_config",
    "layer_replication", "use_dora", "use_rslora", "use_qalora", "use_bdlora", "fan_in_fan_out",
    "trainable_token_indices", "modules_to_save", "lora_bias", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "exclude_modules", "init_lora_weights", "pissa", "alora_invocation_tokens",
    "monteclora_config", "target_parameters", "0.18.1", "0.19.0", "0.17.0", "1", "CAUSAL_LM", "SEQ_CLS", "revision",
    "task_type", "peft_type", "ensure_weight_tying", [0], [0, 1], [[0, 1]], {"q_proj": 2}, {"(": 2}, {"(a+)+$": 1},
    {"q_proj": False}, {"q_proj": "3"}, {"q_proj": 1e300}, {"q_proj": float("nan")}, {".*": 10**9}, 1e38, 3,
    {"auto_mapping": {"base_model_class": "tripwire", "parent_library": "tests.fuzz.tripwire"}}, ["q_proj"],
    ["lm_head"],
)  # fmt: skip
_SIDE = b'{"model_type": "qwen3_moe", "lora_dropout": 0.0}'


class _Deltas:
    """Opens adapters of the base model below a folder, and reads what they add to each weight."""

    def __init__(self, base: Path):
        self.base = find_base_model(base)

    def __call__(self, folder: Path) -> dict[str, Tensor]:
        opened = forms.open_adapter(folder, self.base)
        found = {}
        for name in opened.linears:
            found[name] = _product(opened.read_linear(name))
        for module in opened.experts:
            for projection, lora in opened.read_experts(module).items():
                found[f"{module}.{projection}"] = _product(lora)
        assert forms.base_name(folder) is None or isinstance(forms.base_name(folder), str)
        _touch(opened)
        return found


def _check(folder: Path, deltas: dict[str, Tensor]) -> None:
    """Every number can be used, and what linear layers get is what the files say by PEFT's formula."""
    assert deltas and all(delta.isfinite().all() for delta in deltas.values())
    if not (folder / "adapter_config.json").is_file():
        return
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return
    file = folder / "adapter_model.safetensors"
    pickle = folder / "adapter_model.bin"
    tensors = load_file(file) if file.is_file() else torch.load(pickle, weights_only=True) if pickle.is_file() else {}
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    for name, delta in deltas.items():
        stem = f"base_model.model.{name}.lora_"
        if f"{stem}A.weight" in tensors:
            wanted = scale * (tensors[f"{stem}B.weight"].double() @ tensors[f"{stem}A.weight"].double())
            assert torch.allclose(delta, wanted, rtol=1e-9), name


def _touch(opened: Adapter) -> None:
    for read in opened.whole.values():
        (read() if callable(read) else read).sum()


def _product(lora: Any) -> Tensor:
    return lora.scale * (lora.b.double() @ lora.a.double())


def _made(place: Path) -> Path:
    return adapters.make("qwen3_moe", place, rank=2)


def _settled(file: Path) -> bytes:
    """A config without what differs from run to run: the path of the model, and the order of PEFT's sets."""
    values = {**json.loads(file.read_text()), "base_model_name_or_path": "base"}
    if isinstance(values["target_modules"], list):
        values["target_modules"].sort()
    return json.dumps(values).encode()


def _subject(place: Path, folder: Path, weights: dict[str, Document], *names: str) -> Subject:
    files: dict[str, Document] = dict(weights)
    if (folder / "adapter_config.json").is_file():
        files["adapter_config.json"] = Json(_settled(folder / "adapter_config.json"), _CONFIG_WORDS)
        files["kt_sft.json"] = Json(_SIDE, ("peft-0.18", "peft-0.19", "expert_layout", "mixtral", 0.5, 1.0))
    for name in names:
        files[name] = Json((folder / name).read_bytes())
    return Subject(files, _Deltas(place / "base"), _check)


def _peft(place: Path) -> Subject:
    folder = _made(place)
    return _subject(place, folder, {"adapter_model.safetensors": _tensors(folder / "adapter_model.safetensors")})


def _tensors(file: Path) -> Tensors:
    return Tensors(file.read_bytes(), list(load_file(file)))


def _pickled(place: Path) -> Subject:
    folder = _made(place)
    return _subject(place, folder, {"adapter_model.bin": TorchArchive(load_file(folder / "adapter_model.safetensors"))})


def _converted(form: str) -> Callable[[Path], Subject]:
    def build(place: Path) -> Subject:
        _made(place)
        folder = adapters.convert(place, form, place / form)
        return _subject(place, folder, {"adapter_model.safetensors": _tensors(folder / "adapter_model.safetensors")})

    return build


def _gguf(place: Path) -> Subject:
    _made(place)
    file = adapters.convert(place, "gguf", place / "adapter.gguf")
    words = ("adapter.type", "adapter.lora.alpha", "general.type", "lora", "qwen3moe", "llama", 1e30, 0.0)
    return _subject(place, file, {"adapter.gguf": Gguf(file.read_bytes(), words)})


def _ktransformers(place: Path) -> Subject:
    folder, _ = ktransformers_adapters.make("qwen3_moe", place)
    artifacts = {"format_version": 1, "artifacts": []}
    (folder / "kt_adapter_manifest.json").write_text(json.dumps(artifacts))
    names = ("adapter_model.safetensors", ktransformers_adapters.NAME)
    return _subject(place, folder, {name: _tensors(folder / name) for name in names}, "kt_adapter_manifest.json")


def _loaded(place: Path) -> Subject:
    """Onto a model: its logits with the adapter."""
    subject = _peft(place)
    model, ids = kt_sft.load_model(place / "base"), tiny_models.token_ids()

    def read(folder: Path) -> Tensor:
        adapted = kt_sft.load_adapter(model, folder)
        try:
            with torch.no_grad():
                return adapted(ids).logits
        finally:
            adapted.unload()

    def check(folder: Path, logits: Tensor) -> None:
        assert logits.shape[:2] == ids.shape  # huge factors overflow, rightly

    return Subject(subject.files, read, check)


DOORS = (
    Door("adapter-peft", _peft, loads=True),
    Door("adapter-bin", _pickled, loads=True),
    Door("adapter-vllm", _converted("vllm"), loads=True),
    Door("adapter-gguf", _gguf, loads=True),
    Door("adapter-ktransformers", _ktransformers, loads=True),
    Door("adapter-loaded", _loaded, loads=True),
)

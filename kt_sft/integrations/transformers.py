"""Loading through transformers with the routed experts kept out of it.

transformers calls an `HfQuantizer` before and after it reads weights. Ours quantises nothing: before, it checks
hardware, files and memory and puts `RoutedExperts` in place of the experts modules, so that transformers reads no
expert tensor; after, it streams the experts from the checkpoint into packed form and takes itself off the model.
"""

from __future__ import annotations

import json
import logging
import os
import re
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from kt_sft import env, memory
from kt_sft.config import ISAS, KTConfig
from kt_sft.errors import ConfigError, FormatError, UnsupportedHardware, UnsupportedModel, nearest
from kt_sft.formats.safetensors_index import SafetensorsIndex
from kt_sft.integrations.expert_files import stream_experts
from kt_sft.integrations.linears import pack_linears
from kt_sft.integrations.saving import save_full_model
from kt_sft.models.expert_keys import KeyMap, LayerSource
from kt_sft.models.spec import ExpertsSpec, find_experts
from kt_sft.native import native
from kt_sft.nn.routed_experts import RoutedExperts

__all__ = ["KTExpertsConfig", "check_model", "load_model", "prepare_native", "quantization_config", "save_full_model"]

logger = logging.getLogger(__name__)

METHOD_NAME = "kt_sft"
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
_HUB_ARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_REFUSED_ARGS = {
    "quantization_config": "kt_sft passes its own; describe the experts with KTConfig",
    "gguf_file": "GGUF checkpoints are not read yet",
    "state_dict": "experts are read from files; save the state dict as a safetensors checkpoint",
    "tp_plan": "tensor parallelism is not supported",
    "tp_size": "tensor parallelism is not supported",
    "device_mesh": "tensor parallelism is not supported",
    "distributed_config": "expert parallelism is not supported",
}


def load_model(
    path: str | os.PathLike[str], config: KTConfig | None = None, **from_pretrained_kwargs: Any
) -> PreTrainedModel:
    """Load a mixture-of-experts model whose routed experts run in our CPU kernels.

    Args:
        path: model directory, or hub id as `from_pretrained` takes it.
        config: settings of the experts; defaults when left out.
        from_pretrained_kwargs: passed to `AutoModelForCausalLM.from_pretrained`.
    Raises:
        ConfigError: arguments that cannot be combined with this loader.
        FormatError: directory, shard or tensor missing, damaged or of a wrong shape.
        UnsupportedModel: no routed experts, or experts that the kernels cannot compute.
        UnsupportedHardware: the CPU lacks AVX2.
        NotEnoughMemory: the experts do not fit.
    """
    config = KTConfig() if config is None else config
    faults = [f"{name}: {why}" for name, why in _REFUSED_ARGS.items() if from_pretrained_kwargs.get(name) is not None]
    if not isinstance(config, KTConfig):
        faults.append(f"config: expected a KTConfig, found {type(config).__name__}")
    if faults:
        raise ConfigError(faults)
    hook = quantization_config(config, path, **{k: v for k, v in from_pretrained_kwargs.items() if k in _HUB_ARGS})
    if not Path(path).is_dir():
        check_model(path, config, **from_pretrained_kwargs)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=hook, **from_pretrained_kwargs)


def quantization_config(config: KTConfig, path: str | os.PathLike[str], **hub_kwargs: Any) -> KTExpertsConfig:
    """What to pass as `quantization_config=` to `from_pretrained(path, ...)`; checks everything that is cheap to check.

    Args:
        hub_kwargs: cache_dir, revision, token, ... as `from_pretrained` will get them.
    Raises:
        FormatError, UnsupportedHardware: see `load_model`.
    """
    prepare_native(config)
    _check_config_file(_find_config_file(path, hub_kwargs))
    for directory in (path if not hub_kwargs.get("subfolder") else None, config.weight_path):
        if directory is not None and (directory == config.weight_path or Path(directory).is_dir()):
            SafetensorsIndex.from_directory(directory).close()
    return KTExpertsConfig(config)


def check_model(path: str | os.PathLike[str], config: KTConfig, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Refuse, before any long work, what `load_model` would refuse; reads no weights and downloads none.

    Returns:
        The model without weights (meta device) and with our experts modules, for further checks.

    Raises:
        As `load_model`; of a model on the hub the tensors are not looked at.
    """
    hub_kwargs = {name: value for name, value in from_pretrained_kwargs.items() if name in _HUB_ARGS}
    quantization_config(config, path, **hub_kwargs)
    remote = {"trust_remote_code": from_pretrained_kwargs.get("trust_remote_code")}
    model_config = AutoConfig.from_pretrained(path, **hub_kwargs, **remote)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, **remote)
    specs = find_experts(model)
    on_cpu = _uses_main_memory(from_pretrained_kwargs.get("device_map"))
    _check_memory(specs, _rest_bytes(model, specs) if on_cpu else 0, config)
    if Path(path).is_dir() and not hub_kwargs.get("subfolder"):
        with SafetensorsIndex.from_directory(path) as own:
            files = sorted({str(own.info(name).file) for name in own})
        _open_experts(model, specs, files, config.weight_path)[1].close()
    _swap_experts(model, specs, config)
    return model


def prepare_native(config: KTConfig) -> None:
    """Set kernel level and threads of this process from the environment and the configuration.

    Raises:
        UnsupportedHardware: the CPU lacks AVX2 (unless `isa="scalar"` is asked for) or the level asked for.
    """
    library = native()
    isa = env.isa() or config.isa
    detected = library.isa_detected()
    if isa is not None:
        if isa not in ISAS:
            raise ConfigError(f"KT_SFT_ISA: expected one of {', '.join(ISAS)}, found {isa!r}; {nearest(isa, ISAS)}")
        if isa not in detected:
            reason = f"{library.amx_refusal()}; " if isa.startswith("amx") and library.amx_refusal() else ""
            raise UnsupportedHardware(
                "kernel level",
                needed=isa,
                found=", ".join(detected),
                remedy=f"{reason}unset isa to use the widest that the CPU has",
            )
        library.set_isa(isa)
    elif "avx2" not in detected:
        raise UnsupportedHardware(
            "CPU",
            needed="AVX2",
            found=", ".join(detected),
            remedy="use another machine; isa='scalar' runs reference kernels that are for tests only",
        )
    threads = env.threads() or config.threads or max(1, library.default_threads() // env.local_world_size())
    info = library.cpu_info()
    if threads > info["logical_cpus"]:
        logger.warning(
            "threads: %d asked for, but this process may use %d CPUs; using %d",
            threads,
            info["logical_cpus"],
            info["logical_cpus"],
        )
        threads = info["logical_cpus"]
    pools = config.threadpool_count or len(info["numa_nodes"]) or 1
    library.set_threads(threads, min(pools, threads))


class KTExpertsConfig(QuantizationConfigMixin):
    """Carries a `KTConfig` through `from_pretrained`; gone from the model once it is loaded."""

    def __init__(self, kt_config: KTConfig | dict[str, Any] | None = None, **_: Any):
        self.quant_method = METHOD_NAME
        self.kt_config = kt_config if isinstance(kt_config, KTConfig) else KTConfig.from_dict(kt_config or {})

    def to_dict(self) -> dict[str, Any]:
        """Plain values: transformers logs and copies model configs as JSON while loading."""
        return {"quant_method": METHOD_NAME, "kt_config": self.kt_config.to_dict()}


class KTExpertsQuantizer(HfQuantizer):
    """The loading hook; one object serves one `from_pretrained` call."""

    def __init__(self, quantization_config: KTExpertsConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.kt_config = quantization_config.kt_config
        self._layers: dict[str, LayerSource] = {}
        self._index: SafetensorsIndex | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Before transformers looks at any file.

        Raises:
            ConfigError: DeepSpeed ZeRO-3, which would shard parameters that the experts do not have.
        """
        if is_deepspeed_zero3_enabled():
            raise ConfigError(
                "deepspeed: expected ZeRO stage 0, 1 or 2, found 3; routed experts in CPU kernels are not sharded"
            )
        prepare_native(self.kt_config)

    def preprocess_model(self, model: PreTrainedModel, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
        """Model on meta, no weights yet: check all that can fail, then put our modules in place."""
        specs = find_experts(model)
        files = kwargs.get("checkpoint_files") or []
        self._layers, self._index = _open_experts(model, specs, files, self.kt_config.weight_path)
        rest_bytes = _rest_bytes(model, specs) if _uses_main_memory(kwargs.get("device_map")) else 0
        _check_memory(specs, rest_bytes, self.kt_config)
        _swap_experts(model, specs, self.kt_config)
        model._keys_to_ignore_on_load_unexpected = [
            *(model._keys_to_ignore_on_load_unexpected or []),
            *_unread_patterns(model, specs),
        ]

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """All other weights are in: pack the experts, then leave an ordinary-looking model."""
        assert self._index is not None
        with self._index as index:
            stream_experts(model, self._layers, index)
        self._layers, self._index = {}, None
        pack_linears(model, self.kt_config)
        self.remove_quantization_config(model)
        with suppress(AttributeError):
            del model._keys_to_ignore_on_load_unexpected
        model.kt_config = self.kt_config
        model.save_pretrained = types.MethodType(save_full_model, model)

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Placeholders of experts take no space when transformers plans devices."""
        owner = model.get_submodule(param_name.rpartition(".")[0])
        return 0 if isinstance(owner, RoutedExperts) else param.element_size()

    def is_serializable(self) -> bool:
        """The hook itself is never saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """LoRA on every layer can be trained."""
        return True


def _register() -> None:
    # transformers refuses to register a name twice, which happens when this module is executed again.
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    AUTO_QUANTIZER_MAPPING.pop(METHOD_NAME, None)
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD_NAME, None)
    register_quantizer(METHOD_NAME)(KTExpertsQuantizer)
    register_quantization_config(METHOD_NAME)(KTExpertsConfig)


_register()


def _find_config_file(path: str | os.PathLike[str], hub_kwargs: dict[str, Any]) -> Path:
    """The model's config.json: local, from the hub's cache, or fetched."""
    text = os.fspath(path)
    directory = Path(text)
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is not None and not text.startswith((".", "~"))
    if not directory.is_dir() and (directory.exists() or not is_hub_id):
        found = "a file" if directory.exists() else "nothing"
        raise FormatError(text, "model directory", expected="a directory", found=found, remedy="correct the path")
    if directory.is_dir():
        local = directory / (hub_kwargs.get("subfolder") or "") / "config.json"
        if local.is_file():
            return local
        remedy = "point to the folder that save_pretrained wrote"
        raise FormatError(local, "model configuration", expected="present", found="missing", remedy=remedy)
    try:
        found_file = cached_file(text, "config.json", **hub_kwargs)
        if found_file is None:
            raise OSError("it has no config.json")
        return Path(found_file)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(
            text,
            "model",
            expected="a model directory, or a hub id that is cached or can be reached",
            found=f"neither ({reason})",
            remedy="correct the path or download the model first",
        ) from error


def _check_config_file(config_file: Path) -> None:
    try:
        values = json.loads(config_file.read_text(encoding="utf-8"))
        quantization = values.get("quantization_config")
    except (ValueError, AttributeError) as error:
        raise FormatError(
            config_file, "config", expected="a JSON object", found=str(error), remedy="download it again"
        ) from None
    if quantization:
        method = (
            quantization.get("quant_method", "an unnamed method") if isinstance(quantization, dict) else quantization
        )
        raise UnsupportedModel(
            f"{config_file}: quantization_config",
            expected="weights in bf16, fp16 or fp32",
            found=f"weights quantised by {method}",
            remedy="use the bf16 version of the checkpoint; quantised ones are not read yet",
        )


def _open_experts(
    model: PreTrainedModel, specs: dict[str, ExpertsSpec], files: list[str], weight_path: str | None
) -> tuple[dict[str, LayerSource], SafetensorsIndex]:
    """Locate every expert tensor and check names, shapes and dtypes from the headers, of the other tensors the shapes.

    With a quantizer present transformers does not compare shapes itself.
    """
    key_map = KeyMap(model, specs)
    foreign = [file for file in files if not str(file).endswith(".safetensors")]
    if foreign:
        raise FormatError(
            foreign[0],
            "weights",
            expected="safetensors",
            found=Path(foreign[0]).suffix,
            remedy="convert with save_pretrained",
        )
    own = SafetensorsIndex.from_files(files)
    for key in own:
        shape = key_map.plain_shape(key)
        if shape is not None:
            own.expect(key, shape)
    index = own if weight_path is None else SafetensorsIndex.from_directory(weight_path)
    layers = key_map.layers(index, index.source)
    for layer in layers.values():
        for key, shape in layer.expected_shapes().items():
            index.expect(key, shape, FLOAT_DTYPES)
    return layers, index


def _rest_bytes(model: PreTrainedModel, specs: dict[str, ExpertsSpec]) -> int:
    """Bytes of all parameters and buffers outside the experts."""
    outside = (
        t for name, t in [*model.named_parameters(), *model.named_buffers()] if name.rpartition(".")[0] not in specs
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in outside)


def _uses_main_memory(device_map: dict[str, Any] | str | None) -> bool:
    """Whether weights outside the experts stay in main memory under this device map."""
    if not isinstance(device_map, dict):
        return device_map in (None, "cpu")
    return any(str(device) == "cpu" for device in device_map.values())


def _check_memory(specs: dict[str, ExpertsSpec], rest_bytes: int, config: KTConfig) -> None:
    def needed(weight_format: str) -> memory.MemoryEstimate:
        packed_bytes = native().MoeLayer.packed_bytes_for
        sizes = [
            packed_bytes(spec.num_experts, spec.hidden, spec.inter, weight_format, config.int4_group_size)
            for spec in specs.values()
        ]
        return memory.estimate(specs, sizes, rest_bytes, ranks=env.local_world_size())

    smaller = {method: needed(method.lower()) for method in ("INT8", "INT4") if method != config.method}
    memory.check(needed(config.weight_format), memory.available_memory(), smaller)


def _swap_experts(model: PreTrainedModel, specs: dict[str, ExpertsSpec], config: KTConfig) -> None:
    dtype = model.dtype
    for name, spec in specs.items():
        parent, _, attribute = name.rpartition(".")
        # transformers builds the model under a meta-device context that must not reach our placeholders.
        with torch.device("cpu"):
            experts = RoutedExperts(
                spec,
                weight_format=config.weight_format,
                group_size=config.int4_group_size,
                expert_activations=config.expert_activations,
                chunk_size=config.chunk_size,
                cpu_activation=config.cpu_activation,
                dtype=dtype,
            )
        for parameter in experts.parameters():
            parameter._is_hf_initialized = True
        setattr(model.get_submodule(parent), attribute, experts)


def _unread_patterns(model: PreTrainedModel, specs: dict[str, ExpertsSpec]) -> Iterator[str]:
    """Checkpoint keys that transformers leaves unread on purpose: the experts, and extra prediction layers."""
    for pattern in sorted({re.sub(r"\d+", r"\\d+", re.escape(name)) for name in specs}):
        yield rf"^{pattern}\.(gate_up_proj|down_proj)$"
    text_config = model.config.get_text_config()
    for extra in range(getattr(text_config, "num_nextn_predict_layers", None) or 0):
        yield rf"^model\.layers\.{text_config.num_hidden_layers + extra}\."

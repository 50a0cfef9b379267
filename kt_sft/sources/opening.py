"""Where experts come from: one protocol for every kind of file, and the loop that packs all of them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from kt_sft import env
from kt_sft.errors import GIB, ConfigError, FormatError, unpackable
from kt_sft.formats.finite import is_finite
from kt_sft.formats.gguf import SUFFIX, GgufIndex
from kt_sft.formats.packed import PackedContainer, is_container
from kt_sft.formats.quantized_index import QuantizedIndex
from kt_sft.formats.tensor_errors import INCOMPLETE
from kt_sft.integrations.transformers.model_files import gguf_sources, open_checkpoint
from kt_sft.models.expert_keys import KeyMap
from kt_sft.progress import progress_bar
from kt_sft.sources.gguf import GgufExperts
from kt_sft.sources.packed import PackedExperts
from kt_sft.sources.safetensors import SafetensorsExperts

if TYPE_CHECKING:
    from kt_sft.config import KTConfig
    from kt_sft.models.spec import ExpertsSpec
    from kt_sft.nn.routed_experts import RoutedExperts, WeightFormats

logger = logging.getLogger(__name__)


class ExpertSource(Protocol):
    """The experts of one model in files. Opening it has read headers only and has checked names, shapes and types.

    An expert is named by its module's path in the model and its index. A source may be closed between any two calls;
    the next one opens its files again.
    """

    @property
    def path(self) -> Path:
        """File or directory, for messages."""
        ...

    @property
    def formats(self) -> Mapping[str, tuple[str, str, str]]:
        """How gate, up and down are stored, by module: the names of the file format (`BF16`, `F8_E4M3`, `Q4_K`)."""
        ...

    def load(self, experts: RoutedExperts, name: str, expert: int, *, slot: int | None = None) -> None:
        """Put one expert into its module, packing where the file is not packed the module's way.

        Args:
            slot: number that it gets there; None: the same.
        Raises:
            FormatError: a file is gone or no longer the one that was opened.
            ValueError: weights that cannot be packed.
        """
        ...

    def read(self, name: str, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up `[inter, hidden]` and down `[hidden, inter]`, bf16; may be views of a mapped file.

        Raises:
            FormatError: a file is gone or no longer the one that was opened.
        """
        ...

    def tensor_names(self, name: str, expert: int) -> tuple[str, str, str]:
        """What the files call the tensors that hold gate, up and down of an expert."""
        ...

    def close(self) -> None:
        """Drop file mappings; tensors already returned stay valid."""
        ...


def open_experts(
    model: nn.Module,
    specs: Mapping[str, ExpertsSpec],
    own_files: Iterable[str | Path] | None,
    config: KTConfig,
    methods: Mapping[str, str] | None = None,
) -> ExpertSource:
    """Find every expert, from the headers; also checks the shapes of the model's other tensors.

    With a quantizer present transformers does not compare shapes itself.

    Args:
        model: as transformers builds it (meta device is enough), its experts modules still in place.
        own_files: weight files of the model directory; None: not looked at, the experts lie at `weight_path`.
        config: `weight_path` says where the experts are instead, if not there; see `open_weight_path`.
        methods: of modules whose method is not `config.method`.
    Raises:
        ConfigError: a packed container of another weight format; RAWINT4 or GGUF without such files.
        FormatError: files missing or damaged; experts missing, twice, of a wrong shape or type.
        UnsupportedModel: the family stores experts in a way that needs more than slicing.
    """
    source = _open(model, specs, own_files, config)
    for method in sorted({(methods or {}).get(name, config.method) for name in specs}):
        check_method(source, dataclasses.replace(config, method=method))
    return source


def check_method(source: ExpertSource, config: KTConfig) -> None:
    """Raise unless the files have what the method takes from them.

    Raises:
        ConfigError: RAWINT4 or GGUF without such files.
    """
    if config.method == "GGUF" and not isinstance(source, GgufExperts):
        found = "a packed container" if isinstance(source, PackedExperts) else "safetensors"
        raise ConfigError(
            f"method GGUF: expected the experts in a GGUF file, found {found} in {source.path}; set weight_path to a "
            "GGUF file, or use BF16, INT8 or INT4"
        )
    if config.method == "RAWINT4":
        group = getattr(source, "int4_group", None)
        if group != config.int4_group_size:
            found = f"groups of {group}" if group else f"{next(iter(source.formats.values()))[0]} in {source.path}"
            raise ConfigError(
                f"method RAWINT4: expected a compressed-tensors INT4 checkpoint in groups of {config.int4_group_size}, "
                f"found {found}; set int4_group_size to the checkpoint's, or use INT4, INT8 or BF16"
            )


def weight_formats(
    source: ExpertSource, config: KTConfig, methods: Mapping[str, str] | None = None
) -> dict[str, WeightFormats]:
    """What `RoutedExperts` are to hold, by module: the format of the method, or the types of a GGUF file.

    Args:
        methods: of modules whose method is not `config.method`.
    """
    formats: dict[str, WeightFormats] = {}
    for name in source.formats:
        method = (methods or {}).get(name, config.method)
        if method == "GGUF":
            assert isinstance(source, GgufExperts)
            formats[name] = source.native_formats(name)
        else:
            formats[name] = method.lower()
    return formats


def _open(
    model: nn.Module, specs: Mapping[str, ExpertsSpec], own_files: Iterable[str | Path] | None, config: KTConfig
) -> ExpertSource:
    own_files = None if own_files is None else [Path(file) for file in own_files]
    key_map = KeyMap(model, specs)
    own = None if own_files is None else _own_checkpoint(key_map, own_files)
    path = config.weight_path
    if path is not None and is_container(path):
        open_own = None if own is None else partial(_checkpoint_experts, own, key_map)
        folder = own_files[0].parent if own_files else None
        return PackedExperts(path, specs, config, open_original=open_own, own_files=gguf_sources(folder))
    index = own if path is None else open_weight_path(path)
    assert index is not None
    if isinstance(index, GgufIndex):
        return GgufExperts(index, specs)
    return _checkpoint_experts(index, key_map)


def _own_checkpoint(key_map: KeyMap, files: list[Path]) -> QuantizedIndex:
    """The model's own files, with the shapes that the model needs and the biases of the experts, which lie there."""
    foreign = [file for file in files if file.suffix != ".safetensors"]
    if foreign:
        raise FormatError(
            foreign[0],
            "weights",
            expected="safetensors",
            found=foreign[0].suffix,
            remedy="convert with save_pretrained",
        )
    own = open_checkpoint(files)
    for key in own:
        shape = key_map.plain_shape(key)
        if shape is not None:
            own.expect(key, shape)
    missing = key_map.missing_biases(own)
    if missing:
        raise FormatError(
            own.source,
            "biases of the experts",
            expected=missing[0],
            found="no such tensor",
            remedy=INCOMPLETE,
        )
    return own


def _checkpoint_experts(index: QuantizedIndex, key_map: KeyMap) -> SafetensorsExperts:
    layers = key_map.layers(index, index.source, lambda key: index.info(key).shape)
    return SafetensorsExperts(index, layers)


def open_weight_path(path: str | Path) -> QuantizedIndex | GgufIndex | PackedContainer:
    """What lies at a `weight_path`: a container, a GGUF file or a directory with one, or a safetensors checkpoint.

    Reads headers only.

    Raises:
        FormatError: nothing there that can be read, or a damaged file.
        UnsupportedModel: a checkpoint that is quantised in a way that is not read.
    """
    path = Path(path)
    if is_container(path):
        return PackedContainer(path)
    has_safetensors = path.is_dir() and any(path.glob("*.safetensors"))
    if path.suffix == SUFFIX or (path.is_dir() and not has_safetensors and any(path.glob(f"*{SUFFIX}"))):
        return GgufIndex.from_path(path)
    return open_checkpoint(str(path))


def check_biases(model: nn.Module, source: ExpertSource) -> None:
    """Look at the experts' biases, which are loaded before their weights and by transformers.

    Raises:
        FormatError: NaN or infinity in one.
    """
    for name in source.formats:
        experts = model.get_submodule(name)
        for bias in experts.spec.bias_shapes:
            parameter = experts.get_parameter(bias).detach()
            if parameter.device.type != "meta" and not is_finite(parameter):
                raise FormatError(
                    source.path, f"tensor {name}.{bias}", expected="finite numbers", found="NaN or infinity",
                    remedy="download the checkpoint again, or make it again: with these biases the model computes NaN",
                )  # fmt: skip


def stream_experts(model: nn.Module, source: ExpertSource) -> None:
    """Load every expert, one at a time; nothing but the packed copy stays in anonymous memory.

    Raises:
        FormatError: see `ExpertSource.load`; weights that cannot be packed.
    """
    counts = {name: model.get_submodule(name).num_experts for name in source.formats}
    total = sum(counts.values())
    done = 0
    with progress_bar("Packing experts", total, unit="expert", is_shown=env.local_rank() <= 0) as move:
        for name, count in counts.items():
            experts = model.get_submodule(name)
            for expert in range(count):
                try:
                    source.load(experts, name, expert)
                except FormatError:
                    raise
                except ValueError as error:
                    raise unpackable(source, name, expert, error, instead="use method BF16") from None
                done += 1
                move(done, total, name)
    source.close()
    packed_bytes = sum(model.get_submodule(name).packed_bytes for name in counts)
    logger.info("loaded %d experts of %d layers in %.2f GiB", total, len(counts), packed_bytes / GIB)

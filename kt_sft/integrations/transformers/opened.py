"""A model that is opened once: what its files say, and what follows with the settings, before any weight is read.

Loading, checking, converting, merging, planning and the operator all start from one of these, so that each of a model's
files is looked at in one place and once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kt_sft import memory
from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError, FormatError
from kt_sft.formats.checkpoint import SAFETENSORS, Weights, config_values, kind_at, open_weights
from kt_sft.formats.gguf import GgufIndex
from kt_sft.formats.gguf_config import model_config
from kt_sft.formats.quantized_index import Quantization, QuantizedIndex, read_quantization
from kt_sft.formats.safetensors_index import SafetensorsIndex
from kt_sft.formats.unchanged_files import marks
from kt_sft.integrations.gguf.model import gguf_config, is_gguf_model, model_directory
from kt_sft.integrations.transformers.model_files import check_generation_config, find_config_file, meta_model
from kt_sft.integrations.transformers.placing import bytes_in_main_memory, given_dtype, plan_here
from kt_sft.models.auto_class import HUB_ARGS, read_auto_config
from kt_sft.models.expert_keys import KeyMap
from kt_sft.models.layout import ExpertsSpec, Formats
from kt_sft.models.spec import find_experts
from kt_sft.placement.inject import expert_settings
from kt_sft.placement.plan import Plan
from kt_sft.runtime import prepare_native
from kt_sft.sources.cache import uses_cache
from kt_sft.sources.opening import check_own, open_experts
from kt_sft.sources.packed import copies

if TYPE_CHECKING:
    from kt_sft.sources.protocol import ExpertSource


class OpenedModel:
    """A model's files and the settings for its experts. Each property is made when it is first asked for, and kept.

    Args:
        path: model directory, hub id as `from_pretrained` takes it, or GGUF file.
        settings: of the experts, as the user gave them; defaults when left out.
        is_loaded: transformers is going to load it, so what it asks of the files is asked here.
        gguf: what lies at `weight_path`, where somebody has opened it already.
        from_pretrained_kwargs: those of `from_pretrained` that say which files and which devices.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: KTConfig | None = None,
        *,
        is_loaded: bool = False,
        gguf: GgufIndex | None = None,
        **from_pretrained_kwargs: Any,
    ):
        self.path = path
        self.given = KTConfig() if settings is None else settings
        self.kwargs = from_pretrained_kwargs
        self.hub_kwargs = {name: value for name, value in from_pretrained_kwargs.items() if name in HUB_ARGS}
        self._is_loaded, self._is_checked = is_loaded, False
        self._gguf = gguf
        places = (path, self.given.weight_path, self.given.optimize_rule)
        self._seen = {place: marks(place) for place in places if place is not None}

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenedModel:
        """transformers copies what travels with a model's config."""
        return self

    def is_current(self) -> bool:
        """Whether all files are as they were when this was made, further parts of a GGUF file included."""
        if any(marks(place) != seen for place, seen in self._seen.items()):
            return False
        weights = self.__dict__.get("weights")
        return not isinstance(weights, GgufIndex) or weights.unchanged.all()

    @cached_property
    def gguf(self) -> GgufIndex | None:
        """The GGUF file that is the model.

        Raises:
            FormatError: damaged or incomplete.
        """
        return GgufIndex.from_path(self.path) if is_gguf_model(self.path) else None

    @cached_property
    def config_file(self) -> Path:
        """config.json: local, from the hub's cache, or fetched; the GGUF file where that is the model.

        Raises:
            FormatError: neither there nor to be had.
        """
        return Path(self.path) if self.gguf is not None else find_config_file(self.path, self.hub_kwargs)

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """What config.json holds, or in its words the metadata of a GGUF file.

        Raises:
            FormatError: see `config_values`.
            UnsupportedModel: a GGUF file of an architecture that is not known.
        """
        if self.gguf is not None:
            return model_config(self.gguf)
        return config_values(self.config_file, (lambda: self._headers) if self._is_here else None)

    @cached_property
    def quantization(self) -> Quantization | None:
        """How the model's own weights are quantised; None: they are not.

        Raises:
            UnsupportedModel: in a way that is not read.
        """
        return read_quantization(self.values.get("quantization_config"), self.config_file)

    def check_config(self) -> None:
        """Look at the settings that lie beside the weights.

        Raises:
            FormatError: see `values`; the same of generation_config.json.
            UnsupportedModel: see `quantization`; settings that transformers does not take.
        """
        if self.gguf is None and not self._is_checked:
            check_generation_config(self.config_file, self.values)
        _ = self.quantization
        self._is_checked = True

    @property
    def _is_here(self) -> bool:
        """Whether the path is the directory of the weights."""
        return os.path.isdir(self.path) and not self.hub_kwargs.get("subfolder")

    @cached_property
    def _headers(self) -> SafetensorsIndex:
        return SafetensorsIndex.from_directory(self.path, needs_metadata=self._is_loaded)

    @cached_property
    def index(self) -> QuantizedIndex | None:
        """The model's own tensors; None of a model on the hub and of a GGUF file.

        Raises:
            FormatError: files missing or damaged.
            UnsupportedModel: quantised in a way that is not read.
        """
        if "_headers" not in self.__dict__ and not self._is_here:
            return None
        return QuantizedIndex(self._headers, self.quantization)

    @cached_property
    def weights(self) -> Weights | None:
        """What holds the experts: what lies at `weight_path`, or the model itself; None: files on the hub.

        Raises:
            FormatError, UnsupportedModel: see `open_weights`.
        """
        place = self.given.weight_path
        if self._gguf is not None:
            return self._gguf
        is_same = place is None or (
            os.path.exists(place) and os.path.exists(self.path) and os.path.samefile(place, self.path)
        )
        # A folder with config.json may hold its weights in GGUF: then it is named as the place of the experts.
        if is_same and (place is None or self.gguf is not None or kind_at(Path(place)) == SAFETENSORS):
            return self.index if self.gguf is None else self.gguf
        return open_weights(place)

    @cached_property
    def config(self) -> PretrainedConfig:
        """transformers' config of the model, without the checkpoint's own quantization.

        Raises:
            UnsupportedModel: a model that transformers does not know, or whose own code does not run.
        """
        if self.gguf is not None:
            return gguf_config(self.gguf)
        trust = self.kwargs.get("trust_remote_code")
        return read_auto_config(self.path, **self.hub_kwargs, trust_remote_code=trust)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model without weights, on the meta device; `check_model` puts our experts modules into it.

        Raises:
            FormatError: a value that no model has.
            UnsupportedModel: a config that no model can be built of, or whose own code does not run.
        """
        _ = self.values  # checked before transformers computes with them
        return meta_model(self.config, self.kwargs.get("trust_remote_code"))

    @cached_property
    def specs(self) -> dict[str, ExpertsSpec]:
        """Routed experts by module name.

        Raises:
            UnsupportedModel: see `find_experts`.
        """
        return find_experts(self.model)

    @cached_property
    def key_map(self) -> KeyMap:
        """From the names of a checkpoint's tensors to the model's."""
        return KeyMap(self.model, self.specs)

    @cached_property
    def plan(self) -> Plan | None:
        """Where everything goes on this machine by the settings' rules; None without rules.

        Raises:
            ConfigError, FormatError: see `plan_here`.
        """
        return plan_here(self.model, self.given, self.kwargs.get("device_map"), given_dtype(self.kwargs))

    @cached_property
    def _planned(self) -> tuple[KTConfig, dict[str, str]]:
        if self.given.optimize_rule is None or not self._is_loaded:
            return self.given, {}
        return expert_settings(self.given, self.plan)

    @property
    def settings(self) -> KTConfig:
        """The settings that the experts get: the method is that of the rules, if they say one.

        Raises:
            ConfigError: see `expert_settings`.
        """
        return self._planned[0]

    @property
    def methods(self) -> dict[str, str]:
        """Of modules whose method is not `settings.method`."""
        return self._planned[1]

    @cached_property
    def source(self) -> ExpertSource | None:
        """Every expert, found; None of a model on the hub whose experts lie there.

        Raises:
            FormatError, UnsupportedModel: see `check_own` and `open_experts`.
        """
        weights = self.weights
        own = self.index if self._is_loaded or (weights is not None and weights.kind == SAFETENSORS) else None
        if own is not None:
            check_own(own, self.key_map)
        if weights is None:
            return None
        return open_experts(weights, self.specs, key_map=self.key_map, weight_load=self.settings.weight_load, own=own)

    @cached_property
    def formats(self) -> dict[str, Formats]:
        """What the kernels hold, by module.

        Raises:
            ConfigError: a method that takes something which the files do not have.
        """
        return self.formats_of({name: self.methods.get(name, self.settings.method) for name in self.specs})

    def formats_of(self, methods: Mapping[str, str]) -> dict[str, Formats]:
        """The same for these methods, by module.

        Raises:
            ConfigError: see `formats`.
        """
        if self.source is not None:
            group = self.settings.int4_group_size
            return {name: self.source.native_formats(name, method, group) for name, method in methods.items()}
        if "GGUF" in methods.values():
            raise ConfigError(
                f"method GGUF: expected weight_path, the GGUF file with the experts of {self.path}, found nothing; set "
                "it, or use BF16, INT8 or INT4"
            )
        return {name: method.lower() for name, method in methods.items()}

    @cached_property
    def is_mapped(self) -> bool:
        """Whether experts will be used in mapped files."""
        if uses_cache(self.settings) and not (self.source is not None and self.source.is_packed):
            return not copies(self.settings.weight_load)
        return self.source is not None and self.source.is_mapped

    @cached_property
    def rest_bytes(self) -> int:
        """Bytes of parameters and buffers outside the experts that stay in main memory."""
        placed = self.kwargs.get("device_map") if self.plan is None else self.plan.device_map()
        return bytes_in_main_memory(self.model, self.specs, placed)

    @cached_property
    def memory(self) -> memory.MemoryEstimate:
        """What the model needs of main memory."""
        group = self.settings.int4_group_size
        return memory.needed(self.specs, self.rest_bytes, self.formats, group, is_mapped=self.is_mapped)

    def check_memory(self, rest_bytes: int | None = None) -> None:
        """Raise unless the model fits; warn where mapped experts will be read again and again.

        Args:
            rest_bytes: what stays in main memory beside the experts; None: as the model is without weights.
        Raises:
            NotEnoughMemory: needed and available bytes, and the formats that would fit.
        """
        settings, rest_bytes = self.settings, self.rest_bytes if rest_bytes is None else rest_bytes
        memory.check_experts(
            *(self.specs, rest_bytes, self.formats, settings.int4_group_size),
            method=settings.method,
            is_mapped=self.is_mapped,
        )

    def for_loading(self, model: PreTrainedModel, files: Iterable[str | os.PathLike[str]]) -> OpenedModel:
        """This, for the model that transformers has built and the files that it found; opened for them where they are
        others: of the hub, changed since, or of another class of the same config.

        Args:
            model: on the meta device, its experts modules still in place.
        Raises:
            FormatError: weights that are no safetensors; see `source`.
        """
        files = [Path(file) for file in files]
        foreign = [file for file in files if file.suffix != ".safetensors"]
        if foreign:
            found, remedy = foreign[0].suffix, "convert with save_pretrained"
            raise FormatError(foreign[0], "weights", expected="safetensors", found=found, remedy=remedy)
        is_current, index = self.is_current(), self.index
        is_read = is_current and index is not None
        is_read = is_read and {*map(os.path.realpath, self._headers.files)} == {*map(os.path.realpath, files)}
        if is_read and self._shapes == shapes_of(model) and self.specs == find_experts(model):
            return self
        kept = ["config_file", "plan", "_planned", *(("values", "quantization") if is_current else ())]
        kept += ["_headers", "index"] if is_read else []
        kept += ["weights"] if is_current and (is_read or self.weights is not index) else []
        other = OpenedModel(self.path, self.given, is_loaded=True, **self.kwargs)
        other.__dict__.update({name: self.__dict__[name] for name in kept if name in self.__dict__}, model=model)
        if not is_read:
            other._headers = SafetensorsIndex.from_files(files)
        return other

    def forget_model(self) -> None:
        """Free the model without weights, which somebody has changed; it is built again where it is asked for."""
        self.__dict__.pop("model", None)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes_of(self.model)


def open_model(
    path: str | os.PathLike[str], settings: KTConfig, *, gguf: GgufIndex | None = None, **from_pretrained_kwargs: Any
) -> OpenedModel:
    """Open a model that is going to be loaded, and look at everything but memory that loading would refuse.

    Args:
        gguf: the file that `weight_path` names, if somebody has opened it.
    Raises:
        KTError: see `load_model`; of a model on the hub only tensors at `weight_path` are looked at.
    """
    prepare_native(settings)
    if is_gguf_model(path):
        gguf = GgufIndex.from_path(path)
        file, path = path, model_directory(gguf, settings.weight_cache)
        if settings.weight_path is None:
            settings = dataclasses.replace(settings, weight_path=str(file))
        else:
            gguf = None
    opened = OpenedModel(path, settings, is_loaded=True, gguf=gguf, **from_pretrained_kwargs)
    opened.check_config()
    _ = opened.index, opened.weights, opened.specs, opened.plan, opened.formats, opened._shapes
    return opened


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that a checkpoint of a model may hold."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

"""From a checkpoint to a packed container: what `kt-sft convert` does."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kt_sft.config import KTConfig
from kt_sft.convert.plan import ConvertPlan, finished_manifest, plan_conversion
from kt_sft.convert.run import Progress, convert
from kt_sft.convert.verify import verify
from kt_sft.errors import ConfigError, FormatError
from kt_sft.formats.gguf import SUFFIX, GgufIndex
from kt_sft.formats.packed import PackedContainer, is_container
from kt_sft.formats.packed_manifest import Manifest
from kt_sft.integrations.transformers.base_model import meta_model
from kt_sft.integrations.transformers.model_files import check_config_file, find_config_file
from kt_sft.models.spec import find_experts
from kt_sft.runtime import prepare_native
from kt_sft.sources.gguf import GgufExperts
from kt_sft.sources.opening import ExpertSource, open_experts, open_weight_path

if TYPE_CHECKING:
    from kt_sft.models.spec import ExpertsSpec

# Input type -> beginnings of the names that tensors of such a checkpoint have in `ExpertSource.formats`.
INPUT_TYPES = {"auto": ("",), "bf16": ("BF16",), "fp16": ("F16",), "fp8": ("F8",), "gguf": ()}


@dataclass(frozen=True)
class Converted:
    """Result of a conversion; `is_new` is false where the container was there already."""

    manifest: Manifest
    plan: ConvertPlan
    is_new: bool


def convert_checkpoint(
    input_path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: KTConfig,
    *,
    input_type: str = "auto",
    overwrite: bool = False,
    check: bool = False,
    trust_remote_code: bool = False,
    bar: Callable[[str, int], AbstractContextManager[Progress]],
) -> Converted:
    """Pack all experts of a checkpoint.

    Args:
        config: weight format and threads.
        input_type: what the checkpoint must hold; `auto` takes any.
        check: read the container back afterwards (or the one that is there already).
        trust_remote_code: whether code beside the checkpoint's config.json may run.
        bar: shows progress: (what, experts) -> context that gives the function to call.

    Raises:
        KTError: see `open_source`, `kt_sft.convert.run.convert` and `kt_sft.convert.verify.verify`.
    """
    if config.method in ("RAWINT4", "GGUF"):
        found = config.method.lower()
        raise ConfigError(
            f"quant-method: expected bf16, int8 or int4, found {found}; load such a checkpoint without a container"
        )
    prepare_native(config)
    source, specs, model_type = open_source(input_path, input_type, trust_remote_code=trust_remote_code)
    plan = plan_conversion(source, specs, output, config.weight_format, config.int4_group_size, model_type)
    is_new = overwrite or finished_manifest(plan) is None
    if is_new:
        with bar("Converting", plan.num_experts) as progress:
            manifest = convert(source, plan, overwrite=overwrite, progress=progress)
    with PackedContainer(plan.output) as container:
        manifest = container.manifest
        if check:
            with bar("Verifying", plan.num_experts) as progress:
                verify(container, source, specs, progress=progress)
    return Converted(manifest, plan, is_new)


def open_source(
    path: str | os.PathLike[str], input_type: str = "auto", *, trust_remote_code: bool = False
) -> tuple[ExpertSource, dict[str, ExpertsSpec], str]:
    """The experts of a checkpoint, their shapes and the model type.

    Args:
        path: a directory with config.json and weights in safetensors or GGUF, a GGUF file in such a directory, or one
            that holds a whole model (docs/sources.md).
        trust_remote_code: whether code beside config.json may run.
    Raises:
        FormatError: files missing or damaged.
        UnsupportedModel: no routed experts, or a model or experts that are not known.
        ConfigError: the checkpoint is not of the input type, or is a container already.
    """
    path = Path(path)
    if not path.exists():  # a name that could be a hub's is none here: its files are wanted
        expected = "a checkpoint directory or a GGUF file"
        raise FormatError(path, "checkpoint", expected=expected, found="nothing", remedy="correct the path")
    if is_container(path):
        raise ConfigError(f"input-path: expected a checkpoint, found a packed container in {path}")
    folder = path.parent if path.is_file() else path
    if path.suffix == SUFFIX and not (folder / "config.json").is_file():
        weights = GgufIndex.from_path(path)
        model = meta_model(path)
    else:
        check_config_file(find_config_file(str(folder), {}))
        weights = open_weight_path(path)
        model = meta_model(folder, trust_remote_code=trust_remote_code)
    specs = find_experts(model)
    if isinstance(weights, GgufIndex):
        source: ExpertSource = GgufExperts(weights, specs)
    else:
        with weights:
            files = sorted({str(file) for name in weights for file in weights.files(name)})
        source = open_experts(model, specs, files, KTConfig())
    check_input_type(source, input_type)
    return source, specs, model.config.model_type


def check_input_type(source: ExpertSource, input_type: str) -> None:
    """Raise unless the source is what the user takes it for.

    Raises:
        ConfigError: it is something else, or the type is none.
    """
    if input_type not in INPUT_TYPES:
        raise ConfigError(f"input-type: expected one of {', '.join(INPUT_TYPES)}, found {input_type!r}")
    found = sorted({name for names in source.formats.values() for name in names})
    if input_type == "gguf":
        fits = isinstance(source, GgufExperts)
    else:
        fits = all(name.startswith(INPUT_TYPES[input_type]) for name in found)
    if not fits:
        raise ConfigError(f"input-type: expected {input_type}, found {', '.join(found)} in {source.path}; use auto")

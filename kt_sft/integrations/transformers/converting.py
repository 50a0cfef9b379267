"""From a checkpoint to a packed container: what `kt-sft convert` does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kt_sft.config import KTConfig
from kt_sft.convert.plan import ConvertPlan, finished_manifest, plan_conversion
from kt_sft.convert.run import convert
from kt_sft.convert.verify import verify
from kt_sft.errors import ConfigError, FormatError
from kt_sft.formats.checkpoint import GGUF, SAFETENSORS, kind_at
from kt_sft.formats.gguf import SUFFIX
from kt_sft.formats.packed import PackedContainer, is_container
from kt_sft.formats.packed_manifest import Manifest
from kt_sft.integrations.transformers.opened import OpenedModel
from kt_sft.progress import Bar
from kt_sft.runtime import prepare_native

if TYPE_CHECKING:
    from kt_sft.models.layout import ExpertsSpec
    from kt_sft.sources.protocol import ExpertSource

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
    bar: Bar,
) -> Converted:
    """Pack all experts of a checkpoint.

    Args:
        config: weight format and threads.
        input_type: what the checkpoint must hold; `auto` takes any.
        check: read the container back afterwards (or the one that is there already).
        trust_remote_code: whether code beside the checkpoint's config.json may run.
        bar: shows progress in experts.

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
    plan = plan_conversion(source, specs, output, config.format, config.int4_group_size, model_type)
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
    if path.is_file() and path.suffix != SUFFIX:
        expected = "a checkpoint directory or a GGUF file"
        raise FormatError(path, "checkpoint", expected=expected, found="another file", remedy="name its directory")
    folder = path.parent if path.is_file() else path
    if path.suffix == SUFFIX and not (folder / "config.json").is_file():
        opened = OpenedModel(path)
    else:
        apart = {} if kind_at(path) == SAFETENSORS else {"weight_path": str(path)}
        opened = OpenedModel(str(folder), KTConfig(**apart), trust_remote_code=trust_remote_code)
        opened.check_config()
    _ = opened.weights
    source = opened.source
    assert source is not None  # of a path that is there
    check_input_type(source, input_type)
    return source, opened.specs, opened.config.model_type


def check_input_type(source: ExpertSource, input_type: str) -> None:
    """Raise unless the source is what the user takes it for.

    Raises:
        ConfigError: it is something else, or the type is none.
    """
    if input_type not in INPUT_TYPES:
        raise ConfigError(f"input-type: expected one of {', '.join(INPUT_TYPES)}, found {input_type!r}")
    found = sorted({name for names in source.formats.values() for name in names})
    if input_type == "gguf":
        fits = source.kind == GGUF
    else:
        fits = all(name.startswith(INPUT_TYPES[input_type]) for name in found)
    if not fits:
        raise ConfigError(f"input-type: expected {input_type}, found {', '.join(found)} in {source.path}; use auto")

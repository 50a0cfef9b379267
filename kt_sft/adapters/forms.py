"""Which form an adapter on disk has, opening it, and converting it to another form."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kt_sft.adapters import fused, gguf, ktransformers, layout, options, peft_config, per_expert
from kt_sft.adapters.folder import adapter_file, left_out
from kt_sft.adapters.kinds import FORMS, check_form
from kt_sft.adapters.model import OTHER_MODEL, PARAMETERS, Adapter, BaseModel
from kt_sft.adapters.patterns import check_speed
from kt_sft.adapters.tensor_file import TensorFile, write_tensors
from kt_sft.errors import ConfigError, FormatError, nearest
from kt_sft.formats import gguf_writer
from kt_sft.formats.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG
from kt_sft.formats.gguf import SUFFIX, GgufIndex
from kt_sft.formats.json_object import read_object
from kt_sft.formats.staging import new_path, put_copy, put_json

logger = logging.getLogger(__name__)

_FUSED = re.compile(r".+\.experts(\.base_layer)*\.lora_[AB]\.weight")
_COPIED = ("tokenizer", "special_tokens", "added_tokens", "vocab.", "merges.", "chat_template")


def base_name(path: str | os.PathLike[str]) -> str | None:
    """The base model that an adapter names; None if it names none.

    Raises:
        FormatError: no adapter, or a damaged one.
    """
    source = adapter_file(path)
    if source.suffix == SUFFIX and source.is_file():
        index = GgufIndex.from_path(source)
        gguf.check_metadata(index)
        name = index.metadata.get(gguf.BASE_KEY)
    else:
        name = peft_config.read_config(source).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def is_per_expert(names: Iterator[str] | list[str] | TensorFile) -> bool:
    """Whether tensors are pairs per expert rather than of all experts of a layer."""
    matches = map(per_expert.PER_EXPERT.fullmatch, names)
    return any(match is not None and "experts" in match["module"].split(".") for match in matches)


def is_fused(names: Iterator[str] | list[str] | TensorFile) -> bool:
    """Whether tensors are pairs of all experts of a layer."""
    return any(_FUSED.fullmatch(name) for name in names)


def open_adapter(
    path: str | os.PathLike[str], base: BaseModel, *, reads_headers_only: bool = False, door: str = options.READ
) -> Adapter:
    """Open an adapter of any form; names and shapes are compared with the model, and every number is looked at.

    Args:
        reads_headers_only: leave the numbers alone.
        door: whoever opens it, of `options`.
    Raises:
        FormatError: missing, damaged, incomplete, with NaN or infinity, or made for another model.
        UnsupportedModel: a GGUF adapter of a family that has no names there.
    """
    source = adapter_file(path)
    if source.is_file():
        adapter = gguf.read(source, base)
        _check_not_empty(adapter, source)
        if not reads_headers_only:
            gguf.check_finite(source)
        return adapter
    config = peft_config.read_config(source, door)
    check_speed(config, base.target_names(), source / ADAPTER_CONFIG)
    beside = peft_config.read_side_file(source)
    there = beside.get("model_type")
    if there is None and door == options.LOAD:  # elsewhere the user has named the model, or it is this one
        there = _model_type_of(config.get("base_model_name_or_path"))
    if there and there != base.model_type:
        raise FormatError(
            source, "trained on another model type", expected=base.model_type, found=there, remedy=OTHER_MODEL
        )
    tensors, experts = TensorFile(source), TensorFile.of_experts(source)
    opened = _read(source, tensors, experts, config, beside, base)
    if not base.may_grow:
        _check_not_empty(opened, tensors.path)
    for sentence in left_out(source):
        _say_once(source, sentence)
    for file in (tensors, experts) if not reads_headers_only else ():
        if file is not None:
            file.check_finite()
    if door == options.READ:  # who builds PEFT's modules of it looks at the experts' options with their names
        options.check_file(door, config, source, opened.experts)
    return replace(opened, beside=beside)


@functools.cache  # a run opens its adapter when it is checked, and when it is loaded
def _say_once(source: Path, sentence: str) -> None:
    logger.warning("%s: %s", source, sentence)


def _model_type_of(base_model: str | None) -> str | None:
    """That of the base model that an adapter names, if its directory is still there."""
    try:
        found = read_object(Path(base_model, MODEL_CONFIG)).get("model_type") if base_model else None
    except FormatError:
        return None
    return found if isinstance(found, str) else None


def _check_not_empty(adapter: Adapter, path: Path) -> None:
    if not adapter.ranks and not adapter.whole and not adapter.extras:
        raise FormatError(path, "tensors", expected="LoRA pairs", found="none")


def _read(
    source: Path,
    tensors: TensorFile,
    experts: TensorFile | None,
    config: dict[str, Any],
    beside: dict[str, Any],
    base: BaseModel,
) -> Adapter:
    """The adapter of a directory, by the reader of its form."""
    if experts is not None:
        if is_per_expert(tensors) or is_fused(tensors):
            expected, found = f"LoRA of routed experts in one of {tensors.path.name} and it", "in both"
            raise FormatError(experts.path, "routed experts", expected=expected, found=found)
        return ktransformers.read(source, tensors, experts, config, base)
    if is_per_expert(tensors):
        return per_expert.read(source, tensors, config, base)
    full = _with_parameters(config, tensors, base)
    adapter = fused.read(source, tensors, full, beside, base)
    return adapter if full is config else replace(adapter, as_is=())


def _with_parameters(config: dict[str, Any], tensors: TensorFile, base: BaseModel) -> dict[str, Any]:
    """`target_parameters` where the config has none but the tensors say so, as adapters for vLLM of fused families.

    Raises:
        FormatError: a pair that has the widths of no parameter.
    """
    if config.get("target_parameters") or not is_fused(tensors):
        return config
    found: list[str] = []
    for module, spec in base.specs.items():
        key = f"{module}.lora_A.weight"
        if f"{module}.base_layer.lora_A.weight" in tensors:
            found += [f"{module}.{parameter}" for parameter in PARAMETERS]
        elif key in tensors:
            shapes = [tensors.shape(k) for k in (key, f"{module}.lora_B.weight") if k in tensors]
            widths = sorted(shape[1 - i] for i, shape in enumerate(shapes) if len(shape) == 2)
            mine = [p for p in PARAMETERS if sorted(layout.matrix_shape(spec, p)) == widths]
            if not mine:
                expected = "a pair of gate_up_proj or down_proj"
                raise FormatError(tensors.path, f"tensor {key}", expected=expected, found=[list(s) for s in shapes])
            found.append(f"{module}.{mine[0]}")
    return config | {"target_parameters": found}


def convert(adapter: Adapter, form: str, output: str | os.PathLike[str]) -> Path:
    """Write an adapter in another form, aside and then renamed.

    Args:
        output: new or empty directory; for gguf a file, or a directory for it.
    Returns:
        What was written.

    Raises:
        ConfigError: no such form, or the output is the adapter itself.
        OutputError: something else is there, or it cannot be written.
        UnsupportedModel: the form cannot hold this adapter.
    """
    if form not in FORMS:
        raise ConfigError(f"to: expected one of {', '.join(FORMS)}, found {form!r}; {nearest(form, FORMS)}")
    target = Path(output)
    if form == "gguf" and target.suffix != SUFFIX:
        target = target / f"{adapter.source.stem or 'adapter'}{SUFFIX}"
    if target.resolve() == adapter.source.resolve():
        raise ConfigError(f"output: {target} is the adapter that is read; choose another path")
    check_form(adapter, form)
    with new_path(target, is_file=form == "gguf", needed_bytes=_size_of(adapter.source)) as staging:
        if form == "gguf":
            metadata, plan, pieces = gguf.write(adapter)
            gguf_writer.write(staging, metadata, plan, pieces)
        else:
            write_directory(adapter, form, staging)
    return target


def _size_of(source: Path) -> int:
    """About what another form of an adapter takes."""
    return source.stat().st_size if source.is_file() else sum(p.stat().st_size for p in source.iterdir() if p.is_file())


def write_directory(adapter: Adapter, form: str, folder: Path) -> None:
    """The files of an adapter directory in one of the forms that are directories.

    Raises:
        UnsupportedModel: the form cannot hold this adapter.
    """
    kind = fused if form in fused.RELEASES else per_expert
    config, _ = kind.write(adapter, form)
    write_tensors(folder / ADAPTER_WEIGHTS, lambda: kind.write(adapter, form)[1])
    put_json(folder / ADAPTER_CONFIG, config)
    for path in sorted(adapter.source.glob("*")) if adapter.source.is_dir() else ():
        if path.name.startswith(_COPIED) and path.is_file():
            put_copy(path, folder)
    has_parameters = bool(config["target_parameters"])
    peft_config.write_side_file(
        folder,
        adapter.beside.get("model_type", adapter.base.model_type),
        peft_config.dropout_of(adapter) if has_parameters else None,
        layout.form_of(config["peft_version"]) if has_parameters else None,
    )

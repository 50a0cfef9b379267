"""Faults of a configuration that LLaMA-Factory or transformers find while they parse it, as one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_npu_available, is_torch_xpu_available

from kt_sft.compat.transformers import reporters
from kt_sft.errors import ConfigError, as_ours, nearest, one_line
from kt_sft.integrations.llamafactory import args, autoload, value_types
from kt_sft.integrations.llamafactory.run_file import read_run_file

_NOT_LISTED = ("azure_ml", "flyte")  # integrations that transformers leaves out of its list though they are installed
_THEIRS = (ValueError, TypeError, ImportError, AssertionError, NotImplementedError, OSError)
_GETTERS = ("get_train_args", "get_infer_args", "get_eval_args")


def patch_parser(parser: ModuleType) -> None:
    """`get_train_args` and its like, whose own checks follow after parsing, and `read_args`, which reads a file."""
    autoload.require(parser, *_GETTERS)
    stock_read = parser.read_args

    def read_args(values: Any = None) -> Any:
        if values is None and len(sys.argv) > 1 and sys.argv[1].endswith((".yaml", ".yml")):
            read_run_file(sys.argv[1])  # OmegaConf waits for pipes, and crashes on lists in lists in lists ...
        # Of OmegaConf, YAML or the file itself; nobody knows yet whether use_kt is set.
        with as_ours(lambda error: ConfigError(f"run configuration: {one_line(error)}")):
            if values is None and sys.argv[1:2] and sys.argv[1].endswith(".json"):
                return read_run_file(sys.argv[1], sys.argv[2:])  # the stock code hands the path itself to `json.load`
            return stock_read(values)

    def in_one_line(stock: Any) -> Any:
        def get_args(values: Any = None) -> Any:
            values = parser.read_args(values)
            with errors_in_one_line(values):
                return stock(values)

        return get_args

    parser.read_args = read_args
    for name in _GETTERS:
        setattr(parser, name, in_one_line(getattr(parser, name)))


@contextmanager
def errors_in_one_line(values: dict[str, Any] | list[str]) -> Iterator[None]:
    """Errors that others raise about a configuration with `use_kt`, as ours."""
    is_ours = args.is_set(values, "use_kt")
    with as_ours(lambda error: ConfigError(f"configuration: {one_line(error)}") if is_ours else None, _THEIRS):
        yield


def check_unparsed(values: dict[str, Any] | list[str], kinds: Iterable[type]) -> dict[str, Any] | list[str]:
    """What the dataclasses would take as it is, or refuse with a remedy for others.

    Args:
        kinds: of arguments that are parsed.
    Returns:
        The values with the types of their keys.
    Raises:
        ConfigError: lists every fault; without `use_kt` only one of this key.
    """
    is_ours, faults = args.is_set(values, "use_kt"), []
    if isinstance(values, dict):
        typed, faults = value_types.read(values if is_ours else {"use_kt": values.get("use_kt", False)}, kinds)
        values = {**values, **typed} if is_ours else values
    elif str(args.given(values, "use_kt")).lower() not in ("none", *args.YES, *args.NO):
        faults = [f"use_kt: expected true or false, found {args.given(values, 'use_kt')!r}"]
    if is_ours:
        faults += args.range_faults(values) if isinstance(values, dict) else ()  # an alpha of 0 is one of 2 r later
        faults += args.deepspeed_faults(args.given(values, "deepspeed"))
        if any(hasattr(kind, "per_device_train_batch_size") for kind in kinds):
            has_npu = is_torch_npu_available()
            has_gpu = torch.cuda.is_available() or has_npu or is_torch_xpu_available()
            faults += args.precision_faults(values, has_bf16=is_torch_bf16_gpu_available() or has_npu, has_gpu=has_gpu)
    if faults:
        raise ConfigError(faults)
    return values


def reporting_faults(report_to: Any) -> Iterator[str]:
    """What `report_to` names and the trainer could not report to, which it finds after the model is loaded."""
    there, known = reporters()
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name in ("all", "none", *_NOT_LISTED) or name in there:
            continue
        if name in known:
            yield f"report_to: {name} is not installed; install it, or set report_to: none"
        else:
            yield f"report_to: {name}: unknown; {nearest(name, ['none', *known])}"


def raise_fault(message: str) -> NoReturn:
    """In the place of `ArgumentParser.error`, which prints three hundred options before the fault.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(re.sub(r"^argument --(\w+)(/--[\w-]+)*: ", r"\1: ", message))

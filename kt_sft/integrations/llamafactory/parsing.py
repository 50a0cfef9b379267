"""Faults of a configuration that LLaMA-Factory or transformers find while they parse it, as one line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available, is_torch_npu_available, is_torch_xpu_available

from kt_sft.errors import ConfigError, KTError
from kt_sft.integrations.llamafactory import args, autoload, run_file

_GETTERS = ("get_train_args", "get_infer_args", "get_eval_args")


def patch_parser(parser: ModuleType) -> None:
    """`get_train_args` and its like, whose own checks follow after parsing, and `read_args`, which reads a file."""
    autoload.require(parser, *_GETTERS)
    stock_read = parser.read_args

    def read_args(values: Any = None) -> Any:
        if values is None and len(sys.argv) > 1 and sys.argv[1].endswith((".yaml", ".yml")):
            run_file.read_config(sys.argv[1])  # OmegaConf waits for pipes, and crashes on lists in lists in lists ...
        try:
            return stock_read(values)
        except KTError:
            raise
        except Exception as error:  # of OmegaConf, YAML or the file itself; nobody knows yet whether use_kt is set
            raise ConfigError(f"run configuration: {_in_one_line(error)}") from error

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
    try:
        yield
    except KTError:
        raise
    except (ValueError, TypeError, ImportError, AssertionError, NotImplementedError, OSError) as error:
        if not args.is_set(values, "use_kt"):
            raise
        raise ConfigError(f"configuration: {_in_one_line(error)}") from error


def check_unparsed(values: dict[str, Any] | list[str], kinds: Iterable[type]) -> None:
    """What transformers' TrainingArguments would refuse with a remedy for others.

    Args:
        kinds: of arguments that are parsed.
    Raises:
        ConfigError: lists every fault.
    """
    if not args.is_set(values, "use_kt"):
        return
    faults = list(args.deepspeed_faults(args.given(values, "deepspeed")))
    if any(hasattr(kind, "per_device_train_batch_size") for kind in kinds):
        has_npu = is_torch_npu_available()
        has_gpu = torch.cuda.is_available() or has_npu or is_torch_xpu_available()
        faults += args.precision_faults(values, has_bf16=is_torch_bf16_gpu_available() or has_npu, has_gpu=has_gpu)
    if faults:
        raise ConfigError(faults)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

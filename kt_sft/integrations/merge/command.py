"""What `kt-sft merge` does: adapters into a checkpoint, written as safetensors or as one GGUF file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kt_sft.adapters.forms import base_name
from kt_sft.errors import ConfigError
from kt_sft.formats.staging import new_path
from kt_sft.integrations.merge.checkpoint import MergedCheckpoint
from kt_sft.integrations.merge.gguf import KINDS, gguf_plan
from kt_sft.integrations.merge.safetensors import write_merged
from kt_sft.integrations.transformers.base_model import default_name
from kt_sft.progress import Bar


def merge(
    model: str | os.PathLike[str] | None,
    adapters: Sequence[str | os.PathLike[str]],
    output: Path,
    to: str,
    bar: Bar,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """Merge adapters into a checkpoint and write the result, aside and then renamed.

    Args:
        model: directory of the base model; None: the one that the first adapter names.
        to: `hf`, `gguf-q8_0` or `gguf-bf16`.
        trust_remote_code: whether code beside the model's config.json may run.
    Raises:
        KTError: see `MergedCheckpoint`, `new_path` and `GgufModelFile.write`.
    """
    if to != "hf" and to not in KINDS:
        raise ConfigError(f"to: expected hf, {' or '.join(KINDS)}, found {to!r}")
    if model is None:
        model = default_name(base_name(adapters[0]), Path(adapters[0]))
        if model is None:
            raise ConfigError(f"{adapters[0]}: names no base model; name its directory with --model")
        if not Path(model).is_dir():
            raise ConfigError(
                f"{adapters[0]}: base model {model}: expected a directory, looked for in {os.getcwd()} and in the "
                "directories above the adapter, found none; name its directory with --model"
            )
    merged = MergedCheckpoint(model, adapters, trust_remote_code=trust_remote_code)
    if to == "hf":
        with new_path(output, is_file=False, needed_bytes=merged.num_bytes()) as staging:
            write_merged(merged, staging, bar)
        return output
    target = output if output.suffix == ".gguf" else output / f"{Path(model).name}-{to.removeprefix('gguf-')}.gguf"
    file = gguf_plan(merged, KINDS[to])
    with new_path(target, is_file=True, needed_bytes=file.num_bytes) as staging:
        file.write(staging, bar)
    return target

"""From checkpoint files into packed experts, and back to the files where a packed form has lost digits."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from kt_sft import env
from kt_sft.errors import GIB, FormatError
from kt_sft.formats.safetensors_index import SafetensorsIndex
from kt_sft.models.expert_keys import LayerSource

logger = logging.getLogger(__name__)


class ExpertFiles:
    """Reads experts in bf16 from the files that a model was loaded from, as long as these stay as they were.

    Args:
        index: of the files; taken over, and closed between two reads from different files.
    """

    def __init__(self, index: SafetensorsIndex):
        self._index = index
        self._marks: dict[Path, tuple[int, ...]] = {}  # file -> what tells a replaced or rewritten one
        self._mapped: set[Path] = set()

    def read(self, layer: LayerSource, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up `[inter, hidden]` and down `[hidden, inter]`, bf16; may be views of a mapped file.

        Raises:
            FormatError: a file is gone or no longer the one of the first read.
        """
        parts = layer.expert(expert)
        files = {self._index.info(part.key).file for part in parts}
        for file in files:
            self._check_unchanged(file)
        if files != self._mapped:
            self.close()
            self._mapped = files
        gate, up, down = (self._index.read(part.key, part.rows).to(torch.bfloat16) for part in parts)
        return gate, up, down

    def close(self) -> None:
        """Drop the file mappings; the next read makes them again."""
        self._index.close()
        self._mapped = set()

    def _check_unchanged(self, file: Path) -> None:
        try:
            now = os.stat(file)
            found = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)
        except OSError:
            found = ()
        if not found or self._marks.setdefault(file, found) != found:
            raise FormatError(
                file,
                "checkpoint of the experts",
                expected="as it was when the model was loaded",
                found="changed" if found else "missing",
                remedy="put the file back, or load the model again",
            )


def stream_experts(model: nn.Module, layers: dict[str, LayerSource], index: SafetensorsIndex) -> None:
    """Pack every expert, one at a time; nothing but the packed copy stays in anonymous memory.

    Experts whose format rounds remember where they came from: merging and saving start from there.
    """
    files = ExpertFiles(index)
    total = sum(layer.spec.num_experts for layer in layers.values())
    with hf_logging.tqdm(total=total, desc="Packing experts", unit="expert", disable=env.local_rank() > 0) as bar:
        for name, layer in layers.items():
            experts = model.get_submodule(name)
            for expert in range(layer.spec.num_experts):
                read = functools.partial(files.read, layer, expert)
                try:
                    experts.load_expert(expert, *read(), origin=read)
                except FormatError:
                    raise
                except ValueError as error:
                    raise _not_packable(f"expert {expert} of {name}", index, error) from None
                bar.update()
    files.close()
    packed_bytes = sum(model.get_submodule(name).packed_bytes for name in layers)
    logger.info("packed %d experts of %d layers in %.2f GiB", total, len(layers), packed_bytes / GIB)


def _not_packable(what: str, index: SafetensorsIndex, error: ValueError) -> FormatError:
    return FormatError(
        index.source,
        what,
        expected="weights that can be packed",
        found=str(error),
        remedy="download the checkpoint again, or use method BF16",
    )

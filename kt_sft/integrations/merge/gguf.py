"""A merged checkpoint as one GGUF file that llama.cpp opens: weights, config and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kt_sft.errors import UnsupportedModel
from kt_sft.formats.finite import is_finite
from kt_sft.formats.gguf_encode import encode, type_for
from kt_sft.formats.gguf_export import model_metadata
from kt_sft.formats.gguf_names import ARCHITECTURES, block_name, layer_of, permute
from kt_sft.formats.gguf_writer import PlannedGguf, write
from kt_sft.integrations.gguf.tokenizer_writer import tokenizer_metadata
from kt_sft.integrations.merge.checkpoint import MergedCheckpoint
from kt_sft.models.expert_keys import PROJECTIONS
from kt_sft.progress import Bar

KINDS = {"gguf-q8_0": "Q8_0", "gguf-bf16": "BF16"}
_SLICE = 1 << 22  # numbers that are encoded at a time
# What has to hold the largest number of a type, and a fraction of it: Q8_0 has the 127th part in f16.
_ROUNDED = {"F32": (torch.float32, 1), "BF16": (torch.bfloat16, 1), "Q8_0": (torch.float16, 127)}
# llama.cpp keeps these in f32: routing decides by small differences.
_FULL_PRECISION = ("ffn_gate_inp.weight", "exp_probs_b.bias")


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file, and what makes its parts, in f32 or the type of the checkpoint."""

    planned: PlannedGguf
    parts: Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class GgufModelFile:
    """Everything about the file but its data; `write` makes that tensor by tensor."""

    metadata: dict[str, Any]
    entries: list[_Entry]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(entry.planned.num_bytes for entry in self.entries)

    def write(self, path: Path, bar: Bar) -> None:
        """Write it; memory is that of one expert, or of one other tensor."""
        with bar("Merging", len(self.entries)) as move:

            def pieces() -> Iterator[Iterator[Tensor]]:
                for number, entry in enumerate(self.entries, 1):
                    rows = (rows for part in entry.parts() for rows in _some_rows(part))
                    yield (encode(part, kind) for part, kind in zip(rows, repeat(entry.planned.type)))
                    move(number, len(self.entries), entry.planned.name)

            write(path, self.metadata, [entry.planned for entry in self.entries], pieces())


def _some_rows(weight: Tensor) -> tuple[Tensor, ...]:
    """An embedding is encoded in slices: that takes several copies in f32."""
    return weight.split(max(1, _SLICE // weight.shape[-1])) if weight.dim() == 2 else (weight,)


def gguf_plan(merged: MergedCheckpoint, kind: str) -> GgufModelFile:
    """What a merged checkpoint becomes as a GGUF file; reads headers and the tokenizer only.

    Args:
        kind: `Q8_0` or `BF16`; vectors and the router stay f32, and rows that are no whole blocks BF16.
    Raises:
        UnsupportedModel: a family, a tensor, a tokenizer or a setting that has no name there.
    """
    config = {**merged.base.config, "model_type": merged.base.model_type}
    metadata = model_metadata(config, merged.folder.name, kind)
    metadata |= tokenizer_metadata(merged.folder, config["vocab_size"])
    entries: list[_Entry] = []
    for key in merged.keys:
        if merged.is_plain(key) and not merged.repeats(key) and not _is_left_out(key, config):
            entries.append(_plain(merged, key, kind, config))
    for module, spec in merged.base.specs.items():
        for projection in PROJECTIONS:
            shape = (spec.num_experts, *merged.base.expert_shape(module, projection))
            planned = _planned(f"blk.{layer_of(module)}.ffn_{projection}_exps.weight", kind, shape)
            entries.append(_Entry(planned, _experts(merged, module, projection, planned)))
    return GgufModelFile(metadata, sorted(entries, key=lambda entry: _place(entry.planned.name)))


def _planned(name: str, kind: str, shape: tuple[int, ...]) -> PlannedGguf:
    is_full = len(shape) == 1 or name.endswith(_FULL_PRECISION)
    return PlannedGguf(name, "F32" if is_full else type_for(kind, shape[-1]), shape)


def _is_left_out(key: str, config: dict[str, Any]) -> bool:
    """Prediction layers behind the last one, and tables that are computed."""
    parts = key.split(".")
    is_extra = parts[:2] == ["model", "layers"] and int(parts[2]) >= config["num_hidden_layers"]
    return is_extra or key.endswith("rotary_emb.inv_freq")


def _plain(merged: MergedCheckpoint, key: str, kind: str, config: dict[str, Any]) -> _Entry:
    name = block_name(key)
    if name is None:
        raise UnsupportedModel(
            f"GGUF model: tensor {key}",
            expected="tensors that llama.cpp knows",
            found="an unknown one",
            remedy="merge into hf instead",
        )
    heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}.get(
        name.partition(".")[2].partition(".")[2]
    )
    turn = permute(config[heads]) if heads and ARCHITECTURES[config["model_type"]] == "llama" else None

    planned = _planned(name, kind, merged.shape(key))

    def parts() -> Iterator[Tensor]:
        weight = _checked(merged, key, merged.plain(key), planned.type)
        yield weight if turn is None else turn(weight)

    return _Entry(planned, parts)


def _checked(merged: MergedCheckpoint, key: str, weight: Tensor, kind: str, module: str | None = None) -> Tensor:
    """The weight, if the file can hold its numbers.

    Raises:
        FormatError: it cannot.
    """
    if not is_finite(weight, _ROUNDED[kind][0], steps=_ROUNDED[kind][1]):
        raise merged.not_finite(key, weight, kind, module)
    return weight


def _experts(
    merged: MergedCheckpoint, module: str, projection: str, planned: PlannedGguf
) -> Callable[[], Iterator[Tensor]]:
    def parts() -> Iterator[Tensor]:
        for expert in range(merged.base.specs[module].num_experts):
            weight = merged.matrix(module, expert, projection).to(torch.float32)
            yield _checked(merged, planned.name, weight, planned.type, module)

    return parts


def _place(name: str) -> tuple[int, int]:
    """Embedding, blocks in order, then the rest: as llama.cpp's own files are laid out."""
    parts = name.split(".")
    return (1, int(parts[1])) if parts[0] == "blk" else (0 if parts[0] == "token_embd" else 2, 0)

"""One expert in kernel form: what a source loads into, and what the writer takes out."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kt_sft.formats.packed_manifest import ALIGNMENT
from kt_sft.nn.routed_experts import RoutedExperts

if TYPE_CHECKING:
    from kt_sft.models.layout import ExpertsSpec, Matrices


class ExpertSlot(RoutedExperts):
    """`RoutedExperts` with room for one, number 0, which every expert takes in turn."""

    def __init__(self, spec: ExpertsSpec, format: str, group: int):
        super().__init__(dataclasses.replace(spec, num_experts=1), formats=format, group_size=group or 32)
        self._blobs = tuple(map(_aligned, self.store.blob_bytes))
        into, out = (spec.inter, spec.hidden), (spec.hidden, spec.inter)
        self._unpacked = tuple(torch.empty(shape) for shape in (into, into, out))

    def export(self) -> tuple[np.ndarray, ...]:
        """The bytes of gate, up and down; overwritten by the next call."""
        self.store.export_expert(0, *self._blobs)
        return self._blobs

    def errors(self, truth: Matrices) -> tuple[float, ...]:
        """rel-L2 of what is held against `truth` (bf16), for gate, up and down."""
        self.store.unpack_expert(0, *self._unpacked, dtype="f32")
        return tuple(_rel_l2(held, want) for held, want in zip(self._unpacked, truth))


def _rel_l2(held: Tensor, want: Tensor) -> float:
    want = want.float()
    norm = torch.linalg.vector_norm(want).item()
    difference = torch.linalg.vector_norm(held.sub_(want)).item()  # in place: unpacking fills it anew
    return difference / norm if norm else difference


def _aligned(count: int) -> np.ndarray:
    memory = np.empty(count + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + count]

"""Our table of names in GGUF files against that of the gguf library, with every deviation named."""

from __future__ import annotations

import pytest

from kt_sft.formats.ggml_types import GGML_TYPES
from kt_sft.formats.gguf_names import _BLOCK_NAMES, _TOP, ARCHITECTURES, block_name

constants = pytest.importorskip("gguf.constants")
mapping = pytest.importorskip("gguf.tensor_mapping")

LAYER = 1
# transformers' name -> what the library knows it as: its converter renames it before it asks the table.
RENAMED = {"mlp.gate.e_score_correction_bias": "mlp.gate.e_score_correction.bias"}
# Tensors of these architectures that are not in the table: of experts, which have one of their own, and halves of kv_b.
ELSEWHERE = {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "attn_k_b", "attn_v_b"}
# Refused by name, as whatever a model would be computed without.
REFUSED = {"rope_freqs", "attn_rot_embd"}


def library_names(architecture: str) -> mapping.TensorNameMap:
    number = {name: key for key, name in constants.MODEL_ARCH_NAMES.items()}[architecture]
    return mapping.get_tensor_name_map(number, LAYER + 1)


def asked_of_library(model_type: str, name: str) -> tuple[str, str | None]:
    """A tensor's name in a checkpoint of a family, and what the library calls it in a file; None: it has none."""
    ours = f"model.layers.{LAYER}.{name}" if name in _BLOCK_NAMES.values() else name
    if model_type == "mixtral":
        ours = ours.replace(".mlp.gate.", ".block_sparse_moe.gate.")
    theirs = ours
    for before, after in RENAMED.items():
        theirs = theirs.replace(before, after)
    return ours, library_names(ARCHITECTURES[model_type]).get_name(theirs, try_suffixes=(".weight", ".bias"))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_are_those_of_the_library(model_type):
    found = dict(asked_of_library(model_type, name) for name in (*_TOP.values(), *_BLOCK_NAMES.values()))
    known = {ours: theirs for ours, theirs in found.items() if theirs is not None}
    assert {ours: block_name(ours) for ours in known} == known
    assert len(known) >= len(_TOP) + 7, "the library knows almost none: another table?"


def test_every_name_is_one_of_some_family():
    """A name that the library has for none of them would be our own invention."""
    for source, name in (_TOP | _BLOCK_NAMES).items():
        assert any(asked_of_library(model_type, name)[1] for model_type in ARCHITECTURES), source


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES.values())))
def test_tensors_of_the_library_are_known_or_left_out_by_name(architecture):
    number = {name: key for key, name in constants.MODEL_ARCH_NAMES.items()}[architecture]
    theirs = {
        constants.TENSOR_NAMES[tensor].removeprefix("blk.{bid}.").replace(".{xid}", "")
        for tensor in constants.MODEL_TENSORS[number]
    }
    ours = {source.rpartition(".")[0] for source in (*_TOP, *_BLOCK_NAMES)}
    assert theirs - ours <= ELSEWHERE | REFUSED, sorted(theirs - ours - ELSEWHERE - REFUSED)


def test_types_have_the_numbers_and_sizes_of_the_library():
    theirs = {
        kind.name: (kind.value, *constants.GGML_QUANT_SIZES[kind])
        for kind in constants.GGMLQuantizationType
        if kind in constants.GGML_QUANT_SIZES
    }
    ours = {name: (kind.number, kind.block_elements, kind.block_bytes) for name, kind in GGML_TYPES.items()}
    assert {name: theirs.get(name) for name in ours} == ours

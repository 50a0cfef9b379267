"""Operators (`KTMoEWrapper`) with the weights of a problem, beside its truth."""

from __future__ import annotations

import torch
from torch import Tensor

import kt_sft
from tests.helpers.layers import LayerCase, make_layer, make_problem, stored
from tests.helpers.reference import EXACT, Problem, solve

FORMAT_OF_METHOD = {"AMXBF16": "bf16", "AMXINT8": "int8", "AMXINT4": "int4", "BF16": "bf16", "INT8": "int8"}


def problem_of(method: str = "AMXBF16", **sizes: int) -> Problem:
    case = LayerCase(lora="none", sentinel=False, format=FORMAT_OF_METHOD[method], group=32, **sizes)
    return make_problem(case)


def operator_of(problem: Problem, method: str = "AMXBF16", *, layer_idx: int = 0, **arguments) -> kt_sft.KTMoEWrapper:
    experts, inter, hidden = problem.gate.shape
    made = kt_sft.KTMoEWrapper(
        layer_idx,
        arguments.pop("num_experts", experts),
        problem.ids.shape[1],
        hidden,
        inter,
        method=method,
        **arguments,
    )
    return made


def loaded(problem: Problem, method: str = "AMXBF16", *, layer_idx: int = 0, **arguments) -> kt_sft.KTMoEWrapper:
    made = operator_of(problem, method, layer_idx=layer_idx, **arguments)
    made.load_weights_from_tensors(*weights_of(problem))
    return made


def weights_of(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.gate.float(), problem.up.float(), problem.down.float()


def inputs_of(problem: Problem, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return problem.x.to(dtype), problem.ids.clone(), problem.weights.float()


def truth(problem: Problem) -> Tensor:
    """With the weights as the format stores them; ids that are no experts are skipped."""
    return solve(stored(problem, make_layer(problem)), EXACT)["out"]

"""Operators (`KTMoEWrapper`) with the weights of a problem, beside its truth."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import kt_sft
from kt_sft.native import native
from tests.helpers.layers import LayerCase, make_layer, make_problem, stored
from tests.helpers.reference import EXACT, KERNELS, Problem, solve
from tests.helpers.tolerance import model_bound, rounding_bound

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


def has_int8_rows(problem: Problem) -> bool:
    """Whether this CPU computes the format with int8 activations when nothing else is asked for."""
    return problem.format != "bf16" and native().default_rows(problem.format) == "int8"


def truth(problem: Problem) -> Tensor:
    """With the weights as the format stores them, and int8 activations where those are the CPU's way; ids that are no
    experts are skipped.
    """
    kept = stored(problem, make_layer(problem))
    if has_int8_rows(problem):
        return solve(dataclasses.replace(kept, rows="int8"), KERNELS)["out"]
    return solve(kept, EXACT)["out"]


def bound(*problems: Problem) -> float:
    """Norm-wise, between outputs and their truth; of several formats the widest."""
    terms = [max(problem.gate.shape) for problem in problems]
    return max(
        model_bound("out", n, "int8", problem.format)
        if has_int8_rows(problem)
        else rounding_bound("out", problem.format)
        for problem, n in zip(problems, terms, strict=True)
    )

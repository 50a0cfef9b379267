"""Deferred experts: which they are, where their output goes, and that no pass gets what another one left."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from torch import Tensor

from kt_sft.operator.chains import join_chain
from kt_sft.schedule.deferred import Deferral, LayerChain, split_deferred
from kt_sft.schedule.task_queue import run_now
from tests.helpers.operators import bound, inputs_of, loaded, problem_of, truth
from tests.helpers.reference import Problem
from tests.helpers.tolerance import rel_l2, rounding_bound

SKIP = 5


def split_by_hand(ids: Tensor, weights: Tensor, count: int) -> tuple[list[list[int]], list[list[int]]]:
    now, later = [], []
    for row, scores in zip(ids.tolist(), weights.tolist(), strict=True):
        here = [slot for slot, expert in enumerate(row) if expert < SKIP]
        lowest = sorted(here, key=lambda slot: (scores[slot], -slot))[:count]
        now.append([SKIP if slot in lowest else min(expert, SKIP) for slot, expert in enumerate(row)])
        later.append([expert if slot in lowest else SKIP for slot, expert in enumerate(row)])
    return now, later


@pytest.mark.parametrize("count", range(6))
def test_the_lowest_weights_among_the_experts_here_are_deferred(count):
    ids = torch.randint(0, SKIP + 1, (50, 4))
    weights = torch.rand(50, 4)
    weights[::3] = weights[::3].round(decimals=1)  # with ties
    now, later = split_deferred(ids, weights, count, SKIP)
    assert (now.tolist(), later.tolist()) == split_by_hand(ids, weights, count)


def layers_of(deferred: list[int], methods: list[str] | None = None, **arguments):
    """Problems that share x, and an operator for each."""
    methods = methods or ["AMXBF16"] * len(deferred)
    problems = [problem_of(method, seed=i, tokens=9) for i, method in enumerate(methods)]
    for problem in problems:
        problem.ids[::4, 0] = -1
    operators = [
        loaded(p, method, layer_idx=i, max_deferred_experts_per_token=d, **arguments)
        for i, (p, method, d) in enumerate(zip(problems, methods, deferred, strict=True))
    ]
    return problems, operators


def truths(problem: Problem, count: int) -> tuple[Tensor, Tensor]:
    """What the experts that are not deferred give, and what the others give."""
    ids = problem.ids.masked_fill(problem.ids < 0, SKIP)
    parts = split_deferred(ids, problem.weights.float(), count, SKIP)
    now, later = (truth(dataclasses.replace(problem, ids=part)) for part in parts)
    return now, later


def run_pass(problems: list[Problem], operators: list) -> list[Tensor]:
    outs = []
    for problem, operator in zip(problems, operators, strict=True):
        operator.submit_forward(*inputs_of(problem))
        outs.append(operator.sync_forward(problem.x.float()))
    return outs


@pytest.mark.parametrize("deferred", [[1, 1, 1], [2, 0, 3], [3, 3, 3], [0, 2, 0]], ids=str)
@pytest.mark.parametrize("methods", [["AMXBF16"] * 3, ["AMXINT8", "AMXINT4", "AMXBF16"]], ids=["bf16", "mixed"])
def test_deferred_output_is_added_to_the_next_layer_and_the_last_defers_nothing(deferred, methods):
    problems, operators = layers_of(deferred, methods)
    counts = [*deferred[:-1], 0]
    parts = [truths(problem, count) for problem, count in zip(problems, counts, strict=True)]
    wants = [now + (parts[i - 1][1] if i else 0) for i, (now, _) in enumerate(parts)]
    for _ in range(2):
        for out, want in zip(run_pass(problems, operators), wants, strict=True):
            assert rel_l2(out, want) < bound(*problems)
    for problem, operator, want in zip(problems, operators, wants, strict=True):
        assert rel_l2(operator.forward(*inputs_of(problem)), want) < bound(*problems)


def test_zero_deferred_is_bitwise_what_single_layers_give():
    problems, operators = layers_of([0, 0])
    alone = [loaded(problem).forward(*inputs_of(problem)) for problem in problems]
    assert all(map(torch.equal, run_pass(problems, operators), alone))


def test_the_sum_over_the_layers_is_what_all_experts_give():
    problems, operators = layers_of([2, 1, 1])
    total, want = sum(run_pass(problems, operators)), sum(truths(problem, 0)[0] for problem in problems)
    assert rel_l2(total, want) < rounding_bound("out")


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_new_pass_does_not_get_what_an_aborted_one_left(stop_after):
    problems, operators = layers_of([1, 1, 1])
    want = run_pass(problems, operators)
    run_pass(problems[:stop_after], operators[:stop_after])
    assert all(map(torch.equal, run_pass(problems, operators), want))


def test_a_pass_of_other_tokens_does_not_get_what_an_aborted_one_left():
    problems, operators = layers_of([1, 1])
    operators[0].forward(*inputs_of(problems[0]))
    alone = loaded(problems[1]).forward(*(t[:4] for t in inputs_of(problems[1])))
    assert torch.equal(operators[1].forward(*(t[:4] for t in inputs_of(problems[1]))), alone)


def test_a_failed_layer_leaves_nothing_to_the_next():
    problems, operators = layers_of([1, 1])
    want = run_pass(problems, operators)
    x, ids, weights = inputs_of(problems[0])
    operators[0].submit_forward(x, ids.fill_(77), weights)
    with pytest.raises(ValueError, match="found 77"):
        operators[0].sync_forward(x)
    with pytest.raises(ValueError, match="found 77"):  # the next layer of the same pass lacks an input
        operators[1].forward(*inputs_of(problems[1]))
    assert all(map(torch.equal, run_pass(problems, operators), want))


def test_passes_in_two_threads_do_not_meet():
    problems, operators = layers_of([2, 2])
    want = run_pass(problems, operators)
    operators[0].forward(*inputs_of(problems[0]))
    other: list[Tensor] = []
    thread = threading.Thread(target=lambda: other.extend(run_pass(problems, operators)))
    thread.start()
    thread.join()
    assert all(map(torch.equal, other, want))
    assert torch.equal(operators[1].forward(*inputs_of(problems[1])), want[1])


def test_inputs_of_deferred_experts_may_be_overwritten():
    problems, operators = layers_of([2, 2])
    want = run_pass(problems, operators)[1]
    x, ids, weights = inputs_of(problems[0])
    operators[0].submit_forward(x, ids, weights)
    operators[0].sync_forward(x)
    x.zero_(), ids.zero_(), weights.zero_()
    assert torch.equal(operators[1].forward(*inputs_of(problems[1])), want)


def test_experts_of_the_gpu_are_not_counted_among_the_deferred():
    problems, operators = layers_of([1, 1], num_gpu_experts=2)
    now, later = truths(dataclasses.replace(problems[0], ids=gpu_skipped(problems[0].ids)), 1)
    outs = run_pass(problems, operators)
    assert rel_l2(outs[0], now) < rounding_bound("out")
    second = truth(dataclasses.replace(problems[1], ids=gpu_skipped(problems[1].ids)))
    assert rel_l2(outs[1], second + later) < rounding_bound("out")


def gpu_skipped(ids: Tensor) -> Tensor:
    return ids.masked_fill(ids < 2, SKIP)


def test_layers_of_one_model_are_one_chain_until_the_numbers_start_again():
    models = ["a", "a", "b", "a", "b", "a"]
    numbers = [0, 2, 0, 3, 1, 0]
    layers = [join_chain(number, model, 0) for number, model in zip(numbers, models, strict=True)]
    chains = [layer.chain for layer in layers]
    assert chains[0] is chains[1] is chains[3]
    assert chains[2] is chains[4]
    assert chains[5] is not chains[0]
    assert chains[0].after(layers[1]) is layers[3] and chains[0].after(layers[3]) is None


def test_a_layer_that_is_gone_is_left_out():
    chain = LayerChain()
    layers = [Deferral(chain, 0) for _ in range(3)]
    del layers[1]
    assert chain.after(layers[0]) is layers[1]


def test_output_is_taken_once():
    chain = LayerChain()
    layer = Deferral(chain, 0)
    chain.leave(layer, 3, run_now(lambda: torch.ones(3, 2)))
    assert chain.take(layer, 3).result().sum() == 6
    assert chain.take(layer, 3) is None

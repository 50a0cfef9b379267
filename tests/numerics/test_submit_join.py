"""Submit and join: what may happen between them, in both directions, and what goes wrong where."""

from __future__ import annotations

import dataclasses
import gc
import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kt_sft.autograd import moe as autograd_moe
from kt_sft.autograd.moe import join
from kt_sft.autograd.settings import MoeSettings
from kt_sft.models.spec import ExpertsSpec
from kt_sft.nn import routed_experts
from kt_sft.nn.routed_experts import RoutedExperts
from kt_sft.transfer.routes import IN_PLACE
from tests.helpers.late_copies import Beside, LateCopies
from tests.helpers.layers import LayerCase, lora_inputs, make_call, make_layer, make_problem
from tests.helpers.reference import Problem


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(LayerCase(p=0.2, seed=8))


@pytest.fixture
def device(monkeypatch) -> LateCopies:
    """Takes the place of the CPU: what lies there goes through its stream."""
    device = LateCopies()
    monkeypatch.setattr(autograd_moe, "route_of", lambda tensor: device.route())
    return device


class Case:
    """Leaves, a layer, and a linear layer that stands for the shared experts."""

    def __init__(self, problem: Problem, dtype: torch.dtype = torch.float32, *, retain: bool = True):
        self.problem = problem
        self.layer = make_layer(problem)
        self.factors, leaves = lora_inputs(problem)
        self.x = problem.x.to(dtype).requires_grad_()
        self.weights = problem.weights.float().requires_grad_()
        self.leaves = [self.x, self.weights, *leaves.values()]
        self.call = make_call(problem, self.layer, retain=retain)
        generator = torch.Generator().manual_seed(0)
        self.shared = torch.randn(self.x.shape[1], self.x.shape[1], generator=generator, dtype=dtype)

    def submit(self, x: Tensor | None = None):
        return self.call.submit(self.x if x is None else x, self.problem.ids, self.weights, self.factors)

    def block(self, x: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
        ticket = self.call.submit(x, self.problem.ids, weights, factors)
        return x @ self.shared + join(ticket)

    def gradients(self, out: Tensor, **kwargs) -> list[Tensor]:
        return list(torch.autograd.grad(out, self.leaves, self.problem.dout.to(out.dtype), **kwargs))


def run_block(case: Case) -> list[Tensor]:
    out = case.block(case.x, case.weights, *case.factors)
    return [out.detach(), *case.gradients(out)]


def all_equal(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(map(torch.equal, got, want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("retain", [True, False], ids=["retain", "recompute"])
def test_results_over_a_device_are_those_in_place_bitwise(problem, device, dtype, retain, monkeypatch):
    with device:
        got = run_block(Case(problem, dtype, retain=retain))
    monkeypatch.undo()
    assert all_equal(got, run_block(Case(problem, dtype, retain=retain)))
    assert got[0].dtype is dtype and {"in", "out", "wait"} <= set(device.log)


def test_other_work_runs_beside_the_kernels_in_both_directions(problem, device):
    """The kernels of either direction cannot end before the shared experts have been there."""
    case = Case(problem)
    beside = case.call.layer = Beside(case.layer, device.log)
    with device:
        ticket = case.submit()
        device.log.append("submitted")
        shared = case.x @ case.shared
        device.log.append("shared forward")
        beside.gates["forward"].set()
        out = shared + join(ticket)
        device.log.append("joined")

        def shared_backward(_: Tensor) -> None:
            device.log.append("shared backward")
            beside.gates["backward"].set()

        shared.grad_fn.register_prehook(shared_backward)
        out.backward(problem.dout.float())
    steps = [entry for entry in device.log if not entry.startswith(("enter", "leave", "record"))]
    there = ["in", "in", "in", "submitted"]
    forth = [entry for entry in steps[: steps.index("joined")] if entry != "wait"]
    back = [entry for entry in steps[steps.index("joined") + 1 :] if entry != "wait"]
    assert forth == [*there, "shared forward", "kernels forward", "out"]
    assert back == ["in", "shared backward", "kernels backward", *["out"] * back.count("out")]
    assert back.count("out") >= 2  # dx and the routing weights


def test_the_output_is_the_same_whoever_waits(problem, device, monkeypatch):
    with device, torch.no_grad():
        case = Case(problem)
        tickets = [case.submit(), case.submit(case.x.detach() * 2.0)]
        outs = [join(ticket) for ticket in reversed(tickets)]
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(outs[1], join(case.submit()))
        assert torch.equal(outs[0], join(case.submit(case.x.detach() * 2.0)))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("where", ["in place", "device"])
def test_a_checkpointed_block_has_the_same_gradients(problem, reentrant, where, monkeypatch):
    want = run_block(Case(problem))
    case, device = Case(problem), LateCopies()
    if where == "device":
        monkeypatch.setattr(autograd_moe, "route_of", lambda tensor: device.route())
        device.__enter__()
    try:
        out = checkpoint(case.block, case.x, case.weights, *case.factors, use_reentrant=reentrant)
        out.backward(problem.dout.float())
    finally:
        if where == "device":
            device.__exit__(None, None, None)
    assert all_equal([out.detach(), *(leaf.grad for leaf in case.leaves)], want)


def test_saved_tensor_hooks_see_the_whole_tape(problem):
    want, case = run_block(Case(problem)), Case(problem)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        assert all_equal(run_block(case), want)


def test_a_retained_graph_gives_its_gradients_again_and_no_second_derivative(problem):
    case = Case(problem)
    out = join(case.submit())
    first = case.gradients(out, retain_graph=True)
    assert all_equal(case.gradients(out, retain_graph=True), first)
    again = torch.autograd.grad(out, case.x, problem.dout.float().requires_grad_(), create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        again.sum().backward()
    case.gradients(out)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        case.gradients(out)


def test_two_threads_may_go_back_through_one_graph(problem):
    """Both have handed their gradient over before one of them takes its results."""
    case, found = Case(problem), {}
    out = join(case.submit())
    wants = [case.gradients(out * scale, retain_graph=True) for scale in (1.0, 3.0)]
    ticket, meeting = case.submit(), threading.Barrier(2)
    ticket.tie.register_hook(lambda gradient: (meeting.wait(20), None)[1])  # between the two backwards
    out = join(ticket)

    def go_back(index: int, scale: float) -> None:
        found[index] = case.gradients(out * scale, retain_graph=True)

    threads = [threading.Thread(target=go_back, args=each) for each in enumerate((1.0, 3.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all_equal(found[index], wants[index]) for index in range(2))


class Failing:
    """A native layer one of whose passes fails."""

    def __init__(self, layer, name: str):
        self._layer, self._name = layer, name

    def __getattr__(self, name: str):
        if name == self._name:
            raise MemoryError(f"no arena for {name}")
        return getattr(self._layer, name)


@pytest.mark.parametrize("where", ["in place", "device"])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_what_goes_wrong_in_a_pass_is_raised_where_it_is_joined(problem, where, name, monkeypatch):
    case, device = Case(problem), LateCopies()
    if where == "device":
        monkeypatch.setattr(autograd_moe, "route_of", lambda tensor: device.route())
    case.call.layer = Failing(case.layer, name)
    ticket = case.submit()
    if name == "forward":
        with pytest.raises(MemoryError, match="no arena for forward"):
            join(ticket)
        return
    out = join(ticket)
    with pytest.raises(MemoryError, match="no arena for backward"):
        out.sum().backward()


def test_a_pass_is_joined_once(problem):
    with torch.no_grad():
        ticket = Case(problem).submit()
    join(ticket)
    with pytest.raises(RuntimeError, match="joined before"):
        join(ticket)


def test_writing_an_input_between_submit_and_join_is_refused(problem):
    case = Case(problem, torch.bfloat16)
    ids, weights = problem.ids.clone(), case.weights.detach()
    for tensor in (case.x.detach(), ids, weights):
        ticket = case.call.submit(case.x, ids, weights, case.factors)
        tensor.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation between submit and join"):
            join(ticket)


def test_nothing_is_copied_on_the_cpu(problem):
    x = problem.x.to(torch.bfloat16)
    assert IN_PLACE.bring(x, torch.bfloat16, "x") is x
    assert IN_PLACE.deliver(x, x.device, x.dtype) is x


def test_every_call_of_a_layer_gets_the_same_frozen_settings(monkeypatch):
    experts = RoutedExperts(ExpertsSpec(3, 32, 16, "silu"), chunk_size=7, cpu_activation="recompute").eval()
    for expert in range(3):
        experts.load_expert(expert, *(torch.ones(shape).bfloat16() for shape in ((16, 32), (16, 32), (32, 16))))
    seen: list[MoeSettings] = []
    stock = routed_experts.submit
    monkeypatch.setattr(routed_experts, "submit", lambda *args, **more: seen.append(args[4]) or stock(*args, **more))
    for _ in range(2):
        with torch.no_grad():
            experts(torch.ones(2, 32), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    assert seen[0] is seen[1] and (seen[0].chunk_size, seen[0].retain) == (7, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen[0].chunk_size = 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": (1,)}, r"topk_ids, topk_weights: expected \[tokens, k\], got \[3\]"),
        ({"weights": (1,)}, r"topk_ids, topk_weights: expected \[tokens, k\], got .* and \[3\]"),
        ({"x": (2, 2)}, r"x: expected \[tokens, hidden\], got \[2, 2, "),
    ],
)
def test_dimensions_are_told_at_submit(problem, change, message):
    case = Case(problem)
    given = {"x": case.x, "ids": problem.ids, "weights": case.weights}
    for name, shape in change.items():
        given[name] = torch.zeros(*shape, problem.x.shape[1]) if name == "x" else given[name].flatten()[:3]
    with pytest.raises(ValueError, match=message):
        case.call.submit(given["x"], given["ids"], given["weights"], case.factors)


def test_what_is_for_inference_is_refused_with_gradients(problem):
    case = Case(problem)
    with pytest.raises(ValueError, match="is_beside are for calls without gradients"):
        case.call.submit(case.x, problem.ids, case.weights, case.factors, is_beside=True)


def test_a_pass_that_failed_is_gone_with_its_error(problem):
    case = Case(problem)
    wrong = torch.full_like(problem.ids, -1)
    gc.collect()
    gc.disable()
    try:
        before = sum(type(o) is autograd_moe._Pass for o in gc.get_objects())
        for _ in range(3):
            with pytest.raises(ValueError, match="negative"):
                join(case.call.submit(case.x, wrong, case.weights, case.factors))
        assert sum(type(o) is autograd_moe._Pass for o in gc.get_objects()) == before
    finally:
        gc.enable()

"""`KTMoEWrapper` against float64: formats, ids to skip, physical experts, what submit and sync promise."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kt_sft
from kt_sft import memory
from kt_sft.errors import ConfigError, NotEnoughMemory
from kt_sft.native import native
from kt_sft.schedule import task_queue
from kt_sft.transfer.staging import Key, Staging
from tests.helpers.layers import using_isa
from tests.helpers.operators import (
    FORMAT_OF_METHOD,
    bound,
    inputs_of,
    loaded,
    operator_of,
    problem_of,
    truth,
    weights_of,
)
from tests.helpers.tolerance import BF16_HALF_ULP, rel_l2, rounding_bound


@pytest.mark.parametrize("method", FORMAT_OF_METHOD)
@pytest.mark.parametrize("sizes", [{}, {"tokens": 1, "top_k": 2}, {"hidden": 130, "inter": 67, "experts": 9}])
def test_forward_is_the_weighted_sum_of_the_experts(method, sizes):
    problem = problem_of(method, **sizes)
    out = loaded(problem, method).forward(*inputs_of(problem))
    assert out.dtype is torch.float32
    assert rel_l2(out, truth(problem)) < bound(problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_result_has_the_shape_and_dtype_of_the_hidden_states(dtype):
    problem = problem_of(tokens=6)
    x, ids, weights = inputs_of(problem, dtype)
    out = loaded(problem).forward(x.view(2, 3, -1), ids.to(torch.int32), weights.to(dtype))
    assert out.shape == (2, 3, x.shape[1]) and out.dtype is dtype
    problem.weights = weights.to(dtype).double()
    assert rel_l2(out.view_as(x), truth(problem)) < rounding_bound("out") + BF16_HALF_ULP


@pytest.mark.parametrize("num_gpu_experts", [0, 1, 4, 5])
def test_minus_one_and_experts_of_the_gpu_are_skipped(num_gpu_experts):
    problem = problem_of()
    mask = torch.arange(5) < num_gpu_experts
    by_number = loaded(problem, num_gpu_experts=num_gpu_experts)
    by_mask = loaded(problem, gpu_experts_mask=mask)
    problem.ids[::3, 1] = -1
    x, ids, weights = inputs_of(problem)
    out = by_number.forward(x, ids, weights)
    assert torch.equal(out, by_mask.forward(x, ids, weights))
    is_elsewhere = mask[problem.ids.clamp(min=0)] | (problem.ids < 0)
    problem.ids = problem.ids.masked_fill(is_elsewhere, 5)
    want = truth(problem)
    assert rel_l2(out, want) < rounding_bound("out") if want.any() else not out.any()


def test_experts_of_the_gpu_are_not_held_in_memory():
    problem = problem_of()
    assert loaded(problem, num_gpu_experts=3)._experts.num_experts == 2


def test_a_layer_that_does_not_fit_is_refused_before_it_is_packed(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: memory.AvailableMemory(1000, "the test"))
    problem = problem_of()
    wrapper = operator_of(problem)
    with pytest.raises(NotEnoughMemory, match="limited by the test"):
        wrapper.load_weights_from_tensors(*weights_of(problem))


def test_a_scattered_mask_computes_the_experts_between():
    problem = problem_of()
    mask = torch.tensor([True, False, True, False, False])
    out = loaded(problem, gpu_experts_mask=mask).forward(*inputs_of(problem))
    problem.ids = problem.ids.masked_fill(mask[problem.ids], 5)
    assert rel_l2(out, truth(problem)) < rounding_bound("out")


def test_physical_experts_are_copies_of_logical_ones():
    problem = problem_of()
    physical = torch.tensor([4, 0, 0, 3, 1, 2, 4])
    wrapper = operator_of(problem, num_experts=7, num_gpu_experts=1)
    wrapper.load_weights_from_tensors(*weights_of(problem), physical)
    ids = torch.randint(0, 7, problem.ids.shape)
    out = wrapper.forward(problem.x.float(), ids, problem.weights.float())
    problem.ids = physical[ids].masked_fill(ids == 0, 5)
    assert rel_l2(out, truth(problem)) < rounding_bound("out")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.arange(4), "5 entries"),
        (torch.tensor([0, 1, 2, 3, 5]), "0 to 4, found 5"),
        (torch.tensor([0, 1, 2, 3, -1]), "found -1"),
        (["a"] * 5, r"expected integers \[5\], found \['a'"),
        ([0, [1, 2], 2, 3, 4], r"expected integers \[5\], found \[0, \[1, 2\]"),
    ],
)
def test_a_wrong_map_is_refused(wrong, message):
    problem = problem_of()
    with pytest.raises(ValueError, match=message):
        operator_of(problem).load_weights_from_tensors(*weights_of(problem), wrong)


def test_inputs_may_be_overwritten_after_submit():
    problem = problem_of()
    wrapper = loaded(problem)
    want = wrapper.forward(*inputs_of(problem))
    x, ids, weights = inputs_of(problem)
    gate_is_open = threading.Event()
    task_queue.submit(gate_is_open.wait)  # the pass cannot begin before the inputs are gone
    wrapper.submit_forward(x, ids, weights)
    x.zero_(), ids.fill_(3), weights.zero_()
    gate_is_open.set()
    assert torch.equal(wrapper.sync_forward(x), want)


def test_first_submits_of_several_threads_share_one_worker(monkeypatch):
    made, start = [], threading.Barrier(4)

    class SlowExecutor(ThreadPoolExecutor):
        def __init__(self, *args, **kwargs):
            time.sleep(0.02)
            made.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(task_queue, "ThreadPoolExecutor", SlowExecutor)
    monkeypatch.setattr(task_queue, "_executor", None)

    def submit():
        start.wait()
        task_queue.submit(int).result()

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made[0].shutdown()
    assert len(made) == 1


def test_chunks_do_not_change_the_result():
    """Bit by bit where any number of rows is summed in one order; bf16 dot instructions and AMX have others."""
    problem = problem_of(tokens=23)
    with using_isa("avx512" if "avx512" in native().isa_detected() else "avx2"):
        whole = loaded(problem).forward(*inputs_of(problem))
        assert torch.equal(loaded(problem, chunked_prefill_size=4).forward(*inputs_of(problem)), whole)
    parts = loaded(problem, chunked_prefill_size=4).forward(*inputs_of(problem))
    assert rel_l2(parts, truth(problem)) < bound(problem)


def test_zero_tokens():
    problem = problem_of()
    x, ids, weights = (t[:0] for t in inputs_of(problem))
    wrapper = loaded(problem, max_deferred_experts_per_token=1)
    assert wrapper.forward(x, ids, weights).shape == (0, x.shape[1])
    wrapper.submit_forward(x, ids, weights)
    assert wrapper.sync_forward(x).shape == (0, x.shape[1])


def test_operators_of_several_methods_and_sizes_side_by_side():
    problems = [problem_of("AMXBF16"), problem_of("AMXINT8", hidden=130), problem_of("AMXINT4", inter=70, seed=3)]
    methods = ["AMXBF16", "AMXINT8", "AMXINT4"]
    operators = [loaded(p, method) for p, method in zip(problems, methods, strict=True)]
    for problem, operator in zip(problems, operators, strict=True):
        operator.submit_forward(*inputs_of(problem))
    for problem, operator in reversed(list(zip(problems, operators, strict=True))):
        out = operator.sync_forward(problem.x.float())
        assert rel_l2(out, truth(problem)) < bound(problem)


def test_an_id_that_is_no_expert_is_an_error_at_sync_and_the_next_pass_is_right():
    problem = problem_of()
    wrapper = loaded(problem)
    want = wrapper.forward(*inputs_of(problem))
    x, ids, weights = inputs_of(problem)
    for wrong in (5, -2, 2**40):
        bad = ids.clone()
        bad[2, 1] = wrong
        wrapper.submit_forward(x, bad, weights)
        with pytest.raises(ValueError, match=f"topk_ids: expected -1 or 0 to 4, found {wrong}"):
            wrapper.sync_forward(x)
        with pytest.raises(ValueError, match="topk_ids"):
            wrapper.forward(x, bad, weights)
    assert torch.equal(wrapper.forward(x, ids, weights), want)


def test_sync_without_submit_and_submit_twice_are_errors():
    problem = problem_of()
    wrapper = loaded(problem)
    arguments = inputs_of(problem)
    with pytest.raises(RuntimeError, match="nothing submitted"):
        wrapper.sync_forward(arguments[0])
    wrapper.submit_forward(*arguments)
    with pytest.raises(RuntimeError, match="nobody fetched"):
        wrapper.submit_forward(*arguments)
    wrapper.submit_forward(*arguments)  # the pass that was in the way is gone
    wrapper.sync_forward(arguments[0])
    with pytest.raises(RuntimeError, match="nothing submitted"):
        wrapper.sync_forward(arguments[0])


def test_forward_before_load_is_an_error():
    problem = problem_of()
    with pytest.raises(RuntimeError, match="no weights yet"):
        operator_of(problem).forward(*inputs_of(problem))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, i, w: (x[:, 1:], i, w), "hidden_states: expected"),
        (lambda x, i, w: (x.long(), i, w), "hidden_states: expected bf16"),
        (
            lambda x, i, w: (x.to("meta"), i, w),
            "hidden_states: expected a tensor on the CPU or a CUDA device, found meta",
        ),
        (lambda x, i, w: (x, i[:, :2], w), "topk_ids: expected integers"),
        (lambda x, i, w: (x, i.float(), w), "topk_ids: expected integers"),
        (lambda x, i, w: (x, i.bool(), w), "topk_ids: expected integers"),
        (lambda x, i, w: (x, i.to(torch.complex64), w), "topk_ids: expected integers"),
        (lambda x, i, w: (x, i, w[:4]), "topk_weights: expected floating point"),
        (lambda x, i, w: (x, i.to("meta"), w), "topk_ids: expected a tensor on hidden_states' device, cpu, found meta"),
        (lambda x, i, w: (x, i, w.to("meta")), "topk_weights: expected a tensor on hidden_states' device, cpu"),
        (lambda x, i, w: (x.tolist(), i, w), "hidden_states: expected a torch.Tensor, found list"),
        (lambda x, i, w: (x, i.tolist(), w), "topk_ids: expected a torch.Tensor, found list"),
        (lambda x, i, w: (x, i, w.numpy()), "topk_weights: expected a torch.Tensor, found ndarray"),
    ],
)
def test_wrong_tensors_are_refused_at_submit(change, message):
    problem = problem_of()
    wrapper = loaded(problem)
    for submit in (wrapper.submit_forward, wrapper.forward):
        with pytest.raises((ValueError, TypeError), match=message):
            submit(*change(*inputs_of(problem)))
    wrapper.forward(*inputs_of(problem))


def test_wrong_arguments_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        kt_sft.KTMoEWrapper(-1, 4, 0, 8, 8, method="AMXINT5", cpuinfer_threads=0, chunked_prefill_size=0)
    text = str(caught.value)
    for name in ("layer_idx", "num_experts_per_tok", "method", "cpuinfer_threads", "chunked_prefill_size"):
        assert f"{name}:" in text


@pytest.mark.parametrize("wrong", [2**21, 2**31, 2**40, 2**63, 10**400])
def test_numbers_that_no_layer_has_are_refused_before_memory_is_taken(wrong):
    with pytest.raises(ConfigError) as caught:
        kt_sft.KTMoEWrapper(wrong, wrong, wrong, wrong, wrong, num_gpu_experts=wrong)
    for name in ("layer_idx", "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size"):
        assert f"{name}: expected a whole number <= " in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_gpu_experts": 6},
        {"num_gpu_experts": 1, "gpu_experts_mask": torch.zeros(5, dtype=torch.bool)},
        {"gpu_experts_mask": torch.zeros(4, dtype=torch.bool)},
        {"gpu_experts_mask": "abc"},
        {"gpu_experts_mask": [True, [False], True, True, True]},
        {"cpu_save": True},
        {"max_deferred_experts_per_token": -1},
    ],
)
def test_wrong_placements_and_numbers_are_refused(arguments):
    with pytest.raises(ConfigError):
        operator_of(problem_of(), **arguments)


def test_a_second_operator_with_other_threads_is_refused_while_the_first_lives():
    problem = problem_of()
    library = native()
    before = library.num_threads(), library.num_pools()
    try:
        first = operator_of(problem, cpuinfer_threads=1, threadpool_count=1)
        with pytest.raises(ConfigError, match=r"cpuinfer_threads: 2 is asked for, .* run with 1"):
            operator_of(problem, cpuinfer_threads=2)
        operator_of(problem, layer_idx=1, cpuinfer_threads=1)
        operator_of(problem, layer_idx=2)
        assert library.num_threads() == 1
        del first
        operator_of(problem, cpuinfer_threads=before[0])
        assert library.num_threads() == before[0]
    finally:
        library.set_threads(*before)


def test_one_thread_and_two_agree_bitwise():
    problem = problem_of("AMXINT8")
    library = native()
    before = library.num_threads(), library.num_pools()
    outs = []
    try:
        for threads in (1, before[0]):
            outs.append(loaded(problem, "AMXINT8", cpuinfer_threads=threads).forward(*inputs_of(problem)))
    finally:
        library.set_threads(*before)
    assert torch.equal(*outs)


def test_capture_batch_sizes_are_a_setting_and_the_cache_can_be_cleared():
    wrapper = kt_sft.KTMoEWrapper
    wrapper.set_capture_batch_sizes([1, 2, 8])
    try:
        assert wrapper.get_capture_batch_sizes() == [1, 2, 8]
        with pytest.raises(ValueError, match="found 0"):
            wrapper.set_capture_batch_sizes([4, 0])
        assert wrapper.get_capture_batch_sizes() == [1, 2, 8]
    finally:
        wrapper.set_capture_batch_sizes([])
    wrapper.clear_buffer_cache()
    problem = problem_of()
    assert rel_l2(loaded(problem).forward(*inputs_of(problem)), truth(problem)) < rounding_bound("out")


def test_staging_keeps_chosen_sizes_and_the_last_one():
    staging = Staging()
    staging.keep([1, 2])
    keys = [Key((tokens, 8), torch.float32) for tokens in (1, 2, 7, 9)]
    pieces = [staging.take(key) for key in keys]
    for piece in pieces:
        staging.release(piece)
    assert staging.free_count == 3  # 7 was neither chosen nor the last
    assert staging.take(keys[0]) is pieces[0]
    assert staging.take(keys[0]) is not pieces[0]
    staging.clear()
    assert staging.free_count == 0


def test_inference_mode_and_plain_mode_may_alternate():
    problem = problem_of()
    wrapper = loaded(problem)
    want = wrapper.forward(*inputs_of(problem))
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(wrapper.forward(*inputs_of(problem)), want)
            wrapper.submit_forward(*inputs_of(problem))
            assert torch.equal(wrapper.sync_forward(problem.x), want)
        wrapper.submit_forward(*inputs_of(problem))
        assert torch.equal(wrapper.sync_forward(problem.x), want)


def test_the_truth_of_these_tests_depends_on_every_expert():
    """Otherwise a skipped expert could go unnoticed above."""
    problem = problem_of()
    want = truth(problem)
    for expert in range(5):
        less = dataclasses.replace(problem, ids=problem.ids.masked_fill(problem.ids == expert, 5))
        assert rel_l2(truth(less), want) > 0.1

"""`KTMoEWrapper` with tensors on a GPU: in which order of which stream they are copied."""

from __future__ import annotations

import pytest
import torch

from kt_sft.transfer import routes
from kt_sft.transfer.staging import Staging
from tests.helpers.late_copies import LateCopies
from tests.helpers.operators import inputs_of, loaded, problem_of

FETCH = ["enter 7", *["in"] * 3, "leave 7", "record on 7"]
DELIVER = ["enter 7", "out", "record on 7", "leave 7"]


@pytest.fixture
def device(monkeypatch) -> LateCopies:
    """Takes the place of the CPU for operators, whose stream handles are its streams' names."""
    device = LateCopies()
    monkeypatch.setattr("kt_sft.operator.moe.copying_route_of", lambda x, memory, stream: device.route(str(stream)))
    return device


def told(log: list[str]) -> list[str]:
    """A log in which copies one after another within one stream are not left and entered between."""
    left = "\n".join(log).replace("leave 7\nenter 7\n", "")
    return left.split("\n")


@pytest.mark.parametrize("deferred", [0, 1])
def test_an_operator_copies_inside_the_stream_and_waits_in_the_worker_only(device, deferred, monkeypatch):
    """Copies in, event, (worker waits), copy out, event; what the caller overwrites in between does not matter."""
    problem = problem_of()
    layers = [loaded(problem, layer_idx=index, max_deferred_experts_per_token=deferred) for index in range(2)]
    with monkeypatch.context() as stock:
        stock.setattr("kt_sft.operator.moe.copying_route_of", routes.copying_route_of)
        wants = [layer.forward(*inputs_of(problem)) for layer in layers]
    with device:
        for layer, want in zip(layers, wants, strict=True):
            x, ids, weights = inputs_of(problem)
            device.log.clear()
            layer.submit_forward(x, ids, weights, cuda_stream=7)
            x.zero_(), ids.fill_(3), weights.zero_()
            layer._submitted[0].passed._result.result()
            assert told(device.log) == [*FETCH, "wait"]
            device.log.clear()
            assert torch.equal(layer.sync_forward(x, cuda_stream=7), want)
            assert device.log == DELIVER


def test_memory_of_an_output_is_written_again_after_it_was_read():
    """A later call waits for its own inputs, and for the copy out of the memory that it writes."""
    device, staging = LateCopies(), Staging()
    for waits in (1, 2):
        route = routes.StreamRoute(torch.device("cpu"), stream="7", memory=staging, module=device, is_pinned=False)
        out = route.output(torch.empty(3, 8), torch.float32)
        device.log.clear()
        route.arrival()()
        assert device.log.count("wait") == waits
        route.deliver(out, torch.device("cpu"), torch.float32)
    assert staging.free_count == 1


def test_inputs_and_outputs_do_not_share_memory():
    """An input would be written by its stream while another one still reads an output there."""
    device, staging = LateCopies(), Staging()
    x = torch.ones(3, 8)
    first, second = (
        routes.StreamRoute(x.device, stream=stream, memory=staging, module=device, is_pinned=False) for stream in "78"
    )
    out = first.output(x, torch.float32)
    first.deliver(out, x.device, x.dtype)
    assert second.bring(x, torch.float32, "x").data_ptr() != out.data_ptr()


def test_hidden_states_of_any_strides_are_read_inside_the_stream(device, monkeypatch):
    """Nothing is computed from them before: torch's current stream may be another one."""
    problem, read = problem_of(), []
    wrapper = loaded(problem)
    x, ids, weights = inputs_of(problem)
    strided = x.mT.contiguous().mT.unsqueeze(1)  # [tokens, 1, hidden]
    stock = LateCopies.__torch_dispatch__

    def watch(self, func, types, args=(), kwargs=None):
        tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
        result = stock(self, func, types, args, kwargs)
        is_view = isinstance(result, torch.Tensor) and result.data_ptr() == strided.data_ptr()
        if not is_view and any(tensor.data_ptr() == strided.data_ptr() for tensor in tensors):
            read.append(device.log[-1])
        return result

    monkeypatch.setattr(LateCopies, "__torch_dispatch__", watch)
    with device:
        wrapper.submit_forward(strided, ids, weights, cuda_stream=7)
        got = wrapper.sync_forward(strided, cuda_stream=7)
    assert read == ["enter 7"]
    monkeypatch.setattr("kt_sft.operator.moe.copying_route_of", routes.copying_route_of)
    assert torch.equal(got, wrapper.forward(x, ids, weights).unsqueeze(1))


@pytest.mark.gpu
@pytest.mark.parametrize("deferred", [0, 1])
def test_cuda_tensors_give_the_results_of_the_cpu_in_the_order_of_the_stream(deferred):
    problem = problem_of(hidden=128)
    layers = [loaded(problem, layer_idx=i, max_deferred_experts_per_token=deferred) for i in range(2)]
    x, ids, weights = inputs_of(problem)
    wants = [layer.forward(x, ids, weights) for layer in layers]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_gpu = [t.cuda() for t in (x, ids, weights)]
        for _ in range(20):
            for layer, want in zip(layers, wants, strict=True):
                busy = torch.randn(2048, 2048, device="cuda")
                (busy @ busy).sum()  # the inputs below are written late in the stream
                arguments = [t.clone() for t in on_gpu]
                layer.submit_forward(*arguments, cuda_stream=stream.cuda_stream)
                for t in arguments:
                    t.zero_()
                out = layer.sync_forward(arguments[0], cuda_stream=stream.cuda_stream)
                assert out.is_cuda and torch.equal(out.cpu(), want)


@pytest.mark.gpu
def test_a_capture_is_refused():
    problem = problem_of(hidden=128)
    wrapper = loaded(problem)
    arguments = [t.cuda() for t in inputs_of(problem)]
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="being captured"), torch.cuda.graph(graph):
        wrapper.submit_forward(*arguments, cuda_stream=torch.cuda.current_stream().cuda_stream)

"""`KTMoEWrapper` with tensors on a GPU: in which order of which stream they are copied."""

from __future__ import annotations

import pytest
import torch

from kt_sft.transfer import routes
from kt_sft.transfer.staging import Inputs, Key, Staging
from tests.helpers.operators import inputs_of, loaded, problem_of


class FakeCuda:
    """Writes down in which order a route uses streams and events; its copies happen at once."""

    def __init__(self):
        self.log: list[str] = []

    def is_current_stream_capturing(self) -> bool:
        return False

    def stream(self, name: str):
        cuda = self

        class Current:
            def __enter__(self):
                cuda.log.append(f"enter {name}")

            def __exit__(self, *_):
                cuda.log.append(f"leave {name}")

        return Current()

    def Event(self):
        cuda = self

        class Event:
            def record(self, stream):
                cuda.log.append(f"record on {stream}")

            def synchronize(self):
                cuda.log.append("wait")

        return Event()


def test_a_stream_route_copies_inside_the_stream_and_waits_in_the_worker_only(monkeypatch):
    """What a GPU would see: copy in, event, (worker waits), copy out, event; pinned memory is not asked for here."""
    problem = problem_of()
    wrapper = loaded(problem)
    want = wrapper.forward(*inputs_of(problem))
    cuda, staging = FakeCuda(), Staging()
    monkeypatch.setattr(routes.StreamRoute, "is_pinned", False)
    monkeypatch.setattr(
        "kt_sft.transfer.routes.Key", lambda *a, **k: Key(*a, **{**k, "is_pinned": False}), raising=True
    )
    monkeypatch.setattr(
        "kt_sft.operator.moe.route_of",
        lambda x, handle, _: routes.StreamRoute(staging, torch.device("cpu"), f"stream {handle}", cuda),
    )
    copy = ["enter stream 7", "leave stream 7"]  # the look whether the stream is being captured
    fetch = ["enter stream 7", "record on stream 7", "leave stream 7"]
    for waits in (1, 2):  # the second pass waits until the first one's output was read, too
        wrapper.submit_forward(*inputs_of(problem), cuda_stream=7)
        wrapper._submitted.future.result()
        assert cuda.log == [*copy, *fetch, *["wait"] * waits]
        assert torch.equal(wrapper.sync_forward(problem.x, cuda_stream=7), want)
        assert cuda.log[len(copy) + len(fetch) + waits :] == fetch
        cuda.log.clear()


def test_hidden_states_of_any_strides_are_copied_inside_the_stream(monkeypatch):
    """Nothing is computed from them before: torch's current stream may be another one."""
    problem, copied = problem_of(), []
    wrapper = loaded(problem)
    x, ids, weights = inputs_of(problem)
    want = wrapper.forward(x, ids, weights)
    strided = x.mT.contiguous().mT.unsqueeze(1)  # [tokens, 1, hidden]
    stock = Inputs.fill
    monkeypatch.setattr(Inputs, "fill", lambda self, x, *rest: copied.append(x) or stock(self, x, *rest))
    assert torch.equal(wrapper.forward(strided, ids, weights), want.unsqueeze(1))
    assert copied[0].data_ptr() == strided.data_ptr() and copied[0].stride() == strided.stride()


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

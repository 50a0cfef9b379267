"""The experts module: fresh LoRA copies however parameters are written, recompute, copies, devices, threads."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kt_sft.models.spec import ExpertsSpec
from kt_sft.native import native
from kt_sft.nn import expert_lora
from kt_sft.nn.expert_lora import EXPERT_MAJOR, EXPERT_MINOR, ExpertLora, LoraFactor, LoraPair
from kt_sft.nn.routed_experts import RoutedExperts

EXPERTS, HIDDEN, INTER, RANK = 5, 52, 37, 4


def make_experts(
    dtype: torch.dtype = torch.float32, dropout: float = 0.0, **settings
) -> tuple[RoutedExperts, list[nn.Parameter]]:
    """Random experts, and their LoRA parameters as PEFT stores them: a and b of gate_up, a and b of down."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * 0.2

    experts = RoutedExperts(ExpertsSpec(EXPERTS, HIDDEN, INTER, "silu"), **settings)
    for e in range(EXPERTS):
        gate, up, down = randn(INTER, HIDDEN), randn(INTER, HIDDEN), randn(HIDDEN, INTER)
        experts.load_expert(e, gate.bfloat16(), up.bfloat16(), down.bfloat16())
    shapes = ((EXPERTS * RANK, HIDDEN), (2 * INTER, RANK * EXPERTS), (EXPERTS * RANK, INTER), (HIDDEN, RANK * EXPERTS))
    parameters = [nn.Parameter(randn(*shape).to(dtype)) for shape in shapes]
    layouts = (EXPERT_MAJOR, EXPERT_MINOR, EXPERT_MAJOR, EXPERT_MINOR)
    factors = [LoraFactor(p, layout, EXPERTS) for p, layout in zip(parameters, layouts, strict=True)]
    pairs = [LoraPair(*factors[i : i + 2], lambda: 2.0) for i in (0, 2)]
    experts.lora = ExpertLora(*pairs, dropout=dropout)
    return experts, parameters


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(9, HIDDEN, generator=g), torch.randint(0, EXPERTS, (9, 2), generator=g), torch.rand(9, 2)


def fresh(experts: RoutedExperts, inputs: tuple) -> Tensor:
    """The output with copies made from the parameters as they are now."""
    experts.lora.drop_copies()
    with torch.no_grad():
        return experts(*inputs)


def replace_twice(p: nn.Parameter) -> None:
    """Ends at the address at which it began, if the allocator reuses what it got back."""
    p.data = torch.randn_like(p)
    p.data = torch.randn_like(p)


WRITES = {
    "in place": lambda p: p.add_(0.1),
    "through data": lambda p: p.data.mul_(3.0),
    "new data": lambda p: setattr(p, "data", torch.randn_like(p)),
    "new data twice": replace_twice,
    "hot swap": lambda p: p.data.copy_(torch.randn_like(p)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_inference_sees_parameters_that_were_written(write, dtype, inputs):
    experts, parameters = make_experts(dtype)
    with torch.no_grad():
        before = experts(*inputs)
        for p in parameters:
            write(p)
        after = experts(*inputs)
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh(experts, inputs))


def test_a_hand_written_step_on_one_value_is_seen_after_backward(inputs):
    experts, parameters = make_experts()
    experts(*inputs).sum().backward()
    expert = inputs[1][0, 0]
    parameters[2].data[expert * RANK, 3] += 7.0  # through .data, between the sampled values
    with torch.no_grad():
        got = experts(*inputs)
    assert torch.equal(got, fresh(experts, inputs))


def test_unchanged_parameters_are_converted_once():
    lora = make_experts()[0].lora
    assert all(a is b for a, b in zip(lora.operands(), lora.operands(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_operands_in_the_canonical_layout(dtype):
    """Copies, except of parameters that lie in memory as the kernels take them."""
    lora = make_experts(dtype)[0].lora
    for factor, operand, view in zip(lora._factors(), lora.operands(), lora.tensors(), strict=True):
        if factor is None:
            continue
        assert operand.dtype == torch.float32 and torch.equal(operand, view.float()) and operand.is_contiguous()
        shares = operand.untyped_storage().data_ptr() == factor.parameter.untyped_storage().data_ptr()
        assert shares == (factor.layout == EXPERT_MAJOR and dtype == torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("numel", [0, 1, 64, 65, 1000])
def test_samples_see_the_same_values_whoever_takes_them(dtype, numel):
    values = torch.randn(numel).to(dtype)
    strided = torch.stack([values, values]).T[:, 0]  # never read natively
    want = values[:: numel // 64 + 1].double().sum().item()
    for parameter in (values, strided, nn.Parameter(values)):
        assert expert_lora._samples((None, parameter))[1] == pytest.approx(want, rel=1e-12, abs=1e-12)


def gradients(experts: RoutedExperts, parameters: list, inputs: tuple, between=lambda: None) -> list[Tensor]:
    """Of the parameters, from one step with `between` after its forward."""
    out = experts(*inputs)
    between()
    return list(torch.autograd.grad(out.square().sum(), parameters))


@pytest.mark.parametrize("index", [0, 2], ids=["gate_up a", "down a"])
def test_writing_a_shared_parameter_before_backward_is_refused(index, inputs):
    experts, parameters = make_experts()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), torch.no_grad():
        with torch.enable_grad():
            out = experts(*inputs).sum()
        parameters[index].add_(1.0)
        out.backward()


@pytest.mark.parametrize(
    ("dtype", "indices"), [(torch.float32, (1, 3)), (torch.bfloat16, (0, 1, 2, 3))], ids=["f32", "bf16"]
)
def test_gradients_are_those_of_the_values_that_forward_saw(dtype, indices, inputs):
    """Parameters that forward copied may change at once."""
    want = gradients(*make_experts(dtype), inputs)
    experts, parameters = make_experts(dtype)

    def write() -> None:
        for index in indices:
            parameters[index].detach().add_(1.0)

    assert all(torch.equal(a, b) for a, b in zip(gradients(experts, parameters, inputs, write), want, strict=True))


def test_parameters_that_are_taken_away_between_forward_and_backward(inputs):
    """DeepSpeed gathers a partitioned parameter for each pass anew, somewhere else."""
    want = gradients(*make_experts(), inputs)
    experts, parameters = make_experts()

    def gather_again() -> None:
        whole = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.data = torch.empty(0)
        garbage = [torch.full_like(p, torch.nan) for p in whole]  # where the parameters were, had nobody held them
        for p, value in zip(parameters, whole, strict=True):
            p.data = value
        del garbage

    got = gradients(experts, parameters, inputs, gather_again)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_two_forwards_before_two_backwards(inputs):
    experts, parameters = make_experts()
    other = (inputs[0].flip(0), *inputs[1:])
    apart = [gradients(experts, parameters, batch) for batch in (inputs, other)]
    losses = [experts(*batch).square().sum() for batch in (inputs, other)]
    for loss in losses:
        loss.backward()
    for p, first, second in zip(parameters, *apart, strict=True):
        assert torch.equal(p.grad, first + second) and p.grad.dtype == torch.float32


def canonical_copy(experts: RoutedExperts, **settings) -> tuple[RoutedExperts, list[nn.Parameter]]:
    """The same experts and LoRA, every factor stored as the kernels take it."""
    twin = copy.copy(experts.lora)
    factors = [
        LoraFactor(nn.Parameter(f.canonical().detach().clone().contiguous().flatten(0, 1)), EXPERT_MAJOR, EXPERTS)
        for f in experts.lora._factors()
        if f is not None
    ]
    twin.gate_up, twin.down = (LoraPair(*factors[i : i + 2], lambda: 2.0) for i in (0, 2))
    twin.drop_copies()
    result = RoutedExperts(experts.spec, **settings)
    result.layer, result.lora = experts.layer, twin
    return result, [f.parameter for f in factors]


@pytest.mark.parametrize("chunk", [2, 1024])
@pytest.mark.parametrize("used", [EXPERTS, 2, 0], ids=["all experts", "two experts", "no expert"])
def test_gradients_do_not_depend_on_how_factors_are_stored(chunk, used, inputs):
    experts, parameters = make_experts(chunk_size=chunk)
    other, other_parameters = canonical_copy(experts, chunk_size=chunk)
    ids = inputs[1].sort(dim=0)[0]  # later chunks meet experts that earlier ones do not
    ids = torch.where(ids < used, ids, EXPERTS)
    batch = (inputs[0], ids, inputs[2])
    got, want = gradients(experts, parameters, batch), gradients(other, other_parameters, batch)
    for factor, a, b in zip((f for f in experts.lora._factors() if f), got, want, strict=True):
        stored = LoraFactor(nn.Parameter(a), factor.layout, EXPERTS).canonical().detach()
        assert a.is_contiguous() and torch.equal(stored.flatten(0, 1), b)
        used_experts = stored.abs().sum((1, 2)) > 0
        assert used_experts.tolist() == [e in ids.unique() for e in range(EXPERTS)]


def test_no_tokens_give_zero_gradients(inputs):
    experts, parameters = make_experts()
    grads = gradients(experts, parameters, tuple(t[:0] for t in inputs))
    assert all(torch.count_nonzero(g) == 0 and g.shape == p.shape for g, p in zip(grads, parameters, strict=True))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_draws_the_same_dropout_masks(reentrant, inputs):
    results = []
    for wrapped in (True, False):
        experts, parameters = make_experts(dropout=0.3)
        x = inputs[0].clone().requires_grad_()
        torch.manual_seed(3)
        run = (lambda *a, e=experts: checkpoint(e, *a, use_reentrant=reentrant)) if wrapped else experts
        run(x, *inputs[1:]).sum().backward()
        results.append([x.grad, *(p.grad for p in parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("frozen", [(0, 2), (1, 3), (0, 1), (2, 3)], ids=["a", "b", "gate_up", "down"])
def test_frozen_factors_leave_the_other_gradients_alone(frozen, inputs):
    experts, parameters = make_experts()
    experts(*inputs).sum().backward()
    want = [p.grad for p in parameters]
    experts, parameters = make_experts()
    for index in frozen:
        parameters[index].requires_grad_(False)
    experts(*inputs).sum().backward()
    for index, p in enumerate(parameters):
        assert p.grad is None if index in frozen else torch.equal(p.grad, want[index])


def test_gradient_of_routing_weights_alone(inputs):
    experts, _ = make_experts()
    experts.lora = None
    weights = inputs[2].clone().requires_grad_()
    experts(*inputs[:2], weights).sum().backward()
    assert torch.count_nonzero(weights.grad) == weights.numel()


def test_autocast_returns_the_dtype_of_the_input(inputs):
    experts, parameters = make_experts()
    x = inputs[0].clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts(x, *inputs[1:])
    out.sum().backward()
    assert out.dtype == x.grad.dtype == parameters[0].grad.dtype == torch.float32


def test_parameters_made_in_inference_mode(inputs):
    want = fresh(make_experts()[0], inputs)
    with torch.inference_mode():
        assert torch.equal(make_experts()[0](*inputs), want)


def test_another_default_device_is_ignored(inputs):
    experts, parameters = make_experts(dropout=0.1)
    with torch.device("meta"):
        experts(*inputs).sum().backward()
        gate, _, _ = experts.unpack_expert(0)
    assert parameters[0].grad.device.type == gate.device.type == "cpu"


def test_no_slots(inputs):
    experts, _ = make_experts()
    x, ids, weights = inputs
    assert torch.count_nonzero(experts(x, ids[:, :0], weights[:, :0])) == 0


def test_copies_and_pickles_are_refused_with_the_remedy():
    with pytest.raises(TypeError, match="save_pretrained"):
        copy.deepcopy(nn.Sequential(make_experts()[0]))


def test_moves_and_state_dicts_hold_no_experts():
    model = nn.Sequential(make_experts()[0])
    before = model[0].gate_up_proj
    model.to(torch.float16).to("meta")
    assert model[0].gate_up_proj is before
    assert model.state_dict() == {}
    with pytest.raises(RuntimeError, match="Unexpected key.*0.down_proj"):
        model.load_state_dict({"0.down_proj": torch.zeros(EXPERTS, HIDDEN, INTER)})


def test_biases_in_a_state_dict_take_effect_or_name_their_size(inputs):
    experts, _ = make_experts()
    model = nn.Sequential(RoutedExperts(ExpertsSpec(EXPERTS, HIDDEN, INTER, has_bias=True)).eval())
    for expert in range(EXPERTS):
        model[0].load_expert(expert, *experts.unpack_expert(expert))
    biases = {name: torch.ones_like(bias) for name, bias in model.state_dict().items()}
    with torch.no_grad():
        before = model[0](*inputs)
        model.load_state_dict(biases)
        assert not torch.equal(model[0](*inputs), before)
    for rows in (1, EXPERTS - 1):
        with pytest.raises(RuntimeError, match=rf"size mismatch for 0.down_proj_bias.*found \[{rows}, {HIDDEN}\]"):
            model.load_state_dict(biases | {"0.down_proj_bias": torch.ones(rows, HIDDEN)}, strict=False)


def test_calls_from_two_threads_while_the_pool_is_replaced(inputs):
    experts, _ = make_experts()
    want, wrong = fresh(experts, inputs), []
    before = native().num_threads()

    def call() -> None:
        for _ in range(50):
            with torch.no_grad():
                if not torch.equal(experts(*inputs), want):
                    wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for count in (1, 2, 3) * 5:
        native().set_threads(count, 1, fake_nodes=True)
        assert native().num_threads() == count
    for thread in threads:
        thread.join()
    native().set_threads(before, 1)
    assert not wrong


EXIT_WHILE_COMPUTING = """
import threading, time, torch
from kt_sft.native import native
layer, tokens = native().MoeLayer(native().ExpertStore(1, 512, 512)), 1 << 15
zero = torch.zeros(512, 512, dtype=torch.bfloat16)
layer.store.load_expert(0, zero, zero, zero)
x, ids, weights = (torch.zeros(tokens, n, dtype=t) for n, t in ((512, zero.dtype), (1, torch.int64), (1, torch.float)))
out, started = torch.empty_like(x), threading.Event()
def generate():
    while True:
        started.set()
        layer.forward(x, ids, weights, lora=(None,) * 3, g=None, u=None, out=out, out_dtype="bf16", dropout_p=0.0,
                      dropout_seed=0, chunk_size=1024)
threading.Thread(target=generate, daemon=True).start()
started.wait()
time.sleep(0.3)  # inside our pass: in torch's part of the call torch itself aborts the process
"""


def test_the_process_ends_quietly_while_a_daemon_thread_computes():
    """`llamafactory-cli chat` generates in such a thread."""
    done = subprocess.run([sys.executable, "-c", EXIT_WHILE_COMPUTING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Recorder(TorchDispatchMode):
    """Names of the torch operations that run inside of it."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_one_token_allocates_its_output_and_nothing_else():
    experts, _ = make_experts()
    experts.eval()
    x, ids, weights = torch.randn(1, HIDDEN).bfloat16(), torch.tensor([[0, 3]]), torch.rand(1, 2)
    with torch.no_grad():
        experts(x, ids, weights)  # copies of the LoRA factors and the arena are made once
        growths = native().workspace_growths()
        with Recorder() as recorder:
            for _ in range(3):
                experts(x, ids, weights)
    assert set(recorder.names) - {"aten::detach"} == {"aten::empty.memory_format"} and len(recorder.names) <= 6
    assert native().workspace_growths() == growths


def test_a_compiled_model_calls_the_experts_uncompiled(inputs):
    experts, _ = make_experts()
    experts.eval()

    class Block(nn.Module):
        def forward(self, x, ids, weights):
            return experts(x * 2.0, ids, weights) + 1.0

    torch._dynamo.reset()
    with torch.no_grad():
        want = Block()(*inputs)
        assert torch.equal(torch.compile(Block(), backend="eager")(*inputs), want)

"""`KTMoEWrapper`: the routed experts of one layer, for programs that have a model of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kt_sft.autograd.moe import Ticket, join, submit
from kt_sft.autograd.settings import MoeSettings
from kt_sft.config import KTConfig
from kt_sft.errors import ConfigError, under_name
from kt_sft.nn.routed_experts import RoutedExperts
from kt_sft.operator.chains import join_chain
from kt_sft.operator.saving import save_layer
from kt_sft.operator.threads import join_pool
from kt_sft.operator.weights import LayerSizes, load_from_path, load_from_tensors
from kt_sft.residency.expert_map import ExpertMap
from kt_sft.sources.tensors import TensorExperts
from kt_sft.transfer.routes import IN_PLACE, INTEGERS, copying_route_of
from kt_sft.transfer.staging import Staging

_staging = Staging()
# What the kernels take; larger numbers would fill memory before these could refuse them.
_MOST, _WIDEST = 1 << 20, 32768
_ARGUMENTS = {"threads": "cpuinfer_threads", "chunk_size": "chunked_prefill_size"}  # of settings with other names


class _NoExperts:
    """In the place of the native layer where all experts are on a GPU."""

    num_experts = 0

    def forward(self, *inputs: Tensor, out: Tensor, **settings: Any) -> None:
        """Nothing is added."""
        out.zero_()


class KTMoEWrapper:
    """The routed experts of one MoE layer, in the CPU kernels: inference, without LoRA. One thread at a time uses it.

    Args:
        layer_idx: number of the layer in the model and in the files.
        num_experts: physical experts, to which the ids refer.
        num_experts_per_tok: ids per token.
        num_gpu_experts: so many of the first experts are computed elsewhere, and are not loaded.
        gpu_experts_mask: bool `[num_experts]`, the same by expert; instead of `num_gpu_experts`.
        cpuinfer_threads: kernel threads of the process; None: those that run, or the physical cores.
        threadpool_count: groups of threads, one per NUMA node; None likewise.
        weight_path: a checkpoint directory with config.json, a GGUF file or a packed container; None with
            `load_weights_from_tensors`.
        chunked_prefill_size: tokens per native pass; bounds the memory of activations.
        method: `AMXBF16`, `AMXINT8`, `AMXINT4`, `RAWINT4`, `LLAMAFILE`, or `BF16`, `INT8`, `INT4`, `GGUF`.
        cpu_save: `load_weights_from_tensors` adds the packed layer to the container at `weight_path`.
        max_deferred_experts_per_token: of a token's experts here so many, those with the lowest weights, are computed
            while the model goes on; their output is added to that of the next layer. The last layer of a model defers
            nothing. 0 is exact.

    Layers of one model are created in their order: with one `weight_path` and hidden size, an index that is not above
    the one before begins another model.

    Raises:
        ConfigError: lists every wrong argument; other threads than the operators that are there.
        UnsupportedHardware: the CPU lacks AVX2.
    """

    def __init__(
        self,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        *,
        num_gpu_experts: int = 0,
        gpu_experts_mask: Tensor | None = None,
        cpuinfer_threads: int | None = None,
        threadpool_count: int | None = None,
        weight_path: str | None = None,
        chunked_prefill_size: int = 1024,
        method: str = "AMXBF16",
        cpu_save: bool = False,
        max_deferred_experts_per_token: int | None = 0,
    ):
        numbers = {
            "layer_idx": (layer_idx, 0, _MOST),
            "num_experts": (num_experts, 1, _MOST),
            "num_experts_per_tok": (num_experts_per_tok, 1, _MOST),
            "hidden_size": (hidden_size, 1, _WIDEST),
            "moe_intermediate_size": (moe_intermediate_size, 1, _WIDEST),
            "max_deferred_experts_per_token": (max_deferred_experts_per_token or 0, 0, _MOST),
        }
        faults = list(_wrong_numbers(numbers))
        config = None
        try:
            config = KTConfig(
                method=method,
                threads=cpuinfer_threads,
                threadpool_count=threadpool_count,
                chunk_size=chunked_prefill_size,
                weight_path=weight_path,
            )
        except ConfigError as error:
            faults += [under_name(fault, _ARGUMENTS) for fault in error.faults]
        if not faults:
            try:
                self._expert_map = ExpertMap(num_experts, num_gpu_experts, gpu_experts_mask)
            except ConfigError as error:
                faults += error.faults
        if cpu_save and weight_path is None:
            faults.append("cpu_save: expected weight_path, the container to add the layer to; set it")
        if faults or config is None:
            raise ConfigError(faults)
        self._config = config
        self._sizes = LayerSizes(layer_idx, num_experts, hidden_size, moe_intermediate_size)
        self.layer_idx = layer_idx
        self.num_experts_per_tok = num_experts_per_tok
        self.cpu_save = cpu_save
        self.max_deferred_experts_per_token = max_deferred_experts_per_token or 0
        self._experts: RoutedExperts | None = None
        self._settings: MoeSettings | None = None
        self._submitted: tuple[Ticket, torch.Size] | None = None
        join_pool(self, config)
        self._deferral = join_chain(layer_idx, (weight_path, hidden_size), self.max_deferred_experts_per_token)

    def load_weights(self, physical_to_logical_map: Tensor | None = None) -> None:
        """Load this layer from `weight_path`; experts on a GPU are left out.

        Args:
            physical_to_logical_map: the checkpoint's expert of each physical one, integers `[num_experts]`; None: the
                same.
        Raises:
            ConfigError: no `weight_path`, `cpu_save`, or files without what the method needs.
            FormatError: files missing or damaged, no such layer, other sizes.
            NotEnoughMemory: the layer does not fit.
            UnsupportedModel: experts that need more than this operator has.
            ValueError: a map that does not fit.
        """
        if self._config.weight_path is None:
            raise ConfigError("weight_path: expected where the experts are; set it, or use load_weights_from_tensors")
        if self.cpu_save:
            raise ConfigError(
                "cpu_save: load_weights reads weight_path and does not write there; pack a checkpoint with `kt-sft "
                "convert`, or leave cpu_save out"
            )
        self._take(
            load_from_path(
                self._config.weight_path, self._sizes, self._expert_map, self._config, physical_to_logical_map
            )
        )

    def load_weights_from_tensors(
        self,
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        physical_to_logical_map: Tensor | None = None,
    ) -> None:
        """Pack this layer from tensors, which may go afterwards.

        Args:
            gate_proj, up_proj: `[experts, moe_intermediate_size, hidden_size]`, of any floating point type and device.
            down_proj: `[experts, hidden_size, moe_intermediate_size]`.
            physical_to_logical_map: see `load_weights`; of the tensors' experts.
        Raises:
            ConfigError: a method whose weights only files have; a container of another format (`cpu_save`).
            NotEnoughMemory: the layer does not fit.
            ValueError: a shape or type, or a map that does not fit; weights that cannot be packed.
            OutputError: the container cannot be written.
        """
        sizes, name = self._sizes, f"layer {self.layer_idx}"
        source = TensorExperts(gate_proj, up_proj, down_proj, hidden=sizes.hidden, inter=sizes.inter, name=name)
        experts = load_from_tensors(source, self._sizes, self._expert_map, self._config, physical_to_logical_map)
        if self.cpu_save:
            save_layer(source, self._sizes, self._config)
        self._take(experts)

    def _take(self, experts: RoutedExperts | None) -> None:
        with torch.no_grad():
            rows = "bf16" if experts is None else experts.rows()
        self._experts = experts
        self._settings = MoeSettings(rows, self._config.chunk_size, to_slots=self._expert_map.slots)

    def submit_forward(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, cuda_stream: int = 0
    ) -> None:
        """Begin a forward pass of the layer; the tensors may be overwritten as soon as this returns.

        Args:
            hidden_states: `[..., hidden_size]`, bf16, f16 or f32; rounded to bf16.
            topk_ids: integers `[tokens, num_experts_per_tok]`; -1 and experts on a GPU are skipped.
            topk_weights: `[tokens, num_experts_per_tok]`.
            cuda_stream: handle of the stream in whose order tensors on a GPU are read; 0: the default one.
        Raises:
            RuntimeError: no weights yet, or the pass before was not fetched; that one is dropped.
            TypeError: no tensors.
            ValueError: a shape, type or device that does not fit.
        """
        self._submit(hidden_states, topk_ids, topk_weights, cuda_stream, is_beside=True)

    def sync_forward(self, hidden_states: Tensor, cuda_stream: int = 0) -> Tensor:
        """The output of the submitted pass.

        Args:
            hidden_states: those of submit, for their shape.
            cuda_stream: as for submit, whose stream it is in any case.
        Returns:
            The hidden states' shape, dtype and device; a new tensor. Of tensors on a GPU the copy there is ordered in
            the stream.
        Raises:
            RuntimeError: nothing was submitted.
            ValueError: an id that is no expert; hidden states of another shape than those of submit.
            Exception: what else went wrong in the pass, or in that of the layer before with its deferred experts.
        """
        submitted, self._submitted = self._submitted, None
        if submitted is None:
            raise RuntimeError(f"sync_forward: layer {self.layer_idx} has nothing submitted; call submit_forward first")
        ticket, shape = submitted
        out = join(ticket)
        if hidden_states.shape != shape:
            raise ValueError(f"hidden_states: expected {list(shape)}, as submitted, found {list(hidden_states.shape)}")
        return out.view(shape)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, cuda_stream: int = 0) -> Tensor:
        """`submit_forward` and `sync_forward` in one; arguments, result and errors as there."""
        self._submit(hidden_states, topk_ids, topk_weights, cuda_stream, is_beside=False)
        return self.sync_forward(hidden_states, cuda_stream)

    def _submit(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, cuda_stream: int, *, is_beside: bool
    ) -> None:
        if self._submitted is not None:
            self._submitted = None
            raise RuntimeError(
                f"submit_forward: layer {self.layer_idx} has a pass that nobody fetched, which is dropped now; call "
                "sync_forward after each submit_forward"
            )
        if self._settings is None:
            raise RuntimeError(f"layer {self.layer_idx} has no weights yet; call load_weights first")
        self._check(hidden_states, topk_ids, topk_weights)
        x = hidden_states.detach()
        reads_later = is_beside or self._deferral.per_token > 0
        ticket = submit(
            x,
            topk_ids,
            topk_weights.detach(),
            _NoExperts() if self._experts is None else self._experts.layer,
            self._settings,
            route=copying_route_of(x, _staging, cuda_stream) if reads_later or not x.is_cpu else IN_PLACE,
            is_beside=is_beside,
            deferral=self._deferral,
        )
        self._submitted = ticket, hidden_states.shape

    def _check(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
        """Look at everything before anything begins."""
        named = {"hidden_states": hidden_states, "topk_ids": topk_ids, "topk_weights": topk_weights}
        for name, tensor in named.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, found {type(tensor).__name__}")
        if hidden_states.dim() < 1 or hidden_states.shape[-1] != self._sizes.hidden:
            raise ValueError(
                f"hidden_states: expected [tokens, {self._sizes.hidden}], found {list(hidden_states.shape)}"
            )
        if hidden_states.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"hidden_states: expected a tensor on the CPU or a CUDA device, found {hidden_states.device}"
            )
        if not hidden_states.is_floating_point():
            raise ValueError(f"hidden_states: expected bf16, f16 or f32, found {hidden_states.dtype}")
        tokens = math.prod(hidden_states.shape[:-1])
        expected = (tokens, self.num_experts_per_tok)
        for name, tensor, is_float in (("topk_ids", topk_ids, False), ("topk_weights", topk_weights, True)):
            is_kind = tensor.is_floating_point() if is_float else tensor.dtype in INTEGERS
            if tuple(tensor.shape) != expected or not is_kind:
                kind = "floating point" if is_float else "integers"
                raise ValueError(f"{name}: expected {kind} {list(expected)}, found {tensor.dtype} {list(tensor.shape)}")
            if tensor.device != hidden_states.device:
                where = f"hidden_states' device, {hidden_states.device}"
                raise ValueError(f"{name}: expected a tensor on {where}, found {tensor.device}")

    @staticmethod
    def set_capture_batch_sizes(batch_sizes: list[int]) -> None:
        """Numbers of tokens whose staging memory (pinned for tensors on a GPU) is kept between calls, in all layers.

        Raises:
            ValueError: not whole numbers above zero.
        """
        _staging.keep(batch_sizes)

    @staticmethod
    def get_capture_batch_sizes() -> list[int]:
        """What `set_capture_batch_sizes` set; empty at first."""
        return list(_staging.batch_sizes)

    @staticmethod
    def clear_buffer_cache() -> None:
        """Free the staging memory that no call uses."""
        _staging.clear()


def _wrong_numbers(numbers: dict[str, tuple[object, int, int]]) -> Iterator[str]:
    for name, (value, least, most) in numbers.items():
        if type(value) is not int or value < least:
            yield f"{name}: expected a whole number >= {least}, found {value!r}"
        elif value > most:
            yield f"{name}: expected a whole number <= {most}, found one of {value.bit_length()} bits"

"""The module that takes the place of a transformers experts module."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports dynamo (800 modules, 3 s) at once

from kt_sft.autograd.moe import Ticket, join, submit
from kt_sft.autograd.settings import NO_FACTORS, NO_LORA, MoeSettings
from kt_sft.formats.finite import check_finite
from kt_sft.models.layout import ExpertsSpec, Formats, Matrices
from kt_sft.native import native
from kt_sft.nn.expert_lora import ExpertLora
from kt_sft.schedule.deferred import Deferral
from kt_sft.storage import check_storage
from kt_sft.transfer.routes import copying_route_of, fetch

PLACEHOLDERS = ("gate_up_proj", "down_proj")
Buffer = memoryview | bytearray  # anything of bytes that the buffer protocol gives


class RoutedExperts(nn.Module):
    """All routed experts of one layer, on the CPU, behind transformers' experts interface.

    Args:
        spec: sizes and activation.
        formats: of all projections, or of gate, up and down. `bf16`, `int8` or `int4`: what is loaded is rounded
            to it; `rawint4`: the integers and scales that `load_expert_int4` is given; `f16` or a block type of GGUF
            files: the rows of a file.
        group_size: weights that share a scale in `int4` and `rawint4`.
        expert_activations: `bf16`, `bfp16` (block floating point for few rows), `int8` (quantised row by row) or
            `auto`, see `rows`.
        chunk_size: tokens per native pass.
        cpu_activation: `retain` or `recompute` gate and up products in backward.
        dtype: that the placeholders show to PEFT.

    `gate_up_proj` and `down_proj`, shaped as in the module that this one replaces, are placeholders of one element with
    stride zero: they tell other libraries the shapes, the weights live packed in the native store. Biases, where the
    family has them, are ordinary frozen parameters that transformers loads and saves.
    """

    def __init__(
        self,
        spec: ExpertsSpec,
        *,
        formats: Formats = "bf16",
        group_size: int = 32,
        expert_activations: str = "auto",
        chunk_size: int = 1024,
        cpu_activation: str = "retain",
        dtype=torch.bfloat16,
    ):
        super().__init__()
        self.num_experts = spec.num_experts
        self.hidden_dim = spec.hidden
        self.intermediate_dim = spec.inter
        self.spec = spec
        self.method = formats.upper() if isinstance(formats, str) else "GGUF"  # that these formats follow from
        self.formats = (formats,) * 3 if isinstance(formats, str) else formats
        self.group_size = group_size
        self.expert_activations = expert_activations
        self._fixed = MoeSettings(chunk_size=chunk_size, retain=cpu_activation == "retain")
        self._settings: dict[tuple[str, float], MoeSettings] = {}
        sizes = (spec.num_experts, spec.hidden, spec.inter)
        self.store = native().ExpertStore(*sizes, formats, group_size)
        self.layer = native().MoeLayer(self.store, spec.activation, spec.alpha, spec.limit)
        self.lora: ExpertLora | None = None
        self.deferral: Deferral | None = None
        self._origins: dict[int, Callable[[], Matrices]] = {}
        self.gate_up_proj = _placeholder(spec.gate_up_shape, dtype)
        self.down_proj = _placeholder(spec.down_shape, dtype)
        for name, shape in spec.bias_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
        self._stored: set[int] = set()  # experts whose weights are the checkpoint's although the format rounds
        self._biases: tuple[tuple, Matrices] | None = None

    def load_expert(
        self,
        index: int,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        origin: Callable[[], Matrices] | None = None,
        is_stored: bool = False,
    ) -> None:
        """Packs gate, up `[inter, hidden]` and down `[hidden, inter]`; the tensors are free afterwards.

        Args:
            gate, up, down: bf16; for `f16` and the block types of GGUF files uint8 `[rows, bytes of a row]`.
            origin: gives the same three in bf16 again at any later time; kept only where packing rounds.
            is_stored: nothing of what the checkpoint holds is lost, so `unpack_expert` is an origin.
        Raises:
            NonFinite: NaN or infinity in bf16 weights; the kernels' own check of blocks is a ValueError.
        """
        _check_storages(gate=gate, up=up, down=down)
        check_finite(gate, up, down)
        self._forget(index)
        self.store.load_expert(index, gate, up, down)
        if is_stored:
            self._stored.add(index)
        if origin is not None and not self.is_exact and not is_stored:
            self._origins[index] = origin

    def load_expert_int4(
        self, index: int, gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]
    ) -> None:
        """Takes INT4 weights as a checkpoint stores them, format `rawint4` only; nothing is rounded.

        Args:
            gate, up, down: integers q + 8 two a byte, the first in the low half, uint8 `[n, k / 2]`, and scales bf16
                `[n, ceil(k / group_size)]`.
        Raises:
            NonFinite: NaN or infinity among the scales.
        """
        _check_storages(gate=gate[0], up=up[0], down=down[0])
        _check_storages(gate=gate[1], up=up[1], down=down[1])
        check_finite(gate[1], up[1], down[1])
        self._forget(index)
        self.store.load_expert_int4(index, gate, up, down)
        self._stored.add(index)

    def _forget(self, index: int) -> None:
        """Where an expert's weights came from: loading replaces them, or leaves none."""
        self._origins.pop(index, None)
        self._stored.discard(index)

    def load_packed(
        self,
        index: int,
        blobs: tuple[Buffer, Buffer, Buffer],
        *,
        copy: bool,
        origin: Callable[[], Matrices] | None = None,
    ) -> None:
        """Takes gate, up and down as a store of this format exports them, each aligned to 64 bytes.

        Args:
            copy: into node-local memory; otherwise they are used where they are and must not change.
        """
        self._forget(index)
        (self.store.copy_expert if copy else self.store.map_expert)(index, *blobs)
        if origin is not None and not self.is_exact:
            self._origins[index] = origin

    def unpack_expert(self, index: int) -> Matrices:
        """Copies (gate, up, down) of one expert as they are packed, in bf16: as they were loaded if `is_exact`."""
        kind = {"dtype": torch.bfloat16, "device": "cpu"}
        gate, up = (torch.empty(self.intermediate_dim, self.hidden_dim, **kind) for _ in range(2))
        down = torch.empty(self.hidden_dim, self.intermediate_dim, **kind)
        self.store.unpack_expert(index, gate, up, down)
        return gate, up, down

    def origin(self, index: int) -> Callable[[], Matrices] | None:
        """What gives one expert (gate, up, down) in bf16 as it was loaded; None if nobody has that any more.

        Calling it raises FormatError where the checkpoint is gone or changed.
        """
        has_all = self.is_exact or index in self._stored
        return functools.partial(self.unpack_expert, index) if has_all else self._origins.get(index)

    @property
    def is_exact(self) -> bool:
        """Whether the packed weights are those that were loaded."""
        return set(self.formats) == {"bf16"}

    def rows(self) -> str:
        """Activations of a forward pass that starts now: `bf16`, `bfp16` or `int8`.

        `auto` takes int8 or bfp16 for inference only, that is in eval mode with gradients off: int8 where the CPU has
        int8 dot instructions, which make it faster, bfp16 elsewhere. A pass without gradients in train mode stays bf16:
        it is the first one of a checkpointed layer, or a reference for the policy in training, and must compute what
        the pass with gradients computes.
        """
        if self.expert_activations != "auto" and self.method != "GGUF":
            return self.expert_activations
        in_training = self.expert_activations == "auto" and (self.training or torch.is_grad_enabled())
        if self.is_exact or in_training or self.expert_activations == "bf16":
            return "bf16"
        best = {native().default_rows(format) for format in self.formats}
        return best.pop() if len(best) == 1 else "bfp16"  # what projections of several formats have in common

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed weights."""
        return self.store.packed_bytes

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[tokens, hidden]`, top_k_index and top_k_weights `[tokens, k]` -> `[tokens, hidden]`."""
        if torch.compiler.is_compiling():  # the guard costs more than the rest of this method: only where it is needed
            return self._forward_uncompiled(hidden_states, top_k_index, top_k_weights)
        return self._forward(hidden_states, top_k_index, top_k_weights)

    @_disable_dynamo
    def _forward_uncompiled(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self._forward(hidden_states, top_k_index, top_k_weights)

    def _forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        shape = hidden_states.shape
        out = join(self.submit(hidden_states, top_k_index, top_k_weights))
        return out if len(shape) == 2 else out.reshape(shape)

    def submit(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Ticket:
        """Begin a forward pass, whose output `[tokens, hidden]` `kt_sft.autograd.moe.join` gives.

        Raises:
            RuntimeError: PEFT's own LoRA that nothing bound; deferred experts in training, or with gradients.
        """
        if "parametrizations" in self._modules:  # PEFT's own wrapper put W + delta over a placeholder: nobody reads it
            raise RuntimeError(
                "expert LoRA: PEFT wrapped the experts but nothing bound its LoRA to the kernels; "
                "use kt_sft.get_peft_model or kt_sft.load_adapter instead of PEFT's own"
            )
        x = hidden_states  # [tokens, hidden]
        if x.dim() > 2:
            check_storage(x, "x")  # before torch may copy it
            x = x.reshape(-1, x.shape[-1])
        factors, lora, dropout, seed, route = NO_FACTORS, NO_LORA, 0.0, 0, None
        if self.lora is not None and self.lora.active():
            lora = self.lora.bind(self.layer.inter)
            factors = self.lora.tensors() if torch.is_grad_enabled() else NO_FACTORS  # else the copies do
            if self.training and self.lora.dropout > 0.0:
                dropout = self.lora.dropout
                # From torch's CPU generator: seeded with the run, and given back by checkpointing for its recompute.
                seed = int(torch.randint(0, 2**62, (), device="cpu").item())
        if self.deferral is not None:
            self._check_deferring()
            route = copying_route_of(x)  # the model may write over its tensors while the deferred experts read theirs
        return submit(
            x,
            top_k_index,
            top_k_weights,
            self.layer,
            self._settings_for(self.rows(), dropout),
            factors=factors,
            lora=lora,
            bias=self._bias(),
            seed=seed,
            route=route,
            deferral=self.deferral,
        )

    def _settings_for(self, rows: str, dropout: float) -> MoeSettings:
        """Those of the layer; made for the first call of a kind."""
        made = self._settings.get((rows, dropout))
        if made is None:
            made = self._settings[rows, dropout] = dataclasses.replace(self._fixed, rows=rows, dropout=dropout)
        return made

    def _check_deferring(self) -> None:
        if self.training or torch.is_grad_enabled():
            raise RuntimeError(
                "max_deferred_experts_per_token: deferred experts are for inference, under torch.no_grad() and in eval "
                "mode; load the model without them for training"
            )

    def _bias(self) -> Matrices | None:
        """Biases of gate, up and down in f32 on the CPU; copies are made again when a parameter changed."""
        if not self.spec.has_bias:
            return None
        stored = self.gate_up_proj_bias.detach(), self.down_proj_bias.detach()
        looks = tuple((t.data_ptr(), t._version, t.dtype) for t in stored)
        if self._biases is None or self._biases[0] != looks:
            gate_up, down = (fetch(t, torch.float32, "bias") for t in stored)
            gate, up = gate_up[:, self.spec.gate_rows], gate_up[:, self.spec.up_rows]
            self._biases = (looks, (gate.contiguous(), up.contiguous(), down.contiguous()))
        return self._biases[1]

    def hide_placeholders(self) -> None:
        """Take them out of the parameters, which others move to devices at their full size, broadcast and save."""
        self.__dict__.update({name: self._parameters.pop(name) for name in PLACEHOLDERS if name in self._parameters})

    def show_placeholders(self) -> None:
        """Make them parameters again, before the biases."""
        others = dict(self._parameters)
        hidden = {name: self.__dict__.pop(name) for name in PLACEHOLDERS if name in self.__dict__}
        self._parameters.clear()
        self._parameters.update(hidden, **others)

    def _apply(self, fn, recurse=True):
        """Device and dtype moves leave expert data and placeholders alone."""
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """Biases only: checkpoints with experts are written by `save_full_model`."""
        for name in self.spec.bias_shapes:
            bias = self._parameters[name]
            destination[f"{prefix}{name}"] = bias if keep_vars else bias.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        """Biases are taken; `load_expert` fills the store: expert weights in a state dict are unexpected."""
        unexpected_keys.extend(f"{prefix}{name}" for name in PLACEHOLDERS if f"{prefix}{name}" in state_dict)
        for name, shape in self.spec.bias_shapes.items():
            given = state_dict.get(f"{prefix}{name}")
            if given is None:
                missing_keys.extend([f"{prefix}{name}"] if strict else ())
            elif tuple(given.shape) != shape:
                errors.append(f"size mismatch for {prefix}{name}: expected {list(shape)}, found {list(given.shape)}")
            else:
                with torch.no_grad():
                    self._parameters[name].copy_(given)

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "RoutedExperts: packed experts cannot be copied or pickled; save with model.save_pretrained, "
            "and load the model again for a second one"
        )

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, hidden={self.hidden_dim}, inter={self.intermediate_dim}"
        group = f" in groups of {self.group_size}" if "INT4" in self.method else ""
        rows = "" if self.is_exact else f", activations={self.expert_activations}"
        name = "/".join(dict.fromkeys(self.formats))
        return f"{sizes}, {self.spec.activation}, {name}{group}{rows}"


def _placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, dtype=dtype).expand(shape), requires_grad=False)


def _check_storages(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        check_storage(tensor, name)

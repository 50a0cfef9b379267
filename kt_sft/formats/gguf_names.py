"""From the tensors of a GGUF file to those of the transformers checkpoint, experts left out.

Names and permutations: gguf-py's tensor_mapping.py and convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.formats.gguf import GgufIndex
from kt_sft.formats.gguf_expert_tensors import INPUT_SCALE, SCALE, is_expert_tensor

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_experts.down_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "kimi_k2": "deepseek2",
}
_GGUF_NAMES = {name: source for source, name in (_TOP | _BLOCK_NAMES).items()}
_GGUF_NAMES["block_sparse_moe.gate.weight"] = "ffn_gate_inp.weight"
# The two halves of kv_b in newer DeepSeek files.
_KEY_HALF, _VALUE_HALF, _WHOLE = "attn_k_b.weight", "attn_v_b.weight", "attn_kv_b.weight"


@dataclass(frozen=True)
class PlainTensor:
    """A tensor of the checkpoint: its shape, the tensors of the file that it is made of, and how (None: as it is).

    A source is times what `scale_of` finds beside it.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[..., Tensor] | None = None


def scale_of(index: GgufIndex, source: str) -> float:
    """What the stored numbers of a weight are times: the one number beside it (NVFP4's second scale), else 1.

    Raises:
        FormatError: it is no finite number.
    """
    name = source.removesuffix(".weight") + SCALE
    if not source.endswith(".weight") or name not in index:
        return 1.0
    value = index.read(name).item()
    if not math.isfinite(value):
        raise FormatError(index.info(name).file, f"tensor {name}", expected="a finite number", found=value)
    return value


def plain_tensors(index: GgufIndex, config: dict[str, Any]) -> Iterator[PlainTensor]:
    """Everything but the experts, in the order of the file.

    Args:
        config: of `gguf_config.model_config`.
    Raises:
        FormatError: halves of kv_b that do not fit together.
        UnsupportedModel: a tensor that is not known: the model would be computed without it.
    """
    is_mixtral = config["model_type"] == "mixtral"
    for source in index:
        block = _BLOCK.fullmatch(source)
        if is_expert_tensor(source) or (block and int(block[1]) >= config["num_hidden_layers"]):
            continue
        if _is_beside_weight(index, source):
            continue  # read together with the weight
        if source in _TOP:
            yield PlainTensor(_TOP[source], index.info(source).shape, (source,))
            continue
        layer, part = (f"model.layers.{block[1]}.", block[2]) if block else ("", "")
        if part in (_KEY_HALF, _VALUE_HALF) and f"blk.{block[1]}.{_WHOLE}" in index:
            continue  # files of some months have both
        if part == _VALUE_HALF:
            continue  # comes with the other half
        if part == _KEY_HALF:
            yield _joined_kv_b(index, f"blk.{block[1]}.", f"{layer}self_attn.kv_b_proj.weight")
            continue
        if part not in _BLOCK_NAMES:
            raise UnsupportedModel(
                f"{index.source}: tensor {source}",
                expected="tensors of a model that is read from one GGUF file",
                found="an unknown one",
                remedy="use the model directory of its safetensors version, and the GGUF file as kt_weight_path",
            )
        name = layer + _BLOCK_NAMES[part]
        make = None
        if is_mixtral:
            name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
            heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}.get(part)
            make = unpermute(config[heads]) if heads else None
        yield PlainTensor(name, index.info(source).shape, (source,), make)


def _is_beside_weight(index: GgufIndex, source: str) -> bool:
    """Whether a tensor is the one scale of a matrix, or of activations in fp4, which stay bf16 here."""
    end = next((end for end in (INPUT_SCALE, SCALE) if source.endswith(end)), None)
    weight = f"{source.removesuffix(end)}.weight" if end else ""
    return weight in index and len(index.info(weight).shape) > 1 and index.info(source).shape == (1,)


def block_name(name: str) -> str | None:
    """What a GGUF file calls a tensor of the checkpoint, experts left out; None: it has no name for it."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    found = _GGUF_NAMES.get(layer[2] if layer else name)
    return f"blk.{layer[1]}.{found}" if layer and found else found


def layer_of(module: str) -> int:
    """The layer of a module such as `model.layers.3.mlp.experts`.

    Raises:
        UnsupportedModel: no number, or several, in the name.
    """
    numbers = re.findall(r"\.(\d+)(?=\.|$)", module)
    if len(numbers) != 1:
        raise UnsupportedModel(
            f"experts module {module}",
            expected="one layer number in its name, as the tensors of a GGUF file have it",
            found=f"{len(numbers)}",
            remedy="use safetensors files",
        )
    return int(numbers[0])


def unpermute(heads: int) -> Callable[[Tensor], Tensor]:
    """Undoes llama.cpp's order of q and k rows: rotary partners are neighbours there, half a head apart here."""

    def make(w: Tensor) -> Tensor:
        pairs = w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1])  # [heads, head_dim / 2, 2, hidden]
        return pairs.swapaxes(1, 2).reshape(w.shape)

    return make


def permute(heads: int) -> Callable[[Tensor], Tensor]:
    """llama.cpp's order of q and k rows; the reverse of `unpermute`."""

    def make(w: Tensor) -> Tensor:
        halves = w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1])  # [heads, 2, head_dim / 2, hidden]
        return halves.swapaxes(1, 2).reshape(w.shape)

    return make


def _joined_kv_b(index: GgufIndex, block: str, name: str) -> PlainTensor:
    """k_b `[heads, kv_rank, nope]` and v_b `[heads, v, kv_rank]` -> kv_b_proj `[heads * (nope + v), kv_rank]`."""
    keys, values = index.info(block + _KEY_HALF).shape, index.info(block + _VALUE_HALF).shape
    for half, shape in ((_KEY_HALF, keys), (_VALUE_HALF, values)):
        if len(shape) != 3:
            what = f"tensor {block}{half}"
            raise FormatError(index.source, what, expected="three axes, heads first", found=list(shape))
    index.expect(block + _VALUE_HALF, (keys[0], values[1], keys[1]))

    def make(k: Tensor, v: Tensor) -> Tensor:
        import torch

        k = k.reshape(keys).transpose(1, 2)  # [heads, nope, kv_rank]
        return torch.cat([k, v.reshape(values)], dim=1).reshape(-1, keys[1])

    return PlainTensor(name, (keys[0] * (keys[2] + values[1]), keys[1]), (block + _KEY_HALF, block + _VALUE_HALF), make)

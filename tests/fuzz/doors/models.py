"""Doors to models: config.json, checkpoints that are loaded, GGUF files as models, YAML of rules and of runs."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import kt_sft
from kt_sft.formats.gguf import GgufIndex
from kt_sft.formats.gguf_config import model_config
from kt_sft.formats.safetensors_index import INDEX_NAME, SINGLE_NAME, SafetensorsIndex
from kt_sft.integrations.gguf.model import model_directory
from kt_sft.integrations.gguf.tokenizer import read_tokenizer
from kt_sft.integrations.llamafactory.planning import plan_run, read_run
from kt_sft.integrations.transformers.loading import check_model
from kt_sft.placement.resolve import resolve
from kt_sft.placement.rules import load_rules
from tests.fuzz.case import NAMED, Door, Subject
from tests.fuzz.documents import Document, Json, Tensors, Yaml
from tests.fuzz.gguf_document import Gguf
from tests.helpers import gguf_models, rule_models, tiny_models

_CONFIG_WORDS = (
    "qwen3_moe", "mixtral", "deepseek_v3", "llama", "bert", "Qwen3MoeForCausalLM", "auto_map",
    "quantization_config", "silu", {"AutoConfig": "tripwire.Config", "AutoModelForCausalLM": "tripwire.Model"},
    "torch_dtype", "dtype", "float16", "float8", "bfloat16", "float32", "rope_scaling", "rope_parameters",
    {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "x"}, {"quant_method": "fp8"},
    {"quant_method": "gptq", "bits": 4}, "_attn_implementation", "attn_implementation", "gelu", "text_config",
    "num_local_experts", "id2label", "num_labels", "problem_type", "transformers_version", "architectures",
    "full_attention", "sliding_attention", "is_encoder_decoder", "chunk_size_feed_forward", 128, 10**5, 10**9, 131,
    132, -1,
)  # fmt: skip
_TINY = {"qwen3_moe": {"num_hidden_layers": 1}, "deepseek_v3": {"num_hidden_layers": 2}, "mixtral": {}}


def _config(family: str) -> Callable[[Path], Subject]:
    """What `load_model` looks at before it reads a weight."""

    def build(place: Path) -> Subject:
        folder = tiny_models.build(family, place / "m", **_TINY[family])
        files: dict[str, Document] = {"config.json": Json((folder / "config.json").read_bytes(), _CONFIG_WORDS)}
        fixed = {SINGLE_NAME: (folder / SINGLE_NAME).read_bytes()}
        return Subject(files, lambda at: check_model(at, kt_sft.KTConfig()), fixed=fixed)

    return build


def _loaded(place: Path) -> Subject:
    """A checkpoint of several files: its logits are those of stock transformers."""
    folder = tiny_models.build("qwen3_moe", place / "m", sharded=True, **_TINY["qwen3_moe"])
    ids = tiny_models.token_ids()
    files: dict[str, Document] = {"config.json": Json((folder / "config.json").read_bytes(), _CONFIG_WORDS)}
    files["generation_config.json"] = Json((folder / "generation_config.json").read_bytes())
    with SafetensorsIndex.from_directory(folder) as index:
        names = list(index)
    files[INDEX_NAME] = Json((folder / INDEX_NAME).read_bytes(), names)
    for file in sorted(folder.glob("*.safetensors")):
        files[file.name] = Tensors(file.read_bytes(), names)

    def read(at: Path) -> Tensor:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()), torch.no_grad():
            return kt_sft.load_model(at, kt_sft.KTConfig(), dtype=torch.float32).eval()(ids).logits

    def check(at: Path, logits: Tensor) -> None:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()), torch.no_grad():
            try:
                stock = tiny_models.load_stock(at)(ids).logits
            except Exception:  # it refuses more than we do, such as a generation config
                return
        near = torch.allclose(logits, stock, rtol=0.05, atol=0.05 * max(1.0, float(stock.nan_to_num().abs().max())))
        assert near or not stock.isfinite().all(), "logits are not those of stock transformers"

    return Subject(files, read, check)


def _gguf(family: str, *, loads: bool) -> Callable[[Path], Subject]:
    """Config and tokenizer from metadata, or the whole model directory."""

    def build(place: Path) -> Subject:
        sizes = {"hidden_size": 64, "moe_intermediate_size": 32} if family != "mixtral" else {}
        source = tiny_models.build(family, place / "m", **sizes, **_TINY[family])
        file = gguf_models.write_model(source, place / "m.gguf")
        words = (
            "general.architecture",
            "qwen3moe",
            "llama",
            "deepseek2",
            "yarn",
            "linear",
            "gpt2",
            "bert",
            "qwen2",
            3,
            7,
        )
        document = Gguf(file.read_bytes(), words)
        cache = place / "cache"

        def read(at: Path) -> Any:
            if loads:
                made = model_directory(at / "m.gguf", cache)
                for kept in sorted(cache.iterdir())[:-3]:
                    _remove(kept)
                return made
            with GgufIndex.from_path(at / "m.gguf") as index:
                return model_config(index), read_tokenizer(index)

        return Subject({"m.gguf": document}, read, odd=())

    return build


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


_RULES = b"""
vars:
  stage1: cpu
  stage2: ${stage1}
rules:
  - match: {name: '\\.mlp\\.experts$', class: Qwen3MoeExperts}
    replace: {class: RoutedExperts, kwargs: {generate_device: cpu, prefill_device: cpu, method: INT8}}
    recursive: false
  - match: {name: '^model\\.(embed_tokens|rotary_emb)$'}
    replace: {class: default, kwargs: {generate_device: '${stage1}', prefill_device: '${stage1}'}}
  - match:
      layers: 1/2
    replace:
      class: default
      kwargs:
        generate_device: ${stage2}
  - match: {name: self_attn, class: torch.nn.Linear}
    replace: {class: PackedLinear, kwargs: {method: bf16}}
"""
_RULE_WORDS = (
    "match", "replace", "name", "class", "layers", "recursive", "kwargs", "generate_device", "prefill_device",
    "out_device", "backend", "method", "BF16", "INT4", "cpu", "cuda", "cuda:1", "cuda:99999999999999999999", "0-2",
    "2/4", "0-99999999999", "1/0", "0/1", "${stage1}", "${x}", "${stage1}" * 50, "(a+)+$", "((((.*)*)*)*)*x",
    "default", "RoutedExperts", "rules", "PackedLinear", "vars", "torch.nn.Linear", "KLinearMarlin", "generate_op",
    "transfer_map", "(" * 200, "a{99999}",
)  # fmt: skip


def _rules(_: Path) -> Subject:
    model = rule_models.tiny("qwen3_moe")

    def read(folder: Path) -> Any:
        return resolve(model, load_rules(folder / "rules.yaml"), default_device="cpu", method="BF16")

    return Subject({"rules.yaml": Yaml(_RULES, _RULE_WORDS)}, read, odd=NAMED)


_RUN = """
model_name_or_path: {model}
stage: sft
do_train: true
finetuning_type: lora
lora_target: all
lora_rank: 8
lora_alpha: 16
use_kt: true
kt_method: INT8
cpu_infer: 1
kt_rule_vars: null
dataset: kt_sft_identity
template: qwen3_nothink
cutoff_len: 64
output_dir: outputs/x
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
bf16: true
use_cpu: true
deepspeed: null
"""
_RUN_WORDS = (
    "kt_weight_path", "kt_weight_cache", "kt_optimize_rule", "kt_rule_vars", "kt_int4_group_size",
    "kt_expert_activations", "kt_cpu_linear", "kt_expert_lora", "kt_cpu_activation", "kt_threadpool_count",
    "kt_config", "kt_backend", "ref_model", "adapter_name_or_path", "use_dora", "quantization_bit",
    "modules_to_save", "additional_target", "chunk_size", "experts", "kt_max_deferred_experts_per_token", "RAWINT4",
    "GGUF", "q_proj,experts", "gate_proj", ["q_proj", "experts"], "x.gguf", "device_map", "cache_dir",
    "model_revision", "trust_remote_code", "resume_from_checkpoint", "warmup_ratio", 256, 257,
)  # fmt: skip


def _run(loads_plan: bool) -> Callable[[Path], Subject]:
    """A run's file as `kt-sft plan` and the hook read it."""

    def build(place: Path) -> Subject:
        model = tiny_models.build("qwen3_moe", place / "m", **_TINY["qwen3_moe"])
        good = _RUN.format(model=model).encode()
        files: dict[str, Document] = {"run.yaml": Yaml(good, _RUN_WORDS)}

        def read(folder: Path) -> Any:
            return (plan_run if loads_plan else read_run)(folder / "run.yaml")

        def check(folder: Path, result: Any) -> None:
            if loads_plan:
                json.dumps(result.to_dict(), allow_nan=False)

        return Subject(files, read, check, odd=NAMED)

    return build


def _run_json(place: Path) -> Subject:
    values = yaml.safe_load(_RUN.format(model="m"))

    def read(folder: Path) -> Any:
        return copy.deepcopy(read_run(folder / "run.json"))

    return Subject({"run.json": Json(json.dumps(values).encode(), _RUN_WORDS)}, read, odd=NAMED)


DOORS = (
    Door("config-qwen3", _config("qwen3_moe"), loads=True),
    Door("config-deepseek", _config("deepseek_v3"), loads=True),
    Door("model", _loaded, loads=True),
    Door("gguf-config-qwen3", _gguf("qwen3_moe", loads=False), loads=True),
    Door("gguf-config-mixtral", _gguf("mixtral", loads=False), loads=True),
    Door("gguf-config-deepseek", _gguf("deepseek_v3", loads=False), loads=True),
    Door("gguf-model", _gguf("qwen3_moe", loads=True), loads=True),
    Door("rules", _rules, loads=True),
    Door("run", _run(False), loads=True),
    Door("run-json", _run_json, loads=True),
    Door("plan", _run(True), loads=True),
)

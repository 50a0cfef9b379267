"""Stock LLaMA-Factory in subprocesses on a tiny model: configurations, data, a driver for several runs per start.

A start costs ten seconds of imports, so runs of one kind share a process; the first training goes through the command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.helpers import tiny_models
from tests.helpers.tiny_tokenizer import VOCAB_SIZE, save_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS = 24


def environment(*, use_kt: bool = True, **more: str) -> dict[str, str]:
    """Environment of a run: offline, one thread, this checkout."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("KT_SFT_", "ACCELERATE_"))}
    env.pop("USE_KT", None)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # LLaMA-Factory calls torchrun by name
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    return env | ({"USE_KT": "1"} if use_kt else {}) | more


def workspace(directory: Path, family: str = "qwen3_moe") -> Path:
    """A directory with `model` (weights and tokenizer) and `data` (rows in alpaca format)."""
    model = tiny_models.build(family, directory / "model", vocab_size=VOCAB_SIZE + 5, max_position_embeddings=512)
    save_tiny_tokenizer(model)
    data = directory / "data"
    data.mkdir(exist_ok=True)
    rows = [{"instruction": f"add {i} and 1", "input": "", "output": f"{i + 1}"} for i in range(NUM_ROWS)]
    (data / "sums.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"sums": {"file_name": "sums.json"}}))
    return directory


def train_config(work: Path, output: str, **changes: Any) -> dict[str, Any]:
    """A complete training configuration; `changes` override, None removes a key."""
    config = {
        "use_kt": True,
        "model_name_or_path": str(work / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "dataset": "sums",
        "dataset_dir": str(work / "data"),
        "template": "chatml",
        "cutoff_len": 96,
        "preprocessing_num_workers": 1,
        "output_dir": str(work / output),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1.0e-2,
        "logging_steps": 1,
        "save_steps": 100,
        "report_to": "none",
        "bf16": True,
        "use_cpu": True,
        "seed": 7,
    }
    return {key: value for key, value in {**config, **changes}.items() if value is not None}


def infer_config(work: Path, **changes: Any) -> dict[str, Any]:
    """A configuration for chat, api and export."""
    config = {
        "use_kt": True,
        "model_name_or_path": str(work / "model"),
        "template": "chatml",
        "finetuning_type": "lora",
        "infer_dtype": "bfloat16",
        "do_sample": False,
        "max_new_tokens": 8,
    }
    return {key: value for key, value in {**config, **changes}.items() if value is not None}


def cli(
    command: str, config: dict[str, Any], directory: Path, *words: str, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """`llamafactory-cli COMMAND config.yaml`, with its output as text in `stdout` and `stderr`."""
    file = directory / f"{command}.yaml"
    file.write_text(yaml.safe_dump(config))
    env = kwargs.pop("env", None) or environment()
    return subprocess.run(
        [sys.executable, "-m", "llamafactory.cli", command, str(file), *words],
        capture_output=True, text=True, cwd=directory, env=env, timeout=600, **kwargs,
    )  # fmt: skip


def drive(script: str, *arguments: Any, env: dict[str, str] | None = None) -> Any:
    """Run a script in a fresh process; it finds its arguments in `given` and answers through `give` (JSON)."""
    prologue = (
        "import json, sys\ngiven = json.loads(sys.argv[1])\ndef give(value):\n    print('GIVEN' + json.dumps(value))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prologue + script, json.dumps(arguments)],
        capture_output=True, text=True, env=env or environment(), timeout=900,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("GIVEN")]
    assert done.returncode == 0 and lines, (
        f"exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    )
    return json.loads(lines[-1][len("GIVEN") :])

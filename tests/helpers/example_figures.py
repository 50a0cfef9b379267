"""Writes the memory figures of the examples and of README.md from what `kt-sft plan` computes:

    python -m tests.helpers.example_figures

No network: the configs of the published models are in rule_models.py.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import tempfile
from functools import cache
from pathlib import Path

import yaml

from kt_sft.errors import GIB
from kt_sft.formats.staging import write_text
from kt_sft.integrations.llamafactory.planning import RunPlan, plan_run
from kt_sft.models.spec import find_experts
from kt_sft.native import native
from kt_sft.placement.budget import TRAINED_BYTES, DeviceMemory
from tests.helpers import rule_models

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
# model_name_or_path of an example -> (its config in rule_models, GB of the checkpoint on the hub).
MODELS = {
    "deepseek-ai/DeepSeek-V2-Lite-Chat": ("deepseek_v2_lite", 31),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": ("qwen3_moe", 61),
    "deepseek-ai/DeepSeek-V3": ("deepseek_v3", 689),  # FP8, and the layer for multi-token prediction
}
# Row of README's table of the experts' memory -> config.
README_ROWS = {
    "DeepSeek-V2-Lite": "deepseek_v2_lite",
    "Qwen3-30B-A3B": "qwen3_moe",
    "Mixtral-8x7B": "mixtral",
    "DeepSeek-V3": "deepseek_v3",
}
PARTS = {
    "experts_bytes": "experts",
    "weights_bytes": "weights",
    "lora_bytes": "LoRA",
    "activations_bytes": "activations",
}
# From `memory` to the next word of the header, which begins in the same column.
_BLOCK = re.compile(r"^#   memory .*?(?=^#   [a-z])", re.MULTILINE | re.DOTALL)


def large_examples() -> list[Path]:
    """The examples of published models, which are planned instead of run."""
    return [path for path in sorted(EXAMPLES.glob("*/*.yaml")) if _keys(path)["model_name_or_path"] in MODELS]


@cache
def planned(path: Path) -> RunPlan:
    """The plan of an example; a chat has the adapter that the training example of the same name writes."""
    config, _ = MODELS[_keys(path)["model_name_or_path"]]
    with tempfile.TemporaryDirectory() as folder:
        rule_models.published_config(config).save_pretrained(folder)
        words = [f"model_name_or_path={folder}"]
        if rules := _keys(path).get("kt_optimize_rule"):
            words.append(f"kt_optimize_rule={ROOT / rules}")
        if "adapter_name_or_path" not in _keys(path):
            return plan_run(path, words)
        plan = plan_run(path, [*words, "adapter_name_or_path=null"])
    trained = planned(EXAMPLES / "train_lora" / path.name)
    for device, held in trained.memory.items():
        plan.memory[device].lora_bytes = held.lora_bytes // TRAINED_BYTES * 4
    return plan


def gib(amount: int) -> str:
    """One decimal below 100 GiB."""
    value = amount / GIB
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def totals(path: Path) -> tuple[str, str]:
    """Main memory and the GPUs' memory, as the table of examples/README.md has them."""
    main, *gpus = (held.total_bytes for held in planned(path).memory.values())
    return f"{gib(main)} GiB", f"{' + '.join(map(gib, gpus))} GiB"


def header(path: Path) -> str:
    """The lines of an example's header about memory and disk."""
    plan = planned(path)
    names = ["main", "GPU"] if len(plan.memory) == 2 else ["main", *(f"GPU {i}" for i in range(len(plan.memory) - 1))]
    lines = [
        f"{name}: {gib(held.total_bytes)} GiB ({_parts(held, plan.run.trains)})"
        for name, held in zip(names, plan.memory.values(), strict=True)
    ]
    lines.append(f"from `kt-sft plan`, for passes of {plan.run.tokens} tokens")
    return f"#   memory   {f'{chr(10)}#            '.join(lines)}\n"


def with_figures(path: Path) -> str:
    """The text of an example with the figures of its plan."""
    text = path.read_text(encoding="utf-8")
    disk = MODELS[_keys(path)["model_name_or_path"]][1]
    text, found = _BLOCK.subn(lambda _: header(path), text)
    assert found == 1, f"{path}: expected one block that begins with `#   memory`"
    return re.sub(r"^#   disk .*$", f"#   disk     {disk} GB", text, flags=re.MULTILINE)


def examples_page() -> str:
    """examples/README.md with the figures of the plans in its table."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in large_examples():
        name = path.relative_to(EXAMPLES).as_posix()
        row = re.compile(rf"^(\| \[{name}\]\({name}\) \|[^|]*\|)[^|]*\|[^|]*\|", re.MULTILINE)
        main, gpus = totals(path)
        text, found = row.subn(rf"\1 {main} | {gpus} |", text)
        assert found == 1, f"examples/README.md: expected one row of {name}"
    return text


def readme() -> str:
    """README.md with the packed sizes of all experts in its table, and the main memory that goes with two GPUs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for row, config in README_ROWS.items():
        cells = " | ".join(f"{_short(_experts_bytes(config, method))} GiB" for method in ("bf16", "int8", "int4"))
        text, found = re.subn(rf"^\| {row} \|( [\d.]+ GiB \|){{3}}$", f"| {row} | {cells} |", text, flags=re.MULTILINE)
        assert found == 1, f"README.md: expected one row of {row}"
    main, _ = totals(EXAMPLES / "train_lora" / "deepseek_v3_int8_two_gpus.yaml")
    text, found = re.subn(r"beside [\d.]+ GiB of main memory", f"beside {main} of main memory", text)
    assert found == 1, "README.md: expected one `beside ... GiB of main memory`"
    return text


def _keys(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _parts(held: DeviceMemory, trains: bool) -> str:
    labels = {**PARTS, "lora_bytes": "LoRA with Adam"} if trains else PARTS
    # What rounds to 0.0 is left out.
    parts = {
        label: gib(getattr(held, field.name)) for field in dataclasses.fields(held) if (label := labels.get(field.name))
    }
    return ", ".join(f"{amount} {label}" for label, amount in parts.items() if amount != "0.0")


def _short(amount: int) -> str:
    value = amount / GIB
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


@cache
def _experts_bytes(config: str, method: str) -> int:
    specs = find_experts(rule_models.on_meta(rule_models.published_config(config))).values()
    sizes = ((spec.num_experts, spec.hidden, spec.inter) for spec in specs)
    return sum(native().ExpertStore.packed_bytes_for(*size, method, 32) for size in sizes)


def main() -> None:
    """Write all of them."""
    pages = {path: with_figures(path) for path in large_examples()}
    pages |= {EXAMPLES / "README.md": examples_page(), ROOT / "README.md": readme()}
    for path, text in pages.items():
        write_text(path, text)
        logging.info("wrote %s", path.relative_to(ROOT))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()

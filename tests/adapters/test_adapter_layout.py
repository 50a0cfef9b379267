"""Square experts: the layout of PEFT's LoRA of them is what the adapter's files say, not what the widths allow.

The truth is made by hand from the table in PEFT's own sources: lora_A of a parameter `[experts, p, q]` has p columns
up to 0.18, and q columns from 0.19.1 on unless the module says is_transposed.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kt_sft
from kt_sft.adapters import forms, layout
from kt_sft.errors import FormatError
from kt_sft.integrations.peft.adapter_dir import check_adapter
from kt_sft.integrations.peft.targets import RUNNING_FORM
from kt_sft.models.layout import ExpertsSpec
from tests.helpers import adapters, parity, tiny_models
from tests.helpers.adapters import edit, opened

# family, sizes, parameters that have LoRA: either one square alone, or the square one beside the other.
SQUARE = {
    "gate_up": ("qwen3_moe", {"moe_intermediate_size": 24}, ["gate_up_proj"]),
    "down": ("qwen3_moe", {"moe_intermediate_size": 48}, ["down_proj"]),
    "both": ("qwen3_moe", {"moe_intermediate_size": 24}, ["gate_up_proj", "down_proj"]),
    "transposed": ("gpt_oss", {"hidden_size": 48, "intermediate_size": 24}, ["gate_up_proj"]),
    "transposed down": ("gpt_oss", {"hidden_size": 48, "intermediate_size": 48}, ["gate_up_proj", "down_proj"]),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Directory with `base` and `adapter`, as PEFT 0.18 writes it, by name of the case."""
    made: dict[str, Path] = {}

    def of(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case.replace(" ", "_"))
            family, sizes, parameters = SQUARE[case]
            targets = [f"mlp.experts.{p}" for p in parameters]
            adapters.make(family, made[case], targets=targets, **sizes)
        return made[case]

    return of


def rewritten(root: Path, folder: Path, version: str | None, *, swap: bool) -> dict[str, Tensor]:
    """The adapter as another release would have it, and what that one adds to each parameter, by hand in float64.

    Args:
        swap: lora_A has q columns instead of p.
    """
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((root / "adapter" / name).read_bytes())
    edit(folder, peft_version=version)
    tensors, wanted = load_file(folder / "adapter_model.safetensors"), {}
    generator = torch.Generator().manual_seed(9)
    specs = opened_specs(root)
    parameters = json.loads((folder / "adapter_config.json").read_text())["target_parameters"]
    for module, spec in specs.items():
        mine = [p for p in ("gate_up_proj", "down_proj") if any(entry.endswith(p) for entry in parameters)]
        for depth, parameter in enumerate(reversed(mine)):
            shape = spec.gate_up_shape if parameter == "gate_up_proj" else spec.down_shape
            p, q = shape[1:]
            columns, rows = (q, p) if swap else (p, q)
            a = torch.randn(spec.num_experts, 3, columns, generator=generator) * 0.2
            b = torch.randn(spec.num_experts, rows, 3, generator=generator) * 0.2
            stem = f"base_model.model.{module}{'.base_layer' * depth}.lora_"
            tensors[f"{stem}A.weight"] = a.flatten(0, 1)
            tensors[f"{stem}B.weight"] = b.permute(1, 2, 0).flatten(1).contiguous()
            product = 5 / 3 * (b.double() @ a.double())  # [experts, rows, columns]
            wanted[f"{module}.{parameter}"] = product if swap else product.mT
    save_file(tensors, folder / "adapter_model.safetensors")
    return wanted


def is_read_as_it_is(model, folder: Path) -> bool:
    """Whether the PEFT that runs gets the files themselves."""
    return RUNNING_FORM in check_adapter(model, folder).as_is


def opened_specs(root: Path) -> dict[str, ExpertsSpec]:
    return dict(opened(root / "adapter", root).base.specs)


OLD = ["0.17.1", "0.18.0", "0.18.1", "0.18.2.dev0@5356277d", "0.18.2.dev0"]
NEW = ["0.19.1", "0.19.0.dev0", "0.19.2.dev0@UNKNOWN", "0.20.0", "0.21.2", "1.0.0"]


@pytest.mark.parametrize("case", ["gate_up", "down", "both"])
@pytest.mark.parametrize("version", [OLD[2], OLD[3], NEW[0], NEW[1]])
def test_version_tells_the_layout_of_square_experts(roots, tmp_path, case, version):
    root = roots(case)
    wanted = rewritten(root, tmp_path / "a", version, swap=version in NEW)
    adapters.assert_same(adapters.deltas(opened(tmp_path / "a", root)), wanted)
    model = parity.load_ours(root / "base")
    assert is_read_as_it_is(model, tmp_path / "a") == (version not in NEW)
    ids = tiny_models.token_ids()
    stock = tiny_models.load_stock(root / "base", dtype=torch.float64)
    for name, delta in wanted.items():
        stock.get_parameter(name).data += delta
    truth = stock(ids).logits
    found = kt_sft.load_adapter(model, tmp_path / "a")(ids).logits.double()
    assert (found - truth).norm() < 0.02 * truth.norm()


@pytest.mark.parametrize("case", ["transposed", "transposed down"])
@pytest.mark.parametrize("version", ["0.18.1", "0.19.1", None])
def test_transposed_experts_are_alike_in_both(roots, tmp_path, case, version):
    root = roots(case)
    wanted = rewritten(root, tmp_path / "a", version, swap=False)
    adapters.assert_same(adapters.deltas(opened(tmp_path / "a", root)), wanted)
    assert is_read_as_it_is(parity.load_ours(root / "base"), tmp_path / "a")


@pytest.mark.parametrize("version", ["0.18.2.dev0@abc", "0.19.0"])
def test_transposed_experts_of_the_releases_between(roots, tmp_path, version):
    root = roots("transposed down")
    wanted = rewritten(root, tmp_path / "a", version, swap=True)
    adapters.assert_same(adapters.deltas(opened(tmp_path / "a", root)), wanted)
    assert not is_read_as_it_is(parity.load_ours(root / "base"), tmp_path / "a")


@pytest.mark.parametrize("version", [None, "unknown", "0.19.0"])
def test_our_mark_tells_it_where_the_version_does_not(roots, tmp_path, version):
    root = roots("gate_up")
    for swap, mark in ((False, "peft-0.18"), (True, "peft-0.19")):
        folder = tmp_path / mark
        wanted = rewritten(root, folder, version, swap=swap)
        if version == "0.19.0" and not swap:
            mark = "peft-0.19.0"
        (folder / "kt_sft.json").write_text(json.dumps({"layout": mark}))
        adapters.assert_same(adapters.deltas(opened(folder, root)), wanted)
        (folder / "kt_sft.json").unlink()
        for door in (lambda f: opened(f, root), lambda f: check_adapter(parity.load_ours(root / "base"), f)):
            with pytest.raises(FormatError, match="layout of the LoRA .* expected peft_version in .* square matrices"):
                door(folder)


def test_version_before_mark(roots, tmp_path):
    root = roots("gate_up")
    wanted = rewritten(root, tmp_path / "a", "0.19.1", swap=True)
    (tmp_path / "a" / "kt_sft.json").write_text(json.dumps({"layout": "peft-0.18"}))
    adapters.assert_same(adapters.deltas(opened(tmp_path / "a", root)), wanted)


@pytest.mark.parametrize(("version", "swap"), [("0.18.1", True), ("0.19.1", False)])
def test_widths_that_contradict_the_version(roots, tmp_path, version, swap):
    root = roots("both")
    rewritten(root, tmp_path / "a", version, swap=swap)
    message = rf"down_proj: width of lora_A: expected \d+, as peft_version {version} in adapter_config.json has it, "
    for door in (lambda f: opened(f, root), lambda f: check_adapter(parity.load_ours(root / "base"), f)):
        with pytest.raises(FormatError, match=message + r"found \d+, as in the layout peft-0.1[89]"):
            door(tmp_path / "a")


@pytest.mark.parametrize("swap", [False, True])
def test_widths_tell_it_where_nothing_else_does(roots, tmp_path, swap):
    root = roots("both")
    wanted = rewritten(root, tmp_path / "a", None, swap=swap)
    adapters.assert_same(adapters.deltas(opened(tmp_path / "a", root)), wanted)


@pytest.mark.parametrize("form", ["peft-0.18", "peft-0.19"])
def test_what_is_written_says_its_layout(roots, tmp_path, form):
    root = roots("gate_up")
    written = adapters.convert(root, form, tmp_path / "out")
    assert json.loads((written / "kt_sft.json").read_text())["layout"] == form
    wanted = adapters.peft_deltas(root)
    for change in ({}, {"peft_version": None}):  # another tool may drop it
        edit(written, **change)
        adapters.assert_same(adapters.deltas(opened(written, root)), wanted)
    edit(written, peft_version=None)
    back = forms.convert(opened(written, root), "peft-0.18", tmp_path / "back")
    before, after = (load_file(d / "adapter_model.safetensors") for d in (root / "adapter", back))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_saved_adapters_say_their_layout(roots, tmp_path):
    """Also one that was loaded from another release: it is saved as the PEFT that runs lays it out."""
    root = roots("both")
    assert json.loads((root / "adapter" / "kt_sft.json").read_text())["layout"] == "peft-0.18"
    for version, swap in (("0.19.0", False), ("0.19.1", True), (None, False)):
        wanted = rewritten(root, tmp_path / f"{version}", version, swap=swap)
        model = kt_sft.load_adapter(parity.load_ours(root / "base"), tmp_path / f"{version}", is_trainable=True)
        model.save_pretrained(tmp_path / f"{version}-saved")
        config = json.loads((tmp_path / f"{version}-saved" / "adapter_config.json").read_text())
        assert config["peft_version"] == peft.__version__
        adapters.assert_same(adapters.deltas(opened(tmp_path / f"{version}-saved", root)), wanted)


def test_releases():
    assert {layout.of_release(version) for version in NEW} == {("peft-0.19",)}
    assert {layout.of_release(version)[0] for version in OLD} == {"peft-0.18"}
    assert layout.of_release("0.18.1") == ("peft-0.18",)
    assert [layout.of_release(version) for version in (None, "", "unknown", "main")] == [()] * 4
    assert [layout.form_of(v) for v in ("0.18.1", "0.18.2.dev0", "0.19.1")] == ["peft-0.18", "peft-0.18", "peft-0.19"]

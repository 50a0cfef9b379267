"""Models whose experts come from packed containers: the same model as from the checkpoint, mapped, copied or cached."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import kt_sft
from kt_sft import KTConfig, memory
from kt_sft.cli import app
from kt_sft.convert import run as running
from kt_sft.errors import ConfigError, FormatError, NotEnoughMemory, OutputError
from kt_sft.formats.gguf import GgufIndex
from kt_sft.formats.packed import PackedContainer
from kt_sft.integrations import peft as kt_peft
from kt_sft.integrations.transformers.converting import convert_checkpoint
from kt_sft.integrations.transformers.loading import check_model
from kt_sft.models.spec import iter_routed_experts
from kt_sft.native import native
from kt_sft.sources import cache as weight_cache
from tests.helpers import gguf_files, parity, quantized_checkpoints, tiny_models
from tests.integrations.transformers.test_saving import tensors_of
from tests.sources.test_gguf_experts import expert_tensors

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def no_bar(what, total):
    yield lambda done, all_, layer: None


def convert(source, output, method="INT8", **options):
    group = options.pop("group", 32)
    return convert_checkpoint(source, output, KTConfig(method=method, int4_group_size=group), bar=no_bar, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoint and container of a family in a format, written once."""
    root = tmp_path_factory.mktemp("containers")

    def get(family="qwen3_moe", method="INT8", group=32):
        source = tiny_models.build(family, root / family)
        output = root / f"{family}-{method}-{group}"
        convert(source, output, method, group=group)
        return source, output

    return get


def logits(model):
    with torch.no_grad():
        return model(tiny_models.token_ids()).logits


def mapped(model):
    return sum(experts.store.mapped_experts for _, experts in iter_routed_experts(model))


@pytest.mark.parametrize("weight_load", ["auto", "mmap", "copy"])
@pytest.mark.parametrize(
    ("family", "method", "group"),
    [("qwen3_moe", "BF16", 32), ("mixtral", "INT8", 32), ("deepseek_v2", "INT4", 64), ("deepseek_v3", "INT8", 32)],
)
def test_model_is_the_one_of_the_checkpoint(made, family, method, group, weight_load):
    source, packed = made(family, method, group)
    settings = {"method": method, "int4_group_size": group}
    ours = kt_sft.load_model(source, KTConfig(**settings, weight_path=packed, weight_load=weight_load))
    plain = kt_sft.load_model(source, KTConfig(**settings))
    assert torch.equal(logits(ours), logits(plain))
    assert (mapped(ours) > 0) == (
        weight_load == "mmap" or (weight_load == "auto" and native().num_pools() == 1)
    ) and mapped(plain) == 0


def test_experts_of_the_model_directory_are_not_needed(made, tmp_path):
    source, packed = made()
    bare = shutil.copytree(source, tmp_path / "bare")
    tensors = {name: tensor for name, tensor in tensors_of(source).items() if ".experts." not in name}
    from safetensors.torch import save_file

    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    ours = kt_sft.load_model(bare, KTConfig(method="INT8", weight_path=packed))
    assert torch.equal(logits(ours), logits(kt_sft.load_model(source, KTConfig(method="INT8"))))


def test_another_format_is_refused_before_any_work(made):
    source, packed = made(method="INT4", group=64)
    for settings, match in (
        ({"method": "INT8"}, "int8 is asked for, but the container .* holds int4 in groups of 64; set method: INT4 "),
        ({"method": "INT4"}, "int4 in groups of 32 is asked for.*int4_group_size: 64"),
    ):
        with pytest.raises(ConfigError, match=match):
            check_model(source, KTConfig(**settings, weight_path=packed))


def test_a_container_of_another_model_is_refused(made):
    source, _ = made("mixtral")
    _, packed = made("qwen3_moe")
    with pytest.raises(FormatError, match="the container belongs to another model"):
        kt_sft.load_model(source, KTConfig(method="INT8", weight_path=packed))


@pytest.mark.parametrize("method", ["BF16", "INT8"])
def test_saving_starts_from_the_checkpoint(made, tmp_path, caplog, method):
    source, packed = made(method=method)
    model = kt_sft.load_model(source, KTConfig(method=method, weight_path=packed))
    model.save_pretrained(tmp_path / "saved")
    expected, found = tensors_of(source), tensors_of(tmp_path / "saved")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert "rounded" not in caplog.text


def test_without_the_original_what_is_packed_is_saved_with_a_warning(made, tmp_path, caplog):
    """The model's own checkpoint is another one: its experts are not those in memory."""
    source, packed = made()
    other = tiny_models.build("qwen3_moe", tmp_path / "other", seed=7)
    model = kt_sft.load_model(other, KTConfig(method="INT8", weight_path=packed))
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "saved")
    assert caplog.text.count("is not the model's own") == 1
    expected, found = tensors_of(source), tensors_of(tmp_path / "saved")
    names = [name for name in expected if ".experts." in name]
    held = dict(iter_routed_experts(model))
    for name in names[:6]:
        module, index, projection, _ = name.rsplit(".", 3)
        position = ("gate_proj", "up_proj", "down_proj").index(projection)
        assert torch.equal(found[name], held[module].unpack_expert(int(index))[position])
        assert not torch.equal(found[name], expected[name])


def test_training_and_merging_are_those_of_the_checkpoint(made, tmp_path):
    """Gradients of every adapter weight, and the merged checkpoint, whose base are the weights before rounding."""
    source, packed = made()
    ids, results, saved = tiny_models.token_ids(), [], []
    for weight_path in (None, packed):
        model = parity.load_ours(source, method="INT8", weight_path=weight_path)
        model = parity.fill_lora(kt_peft.get_peft_model(model, parity.all_linear()))
        results.append(parity.logits_and_grads(model, ids))
        folder = tmp_path / str(len(saved))
        model.merge_and_unload().save_pretrained(folder)
        saved.append(tensors_of(folder))
    assert results[0].keys() == results[1].keys() and len(results[0]) > 10
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_cache_is_written_once_and_used(made, tmp_path, monkeypatch):
    source, packed = made()
    config = KTConfig(method="INT8", weight_cache=tmp_path / "cache")
    first = kt_sft.load_model(source, config)
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("qwen3_moe-int8-") and mapped(first) > 0
    assert (folder / "manifest.json").read_bytes() == (packed / "manifest.json").read_bytes()

    def fail(*args):
        raise AssertionError("packed again")

    monkeypatch.setattr(running, "_write", fail)
    second = kt_sft.load_model(source, config)
    assert torch.equal(logits(first), logits(second))
    second.save_pretrained(tmp_path / "saved")
    expected, found = tensors_of(source), tensors_of(tmp_path / "saved")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_changed_checkpoint_has_a_container_of_its_own(tmp_path):
    config = KTConfig(method="INT8", weight_cache=tmp_path / "cache")
    source = tiny_models.build("mixtral", tmp_path / "source")
    kt_sft.load_model(source, config)
    shutil.rmtree(source)
    changed = kt_sft.load_model(tiny_models.build("mixtral", source, seed=3), config)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert torch.equal(logits(changed), logits(kt_sft.load_model(source, KTConfig(method="INT8"))))


def test_a_cache_that_cannot_be_written_is_a_warning(made, tmp_path, monkeypatch, caplog):
    source, _ = made()

    def full(*args, **kwargs):
        raise OutputError(tmp_path, "disk space for the container", expected="9 GiB", found="1 GiB free")

    monkeypatch.setattr(weight_cache, "convert", full)
    with caplog.at_level(logging.WARNING):
        model = kt_sft.load_model(source, KTConfig(method="INT8", weight_cache=tmp_path / "cache"))
    assert "weight_cache: experts are packed in memory instead" in caplog.text and mapped(model) == 0


def test_mapped_experts_need_no_memory_of_their_own_but_a_warning(made, monkeypatch, caplog):
    """Where packing does not fit, a container still loads."""
    source, packed = made()
    fits = kt_sft.load_model(source, KTConfig(method="INT8"))
    experts = sum(module.packed_bytes for _, module in iter_routed_experts(fits))
    rest = sum(p.numel() * p.element_size() for name, p in fits.named_parameters() if ".experts." not in name)
    staging = max(module.spec.expert_bytes for _, module in iter_routed_experts(fits))
    room = memory.AvailableMemory(rest + staging + experts // 2, "a test")
    monkeypatch.setattr(memory, "available_memory", lambda: room)
    with pytest.raises(NotEnoughMemory):
        kt_sft.load_model(source, KTConfig(method="INT8"))
    with pytest.raises(NotEnoughMemory):
        kt_sft.load_model(source, KTConfig(method="INT8", weight_path=packed, weight_load="copy"))
    with caplog.at_level(logging.WARNING):
        mapped_model = kt_sft.load_model(source, KTConfig(method="INT8", weight_path=packed))
    assert "read from disk again and again" in caplog.text
    assert torch.equal(logits(mapped_model), logits(fits))


def test_command_line_names_everything_in_one_line(made, tmp_path):
    source, packed = made()
    arguments = ["convert", "--input-path", str(source), "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--quant-method", "moe_int8", "--verify", "--threads", "1"])
    assert done.exit_code == 0 and "written" in done.output and "gate" in done.output
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (packed / "manifest.json").read_bytes()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0 and "was complete already" in again.output
    for more, match in (
        (["--quant-method", "int4"], "finished container of int8"),
        (["--quant-method", "int5"], "method: expected one of"),
        (["--input-type", "fp16"], "input-type: expected fp16, found BF16"),
        (["--input-type", "pdf"], "input-type: expected one of"),
        (["--int4-group-size", "48"], "int4_group_size: expected one of"),
        (["--input-path", "nowhere"], "nowhere: checkpoint: expected a checkpoint directory or a GGUF file, found not"),
    ):
        refused = CliRunner().invoke(app, [*arguments, *more])
        assert refused.exit_code == 2 and match in refused.output.replace("\n", " "), refused.output


def test_script_is_the_command(made, tmp_path):
    source, packed = made()
    command = [sys.executable, str(ROOT / "scripts" / "convert_cpu_weights.py"), "--quant-method", "moe_int8"]
    command += ["--input-path", str(source), "--output", str(tmp_path / "out"), "--input-type", "bf16"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["weights"] == {"format": "int8", "group": 0}
    list(PackedContainer(tmp_path / "out").check_blobs())


def blob_files(folder):
    """The blobs without the headers, which name the source."""
    return [path.read_bytes()[4096:] for path in sorted(folder.glob("layer-*.bin"))]


@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_quantised_checkpoints_convert_as_their_bf16_twins(tmp_path, kind):
    write = {"fp8": quantized_checkpoints.fp8_checkpoint, "int4": quantized_checkpoints.int4_checkpoint}[kind]
    # Rows of whole groups, as INT4 has them.
    plain = tiny_models.build("deepseek_v3", tmp_path / "plain", hidden_size=96, moe_intermediate_size=64)
    source, twin = write(plain, tmp_path / "quantised")
    convert(source, tmp_path / "a", input_type="fp8" if kind == "fp8" else "auto", check=True)
    convert(twin, tmp_path / "b", input_type="bf16")
    assert blob_files(tmp_path / "a") == blob_files(tmp_path / "b") != []
    with pytest.raises(ConfigError, match="input-type: expected bf16, found"):
        convert(source, tmp_path / "c", input_type="bf16")
    model = kt_sft.load_model(source, KTConfig(method="INT8", weight_path=tmp_path / "a"))
    assert mapped(model) > 0 and torch.equal(logits(model), logits(kt_sft.load_model(source, KTConfig(method="INT8"))))


def test_gguf_converts(tmp_path):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 96}
    plain = tiny_models.build("deepseek_v2", tmp_path / "plain", **sizes)
    tensors = expert_tensors(plain, {"gate": "Q4_K", "up": "Q6_K", "down": "Q8_0"})
    file = gguf_files.write(plain / "model-q4.gguf", {"general.architecture": "deepseek2"}, tensors)
    convert(file, tmp_path / "out", input_type="gguf", check=True)
    config = KTConfig(method="INT8")
    from_gguf = kt_sft.load_model(plain, KTConfig(method="INT8", weight_path=file))
    packed = kt_sft.load_model(plain, KTConfig(method="INT8", weight_path=tmp_path / "out"))
    assert torch.equal(logits(from_gguf), logits(packed))
    assert not torch.equal(logits(packed), logits(kt_sft.load_model(plain, config)))
    cached = KTConfig(method="INT8", weight_path=file, weight_cache=tmp_path / "cache")
    assert torch.equal(logits(kt_sft.load_model(plain, cached)), logits(packed))
    with pytest.raises(ConfigError, match="found a packed container"):
        convert(tmp_path / "out", tmp_path / "again")


def test_files_that_are_no_part_of_the_checkpoint_do_not_matter(tmp_path):
    """A link to nowhere, a folder and a part of another split beside it: what was opened is what is hashed."""
    source = tiny_models.build("mixtral", tmp_path / "source")
    convert(source, tmp_path / "out")
    (source / "extra.safetensors").symlink_to(tmp_path / "nowhere")
    (source / "more.safetensors").mkdir()
    assert not convert(source, tmp_path / "out").is_new
    values, tensors = {"general.architecture": "x"}, {"x": gguf_files.random_blocks("F32", (3,))}
    parts = gguf_files.write_split(tmp_path, "m", values, tensors | {"y": tensors["x"]}, 2)
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(parts[0].read_bytes())
    assert GgufIndex.from_path(parts[0]).files == parts

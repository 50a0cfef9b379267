"""What the pages say that can be looked up: links, files, keys, variables, commands, options, the table of kernels."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.main import get_command

from kt_sft import env
from kt_sft.adapters import options
from kt_sft.cli import app
from kt_sft.config import METHODS, KTConfig
from kt_sft.integrations.llamafactory import args, lora_options
from kt_sft.native import native
from kt_sft.placement.rules import load_rules
from tests.helpers import tiny_models

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "docs/decisions/*.md", "configs/*.md", "examples/*.md")
    for path in sorted(ROOT.glob(pattern))
]
FOLDERS = "kt_sft|tests|scripts|native|benchmarks|packaging|examples|configs|docs"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the table whose head begins with this cell."""
    table = re.search(rf"^\| {re.escape(first)} \|.*\n\|[-:| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table, f"no table that begins with {first}"
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table[1].splitlines()]


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pages
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            assert anchor in {slug(head) for head in re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)}, anchor


@pages
def test_files_that_are_named_exist(page):
    if page.name == "CHANGELOG.md":  # tells of what was
        return
    for quoted in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        for name in re.findall(rf"(?<![\w./~-])(?:{FOLDERS})/[\w./-]+", quoted):
            assert "*" in quoted or "{" in quoted or (ROOT / name).exists(), name
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for name in re.findall(rf"(?<![\w./~-])(?:{FOLDERS})/[\w./-]+\.(?:py|yaml|sh|json)\b", block):
            assert (ROOT / name).exists(), name


@pages
def test_keys_that_are_named_are_known(page):
    source = "".join(path.read_text() for path in (ROOT / "kt_sft" / "integrations" / "llamafactory").glob("*.py"))
    for key in set(re.findall(r"`(kt_[a-z0-9_]+)(?:`|:)", page.read_text(encoding="utf-8"))) - {"kt_sft"}:
        assert f'"{key}"' in source, key


def test_every_key_has_a_row_and_its_default():
    page = text_of("configs/README.md")
    table = {cells[0].strip("`"): cells[1].strip("`") for cells in rows(page, "key")}
    assert {key for key in (*args.KEYS, "use_kt") if f"`{key}`" not in page} == set()
    plain = {field.name: field.default for field in fields(KTConfig) if field.default is not None}
    for setting, default in plain.items():
        if setting in args.KEY_OF_SETTING:
            assert table[args.KEY_OF_SETTING[setting]] == str(default), setting
    assert {name for name in METHODS if f"`{name}`" not in page} == set()
    refused = {lora_options.key_of(row.option) for row in options.REFUSALS if options.RUN in row.doors}
    assert {key for key in {*args.REFUSED, *refused} if f"`{key}`" not in page} == set()


def test_every_variable_of_ours_is_on_the_page_of_settings():
    named = text_of("configs/README.md")
    assert {name.name for name in env.VARIABLES if name.owner == "kt_sft" and name.name not in named} == set()


def test_commands_and_options_exist():
    """`kt-sft COMMAND --option` in code, whether quoted or in blocks."""
    root = get_command(app)
    for page in PAGES:
        for line in re.findall(r"kt-sft ((?:[a-z]+[^\n`]*))", page.read_text(encoding="utf-8")):
            command, words = root, line.split("#")[0].split()
            while words and hasattr(command, "commands"):
                name = words.pop(0).strip(".,;:()")
                if name not in command.commands:
                    break
                command = command.commands[name]
            else:
                known = {option for parameter in command.params for option in parameter.opts}
                used = {word.split("=")[0] for word in words if re.fullmatch(r"--[a-z][a-z0-9-]+(=.*)?", word)}
                assert used <= known | {"--help"}, f"{page.name}: {line}"


def test_python_of_readme_runs(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", text_of("README.md"), re.MULTILINE | re.DOTALL)
    model = tiny_models.build("qwen3_moe", tmp_path / "model")
    for shown, real in (("path/to/Qwen3-30B-A3B", model), ("my-adapter", tmp_path / "adapter")):
        assert code.count(shown) == 1
        code = code.replace(shown, str(real))
    exec(compile(code, "README.md", "exec"), {})
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert any("mlp.experts" in name for name in file.keys())  # noqa: SIM118


def test_rules_of_their_page_are_rules(tmp_path):
    blocks = re.findall(r"^```yaml\n(.*?)^```", text_of("docs/rules.md"), re.MULTILINE | re.DOTALL)
    (shown,) = (block for block in blocks if "rules:" in block)
    (tmp_path / "shown.yaml").write_text(shown)
    assert len(load_rules(tmp_path / "shown.yaml").rules) == 2


def test_targets_of_make_are_those_of_the_page():
    targets = set(re.findall(r"^([a-z-]+):.*## ", text_of("Makefile"), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert named <= targets, named - targets


# Columns of README's table -> level of the kernels.
COLUMNS = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
LABELS = {"AVX-512": "avx512", "VNNI": "avx512_vnni", "AMX-BF16": "amx_bf16"}
# RAWINT4 is int4 to the kernels; of GGUF's types each has the same levels.
STORED = {"BF16": ["bf16"], "INT8": ["int8"], "INT4": ["int4"], "GGUF": ["block4", "block5", "block6", "block8", "f16"]}


def test_table_of_kernels_is_that_of_the_library():
    """`yes`: kernels of its own, in every direction that such rows have; `as X`: those of a column that says yes."""
    have = {(row["format"], row["rows"], row["op"], row["isa"]) for row in native().kernel_rows()}
    for method, activations, *cells in rows(text_of("README.md"), "experts in memory"):
        name, kind = re.match(r"`(\w+)`", method)[1], activations.split(",")[0]
        if name == "RAWINT4":
            continue
        directions = ("forward", "input_grad") if kind == "bf16" else ("forward",)
        said = dict(zip(COLUMNS, cells, strict=True))
        for level, cell in said.items():
            own = all((stored, kind, op, level) in have for stored in STORED[name] for op in directions)
            assert own == (cell == "yes"), f"{method} {kind} {level}"
            assert own or said[LABELS[cell.removeprefix("as ")]] == "yes", f"{method} {kind} {level}: {cell}"


def test_every_page_is_linked_from_another():
    linked = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
    }
    assert [page.name for page in PAGES if page.parent.name == "docs" and page not in linked] == []


def test_the_worked_diff_of_a_kernel_applies():
    (diff,) = re.findall(r"^```diff\n(.*?)^```", text_of("docs/adding_a_kernel.md"), re.MULTILINE | re.DOTALL)
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    done = subprocess.run(["git", "apply", "--check", "-"], input=diff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"renew the diff of docs/adding_a_kernel.md: {done.stderr}"

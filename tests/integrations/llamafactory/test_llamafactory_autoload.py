"""The entry point: nothing happens without USE_KT, nothing ever raises, modules are patched after they have run."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap

import pytest

from kt_sft.integrations.llamafactory import autoload
from tests.helpers.llamafactory_runs import drive, environment


@pytest.fixture
def clean(monkeypatch):
    """A process state as before the entry point ran; sys.meta_path is restored afterwards."""
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, autoload.PatchFinder)])
    monkeypatch.setattr(autoload, "_patched", [])
    monkeypatch.setattr(autoload, "_failed", {})


@pytest.mark.parametrize("value", [None, "", "0", "false", "no", "on"])
def test_without_use_kt_meta_path_is_unchanged(clean, monkeypatch, value):
    monkeypatch.delenv("USE_KT", raising=False)
    if value is not None:
        monkeypatch.setenv("USE_KT", value)
    before = list(sys.meta_path)
    autoload.autoload()
    assert sys.meta_path == before


@pytest.mark.parametrize(("value", "is_said"), [("yes", True), ("on", True), ("2", True), ("0", False), ("No", False)])
def test_a_word_for_use_kt_that_means_nothing_is_said(clean, monkeypatch, caplog, value, is_said):
    monkeypatch.setenv("USE_KT", value)
    autoload.autoload()
    assert [f"USE_KT={value}: expected 1" in record.getMessage() for record in caplog.records] == [True] * is_said


@pytest.mark.parametrize("value", ["1", "true", "True", "y", "Y"])
def test_with_use_kt_one_finder_is_installed(clean, monkeypatch, value):
    monkeypatch.setenv("USE_KT", value)
    autoload.autoload()
    autoload.autoload()
    assert sum(isinstance(finder, autoload.PatchFinder) for finder in sys.meta_path) == 1


def test_a_failure_is_kept_and_told_in_one_line(clean, monkeypatch, caplog):
    def broken() -> bool:
        raise OSError("no such thing")

    monkeypatch.setattr("kt_sft.env.use_kt", broken)
    autoload.autoload()
    assert [record.getMessage().count("\n") for record in caplog.records] == [0]
    status = autoload.status()
    assert not status["active"] and "no such thing" in str(status["failed"]["autoload"])


def test_entry_point_needs_the_standard_library_only():
    script = (
        "import sys; from kt_sft.integrations.llamafactory import autoload; autoload.autoload(); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True)
    heavy = {"torch", "transformers", "peft", "numpy", "llamafactory", "kt_sft._native"}
    assert not heavy & set(done.stdout.split())


def test_without_use_kt_llamafactory_is_untouched():
    script = """
import sys, torch
import llamafactory.hparams.parser as parser, llamafactory.model.loader as loader, llamafactory.model.adapter as adapter
names = [parser._parse_args, loader.patch_config, loader.init_adapter, loader.count_parameters]
names += [adapter.get_peft_model, adapter.PeftModel, adapter.find_all_linear_modules]
ours = ("hook", "adapters", "args", "webui", "chat")
give({
    "finders": [type(finder).__name__ for finder in sys.meta_path],
    "ours": [name for name in sys.modules if name.startswith("kt_sft.") and name.rpartition(".")[2] in ours],
    "modules": [name.__module__.split(".")[0] for name in names],
    "key": hasattr(parser.ModelArguments, "kt_method"),
    "excepthook": sys.excepthook is sys.__excepthook__,
})
"""
    seen = drive(script, env=environment(use_kt=False))
    assert "PatchFinder" not in seen["finders"] and seen["ours"] == []
    assert set(seen["modules"]) <= {"llamafactory", "peft"} and not seen["key"] and seen["excepthook"]


@pytest.fixture
def package(clean, tmp_path, monkeypatch):
    """A package `kt_patched` with two modules to patch; the patch sets `mark` to what `early` saw."""
    (tmp_path / "kt_patched").mkdir()
    (tmp_path / "kt_patched" / "__init__.py").write_text("")
    (tmp_path / "kt_patched" / "plain.py").write_text("value = 1\n")
    middle = """
    from kt_sft.integrations.llamafactory import autoload
    autoload.autoload()      # as `import torch` does in the middle of a module
    value = 1
    """
    (tmp_path / "kt_patched" / "half.py").write_text(textwrap.dedent(middle))
    (tmp_path / "kt_patched" / "later.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("USE_KT", "1")
    patch = ("hook", "patch_plain")
    monkeypatch.setattr(autoload, "PATCHES", {"kt_patched.plain": patch, "kt_patched.half": patch})
    hook = importlib.import_module("kt_sft.integrations.llamafactory.hook")
    monkeypatch.setattr(hook, "patch_plain", lambda module: setattr(module, "mark", module.value), raising=False)
    yield
    for name in [name for name in sys.modules if name.startswith("kt_patched")]:
        del sys.modules[name]


def test_module_is_patched_after_it_has_run(package):
    autoload.autoload()
    module = importlib.import_module("kt_patched.plain")
    assert module.mark == 1 and autoload.status()["patched"] == ["kt_patched.plain"]
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"


def test_half_imported_module_is_patched_once_it_is_complete(package):
    module = importlib.import_module("kt_patched.half")
    assert not hasattr(module, "mark")
    importlib.import_module("kt_patched.later")
    assert module.mark == 1


def test_failing_patch_leaves_the_import_alone(package, monkeypatch, caplog):
    hook = importlib.import_module("kt_sft.integrations.llamafactory.hook")

    def fails(module: object) -> None:
        raise RuntimeError("no ModelArguments in it")

    monkeypatch.setattr(hook, "patch_plain", fails)
    autoload.autoload()
    assert importlib.import_module("kt_patched.plain").value == 1
    assert "no ModelArguments" in autoload.failures()["kt_patched.plain"]
    assert len(caplog.records) == 1

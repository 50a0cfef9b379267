"""What gets installed: the native library with its few dependencies, the entry points, and a complete wheel."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kt_sft.native import native

ROOT = Path(__file__).resolve().parents[2]
ALLOWED_LIBRARIES = {"libc", "libm", "libgcc_s", "libstdc++", "libpthread", "ld-linux-x86-64", "linux-vdso"}


def linked_libraries(library: Path) -> set[str]:
    """Names, without suffix, of the shared libraries that `library` pulls in."""
    output = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    return {Path(line.split()[0]).name.split(".so")[0] for line in output.splitlines() if line.strip()}


@pytest.mark.skipif(shutil.which("ldd") is None, reason="this machine has no ldd")
def test_native_library_links_neither_torch_nor_openmp():
    assert linked_libraries(Path(native().__file__)) <= ALLOWED_LIBRARIES


def test_native_library_reports_the_version_of_the_package():
    assert native().version() == importlib.metadata.version("kt_sft")


def test_entry_points_are_installed():
    points = {(p.group, p.name): p.value for p in importlib.metadata.distribution("kt_sft").entry_points}
    assert points["torch.backends", "kt_sft"] == "kt_sft.integrations.llamafactory.autoload:autoload"
    assert points["console_scripts", "kt-sft"] == "kt_sft.cli:app"


def test_torch_is_no_build_requirement_and_has_no_exact_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not [name for name in project["build-system"]["requires"] if name.startswith("torch")]
    assert [name for name in project["project"]["dependencies"] if re.match(r"torch\b(?!.*==)", name)]


def imported_modules(folder: Path) -> set[str]:
    """Top names of everything that the Python files of a folder import, at whatever depth."""
    found: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"kt_sft"}


def test_dependencies_are_what_the_package_imports():
    """Not what a benchmark or a test needs, and nothing that is there by luck because another package asks for it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def distributions(requirements):
        return {Requirement(text).name.lower().replace("_", "-") for text in requirements}

    of_module = importlib.metadata.packages_distributions()
    imported = {of_module.get(name, [name])[0].lower().replace("_", "-") for name in imported_modules(ROOT / "kt_sft")}
    declared = distributions(project["dependencies"])
    optional = distributions([*extras["serve"], *extras["llamafactory"]])
    brought_along = {"starlette", "pydantic", "gradio"}  # fastapi's and LLaMA-Factory's, whose types we use
    assert declared <= imported, f"not imported by the package: {sorted(declared - imported)}"
    assert imported - declared <= optional | brought_along, f"undeclared: {sorted(imported - declared - optional)}"


def test_importing_the_package_imports_no_heavy_module():
    heavy = "('torch', 'numpy', 'kt_sft._native')"
    code = f"import sys, kt_sft.integrations.llamafactory.autoload; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_constraints_are_exact_and_name_no_index():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines and not [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.+]*", line)]


@pytest.mark.slow
def test_wheel_holds_the_native_library_and_imports_without_the_source_tree(tmp_path):
    source = tmp_path / "source"
    for name in ("kt_sft", "native"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "build"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("kt_sft-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if re.fullmatch(r"kt_sft/_native\.\S+\.so", name)]
        assert not [name for name in archive.namelist() if not name.startswith(("kt_sft/", "kt_sft-"))]
        archive.extractall(site)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from kt_sft.native import native; print(native().__file__)"
    run = subprocess.run(
        [sys.executable, "-S", "-c", code, str(site)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.startswith(str(site))

"""The outer walls of the house: sizes, who may import whom, and where printing and environment reads belong.

Every rule is a function of a source tree that yields its violations; the tests apply it to this repository and to a
planted violation.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.import_graph.reading import circles, imported_names, modules, room_of
from tests.helpers.house_imports import (
    DOCUMENTED,
    MAY_IMPORT,
    SEAMS,
    circular_imports,
    heavy_folders,
    package_files,
    private_names,
    version_questions,
    wrong_external_imports,
    wrong_imports,
)

ROOT = Path(__file__).resolve().parent.parent
PYTHON_ROOTS = ("kt_sft", "tests", "benchmarks", "scripts")
CPP_ROOTS = ("native", "tests", "benchmarks")
MAX_FILE_LINES = 800
MAX_FUNCTION_LINES = 120

# Where writing to the terminal is the job: the command line, and the hook that replaces Python's traceback.
MAY_PRINT = ("kt_sft/cli/", "kt_sft/integrations/llamafactory/hook.py")
# The one way to write.
MAY_WRITE = ("kt_sft/formats/staging.py", "kt_sft/formats/overwriting.py", "kt_sft/formats/renaming.py")
# What else writes, all of it into a folder of staging, but for what is gone again: file -> calls.
INTO_STAGING = {
    "kt_sft/integrations/gguf/model.py": ("save_pretrained",),
    "kt_sft/integrations/transformers/saving.py": ("save_pretrained", "rename"),
    "kt_sft/integrations/peft/targets.py": ("save_pretrained",),
    "kt_sft/integrations/peft/adapter_dir.py": ("TemporaryDirectory",),  # read by PEFT, and removed
    "kt_sft/integrations/llamafactory/disk.py": ("save_pretrained", "TemporaryFile"),  # the latter tries a folder out
}
# Calls that make, change or rename files, whatever their arguments: functions of modules, and methods of anything.
WRITING_FUNCTIONS = {
    "os.replace", "os.rename", "os.renames", "os.link", "os.symlink", "os.truncate", "os.mkfifo", "shutil.move",
    "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree", "shutil.make_archive",
    "shutil.unpack_archive", "torch.save", "json.dump", "pickle.dump", "yaml.dump", "yaml.safe_dump", "np.save",
    "np.savez", "save_file", "safetensors.torch.save_file",
}  # fmt: skip
WRITING_METHODS = {
    "mkdtemp", "mkstemp", "NamedTemporaryFile", "TemporaryDirectory", "TemporaryFile", "write_text", "write_bytes",
    "touch", "rename", "symlink_to", "hardlink_to", "tofile", "save_pretrained",
}  # fmt: skip
OPENING = ("open", "fdopen", "ZipFile", "TarFile", "GzipFile", "memmap")
# Header of native/include/kts/ -> its room. `base`: types that every room may know; `kernel`: the contracts of arch/.
CPP_HEADERS = {
    "base": {"base.h", "types.h", "isa.h", "block_types.h"},
    "kernel": {"kernel.h", "packed.h", "elementwise.h", "quant.h"},
    "gemm": {"gemm.h", "tables.h", "pack.h", "cpu_isa.h"},
    "quant": {"gguf_blocks.h", "scaled_blocks.h"},
    "runtime": {"topology.h", "thread_pool.h", "workspace.h", "openmp.h"},
    "store": {"expert_store.h"},
    "linear": {"linear.h"},
    "moe": {"moe.h", "lora.h", "lora_layout.h", "routing.h"},
}
# Room (a folder of native/, or of headers) -> rooms whose headers it may include beside its own: lower ones.
CPP_MAY_INCLUDE = {
    "base": set(),
    "kernel": {"base"},
    "arch": {"base", "kernel"},
    "gemm": {"base", "kernel"},
    "quant": {"base"},
    "runtime": {"base"},
    "store": {"base", "kernel", "gemm", "runtime"},
    "linear": {"base", "kernel", "store", "gemm", "runtime"},
    "moe": {"base", "kernel", "store", "gemm", "runtime"},
    "bindings": {"base", "gemm", "quant", "store", "linear", "moe", "runtime"},
}
# Where the levels of instruction sets may be named: the code of each, and the one place that chooses.
MAY_NAME_ISA = ("native/arch/", "native/gemm/", "native/include/kts/isa.h", "native/tests/")
MAY_NAME_TABLES = (*MAY_NAME_ISA, "native/include/kts/elementwise.h", "native/include/kts/quant.h")


def files(root: Path, folders: tuple[str, ...], *suffixes: str) -> Iterator[tuple[str, str]]:
    """(path relative to root, text) of the files below `folders` that have one of `suffixes`."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in suffixes and path.is_file():
                yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def without_comments(text: str) -> str:
    """C++ source with comments, strings and character literals blanked, line breaks kept."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\\n])\''
    return re.sub(pattern, lambda match: "\n" * match.group().count("\n"), text, flags=re.DOTALL)


def cpp_functions(text: str) -> Iterator[tuple[int, int]]:
    """(first line, lines) of every braced body that follows a parameter list, found by matching braces."""
    code = re.sub(r"(?m)^\s*#.*$", "", without_comments(text))
    stack: list[tuple[bool, int]] = []
    since = 0  # where the text that may introduce the next brace begins
    for match in re.finditer(r"[{};]", code):
        at, mark = match.start(), match.group()
        if mark == "{":
            before = code[since:at]
            is_scope = re.search(r"\b(namespace|struct|class|enum|union)\b", before) and "(" not in before
            stack.append((not is_scope and ")" in before, code.count("\n", 0, at)))
        elif mark == "}" and stack:
            is_function, start = stack.pop()
            if is_function and not any(inner for inner, _ in stack):
                yield start + 1, code.count("\n", 0, at) - start + 1
        since = at + 1


def long_files(root: Path) -> Iterator[str]:
    for path, text in files(root, (*PYTHON_ROOTS, "native"), ".py", ".cc", ".h", ".inc"):
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            yield f"{path}: {lines} lines, at most {MAX_FILE_LINES}; split it by concern"


def long_python_functions(root: Path) -> Iterator[str]:
    for path, text in files(root, PYTHON_ROOTS, ".py"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    yield f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"


def long_cpp_functions(root: Path) -> Iterator[str]:
    for path, text in files(root, CPP_ROOTS, ".cc", ".h"):
        for line, lines in cpp_functions(text):
            if lines > MAX_FUNCTION_LINES:
                yield f"{path}:{line}: a function of {lines} lines, at most {MAX_FUNCTION_LINES}"


def stray_prints(root: Path) -> Iterator[str]:
    for path, text in files(root, ("kt_sft",), ".py"):
        if path.startswith(MAY_PRINT):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "sys.stdout.write",
                "sys.stderr.write",
            ):
                yield f"{path}:{node.lineno}: prints; use logging, the command line lives in kt_sft/cli"


def stray_environment_reads(root: Path) -> Iterator[str]:
    for path, text in files(root, ("kt_sft",), ".py"):
        if path == "kt_sft/env.py":
            continue
        for node in ast.walk(ast.parse(text)):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if name in ("os.environ", "os.getenv", "os.putenv"):
                yield f"{path}:{node.lineno}: {name}; every environment variable is read in kt_sft/env.py"
        for line, name in imported_names(path, text):
            if name in ("os.environ", "os.getenv"):
                yield f"{path}:{line}: imports {name}; every environment variable is read in kt_sft/env.py"


def opens_to_write(node: ast.Call, name: str) -> bool:
    """Whether a call opens a file with a mode, or with flags of `os.open`, that can change it."""
    if name not in OPENING:
        return False
    modes = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
    is_mode = any(isinstance(mode, str) and re.fullmatch(r"[rbt]*[wax+][bt+]*", mode) for mode in modes)
    return is_mode or re.search(r"\bO_(WRONLY|RDWR|CREAT|TRUNC|APPEND)\b", ast.unparse(node)) is not None


def stray_writes(root: Path) -> Iterator[str]:
    """Whatever makes, changes or renames files, outside MAY_WRITE and but for the calls of INTO_STAGING."""
    for path, text in files(root, ("kt_sft",), ".py"):
        if path in MAY_WRITE:
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            dot, last = name.rpartition(".")[1:]
            if last not in INTO_STAGING.get(path, ()) and (
                name in WRITING_FUNCTIONS or (dot and last in WRITING_METHODS) or opens_to_write(node, last)
            ):
                yield f"{path}:{node.lineno}: {name}; kt_sft/formats/staging.py and overwriting.py write"


def stray_cpp_calls(root: Path) -> Iterator[str]:
    pattern = re.compile(r"\b(printf|fprintf|puts|getenv|secure_getenv)\s*\(|\bstd::(cout|cerr|clog)\b")
    for path, text in files(root, ("native",), ".cc", ".h"):
        if path.startswith("native/tests/"):
            continue
        for match in pattern.finditer(code := without_comments(text)):
            line = code.count("\n", 0, match.start()) + 1
            yield f"{path}:{line}: {match.group()}; native code returns facts, Python logs them and reads settings"


def stray_intrinsics(root: Path) -> Iterator[str]:
    for path, text in files(root, ("native",), ".cc", ".h"):
        if path.startswith("native/arch/"):
            continue
        for match in re.finditer(r"#\s*include\s*[<\"]\w*intrin\.h[>\"]", text):
            yield f"{path}: {match.group()}; only native/arch may see intrinsics"


def cpp_room(path: str) -> str | None:
    """Room of a file below native/, None for a header of include/kts/ that no room has."""
    folder, _, name = path.removeprefix("native/").partition("/")
    if folder != "include":
        return folder
    return next((room for room, headers in CPP_HEADERS.items() if name.removeprefix("kts/") in headers), None)


def included_path(path: str, header: str, *, is_quoted: bool) -> str | None:
    """Path that an #include of the file at `path` means, relative to the root; None: none of ours."""
    if header.startswith("kts/"):
        return f"native/include/{header}"
    if header.split("/")[0] in CPP_MAY_INCLUDE and "/" in header:
        return f"native/{header}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), header)) if is_quoted else None


def wrong_includes(root: Path) -> Iterator[str]:
    for path, text in files(root, ("native",), ".cc", ".h", ".inc"):
        room = cpp_room(path)
        if room is None:
            yield f"{path}: a header without a room; CPP_HEADERS names the room of each"
            continue
        for match in re.finditer(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', text, re.MULTILINE):
            quote, header = match.groups()
            if header.startswith(("torch/", "ATen/", "c10/", "omp.h")):
                yield f"{path}: includes {header}; native/ uses neither torch nor OpenMP"
            if header.startswith(("Python.h", "pybind11/")) and room != "bindings":
                yield f"{path}: includes {header}; Python belongs in native/bindings"
            target = included_path(path, header, is_quoted=quote == '"')
            if room == "tests" or target is None or not target.startswith("native/"):
                continue
            allowed = CPP_MAY_INCLUDE.get(room, set()) | {room}
            if cpp_room(target) not in allowed:
                yield f"{path}: includes {header} of {cpp_room(target)}; {room} may include {sorted(allowed)}"


def stray_kernel_choices(root: Path) -> Iterator[str]:
    """Code that asks for a level of instruction sets, or takes the table of one, is choosing; gemm/tables.cc does."""
    levels = re.compile(r"\bk(Scalar|Avx2|Avx512\w*|Amx(Bf16|Int8))\b")
    tables = re.compile(r"\bk(Row|Quant)Ops\b")
    for path, text in files(root, ("native",), ".cc", ".h"):
        code = without_comments(text)
        for pattern, places in ((levels, MAY_NAME_ISA), (tables, MAY_NAME_TABLES)):
            for match in pattern.finditer(code) if not path.startswith(places) else ():
                line = code.count("\n", 0, match.start()) + 1
                yield f"{path}:{line}: {match.group()}; native/gemm/tables.cc alone chooses by instruction set"


def machine_paths(root: Path) -> Iterator[str]:
    pattern = re.compile(r"(?<![\w.])/(?:work|root|opt|home|Users)/[\w.-]+")
    kinds = (".py", ".cc", ".h", ".sh", ".yaml", ".md", ".toml", ".txt", ".json", ".inc", ".cmake")
    folders = (*PYTHON_ROOTS, "native", "packaging", "examples", "configs", "docs")
    top = [
        (p.name, p.read_text(encoding="utf-8"))
        for p in sorted(root.glob("*"))
        if p.is_file() and (p.suffix in kinds or p.name == "Makefile")
    ]
    for path, text in [*files(root, folders, *kinds), *top]:
        for number, line in enumerate(text.splitlines(), 1):
            if match := pattern.search(line):
                yield f"{path}:{number}: {match.group()}; name no path of one machine"


RULES: dict[Callable[[Path], Iterator[str]], tuple[str, str]] = {
    # rule -> (file, content) that violates it
    long_files: ("kt_sft/autograd/big.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
    long_python_functions: ("kt_sft/autograd/big.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    long_cpp_functions: (
        "native/moe/big.cc",
        "namespace kts {\nvoid f(int x) {\n" + "  x++;\n" * MAX_FUNCTION_LINES + "}\n}\n",
    ),
    wrong_imports: ("kt_sft/autograd/up.py", "def f():\n    from kt_sft.nn import routed_experts\n"),
    wrong_external_imports: ("kt_sft/nn/other.py", "import peft.tuners\n"),
    circular_imports: ("kt_sft/nn/here.py", "def f():\n    from kt_sft.nn import there\n"),
    heavy_folders: ("kt_sft/autograd/big.py", "x = 1\n" * 40),
    private_names: ("kt_sft/nn/other.py", "def f(model):\n    return model._keys_to_ignore_on_load_unexpected\n"),
    version_questions: ("kt_sft/nn/other.py", "import peft\nIS_NEW = peft.__version__ >= '0.19'\n"),
    stray_prints: ("kt_sft/autograd/talk.py", "print('hello')\n"),
    stray_environment_reads: ("kt_sft/autograd/env2.py", "import os\nx = os.environ.get('HOME')\n"),
    stray_writes: (
        "kt_sft/autograd/write.py",
        "def f(path):\n    with open(path, 'wb') as file:\n        return file\n",
    ),
    stray_cpp_calls: ("native/moe/talk.cc", '#include <cstdio>\nvoid f() { printf("x"); }\n'),
    stray_intrinsics: ("native/moe/fast.cc", "#include <immintrin.h>\n"),
    wrong_includes: ("native/arch/up.cc", '#include "gemm/schedule.h"\n'),
    stray_kernel_choices: ("native/moe/pick.cc", "bool f(unsigned isa) { return isa & kAvx2; }\n"),
    machine_paths: ("docs/where.md", "see /" + "home/me/x\n"),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps_the_rule(rule):
    violations = list(rule(ROOT))
    assert not violations, "\n" + "\n".join(violations)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_sees_a_planted_violation(rule, tmp_path):
    for folder in ("kt_sft/nn", "kt_sft/autograd", "kt_sft/formats", "kt_sft/models", "kt_sft/sources", "native/gemm"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "small.py").write_text("x = 1\n" * 20)
    (tmp_path / "kt_sft/nn/there.py").write_text("from kt_sft.nn import here\n")
    name, text = RULES[rule]
    assert not list(rule(tmp_path))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    assert [violation for violation in rule(tmp_path) if violation.startswith(name)]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kt_sft/nn/x.py", "from kt_sft import _native\n"),
        ("kt_sft/nn/x.py", "import importlib\nm = importlib.import_module('kt_sft._native')\n"),
        ("kt_sft/integrations/transformers/loading.py", "def f():\n    import llamafactory.cli\n"),
        ("kt_sft/operator/moe.py", "from .. import _native\n"),
    ],
)
def test_external_rule_sees_every_way_to_import(path, text, tmp_path):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert list(wrong_external_imports(tmp_path))


@pytest.mark.parametrize(
    "call",
    [
        "path.write_text('x')",
        "(folder / 'a').write_bytes(b'x')",
        "open(path, mode='a')",
        "path.open('r+b')",
        "os.open(path, os.O_RDWR | os.O_CREAT)",
        "shutil.copyfile(path, other)",
        "tempfile.mkdtemp()",
        "path.rename(other)",
        "json.dump(values, stream)",
        "model.save_pretrained(folder)",
        "zipfile.ZipFile(path, 'w')",
    ],
)
def test_write_rule_sees_every_way_to_write(call, tmp_path):
    (tmp_path / "kt_sft" / "ops").mkdir(parents=True)
    (tmp_path / "kt_sft" / "ops" / "write.py").write_text(f"def f(path):\n    {call}\n")
    assert list(stray_writes(tmp_path))


@pytest.mark.parametrize(
    "call", ["open(path)", "text.replace('w', 'a')", "os.open(path, os.O_RDONLY)", "json.dumps(x)"]
)
def test_write_rule_lets_readers_alone(call, tmp_path):
    (tmp_path / "kt_sft" / "ops").mkdir(parents=True)
    (tmp_path / "kt_sft" / "ops" / "read.py").write_text(f"def f(path):\n    {call}\n")
    assert not list(stray_writes(tmp_path))


@pytest.mark.parametrize(
    ("path", "header"),
    [
        ("native/arch/x.h", '"kts/moe.h"'),
        ("native/arch/avx2/x.cc", '"kts/thread_pool.h"'),
        ("native/arch/avx2/x.cc", '"kts/tables.h"'),
        ("native/arch/avx2/x.cc", '"../../gemm/schedule.h"'),
        ("native/arch/avx2/x.cc", '"../../include/kts/gemm.h"'),
        ("native/runtime/x.cc", '"kts/elementwise.h"'),
        ("native/runtime/x.cc", "<kts/gemm.h>"),
        ("native/runtime/x.cc", '"../quant/gguf_grids.h"'),
        ("native/gemm/x.cc", '"kts/thread_pool.h"'),
        ("native/gemm/x.inc", '"kts/linear.h"'),
        ("native/gemm/x.cc", '"../arch/vec_avx2.h"'),
        ("native/quant/x.cc", '"kts/gemm.h"'),
        ("native/store/x.cc", '"kts/moe.h"'),
        ("native/store/x.cc", '"kts/gguf_blocks.h"'),
        ("native/linear/x.cc", '"kts/moe.h"'),
        ("native/linear/x.cc", '"../arch/prefetch_inl.h"'),
        ("native/moe/x.cc", '"kts/linear.h"'),
        ("native/moe/x.cc", '"../bindings/gil.h"'),
        ("native/moe/x.cc", '"pybind11/pybind11.h"'),
        ("native/bindings/x.cc", '"../arch/vec_avx2.h"'),
        ("native/include/kts/base.h", '"kts/isa.h"\n#include "kts/packed.h"'),
        ("native/include/kts/packed.h", '"kts/tables.h"'),
        ("native/include/kts/tables.h", '"kts/moe.h"'),
        ("native/include/kts/thread_pool.h", '"kts/gemm.h"'),
        ("native/include/kts/expert_store.h", '"kts/moe.h"'),
        ("native/include/kts/nobodys.h", "<cstdint>"),
        ("native/attic/x.cc", '"kts/packed.h"'),
    ],
)
def test_native_direction_is_seen_in_every_room(path, header, tmp_path):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(f"#include {header}\n")
    assert list(wrong_includes(tmp_path))


def test_every_native_folder_and_header_has_a_room():
    native = ROOT / "native"
    folders = {path.relative_to(native).parts[0] for suffix in ("h", "cc") for path in native.rglob(f"*.{suffix}")}
    assert folders - {"include", "tests"} <= set(CPP_MAY_INCLUDE)
    headers = [path.name for path in (native / "include" / "kts").rglob("*.h")]
    listed = [name for names in CPP_HEADERS.values() for name in names]
    assert set(headers) <= set(listed) and len(listed) == len(set(listed))
    assert set(CPP_HEADERS) <= set(CPP_MAY_INCLUDE)
    assert set().union(*CPP_MAY_INCLUDE.values()) <= set(CPP_MAY_INCLUDE)


def test_every_room_of_the_package_has_an_import_rule():
    rooms = {room_of(name) for name in modules(ROOT)} - {"integrations"}
    assert rooms == set(MAY_IMPORT)


def test_folders_of_tests_are_those_of_rooms():
    """Beside them: numbers against the truth, the compiled library, what is no room, and what tests share."""
    others = {"convergence", "emulator", "fuzz", "helpers", "native", "numerics", "repository", "unit"}
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    rooms = {room_of(name).replace(".", "/") for name in modules(ROOT)}
    assert folders - rooms - others == {"."}


def test_allowed_imports_leave_no_circle():
    assert not circles(MAY_IMPORT)


def test_seams_are_in_use():
    found = {(path, name) for path, text in package_files(ROOT) for _, name in imported_names(path, text)}
    assert found >= SEAMS


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kt_sft/integrations/gguf/x.py", "from kt_sft.integrations.merge import command\n"),
        ("kt_sft/integrations/transformers/x.py", "def f():\n    from kt_sft.integrations import peft\n"),
        ("kt_sft/integrations/peft/x.py", "from ..llamafactory import hook\n"),
        ("kt_sft/operator/x.py", "from kt_sft.compat import peft\n"),
        ("kt_sft/compat/x.py", "import importlib\nm = importlib.import_module('kt_sft.models.spec')\n"),
    ],
)
def test_import_rule_sees_rooms_below_integrations_and_every_way_to_import(path, text, tmp_path):
    for room in ("integrations/transformers", "integrations/peft", "models", "compat"):
        (tmp_path / "kt_sft" / room).mkdir(parents=True)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
    assert list(wrong_imports(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "from transformers.integrations.moe import _default_apply_gate\n",
        "from transformers.core_model_loading import WeightConverter\n",
        "from transformers.integrations import moe\n",
        "import transformers\nx = transformers.core_model_loading.WeightConverter\n",
        "import transformers.modeling_utils as m\n",
        "from transformers import PreTrainedModel\nx = PreTrainedModel._keys_to_ignore_on_save\n",
        "import importlib\nm = importlib.import_module('peft.tuners.lora.layer')\n",
        "def f(layer):\n    layer._disable_adapters = True\n",
        "def f(layer):\n    return getattr(layer, '_did_swap_in_out_features', False)\n",
        "class X:\n    def forward(self, x):\n        self._check_forward_args(x)\n",
    ],
)
def test_private_names_are_seen_however_they_are_written(text, tmp_path):
    (tmp_path / "kt_sft/integrations/peft").mkdir(parents=True)
    (tmp_path / "kt_sft/integrations/peft/x.py").write_text(text)
    assert list(private_names(tmp_path))
    (tmp_path / "kt_sft/integrations/peft").rename(tmp_path / "kt_sft/compat")
    assert not list(private_names(tmp_path))


def test_documented_names_and_own_ones_pass(tmp_path):
    text = "import transformers\nfrom peft import LoraConfig\nx = transformers.utils.logging\n"
    text += "class A:\n    def f(self, other):\n        self._x = other._f()\n    def _f(self):\n        return A._f\n"
    (tmp_path / "kt_sft/nn").mkdir(parents=True)
    (tmp_path / "kt_sft/nn/x.py").write_text(text)
    assert set(DOCUMENTED) == {"transformers", "peft"}
    assert not list(private_names(tmp_path)) and not list(version_questions(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "from peft import __version__ as version\n",
        "import transformers as t\nx = t.__version__.split('.')\n",
        "import importlib.metadata\nx = importlib.metadata.version('peft')\n",
        "from importlib import metadata\nx = metadata.version('transformers')\n",
        "from importlib.metadata import version\n",
        "from packaging.version import Version\n",
        "import transformers\nIS_NEW = hasattr(transformers, 'AutoProcessor')\n",
    ],
)
def test_questions_for_a_release_are_seen_however_they_are_written(text, tmp_path):
    (tmp_path / "kt_sft/models").mkdir(parents=True)
    (tmp_path / "kt_sft/models/x.py").write_text(text)
    assert list(version_questions(tmp_path))

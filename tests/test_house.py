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

ROOT = Path(__file__).resolve().parent.parent
PYTHON_ROOTS = ("kt_sft", "tests", "benchmarks", "scripts")
CPP_ROOTS = ("native", "tests", "benchmarks")
MAX_FILE_LINES = 800
MAX_FUNCTION_LINES = 120

# First component of a module below kt_sft -> components of kt_sft that it may import. A leaf imports leaves.
LEAVES = {"models", "formats", "config", "errors", "env", "memory", "native", "runtime", "progress"}
MAY_IMPORT = {
    "__init__": {"config", "integrations", "operator"},
    "cli": {"cli", "doctor", "integrations", "adapters", "placement", "serving", "inference"} | LEAVES,
    "doctor": {"integrations"} | LEAVES,
    "adapters": {"adapters", "formats", "models", "native", "errors"},
    "integrations": {
        "adapters",
        "integrations",
        "sources",
        "placement",
        "inference",
        "convert",
        "schedule",
        "nn",
        "ops",
    }
    | LEAVES,
    "operator": {"operator", "integrations", "sources", "transfer", "residency", "convert", "schedule", "nn", "ops"}
    | LEAVES,
    "sources": {"sources", "integrations", "convert", "nn"} | LEAVES,
    "transfer": {"transfer", "config", "errors"},
    "residency": {"residency", "config", "native", "errors"},
    "convert": {"convert", "nn", "ops"} | LEAVES,
    "placement": {"placement"} | LEAVES,
    "schedule": {"schedule"} | LEAVES,
    "nn": {"nn", "ops", "schedule"} | LEAVES,
    "ops": {"ops", "native", "errors", "config"},
    "serving": {"serving", "inference", "integrations"} | LEAVES,
    "inference": {"inference"} | LEAVES,
    "native": {"errors", "config", "env"},
    "memory": {"errors", "config", "env", "formats", "models"},
    "models": {"models", "formats", "errors", "config"},
    "formats": {"formats", "native", "errors", "config"},
    "config": {"errors"},
    "env": {"errors"},
    "runtime": {"native", "config", "env", "errors"},
    "progress": set(),
    "errors": set(),
}
# External package -> the only places of kt_sft that may import it.
ONLY_IN = {
    "llamafactory": "kt_sft/integrations/llamafactory/",
    "peft": "kt_sft/integrations/",
    "kt_sft._native": "kt_sft/native.py",
}
# Where writing to the terminal is the job: the command line, and the hook that replaces Python's traceback.
MAY_PRINT = ("kt_sft/cli/", "kt_sft/integrations/llamafactory/hook.py")
# The one way to write; and the rescue of an adapter when its own folder is full.
MAY_WRITE = (
    "kt_sft/formats/staging.py",
    "kt_sft/formats/overwriting.py",
    "kt_sft/formats/renaming.py",
    "kt_sft/integrations/llamafactory/disk.py",
)
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


def imports(path: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import anywhere in a Python file, function bodies included."""
    package = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__").split(".")
    is_package = path.endswith("__init__.py")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package[: len(package) - node.level + is_package]
                base = ".".join([*parent, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


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


def wrong_imports(root: Path) -> Iterator[str]:
    for path, text in files(root, ("kt_sft",), ".py"):
        room = Path(path).parts[1].removesuffix(".py")
        for line, name in imports(path, text):
            if within(name, "tests") or within(name, "benchmarks"):
                yield f"{path}:{line}: imports {name}; nothing imports tests or benchmarks"
            if within(name, "kt_sft") and "." in name and not within(name, "kt_sft._native"):
                target = name.split(".")[1]
                is_module = (root / "kt_sft" / target).is_dir() or (root / "kt_sft" / f"{target}.py").is_file()
                if is_module and target != room and target not in MAY_IMPORT.get(room, set()):
                    yield f"{path}:{line}: {room} imports {name}; allowed: {sorted(MAY_IMPORT.get(room, set()))}"


def wrong_external_imports(root: Path) -> Iterator[str]:
    for path, text in files(root, ("kt_sft",), ".py"):
        for line, name in imports(path, text):
            for package, home in ONLY_IN.items():
                if within(name, package) and not path.startswith(home):
                    yield f"{path}:{line}: imports {name}; only {home} may"


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
        for line, name in imports(path, text):
            if name in ("os.environ", "os.getenv"):
                yield f"{path}:{line}: imports {name}; every environment variable is read in kt_sft/env.py"


def stray_writes(root: Path) -> Iterator[str]:
    """Renames, and files opened for writing, outside the rooms of MAY_WRITE; what lies in staging may be written."""
    calls = {"os.replace", "os.rename", "os.renames", "os.link", "shutil.move", "tempfile.mkdtemp"}
    for path, text in files(root, ("kt_sft",), ".py"):
        if path in MAY_WRITE:
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            modes = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
            opens = name.rpartition(".")[2] in ("open", "fdopen")
            writes = opens and any(isinstance(m, str) and re.fullmatch(r"[rbt]*[wax+][bt+]*", m) for m in modes)
            if name in calls or writes:
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
    long_files: ("kt_sft/ops/big.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
    long_python_functions: ("kt_sft/ops/big.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    long_cpp_functions: (
        "native/moe/big.cc",
        "namespace kts {\nvoid f(int x) {\n" + "  x++;\n" * MAX_FUNCTION_LINES + "}\n}\n",
    ),
    wrong_imports: ("kt_sft/ops/up.py", "def f():\n    from kt_sft.nn import routed_experts\n"),
    wrong_external_imports: ("kt_sft/nn/other.py", "import peft.tuners\n"),
    stray_prints: ("kt_sft/ops/talk.py", "print('hello')\n"),
    stray_environment_reads: ("kt_sft/ops/env2.py", "import os\nx = os.environ.get('HOME')\n"),
    stray_writes: ("kt_sft/ops/write.py", "def f(path):\n    with open(path, 'wb') as file:\n        return file\n"),
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
    for folder in ("kt_sft/nn", "kt_sft/ops", "native/gemm"):
        (tmp_path / folder).mkdir(parents=True)
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
    rooms = {
        path.name.removesuffix(".py") for path in (ROOT / "kt_sft").iterdir() if path.suffix == ".py" or path.is_dir()
    }
    assert rooms - set(MAY_IMPORT) <= {"__pycache__"}

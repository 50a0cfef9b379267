"""Walls between the rooms of kt_sft, and around the libraries below it: who may import whom, and whose names are whose.

Rules of `tests/test_house.py`; each is a function of a source tree that yields its violations.
"""

from __future__ import annotations

import ast
import importlib.util
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from scripts.import_graph.reading import LEAVES, circles, imported_names, modules, read, room_of

# Room -> rooms that it may import beside itself; below integrations/ each folder is a room. A leaf imports leaves.
PLAIN_LEAVES = LEAVES - {"compat"}  # who uses compat imports transformers or PEFT
BELOW_INTEGRATIONS = {"adapters", "convert", "nn", "placement", "schedule", "sources"} | LEAVES
MAY_IMPORT = {
    "__init__": {"config", "integrations.canary", "integrations.peft", "integrations.transformers", "operator"},
    "cli": {
        "adapters",
        "doctor",
        "inference",
        "integrations.llamafactory",
        "integrations.merge",
        "integrations.transformers",
        "placement",
        "serving",
    }
    | PLAIN_LEAVES,
    "doctor": {"integrations.llamafactory"} | LEAVES,
    "serving": {"inference", "errors", "formats"},
    "integrations.llamafactory": {
        "inference",
        "integrations.canary",
        "integrations.gguf",
        "integrations.merge",
        "integrations.peft",
        "integrations.transformers",
    }
    | BELOW_INTEGRATIONS,
    "integrations.canary": {"integrations.peft"} | BELOW_INTEGRATIONS,
    "integrations.merge": {"integrations.gguf", "integrations.transformers"} | BELOW_INTEGRATIONS,
    "integrations.peft": {"integrations.transformers"} | BELOW_INTEGRATIONS,
    "integrations.transformers": {"integrations.gguf"} | BELOW_INTEGRATIONS,
    "integrations.gguf": BELOW_INTEGRATIONS,
    "operator": {"convert", "nn", "autograd", "residency", "schedule", "sources", "transfer"} | PLAIN_LEAVES,
    "sources": {"convert"} | PLAIN_LEAVES,
    "convert": {"nn"} | PLAIN_LEAVES,
    "nn": {"autograd", "residency", "schedule", "transfer"} | PLAIN_LEAVES,
    "placement": PLAIN_LEAVES,
    "schedule": {"errors"},
    "inference": {"errors"},
    "autograd": {"schedule", "transfer", "native", "errors", "config"},
    "transfer": {"config", "errors", "storage"},
    "residency": {"config", "native", "errors", "storage"},
    "adapters": {"formats", "models", "native", "errors"},
    "compat": {"errors"},
    "memory": {"config", "env", "errors", "formats", "models", "native"},
    "models": {"compat", "config", "env", "errors", "formats"},
    "formats": {"config", "errors", "native"},
    "runtime": {"config", "env", "errors", "native"},
    "native": {"config", "env", "errors"},
    "progress": set(),
    "storage": set(),
    "env": {"errors"},
    "config": {"errors"},
    "errors": set(),
}
# Beside that table, (file, what it imports): the operator opens a checkpoint directory with transformers, on first use,
# which alone knows what its tensors are called.
SEAMS = {("kt_sft/operator/weights.py", "kt_sft.integrations.transformers.converting.open_source")}
# External package -> the only places of kt_sft that may import it.
ONLY_IN = {
    "llamafactory": ("kt_sft/integrations/llamafactory/",),
    "omegaconf": ("kt_sft/integrations/llamafactory/",),
    "transformers": ("kt_sft/compat/", "kt_sft/models/", "kt_sft/integrations/"),
    "peft": ("kt_sft/compat/", "kt_sft/integrations/"),
    "kt_sft._native": ("kt_sft/native.py",),
}
# What these libraries document; all else of theirs has its public name in kt_sft/compat.
COMPAT = "kt_sft/compat/"
DOCUMENTED = {
    "transformers": {
        "transformers",
        "transformers.integrations",
        "transformers.pytorch_utils",
        "transformers.quantizers",
        "transformers.utils",
        "transformers.utils.logging",
        "transformers.utils.quantization_config",
    },
    "peft": {"peft", "peft.utils"},
}
# Private names of others that may be used where needed: torch has no public ones for these.
PRIVATE_OF_OTHERS = {
    "_C", "_apply", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_load_from_state_dict", "_make_subclass",
    "_modules", "_non_persistent_buffers_set", "_parameters", "_save_to_state_dict", "_version",
    "_current_graph_task_id",
    "_exit", "_initializing",  # Python
    "_hf_hook",  # accelerate
}  # fmt: skip
PRIVATE_OF_LLAMAFACTORY = {
    "_EVAL_ARGS", "_TRAIN_ARGS", "_get_init_kwargs", "_get_merged_dataset", "_initialize", "_option_string_actions",
    "_parse_args",
}  # fmt: skip
MAX_SHARE = 0.25  # of the package's lines, in the files of one folder


def package_files(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "kt_sft").rglob("*.py")):
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def wrong_imports(root: Path) -> Iterator[str]:
    for path, text in package_files(root):
        room = room_of(path.removesuffix(".py").replace("/", "."))
        for line, name in imported_names(path, text):
            if within(name, "tests") or within(name, "benchmarks") or within(name, "scripts"):
                yield f"{path}:{line}: imports {name}; nothing imports tests, benchmarks or scripts"
            if not within(name, "kt_sft") or "." not in name or within(name, "kt_sft._native"):
                continue
            first, target = root / "kt_sft" / name.split(".")[1], room_of(name)
            is_module = first.is_dir() or first.with_suffix(".py").is_file()
            if (path, name) in SEAMS:
                continue
            if is_module and target != room and target not in MAY_IMPORT.get(room, set()):
                yield f"{path}:{line}: {room} imports {name}; allowed: {sorted(MAY_IMPORT.get(room, set()))}"


def wrong_external_imports(root: Path) -> Iterator[str]:
    for path, text in package_files(root):
        for line, name in imported_names(path, text):
            for package, homes in ONLY_IN.items():
                if within(name, package) and not path.startswith(homes):
                    yield f"{path}:{line}: imports {name}; only {', '.join(homes)} may"


def circular_imports(root: Path) -> Iterator[str]:
    """Modules that import one another, at the top of a file or within a function."""
    edges: defaultdict[str, set[str]] = defaultdict(set)
    for found in read(root):
        edges[found.importer].add(found.imported)
    for circle in circles(edges):
        yield f"{circle[0].replace('.', '/')}.py: a circle of imports: {' -> '.join(circle)}"


def heavy_folders(root: Path) -> Iterator[str]:
    """Folders whose own files, without those in folders below, are too much of the package."""
    lines: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for path, text in package_files(root):
        lines[path.rpartition("/")[0]][path] = text.count("\n")
    total = sum(sum(of_folder.values()) for of_folder in lines.values())
    for folder, of_folder in lines.items():
        share = sum(of_folder.values()) / max(total, 1)
        if share > MAX_SHARE:
            largest = max(of_folder, key=lambda path: of_folder[path])
            yield f"{largest}: {folder} has {share:.0%} of the package's lines, at most {MAX_SHARE:.0%}; divide it"


@cache
def _folder_of(library: str) -> Path:
    spec = importlib.util.find_spec(library)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _parts(name: str) -> tuple[str, list[str]]:
    """(module, names within it) of a dotted name in a library, by the library's files."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        path = _folder_of(parts[0]).joinpath(*parts[1:length])
        if path.is_dir() or path.with_suffix(".py").is_file():
            return ".".join(parts[:length]), parts[length:]
    return parts[0], parts[1:]


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _library_names(path: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a file names in the libraries: imports, and attributes of what it imported."""
    tree = ast.parse(text)
    bound = dict(_modules_of(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            bound.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    for line, name in imported_names(path, text):
        if name.split(".")[0] in DOCUMENTED:
            yield line, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if bound.get(first, "").split(".")[0] in DOCUMENTED:
                yield node.lineno, f"{bound[first]}.{rest}"


def _own_names(tree: ast.AST) -> set[str]:
    """Names that a file gives: definitions, variables, and attributes of `self` and `cls` that it sets."""
    own: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                own.add(node.attr)
    return own


def _attributes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every attribute, also of those that getattr and its like are given as a text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            if ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
                yield node.lineno, str(node.args[1].value)


def private_names(root: Path) -> Iterator[str]:
    """What transformers and PEFT do not document, and private attributes that neither the file nor one of the package's
    that it imports gives.
    """
    own = {name: _own_names(ast.parse(file.read_text(encoding="utf-8"))) for name, file in modules(root).items()}
    used: defaultdict[str, set[str]] = defaultdict(set)
    for found in read(root):
        if not found.imported.startswith("kt_sft.compat"):
            used[found.path].add(found.imported)
    for path, text in package_files(root):
        if path.startswith(COMPAT):
            continue
        for line, name in _library_names(path, text):
            module, names = _parts(name)
            if module not in DOCUMENTED[name.split(".")[0]] or any(_is_private(part) for part in names):
                yield f"{path}:{line}: {name} is not documented; give it a public name in {COMPAT}"
        tree = ast.parse(text)
        known = _own_names(tree).union(PRIVATE_OF_OTHERS, *(own[name] for name in used[path]))
        if path.startswith(ONLY_IN["llamafactory"]):
            known |= PRIVATE_OF_LLAMAFACTORY
        for line, name in _attributes(tree):
            if _is_private(name) and name not in known:
                yield f"{path}:{line}: {name} belongs to somebody else; give it a public name in {COMPAT}"


def version_questions(root: Path) -> Iterator[str]:
    """Which release of a library runs, and whether it has a name: asked in one place for each library."""
    asking = ("importlib.metadata.version", "importlib.metadata.distribution", "packaging.version")
    for path, text in package_files(root):
        if path.startswith(COMPAT):
            continue
        remedy = f"ask {COMPAT}"
        found = {(line, name) for line, name in _library_names(path, text) if name.endswith(".__version__")}
        found |= {(line, name) for line, name in imported_names(path, text) if name.startswith(asking)}
        tree = ast.parse(text)
        libraries = {name for name, package in _modules_of(tree) if package.split(".")[0] in DOCUMENTED}
        for node in ast.walk(tree):
            shown = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Call) else ""
            if isinstance(node, ast.Attribute) and shown.endswith(("metadata.version", "metadata.distribution")):
                found.add((node.lineno, shown))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr") and node.args:
                if ast.unparse(node.args[0]).split(".")[0] in libraries:
                    found.add((node.lineno, shown))
        for line, name in sorted(found):
            yield f"{path}:{line}: {name} asks for a release; {remedy}"


def _modules_of(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name in the file, dotted name) of what `import` binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                yield alias.asname or first, alias.name if alias.asname else first

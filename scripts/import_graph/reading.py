"""The import graph of the package, read from its source: which module names which, at the top or inside a function.

Nothing is imported, so a tree that does not run can be read, too. Names that are put together at run time, or that
stand in a table (the public names, the patches of `autoload.py`), are not seen.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

PACKAGE = "kt_sft"
# Folders whose folders are rooms of their own.
OPENED = ("integrations",)
# Rooms below all others; they use one another.
LEAVES = {
    "compat",
    "config",
    "storage",
    "env",
    "errors",
    "formats",
    "memory",
    "models",
    "native",
    "progress",
    "runtime",
}


class Import(NamedTuple):
    """One import: both ends are dotted names of modules of the package."""

    importer: str
    imported: str
    path: str
    line: int


def imported_names(path: str, text: str) -> Iterator[tuple[int, str]]:
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


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the package below `root`."""
    found = sorted((root / PACKAGE).rglob("*.py"))
    return {module_name(path.relative_to(root).as_posix()): path for path in found}


def read(root: Path) -> list[Import]:
    """Every import of one module of the package by another; of a name in a module, the module counts."""
    known = modules(root)
    found = []
    for importer, file in known.items():
        path = file.relative_to(root).as_posix()
        for line, name in imported_names(path, file.read_text(encoding="utf-8")):
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name and name not in (importer, PACKAGE):
                found.append(Import(importer, name, path, line))
    return found


def room_of(module: str) -> str:
    """The room of a module: the first name below the package; below integrations/ the first two."""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    return ".".join(parts[:2]) if parts[0] in OPENED and len(parts) > 1 else parts[0]


def rooms(root: Path) -> dict[str, set[str]]:
    """Room -> rooms that it imports, of the package below `root`."""
    edges: dict[str, set[str]] = {room_of(name): set() for name in modules(root) if name.split(".")[1:] != list(OPENED)}
    for found in read(root):
        first, second = room_of(found.importer), room_of(found.imported)
        if first != second and second in edges:
            edges[first].add(second)
    return edges


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of nodes that reach one another, each as one shortest way round, sorted."""
    found = []
    for component in components(edges):
        if len(component) > 1:
            found.append(_way_round(min(component), edges, component))
    return sorted(found)


def components(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """The nodes of a graph, those that reach one another together (Tarjan's algorithm); who is reached comes first."""
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        numbers[node] = lowest[node] = len(numbers)
        stack.append(node)
        for target in sorted(edges.get(node, ())):
            if target not in numbers:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], numbers[target])
        if lowest[node] == numbers[node]:
            component = set()
            while node not in component:
                component.add(stack.pop())
            found.append(component)

    for node in sorted(edges):
        if node not in numbers:
            visit(node)
    return found


def _way_round(start: str, edges: Mapping[str, set[str]], within: set[str]) -> list[str]:
    ways = [[start]]
    seen = {start}
    for way in ways:
        for target in sorted(edges.get(way[-1], set()) & within):
            if target == start:
                return [*way, start]
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])
    raise ValueError(f"{start} is in no circle")

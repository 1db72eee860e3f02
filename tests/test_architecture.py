"""Data moves one way: a module imports only what stands above it in the table of the design.

Read off the sources, so that an import inside a function counts as one at the top.
"""

import ast
import functools
import graphlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import fnn

ROOT = Path(fnn.__file__).parent

# Every file or folder directly under fnn/, in order; and the others that it may import.
MAY_IMPORT = {
    "arguments": "",
    "text": "",
    "bins": "",
    "precision": "",
    "batch": "arguments",
    "meshes": "",
    "frames": "",
    "readings": "",
    "heap": "",
    "jaxpr": "frames",
    "operation": "arguments meshes jaxpr",
    "convolution": "meshes jaxpr operation",
    "eager": "jaxpr operation",
    "ops": "arguments text precision meshes jaxpr operation convolution",
    "backprop": "arguments text precision meshes frames jaxpr operation convolution eager",
    "birth": "arguments text meshes frames jaxpr operation eager backprop",
    "footprint": "arguments text frames jaxpr operation backprop",
    "check": "arguments text jaxpr operation eager backprop",
    "per_example": "arguments text precision batch meshes frames jaxpr operation eager backprop",
    "curvature": "arguments text precision batch meshes jaxpr operation eager ops backprop "
    "per_example",
    "params": "arguments",
    "initializers": "arguments",
    "layers": "arguments text precision meshes eager ops params initializers",
    "models": "arguments text precision ops params initializers layers",
    "logs": "arguments bins frames",
    "sharding": "arguments readings",
    "train": "arguments text bins precision batch meshes frames readings jaxpr operation "
    "convolution eager ops backprop birth footprint params layers logs sharding",
    "sweeps": "arguments text precision batch readings footprint train",
    "plot": "arguments",
}

# What a place may import of another, where that isn't all of it.
ONLY = {
    # Training knows no particular layer.
    ("train", "layers"): {"fnn.layers.layer", "fnn.layers.mode"},
    # Curvature knows the losses by name.
    ("curvature", "ops"): {"fnn.ops"},
}

# JAX's interfaces for those who extend it: what a jaxpr looks like, and how to make a primitive.
EXTENDS_JAX = {"fnn.jaxpr", "fnn.operation.primitive", "fnn.operation.twins"}

# Not needed to import fnn: imported where they are used.
EXTRAS = {
    "IPython",
    "lineax",
    "matplotlib",
    "orbax",
    "pygraphviz",
    "rich",
    "safetensors",
    "tensorboardX",
    "tensorstore",
}


class Import(NamedTuple):
    """`module` imports `target`, a module; at the top of the file, or inside a function."""

    module: str
    target: str
    line: int
    inside: bool

    def __str__(self):
        return f"{self.module}, line {self.line}: {self.target}"


@functools.cache
def modules() -> dict[str, ast.Module]:
    """The modules of fnn by name, as syntax trees; a package by its own name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(), str(path))
    return found


@functools.cache
def imports() -> tuple[Import, ...]:
    return tuple(i for name, tree in modules().items() for i in imports_of(name, tree))


def imports_of(name: str, tree: ast.AST, inside: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(name, alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                target = whole if whole in modules() else str(node.module)
                yield Import(name, target, node.lineno, inside)
        else:
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports_of(name, node, inside or is_function)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def place(module: str) -> str:
    """The part of fnn that a module belongs to: "backprop" of fnn.backprop.sweep."""
    return module.split(".")[1] if "." in module else ""


def listed(found) -> str:
    return "\n".join(map(str, found))


def test_the_table_is_complete_and_goes_one_way():
    here = {place(name) for name in modules()} - {""}
    assert here - set(MAY_IMPORT) == set()
    above: list[str] = []
    for name, allowed in MAY_IMPORT.items():
        assert set(allowed.split()) <= set(above), name
        above.append(name)


def test_a_module_imports_only_what_stands_above_it():
    def is_allowed(i: Import) -> bool:
        own, other = place(i.module), place(i.target)
        if not within(i.target, "fnn") or own in ("", other):
            return True  # fnn/__init__.py imports all, and nobody imports it
        only = ONLY.get((own, other))
        return other in MAY_IMPORT[own].split() and (only is None or i.target in only)

    assert not listed(i for i in imports() if not is_allowed(i))


def test_no_circles():
    """A package stands for its `__init__`: what is in it may not import that."""
    graph: dict[str, set[str]] = {}
    for i in imports():
        if within(i.target, "fnn"):
            graph.setdefault(i.module, set()).add(i.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


PROMISE = "Each module imports only from those above it:\n"


def test_the_order_inside_a_package():
    """Where a package's docstring lists its modules in order, the list is complete and true."""
    wrong, packages = [], []
    for package, tree in modules().items():
        _, promised, rows = (ast.get_docstring(tree) or "").partition(PROMISE)
        if not promised:
            continue
        packages.append(package)
        part = lambda name, package=package: name.removeprefix(f"{package}.").split(".")[0]
        lists = re.findall(r"^    ([\w/]+(?:, [\w/]+)*) ", rows, re.MULTILINE)
        order = [name.rstrip("/") for names in lists for name in names.split(", ")]
        own = [name for name in modules() if name.startswith(f"{package}.")]
        assert sorted(order) == sorted(set(map(part, own))), package
        for i in imports():
            if i.module in own and within(i.target, package):
                inner = i.target in own and part(i.target) == part(i.module)
                above = order[: order.index(part(i.module))]
                if not inner and part(i.target) not in above:
                    wrong.append(i)
    assert {"fnn.operation", "fnn.backprop"} <= set(packages)
    assert not listed(wrong)


def test_no_imports_inside_functions():
    """But of extras, without which fnn can be imported."""
    found = [i for i in imports() if i.inside and i.target.split(".")[0] not in EXTRAS]
    assert not listed(found)


def test_only_documented_interfaces_of_jax():
    found = []
    for name, tree in modules().items():
        used = [(i.target, i.line) for i in imports() if i.module == name]
        used += [
            (ast.unparse(node), node.lineno)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
        ]
        for target, line in used:
            extends = any(within(target, part) for part in ("jax.extend", "jax.interpreters"))
            if within(target, "jax._src") or (extends and name not in EXTENDS_JAX):
                found.append(f"{name}, line {line}: {target}")
    assert not listed(found)


def test_a_module_and_a_public_name_are_never_the_same():
    """`fnn.rule` is a function: a module of that name would hide it, or be hidden by it."""
    names = {
        f"{name}.{public}"
        for name in modules()
        for public in getattr(importlib.import_module(name), "__all__", ())
    }
    hidden = {
        name
        for name in names & set(modules())
        if getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2])
        is not importlib.import_module(name)
    }
    assert not hidden


def test_contributing_has_the_same_table():
    text = (ROOT.parent / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (`fnn/.*?) \|", text, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`fnn/(\w+)", row)]
    assert names == [name for name in MAY_IMPORT if name in {place(m) for m in modules()}]

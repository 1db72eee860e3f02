"""Layouts as text: a line, and a table of parameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from fnn.sharding.specs import path_of


def as_line(layout: Any) -> str:
    """A layout's mesh, and the fields that aren't as they are unless given."""
    sizes = ", ".join(f"{name}={size}" for name, size in layout.mesh.shape.items())
    shown = [f"mesh of {sizes}"]
    for field in dataclasses.fields(layout)[1:]:
        value = getattr(layout, field.name)
        if value not in (None, ()) and value != field.default:
            shown.append(f"{field.name}={dict(value) if field.name == 'rules' else value!r}")
    return f"Layout({', '.join(shown)})"


def as_table(params: Any, shardings: Any) -> str:
    """A row for each parameter: its path, shape, how it is divided, and its bytes on a device."""
    rows = [("parameter", "shape", "divided", "bytes a device")]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, x), at in zip(leaves, jax.tree.leaves(shardings), strict=True):
        size = math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize
        rows.append((path_of(path), str(tuple(x.shape)), _spec(at.spec), str(size)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _spec(spec: PartitionSpec) -> str:
    return f"P({', '.join(map(repr, spec))})"

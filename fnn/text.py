"""Numbers, arrays and tables as short text, for what people print and read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy


def number(x, digits: int = 4) -> str:
    """A scalar with a few significant digits: -4, 0.7311, 1e-05."""
    if jnp.issubdtype(x.dtype, jnp.bool_):
        return str(bool(x))
    if jnp.issubdtype(x.dtype, jnp.integer):
        return str(int(x))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return f"{complex(x):.{digits}g}"
    return f"{float(x) + 0.0:.{digits}g}"  # + 0.0 makes -0 a 0


def shape(dims: Sequence[int]) -> str:
    """(3, 4), () or (3,), as Python writes it."""
    return str(tuple(dims))


def type_of(dims: Sequence[int], dtype) -> str:
    """float32[3, 4], and float32 for a scalar."""
    return f"{dtype}{list(dims)}" if dims else str(dtype)


def is_concrete(x: Any) -> bool:
    """Are its numbers there to be read: no tracer, no key, all of it on this host?"""
    if x is None or isinstance(x, jax.core.Tracer):
        return False
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
        return False
    return getattr(x, "is_fully_addressable", True)


def value(x: Any, digits: int = 4, numbers: int = 3) -> str:
    """An array in one short phrase: a number, a few `numbers`, or the range of many."""
    if not is_concrete(x):
        return "" if x is None else _what_it_is(x)
    array = numpy.asarray(x)
    if array.ndim == 0:
        return number(array[()], digits)
    if array.size == 0:
        return "empty"
    if array.ndim == 1 and array.size <= numbers:
        return "[" + ", ".join(number(a, digits) for a in array) + "]"
    if jnp.issubdtype(array.dtype, jnp.bool_):
        return f"{int(array.sum())} of {array.size} true"
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return norm(x, "·", digits)
    odd = _not_finite(array)
    if not odd:
        return _range(array)
    finite = array[numpy.isfinite(array.astype(float))]
    if finite.size == 0:
        return odd
    return f"{_range(finite).removeprefix('all ')}, {odd}"


def gradient(x: Any, digits: int = 4, numbers: int = 3) -> str:
    """A scalar's gradient as a number, an array's as its Euclidean norm ‖g‖."""
    if not is_concrete(x):
        return "" if x is None else _what_it_is(x)
    array = numpy.asarray(x)
    if array.ndim == 0:
        return number(array[()], digits)
    if array.ndim == 1 and 0 < array.size <= numbers:
        return value(x, digits)
    return norm(x, "g", digits)


def norm(x, letter: str, digits: int = 4) -> str:
    """The Euclidean norm, `‖g‖ 0.031`."""
    array = numpy.asarray(x)
    return _not_finite(array) or f"‖{letter}‖ {euclidean([array]):.{min(digits, 3)}g}"


def euclidean(arrays: Sequence) -> float:
    """The Euclidean norm of all entries together, where their squares would overflow too."""
    sizes = [
        numpy.abs(numpy.asarray(a, complex if numpy.iscomplexobj(a) else float)).ravel()
        for a in arrays
    ]
    largest = float(numpy.max([s.max() for s in sizes if s.size], initial=0.0))  # or nan
    if largest == 0 or not numpy.isfinite(largest):
        return largest
    return largest * float(sum(numpy.square(s / largest).sum() for s in sizes)) ** 0.5


def _not_finite(array) -> str:
    """`7 NaN, 2 -inf`, so that a broken gradient shows where it broke; `all -inf`."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return ""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = numpy.where(numpy.isnan(array), numpy.nan, numpy.abs(array))
    array = array.astype(float)
    counts = {
        "NaN": int(numpy.isnan(array).sum()),
        "inf": int(numpy.isposinf(array).sum()),
        "-inf": int(numpy.isneginf(array).sum()),
    }
    found = [(what, count) for what, count in counts.items() if count]
    if len(found) == 1 and found[0][1] == array.size > 1:
        return f"all {found[0][0]}"
    return ", ".join(f"{count} {what}" for what, count in found)


def _range(array) -> str:
    """`0 … 4`, or `all 0`."""
    low, high = number(array.min(), 3), number(array.max(), 3)
    return f"all {low}" if low == high else f"{low} … {high}"


def shortened(label: str, most: int = 34) -> str:
    """The end of a long path, from one of its brackets on."""
    if len(label) <= most:
        return label
    end = label[-most + 1 :]
    return "…" + (end[end.index("[") :] if "[" in end else end)


def listed(labels: Sequence[str], most: int = 4, width: int = 24) -> str:
    """A few labels and how many more there are: `a, b, c, … and 17 more`."""
    first = labels[:most] if len(labels) > most + 1 else labels
    shown = [shortened(label, width) for label in first]
    more = len(labels) - len(shown)
    return ", ".join(shown) + (f", … and {more} more" if more else "")


def size_of_tree(tree: Any) -> str:
    """`4 arrays, 7510 numbers`; of a single number its value."""
    leaves = jax.tree.leaves(tree)
    if leaves and tree is leaves[0] and jnp.ndim(tree) == 0:
        return "traced" if isinstance(tree, jax.core.Tracer) else str(tree)
    numbers = sum(math.prod(jnp.shape(leaf)) for leaf in leaves)
    return f"{len(leaves)} array{'s' if len(leaves) != 1 else ''}, {numbers} numbers"


def held(x: Any) -> str:
    """What a field of a result holds: `float32[128]`, a scalar's value, a tree's size."""
    plain = (bool, int, float, str, type(None))
    if isinstance(x, plain) or (isinstance(x, tuple) and all(isinstance(i, plain) for i in x)):
        return repr(x)
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        is_number = x.shape == () and is_concrete(x)
        return number(numpy.asarray(x)) if is_number else type_of(x.shape, x.dtype)
    return size_of_tree(x)


def of_fields(name: str, **fields: Any) -> str:
    """`Clipped(losses=float32[128], gradient=4 arrays, 7510 numbers)`: no numbers but scalars."""
    return f"{name}({', '.join(f'{field}={held(value)}' for field, value in fields.items())})"


def one_screen(whole: str, lines: int = 24, columns: int = 80) -> str:
    """A text that is no longer than a terminal's screen; the last line says what is left out."""
    rows = whole.splitlines()
    kept, room = [], lines
    for row in rows:
        room -= max(1, -(-len(row) // columns))
        if room < 0:
            break
        kept.append(row)
    if len(kept) == len(rows):
        return whole
    while kept and sum(max(1, -(-len(row) // columns)) for row in kept) >= lines:
        kept.pop()
    return "\n".join([*kept, f"… and {len(rows) - len(kept)} more lines: print(it) shows all"])


def _what_it_is(x) -> str:
    return "traced" if isinstance(x, jax.core.Tracer) else "key"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[int] = (),
    total: Sequence[str] | None = None,
) -> str:
    """Rows of text in aligned columns under a header; columns that no row fills are left out.

    Args:
        header: the name of each column.
        rows: for each row a text for each column.
        right: the columns that are set flush right.
        total: a last row, under a line of its own.
    """
    body = [*rows, total] if total is not None else list(rows)
    kept = [c for c in range(len(header)) if any(row[c] for row in body)]
    widths = [max(len(row[c]) for row in [header, *body]) for c in kept]
    rule = "  ".join("─" * w for w in widths)
    lines = [
        "  ".join(
            row[c].rjust(w) if c in right else row[c].ljust(w)
            for c, w in zip(kept, widths, strict=True)
        ).rstrip()
        for row in [header, *body]
    ]
    lines.insert(1, rule)
    if total is not None:
        lines.insert(-1, rule)
    return "\n".join(lines)

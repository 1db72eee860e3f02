"""`summary`: a network as a table of its layers, output shapes, parameters and FLOPs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.layers.layer import Construction, Layer, as_layer


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer of a network.

    Fields:
        path: where it stands: `("encoder", "hidden")`; `()` is the whole network.
        layer: what it is: `Linear(100)`.
        output: a tree of `jax.ShapeDtypeStruct`: what it gives for one example.
        parameters: how many numbers it learns, its parts' included.
        flops: floating-point operations of its forward pass on one example, as counted by
            XLA in the compiled program; None where XLA doesn't say.
        has_parts: whether rows of its parts follow.
    """

    path: tuple[str, ...]
    layer: str
    output: Any
    parameters: int
    flops: int | None
    has_parts: bool


@dataclasses.dataclass(frozen=True)
class Summary:
    """A network's table; `print` it. `rows[0]` is the whole network."""

    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """The number of parameters of the whole network."""
        return self.rows[0].parameters

    @property
    def flops(self) -> int | None:
        """The floating-point operations of one forward pass on one example."""
        return self.rows[0].flops

    def __str__(self):
        head = ("layer", "", "output", "parameters", "FLOPs")
        lines = []
        for row in self.rows[1:] or self.rows:
            name = "  " * (len(row.path) - 1) + row.path[-1] if row.path else ""
            what = row.layer.partition("(")[0] if row.has_parts else row.layer
            count = f"{row.parameters:,}" if row.parameters or row.has_parts else ""
            lines.append((name, what, _shapes(row.output), count, _count(row.flops)))
        whole = self.rows[0]
        total = ("total", "", _shapes(whole.output), f"{whole.parameters:,}", _count(whole.flops))
        widths = [max(map(len, column)) for column in zip(head, *lines, total, strict=True)]
        rule = "─" * (sum(widths) + 2 * (len(widths) - 1))

        def line(cells):
            left = [c.ljust(w) for c, w in zip(cells[:3], widths[:3], strict=True)]
            right = [c.rjust(w) for c, w in zip(cells[3:], widths[3:], strict=True)]
            return "  ".join(left + right).rstrip()

        return "\n".join([line(head), rule, *map(line, lines), rule, line(total)])

    __repr__ = __str__


def summary(net: Layer, x: Any) -> Summary:
    """A table of a network's layers, their output shapes, parameters and FLOPs.

    Nothing is computed and no parameter is made: layers are traced by shape and compiled to
    count their FLOPs. The parts of `chain`, `parallel` and `residual` are indented.

    Args:
        net: a layer, made of layers.
        x: one example, an array or a `jax.ShapeDtypeStruct` (or a tree of them).

    Returns:
        A `Summary`: `print(it)`, or read `it.rows`, `it.parameters`, `it.flops`.

    Raises:
        TypeError: net is no layer, or x no array.

    The FLOPs are those of the forward pass on one example, as XLA counts them in the
    compiled program: an addition and a multiplication are one each, so a `Linear` takes about
    2·in·out; comparisons count, and functions like exp and tanh, which XLA counts apart as
    transcendentals, do not. A training step takes about three times as many an example.

    >>> print(summary(chain(hidden=Linear(100), activation=relu, output=Linear(10)), x))
    layer                    output        parameters    FLOPs
    ──────────────────────────────────────────────────────────
    hidden      Linear(100)  float32[100]      78,500  156,900
    activation  relu         float32[100]                  100
    output      Linear(10)   float32[10]        1,010    2,010
    ──────────────────────────────────────────────────────────
    total                    float32[10]       79,510  159,010
    """
    net = as_layer(net, "summary")
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            arguments.array("summary", f"x{jax.tree_util.keystr(path)}", leaf)
    if not jax.tree.leaves(x):
        raise TypeError(f"summary: x must be one example, an array, but got {arguments.show(x)}.")
    key = jax.eval_shape(lambda: jax.random.key(0))
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), x)
    return Summary(tuple(_rows(net, key, x, ())))


def _rows(layer: Layer, key, x, path) -> list[Row]:
    """The layer's own row, and those of its parts."""
    seen: list[tuple[Any, Layer, Any]] = []
    watched = _watch_parts(layer, seen)
    params = jax.eval_shape(layer.init, key, x)
    output = jax.eval_shape((watched or layer).apply, params, x)
    row = Row(
        path,
        str(layer),
        output,
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        _flops(layer.apply, params, x),
        bool(seen),
    )
    parts = [_rows(part, key, own_x, (*path, str(name))) for name, part, own_x in seen]
    return [row, *(r for rows in parts for r in rows)]


def _watch_parts(layer: Layer, seen: list) -> Layer | None:
    """The same layer, made anew of parts that note down their input when they are applied."""
    made_by = layer.made_by
    if not isinstance(made_by, Construction):
        return None

    def watch(name, part):
        if not isinstance(part, Layer):
            return part

        def apply(params, x):
            seen.append((name, part, jax.tree.map(_type_of, x)))
            return part.apply(params, x)

        return Layer(part.init, apply)

    args = [watch(i, a) for i, a in enumerate(made_by.args)]
    kwargs = {k: watch(k, a) for k, a in made_by.kwargs.items()}
    return made_by.constructor(*args, **kwargs)


def _type_of(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _flops(apply, params, x) -> int | None:
    cost = jax.jit(apply).lower(params, x).compile().cost_analysis()
    return None if cost is None else int(cost.get("flops", 0))


def _shapes(output) -> str:
    kinds = [f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in jax.tree.leaves(output)]
    return ", ".join(kinds)


def _count(flops: int | None) -> str:
    return "?" if flops is None else f"{flops:,}"

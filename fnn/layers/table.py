"""`summary`: a network as a table of its layers, output shapes, parameters and FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fnn import arguments, text
from fnn.layers.layer import Layer, as_layer, run
from fnn.layers.mode import EVALUATE
from fnn.layers.net import type_of, watching


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
        return text.table(head, lines, right=(3, 4), total=total)

    __repr__ = __str__


def summary(net: Layer | Callable, *xs: Any) -> Summary:
    """A table of a network's layers, their output shapes, parameters and FLOPs.

    Nothing is computed and no parameter is made: layers are traced by shape and compiled to
    count their FLOPs. The parts of a network inside a network are indented. A part that is called
    twice has two rows, the first with its parameters. Rows inside a `repeat` count all its blocks.

    Args:
        net: a layer, made of layers.
        *xs: one example's inputs: arrays, `jax.ShapeDtypeStruct`s, or trees of them.

    Returns:
        A `Summary`: `print(it)`, or read `it.rows`, `it.parameters`, `it.flops`.

    Raises:
        TypeError: net is no layer, or xs hold no arrays.

    The FLOPs are those of the forward pass on one example, as XLA counts them in the
    compiled program: an addition and a multiplication are one each, so a `Linear` takes about
    2·in·out; comparisons count, and functions like exp and tanh, which XLA counts apart as
    transcendentals, do not. A training step takes about three times as many an example.

    >>> print(summary(chain(hidden=Linear(100), activation=relu, output=Linear(10)), x))
    layer                    output        parameters    FLOPs
    ──────────  ───────────  ────────────  ──────────  ───────
    hidden      Linear(100)  float32[100]      78,500  156,900
    activation  relu         float32[100]                  100
    output      Linear(10)   float32[10]        1,010    2,010
    ──────────  ───────────  ────────────  ──────────  ───────
    total                    float32[10]       79,510  159,010
    """
    net = as_layer(net, "summary")
    for path, leaf in jax.tree_util.tree_leaves_with_path(xs):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            arguments.array("summary", f"xs{jax.tree_util.keystr(path)}", leaf)
    if not jax.tree.leaves(xs):
        raise TypeError(f"summary: xs must be one example, an array, but got {arguments.show(xs)}.")
    return Summary(tuple(_rows(net, jax.tree.map(type_of, xs))))


class _Call(NamedTuple):
    """A call of a part; `types` are those of its parameters, state, inputs, and of its output."""

    path: tuple[str, ...]
    layer: Layer
    times: int
    types: list


def _calls(layer: Layer, params: Any, state: Any, xs: tuple) -> list[_Call]:
    """The call of a layer, and those of its parts in order.

    The body of a loop is called "", and a block of which there are copies "*".
    """
    seen: list[_Call] = []

    def watch(path: tuple[str, ...], layer: Layer, times: int) -> Callable:
        call = _Call(path, layer, times, [])
        seen.append(call)
        return lambda *trees: call.types.extend(jax.tree.map(type_of, trees))

    def call(params, state, *xs):
        note = watch((), layer, 1)
        with watching(watch):
            y = run(layer, params, state, xs, EVALUATE)[0]
        note(params, state, xs, y)
        return y

    jax.eval_shape(call, params, state, *xs)
    return seen


def _rows(net: Layer, xs: tuple) -> list[Row]:
    """The network's own row, and those of its parts in the order in which they are called."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(net.init, key, *xs), jax.eval_shape(net.init_state, *xs)
    calls = [c for c in _calls(net, params, state, xs) if c.path[-1:] not in (("",), ("*",))]
    rows: list[Row] = []
    for path, layer, times, (params, state, xs, y) in calls:
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        flops = _flops(layer, params, state, xs)
        place = tuple(name for name in path if name not in ("", "*"))
        rows.append(
            Row(
                place,
                repr(layer),
                y,
                0 if any(row.path == place for row in rows) else times * count,
                flops if flops is None else times * flops,
                any(c.path[: len(path)] == path != c.path for c in calls),
            )
        )
    return rows


def _flops(layer: Layer, params: Any, state: Any, xs: tuple) -> int | None:
    """As XLA counts them, but for loops, of which it counts one round."""

    def call(params, state, xs):
        return run(layer, params, state, xs, EVALUATE)[0]

    cost = jax.jit(call).lower(params, state, xs).compile().cost_analysis()
    total = None if cost is None else int(cost.get("flops", 0))
    for path, block, times, types in _calls(layer, params, state, xs):
        if path.count("") == 1 and path[-1] == "" and total is not None:
            total += (times - 1) * (_flops(block, *types[:3]) or 0)
    return total


def _shapes(output) -> str:
    kinds = [f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in jax.tree.leaves(output)]
    return ", ".join(kinds)


def _count(flops: int | None) -> str:
    return "?" if flops is None else f"{flops:,}"

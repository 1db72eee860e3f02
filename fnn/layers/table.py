"""`summary`: a network as a table of its layers: outputs, parameters, FLOPs, and what is kept."""

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
        kept: how many bytes its backward pass keeps of its forward pass on one example.
        has_parts: whether rows of its parts follow.
    """

    path: tuple[str, ...]
    layer: str
    output: Any
    parameters: int
    flops: int | None
    kept: int
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

    @property
    def kept(self) -> int:
        """The bytes that one example's backward pass keeps of its forward pass."""
        return self.rows[0].kept

    def __str__(self):
        head = ("layer", "", "output", "parameters", "FLOPs", "bytes kept")
        lines = []
        for row in self.rows[1:] or self.rows:
            name = "  " * (len(row.path) - 1) + row.path[-1] if row.path else ""
            what = row.layer.partition("(")[0] if row.has_parts else row.layer
            count = f"{row.parameters:,}" if row.parameters or row.has_parts else ""
            lines.append((name, what, _shapes(row.output), count, *_numbers(row)))
        whole = self.rows[0]
        total = ("total", "", _shapes(whole.output), f"{whole.parameters:,}", *_numbers(whole))
        return text.table(head, lines, right=(3, 4, 5), total=total)

    def __repr__(self):
        return text.one_screen(str(self))


def summary(net: Layer | Callable, *xs: Any) -> Summary:
    """A table of a network's layers: output shapes, parameters, FLOPs, and bytes kept.

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

    The bytes kept are those of the arrays that `jax.vjp` of the layer, in evaluation, keeps from
    the forward pass on one example for the gradients of its parameters and inputs: each array once,
    the layer's input among them where it is kept. What doesn't depend on the example doesn't count:
    the parameters, and what is made of them alone, such as a weight's transpose. A row is of its
    layer by itself. What two layers keep, one as its output and the next as its input, stands in
    the rows of both, and once in the row of the network that holds them, and in the total.

    >>> print(summary(chain(hidden=Linear(100), activation=relu, output=Linear(10)), x))
    layer                    output        parameters    FLOPs  bytes kept
    ──────────  ───────────  ────────────  ──────────  ───────  ──────────
    hidden      Linear(100)  float32[100]      78,500  156,900       3,136
    activation  relu         float32[100]                  100         400
    output      Linear(10)   float32[10]        1,010    2,010         400
    ──────────  ───────────  ────────────  ──────────  ───────  ──────────
    total                    float32[10]       79,510  159,010       3,536
    """
    net = as_layer(net, "summary")
    for path, leaf in jax.tree_util.tree_leaves_with_path(xs):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            arguments.array("summary", f"xs{jax.tree_util.keystr(path)}", leaf)
    if not jax.tree.leaves(xs):
        raise TypeError(f"summary: xs must be one example, an array, but got {arguments.show(xs)}.")
    return Summary(tuple(_rows(net, jax.tree.map(type_of, xs))))


class _Call(NamedTuple):
    """A call of a part.

    Fields:
        times: how often it is run.
        written: how often the program holds it.
        types: those of its parameters, state, inputs, and of its output.
    """

    path: tuple[str, ...]
    layer: Layer
    times: int
    written: int
    types: list


def _calls(layer: Layer, params: Any, state: Any, xs: tuple) -> list[_Call]:
    """The call of a layer, and those of its parts in order.

    The body of a loop is called "", and a block of which there are copies "*".
    """
    seen: list[_Call] = []

    def watch(path: tuple[str, ...], layer: Layer, times: int, written: int) -> Callable:
        call = _Call(path, layer, times, written, [])
        seen.append(call)
        return lambda *trees: call.types.extend(jax.tree.map(type_of, trees))

    def call(params, state, *xs):
        note = watch((), layer, 1, 1)
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
    for path, layer, times, _, (params, state, xs, y) in calls:
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        counted = _flops(layer, params, state, xs)
        flops = None if counted is None else times * counted[1]
        place = tuple(name for name in path if name not in ("", "*"))
        rows.append(
            Row(
                place,
                repr(layer),
                y,
                0 if any(row.path == place for row in rows) else times * count,
                flops,
                times * _kept(layer, params, state, xs),
                any(c.path[: len(path)] == path != c.path for c in calls),
            )
        )
    return rows


def _flops(layer: Layer, params: Any, state: Any, xs: tuple) -> tuple[int, int] | None:
    """As XLA counts them, which counts one turn of a loop; and with all turns of loops."""

    def call(params, state, xs):
        return run(layer, params, state, xs, EVALUATE)[0]

    cost = jax.jit(call).lower(params, state, xs).compile().cost_analysis()
    if cost is None:
        return None
    counted = total = int(cost.get("flops", 0))
    for path, block, times, written, types in _calls(layer, params, state, xs):
        if path.count("") == 1 and path[-1] == "":
            once, all_turns = _flops(block, *types[:3]) or (0, 0)
            total += times * all_turns - written * once
    return counted, total


def _kept(layer: Layer, params: Any, state: Any, xs: tuple) -> int:
    """The bytes of what `jax.vjp` keeps of what depends on the example."""

    def residuals(params, state, xs):
        def call(params, xs):
            return run(layer, params, state, xs, EVALUATE)[0]

        return jax.tree.leaves(jax.vjp(call, params, xs)[1])

    jaxpr = jax.make_jaxpr(residuals)(params, state, xs).jaxpr
    of_example = set(jaxpr.invars[len(jax.tree.leaves((params, state))) :])
    is_number = lambda v: hasattr(v, "val")
    for equation in jaxpr.eqns:
        if any(not is_number(v) and v in of_example for v in equation.invars):
            of_example.update(equation.outvars)
    kept = {v for v in jaxpr.outvars if not is_number(v)} & of_example
    return sum(v.aval.size * v.aval.dtype.itemsize for v in kept)


def _numbers(row: Row) -> tuple[str, str]:
    return _count(row.flops), f"{row.kept:,}" if row.kept else ""


def _shapes(output) -> str:
    kinds = [f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in jax.tree.leaves(output)]
    return ", ".join(kinds)


def _count(flops: int | None) -> str:
    return "?" if flops is None else f"{flops:,}"

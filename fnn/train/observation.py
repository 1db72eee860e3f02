"""`activation_statistics`: the activations of a network's parts and their gradients, measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments, text
from fnn.backprop import sweep
from fnn.backprop.names import names_in_source
from fnn.backprop.primitives import rule_of
from fnn.backprop.scopes import scope_name
from fnn.batch import batch_size as size_of
from fnn.batch import example_types
from fnn.bins import bins_of
from fnn.frames import stack
from fnn.jaxpr import Inlined, Program, is_inexact, program, trace
from fnn.layers.mode import EVALUATE
from fnn.operation import operation_name
from fnn.train.conversion import as_arrays
from fnn.train.loss import Loss, call, check_loss, check_model_state, extras
from fnn.train.state import State, floats_among, params_and_model_state
from fnn.train.written_out import written_out

# A value of a sigmoid or tanh counts as saturated where the local gradient is less than this
# fraction of its greatest, 1/4 and 1: sigmoid below 0.0101 or above 0.9899, |tanh| above 0.9798.
SATURATED = 0.04
# A unit is saturated if this fraction of its values is, over examples and positions.
MOSTLY = 0.95

_BINS = 60


class Histogram(NamedTuple):
    """How many values fall between one edge and the next.

    Fields:
        counts: `(bins,)`, integers.
        edges: `(bins + 1,)`.
    """

    counts: np.ndarray
    edges: np.ndarray

    def __repr__(self) -> str:
        low, high = self.edges[0], self.edges[-1]
        return f"Histogram({self.counts.sum()} values from {low:.4g} to {high:.4g})"


@dataclasses.dataclass(frozen=True, repr=False)
class PartStatistics:
    """The activations of one part on a batch, and the gradients with respect to them.

    A unit is an entry of the last axis, a feature; its values run over the examples, and over the
    other axes (positions, pixels).

    Fields:
        name: the part, "encoder.hidden"; where it isn't the part's result, with the operation
            or the variable, "block: relu".
        operation: what made it: "relu", "add", ...
        shape: of one example's.
        mean, std: of all values.
        values: a Histogram of the finite values.
        gradients: a Histogram of log₁₀|g| over the gradients g that are neither 0 nor inf or nan:
            each of an example's own loss with respect to a value.
        gradient_rms: the root mean square of the gradients.
        zero_gradients: the fraction of the gradients that are 0.
        nonfinite: how many values and gradients are inf or nan.
        dead: of a relu, for each unit whether it was 0 for every example; None of others.
        saturated: of a sigmoid or a tanh, for each unit whether 95 % of its values are where the
            local gradient is below 4 % of its greatest; None of others.
    """

    name: str
    operation: str
    shape: tuple[int, ...]
    mean: float
    std: float
    values: Histogram
    gradients: Histogram
    gradient_rms: float
    zero_gradients: float
    nonfinite: int
    dead: np.ndarray | None = None
    saturated: np.ndarray | None = None

    def __repr__(self) -> str:
        found = self.trouble
        return (
            f"<PartStatistics of {self.name}: {self.mean:.3g} ± {self.std:.3g}, gradients "
            f"{self.gradient_rms:.3g}{', ' + found if found else ''}>"
        )

    @property
    def trouble(self) -> str:
        """ "12 of 100 dead", "3 of 8 saturated", "5 inf or nan", or ""."""
        found = []
        for word in ("dead", "saturated"):
            units = getattr(self, word)
            if units is not None and units.any():
                found.append(f"{int(units.sum())} of {units.size} {word}")
        if self.nonfinite:
            found.append(f"{self.nonfinite} inf or nan")
        return ", ".join(found)


@dataclasses.dataclass(frozen=True, repr=False)
class ActivationStatistics:
    """What `activation_statistics(loss)(params, batch)` returns; `print` it for a table.

    Fields:
        parts: a `PartStatistics` for each, in the order in which they are computed.
        examples: how many the batch had.
    """

    parts: tuple[PartStatistics, ...]
    examples: int

    def __getitem__(self, name: str) -> PartStatistics:
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(f"there is no part {name!r}: {text.listed([p.name for p in self], most=12)}")

    def __iter__(self) -> Iterator[PartStatistics]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __repr__(self) -> str:
        troubled = [f"{p.name} {p.trouble}" for p in self if p.trouble]
        more = "; " + text.listed(troubled, most=3, width=48) if troubled else ""
        return f"<ActivationStatistics of {len(self)} parts, {self.examples} examples{more}>"

    def __str__(self) -> str:
        header = (
            "part",
            "made by",
            "shape",
            "mean",
            "std",
            "gradient rms",
            "gradients 0",
            "trouble",
        )
        rows = [
            (
                text.shortened(p.name),
                p.operation,
                text.shape(p.shape),
                f"{p.mean:.3g}",
                f"{p.std:.3g}",
                f"{p.gradient_rms:.2g}",
                f"{p.zero_gradients:.0%}",
                p.trouble,
            )
            for p in self
        ]
        return text.table(header, rows, right=(3, 4, 5, 6))


def activation_statistics(loss: Loss) -> Callable[..., ActivationStatistics]:
    """The activations of each part of a network on a batch, and their gradients, as histograms.

        look = fnn.activation_statistics(loss)
        print(look(params, (X[:128], y[:128])))

        seen = []                                   # through training
        fnn.fit(loss, params, (X, y), ..., after_epoch=lambda epoch, state, record:
            seen.append(look(state, (X[:128], y[:128]))))
        fnn.plot.activations(seen)

    The loss is traced to its graph, the graph swept forwards and backwards, and the values read
    off: of each part of a network (a layer, or whatever stands in a `jax.named_scope`) its
    result, and of each relu, sigmoid and tanh, JAX's own too. So it works for any function.
    The rounds of a loop are told apart, `blocks[3].hidden`, up to 64 of them and up to 4000
    operations in all; of a longer loop, and of one inside an operation of fnn's (`ops.lstm`), what
    comes out of it is seen.

    Relus that are dead (0 for every example: no gradient reaches their weights) and sigmoids and
    tanhs that are saturated (95 % of the values where the local gradient is under 4 % of its
    greatest) are counted; see `PartStatistics`. (CS231n's notes, neural networks 1 and 3.)

    Args:
        loss: for ONE example, `loss(params, example)`, as for `train_step`. A `mode` that it
            names is EVALUATE.

    Returns:
        A function `(params, batch, *, key=None, model_state=None)` that returns
        `ActivationStatistics`. params may be a training State, for them and the network's state;
        the key is for a loss that takes one. It is compiled once for each shape of batch; what
        the loss reads besides its arguments stays as it was then. All activations of the batch
        and their gradients are in memory at once.

    Raises:
        TypeError, ValueError: (also when called) the arguments aren't such; the loss has no parts,
            and no relu, sigmoid or tanh.
    """
    check_loss("activation_statistics", loss)
    known: dict[Any, tuple[list[_Observed], Callable]] = {}

    def look(
        params: chex.ArrayTree | State,
        batch: Any,
        *,
        key: chex.PRNGKey | None = None,
        model_state: chex.ArrayTree | None = None,
    ) -> ActivationStatistics:
        check_model_state("activation_statistics", loss, model_state)
        params, model_state = params_and_model_state(params, model_state)
        arguments.no_result("activation_statistics", "params", params)
        floats_among("activation_statistics", params, "with a gradient")
        _check_extras(loss, key, model_state)
        model_state = {} if model_state is None else model_state
        batch = as_arrays(batch, "batch")
        size = size_of(batch)
        own = key if extras(loss).needs_key else None
        given = (params, model_state, example_types(batch), own)
        leaves, tree = jax.tree.flatten(given)
        types = (tree, *[(jnp.shape(x), jnp.result_type(x)) for x in leaves])
        if types not in known:
            known[types] = _compiled(loss, given)
        observed, read = known[types]
        keys = None if own is None else jax.random.split(own, size)
        values, gradients = read(params, model_state, batch, keys)
        parts = [
            _statistics(what, np.asarray(y), np.asarray(g))
            for what, y, g in zip(observed, values, gradients, strict=True)
        ]
        return ActivationStatistics(tuple(parts), size)

    return look


def _check_extras(loss: Loss, key: Any, model_state: Any) -> None:
    where, found = "activation_statistics", extras(loss)
    if key is not None:
        arguments.key(where, "key", key)
    if found.needs_key and key is None:
        raise TypeError(f"{where}: the loss takes a key: pass key=...")
    if found.needs_state and model_state is None:
        raise TypeError(
            f"{where}: the loss takes a state: pass the training state in the place of params, or "
            "model_state=..."
        )


# --------------------------------------------------------------------------- what is looked at


class _Observed(NamedTuple):
    """A value of the program: its place there, and what it is called."""

    place: int
    name: str
    operation: str
    kind: str  # "relu", "sigmoid", "tanh" or ""
    shape: tuple[int, ...]


_KINDS = {
    "relu": "relu",
    "relu6": "relu",
    "sigmoid": "sigmoid",
    "logistic": "sigmoid",
    "tanh": "tanh",
}
# They move numbers and make none.
_MOVES = {"reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type", "copy"}


def _compiled(loss: Loss, types: tuple) -> tuple[list[_Observed], Callable]:
    """What is looked at in the loss of one example, and the program that reads it of a batch."""

    def flat_of(leaves: Sequence, tree: Any) -> Program:
        def of_leaves(*leaves):
            params, state, example, key = jax.tree.unflatten(tree, leaves)
            return [call(loss, params, example, key, EVALUATE, state)[0]]

        return written_out(program(trace(of_leaves, leaves)))

    leaves, tree = jax.tree.flatten(types)
    observed = _observed(flat_of(leaves, tree))
    if not observed:
        raise ValueError(
            "activation_statistics: the loss has no parts to look at: no layers, no "
            "jax.named_scope, and no relu, sigmoid or tanh outside of loops."
        )

    @jax.jit
    def read(params, state, batch, keys):
        def of_one(example, key):
            leaves, tree = jax.tree.flatten((params, state, example, key))
            flat = flat_of(leaves, tree)
            trained = len(jax.tree.leaves(params))
            types = [flat.avals[i] for i in flat.inputs]
            needed = [i < trained and is_inexact(t) for i, t in enumerate(types)]
            tape = sweep.forward(flat, leaves, needed, rule_of)
            found = sweep.backward(tape, [jnp.ones_like(tape.outputs[0])])
            values = [tape.values[o.place] for o in observed]
            gradients = [found[o.place] for o in observed]
            zeros = [jnp.zeros_like(y) for y in values]
            pairs = zip(gradients, zeros, strict=True)
            return values, [z if g is None else g for g, z in pairs]

        return jax.vmap(of_one)(batch, keys)

    return observed, read


def _observed(flat: Program) -> list[_Observed]:
    """The results of the parts, and of relus, sigmoids and tanhs, in order."""
    paths, library = _paths(flat)
    made_at = {i: k for k, equation in enumerate(flat.equations) for i in equation.outs}
    read_at: dict[int, list[int]] = {}
    for k, equation in enumerate(flat.equations):
        for i in equation.ins:
            read_at.setdefault(i, []).append(k)
    end = len(flat.equations)
    for i in flat.outputs:
        read_at.setdefault(i, []).append(end)
    names = names_in_source(flat)
    found: dict[int, tuple[str, str]] = {}

    for start, stop in _calls_of_parts(paths):
        inside = flat.equations[start:stop]
        if all(e.name in _MOVES for e in inside):
            continue
        results = [
            i
            for e in inside
            for i in e.outs
            if is_inexact(flat.avals[i]) and any(k >= stop for k in read_at.get(i, ()))
        ]
        for n, i in enumerate(results):
            number = f"[{n}]" if len(results) > 1 else ""
            found[i] = (_joined(paths[start]) + number, "")
    for k, equation in enumerate(flat.equations):
        kind = _kind_of(equation, flat)
        for i in equation.outs:
            if not kind or not is_inexact(flat.avals[i]) or library[k] or _in_function(equation):
                continue
            part = _joined(paths[k])
            own = names.get(i, operation_name(equation))
            name = found[i][0] if i in found else f"{part}: {own}" if part else own
            found[i] = (name, kind)
    taken: dict[str, int] = {}
    observed = []
    for i in sorted(found, key=lambda i: made_at[i]):
        name, kind = found[i]
        taken[name] = taken.get(name, 0) + 1
        if taken[name] > 1:  # a part that is called again
            name = f"{name} ({taken[name]})"
        operation = operation_name(flat.equations[made_at[i]])
        observed.append(_Observed(i, name, operation, kind, tuple(flat.avals[i].shape)))
    return observed


def _joined(path: tuple[str, ...]) -> str:
    """`blocks[3].hidden`."""
    return ".".join(path).replace(".[", "[")


def _kind_of(equation: Any, flat: Program) -> str:
    if equation.name == "max":  # jnp.maximum(x, 0)
        zero = [i for i in equation.ins if _is_zero(flat.constants.get(i))]
        return "relu" if zero else ""
    return _KINDS.get(operation_name(equation), "")


def _in_function(equation: Any) -> bool:
    """Is it inside another function of `jax.nn`'s, as a tanh in gelu?"""
    names = {code.co_name for code, _ in stack(equation.source_info).inside}
    return any(hasattr(jax.nn, name) for name in names - set(_KINDS))


def _is_zero(constant: Any) -> bool:
    return constant is not None and np.ndim(constant) == 0 and float(constant) == 0


def _paths(flat: Program) -> tuple[list[tuple[str, ...]], list[bool]]:
    """For each equation its part's path; and whether a function of JAX's, such as gelu, made it.

    An equation's scope holds the names of jitted functions, too: those are left out.
    """
    dropped: list[set[int]] = [set() for _ in flat.equations]
    library = [False] * len(flat.equations)
    waiting: list[Inlined] = list(flat.calls)
    while waiting:
        one = waiting.pop()
        for k in range(one.start, one.stop):
            if one.name:
                dropped[k].add(len(one.scope) - 1)
            library[k] = library[k] or (one.is_library and one.name not in _KINDS)
        waiting += one.calls
    paths = []
    for equation, without in zip(flat.equations, dropped, strict=True):
        kept = [name for n, name in enumerate(equation.scope) if n not in without]
        paths.append(tuple(filter(None, map(scope_name, kept))))
    return paths, library


def _calls_of_parts(paths: list[tuple[str, ...]]) -> Iterator[tuple[int, int]]:
    """Where the equations of each innermost part begin and end."""
    around = {path[:n] for path in paths for n in range(len(path))}
    start = 0
    while start < len(paths):
        stop = start + 1
        while stop < len(paths) and paths[stop] == paths[start]:
            stop += 1
        if paths[start] and paths[start] not in around:
            yield start, stop
        start = stop


# ---------------------------------------------------------------------------------- statistics


def _statistics(what: _Observed, y: np.ndarray, g: np.ndarray) -> PartStatistics:
    y, g = ((np.abs(x) if np.iscomplexobj(x) else x).astype(np.float64) for x in (y, g))
    good, usable = np.isfinite(y), np.isfinite(g)
    values, gradients = y[good], np.abs(g[usable])
    nonzero = gradients[gradients > 0]
    units = y.reshape(-1, y.shape[-1]) if what.shape else y.reshape(-1, 1)
    dead = saturated = None
    if what.kind == "relu":
        dead = (units == 0).all(axis=0)
    elif what.kind:
        slope = 4 * units * (1 - units) if what.kind == "sigmoid" else 1 - units**2
        saturated = (slope < SATURATED).mean(axis=0) >= MOSTLY
    return PartStatistics(
        what.name,
        what.operation,
        what.shape,
        float(values.mean()) if values.size else float("nan"),
        float(values.std()) if values.size else float("nan"),
        _histogram(values),
        _histogram(np.log10(nonzero)),
        float(np.sqrt(np.mean(np.square(gradients)))) if gradients.size else float("nan"),
        float(np.mean(gradients == 0)) if gradients.size else float("nan"),
        int(y.size - good.sum() + g.size - usable.sum()),
        dead,
        saturated,
    )


def _histogram(values: np.ndarray) -> Histogram:
    if not values.size:
        return Histogram(np.zeros(1, int), np.array([-0.5, 0.5]))
    counts, edges = np.histogram(values, bins=bins_of(values, _BINS))
    return Histogram(counts, edges)

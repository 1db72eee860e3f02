"""Gradient checking: a rule against autodiff, and both against finite differences.

`check_rule` checks an fnn operation, `check_grads` any differentiable JAX function, such as
one with a rule of its own under `jax.custom_vjp`. Both follow the notes of Stanford's CS231n
("Gradient checks", https://cs231n.github.io/neural-networks-3/): central differences in
float64, the relative error

    |a − n| / max(|a|, |n|)

of the analytic a and the numerical n, and care with kinks, where there is no derivative to
agree on: they are found and named, and count neither for nor against the rule.

How it is done. All numbers of the arguments that can move become one vector x, all of the
result one vector y = f(x), and the checks are on

* the gradient of wᵀf by x, for a random w: a number for every entry of the arguments;
* the tangent f′(x) v, for a random direction v: a number for every entry of the result;
* the product H v with the Hessian H of wᵀf, and the second tangent vᵀf″(x) v.

A random w makes every entry of the Jacobian count; a mistake anywhere shows, but for
coincidences of probability zero.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn.operation import Operation

DTYPES = ("float16", "bfloat16", "float32", "float64")

# The entries of a batch under vmap.
_BATCH = 3


@dataclasses.dataclass(frozen=True)
class _Precision:
    """What to ask of a function that computes in float64, or in less.

    exact, numerical: the tolerance against autodiff, and against differences (on top of their
        own estimated error).
    steps: of the differences, tried in this order until the function is smooth within one.
    kink, error: how far differences may disagree, next to the slope, where a function is smooth.
    """

    exact: float
    numerical: float
    steps: tuple[float, ...]
    kink: float
    error: float


_STEPS = (1e-4, 1e-6, 1e-8)
_FINE = _Precision(1e-7, 1e-5, _STEPS, 1e-5, 1e-4)
_COARSE = _Precision(1e-3, 2e-3, (1e-1, 2e-2), 1e-1, 3e-2)


# ---------------------------------------------------------------------------------- the report


@dataclasses.dataclass(frozen=True)
class Kink:
    """A place where the function has no derivative: its slopes to either side differ.

    where: the entry of the arguments, such as `x[0, 3]`.
    left, right: the one-sided differences by it of the sum of the results; not finite at the
        edge of the function's domain.
    rule: what the rule says instead of them.
    """

    where: str
    left: float
    right: float
    rule: float

    def __str__(self):
        left, right = (f"{slope + 0.0:.6g}" for slope in (self.left, self.right))
        return (
            f"kink at {self.where}: slope {left} on the left, {right} on the right; "
            f"the rule says {self.rule:.6g}"
        )


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison of all entries of two arrays.

    what: the quantity, such as "gradient, vmapped".
    against: "autodiff" (of the plain definition), "differences", or what else is the measure.
    order: of the derivative, 0 for values.
    mode: "reverse", "forward", "forward over reverse", ...
    error: the largest relative error over the entries without a kink.
    worst: the entry it occurs at, such as `W[1, 2]`, or "" if there is none.
    rule, reference: the two numbers there.
    tolerance: what the error may be.
    kinks: how many entries were left out.
    skipped: why it was not done, or "".
    """

    what: str
    against: str
    dtype: str
    order: int
    mode: str
    error: float = 0.0
    worst: str = ""
    rule: float = float("nan")
    reference: float = float("nan")
    tolerance: float = 0.0
    kinks: int = 0
    skipped: str = ""
    ok: bool = True

    @property
    def verdict(self) -> str:
        if self.skipped:
            return f"skipped: {self.skipped}"
        kinks = f", {self.kinks} at kinks" if self.kinks else ""
        return ("ok" if self.ok else "WRONG") + kinks


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check_rule` and `check_grads` found; prints as a table, one row a check.

    name: of the function.
    checks: in the order they were made.
    kinks: the places without a derivative.
    notes: what else the reader should know, such as that only a sample was checked.
    """

    name: str
    checks: tuple[Check, ...]
    kinks: tuple[Kink, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def worst(self) -> Check | None:
        """The first wrong check of the lowest order; if none is wrong, that of largest error."""
        wrong = [c for c in self.checks if not c.ok]
        if wrong:
            return min(wrong, key=lambda c: c.order)
        return max(self.checks, key=lambda c: c.error, default=None)

    def __str__(self):
        header = ("", "against", "dtype", "order", "mode", "error", "at", "verdict")
        rows = [header]
        for c in self.checks:
            error = "" if c.skipped else f"{c.error:.1e}"
            order = str(c.order)
            rows.append((c.what, c.against, c.dtype, order, c.mode, error, c.worst, c.verdict))
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        title = f"{self.name}: {'all checks pass' if self.ok else 'WRONG'}"
        rule = "─" * max(map(len, lines))
        below = [str(k) for k in self.kinks[:10]]
        if len(self.kinks) > 10:
            below.append(f"... and {len(self.kinks) - 10} more kinks")
        return "\n".join([title, lines[0], rule, *lines[1:], *below, *self.notes])


class GradientError(AssertionError):
    """A derivative is wrong. `check` is the worst comparison, `report` holds them all."""

    def __init__(self, report: Report):
        c = report.worst
        assert c is not None  # an empty report holds nothing wrong
        self.report, self.check = report, c
        super().__init__(
            f"{report.name}: the {c.what} ({c.mode}, order {c.order}, {c.dtype}) is wrong. At "
            f"{c.worst} it is {c.rule:.9g} but should be {c.reference:.9g} by {c.against} "
            f"(relative error {c.error:.2g}, tolerance {c.tolerance:.2g}).\n\n{report}"
        )


# ------------------------------------------------------------------------- the two public functions


def check_rule(
    op: Operation,
    *args: Any,
    dtypes: Sequence[str] = DTYPES,
    order: int = 2,
    seed: int = 0,
    max_entries: int = 256,
    raise_on_error: bool = True,
    **static: Any,
) -> Report:
    """Check an operation's hand-written rule at these arguments.

    The rule is compared with JAX's derivative of the plain `op.definition` and with central
    differences of it in float64: reverse and forward mode, first and second order, with and
    without jit, under vmap with arguments mapped and shared, linearity in the upstream
    gradient, and in each of `dtypes` against float64. It doesn't matter whether 64-bit mode
    is on.

    Args:
        op: the operation, made by `fnn.rule`.
        *args: its positional arguments, pytrees of arrays of any shapes; floating-point and
            complex arrays move (they are cast to each dtype in turn), integers and PRNG keys
            stay.
        dtypes: the real dtypes to check; float64 is always checked. A dtype that the definition
            refuses is skipped.
        order: of the highest derivative, 1 or 2.
        seed: of the random projections.
        max_entries: with more entries than that, differences by single entries are taken at a
            random sample of that many (and always where rule and autodiff differ most); along a
            random direction, they cover all of them.
        raise_on_error: if False, return the report whatever it says.
        **static: the operation's static keyword arguments.

    Returns:
        A `Report`; print it.

    Raises:
        GradientError: a derivative is wrong; the message holds the worst entry's index and
            both numbers.
        RuleError: the rule isn't well-formed.
        ValueError: no argument is a floating-point array.

    >>> import fnn
    >>> print(fnn.check_rule(fnn.ops.relu, jnp.array([-1.0, 0.0, 2.0])).kinks[0])
    kink at x[1]: slope 0 on the left, 1 on the right; the rule says 0
    """
    if not isinstance(op, Operation):
        raise TypeError(
            f"check_rule takes an operation made by fnn.rule, but got {op!r}. For any other "
            "function there is check_grads."
        )
    bound = inspect.signature(op.definition).bind(*args, **static)
    bound.apply_defaults()
    names = op.argument_names(len(bound.args))
    keywords = tuple(bound.kwargs.items())
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, bound.args)
        ours, leaves = _flatten(op, keywords, names, arrays)
        plain = dataclasses.replace(ours, function=op.definition)
        programs = _cached_programs(ours, plain, op._edition)
        inspection = _Inspection(programs, op.name, leaves, seed, max_entries)
        report = inspection.report(dtypes, order)
    return _finish(report, raise_on_error)


def check_grads(
    f: Callable,
    *args: Any,
    dtypes: Sequence[str] = ("float32", "float64"),
    order: int = 2,
    seed: int = 0,
    max_entries: int = 256,
    raise_on_error: bool = True,
) -> Report:
    """Check the derivatives that JAX finds for any function, at these arguments.

    For functions with derivative rules of their own (`jax.custom_vjp`, `jax.custom_jvp`, fnn
    operations) or built from such. They are compared with central differences in float64, and,
    if `f` itself is such a function, with JAX's derivative of what it decorates. A mode that
    JAX can't do (forward mode of a `custom_vjp`) is skipped, and the report says why.

    Args:
        f: any function that can be jitted and differentiated.
        *args: its arguments, pytrees. Floating-point and complex arrays (and Python floats)
            move; all else stays: integer arrays, PRNG keys, strings, Python integers, ...
        dtypes, order, seed, max_entries, raise_on_error: as for `check_rule`.

    Returns:
        A `Report`; print it.

    Raises:
        GradientError: a derivative is wrong; the message holds the worst entry's index and
            both numbers.
        ValueError: no argument is a floating-point array.
    """
    static_places = tuple(getattr(f, "nondiff_argnums", ()) or ())
    names = _parameter_names(f, len(args))
    with jax.enable_x64(True):
        ours, leaves = _flatten(f, (), names, args, static_places)
        plain = None
        if isinstance(f, Operation):
            plain = dataclasses.replace(ours, function=f.definition)
        elif isinstance(f, (jax.custom_vjp, jax.custom_jvp)):
            plain = dataclasses.replace(ours, function=inspect.unwrap(f))
        programs = _Programs(ours, plain)
        name = getattr(f, "__name__", type(f).__name__)
        report = _Inspection(programs, name, leaves, seed, max_entries).report(dtypes, order)
    return _finish(report, raise_on_error)


def _finish(report: Report, raise_on_error: bool) -> Report:
    if raise_on_error and not report.ok:
        raise GradientError(report)
    return report


def _parameter_names(f, count) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in positional][:count]
    return (*names, *(f"argument {i}" for i in range(len(names), count)))


# ------------------------------------------------------------ a function of pytrees, of one vector


@dataclasses.dataclass(frozen=True)
class _Static:
    """A leaf that isn't an array: equal only to one of the same type."""

    value: Any

    def __eq__(self, other):
        same_type = isinstance(other, _Static) and type(self.value) is type(other.value)
        return same_type and self.value == other.value

    def __hash__(self):
        try:
            return hash((type(self.value), self.value))
        except TypeError:
            return id(self.value)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One leaf of the arguments. A complex one moves in its real and in its imaginary part."""

    path: str
    argument: str
    shape: tuple[int, ...]
    moves: bool
    is_complex: bool
    static: _Static | None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape)) * (1 + self.is_complex) if self.moves else 0


@dataclasses.dataclass(frozen=True)
class _Flat:
    """A function with its arguments as parts: one vector for each argument that moves."""

    function: Callable
    keywords: tuple[tuple[str, Any], ...]
    keyword_types: tuple[type, ...]
    in_tree: Any
    leaves: tuple[_Leaf, ...]

    @property
    def arguments(self) -> list[str]:
        """The names of those that move; x has a part for each."""
        return list(dict.fromkeys(leaf.argument for leaf in self.leaves if leaf.moves))

    @property
    def sizes(self) -> list[int]:
        """Of the parts."""
        return [sum(x.size for x in self.leaves if x.argument == a) for a in self.arguments]

    def split(self, x, axis=0) -> list:
        return jnp.split(x, np.cumsum(self.sizes)[:-1], axis)

    def value(self, parts, fixed):
        """The result as it is, with parts and fixed arrays put back into the arguments."""
        rest = jnp.concatenate(parts) if parts else jnp.zeros(0)
        given, args, start = iter(fixed), [], 0
        for leaf in self.leaves:
            if leaf.static is not None:
                args.append(leaf.static.value)
            elif not leaf.moves:
                args.append(next(given))
            else:
                numbers = rest[start : start + leaf.size]
                start += leaf.size
                if leaf.is_complex:
                    numbers = lax.complex(*jnp.split(numbers, 2))
                args.append(numbers.reshape(leaf.shape))
        return self.function(*jax.tree.unflatten(self.in_tree, args), **dict(self.keywords))

    def of_parts(self, parts, fixed):
        """The result as one vector of its real numbers."""
        outs = [jnp.asarray(y) for y in jax.tree.leaves(self.value(parts, fixed))]
        numbers = []
        for y in outs:
            if jnp.issubdtype(y.dtype, jnp.complexfloating):
                numbers += [jnp.real(y).ravel(), jnp.imag(y).ravel()]
            elif jnp.issubdtype(y.dtype, jnp.floating):
                numbers.append(y.ravel())
        return jnp.concatenate(numbers) if numbers else jnp.zeros(0)

    def __call__(self, x, fixed):
        return self.of_parts(self.split(x), fixed)

    def input_names(self) -> list[str]:
        return [n for leaf in self.leaves if leaf.moves for n in _entries(leaf.path, leaf)]


def _entries(path, leaf) -> list[str]:
    """A name for each number of an array: `x[0, 3]`."""
    places = [f"{list(map(int, i))}" if i else "" for i in np.ndindex(*leaf.shape)]
    if leaf.is_complex:
        return [f"{path}{p}.{part}" for part in ("real", "imag") for p in places]
    return [f"{path}{p}" for p in places]


def _flatten(function, keywords, names, args, static_places=()) -> tuple[_Flat, list]:
    """The function of one vector, and the arrays: numpy float64 or complex128 where they move."""
    paths, in_tree = jax.tree_util.tree_flatten_with_path(args)
    leaves, arrays = [], []
    for path, value in paths:
        place = path[0].idx
        label = names[place] + jax.tree_util.keystr(path[1:])
        is_static = place in static_places or not _is_array(value)
        aval = jax.typeof(0 if is_static else value)
        moves = bool(jax.dtypes.issubdtype(aval.dtype, jnp.inexact))
        is_complex = bool(jax.dtypes.issubdtype(aval.dtype, jnp.complexfloating))
        shape = tuple(aval.shape)
        static = _Static(value) if is_static else None
        leaves.append(_Leaf(label, names[place], shape, moves, is_complex, static))
        if moves:
            value = np.asarray(value)
            arrays.append(value.astype("complex128" if is_complex else "float64"))
        elif not is_static:
            arrays.append(value)
    if not any(leaf.moves for leaf in leaves):
        raise ValueError("there is nothing to differentiate: no argument is a floating-point array")
    types = tuple(type(v) for _, v in keywords)
    return _Flat(function, keywords, types, in_tree, tuple(leaves)), arrays


def _is_array(value) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, np.generic, float, complex))


def _numbers(flat: _Flat, arrays) -> tuple[np.ndarray, list]:
    """The vector x, and the arrays that stay."""
    given = [leaf for leaf in flat.leaves if leaf.static is None]
    moving, fixed = [], []
    for leaf, array in zip(given, arrays, strict=True):
        if not leaf.moves:
            fixed.append(array)
        elif leaf.is_complex:
            moving += [array.real.ravel(), array.imag.ravel()]
        else:
            moving.append(array.ravel())
    return np.concatenate(moving), fixed


# ------------------------------------------------------------------------------ what is computed


def _gradient(f, x, fixed, w):
    return jax.vjp(lambda x: f(x, fixed), x)[1](w)[0]


def _tangent(f, x, fixed, v):
    return jax.jvp(lambda x: f(x, fixed), (x,), (v,))[1]


def _projected(f, fixed, w):
    return lambda x: jnp.vdot(w, f(x, fixed))


# Each mode's derivative of f, at x, projected on w or v.
_FIRST: dict[str, Callable] = {
    "reverse": lambda f, x, fixed, w, v: _gradient(f, x, fixed, w),
    "forward": lambda f, x, fixed, w, v: _tangent(f, x, fixed, v),
}
_SECOND: dict[str, Callable] = {
    "forward over reverse": lambda f, x, fixed, w, v: jax.jvp(
        lambda x: _gradient(f, x, fixed, w), (x,), (v,)
    )[1],
    "reverse over reverse": lambda f, x, fixed, w, v: jax.grad(
        lambda x: jnp.vdot(v, jax.grad(_projected(f, fixed, w))(x))
    )(x),
    "reverse over forward": lambda f, x, fixed, w, v: jax.grad(
        lambda x: jax.jvp(_projected(f, fixed, w), (x,), (v,))[1]
    )(x),
    "forward over forward": lambda f, x, fixed, w, v: jax.jvp(
        lambda x: _tangent(f, x, fixed, v), (x,), (v,)
    )[1],
}
_MODES = {**_FIRST, **_SECOND}
_WHAT = {
    "reverse": "gradient",
    "forward": "tangent",
    "forward over reverse": "Hessian times v",
    "reverse over reverse": "Hessian times v",
    "reverse over forward": "Hessian times v",
    "forward over forward": "second tangent",
}


# Compiled once, run a few times: XLA needn't optimise much.
_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


class _Programs:
    """The compiled functions of a check, kept for the next one at the same shapes."""

    def __init__(self, ours: _Flat, plain: _Flat | None):
        self.ours, self.plain = ours, plain
        self.reference = ours if plain is None else plain
        self.value = _jit(self.reference)
        self.derivatives = _jit(self._derivatives, static_argnames="modes")
        self.narrow = _jit(self._narrow, static_argnames="modes")
        self.vmapped = _jit(self._vmapped, static_argnames="modes")
        self.by_entry = _jit(self._by_entry)
        self.along = _jit(self._along, static_argnames="of")

    def unavailable(self, mode, *at) -> str:
        """Why JAX can't do this mode, or "" if it can."""
        derivative = functools.partial(_MODES[mode], self.ours)
        try:
            if isinstance(self.ours.function, Operation):
                jax.eval_shape(derivative, *at)
            else:  # JAX finds out about custom_vjp only here
                jax.jit(derivative).lower(*at)
        except Exception as error:
            message = str(error)
            if "custom_vjp" in message and "forward-mode" in message or "custom_lin" in message:
                return "a custom_vjp has no forward mode"
            if "Reverse-mode differentiation does not work" in message:
                return "a while loop has no reverse mode"
            if isinstance(error, NotImplementedError):
                return message.splitlines()[0]
            raise
        return ""

    def _derivatives(self, x, fixed, w, v, *, modes):
        """Ours, and those of the plain definition."""
        ours, plain = (
            {} if f is None else {m: _MODES[m](f, x, fixed, w, v) for m in modes}
            for f in (self.ours, self.plain)
        )
        ours["value"] = self.ours(x, fixed)
        if "reverse" in modes:
            # The value by `forward`, and the backward b at several upstream gradients.
            ours["value, differentiated"], pull = jax.vjp(lambda x: self.ours(x, fixed), x)
            z = w * jnp.sin(jnp.arange(w.size, dtype=w.dtype) + 1)
            ours["b(w + 30z)"] = pull(w + 30 * z)[0]
            ours["b(w) + 30 b(z)"] = pull(w)[0] + 30 * pull(z)[0]
            ours["b(0)"] = pull(jnp.zeros_like(w))[0]
        return ours, plain

    def _narrow(self, points, fixed, *, modes):
        """First derivatives at (x, w, v) of several dtypes: ours, the reference's, and exact."""

        def first(f, x, w, v):
            cast = lambda x, fixed: f(x, fixed).astype(x.dtype)
            return {m: _MODES[m](cast, x, fixed, w, v) for m in modes}

        def wide(a):
            return a.astype("float64")

        return [
            (
                first(self.ours, *at),
                first(self.reference, *at),
                first(self.reference, *map(wide, at)),
            )
            for at in points
        ]

    def _vmapped(self, X, fixed, W, V, *, modes):
        """A batch by vmap, and one by one: all arguments mapped, and then one shared."""
        f, reference = self.ours, self.reference

        def one_by_one(X, mode):
            return lax.map(lambda a: _MODES[mode](reference, a[0], fixed, a[1], a[2]), (X, W, V))

        copies = jax.tree.map(lambda a: jnp.stack([a] * _BATCH), fixed)
        mapped = {
            m: (jax.vmap(functools.partial(_MODES[m], f))(X, copies, W, V), one_by_one(X, m))
            for m in modes
        }
        shared = {}
        for i, argument in enumerate(f.arguments):
            if "reverse" not in modes or len(f.arguments) == 1:
                break
            columns = f.split(X, axis=1)
            repeated = [jnp.stack([c[0]] * _BATCH) if k == i else c for k, c in enumerate(columns)]
            columns[i] = columns[i][0]
            axes = [None if k == i else 0 for k in range(len(columns))]

            def total(columns, axes=axes):
                return jnp.vdot(W, jax.vmap(f.of_parts, (axes, None))(columns, fixed))

            alone = f.split(one_by_one(jnp.concatenate(repeated, axis=1), "reverse"), axis=1)
            alone[i] = alone[i].sum(axis=0)
            found = jax.grad(total)(columns)
            shared[argument] = [
                jnp.concatenate([g.ravel() for g in part]) for part in (found, alone)
            ]
        return mapped, shared

    def _by_entry(self, x, fixed, w, entries, step):
        """Differences of wᵀf by single entries of x."""

        def changes(entry):
            direction = jnp.zeros_like(x).at[entry].set(_unit(x[entry]))
            return _changes(lambda t: self.reference(x + t * direction, fixed), step, w)

        return lax.map(changes, entries)

    def _along(self, x, fixed, w, v, step, *, of):
        """Differences in direction v: of f, or of our own derivative by a first-order mode."""

        def moved(t):
            if of == "value":
                return self.reference(x + t * v, fixed)
            return _MODES[of](self.ours, x + t * v, fixed, w, v)

        return _changes(moved, step)


@functools.lru_cache(maxsize=256)
def _cached_programs(ours, plain, edition) -> _Programs:
    return _Programs(ours, plain)


def _unit(x):
    """The unit of the steps: 1, but more where x is so large that 1e-4 would drown in it."""
    return 1.0 + 1e-4 * abs(x)


# The points of the differences, in steps; _STEPS[0] itself is added to these.
_POINTS = np.array([1, -1, 1 / 2, -1 / 2, 1 / 4, -1 / 4])


def _changes(f, step, w=None):
    """f(t) − f(0) at the points t, or wᵀ of it; and the size of the numbers it is a difference of.

    Entries that aren't finite at 0 are left out, and so are those that never change.
    """
    middle = f(0.0)
    around = lax.map(f, jnp.concatenate([step * _POINTS, jnp.array([_STEPS[0]])]))
    usable = jnp.isfinite(middle)
    changes = jnp.where(usable, around - middle, 0.0)
    size = jnp.where(usable & jnp.any(changes != 0, axis=0), jnp.abs(middle), 0.0)
    if w is None:
        return changes, size
    return changes @ w, size @ jnp.abs(w)


def _slopes(changes, size, step, eps):
    """The slopes at 0, and what tells how far to trust them.

    Central differences at h, h/2 and h/4. Their extrapolation is the slope, their disagreement
    its error. Where f is smooth, the slope on the right less that on the left shrinks in
    proportion to h; at a kink it doesn't.

    Returns slope, error, error by rounding, kink (by how much it doesn't shrink), left slope,
    right slope.
    """
    slopes = changes[:6] / (step * _POINTS.reshape(6, *[1] * (changes.ndim - 1)))
    right, left = slopes[0::2], slopes[1::2]
    central, bend = (right + left) / 2, right - left
    error = abs(central[1] - central[0]) + abs(central[2] - central[1])
    kink = np.maximum(abs(bend[0] - 2 * bend[1]), abs(bend[1] - 2 * bend[2]))
    rounding = 16 * eps * size / step
    return (4 * central[2] - central[1]) / 3, error, rounding, kink, left[2], right[2]


@dataclasses.dataclass
class _Differences:
    """Numerical slopes at some entries; `smooth` says where there is one."""

    entries: np.ndarray
    slope: np.ndarray
    error: np.ndarray
    left: np.ndarray
    right: np.ndarray
    smooth: np.ndarray


def _differences(
    at_step: Callable, entries, precision: _Precision, eps: float, inside: float, unit: Any = 1.0
) -> _Differences:
    """With smaller and smaller steps, until the function is smooth within one.

    at_step: gives the changes and their size at a step.
    inside: the size of the numbers that the function computes with, whatever its result's is.
    unit: what the steps are multiplied with.
    """
    if not entries.size:
        nothing = np.zeros(0)
        return _Differences(entries, nothing, nothing, nothing, nothing, nothing.astype(bool))
    best: list[np.ndarray] = []
    for step in precision.steps:
        changes, size = (np.asarray(n, "float64") for n in at_step(step))
        with np.errstate(invalid="ignore", over="ignore"):
            numbers = [n / unit for n in _slopes(changes, size + inside, step, eps)]
        slope, error, rounding, kink, left, right = numbers
        known = np.abs(slope[np.isfinite(slope)])
        size = np.maximum(np.abs(slope), 1e-3 * known.max(initial=0.0) + 1e-6)
        with np.errstate(invalid="ignore"):
            smooth = np.isfinite(slope) & (kink <= precision.kink * size + 4 * rounding)
            smooth &= error <= precision.error * size + 4 * rounding
            # A smaller step helps only where it isn't lost in rounding.
            smooth &= (step == precision.steps[0]) | (rounding <= 1e-2 * size)
        found = [slope, error + rounding, left, right, smooth]
        done = best[-1] if best else np.zeros_like(smooth)
        best = [np.where(done, old, new) for old, new in zip(best or found, found, strict=True)]
        if best[-1].all():
            break
    return _Differences(entries, *best)


# ------------------------------------------------------------------------------------ the checks


class _Inspection:
    """All checks of one function at one point; each method below `report` adds rows to it."""

    def __init__(self, programs: _Programs, name: str, arrays, seed: int, max_entries: int):
        self.programs, self.name, self.max_entries = programs, name, max_entries
        self.random = np.random.default_rng(seed)
        self.x, self.fixed = _numbers(programs.ours, arrays)
        self.value = np.asarray(programs.value(self.x, self.fixed))
        w = self.random.normal(size=self.value.shape)
        w = np.where(np.isfinite(self.value.astype("float64")), w, 0.0)
        self.w = w.astype(self.value.dtype)
        self.v = self.random.normal(size=self.x.shape)
        self.rows: list[Check] = []
        self.kinks: list[Kink] = []
        self.notes: list[str] = []
        self.precision = _FINE
        if self.value.dtype != np.float64:
            self.precision = _COARSE
            self.notes.append(
                f"{name} computes in {self.value.dtype} on float64 arguments: tolerances are wide"
            )
        inputs, outputs = programs.ours.input_names(), _output_names(programs, self.x, self.fixed)
        by_result = ("forward", "forward over forward")
        self.names = {m: outputs if m in by_result else inputs for m in _MODES}
        self.kinked = {m: np.zeros(len(self.names[m]), bool) for m in _MODES}
        self.along: dict[str, _Differences] = {}

    @property
    def at(self):
        return self.x, self.fixed, self.w, self.v

    def report(self, dtypes: Sequence[str], order: int) -> Report:
        modes = [*_FIRST, *(_SECOND if order > 1 else ())]
        why_not = {m: self.programs.unavailable(m, *self.at) for m in modes}
        able = tuple(m for m in modes if not why_not[m])
        found, plain = self.programs.derivatives(*self.at, modes=able)
        if self.programs.plain is not None:
            for what in ("value", "value, differentiated"):
                if what in found:
                    self.compare(
                        "forward", "definition", found[what], self.value, what=what, order=0
                    )
        for mode in modes:
            if why_not[mode]:
                self.skip(mode, why_not[mode])
                continue
            differences = self.differences(mode, able, found, plain)
            if differences is not None:
                self.kinked[mode][differences.entries] = ~differences.smooth
            if mode in plain:
                skip = self.kinked[mode]
                self.compare(mode, "autodiff", found[mode], plain[mode], skip=skip)
            if differences is not None:
                self.against_differences(mode, np.asarray(found[mode]), differences)
            if mode == "reverse":
                self.linearity(found)
        first = tuple(m for m in able if m in _FIRST)
        self.op_by_op(first, found)
        self.vmapped(first)
        self.in_dtypes([dtype for dtype in dtypes if dtype != "float64"], first)
        return Report(self.name, tuple(self.rows), tuple(self.kinks), tuple(self.notes))

    def compare(
        self,
        mode: str,
        against: str,
        rule,
        reference,
        *,
        what: str = "",
        dtype: str = "float64",
        order: int | None = None,
        names: Sequence[str] | None = None,
        skip: Any = False,
        uncertainty: Any = 0.0,
        tolerance: float | None = None,
        floor: tuple[float, float] = (1e-4, 1e-8),
    ) -> None:
        """Compare all entries but those to `skip`.

        The relative error's denominator is at least floor[0] times the largest entry, plus
        floor[1]: nothing can be asked of an entry that is small because large terms cancel in
        it.
        """
        rule, reference = np.array(rule, "float64"), np.array(reference, "float64")
        names = self.names[mode] if names is None else names
        tolerance = self.precision.exact if tolerance is None else tolerance
        skip = np.broadcast_to(skip, rule.shape)
        same = (rule == reference) | (np.isnan(rule) & np.isnan(reference))
        largest = np.abs(reference[np.isfinite(reference)]).max(initial=0.0)
        with np.errstate(invalid="ignore", over="ignore"):
            size = np.maximum(np.abs(rule), np.abs(reference))
            size = np.maximum(size, floor[0] * largest + floor[1])
            error = np.abs(rule - reference) / size
            allowed = tolerance + uncertainty / size
        error = np.where(same, 0.0, np.nan_to_num(error, nan=np.inf))
        wrong = ~(error <= allowed) & ~skip
        error = np.where(skip | (wrong.any() & ~wrong), 0.0, error)
        worst = int(np.argmax(error)) if error.size else None
        self.rows.append(
            Check(
                what or _WHAT[mode],
                against,
                dtype,
                1 + (mode in _SECOND) if order is None else order,
                "" if order == 0 else mode,
                0.0 if worst is None else float(error[worst]),
                "" if worst is None or error[worst] == 0 else names[worst],
                float("nan") if worst is None else float(rule[worst]),
                float("nan") if worst is None else float(reference[worst]),
                tolerance,
                int(np.sum(skip)),
                ok=not wrong.any(),
            )
        )

    def skip(self, mode: str, why: str, dtype: str = "float64") -> None:
        order = 1 + (mode in _SECOND)
        self.rows.append(Check(_WHAT[mode], "", dtype, order, mode, skipped=why))

    def differences(self, mode, able, found, plain) -> _Differences | None:
        """Of f for a first derivative, of our own first derivative for a second."""
        x, fixed, w, v = self.at
        eps = float(jnp.finfo(self.value.dtype).eps)
        largest = float(np.abs(x).max(initial=1.0))
        if mode == "reverse":
            sample = self.sample(np.asarray(found[mode]), plain.get(mode))
            changes, inside = self.by_entry(w, sample), min(largest, 1e3)
            return _differences(changes, sample, self.precision, eps, inside, _unit(x[sample]))
        of = {"forward": "value", "forward over forward": "forward"}.get(mode, "reverse")
        if of != "value" and of not in able:
            return None
        if of not in self.along:
            self.along[of] = _differences(
                lambda step: self.programs.along(x, fixed, w, v, step, of=of),
                np.arange(len(self.names[mode])),
                self.precision,
                eps,
                largest,
            )
        return self.along[of]

    def by_entry(self, w, entries) -> Callable:
        def at_step(step):
            changes, size = self.programs.by_entry(self.x, self.fixed, w, entries, step)
            return np.asarray(changes).T, size

        return at_step

    def sample(self, rule, plain) -> np.ndarray:
        """The entries whose differences to take: all, or some and the most suspicious."""
        if rule.size <= self.max_entries:
            return np.arange(rule.size)
        chosen = self.random.permutation(rule.size)
        if plain is not None:
            off = np.nan_to_num(np.abs(rule - np.asarray(plain)), nan=np.inf)
            suspicious = np.argsort(off)[::-1][: self.max_entries // 4]
            chosen = np.concatenate([suspicious, chosen[~np.isin(chosen, suspicious)]])
        self.notes.append(
            f"differences by single entries: at {self.max_entries} of {rule.size} entries, chosen "
            "at random; differences in a direction, and autodiff: at all"
        )
        return np.sort(chosen[: self.max_entries])

    def against_differences(self, mode, rule, d: _Differences) -> None:
        rule = rule[d.entries]
        names = [self.names[mode][i] for i in d.entries]
        self.compare(
            mode,
            "differences",
            rule,
            d.slope,
            names=names,
            skip=~d.smooth,
            uncertainty=2 * d.error,
            tolerance=self.precision.numerical,
        )
        if mode != "reverse" or d.smooth.all():
            return
        # At a kink, any number from the one slope to the other is right.
        low, high = np.minimum(d.left, d.right), np.maximum(d.left, d.right)
        kinks = np.flatnonzero(~d.smooth & np.isfinite(low + high))
        self.compare(
            mode,
            "slopes at kinks",
            rule[kinks],
            np.clip(rule, low, high)[kinks],
            names=[names[i] for i in kinks],
            tolerance=1e-3,
        )
        self.name_kinks(d.entries[~d.smooth])

    def name_kinks(self, entries) -> None:
        """For the reader, in terms of the sum of the results instead of a random projection."""
        ones, step = np.ones_like(self.w), self.precision.steps[-1]
        changes, size = self.by_entry(ones, entries)(step)
        *_, left, right = _slopes(changes, np.asarray(size), step, 0.0) / _unit(self.x[entries])
        at = (self.x, self.fixed, ones, self.v)
        rule = self.programs.derivatives(*at, modes=("reverse",))[0]["reverse"]
        for i, a, b in zip(entries, left, right, strict=True):
            place = self.names["reverse"][i]
            self.kinks.append(Kink(place, float(a), float(b), float(rule[i])))

    def linearity(self, found) -> None:
        """Of the backward b in the upstream gradient."""
        for what, against in (("b(w + 30z)", "b(w) + 30 b(z)"), ("b(0)", "zero")):
            reference = found.get(against, np.zeros_like(self.x))
            skip = self.kinked["reverse"]
            self.compare("reverse", against, found[what], reference, what=what, skip=skip)

    def op_by_op(self, modes, found) -> None:
        """Without jit around."""
        for mode in modes:
            rule = _MODES[mode](self.programs.ours, jnp.asarray(self.x), *self.at[1:])
            what, skip = f"{_WHAT[mode]}, op by op", self.kinked[mode]
            self.compare(mode, "jitted", rule, found[mode], what=what, skip=skip)

    def vmapped(self, modes) -> None:
        """A batch of points nearby, each with its own w and v."""
        X = self.x * (1 - 1e-3 * np.arange(_BATCH)[:, None])
        W = (self.w * self.random.normal(size=(_BATCH, 1))).astype(self.w.dtype)
        V = self.random.normal(size=X.shape)

        def each(names):
            return [f"{name} of example {i}" for i in range(_BATCH) for name in names]

        mapped, shared = self.programs.vmapped(X, self.fixed, W, V, modes=modes)
        for mode, (rule, alone) in mapped.items():
            self.compare(
                mode,
                "one by one",
                np.ravel(rule),
                np.ravel(alone),
                what=f"{_WHAT[mode]}, vmapped",
                names=each(self.names[mode]),
                skip=np.tile(self.kinked[mode], _BATCH),
            )
        ends = np.cumsum(self.programs.ours.sizes)
        for argument, (rule, alone) in shared.items():
            names: list[str] = []
            skip = []
            for part, end, size in zip(
                self.programs.ours.arguments, ends, self.programs.ours.sizes, strict=True
            ):
                here = self.names["reverse"][end - size : end]
                kinked = self.kinked["reverse"][end - size : end]
                names += here if part == argument else each(here)
                skip.append(kinked if part == argument else np.tile(kinked, _BATCH))
            self.compare(
                "reverse",
                "one by one",
                rule,
                alone,
                what=f"gradient, vmapped, {argument} shared",
                names=names,
                skip=np.concatenate(skip),
            )

    def in_dtypes(self, dtypes, modes) -> None:
        """First derivatives in narrower dtypes, against float64 at the same (rounded) point."""
        if any(leaf.is_complex for leaf in self.programs.ours.leaves):
            for dtype in dtypes:
                for mode in modes:
                    if dtype != "float32":
                        self.skip(mode, f"JAX has no complex {dtype}", dtype)
            dtypes = [dtype for dtype in dtypes if dtype == "float32"]
        points = {
            dtype: [np.asarray(a).astype(jnp.dtype(dtype)) for a in (self.x, self.w, self.v)]
            for dtype in dtypes
        }
        for dtype, (x, *_) in list(points.items()):
            try:
                jax.jit(self.programs.reference).lower(x, self.fixed)
            except Exception as error:  # whatever the definition raises
                why_not = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                for mode in modes:
                    self.skip(mode, why_not, dtype)
                del points[dtype]
        found = self.programs.narrow(list(points.values()), self.fixed, modes=modes)
        for dtype, numbers in zip(points, found, strict=True):
            for mode in modes:
                rule, plain, exact = (np.array(n[mode], "float64") for n in numbers)
                self.in_dtype(dtype, mode, rule, plain, exact)

    def in_dtype(self, dtype, mode, rule, plain, exact) -> None:
        # w and v are about 1, and so are the terms that cancel in a smaller number.
        floor = (1.0, 0.1)
        # Not where the true number is too large for the dtype.
        skip = self.kinked[mode] | ~(np.abs(exact) < float(jnp.finfo(dtype).max))
        tolerance = max(64 * float(jnp.finfo(dtype).eps), self.precision.exact)
        if self.programs.plain is not None:
            # No more can be asked than of autodiff in this dtype.
            skip |= ~np.isfinite(plain)
            off = np.abs(plain - exact)[~skip].max(initial=0.0)
            size = np.abs(exact)[~skip].max(initial=0.0) + floor[1]
            tolerance = max(tolerance, 8 * float(off / size))
        options = {"dtype": dtype, "skip": skip, "tolerance": tolerance, "floor": floor}
        self.compare(mode, "float64", rule, exact, **options)


def _output_names(programs, x, fixed) -> list[str]:
    parts = programs.ours.split(jnp.asarray(x))
    result = jax.eval_shape(programs.reference.value, parts, fixed)
    names = []
    for path, y in jax.tree_util.tree_flatten_with_path(result)[0]:
        if jax.dtypes.issubdtype(y.dtype, jnp.inexact):
            is_complex = bool(jnp.issubdtype(y.dtype, jnp.complexfloating))
            label = "result" + jax.tree_util.keystr(path)
            names += _entries(label, _Leaf(label, label, tuple(y.shape), True, is_complex, None))
    return names

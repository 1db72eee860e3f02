"""Gradient checking: a rule against autodiff, and both against finite differences.

The lecture's method (CS231n, "Neural Networks Part 3: gradient checks"): compare the
analytic gradient with the central difference (f(x + h) − f(x − h)) / 2h in double
precision, by the relative error |a − n| / max(|a|, |n|). Where the function has a kink
between x − h and x + h, as relu has at 0, a central difference means nothing; the slopes on
the two sides then differ, which is how a kink is found. It is named in the report, and the
gradient there is held to lie between the two slopes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.operation import Operation

# Relative errors that rounding explains, by dtype. Finite differences lose half the digits.
TOLERANCE = {"float64": 1e-7, "float32": 1e-3, "bfloat16": 1e-1, "float16": 2e-2}
_H = 1e-5
_FLOOR = 1e-4  # entries smaller than this part of the largest are compared absolutely


class GradientError(AssertionError):
    """A gradient is wrong: the message says where and by how much; `report` has all checks."""

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: what was compared with what, and the entry where they differ most.

    Attributes:
        what: the two things compared.
        order: of the derivative, 1 or 2.
        mode: "reverse", "forward", or which over which.
        dtype: in which the checked side was computed.
        error: the largest relative error.
        where: the entry of that error, e.g. "W[2, 0]".
        got, wanted: the two numbers there.
        verdict: "ok", "WRONG", or why it was skipped.
    """

    what: str
    order: int
    mode: str
    dtype: str
    error: float
    where: str
    got: complex
    wanted: complex
    verdict: str


@dataclasses.dataclass(frozen=True)
class Kink:
    """Where the function has a kink: the slopes on both sides and the gradient given there."""

    where: str
    left: float
    right: float
    given: float

    def __str__(self):
        return (
            f"kink at {self.where}: slope {self.left:.4g} on the left, {self.right:.4g} on the "
            f"right, the gradient given is {self.given:.4g}"
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """All checks of one function; prints as a table.

    Attributes:
        name: the function's.
        rows: the comparisons.
        kinks: where the function has a kink at the arguments given.
    """

    name: str
    rows: tuple[Row, ...]
    kinks: tuple[Kink, ...]

    @property
    def ok(self) -> bool:
        return all(row.verdict != "WRONG" for row in self.rows)

    @property
    def worst(self) -> Row:
        """The wrong row with the largest error; the row with the largest error if none is."""
        wrong = [row for row in self.rows if row.verdict == "WRONG"]
        return max(wrong or self.rows, key=lambda row: row.error)

    def __str__(self):
        head = ("check", "order", "mode", "dtype", "max rel. error", "at", "verdict")
        table = [head] + [
            (
                row.what,
                str(row.order),
                row.mode,
                row.dtype,
                f"{row.error:.1e}" if row.error >= 0 else "",
                row.where,
                row.verdict,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in table]
        lines.insert(1, "  ".join("─" * w for w in widths))
        title = f"{self.name}: {'ok' if self.ok else 'WRONG'}"
        return "\n".join(line.rstrip() for line in [title, *lines, *map(str, self.kinks)])


def check_rule(
    operation: Operation,
    *args: Any,
    dtypes: Sequence[str] = ("float64", "float32", "bfloat16", "float16"),
    order: int = 2,
    tolerance: float | None = None,
    max_entries: int = 64,
    seed: int = 0,
    raise_on_error: bool = True,
    **static: Any,
) -> Report:
    """Check an operation's hand-written rule at given arguments.

    The gradient by the rule is compared with JAX's of the plain definition and with central
    differences in float64; in reverse and forward mode, in first and second order, jitted,
    vmapped, and in each dtype; and `backward` is tested for being linear in `dy`.

    Args:
        operation: made by `fnn.rule`.
        args: its positional arguments; real and complex arrays among them are differentiated.
        dtypes: the dtypes to run the rule in; the reference is always in float64.
        order: 2 to check second derivatives too, else 1.
        tolerance: of the relative error in float64; 1e-7 against autodiff, and a hundred
            times as much against finite differences, unless given.
        max_entries: how many entries of each argument are perturbed one by one; if there are
            more, that many at random, and in addition a random direction through all.
        seed: of the random upstream gradient and directions.
        raise_on_error: whether to raise if a check fails.
        static: the operation's keyword arguments.

    Returns:
        A `Report`; `print` it.

    Raises:
        GradientError: a check failed; names the entry and both numbers.
        TypeError: `operation` isn't one, or no argument can be differentiated.

    64-bit mode is switched on for the check, whether or not it is on outside.
    """
    if not isinstance(operation, Operation):
        raise TypeError(
            f"check_rule takes an operation made by fnn.rule, but got {operation!r}; check any "
            "other function with fnn.check_grads."
        )

    def ours(*args):
        return operation(*args, **static)

    def plain(*args):
        return operation.definition(*args, **static)

    settings = _Settings(tuple(dtypes), order, tolerance, max_entries, seed, raise_on_error)
    return _check(operation.name, ours, plain, args, settings)


def check_grads(
    f: Callable,
    *args: Any,
    dtypes: Sequence[str] = ("float64",),
    order: int = 2,
    tolerance: float | None = None,
    max_entries: int = 64,
    seed: int = 0,
    raise_on_error: bool = True,
) -> Report:
    """Check the derivatives of any function by finite differences in float64.

    For functions with rules of their own somewhere inside: fnn operations, `jax.custom_jvp`,
    `jax.custom_vjp`. Forward mode is skipped, with the reason, where JAX refuses it.

    Args:
        f: a function of pytrees of arrays that returns a pytree of arrays.
        args: where to check; real and complex arrays among them are differentiated.
        dtypes, order, tolerance, max_entries, seed, raise_on_error: as in `check_rule`.

    Returns:
        A `Report`; `print` it.

    Raises:
        GradientError: a check failed; names the entry and both numbers.
        TypeError: no argument can be differentiated.
    """
    settings = _Settings(tuple(dtypes), order, tolerance, max_entries, seed, raise_on_error)
    return _check(getattr(f, "__name__", "function"), f, None, args, settings)


# -------------------------------------------------------------------------------- how it is done


@dataclasses.dataclass(frozen=True)
class _Settings:
    dtypes: tuple[str, ...]
    order: int
    tolerance: float | None
    max_entries: int
    seed: int
    raise_on_error: bool


def _check(name, f, plain, args, settings) -> Report:
    with jax.enable_x64(True):
        problem = _Problem(f, args, settings)
        rows = [*_first_order(problem, plain), *_transforms(problem)]
        if settings.order > 1:
            rows += _second_order(problem, plain)
        if isinstance(plain, Callable):
            rows.append(_linearity(problem))
        rows += _in_dtypes(problem, settings.dtypes)
        report = Report(name, tuple(rows), tuple(problem.kinks))
    if settings.raise_on_error and not report.ok:
        row = report.worst
        raise GradientError(
            f"{name}: {row.what}, order {row.order}, {row.mode} mode, {row.dtype}: at {row.where} "
            f"got {_number(row.got)}, wanted {_number(row.wanted)} (relative error "
            f"{row.error:.1e}).\n\n{report}",
            report,
        )
    return report


class _Problem:
    """The function as one of a flat list of float64 arrays, x, at a point, with a direction.

    scalar(x) is ⟨w, f(x)⟩ with a random upstream gradient w, so that its gradient is the
    pullback of w.
    """

    def __init__(self, f, args, settings):
        leaves, tree = jax.tree_util.tree_flatten_with_path(args)
        self.f, self.tree, self.settings = f, tree, settings
        self.leaves = [jnp.asarray(x) if not _is_key(x) else x for _, x in leaves]
        self.places = [i for i, x in enumerate(self.leaves) if _is_inexact(x)]
        if not self.places:
            raise TypeError(
                f"none of the {len(self.leaves)} arrays in the arguments is real or complex, so "
                "there is nothing to differentiate by."
            )
        self.names = [_leaf_name(leaves[i][0], len(args)) for i in self.places]
        self.x = [_widen(self.leaves[i]) for i in self.places]
        self.rng = np.random.default_rng(settings.seed)
        outs = jax.eval_shape(lambda x: self.outputs(f, x), self.x)
        shapes = [y for y in outs if _is_inexact(y)]
        self.w = [self._random(y) for y in shapes]
        self.v = [self._random(x) for x in self.x]
        self.kinks: list[Kink] = []
        self.kinked: dict[tuple[int, tuple], Kink] = {}

    def _random(self, like):
        real = self.rng.uniform(0.5, 1.5, like.shape) * self.rng.choice([-1, 1], like.shape)
        if jnp.issubdtype(like.dtype, jnp.complexfloating):
            real = real + 1j * self.rng.uniform(0.5, 1.5, like.shape)
        return jnp.asarray(real, _widen_dtype(like.dtype))

    def outputs(self, f, x, dtype=None):
        full = list(self.leaves)
        for i, value in zip(self.places, x, strict=True):
            full[i] = value if dtype is None else value.astype(_like(value.dtype, dtype))
        return jax.tree.leaves(f(*jax.tree.unflatten(self.tree, full)))

    def scalar(self, x, f=None, w=None):
        outs = [y for y in self.outputs(f or self.f, x) if _is_inexact(y)]
        return sum(jnp.sum(jnp.real(a * y)) for a, y in zip(w or self.w, outs, strict=True))

    def gradient(self, x=None, f=None, w=None):
        return jax.grad(lambda x: self.scalar(x, f, w))(self.x if x is None else x)

    @property
    def loose(self):
        return 100 * (self.settings.tolerance or TOLERANCE["float64"])

    @property
    def tight(self):
        return self.settings.tolerance or TOLERANCE["float64"]

    def entries(self, leaf):
        """The entries of an argument to perturb one by one: all, or some at random."""
        size, most = self.x[leaf].size, self.settings.max_entries
        if size <= most:
            chosen = np.arange(size)
        else:
            chosen = np.sort(self.rng.choice(size, most, replace=False))
        return [np.unravel_index(int(i), self.x[leaf].shape) for i in chosen]

    def name(self, leaf, index):
        inside = ", ".join(str(int(i)) for i in index)
        return f"{self.names[leaf]}[{inside}]" if inside else self.names[leaf]


def _first_order(problem, plain):
    ours = problem.gradient()
    numeric = _numeric(problem, ours)  # first, as it finds the kinks
    rows = []
    if plain is not None:
        finds = _differences(problem, ours, problem.gradient(f=plain))
        what = "backward vs jax.grad"
        rows.append(_row(problem, what, 1, "reverse", "float64", finds, problem.tight))
    what = "backward vs finite differences"
    rows.append(_row(problem, what, 1, "reverse", "float64", numeric, problem.loose))
    return [*rows, _forward_mode(problem, ours)]


def _numeric(problem, ours):
    """Entry by entry: (where, ours, central difference), with kinks sorted out."""
    scalar = jax.jit(problem.scalar)
    found = []
    middle = float(scalar(problem.x))
    for leaf, x in enumerate(problem.x):
        is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
        for index in problem.entries(leaf):
            for unit in (1, 1j) if is_complex else (1,):
                h = _H * max(1.0, abs(complex(x[index])))

                def at(step, leaf=leaf, index=index, unit=unit, x=x):
                    moved = list(problem.x)
                    moved[leaf] = x.at[index].add(step * unit)
                    return float(scalar(moved))

                g = complex(ours[leaf][index])
                # JAX's gradient of a real function is ∂/∂u − i ∂/∂v.
                given = g.real if unit == 1 else -g.imag
                numeric, kink = _slope(at, h, middle, problem.name(leaf, index), given)
                if kink is not None:
                    problem.kinks.append(kink)
                    problem.kinked[leaf, tuple(map(int, index))] = kink
                    low, high = sorted((kink.left, kink.right))
                    numeric = float(np.clip(given, low, high))
                found.append((problem.name(leaf, index), given, numeric))
    found.append(_along_a_direction(problem, ours, scalar))
    return [f for f in found if f is not None]


def _slope(at, h, middle, where, given):
    """The central difference, and the kink if the one-sided slopes disagree as h shrinks."""
    right, left = (at(h) - middle) / h, (middle - at(-h)) / h
    central = (right + left) / 2
    scale = max(abs(right), abs(left), 1e-3)
    if abs(right - left) <= 1e-2 * scale:
        # Richardson's extrapolation: the error is of fourth order.
        half = (at(h / 2) - at(-h / 2)) / h
        return (4 * half - central) / 3, None
    # A large second derivative shows the same at h, but vanishes with it; a kink doesn't.
    small = h / 64
    right2, left2 = (at(small) - middle) / small, (middle - at(-small)) / small
    if abs(right2 - left2) <= 0.25 * abs(right - left):
        return (right2 + left2) / 2, None
    return central, Kink(where, left2, right2, given)


def _along_a_direction(problem, ours, scalar):
    """One derivative through all entries at once, if not every entry was perturbed."""
    if problem.kinks or all(x.size <= problem.settings.max_entries for x in problem.x):
        return None

    def at(step):
        return float(scalar([x + step * v for x, v in zip(problem.x, problem.v, strict=True)]))

    numeric = (at(_H) - at(-_H)) / (2 * _H)
    given = sum(float(jnp.sum(jnp.real(g * v))) for g, v in zip(ours, problem.v, strict=True))
    return "a random direction", given, numeric


def _forward_mode(problem, ours):
    """⟨w, J v⟩ by the pushforward, against ⟨Jᵀ w, v⟩ by the pullback, entry by entry of v."""

    def push(tangents):
        return jax.jvp(problem.scalar, (problem.x,), (tangents,))[1]

    finds = []
    try:
        for leaf, x in enumerate(problem.x):
            for index in problem.entries(leaf):
                tangents = [jnp.zeros_like(x) for x in problem.x]
                tangents[leaf] = x.at[...].set(0).at[index].set(1)
                pushed = float(push(tangents))
                wanted = float(jnp.real(ours[leaf][index]))
                finds.append((problem.name(leaf, index), pushed, wanted))
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        return _skipped("forward mode vs backward", 1, "forward", "custom_vjp has none")
    return _row(problem, "forward mode vs backward", 1, "forward", "float64", finds, problem.tight)


def _transforms(problem):
    """The gradient jitted, and vmapped over two points, against itself one by one."""
    plain = problem.gradient()
    jitted = jax.jit(problem.gradient)(problem.x)
    other = [x + 0.37 * v for x, v in zip(problem.x, problem.v, strict=True)]
    stacked = [jnp.stack(pair) for pair in zip(problem.x, other, strict=True)]
    mapped = jax.vmap(problem.gradient)(stacked)
    apart = problem.gradient(other)
    rows = [("jit", _differences(problem, jitted, plain))]
    rows.append(("vmap, first", _differences(problem, [m[0] for m in mapped], plain)))
    rows.append(("vmap, second", _differences(problem, [m[1] for m in mapped], apart)))
    return [
        _row(problem, f"under {what}", 1, "reverse", "float64", finds, problem.tight)
        for what, finds in rows
    ]


def _second_order(problem, plain):
    """d/dx ⟨gradient(x), v⟩ in both nestings, against finite differences of the gradient."""
    v = problem.v

    def along(x, f=None):
        return sum(jnp.sum(jnp.real(g * t)) for g, t in zip(problem.gradient(x, f), v, strict=True))

    what = "second derivative vs "
    if problem.kinks:
        why = "at a kink there is none"
        return [_skipped(what + "finite differences", 2, "reverse over reverse", why)]
    twice = jax.grad(along)(problem.x)
    rows = []
    if plain is not None:
        theirs = jax.grad(lambda x: along(x, plain))(problem.x)
        finds = _differences(problem, twice, theirs)
        rows.append((what + "jax.grad", "reverse over reverse", finds, 10 * problem.tight))
    numeric = _numeric_gradient(problem, jax.jit(along))
    finds = [(n, _real(twice[i][k]), d) for i, k, n, d in numeric]
    scale = max((abs(float(jnp.max(jnp.abs(g)))) for g in twice if g.size), default=0.0)
    rows.append((what + "finite differences", "reverse over reverse", finds, problem.loose))
    finished = [_row(problem, w, 2, m, "float64", f, t, scale) for w, m, f, t in rows]
    try:
        over = jax.jvp(problem.gradient, (problem.x,), (v,))[1]
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        why = "custom_vjp has no forward mode"
        return [*finished, _skipped(what + "reverse over reverse", 2, "forward over reverse", why)]
    if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in problem.x):
        return finished  # ⟨H v, ·⟩ and ⟨·, H v⟩ differ by conjugations there
    finds = _differences(problem, over, twice)
    mode = "forward over reverse"
    row = _row(problem, what + "reverse over reverse", 2, mode, "float64", finds, problem.tight)
    return [*finished, row]


def _numeric_gradient(problem, scalar):
    for leaf, x in enumerate(problem.x):
        for index in problem.entries(leaf):
            h = _H * max(1.0, abs(complex(x[index])))

            def at(step, leaf=leaf, index=index, x=x):
                moved = list(problem.x)
                moved[leaf] = x.at[index].add(step)
                return float(scalar(moved))

            outer = (at(h) - at(-h)) / (2 * h)
            inner = (at(h / 2) - at(-h / 2)) / h
            yield leaf, index, problem.name(leaf, index), (4 * inner - outer) / 3


def _linearity(problem):
    """backward(2 a − 3 b) must be 2 backward(a) − 3 backward(b)."""
    a, b = problem.w, [problem._random(w) for w in problem.w]
    mix = [2 * p - 3 * q for p, q in zip(a, b, strict=True)]
    of_a, of_b = problem.gradient(w=a), problem.gradient(w=b)
    apart = [2 * p - 3 * q for p, q in zip(of_a, of_b, strict=True)]
    finds = _differences(problem, problem.gradient(w=mix), apart)
    what = "backward is linear in dy"
    return _row(problem, what, 1, "reverse", "float64", finds, problem.tight)


def _in_dtypes(problem, dtypes):
    """The gradient computed in a dtype, against the float64 gradient at the rounded point."""
    rows = []
    for dtype in dtypes:
        if dtype == "float64":
            continue
        low = [x.astype(_like(x.dtype, dtype)) for x in problem.x]
        rounded = [x.astype(w.dtype) for x, w in zip(low, problem.x, strict=True)]
        w = [a.astype(_like(a.dtype, dtype)).astype(a.dtype) for a in problem.w]
        wanted = problem.gradient(rounded, w=w)
        got = problem.gradient(low, w=[a.astype(_like(a.dtype, dtype)) for a in w])
        wrong = [g.dtype for g, x in zip(got, low, strict=True) if g.dtype != x.dtype]
        if wrong:
            rows.append(_skipped(f"gradient's dtype is {wrong[0]}", 1, "reverse", "WRONG", dtype))
            continue
        got = [g.astype(w.dtype) for g, w in zip(got, wanted, strict=True)]
        finds = _differences(problem, got, wanted, skip_kinks=True)
        scale = max((float(jnp.max(jnp.abs(g))) for g in wanted if g.size), default=0.0)
        rows.append(
            _row(
                problem,
                "backward vs float64",
                1,
                "reverse",
                dtype,
                finds,
                TOLERANCE[dtype],
                scale,
                floor=1.0,
            )
        )
    return rows


def _differences(problem, ours, theirs, skip_kinks=False):
    """The worst few entries of each argument, as (where, ours, theirs)."""
    found = []
    for leaf, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not a.size:
            continue
        a, b = np.asarray(a), np.asarray(b)
        scale = max(float(np.max(np.abs(b))), 1e-300)
        error = _relative(a, b, scale)
        for flat in np.argsort(error, axis=None)[::-1][:3]:
            index = np.unravel_index(int(flat), a.shape)
            if (leaf, tuple(map(int, index))) in problem.kinked:
                continue
            found.append((problem.name(leaf, index), complex(a[index]), complex(b[index])))
    return found


def _relative(a, b, scale, floor=_FLOOR):
    """|a − b| / max(|a|, |b|), with a floor for entries that are small beside the largest."""
    a, b = np.asarray(a), np.asarray(b)
    size = np.maximum(np.maximum(np.abs(a), np.abs(b)), floor * scale)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(size > 0, np.abs(a - b) / np.where(size > 0, size, 1), 0.0)
    return np.where(np.isfinite(np.abs(a)) & np.isfinite(np.abs(b)), error, np.inf)


def _row(problem, what, order, mode, dtype, finds, tolerance, scale=None, floor=_FLOOR):
    if not finds:
        return Row(what, order, mode, dtype, 0.0, "", 0.0, 0.0, "ok")
    got = np.array([g for _, g, _ in finds])
    wanted = np.array([w for _, _, w in finds])
    scale = max(scale or 0.0, float(np.max(np.abs(wanted))), 1e-8)
    errors = _relative(got, wanted, scale, floor)
    worst = int(np.argmax(errors))
    verdict = "ok" if errors[worst] <= tolerance else "WRONG"
    where, g, w = finds[worst]
    return Row(what, order, mode, dtype, float(errors[worst]), where, g, w, verdict)


def _skipped(what, order, mode, why, dtype="float64"):
    verdict = why if why == "WRONG" else f"skipped: {why}"
    return Row(what, order, mode, dtype, np.inf if why == "WRONG" else -1.0, "", 0.0, 0.0, verdict)


def _number(z) -> str:
    z = complex(z)
    return f"{z.real:.8g}" if z.imag == 0 else f"{z:.8g}"


def _real(x) -> float:
    return float(jnp.real(x))


def _is_key(x) -> bool:
    return jax.dtypes.issubdtype(getattr(x, "dtype", np.dtype("O")), jax.dtypes.prng_key)


def _is_inexact(x) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jnp.inexact)


def _widen_dtype(dtype):
    return jnp.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float64


def _widen(x):
    return jnp.asarray(x, _widen_dtype(x.dtype))


def _like(dtype, wanted: str):
    """`wanted`, or the complex dtype of that precision."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.complex128 if wanted == "float64" else jnp.complex64
    return jnp.dtype(wanted)


def _leaf_name(path, num_args: int) -> str:
    """`args[1]['W']`: the argument's number and the path inside it."""
    return f"args[{path[0].idx}]{jax.tree_util.keystr(path[1:])}"

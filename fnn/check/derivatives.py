"""The derivatives that are compared, by each of JAX's modes, as compiled programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import compress

import jax
import jax.numpy as jnp
from jax import lax

from fnn.check.directions import Flat
from fnn.jaxpr import Program, inner_jaxprs, is_inexact, program, trace
from fnn.operation import Operation, call_of

# The entries of a batch under vmap.
BATCH = 3


def _gradient(f, x, fixed, w):
    return jax.vjp(lambda x: f(x, fixed), x)[1](w)[0]


def _tangent(f, x, fixed, v):
    return jax.jvp(lambda x: f(x, fixed), (x,), (v,))[1]


def _projected(f, fixed, w):
    return lambda x: jnp.vdot(w, f(x, fixed))


# Each mode's derivative of f, at x, projected on w or v.
FIRST: dict[str, Callable] = {
    "reverse": lambda f, x, fixed, w, v: _gradient(f, x, fixed, w),
    "forward": lambda f, x, fixed, w, v: _tangent(f, x, fixed, v),
}
SECOND: dict[str, Callable] = {
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
MODES = {**FIRST, **SECOND}
BY_RESULT = ("forward", "forward over forward")  # a number for each result, not each argument
WHAT = {
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


class Programs:
    """The compiled functions of a check, kept for the next one at the same shapes."""

    def __init__(self, ours: Flat, plain: Flat | None):
        self.ours, self.plain = ours, plain
        self.reference = ours if plain is None else plain
        self.value = _jit(self.reference)
        modes = ("modes", "plain_modes")
        self.derivatives = _jit(self._derivatives, static_argnames=modes)
        self.narrow = _jit(self._narrow, static_argnames=modes)
        self.vmapped = _jit(self._vmapped, static_argnames=modes)
        self.by_entry = _jit(self._by_entry)
        self.along = _jit(self._along, static_argnames="of")

    def unavailable(self, f: Flat, mode: str, *at) -> str:
        """Why JAX can't do this mode of f, or "" if it can."""
        derivative = functools.partial(MODES[mode], f)
        try:
            if isinstance(f.function, Operation):
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

    def coarsest(self, x, fixed) -> float:
        """The relative spacing of the coarsest numbers between the arguments and the result."""
        leaves, tree = jax.tree.flatten((x, fixed))
        flat = lambda *leaves: [self.reference(*jax.tree.unflatten(tree, leaves))]
        arrays = [jnp.asarray(a) for a in leaves]
        seen = _coarsest(program(trace(flat, arrays)), [True] + [False] * (len(leaves) - 1))
        return max(seen, float(jnp.finfo("float64").eps))

    def _derivatives(self, x, fixed, w, v, u, *, modes, plain_modes):
        """Ours, and those of the plain definition."""
        ours = {m: MODES[m](self.ours, x, fixed, w, v) for m in modes}
        plain = {}
        if self.plain is not None:
            plain = {m: MODES[m](self.plain, x, fixed, w, v) for m in plain_modes}
        ours["value"] = self.ours(x, fixed)
        if "reverse" in modes:
            # The value by `forward`, and the backward b at several upstream gradients.
            ours["value, differentiated"], pull = jax.vjp(lambda x: self.ours(x, fixed), x)
            z = u * jnp.sin(jnp.arange(u.size, dtype=u.dtype) + 1)
            ours["b(w + 30z)"] = pull(u + 30 * z)[0]
            ours["b(w) + 30 b(z)"] = pull(u)[0] + 30 * pull(z)[0]
            ours["b(0)"] = pull(jnp.zeros_like(u))[0]
        return ours, plain

    def _narrow(self, points, fixed, *, modes, plain_modes):
        """Values and first derivatives at (x, w, v) of several dtypes: ours, plain, exact.

        Exact is the plain definition in float64, or our rule where JAX can't differentiate that.
        """

        def first(f, x, w, v, modes=modes):
            cast = lambda x, fixed: f(x, fixed).astype(x.dtype)
            found = {m: MODES[m](cast, x, fixed, w, v) for m in modes}
            return found | {"value": cast(x, fixed)}

        def wide(a):
            return a.astype("float64")

        found = []
        for at in points:
            exact = first(self.ours, *map(wide, at), [m for m in modes if m not in plain_modes])
            plain = {}
            if self.plain is not None:
                plain = first(self.plain, *at, plain_modes)
                exact |= first(self.plain, *map(wide, at), plain_modes)
            found.append((first(self.ours, *at), plain, exact))
        return found

    def _vmapped(self, X, fixed, W, V, *, modes, plain_modes):
        """A batch by vmap, and one by one: all arguments mapped, and then one shared."""
        f = self.ours

        def one_by_one(X, mode):
            alone = self.plain if mode in plain_modes else f
            return lax.map(lambda a: MODES[mode](alone, a[0], fixed, a[1], a[2]), (X, W, V))

        copies = jax.tree.map(lambda a: jnp.stack([a] * BATCH), fixed)
        mapped = {
            m: (jax.vmap(functools.partial(MODES[m], f))(X, copies, W, V), one_by_one(X, m))
            for m in modes
        }
        shared = {}
        for i, argument in enumerate(f.arguments):
            if "reverse" not in modes or len(f.arguments) == 1:
                break
            columns = f.split(X, axis=1)
            repeated = [jnp.stack([c[0]] * BATCH) if k == i else c for k, c in enumerate(columns)]
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

    def _by_entry(self, x, fixed, w, entries, steps, count):
        """Changes of wᵀf as single entries of x move ± each step: (entries, steps, 4), and sizes.

        Of each: wᵀ of the change to the right and to the left, and the sums over f's terms of
        the lower and of the higher one-sided slope. The size is that of the numbers that change.
        Only the first `count` entries are done.
        """
        middle = self.reference(x, fixed)
        usable = jnp.isfinite(middle)
        weight = jnp.where(usable, w, 0)
        f64 = jnp.float64

        def changes(entry, step):
            right, left = (
                jnp.where(usable, self.reference(x.at[entry].add(h), fixed) - middle, 0).astype(f64)
                for h in (step, -step)
            )
            slopes = weight * right / step, -weight * left / step
            lower, higher = (jnp.sum(f(*slopes)) for f in (jnp.minimum, jnp.maximum))
            is_moved = (right != 0) | (left != 0)
            terms = jnp.vdot(weight, right), jnp.vdot(weight, left), lower, higher
            return jnp.stack(terms), is_moved

        def one(i, found):
            table, sizes = found
            rows, moved = lax.map(lambda step: changes(entries[i], step), steps[i])
            size = jnp.where(usable & moved.any(axis=0), jnp.abs(middle).astype(f64), 0)
            return table.at[i].set(rows), sizes.at[i].set(jnp.linalg.norm(weight * size))

        n, levels = steps.shape
        start = jnp.zeros((n, levels, 4), f64), jnp.zeros(n, f64)
        return lax.fori_loop(0, count, one, start)

    def _along(self, x, fixed, w, v, steps, *, of):
        """Changes at ± each step in direction v, (steps, 2, results), of f or of our derivative.

        Entries that aren't finite at 0 are left out.
        """

        def moved(t):
            if of == "value":
                return self.reference(x + t * v, fixed)
            return MODES[of](self.ours, x + t * v, fixed, w, v)

        middle = moved(jnp.zeros((), x.dtype))
        usable = jnp.isfinite(middle)
        around = lax.map(moved, jnp.stack([steps, -steps], axis=1).ravel())
        changes = jnp.where(usable[None], around - middle[None], 0).astype(jnp.float64)
        return changes.reshape(*steps.shape, 2, middle.size), middle


def _coarsest(flat: Program, active) -> float:
    """Of all values that depend on the active inputs, inside loops and operations too."""
    reach = flat.dependents(compress(flat.inputs, active), inexact=True)
    spacing = [float(jnp.finfo(flat.avals[i].dtype).eps) for i in reach]
    for equation in flat.equations:
        if reach.isdisjoint(equation.ins):
            continue
        bodies = list(inner_jaxprs(equation).values())
        call = call_of(equation)
        if call is not None:
            bodies.append(jax.make_jaxpr(call.primal)(*(flat.avals[i] for i in equation.ins)))
        for body in bodies:
            spacing.append(_coarsest(program(body), list(map(is_inexact, body.in_avals))))
    return max(spacing, default=0.0)

"""The derivatives that are compared, by each of JAX's modes, as compiled programs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fnn.check.differences import changes_around, unit
from fnn.check.directions import Flat
from fnn.operation import Operation

# The entries of a batch under vmap.
BATCH = 3


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


class Programs:
    """The compiled functions of a check, kept for the next one at the same shapes."""

    def __init__(self, ours: Flat, plain: Flat | None):
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

        copies = jax.tree.map(lambda a: jnp.stack([a] * BATCH), fixed)
        mapped = {
            m: (jax.vmap(functools.partial(_MODES[m], f))(X, copies, W, V), one_by_one(X, m))
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

    def _by_entry(self, x, fixed, w, entries, step):
        """Differences of wᵀf by single entries of x."""

        def changes(entry):
            direction = jnp.zeros_like(x).at[entry].set(unit(x[entry]))
            return changes_around(lambda t: self.reference(x + t * direction, fixed), step, w)

        return lax.map(changes, entries)

    def _along(self, x, fixed, w, v, step, *, of):
        """Differences in direction v: of f, or of our own derivative by a first-order mode."""

        def moved(t):
            if of == "value":
                return self.reference(x + t * v, fixed)
            return _MODES[of](self.ours, x + t * v, fixed, w, v)

        return changes_around(moved, step)


@functools.lru_cache(maxsize=256)
def cached_programs(ours, plain, edition) -> Programs:
    return Programs(ours, plain)

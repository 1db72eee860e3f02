"""State-space models: a recurrence that is linear in what it carries, and so needs no loop."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fnn import arguments
from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import must_be_real_or_complex
from fnn.precision import wide, wide_dtype


def linear_recurrence(
    a: chex.Array, b: chex.Array, x: chex.Array | None = None, *, reverse: bool = False
) -> jax.Array:
    """xₜ = aₜ ∘ xₜ₋₁ + bₜ for all steps t: a state space with a diagonal matrix.

    Two steps after one another are one of the same kind, x ↦ a₂ a₁ x + (a₂ b₁ + b₂). So pairs of
    steps may be joined, then pairs of pairs: `jax.lax.associative_scan` does n steps in about
    2 log₂ n rounds of large elementwise products, where a loop does n small ones. On a CPU a loop
    is faster, and is what runs there.

    Args:
        a: by what each step multiplies the state: the same in all steps, `(...)`, or of each step,
            `(steps, ...)`. Real or complex; of an absolute value up to 1 if there are many steps.
        b: what each step adds, `(steps, ...)`, of the same dtype.
        x: the state before the first step, `(...)`; 0 unless given.
        reverse: from the last step to the first, xₜ = aₜ ∘ xₜ₊₁ + bₜ.

    Returns:
        The state after each step, of b's shape and dtype.

    Local gradient: the gradient of bₜ is that of xₜ by all ways, dₜ = gₜ + aₜ₊₁ ∘ dₜ₊₁, the same
    recurrence from the other end; that of aₜ is dₜ ∘ xₜ₋₁, summed over the steps where a is the
    same in all. (Nothing is conjugated, as always in JAX.) Kept: a and the states; nothing of what
    the rounds make. 16-bit floats are computed in float32.

    Raises:
        TypeError: an argument isn't floating, real or complex, or the dtypes differ.
        ValueError: the shapes don't fit.

    Sources: Blelloch, "Prefix sums and their applications", 1990; Martin, Cundy, "Parallelizing
    linear recurrent neural nets over sequence length", ICLR 2018.
    """
    op = "linear_recurrence"
    given = {"a": a, "b": b, **({} if x is None else {"x": x})}
    must_be_real_or_complex(op, **given)
    given = {name: jnp.asarray(array) for name, array in given.items()}
    a, b, x = given["a"], given["b"], given.get("x")
    arguments.flag(op, "reverse", reverse)
    if b.ndim == 0:
        raise ValueError(f"{op}: argument 'b' has shape (), wanted (steps, ...).")
    if a.shape not in (b.shape, b.shape[1:]):
        raise ValueError(
            f"{op}: argument 'a' has shape {a.shape}, wanted {b.shape[1:]}, the same for all "
            f"steps, or {b.shape}, the shape of 'b'."
        )
    if x is not None and x.shape != b.shape[1:]:
        raise ValueError(
            f"{op}: argument 'x' has shape {x.shape}, wanted {b.shape[1:]}, a step of 'b'."
        )
    for name, given_array in given.items():
        if given_array.dtype != b.dtype:
            raise TypeError(
                f"{op}: argument '{name}' has dtype {given_array.dtype}, wanted {b.dtype}, the "
                "dtype of 'b'."
            )
    if x is not None and len(b):
        first = len(b) - 1 if reverse else 0
        b = b.at[first].add((a if a.ndim < b.ndim else a[first]) * x)
    return _linear_recurrence(a, b, reverse=bool(reverse))


@rule
def _linear_recurrence(a, b, *, reverse):
    return _run(a, b, reverse)


@_linear_recurrence.forward
def _(a, b, *, reverse):
    x = _linear_recurrence(a, b, reverse=reverse)
    return x, (a, x)


@_linear_recurrence.backward
def _(residuals, g, *, reverse):
    a, x = residuals
    d = _run(a if a.ndim < x.ndim else _before(a, not reverse), g, not reverse)
    da = d * _before(x, reverse)
    return (da if a.ndim == x.ndim else _sum(da)), d


@_linear_recurrence.tangent
def _(residuals, da, db, *, reverse):
    """dxₜ = aₜ dxₜ₋₁ + (daₜ xₜ₋₁ + dbₜ): the same recurrence."""
    a, x = residuals
    da = da if da.ndim == x.ndim else da[None]
    return _run(a, da * _before(x, reverse) + db, reverse)


def _run(a, b, reverse):
    """In rounds; on a CPU, which gains nothing by them, in a loop."""
    if len(b) == 0:
        return b
    dtype = wide_dtype(b.dtype)
    rounds, loop = (functools.partial(f, reverse=reverse) for f in (_in_rounds, _in_a_loop))
    given = a.astype(dtype), b.astype(dtype)
    return lax.platform_dependent(*given, cpu=loop, default=rounds).astype(b.dtype)


def _in_rounds(a, b, reverse):
    pairs = jnp.broadcast_to(a, b.shape), b
    return lax.associative_scan(_one_after_the_other, pairs, reverse=reverse)[1]


def _in_a_loop(a, b, reverse):
    def step(x, given):
        a_here, b_here = given
        x = (a if a_here is None else a_here) * x + b_here
        return x, x

    of_steps = a if a.ndim == b.ndim else None
    return lax.scan(step, jnp.zeros_like(b[0]), (of_steps, b), reverse=reverse)[1]


def _one_after_the_other(first, second):
    (a_1, b_1), (a_2, b_2) = first, second
    return a_1 * a_2, a_2 * b_1 + b_2


def _before(x, reverse):
    """Of each step what stands at the step before; 0 at the first."""
    zero = jnp.zeros_like(x[:1])
    return jnp.concatenate([x[1:], zero] if reverse else [zero, x[:-1]])


def _sum(x):
    return jnp.sum(wide(x), axis=0).astype(x.dtype)

"""What the operations ask of their arguments, and the errors when they don't get it."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from fnn import arguments


def must_be_real(op: str, **arrays: chex.Array) -> None:
    """Raise a TypeError unless every argument is an array of real floating-point numbers.

    Integers are refused rather than converted: which floating dtype was meant is for the
    caller to say.
    """
    for name, x in arrays.items():
        must_be_array(op, name, x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(_wanted(op, name, x, "a real floating dtype"))


def must_be_real_or_complex(op: str, **arrays: chex.Array) -> None:
    """Raise a TypeError unless every argument is an array of floats, real or complex."""
    for name, x in arrays.items():
        must_be_array(op, name, x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise TypeError(_wanted(op, name, x, "a floating or complex dtype"))


def must_not_be_complex(op: str, **arrays: chex.Array) -> None:
    """Raise a TypeError unless every argument is an array of real numbers: floats, integers."""
    for name, x in arrays.items():
        must_be_array(op, name, x)
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise TypeError(
                f"{op}: argument '{name}' of shape {x.shape} has dtype {x.dtype}, wanted real "
                "numbers."
            )


def must_be_alike(op: str, **arrays: chex.Array) -> None:
    """Raise unless two arguments can be compared: real floats, and real numbers of their shape.

    Raises:
        TypeError: the first isn't real floating, or the second isn't real.
        ValueError: the second has another shape than the first.
    """
    (name, x), (other, y) = arrays.items()
    must_be_real(op, **{name: x})
    must_not_be_complex(op, **{other: y})
    if x.shape != y.shape:
        raise ValueError(
            f"{op}: argument '{other}' has shape {y.shape}, wanted {x.shape}, the shape of "
            f"'{name}'."
        )


def must_be_array(op: str, name: str, x: chex.Array) -> None:
    """Raise a TypeError unless x is an array with a shape and a dtype; a Python number has none."""
    if not hasattr(arguments.array(op, name, x), "dtype"):
        raise TypeError(
            f"{op}: {name} must be an array, but got {arguments.show(x)} (jnp.asarray({name}))."
        )


def is_integer(x: chex.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def is_floating(x: chex.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def empty(x: chex.Array | None) -> jax.Array | None:
    """A residual without entries, which only tells the dtype of x; None for None."""
    return None if x is None else jnp.zeros((0,), x.dtype)


def one_or_nan(is_right: chex.Array, dtype) -> jax.Array:
    """1 where what a call asks for is there, NaN elsewhere, for code that can't raise.

    It is √−1: a NaN that stands in a program `jax.debug_nans` reports, even if nothing is wrong.
    """
    return jnp.sqrt(jnp.where(is_right, 1, -1).astype(dtype))


def _wanted(op, name, x, what):
    return (
        f"{op}: argument '{name}' of shape {x.shape} has dtype {x.dtype}, wanted {what} "
        f"(convert it: {name}.astype(jnp.float32))."
    )


def axes_of(op: str, x: chex.Array, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The axes of x that `axis` names, counted from 0; all of them for None.

    Raises:
        TypeError: an axis is no integer.
        ValueError: x has no such axis, or it is named twice.
    """
    if axis is None:
        return tuple(range(x.ndim))
    several = axis if isinstance(axis, tuple) else (axis,)
    for a in several:
        arguments.integer(op, "axis", a)
        if not -x.ndim <= a < x.ndim:
            raise ValueError(
                f"{op}: axis {axis} is out of range for the argument of shape {x.shape}, wanted "
                f"one from {-x.ndim} to {x.ndim - 1}."
                if x.ndim
                else f"{op}: wanted an argument with at least one axis, but got a scalar "
                f"(shape ()), and axis={axis}."
            )
    axes = tuple(int(a) % x.ndim for a in several)
    if len(set(axes)) < len(axes):
        raise ValueError(f"{op}: axis must name each axis once, but got {axis}.")
    return axes


def axis_of(op: str, x: chex.Array, axis: int) -> int:
    """The one axis of x that `axis` names, counted from 0. It raises as `axes_of` does."""
    if axis is None or isinstance(axis, tuple):
        raise TypeError(f"{op}: axis must be an integer, but got {arguments.show(axis)}.")
    return axes_of(op, x, axis)[0]


def block_size(op: str, given: int | None, *, on_cpu: int, elsewhere: int) -> int:
    """The option `block`; unless it is given, what is fast where JAX computes."""
    if given is None:
        return on_cpu if jax.default_backend() == "cpu" else elsewhere
    return arguments.integer(op, "block", given, least=1)

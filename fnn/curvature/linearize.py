"""A function's derivative at a point, as a product: also where JAX knows it backwards only.

`jax.custom_vjp` gives a function a pullback, and takes forward mode from it. But the pullback
Jᵀu is linear in u, and its own pullback is J: two reverse passes make a forward one. It is done
where a function calls a `custom_vjp`, and nowhere else: it costs a backward pass more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn.eager import once
from fnn.jaxpr import all_equations, program


def linearized(function: Callable, at: Any) -> tuple[Any, Callable, Callable]:
    """`(function(at), v ↦ J v, u ↦ Jᵀ u)` for trees of real arrays.

    A pullback that isn't linear in u, one that clips gradients for instance, counts as its own
    linearisation at u = 0.
    """

    def backwards_twice(at):
        value, back = jax.vjp(function, at)
        zero = jax.tree.map(jnp.zeros_like, value)
        return value, jax.vjp(lambda u: back(u)[0], zero)[1]

    if not calls_custom_vjp(function, at):
        value, push = once(functools.partial(jax.linearize, function))(at)
    else:
        value, back_of_back = once(backwards_twice)(at)
        push = lambda v: back_of_back(v)[0]
    pull = jax.linear_transpose(push, at)
    return value, push, lambda u: pull(u)[0]


def second_derivative(gradient: Callable, at: Any) -> Callable:
    """v ↦ H v, of the function whose gradient it is; linearised once, H being symmetric."""
    if not calls_custom_vjp(gradient, at):
        return jax.linearize(gradient, at)[1]
    _, back = jax.vjp(gradient, at)
    return lambda v: back(v)[0]


def calls_custom_vjp(function: Callable, *args: Any) -> bool:
    """Does its program, with the loops in it, call a function that has only a pullback?"""
    flat = program(jax.make_jaxpr(function)(*args))
    return any(equation.name == "custom_vjp_call" for equation, _ in all_equations(flat))

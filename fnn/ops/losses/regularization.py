"""Penalties for large parameters, to be added to a loss."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import must_be_real
from fnn.precision import wide


@rule
def l2(params: chex.ArrayTree) -> jax.Array:
    """R(W) = Σ w² over all entries of a tree of parameters; add λ R(W) to the loss.

    Args:
        params: a pytree of real floating arrays of any shapes, such as `params["hidden"]["W"]`
            or all parameters of a network.

    Returns:
        The penalty, a scalar without a factor ½, of the dtype that JAX's promotion gives the
        arrays together (0 of the default floating dtype for an empty tree).

    Local gradient: 2 w. Kept: the parameters, no copy. Smooth, no kink. Adding λ R(W) with
    plain gradient descent is weight decay of 2 λ.

    Raises:
        TypeError: an array isn't real floating (the message gives its path).

    Source: the lecture ("R(W) = Σ W²", L2 regularisation).
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, w in leaves:
        must_be_real("l2", **{f"params{jax.tree_util.keystr(path)}": w})
    with jax.numpy_dtype_promotion("standard"):  # a tree may mix dtypes, also in strict mode
        dtype = jnp.result_type(*(w.dtype for _, w in leaves)) if leaves else jnp.result_type(float)
    zero = wide(jnp.zeros((), dtype))
    squares = (jnp.sum(jnp.square(wide(w))).astype(zero.dtype) for _, w in leaves)
    return sum(squares, zero).astype(dtype)


@l2.forward
def _(params):
    return l2(params), params


@l2.backward
def _(params, g):
    def gradient(w):
        return (wide(g).astype(wide(w).dtype) * (2 * wide(w))).astype(w.dtype)

    return (jax.tree.map(gradient, params),)

"""The Hessian of a loss by the network's outputs, as a product and as a square root.

A generalised Gauss-Newton matrix is Jᵀ H J with the network's Jacobian J and the small Hessian
H of the loss by the outputs z of one example. For the usual losses H is known:

    squared_error                 2 I
    softmax_cross_entropy         diag(p) − p pᵀ,   p = softmax(z)
    sigmoid_binary_cross_entropy  diag(p (1 − p)),  p = σ(z)
    multiclass_hinge              0

and its root S, H = S Sᵀ, too; for any other convex loss both come from autodiff.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import ops
from fnn.jaxpr import program, trace


class Known(NamedTuple):
    """What is known of a loss at outputs z.

    product: `(z, u) -> H u`.
    root: `z -> S`, the columns along the first axis, (columns, *z.shape); no columns: H = 0.
    sample: `(z, key) -> s`, a random column with E[s sᵀ] = H, drawn as KFAC does: the gradient
        of the loss at a label drawn from the network's own distribution; None if it has none.
    """

    product: Callable[[Any, Any], Any]
    root: Callable[[Any], Any]
    sample: Callable[[Any, Any], Any] | None


def _squared_error() -> Known:
    return Known(
        lambda z, u: 2 * u,
        lambda z: math.sqrt(2) * _identity(z),
        # exp(−(z − t)²) is a normal distribution of t, of variance ½.
        lambda z, key: math.sqrt(2) * jax.random.normal(key, z.shape, z.dtype),
    )


def _softmax_cross_entropy() -> Known:
    def product(z, u):
        p = jax.nn.softmax(z)
        return p * u - p * jnp.sum(p * u)

    def root(z):
        # With q = √p of unit length, diag(p) − p pᵀ = D (I − q qᵀ) D, D = diag(q). Householder's
        # reflection that takes the first axis to −q takes the others to a basis of what is
        # orthogonal to q: one column less than there are classes.
        q = jnp.sqrt(jax.nn.softmax(z))
        v = q.at[0].add(1)
        return (jnp.eye(z.size, dtype=z.dtype)[1:] - v[1:, None] * v / (1 + q[0])) * q

    def sample(z, key):
        return jax.nn.softmax(z) - jax.nn.one_hot(jax.random.categorical(key, z), z.size)

    return Known(product, root, sample)


def _sigmoid_binary_cross_entropy() -> Known:
    variance = lambda z: jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)
    return Known(
        lambda z, u: variance(z) * u,
        lambda z: jnp.sqrt(variance(z)) * _identity(z),
        lambda z, key: jax.nn.sigmoid(z) - jax.random.bernoulli(key, jax.nn.sigmoid(z)),
    )


def _multiclass_hinge() -> Known:
    return Known(lambda z, u: jnp.zeros_like(u), lambda z: jnp.zeros((0, *z.shape), z.dtype), None)


_KNOWN = {
    ops.squared_error: _squared_error,
    ops.softmax_cross_entropy: _softmax_cross_entropy,
    ops.sigmoid_binary_cross_entropy: _sigmoid_binary_cross_entropy,
    ops.multiclass_hinge: _multiclass_hinge,
}


def of(loss: Callable, z, target) -> Known:
    """What is known of `loss(z, target)`, for one example; found by autodiff if nothing is."""
    check_loss(loss, z, target)
    operation = _operation_of(loss, z, target)
    if operation is not None:
        return _KNOWN[operation]()
    gradient = jax.grad(lambda z: loss(z, target))
    return Known(
        lambda z, u: jax.jvp(gradient, (z,), (u,))[1],
        lambda z: _root_by_autodiff(loss, z, target),
        None,
    )


def is_likelihood(loss: Callable, z, target) -> bool:
    """Is it the negative log-likelihood of a distribution that we can draw labels from?"""
    return of(loss, z, target).sample is not None


def columns(loss: Callable, z, target, key=None, samples: int = 0):
    """Columns whose squares add up to H: S, or `samples` random ones of which E[s sᵀ] = H."""
    known = of(loss, z, target)
    if not samples:
        return known.root(z)
    keys = jax.random.split(key, samples)
    if known.sample is not None:
        found = jax.vmap(lambda k: known.sample(z, k))(keys)
    else:
        root = known.root(z)
        signs = jax.random.rademacher(key, (samples, root.shape[0]), z.dtype)
        found = jnp.tensordot(signs, root, axes=1)
    return (found / math.sqrt(samples)).astype(z.dtype)


def _operation_of(loss, z, target):
    """The known operation that the loss consists of, if it is one operation at z."""
    leaves, tree = jax.tree.flatten(target)
    flat = program(
        trace(lambda z, *t: [loss(z, jax.tree.unflatten(tree, t))], [z, *leaves]), inline=True
    )
    at_z = [e for e in flat.equations if flat.inputs[0] in e.ins]
    if (
        len(at_z) != 1
        or list(at_z[0].outs) != flat.outputs
        or at_z[0].ins[0] != flat.inputs[0]
        or flat.inputs[0] in at_z[0].ins[1:]
    ):
        return None
    call = at_z[0].operation()
    operation = None if call is None else call.operation
    if (
        operation not in _KNOWN
        or flat.avals[flat.inputs[0]].ndim > 1
        and (operation in (ops.softmax_cross_entropy, ops.multiclass_hinge))
    ):
        return None
    # A target of floats needn't add up to one: then the softmax's Hessian has its sum as factor.
    if operation is ops.softmax_cross_entropy:
        label = flat.avals[at_z[0].ins[1]]
        if jnp.issubdtype(label.dtype, jnp.floating):
            return None
    return operation


def check_loss(loss, z, target) -> None:
    out = jax.eval_shape(loss, z, target)
    if getattr(out, "shape", None) != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(
            "loss(outputs, target) must return the real scalar loss of one example, but returned "
            f"{out} for outputs of shape {z.shape}."
        )


def _root_by_autodiff(loss, z, target):
    """S from the eigenvectors of H; a loss that isn't convex has eigenvalues below zero, which
    count as zero."""
    hessian = jax.hessian(lambda x: loss(x.reshape(z.shape), target))(z.reshape(-1))
    values, vectors = jnp.linalg.eigh(hessian)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))
    return root.T.reshape(-1, *z.shape)


def _identity(z):
    return jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)

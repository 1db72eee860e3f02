"""The GGN's diagonal and trace, its Gram matrix and the NTK, from one sweep with columns."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn.curvature.columns import check_samples, columns
from fnn.per_example.differentiate import batch_size
from fnn.per_example.gradient import _as


def ggn_diagonal(model: Callable, loss: Callable, *, key: Any = None, samples: int = 0) -> Callable:
    """The diagonal of the generalised Gauss-Newton matrix (1/N) Σₙ JₙᵀHₙJₙ.

    One sweep with the columns of H's root S: Σ_c (JᵀS_c)². With one position, (A²)ᵀ Σ_c G_c²
    (Dangel et al., "BackPACK", 2020).

    Args:
        model: `model(params, input)`, the outputs of one example, an array.
        loss: `loss(outputs, target)`, the loss of one example, convex in the outputs.
        key, samples: with samples > 0 an unbiased estimate from as many random columns, drawn
            with the key, instead of all: for networks with many outputs.

    Returns:
        A function `(params, (inputs, targets))` to a tree like the parameters.
    """
    check_samples(key, samples)

    def of_batch(params: Any, batch: Any) -> Any:
        found, tree, _ = columns(model, loss, params, batch, key=key, samples=samples)
        size = batch_size(batch)
        return jax.tree.unflatten(tree, [_as(c.sum_of_squares() / size, c.dtype) for c in found])

    return of_batch


def ggn_trace(model: Callable, loss: Callable, *, key: Any = None, samples: int = 0) -> Callable:
    """The trace of the generalised Gauss-Newton matrix, a scalar: Σ of |JᵀS_c|² over N.

    Arguments as for `ggn_diagonal`. No product of factors is formed for it.
    """
    check_samples(key, samples)

    def of_batch(params: Any, batch: Any) -> jax.Array:
        found, _, _ = columns(model, loss, params, batch, key=key, samples=samples, thrifty=False)
        return functools.reduce(jnp.add, [jnp.sum(c.squared_norms()) for c in found]) / (
            batch_size(batch)
        )

    return of_batch


def ggn_gram(model: Callable, loss: Callable) -> Callable:
    """The Gram matrix of all columns JₙᵀSₙ, (N · C, N · C), divided by N; or of two batches'.

    C is the number of outputs, less one for softmax, whose Hessian has that rank.
    It has the GGN's nonzero eigenvalues, and is small where there are more parameters than
    N · C (Dangel, Tatzel & Hennig, "ViViT: Curvature access through the generalized
    Gauss-Newton's low-rank structure", 2022). Arguments as for `ggn_diagonal`.

    Returns:
        A function `(params, batch, other_batch=None)`: with another batch of M examples the
        matrix is (N · C, M · C), divided by √(N M).
    """

    def of_batch(params: Any, batch: Any, other: Any = None) -> jax.Array:
        own = [c.as_batch() for c in columns(model, loss, params, batch)[0]]
        size = other_size = batch_size(batch)
        others = own
        if other is not None:
            others = [c.as_batch() for c in columns(model, loss, params, other)[0]]
            other_size = batch_size(other)
        grams = [g.gram(h) for g, h in zip(own, others, strict=True)]
        return functools.reduce(jnp.add, grams) / math.sqrt(size * other_size)

    return of_batch


def ntk(model: Callable) -> Callable:
    """The empirical neural tangent kernel Jₙ Jₘᵀ of the outputs (Jacot et al. 2018).

    Args:
        model: `model(params, input)`, the outputs of one example, an array.

    Returns:
        A function `(params, inputs, other_inputs=None)` to an array
        (N, *outputs, M, *outputs).
    """

    def of_inputs(params: Any, inputs: Any, others: Any = None) -> jax.Array:
        def sweep(x):
            size = batch_size(x)
            one_hot = lambda z, _: jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
            unused = jnp.zeros(size)
            found, _, z = columns(model, None, params, (x, unused), seeds=one_hot)
            return [c.as_batch() for c in found], z.shape

        own, shape = sweep(inputs)
        other, other_shape = (own, shape) if others is None else sweep(others)
        grams = [g.gram(h) for g, h in zip(own, other, strict=True)]
        return functools.reduce(jnp.add, grams).reshape(*shape, *other_shape)

    return of_inputs

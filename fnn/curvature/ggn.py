"""The GGN's diagonal and trace, its Gram matrix and the NTK, from one sweep with columns."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fnn.batch import batch_size
from fnn.curvature import output_hessian
from fnn.curvature.checks import (
    check_loss,
    check_model,
    check_part,
    check_samples,
    checked,
    checked_params,
)
from fnn.curvature.sqrt_ggn import SqrtGGN, sqrt_ggn
from fnn.meshes import specs_of, with_auto_axes
from fnn.per_example.precision import as_dtype
from fnn.precision import total, widest


def ggn_diagonal(
    model: Callable,
    loss: Callable,
    *,
    key: chex.PRNGKey | None = None,
    samples: int = 0,
    part: str = "positive",
) -> Callable:
    """The diagonal of the generalised Gauss-Newton matrix (1/N) Σₙ JₙᵀHₙJₙ.

    One sweep with the columns of H's root S: Σ_c (JᵀS_c)². With one position, (A²)ᵀ Σ_c G_c²
    (Dangel et al., "BackPACK", 2020).

    Args:
        model: `model(params, input)`, the outputs of one example, an array.
        loss: `loss(outputs, target)`, the loss of one example.
        key, samples: with samples > 0 an unbiased estimate from as many random columns, drawn
            with the key, instead of all: for networks with many outputs.
        part: "positive" or "all" of H; they differ for a loss that isn't convex in the outputs
            (see `fnn.curvature`). "all" takes a sweep for each sign, and no samples.

    Returns:
        A function `(params, (inputs, targets))` to a tree like the parameters.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """
    _check("ggn_diagonal", model, loss, key, samples, part)

    def of_batch(params: chex.ArrayTree, batch: chex.ArrayTree) -> chex.ArrayTree:
        params, *batch, size = checked("ggn_diagonal", params, batch)

        def of_parameter(own):
            squares = total([sign * c.sum_of_squares() for sign, c in own])
            return as_dtype(squares / size, own[0][1].dtype)

        def diagonal(params, batch):
            found, tree = _signed(model, loss, params, batch, key, samples, part)
            return jax.tree.unflatten(tree, [of_parameter(own) for own in found])

        return with_auto_axes(diagonal, (params, batch), specs_of(params))

    return of_batch


def ggn_trace(
    model: Callable,
    loss: Callable,
    *,
    key: chex.PRNGKey | None = None,
    samples: int = 0,
    part: str = "positive",
) -> Callable:
    """The trace of the generalised Gauss-Newton matrix, a scalar: Σ of |JᵀS_c|² over N.

    Arguments as for `ggn_diagonal`. No product of factors is formed for it. It is in float32 at
    least.

    Raises:
        TypeError, ValueError: as `ggn_diagonal`.
    """
    _check("ggn_trace", model, loss, key, samples, part)

    def of_batch(params: chex.ArrayTree, batch: chex.ArrayTree) -> jax.Array:
        params, *batch, size = checked("ggn_trace", params, batch)

        def trace(params, batch):
            found, _ = _signed(model, loss, params, batch, key, samples, part, thrifty=False)
            parts = [sign * jnp.sum(c.squared_norms()) for own in found for sign, c in own]
            return total(parts) / size

        return with_auto_axes(trace, (params, batch))

    return of_batch


def _check(where, model, loss, key, samples, part) -> None:
    check_model(where, model)
    check_loss(where, loss)
    check_samples(where, key, samples)
    if check_part(where, part) == "all" and samples:
        raise ValueError(f'{where}: part="all" has no samples, but samples is {samples}.')


def _signed(
    model, loss, params, batch, key, samples, part, thrifty=True
) -> tuple[list[list[tuple[int, SqrtGGN]]], Any]:
    """For each parameter, columns and whether their squares count as they are or are taken off."""
    if part == "positive":
        sweep = {"key": key, "samples": samples}
        found, tree, _ = sqrt_ggn(model, loss, params, batch, thrifty=thrifty, **sweep)
        return [[(1, c)] for c in found], tree

    def seeds(sign, z, target):
        root, signs = output_hessian.signed_sqrt(loss, z, target)
        chosen = (sign * signs > 0).astype(root.dtype)
        return root * chosen.reshape(-1, *[1] * z.ndim)

    both = []
    for sign in (1, -1):
        of_sign = functools.partial(seeds, sign)
        found, tree, _ = sqrt_ggn(model, loss, params, batch, seeds=of_sign, thrifty=thrifty)
        both.append([(sign, c) for c in found])
    return [list(own) for own in zip(*both, strict=True)], tree


def ggn_gram(model: Callable, loss: Callable) -> Callable:
    """The Gram matrix of all columns JₙᵀSₙ, (N · C, N · C), divided by N; or of two batches'.

    C is the number of outputs, less one for softmax, whose Hessian has that rank, and 0 for
    multiclass_hinge and pinball, which have none. Of the Hessian it is the positive part that has
    a root (see `fnn.curvature`).
    It has the GGN's nonzero eigenvalues, and is small where there are more parameters than
    N · C (Dangel, Tatzel & Hennig, "ViViT: Curvature access through the generalized
    Gauss-Newton's low-rank structure", 2022). Arguments as for `ggn_diagonal`.

    Returns:
        A function `(params, batch, other_batch=None)`: with another batch of M examples the
        matrix is (N · C, M · C), divided by √(N M).

    Raises:
        TypeError: an argument is no function.
    """
    check_model("ggn_gram", model)
    check_loss("ggn_gram", loss)

    def of_batch(
        params: chex.ArrayTree, batch: chex.ArrayTree, other: chex.ArrayTree | None = None
    ) -> jax.Array:
        params, *batch, size = checked("ggn_gram", params, batch)
        other_size = size
        if other is not None:
            _, *other, other_size = checked("ggn_gram", params, other)

        def gram(params, batch, other):
            own = sqrt_ggn(model, loss, params, batch)[0]
            others = own if other is None else sqrt_ggn(model, loss, params, other)[0]
            return _grams(own, others) / math.sqrt(size * other_size)

        return with_auto_axes(gram, (params, batch, other))

    return of_batch


def ntk(model: Callable) -> Callable:
    """The empirical neural tangent kernel Jₙ Jₘᵀ of the outputs (Jacot et al. 2018).

    Args:
        model: `model(params, input)`, the outputs of one example, an array.

    Returns:
        A function `(params, inputs, other_inputs=None)` to an array
        (N, *outputs, M, *outputs).
    """
    check_model("ntk", model)

    def of_inputs(
        params: chex.ArrayTree, inputs: chex.ArrayTree, others: chex.ArrayTree | None = None
    ) -> jax.Array:
        params = checked_params("ntk", params)

        def sweep(params, x):
            batch_size(x)
            one_hot = lambda z, _: jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
            found, _, z = sqrt_ggn(model, None, params, (x, None), seeds=one_hot)
            return found, z.shape

        def kernel(params, inputs, others):
            own, shape = sweep(params, inputs)
            other, other_shape = (own, shape) if others is None else sweep(params, others)
            return _grams(own, other).reshape(*shape, *other_shape)

        return with_auto_axes(kernel, (params, inputs, others))

    return of_inputs


def _grams(own: list[SqrtGGN], others: list[SqrtGGN]) -> jax.Array:
    """The inner products of all columns, summed over the parameters."""
    if own[0].count == 0 or others[0].count == 0:
        dtype = widest(jnp.float32, *[c.dtype for c in own])
        return jnp.zeros([c[0].batch_size * c[0].count for c in (own, others)], dtype)
    pairs = zip(own, others, strict=True)
    return total([g.as_batch().gram(h.as_batch()) for g, h in pairs])

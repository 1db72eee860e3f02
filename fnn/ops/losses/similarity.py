"""Losses of embeddings: what belongs together should point the same way, or lie close by."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn import arguments
from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import empty, is_integer, must_be_alike, must_be_real
from fnn.ops.losses.classification import softmax_cross_entropy
from fnn.precision import wide


@rule
def cosine_similarity(x: chex.Array, y: chex.Array) -> jax.Array:
    """x·y / (‖x‖ ‖y‖), the cosine of the angle between x and y, along the last axis.

    Args:
        x, y: floating, of the same shape `(..., features)`.

    Returns:
        The cosines, of shape `(...)`: a scalar for two vectors. 0 where x or y is 0.

    With x̂ = x / ‖x‖, ŷ = y / ‖y‖ and s the cosine, the local gradient is (ŷ − s x̂) / ‖x‖ for x, and
    (x̂ − s ŷ) / ‖y‖ for y; 0 where x or y is 0. Kept: x, y, s, and of each vector its norm and its
    largest entry. Stable for numbers of any size: each vector is divided by its largest entry
    first.

    Raises:
        TypeError: an argument isn't real floating.
        ValueError: the shapes differ, or there is no last axis.
    """
    _check_vectors("cosine_similarity", x=x, y=y)
    return _cosine(x, y)[0].astype(x.dtype)


@cosine_similarity.forward
def _(x, y):
    s, kept = _cosine(x, y)
    return cosine_similarity(x, y), (x, y, s, *kept)


@cosine_similarity.backward
def _(residuals, g):
    return _cosine_gradients(residuals, wide(g))


@rule
def cosine_distance(x: chex.Array, y: chex.Array) -> jax.Array:
    """1 − `cosine_similarity(x, y)`: from 0, for the same direction, to 2.

    Args:
        x, y: floating, of the same shape `(..., features)`.

    Returns:
        The distances, of shape `(...)`: a scalar for two vectors. 1 where x or y is 0.

    Computed as ½ ‖x̂ − ŷ‖² of the unit vectors, which doesn't cancel where they are almost the same.
    The local gradient is minus that of `cosine_similarity`, and the same is kept.

    Raises:
        TypeError: an argument isn't real floating.
        ValueError: the shapes differ, or there is no last axis.
    """
    _check_vectors("cosine_distance", x=x, y=y)
    (a, _, x_inverse), (b, _, y_inverse) = _scaled_unit(wide(x)), _scaled_unit(_as_wide(y, x))
    is_zero = ((x_inverse == 0) | (y_inverse == 0))[..., 0]
    distance = 0.5 * jnp.sum(jnp.square(a - b), axis=-1)
    return jnp.where(is_zero, 1, distance).astype(x.dtype)


@cosine_distance.forward
def _(x, y):
    s, kept = _cosine(x, y)
    return cosine_distance(x, y), (x, y, s, *kept)


@cosine_distance.backward
def _(residuals, g):
    return _cosine_gradients(residuals, -wide(g))


def _cosine(x, y):
    """The cosines in at least float32; and of each vector the largest entry and 1 / scaled norm."""
    (a, *of_x), (b, *of_y) = _scaled_unit(wide(x)), _scaled_unit(_as_wide(y, x))
    return jnp.sum(a * b, axis=-1), (of_x, of_y)


def _as_wide(y, x):
    return y.astype(wide(x).dtype)


def _cosine_gradients(residuals, g):
    """From the vectors themselves: of unit vectors rounded to 16 bits the difference is lost."""
    x, y, s, (x_size, x_inverse), (y_size, y_inverse) = residuals
    s, d = s[..., None], g[..., None]
    a, b = wide(x) / x_size * x_inverse, y.astype(s.dtype) / y_size * y_inverse
    dx = d * (x_inverse / x_size) * (b - s * a)
    dy = d * (y_inverse / y_size) * (a - s * b)
    return dx.astype(x.dtype), dy.astype(y.dtype)


@rule
def triplet(
    anchor: chex.Array, positive: chex.Array, negative: chex.Array, *, margin: float = 1.0
) -> jax.Array:
    """max(0, ‖a − p‖ − ‖a − n‖ + margin): an anchor a should lie closer to p than to n.

    Args:
        anchor, positive, negative: a, p, n, floating, of the same shape `(..., features)`.
        margin: by how much the distances should differ.

    Returns:
        The loss, of shape `(...)`: a scalar for three vectors.

    Where the loss is above 0, with u and v the unit vectors along a − p and a − n, the local
    gradient is u − v for a, −u for p, and v for n; elsewhere it is 0. Kept: u and v, or zeros.
    At the kinks, where the loss is 0 or two vectors are the same, that part of the gradient is 0.

    Raises:
        TypeError: an argument isn't real floating.
        ValueError: the shapes differ, or there is no last axis.

    Source: Schroff, Kalenichenko, Philbin, "FaceNet", CVPR 2015, with distances and not their
    squares, as in Hermans, Beyer, Leibe, arXiv:1703.07737.
    """
    return _triplet(anchor, positive, negative, margin)[0]


@triplet.forward
def _(anchor, positive, negative, *, margin):
    return _triplet(anchor, positive, negative, margin)


@triplet.backward
def _(residuals, g, *, margin):
    u, v, positive, negative = residuals
    d = wide(g)[..., None]
    du, dv = d * wide(u), d * wide(v)
    return (du - dv).astype(u.dtype), (-du).astype(positive.dtype), dv.astype(negative.dtype)


def _triplet(anchor, positive, negative, margin):
    _check_vectors("triplet", anchor=anchor, positive=positive, negative=negative)
    arguments.number("triplet", "margin", margin)
    a = wide(anchor)
    (near, u, _), (far, v, _) = (_polar(a - b.astype(a.dtype)) for b in (positive, negative))
    loss = jnp.maximum(near - far + margin, 0)
    is_active = ~(loss <= 0)  # not "> 0": a nan reaches the gradient
    kept = [jnp.where(is_active, w, 0).astype(anchor.dtype) for w in (u, v)]
    return loss[..., 0].astype(anchor.dtype), (*kept, empty(positive), empty(negative))


def info_nce(
    query: chex.Array,
    keys: chex.Array,
    positive: chex.Array,
    *,
    temperature: float = 0.1,
    normalize: bool = True,
) -> jax.Array:
    """−log of the softmax of s(query, key) / temperature at the right key: which one belongs to it?

    For a batch of n pairs, each other pair's key is a wrong one:

        jnp.mean(info_nce(queries, keys, jnp.arange(n)))

    Args:
        query: floating, `(..., features)`.
        keys: floating, `(n, features)`.
        positive: the number of the right key, integers of shape `(...)`.
        temperature: above 0.
        normalize: whether s is the cosine, as in SimCLR, MoCo and CLIP; else the dot product.

    Returns:
        The loss, of shape `(...)`: a scalar for one query. log n less its mean is a lower bound on
        the mutual information of queries and keys.

    Made of `softmax_cross_entropy`, which keeps the probabilities, `(..., n)`.

    Raises:
        TypeError: query or keys aren't real floating, positive isn't integer.
        ValueError: the shapes don't fit, temperature isn't above 0, or positive, where it is known,
            names no key. (In compiled code that gives nan.)

    Source: van den Oord, Li, Vinyals, "Representation learning with contrastive predictive coding",
    arXiv:1807.03748.
    """
    op = "info_nce"
    must_be_real(op, query=query, keys=keys)
    query, keys = jnp.asarray(query), jnp.asarray(keys)
    arguments.number(op, "temperature", temperature, above=0)
    arguments.flag(op, "normalize", normalize)
    if query.ndim == 0 or keys.ndim != 2 or keys.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{op}: arguments 'query' and 'keys' have shapes {query.shape} and {keys.shape}, "
            "wanted (..., features) and (n, features)."
        )
    positive = jnp.asarray(arguments.array(op, "positive", positive))
    if not is_integer(positive):
        raise TypeError(f"{op}: argument 'positive' has dtype {positive.dtype}, wanted integers.")
    if positive.shape != query.shape[:-1]:
        raise ValueError(
            f"{op}: argument 'positive' has shape {positive.shape}, wanted {query.shape[:-1]} for "
            f"a query of shape {query.shape}."
        )
    if arguments.is_known(positive):
        known = np.asarray(positive)  # under jit JAX's comparison of known numbers is traced
        wrong = known[(known < 0) | (known >= len(keys))]
        if wrong.size:
            raise ValueError(
                f"{op}: argument 'positive' holds {wrong[0]}, but there are {len(keys)} keys."
            )
    if normalize:
        query, keys = (_direction(x) for x in (query, keys))
    similarity = jnp.einsum(
        "...f,nf->...n", query, keys.astype(query.dtype), preferred_element_type=wide(query).dtype
    )
    logits = similarity / jnp.asarray(temperature, similarity.dtype)
    return softmax_cross_entropy(logits, positive).astype(query.dtype)


def _direction(x):
    return _polar(wide(x))[1].astype(x.dtype)


def _polar(x):
    """‖x‖, x / ‖x‖ and 1 / ‖x‖ along the last axis, which stays; all are 0 where x is 0."""
    small, size = _scaled(x)
    square = jnp.sum(jnp.square(small), axis=-1, keepdims=True)
    inverse = _inverse_root(square)
    return square * inverse * size, small * inverse, inverse / size


def _scaled_unit(x):
    """x / ‖x‖, the scale that x is divided by, and 1 / the norm of what that gives."""
    small, size = _scaled(x)
    inverse = _inverse_root(jnp.sum(jnp.square(small), axis=-1, keepdims=True))
    return small * inverse, size, inverse


def _inverse_root(square):
    is_zero = square == 0
    return jnp.where(is_zero, 0, lax.rsqrt(jnp.where(is_zero, 1, square)))


def _scaled(x):
    """x over its largest entry's size, which is held constant: it cancels in what is made of it."""
    size = lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0))
    size = jnp.where((size > 0) & (size < jnp.inf), size, 1)
    return x / size, size


def _check_vectors(op: str, **arrays: chex.Array) -> None:
    (name, first), *_ = arrays.items()
    must_be_real(op, **arrays)
    for other, x in list(arrays.items())[1:]:
        must_be_alike(op, **{name: first, other: x})
    if first.ndim == 0:
        raise ValueError(f"{op}: argument '{name}' has shape (), wanted (..., features).")

"""`ops.attention`: each query's weighted mean of the values."""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.ops.arguments import block_size, is_integer, must_be_array, must_be_real
from fnn.ops.sequences.blockwise import Blocks, blockwise_attention
from fnn.ops.sequences.cudnn import attention_by_cudnn, is_for_cudnn


def attention(
    q: chex.Array,
    k: chex.Array,
    v: chex.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    mask: chex.Array | None = None,
    bias: chex.Array | None = None,
    slopes: chex.Array | None = None,
    q_positions: chex.Array | None = None,
    k_positions: chex.Array | None = None,
    scale: float | None = None,
    block: int | None = None,
) -> jax.Array:
    """softmax(scale · q kᵀ + bias) v for each head: scaled dot-product attention.

    For one example; `jax.vmap` makes it that of a batch. A query attends to a key unless `causal`,
    `window` or `mask` forbids it. A query that may attend to none gives 0, and gradients of 0.

    Args:
        q: the queries, floating, shape `(queries, heads, features)`.
        k: the keys, of q's dtype, shape `(keys, kv_heads, features)`. With fewer heads than q
            each serves `heads / kv_heads` neighbouring heads of q (grouped-query attention; with
            one, multi-query attention).
        v: the values, of q's dtype, shape `(keys, kv_heads, value_features)`.
        causal: whether a query attends only to keys at its own position or before.
        window: how far it looks: only to keys whose position is less than `window` from its own.
            With `causal` these are the last `window` ones, its own among them (Mistral's sliding
            window).
        mask: booleans, true where a query may attend to a key; broadcast to
            `(heads, queries, keys)`, so that `(keys,)` says which keys there are.
        bias: is added to the scores; floating, broadcast like the mask. −inf forbids.
        slopes: ALiBi's, floating, shape `(heads,)`: adds −slope · |difference of positions|. See
            `alibi_slopes`.
        q_positions: integers of shape `(queries,)`; 0, 1, 2, ... unless given. For a step of
            decoding, the position of the one query.
        k_positions: integers of shape `(keys,)`; 0, 1, 2, ... unless given.
        scale: a number, 1/√features unless given. (One that is learned: multiply q with it.)
        block: how many queries and keys a block has, at most; unless given 128 on a CPU and 512
            elsewhere.

    Returns:
        Shape `(queries, heads, value_features)`, of q's dtype. Scores, maxima and sums are in at
        least float32.

    Local gradient, with the probabilities P and the upstream gradient g, for each head:
    ∂v = Pᵀ g, ∂bias = P ∘ (g vᵀ − Σ g ∘ y), ∂q = scale · ∂bias k, ∂k = scale · ∂biasᵀ q.
    Kept: q, k, v, y, and for each query and head the largest score and the logarithm of the sum;
    nothing of the size queries × keys. Where positions aren't given, blocks that `causal` or
    `window` empties are skipped. Smooth, no kink.

    On an NVIDIA GPU value and gradient are cuDNN's, and q, k and v alone are kept, where it takes
    them: of 16 bits, without mask, bias, slopes and positions; at most 128 features, a multiple of
    8, and as many value features; at least two queries, keys and kv_heads; with `causal` as many
    queries as keys, and a `window` only with `causal`.

    Raises:
        TypeError: q, k or v isn't real floating, or they differ in dtype; the mask isn't boolean,
            bias or slopes not floating, the positions not integers.
        ValueError: shapes that don't fit, or an option out of range.

    Sources: Vaswani et al., "Attention is all you need", arXiv:1706.03762; Shazeer,
    arXiv:1911.02150 (multi-query); Ainslie et al., arXiv:2305.13245 (grouped-query); Press et al.,
    arXiv:2108.12409 (ALiBi); Dao, arXiv:2307.08691.
    """
    must_be_real("attention", q=q, k=k, v=v)
    q, k, v = map(jnp.asarray, (q, k, v))
    check(q, k, v, mask, bias, slopes, q_positions, k_positions)
    where = "attention"
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[-1], 1))
    given = {
        "mask": mask,
        "bias": bias,
        "slopes": slopes,
        "q_positions": q_positions,
        "k_positions": k_positions,
    }
    given = {name: x for name, x in given.items() if x is not None}
    causal = arguments.flag(where, "causal", causal)
    window = None if window is None else arguments.integer(where, "window", window, least=1)
    static = {
        "causal": causal,
        "window": window,
        "scale": arguments.fixed_number(where, "scale", scale),
        "block": _block(block),
    }
    if is_for_cudnn(q, k, v, given, causal, window):
        return attention_by_cudnn(q, k, v, **static)
    y, _, _ = blockwise_attention(q, k, v, given, **static)
    return y


def _block(block: int | None) -> int:
    """How many queries and keys a block has, at most."""
    return block_size("attention", block, on_cpu=128, elsewhere=512)


def turns_of(q, k, v, *, causal, window, block, **given) -> tuple[int, int, int]:
    """How often `attention` takes a block of queries and one of keys, and how many each has."""
    given = {name: x for name, x in given.items() if x is not None}
    if is_for_cudnn(q, k, v, given, causal, window):
        return 1, q.shape[0], k.shape[0]
    blocks = Blocks(q, k, v, given, causal, window, 1.0, _block(block))
    return len(blocks.pairs), blocks.size_q, blocks.size_k


def check(q, k, v, mask, bias, slopes, q_positions, k_positions, op="attention") -> None:
    """Raise unless dtypes and shapes are those that `attention` asks for."""
    must_be_real(op, q=q, k=k, v=v)
    for name, x, wanted in (
        ("q", q, "(queries, heads, features)"),
        ("k", k, "(keys, kv_heads, features)"),
        ("v", v, "(keys, kv_heads, value_features)"),
    ):
        if x.ndim != 3:
            raise ValueError(
                f"{op}: argument '{name}' has shape {x.shape}, wanted {wanted}. (For a batch of "
                "examples, jax.vmap it.)"
            )
        if x.dtype != q.dtype:
            raise TypeError(
                f"{op}: argument '{name}' of shape {x.shape} has dtype {x.dtype}, wanted q's, "
                f"{q.dtype}."
            )
    queries, heads, features = q.shape
    keys, kv_heads, _ = k.shape
    if features != k.shape[2]:
        raise ValueError(
            f"{op}: argument 'k' has shape {k.shape}, wanted (keys, kv_heads, {features}), with as "
            f"many features as q of shape {q.shape}."
        )
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"{op}: argument 'v' has shape {v.shape}, wanted ({keys}, {kv_heads}, value_features), "
            f"as k of shape {k.shape} has."
        )
    if heads and (not kv_heads or heads % kv_heads):
        raise ValueError(
            f"{op}: argument 'k' has {kv_heads} heads (shape {k.shape}), wanted a number that "
            f"divides q's {heads} (shape {q.shape})."
        )
    of_scores = heads, queries, keys
    if mask is not None:
        must_be_array(op, "mask", mask)
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"{op}: argument 'mask' of shape {mask.shape} has dtype {mask.dtype}, wanted "
                "booleans, true where a query may attend to a key (for numbers to add: bias)."
            )
        _must_broadcast(op, "mask", mask, of_scores)
    if bias is not None:
        must_be_real(op, bias=bias)
        _must_broadcast(op, "bias", bias, of_scores)
    if slopes is not None:
        must_be_real(op, slopes=slopes)
        _must_have_shape(op, "slopes", slopes, (heads,), "(heads,)")
    for name, x, size, shape in (
        ("q_positions", q_positions, queries, "(queries,)"),
        ("k_positions", k_positions, keys, "(keys,)"),
    ):
        if x is None:
            continue
        must_be_array(op, name, x)
        if not is_integer(x):
            raise TypeError(
                f"{op}: argument '{name}' of shape {x.shape} has dtype {x.dtype}, wanted integers."
            )
        _must_have_shape(op, name, x, (size,), shape)


def _must_have_shape(op: str, name: str, x, wanted: tuple[int, ...], meaning: str) -> None:
    if x.shape != wanted:
        raise ValueError(
            f"{op}: argument '{name}' has shape {x.shape}, wanted {wanted}: {meaning}."
        )


def _must_broadcast(op: str, name: str, x, wanted: tuple[int, ...]) -> None:
    own = (1,) * (3 - x.ndim) + x.shape
    if x.ndim > 3 or any(n not in (1, m) for n, m in zip(own, wanted, strict=True)):
        raise ValueError(
            f"{op}: argument '{name}' has shape {x.shape}, wanted one that is broadcast to "
            f"{wanted}: (heads, queries, keys)."
        )

"""`ops.attention`, block by block: the rule.

The scores of all queries and keys are never held at once. Forward goes over blocks of queries and
keys with a running maximum and a running sum (Milakov and Gimelshein, arXiv:1805.02867), backward
makes each block's probabilities again from what was kept. The gradients are those of
FlashAttention-2 (Dao, arXiv:2307.08691).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn.meshes import as_varying
from fnn.operation import compiled_rule as rule
from fnn.precision import product, signed, wide, wide_dtype, widest


@rule
def blockwise_attention(q, k, v, given, *, causal, window, scale, block):
    """`attention`, with what its backward needs: (y, m, r).

    `given` holds those of mask, bias, slopes, q_positions and k_positions that there are.

    For each kv head, query and head of its group, m is the largest score and r = log Σ e^(s − m).
    m counts as a constant: r's derivative is that of log Σ eˢ, and m's is 0. (Their sum would lose
    r where the scores are large.)
    """
    blocks = Blocks(q, k, v, given, causal, window, scale, block)
    return finished(blocks, q, running(blocks, q, k, v, given, of_no_keys(blocks)))


def of_no_keys(blocks: Blocks) -> tuple:
    """The values' weighted sum, each query's largest score, the sum of its weights: all empty."""
    return blocks.zeros("qnv"), blocks.zeros("cqg", -jnp.inf), blocks.zeros("cqg")


def running(blocks: Blocks, q, k, v, given, total: tuple) -> tuple:
    """The same of these keys too, after those of `total`. Weights are e^(score − largest)."""
    parts = blocks.parts(q, k, v, given)

    def step(total, i, j):
        y, largest, sums = total
        s = blocks.scores(parts, i, j)
        old_y = blocks.rows(y, i)
        old_largest, old_sum = blocks.queries(largest, i, 1), blocks.queries(sums, i, 1)
        new = jnp.maximum(old_largest, jnp.max(s, axis=-1))
        shift = jnp.where(new == -jnp.inf, 0, new)
        p, faded = jnp.exp(_below(s, shift)), jnp.exp(old_largest - shift)
        new_y = old_y * _beside(faded) + product("cqgk,kch->qcgh", p, blocks.keys(parts.v, j))
        new_sum = old_sum * faded + jnp.sum(p, axis=-1)
        return (
            blocks.with_rows(y, new_y, i),
            blocks.with_queries(largest, new, i),
            blocks.with_queries(sums, new_sum, i),
        )

    return blocks.run(step, total)


def finished(blocks: Blocks, q, total: tuple) -> tuple:
    """(y, m, r) of `blockwise_attention`, when all keys were met."""
    y, largest, sums = total
    sums = jnp.where(sums == 0, 1, sums)
    y = y / blocks.heads_joined(sums)[..., None]
    return (
        y[: q.shape[0]].astype(q.dtype),
        jnp.where(largest == -jnp.inf, 0, largest),
        jnp.log(sums),
    )


@blockwise_attention.forward
def _(q, k, v, given, **static):
    y, m, r = blockwise_attention(q, k, v, given, **static)
    return (y, m, r), ((q, k, v, given), y, m, r)


@blockwise_attention.backward
def _(residuals, g, *, causal, window, scale, block):
    """∂s = P ∘ (g vᵀ − Σ g ∘ y + ∂r), and from it all others."""
    arrays, y, m, r = residuals
    blocks = Blocks(*arrays, causal, window, scale, block)
    parts = blocks.parts(*arrays)
    g_y, _, g_r = g
    mean = blocks.heads_apart(jnp.sum(wide(g_y) * wide(y), axis=-1)) - g_r
    g_y = _padded(g_y, 0, blocks.sizes["q"])

    def block_of_gradients(parts, m, r, g_y, mean, i, j):
        q, k, v = blocks.rows(parts.q, i), blocks.keys(parts.k, j), blocks.keys(parts.v, j)
        g = blocks.rows(g_y, i)
        p = blocks.probabilities(parts, m, r, i, j)
        dv = product("cqgk,qcgh->kch", p, g)
        dp = product("qcgh,kch->cqgk", g, v)
        ds = p * (dp - blocks.queries(mean, i, 1)[..., None])
        dq = scale * product("cqgk,kch->qcgh", ds, k)
        dk = scale * product("cqgk,qcgh->kch", ds, q)
        d_bias = blocks.bias_gradient(parts, ds)
        d_slopes = blocks.slopes_gradient(parts, ds, i, j)
        return dq, dk, dv, d_bias, d_slopes

    again = jax.checkpoint(block_of_gradients, prevent_cse=False)

    def step(total, i, j):
        dq, dk, dv, d_bias, d_slopes = again(parts, m, r, g_y, mean, i, j)
        sum_q, sum_k, sum_v, sum_bias, sum_slopes = total
        add = lambda x, dx: None if x is None else x + dx
        return (
            blocks.with_rows(sum_q, blocks.rows(sum_q, i) + dq, i),
            blocks.with_keys(sum_k, blocks.keys(sum_k, j) + dk, j),
            blocks.with_keys(sum_v, blocks.keys(sum_v, j) + dv, j),
            blocks.with_both(sum_bias, add(blocks.both(sum_bias, i, j), d_bias), i, j),
            add(sum_slopes, d_slopes),
        )

    zeros = lambda x: None if x is None else blocks.zeros_of(x.shape)
    start = (
        blocks.zeros("qnh"),
        blocks.zeros("kch"),
        blocks.zeros("kcv"),
        zeros(parts.bias),
        zeros(parts.slopes),
    )
    dq, dk, dv, d_bias, d_slopes = blocks.run(step, start)
    q, k, v, given = arrays
    d_given = dict.fromkeys(given)
    if parts.bias is not None:
        bias = given["bias"]
        d_given["bias"] = blocks.of_scores_joined(d_bias, bias).astype(bias.dtype)
    if parts.slopes is not None:
        slopes = given["slopes"]
        d_given["slopes"] = d_slopes.reshape(slopes.shape).astype(slopes.dtype)
    return (
        dq[: q.shape[0]].astype(q.dtype),
        dk[: k.shape[0]].astype(k.dtype),
        dv[: v.shape[0]].astype(v.dtype),
        d_given,
    )


@blockwise_attention.tangent
def _(residuals, dq, dk, dv, d_given, *, causal, window, scale, block):
    """dy = Σ P ∘ ds v + P dv − μ y with μ = Σ P ∘ ds, which is dr."""
    arrays, y, m, r = residuals
    blocks = Blocks(*arrays, causal, window, scale, block)
    parts = blocks.parts(*arrays)
    tangents = blocks.parts(dq, dk, dv, _tangents_of(arrays[3], d_given))

    def block_of_tangents(parts, tangents, m, r, i, j):
        q, k, v = blocks.rows(parts.q, i), blocks.keys(parts.k, j), blocks.keys(parts.v, j)
        dq, dk = blocks.rows(tangents.q, i), blocks.keys(tangents.k, j)
        p = blocks.probabilities(parts, m, r, i, j)
        ds = scale * (product("qcgh,kch->cqgk", dq, k) + product("qcgh,kch->cqgk", q, dk))
        ds = p * blocks.plus_bias(tangents, ds, i, j)
        dy = product("cqgk,kch->qcgh", ds, v)
        dy = dy + product("cqgk,kch->qcgh", p, blocks.keys(tangents.v, j))
        return dy, jnp.sum(ds, axis=-1)

    again = jax.checkpoint(block_of_tangents, prevent_cse=False)

    def step(total, i, j):
        sum_y, sum_r = total
        dy, dr = again(parts, tangents, m, r, i, j)
        return (
            blocks.with_rows(sum_y, blocks.rows(sum_y, i) + dy, i),
            blocks.with_queries(sum_r, blocks.queries(sum_r, i, 1) + dr, i),
        )

    dy, dr = blocks.run(step, (blocks.zeros("qnv"), blocks.zeros("cqg")))
    dy = dy[: y.shape[0]] - blocks.heads_joined(dr)[: y.shape[0], :, None] * wide(y)
    return dy.astype(y.dtype), None, dr


def _tangents_of(given, d_given):
    """The tangents of bias and slopes, with the positions, which slopes are multiplied with."""
    positions = {n: x for n, x in given.items() if n in ("q_positions", "k_positions")}
    moving = {n: dx for n, dx in d_given.items() if n in ("bias", "slopes")}
    return positions | moving


class _Parts(NamedTuple):
    """The arrays of a call, with an axis for the kv heads (c) and one for the heads of each (g).

    q is (q, n, h), k (k, c, h), v (k, c, v); mask and bias are (c, q, g, k), with 1 where they
    are broadcast; slopes are (c, g). Queries and keys are padded to whole blocks.
    """

    q: Any
    k: Any
    v: Any
    mask: Any
    bias: Any
    slopes: Any
    q_positions: Any
    k_positions: Any


class Blocks:
    """How the arrays of a call are cut into blocks; i counts those of queries, j those of keys."""

    def __init__(self, q, k, v, given, causal: bool, window: int | None, scale: float, block: int):
        self.causal, self.window, self.scale = causal, window, scale
        self.keys_total = k.shape[0]
        self.number_q, self.size_q = _cut(q.shape[0], block)
        self.number_k, self.size_k = _cut(k.shape[0], block)
        c = k.shape[1]
        self.sizes = {
            "q": self.number_q * self.size_q,
            "k": self.number_k * self.size_k,
            "c": c,
            "n": q.shape[1],
            "g": q.shape[1] // max(c, 1),
            "h": q.shape[2],
            "v": v.shape[2],
        }
        self.type = jax.typeof(q)
        self.dtype = wide_dtype(q.dtype)
        self.aligned = not {"q_positions", "k_positions"} & set(given)
        self.pairs = [
            (i, j)
            for i in range(self.number_q)
            for j in range(self.number_k)
            if not self.aligned or self._may_attend(i, j)
        ]

    def _may_attend(self, i: int, j: int) -> bool:
        """Whether a query of the i-th block may attend to a key of the j-th."""
        first_q, first_k = i * self.size_q, j * self.size_k
        last_q, last_k = first_q + self.size_q - 1, first_k + self.size_k - 1
        if self.causal and first_k > last_q:
            return False
        far = max(first_k - last_q, first_q - last_k)
        return self.window is None or far < self.window

    def run(self, step, total):
        """step(total, i, j) over all pairs of blocks, in a loop unless there is only one."""
        sizes = self.sizes
        if not self.pairs or not sizes["q"] * sizes["k"] * sizes["n"]:
            return total
        if len(self.pairs) == 1:
            return step(total, *self.pairs[0])
        pairs = jnp.asarray(np.asarray(self.pairs, np.int32))
        return lax.scan(lambda total, ij: (step(total, ij[0], ij[1]), None), total, pairs)[0]

    def zeros(self, axes: str, value: float = 0) -> jax.Array:
        return self.zeros_of(tuple(self.sizes[a] for a in axes), value)

    def zeros_of(self, shape, value: float = 0) -> jax.Array:
        return as_varying(jnp.full(shape, value, self.dtype), self.type)

    # ------------------------------------------------------------------ cutting and joining

    def parts(self, q, k, v, given) -> _Parts:
        sizes = self.sizes
        slopes = given.get("slopes")
        q_positions, k_positions = given.get("q_positions"), given.get("k_positions")
        return _Parts(
            _padded(q, 0, sizes["q"]),
            _padded(k, 0, sizes["k"]),
            _padded(v, 0, sizes["k"]),
            self.of_scores_apart(given.get("mask")),
            self.of_scores_apart(given.get("bias")),
            None if slopes is None else slopes.reshape(sizes["c"], sizes["g"]),
            None if q_positions is None else _padded(signed(q_positions), 0, sizes["q"]),
            None if k_positions is None else _padded(signed(k_positions), 0, sizes["k"]),
        )

    def heads_apart(self, x):
        """(queries, heads) as (c, q, g)."""
        x = _padded(x, 0, self.sizes["q"])
        x = x.reshape(x.shape[0], self.sizes["c"], self.sizes["g"])
        return jnp.moveaxis(x, 0, 1)

    def heads_joined(self, x):
        """(c, q, g) as (q, n)."""
        return jnp.moveaxis(x, 1, 0).reshape(x.shape[1], self.sizes["n"])

    def of_scores_apart(self, x):
        """A mask or a bias, (heads, queries, keys) or what is broadcast to it, as (c, q, g, k)."""
        if x is None:
            return None
        x = x.reshape((1,) * (3 - x.ndim) + x.shape)
        heads = (1, 1) if x.shape[0] == 1 else (self.sizes["c"], self.sizes["g"])
        x = x if x.shape[1] == 1 else _padded(x, 1, self.sizes["q"])
        x = x if x.shape[2] == 1 else _padded(x, 2, self.sizes["k"])
        return jnp.moveaxis(x.reshape(*heads, *x.shape[1:]), 1, 2)

    def of_scores_joined(self, x, like):
        x = jnp.moveaxis(x, 2, 1)
        x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        shape = (1,) * (3 - like.ndim) + like.shape
        return x[:, : shape[1], : shape[2]].reshape(like.shape)

    def queries(self, x, i, axis: int = 0):
        return x if self.number_q == 1 else _sliced(x, i, self.size_q, axis)

    def rows(self, x, i):
        """A block of queries, or of what has their shape, (q, n, h) as (q, c, g, h)."""
        x = self.queries(x, i)
        return x.reshape(x.shape[0], self.sizes["c"], self.sizes["g"], x.shape[2])

    def keys(self, x, j, axis: int = 0):
        return x if self.number_k == 1 else _sliced(x, j, self.size_k, axis)

    def both(self, x, i, j):
        """The block of a bias or a mask (c, q, g, k)."""
        if x is None:
            return None
        x = x if x.shape[1] == 1 else self.queries(x, i, 1)
        return x if x.shape[3] == 1 else self.keys(x, j, 3)

    def with_queries(self, x, block, i):
        return lax.dynamic_update_slice_in_dim(x, block, i * self.size_q, 1)

    def with_rows(self, x, block, i):
        block = block.reshape(block.shape[0], *x.shape[1:])
        return lax.dynamic_update_slice_in_dim(x, block, i * self.size_q, 0)

    def with_keys(self, x, block, j):
        return lax.dynamic_update_slice_in_dim(x, block, j * self.size_k, 0)

    def with_both(self, x, block, i, j):
        if x is None:
            return None
        starts = 0, i * self.size_q, 0, j * self.size_k
        starts = [s if n > 1 else 0 for s, n in zip(starts, x.shape, strict=True)]
        return lax.dynamic_update_slice(x, block, [jnp.asarray(s, jnp.int32) for s in starts])

    # ----------------------------------------------------------------------- a block of scores

    def scores(self, parts: _Parts, i, j):
        """The scores (c, q, g, k) of a block, −inf where a query may not attend."""
        q, k = self.rows(parts.q, i), self.keys(parts.k, j)
        if q.dtype == self.dtype:
            # Not the scores: compilers make one operation of a product and the difference from the
            # largest, which rounds once. Scores above 1e10 would exceed the largest by hundreds.
            s = product("qcgh,kch->cqgk", self.scale * q, k)
        else:
            s = self.scale * product("qcgh,kch->cqgk", q, k)
        s = self.plus_bias(parts, s, i, j)
        allowed = self.allowed(parts, i, j)
        return s if allowed is None else jnp.where(allowed, s, -jnp.inf)

    def plus_bias(self, parts: _Parts, s, i, j):
        bias = self.both(parts.bias, i, j)
        if bias is not None:
            s = s + bias.astype(s.dtype)
        if parts.slopes is not None:
            s = s - parts.slopes.astype(s.dtype)[:, None, :, None] * self.distances(parts, i, j)
        return s

    def probabilities(self, parts: _Parts, m, r, i, j):
        """P (c, q, g, k), made again from the scores."""
        s, m, r = self.scores(parts, i, j), self.queries(m, i, 1), self.queries(r, i, 1)
        return jnp.exp(_below(s, m) - r[..., None])

    def allowed(self, parts: _Parts, i, j):
        """True where a query may attend to a key; None if all may."""
        rules = []
        if self.causal or self.window is not None:
            difference = self.differences(parts, i, j)[None, :, None, :]
            if self.causal:
                rules.append(difference >= 0)
            if self.window is not None:
                rules.append(jnp.abs(difference) < self.window)
        if self.sizes["k"] > self.keys_total:
            index = j * self.size_k + jnp.arange(self.size_k, dtype=jnp.int32)
            rules.append(index < self.keys_total)
        if parts.mask is not None:
            rules.append(self.both(parts.mask, i, j))
        shape = max((r.ndim for r in rules), default=0)
        rules = [jnp.expand_dims(r, range(shape - r.ndim)) for r in rules]
        return functools.reduce(jnp.logical_and, rules) if rules else None

    def differences(self, parts: _Parts, i, j):
        """How far behind the query's position the key's is: (q, k)."""
        at_q = self._positions(parts.q_positions, i, self.size_q, self.queries)
        at_k = self._positions(parts.k_positions, j, self.size_k, self.keys)
        kind = widest(at_q.dtype, at_k.dtype)
        return at_q.astype(kind)[:, None] - at_k.astype(kind)[None, :]

    def _positions(self, given, i, size: int, block):
        if given is not None:
            return block(given, i)
        return i * size + jnp.arange(size, dtype=jnp.int32)

    def distances(self, parts: _Parts, i, j):
        """|difference of positions|, to be multiplied with slopes: (1, q, 1, k)."""
        return jnp.abs(self.differences(parts, i, j)).astype(self.dtype)[None, :, None, :]

    def bias_gradient(self, parts: _Parts, ds):
        if parts.bias is None:
            return None
        axes = [d for d, n in enumerate(parts.bias.shape) if n == 1]
        return jnp.sum(ds, axis=tuple(axes), keepdims=True)

    def slopes_gradient(self, parts: _Parts, ds, i, j):
        if parts.slopes is None:
            return None
        return -jnp.sum(ds * self.distances(parts, i, j), axis=(1, 3))


def _cut(size: int, block: int) -> tuple[int, int]:
    """How many blocks, and how large: as even as can be."""
    number = max(math.ceil(size / block), 1)
    return number, math.ceil(size / number)


def _below(s, largest):
    """Scores minus the largest of each query, at most 0.

    Rounded otherwise than where it was found, a very large one may exceed it by much.
    """
    s = s - largest[..., None]
    return s - lax.stop_gradient(jnp.maximum(s, 0))


def _beside(x):
    """(c, q, g) as (q, c, g, 1), to be multiplied with values."""
    return jnp.moveaxis(x, 0, 1)[..., None]


def _padded(x, axis: int, size: int):
    """x with zeros (or False) at the end of an axis."""
    missing = size - x.shape[axis]
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if d == axis else 0) for d in range(x.ndim)])


def _sliced(x, i, size: int, axis: int):
    return lax.dynamic_slice_in_dim(x, i * size, size, axis)

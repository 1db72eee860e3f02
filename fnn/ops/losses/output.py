"""A classifier's last layer and its loss in one, for as many classes as a vocabulary has.

The logits, positions × classes, are by far the largest array of a language model. Here they are
made block by block of classes, twice, and never held at once (Wijmans et al., "Cut your losses in
large-vocabulary language models", arXiv:2411.09009).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn import arguments
from fnn.meshes import as_varying, broadcast, explicit_mesh, sharding_of
from fnn.operation import compiled_rule as rule
from fnn.ops.arguments import block_size, is_integer, must_be_array, must_be_real, one_or_nan
from fnn.precision import product, signed, wide


def linear_softmax_cross_entropy(
    h: chex.Array,
    W: chex.Array,
    labels: chex.Array,
    *,
    bias: chex.Array | None = None,
    label_smoothing: float = 0.0,
    ignore: int | None = None,
    z_loss: float = 0.0,
    block: int | None = None,
) -> jax.Array:
    """`softmax_cross_entropy(h Wᵀ + bias, labels)`, without ever holding all logits.

    Args:
        h: what the last layer is given, floating, shape `(..., features)`; all but the last axis
            are positions.
        W: the last layer's weights, of h's dtype, shape `(classes, features)`.
        labels: the right classes, integers of shape `(...)`.
        bias: the last layer's bias, floating, shape `(classes,)`.
        label_smoothing: ε in [0, 1): the target is (1 − ε) of the label and ε / classes of each.
        ignore: a label that marks positions without a loss: 0 there, and a gradient of 0.
        z_loss: adds z_loss · (log Σ e^logits)², which keeps the logits from drifting.
        block: how many classes' logits are held at once, for all positions; unless given 256 on a
            CPU and 4096 elsewhere.

    Returns:
        The loss at each position, of shape `(...)` and h's dtype. The mean over those that count is
        `jnp.sum(losses) / jnp.sum(labels != ignore)`.

    Local gradient: with p = softmax(logits), target q and G = g (p − q): ∂h = G W, ∂W = Gᵀ h and
    ∂bias = Σ G. Kept: h, W, the labels, and for each position the largest logit and the logarithm
    of the sum. The logits are computed again, a third more products than when they are kept (in
    a batch whose examples share W two thirds: h and W each have a pass of their own). Sums are in
    at least float32. Smooth, no kink.

    Raises:
        TypeError: h or W isn't real floating, they differ in dtype, or the labels aren't integers.
        ValueError: shapes that don't fit, no classes, an option out of range, or, where its value
            is known, a label that names no class and isn't `ignore`. In compiled code such a label
            gives NaN, and gradients of NaN.

    Sources: Wijmans et al., arXiv:2411.09009; Szegedy et al., arXiv:1512.00567 (label smoothing);
    de Brébisson and Vincent, arXiv:1604.08859 (z-loss).
    """
    where = "linear_softmax_cross_entropy"
    must_be_real(where, h=h, W=W)
    h, W = jnp.asarray(h), jnp.asarray(W)
    _check(where, h, W, labels, bias)
    labels = jnp.asarray(labels)
    smoothing = arguments.fixed_number(where, "label_smoothing", label_smoothing, least=0, below=1)
    z_loss = arguments.fixed_number(where, "z_loss", z_loss, least=0)
    if ignore is not None:
        reach = jnp.iinfo(signed(labels).dtype)
        ignore = arguments.integer(where, "ignore", ignore, least=reach.min, most=reach.max)
    loss, m, r = linear_cross_entropy(
        h,
        W,
        labels,
        {} if bias is None else {"bias": bias},
        label_smoothing=smoothing,
        ignore=ignore,
        block=block_size(where, block, on_cpu=256, elsewhere=4096),
    )
    if z_loss:
        log_sum = m + r
        penalty = jnp.asarray(z_loss, log_sum.dtype) * log_sum * log_sum
        if ignore is not None:
            penalty = jnp.where(signed(labels) == ignore, 0, penalty)
        loss = loss + penalty
    return loss.astype(h.dtype)


@rule
def linear_cross_entropy(h, W, labels, given, *, label_smoothing, ignore, block):
    """`linear_softmax_cross_entropy` without z-loss, with what its backward needs: (loss, m, r).

    `given` holds the bias, if there is one. At each position m is the largest logit and
    r = log Σ e^(logit − m). m counts as a constant: r's derivative is that of log Σ e^logit, and
    m's is 0. (Their sum would lose r where the logits are large.)
    """
    blocks, shape = _Blocks.of(W, block), labels.shape
    h, labels = _flat(h, 1), _flat(labels)

    def step(total, i):
        largest, sums, target = total
        s, q = _logits_and_target(h, W, labels, given, blocks, i, label_smoothing)
        target = target + jnp.sum(jnp.where(q == 0, 0, q * s), axis=-1)
        s = blocks.or_else(s, i, -jnp.inf)
        new = jnp.maximum(largest, jnp.max(s, axis=-1))
        shift = jnp.where(new == -jnp.inf, 0, new)
        sums = sums * jnp.exp(largest - shift) + jnp.sum(jnp.exp(s - shift[..., None]), axis=-1)
        return (new, sums, target), None

    zero = _zeros(h, labels)
    (largest, sums, target), _ = blocks.run(step, (zero - jnp.inf, zero, zero))
    m, r = jnp.where(largest == -jnp.inf, 0, largest), jnp.log(sums)
    loss = _at_labels((m - target) + r, labels, blocks, ignore)
    return loss.reshape(shape), m.reshape(shape), r.reshape(shape)


@linear_cross_entropy.vmapped
def _(size, axes, h, W, labels, given, **static):
    """Examples that share the weights are so many more positions."""
    h_axis, W_axis, labels_axis, of_given = axes
    if W_axis is not None or any(a is not None for a in of_given.values()):
        return None
    in_front = lambda x, axis: (
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
    )
    h, labels = in_front(h, h_axis), in_front(labels, labels_axis)
    return linear_cross_entropy(h, W, labels, given, **static)


@linear_cross_entropy.look
def _(types, h, W, labels, given, *, label_smoothing, ignore, block):
    if labels is None:
        return
    y, classes = np.asarray(labels), types[1].shape[0]
    y = y if ignore is None else y[y != ignore]
    if y.size and (y.min() < 0 or y.max() >= classes):
        wrong = y.min() if y.min() < 0 else y.max()
        also = "" if ignore is None else f", or {ignore} to be ignored"
        raise ValueError(
            f"linear_softmax_cross_entropy: labels hold {wrong}, but there are {classes} classes: "
            f"labels are 0, ..., {classes - 1}{also}."
        )


@linear_cross_entropy.forward
def _(h, W, labels, given, **static):
    loss, m, r = linear_cross_entropy(h, W, labels, given, **static)
    return (loss, m, r), (h, W, labels, given, m, r)


@linear_cross_entropy.backward
def _(residuals, g, *, label_smoothing, ignore, block):
    """G = g (p − q) + g_r p for each block of classes, and from it ∂h, ∂W and ∂bias."""
    shape = residuals[0].shape
    residuals = h, W, labels, given, m, r = _flat_residuals(residuals)
    blocks = _Blocks.of(W, block)
    g_loss, g_r = _flat(g[0]), _flat(g[2])
    g_loss = _at_labels(g_loss, labels, blocks, ignore)[..., None]
    g_p = g_loss + g_r[..., None]

    def step(dh, i):
        p, q = _probabilities_and_target(residuals, blocks, i, label_smoothing)
        G = g_p * p - g_loss * q
        dh = dh + product("...c,cf->...f", G, blocks.cut(W, i))
        dW = _over_positions(G, h, W).astype(W.dtype)
        return dh, (dW, jnp.sum(G, axis=tuple(range(h.ndim - 1))) if given else None)

    dh, (dW, d_bias) = blocks.run(step, _zeros(h, h))
    d_given = {n: blocks.joined(d_bias).astype(x.dtype) for n, x in given.items()}
    return dh.reshape(shape).astype(h.dtype), blocks.joined(dW), None, d_given


@linear_cross_entropy.tangent
def _(residuals, dh, dW, d_labels, d_given, *, label_smoothing, ignore, block):
    """ds = dh Wᵀ + h dWᵀ + dbias; dr = Σ p ds, and the loss moves by Σ (p − q) ds."""
    shape = residuals[2].shape
    residuals = h, W, labels, given, m, r = _flat_residuals(residuals)
    blocks, dh = _Blocks.of(W, block), _flat(dh, 1)

    def step(total, i):
        d_loss, dr = total
        p, q = _probabilities_and_target(residuals, blocks, i, label_smoothing)
        ds = product("...f,cf->...c", dh, blocks.cut(W, i))
        ds = ds + product("...f,cf->...c", h, blocks.cut(dW, i))
        if given:
            ds = _plus(ds, blocks.cut(d_given["bias"], i))
        return (d_loss + jnp.sum((p - q) * ds, axis=-1), dr + jnp.sum(p * ds, axis=-1)), None

    zero = _zeros(h, labels)
    (d_loss, dr), _ = blocks.run(step, (zero, zero))
    d_loss = _at_labels(d_loss, labels, blocks, ignore)
    return d_loss.reshape(shape), None, dr.reshape(shape)


# On accelerators blocks are large, and products are fastest where rows begin at whole tiles.
LARGE, TILE = 1024, 128


class _Blocks(NamedTuple):
    """How the classes are cut into `number` blocks of `size`; the last begins where it fits."""

    classes: int
    number: int
    size: int

    @staticmethod
    def of(W, block: int) -> _Blocks:
        classes = W.shape[0]
        number = math.ceil(classes / block)
        size = math.ceil(classes / number)
        if size >= LARGE:
            size = min(TILE * math.ceil(size / TILE), block, classes)
        return _Blocks(classes, number, size)

    def run(self, step: Callable, start: Any):
        """step(total, i) over all blocks, in a loop unless there is only one."""
        if self.number == 1:
            total, of_block = step(start, 0)
            return total, jax.tree.map(lambda x: x[None], of_block)
        return lax.scan(step, start, jnp.arange(self.number, dtype=jnp.int32))

    def first(self, i):
        return jnp.minimum(i * self.size, self.classes - self.size)

    def cut(self, x, i):
        if self.number == 1:
            return x
        return lax.dynamic_slice_in_dim(x, self.first(i), self.size, 0)

    def index(self, i):
        return self.first(i) + jnp.arange(self.size, dtype=jnp.int32)

    def or_else(self, x, i, other):
        """x (..., size), with another number for the classes that an earlier block has too."""
        if self.number * self.size == self.classes:
            return x
        is_own = self.index(i) >= i * self.size
        return jnp.where(is_own.reshape((1,) * (x.ndim - 1) + is_own.shape), x, other)

    def joined(self, x):
        """Blocks (number, size, ...) as (classes, ...)."""
        twice = self.number * self.size - self.classes
        whole = x.reshape(self.number * self.size, *x.shape[2:])
        if not twice:
            return whole
        end = (self.number - 1) * self.size
        return jnp.concatenate([whole[:end], whole[end + twice :]])


def _logits_and_target(h, W, labels, given, blocks: _Blocks, i, smoothing: float):
    """The logits of a block of classes, and the target distribution there."""
    s = product("...f,cf->...c", h, blocks.cut(W, i))
    if given:
        s = _plus(s, blocks.cut(given["bias"], i))
    labels = signed(labels)[..., None]
    index = blocks.index(i).astype(labels.dtype).reshape(*(1,) * (h.ndim - 1), blocks.size)
    rest = smoothing / blocks.classes
    q = jnp.where(labels == index, 1 - smoothing + rest, rest).astype(s.dtype)
    return s, blocks.or_else(q, i, 0)


def _probabilities_and_target(residuals, blocks: _Blocks, i, smoothing: float):
    h, W, labels, given, m, r = residuals
    s, q = _logits_and_target(h, W, labels, given, blocks, i, smoothing)
    s = s - m[..., None]
    # Rounded otherwise than in forward, a very large logit may exceed the largest by much.
    s = s - lax.stop_gradient(jnp.maximum(s, 0))
    return blocks.or_else(jnp.exp(s - r[..., None]), i, 0), q


def _flat(x, kept: int = 0):
    """x with all positions on one axis, but for the last `kept` axes.

    On a mesh with explicit axes, where a batch may be divided among devices, they stay.
    """
    if explicit_mesh(x) is not None:
        return x
    count = math.prod(x.shape[: x.ndim - kept])
    return x.reshape(count, *x.shape[x.ndim - kept :])


def _flat_residuals(residuals):
    h, W, labels, given, m, r = residuals
    return _flat(h, 1), W, _flat(labels), given, _flat(m), _flat(r)


def _plus(s, bias):
    return s + bias.astype(s.dtype).reshape((1,) * (s.ndim - 1) + bias.shape)


def _zeros(h, like):
    """Zeros to sum in, of the shape and sharding of `like`."""
    zero = jnp.zeros((), wide(h).dtype)
    return as_varying(broadcast(zero, jax.typeof(like), ()), jax.typeof(h))


def _at_labels(x, labels, blocks: _Blocks, ignore):
    """x, but 0 where the label is ignored, and NaN where it names no class."""
    index = signed(labels)
    is_class = (index >= 0) & (index < blocks.classes)
    if ignore is not None:
        x, is_class = jnp.where(index == ignore, 0, x), is_class | (index == ignore)
    return x * one_or_nan(is_class, x.dtype)


def _over_positions(G, h, W):
    """Gᵀ h (classes, features), summed over all positions."""
    return product("...c,...f->cf", G, h, sharding_of(W))


def _check(op: str, h, W, labels, bias) -> None:
    must_be_array(op, "labels", labels)
    if h.ndim == 0:
        raise ValueError(f"{op}: argument 'h' has shape (), wanted (..., features).")
    if W.ndim != 2 or W.shape[1] != h.shape[-1] or not W.shape[0]:
        raise ValueError(
            f"{op}: argument 'W' has shape {W.shape}, wanted (classes, {h.shape[-1]}) with at "
            f"least one class, for h of shape {h.shape}."
        )
    if W.dtype != h.dtype:
        raise TypeError(
            f"{op}: argument 'W' of shape {W.shape} has dtype {W.dtype}, wanted h's, {h.dtype}."
        )
    if not is_integer(labels):
        raise TypeError(
            f"{op}: argument 'labels' of shape {labels.shape} has dtype {labels.dtype}, wanted "
            f"integers of shape {h.shape[:-1]}."
        )
    if labels.shape != h.shape[:-1]:
        raise ValueError(
            f"{op}: argument 'labels' has shape {labels.shape}, wanted {h.shape[:-1]} for h of "
            f"shape {h.shape}. (For a batch of examples, jax.vmap the loss.)"
        )
    if bias is not None:
        must_be_real(op, bias=bias)
        if bias.shape != W.shape[:1]:
            raise ValueError(
                f"{op}: argument 'bias' has shape {bias.shape}, wanted {W.shape[:1]}: (classes,)."
            )

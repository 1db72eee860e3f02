"""Every operation of `fnn.ops` with arguments for one example, and the same in plain JAX.

The references are written with `jax.nn` and `jax.numpy`, without rules; at the arguments given
here no function has a kink, and no two pieces are equal.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import ops
from fnn.ops.stochastic import kept


def _rotary(x):
    a, b = jnp.split(x, 2, -1)
    turned = (a + 1j * b) * np.exp(1j * np.arange(x.shape[0]))[:, None].astype("complex64")
    return jnp.concatenate([turned.real, turned.imag], -1).astype(x.dtype)


nn = jax.nn


class Case(NamedTuple):
    """`op` and `reference` take the same; `shapes` those of the arrays, None for an integer label.

    classes: how many there are, for the labels.
    """

    op: Callable
    reference: Callable
    shapes: tuple[Any, ...] = ((4,),)
    classes: int = 4

    def example(self, dtype=jnp.float32, batch: tuple[int, ...] = (), seed: int = 0):
        """Arrays for an example, or for a batch of them."""
        random = np.random.default_rng(seed)
        args = []
        for shape in self.shapes:
            if shape is None:
                args.append(jnp.asarray(random.integers(0, self.classes, batch), jnp.int32))
            else:
                args.append(jnp.asarray(random.normal(size=batch + shape), dtype))
        return tuple(args)


def _probabilities(z):
    return jax.nn.sigmoid(z)


def _halves(gate):
    def gated(x):
        a, g = jnp.split(x, 2, -1)
        return a * gate(g)

    return gated


def _cross_entropy(logits, labels):
    return -jax.nn.log_softmax(logits)[labels]


def _hinge(scores, label):
    margins = jnp.maximum(scores - scores[label] + 1, 0)
    return jnp.sum(jnp.where(jnp.arange(scores.size) == label, 0, margins))


def _lstm_step(z, h, c):
    i, f, g, o = jnp.split(z, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _lstm(z, U, h, c):
    hs = []
    for z_t in z:
        h, c = _lstm_step(z_t + U @ h, h, c)
        hs.append(h)
    return jnp.stack(hs)


def _gru_step(z, u, h):
    (r, q, n), (u_r, u_q, u_n) = jnp.split(z, 3, -1), jnp.split(u, 3, -1)
    r, q = jax.nn.sigmoid(r + u_r), jax.nn.sigmoid(q + u_q)
    return (1 - q) * jnp.tanh(n + r * u_n) + q * h


def _gru(z, U, b, h):
    hs = []
    for z_t in z:
        h = _gru_step(z_t, U @ h + jnp.pad(b, (4, 0)), h)
        hs.append(h)
    return jnp.stack(hs)


def _linear_recurrence(a, b, x):
    xs = []
    for b_t in b:
        x = a * x + b_t
        xs.append(x)
    return jnp.stack(xs)


def _two_of_three(z):
    p = jax.nn.softmax(z)
    best = jnp.sort(p, axis=-1)[:, :0:-1]
    return best / best.sum(-1, keepdims=True)


def _rnn(z, U, h):
    hs = []
    for z_t in z:
        h = jnp.tanh(z_t + U @ h)
        hs.append(h)
    return jnp.stack(hs)


def _binary(logits, labels):
    z = _probabilities(labels)
    return -jnp.sum(z * jax.nn.log_sigmoid(logits) + (1 - z) * jax.nn.log_sigmoid(-logits))


def _focal(logits, labels):
    z = _probabilities(labels)
    p = nn.sigmoid(logits)
    each = z * jax.nn.log_sigmoid(logits) + (1 - z) * jax.nn.log_sigmoid(-logits)
    return -jnp.sum((z * (1 - p) + (1 - z) * p) ** 2 * each)


def _cosine(x, y):
    return jnp.sum(x * y) / jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y))


def _two_letters(log_p):
    """log p of all that three frames may say to spell 1, 2; 0 is the blank."""
    said = [(1, 2, 0), (1, 0, 2), (0, 1, 2), (1, 1, 2), (1, 2, 2)]
    return nn.logsumexp(jnp.stack([sum(log_p[t, c] for t, c in enumerate(w)) for w in said]))


def _huber(a, b):
    d = jnp.abs(a - b)
    return jnp.sum(jnp.where(d <= 1, d * d / 2, d - 0.5))


def _squareplus(x):
    return (x + jnp.sqrt(x * x + 4)) / 2


def _normal(x, axes=-1, epsilon=1e-5):
    return (x - jnp.mean(x, axes, keepdims=True)) / jnp.sqrt(
        jnp.var(x, axes, keepdims=True) + epsilon
    )


def _attention(q, k, v):
    s = jnp.einsum("qnh,knh->nqk", q, k) / np.sqrt(q.shape[-1]).astype(q.dtype)
    s = jnp.where(jnp.tri(q.shape[0], k.shape[0], dtype=bool)[None], s, -jnp.inf)
    return jnp.einsum("nqk,knh->qnh", jax.nn.softmax(s), v)


def _convolution(x, w):
    numbers = ("NHWC", "OIHW", "NHWC")
    return jax.lax.conv_general_dilated(x[None], w, (2, 1), "SAME", dimension_numbers=numbers)[0]


def _conv_transpose(x, w):
    pad = [(1, 1)] * 2
    into = lambda x: jax.lax.conv_general_dilated(
        x[None], w, (2, 2), pad, dimension_numbers=("NHWC", "OIHW", "NHWC")
    )[0]
    of = jax.ShapeDtypeStruct((2 * x.shape[0] - 1, 2 * x.shape[1] - 1, w.shape[1]), x.dtype)
    return jax.linear_transpose(into, of)(x)[0]


CASES = {
    "adaptive_average_pool": Case(
        functools.partial(ops.adaptive_average_pool, sizes=(2,)),
        lambda x: jnp.stack([x[:2].mean(0), x[1:].mean(0)]),
        ((3, 2),),
    ),
    "adaptive_max_pool": Case(
        functools.partial(ops.adaptive_max_pool, sizes=(2,)),
        lambda x: jnp.stack([x[:2].max(0), x[1:].max(0)]),
        ((3, 2),),
    ),
    "alibi_slopes": Case(
        lambda x: x * ops.alibi_slopes(4).astype(x.dtype),
        lambda x: x * np.asarray([1 / 4, 1 / 16, 1 / 64, 1 / 256], x.dtype),
    ),
    "attention": Case(
        functools.partial(ops.attention, causal=True, block=2), _attention, ((3, 1, 2),) * 3
    ),
    "average_pool": Case(
        functools.partial(ops.average_pool, window=(2,), stride=1, padding=((0, 1),)),
        lambda x: (x + jnp.pad(x[1:], ((0, 1), (0, 0)))) / 2,
        ((3, 2),),
    ),
    "batch_norm": Case(
        lambda x, *weights: ops.batch_norm(x, *weights)[0],
        lambda x, scale, bias: scale[None] * _normal(x, 0) + bias[None],
        ((3, 4), (4,), (4,)),
    ),
    "celu": Case(ops.celu, nn.celu),
    "conv_transpose": Case(
        functools.partial(ops.conv_transpose, stride=2, padding=1),
        _conv_transpose,
        ((2, 3, 2), (2, 3, 3, 3)),
    ),
    "convolution": Case(
        functools.partial(ops.convolution, stride=(2, 1)),
        _convolution,
        ((4, 3, 2), (3, 2, 3, 3)),
    ),
    "cosine_distance": Case(ops.cosine_distance, lambda x, y: 1 - _cosine(x, y), ((4,), (4,))),
    "cosine_similarity": Case(ops.cosine_similarity, _cosine, ((4,), (4,))),
    "ctc": Case(
        lambda x: ops.ctc(x, np.asarray([1, 2])),
        lambda x: -_two_letters(nn.log_softmax(x)),
        ((3, 4),),
    ),
    "dropout": Case(
        lambda x: ops.dropout(x, np.asarray([0, 3], np.uint32), rate=0.25),
        lambda x: jnp.where(kept(np.asarray([0, 3], np.uint32), x.shape, 0.25), x / 0.75, 0),
    ),
    "elu": Case(ops.elu, nn.elu),
    "embedding": Case(ops.embedding, lambda E, i: E[i], ((4, 2), None)),
    "gaussian_nll": Case(
        ops.gaussian_nll,
        lambda z, t: -jnp.sum(jax.scipy.stats.norm.logpdf(t, z[..., 0], jnp.exp(z[..., 1] / 2))),
        ((2, 2), (2,)),
    ),
    "geglu": Case(ops.geglu, _halves(nn.gelu)),
    "gelu": Case(ops.gelu, nn.gelu),
    "gelu exact": Case(
        functools.partial(ops.gelu, approximate=False),
        functools.partial(nn.gelu, approximate=False),
    ),
    "glu": Case(ops.glu, _halves(nn.sigmoid)),
    "group_norm": Case(
        functools.partial(ops.group_norm, groups=2),
        lambda x, scale, bias: (
            scale[None] * _normal(x.reshape(-1, 2, 2), (0, 2)).reshape(x.shape) + bias[None]
        ),
        ((2, 4), (4,), (4,)),
    ),
    "gru": Case(lambda *xs: ops.gru(*xs)[0], _gru, ((3, 6), (6, 2), (2,), (2,))),
    "gru_cell": Case(ops.gru_cell, _gru_step, ((6,), (6,), (2,))),
    "hard_sigmoid": Case(ops.hard_sigmoid, nn.hard_sigmoid),
    "hard_silu": Case(ops.hard_silu, nn.hard_silu),
    "hard_tanh": Case(ops.hard_tanh, nn.hard_tanh),
    "huber": Case(ops.huber, _huber, ((4,), (4,))),
    "info_nce": Case(
        lambda x, keys: ops.info_nce(x, keys, np.asarray(1)),
        lambda x, keys: -nn.log_softmax(10 * jax.vmap(_cosine, (None, 0))(x, keys))[1],
        ((4,), (3, 4)),
    ),
    "instance_norm": Case(
        ops.instance_norm,
        lambda x, scale, bias: scale[None] * _normal(x, 0) + bias[None],
        ((3, 4), (4,), (4,)),
    ),
    "kl_divergence": Case(
        lambda p, q: ops.kl_divergence(p, nn.softmax(q)),
        lambda p, q: jnp.sum(nn.softmax(q) * (nn.log_softmax(q) - p)),
        ((4,), (4,)),
    ),
    "l2": Case(ops.l2, lambda w: jnp.sum(w * w)),
    "layer_norm": Case(
        ops.layer_norm, lambda x, scale, bias: scale * _normal(x) + bias, ((4,), (4,), (4,))
    ),
    "leaky_relu": Case(ops.leaky_relu, functools.partial(nn.leaky_relu, negative_slope=0.1)),
    "linear_softmax_cross_entropy": Case(
        functools.partial(ops.linear_softmax_cross_entropy, block=3),
        lambda h, W, label: _cross_entropy(W @ h, label),
        ((2,), (4, 2), None),
    ),
    "linear_recurrence": Case(ops.linear_recurrence, _linear_recurrence, ((2,), (3, 2), (2,))),
    "log_sigmoid": Case(ops.log_sigmoid, nn.log_sigmoid),
    "log_softmax": Case(ops.log_softmax, nn.log_softmax),
    "logsumexp": Case(ops.logsumexp, nn.logsumexp),
    "lstm": Case(lambda *xs: ops.lstm(*xs)[0], _lstm, ((3, 8), (8, 2), (2,), (2,))),
    "lstm_cell": Case(
        lambda z, c: jnp.concatenate(ops.lstm_cell(z, c)),
        lambda z, c: jnp.concatenate(_lstm_step(z, None, c)),
        ((8,), (2,)),
    ),
    "max_pool": Case(
        functools.partial(ops.max_pool, window=(2,), stride=1, padding="same"),
        lambda x: jnp.maximum(x, jnp.concatenate([x[1:], x[-1:] - 1])),
        ((3, 2),),
    ),
    "maxout": Case(ops.maxout, lambda z: jnp.max(z, -2), ((2, 4),)),
    "mish": Case(ops.mish, nn.mish),
    "multiclass_hinge": Case(ops.multiclass_hinge, _hinge, ((4,), None)),
    "pinball": Case(
        functools.partial(ops.pinball, quantile=0.8),
        lambda f, t: jnp.sum(jnp.maximum(0.8 * (t - f), -0.2 * (t - f))),
        ((4,), (4,)),
    ),
    "pixel_shuffle": Case(
        functools.partial(ops.pixel_shuffle, scale=2),
        lambda x: x.reshape(2, 2, 2).transpose(1, 0, 2).reshape(2, 4, 1),
        ((1, 2, 4),),
    ),
    "pixel_unshuffle": Case(
        functools.partial(ops.pixel_unshuffle, scale=2),
        lambda x: x.reshape(2, 2, 2).transpose(1, 0, 2).reshape(1, 2, 4),
        ((2, 4, 1),),
    ),
    "poisson_nll": Case(ops.poisson_nll, lambda s, t: jnp.sum(jnp.exp(s) - t * s), ((4,), (4,))),
    "relu": Case(ops.relu, nn.relu),
    "relu6": Case(ops.relu6, nn.relu6),
    "resize": Case(
        functools.partial(ops.resize, sizes=(3,), method="bilinear"),
        lambda x: jnp.stack([x[0], (x[0] + x[1]) / 2, x[1]]),
        ((2, 2),),
    ),
    "rms_norm": Case(
        ops.rms_norm,
        lambda x, scale: scale * x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6),
        ((4,), (4,)),
    ),
    "rnn": Case(lambda *xs: ops.rnn(*xs)[0], _rnn, ((3, 2), (2, 2), (2,))),
    "rotary": Case(ops.rotary, _rotary, ((3, 2),)),
    "selu": Case(ops.selu, nn.selu),
    "sigmoid": Case(ops.sigmoid, nn.sigmoid),
    "sigmoid_binary_cross_entropy": Case(
        lambda x, z: ops.sigmoid_binary_cross_entropy(x, _probabilities(z)),
        _binary,
        ((4,), (4,)),
    ),
    "sigmoid_focal": Case(
        lambda x, z: ops.sigmoid_focal(x, _probabilities(z)), _focal, ((4,), (4,))
    ),
    "silu": Case(ops.silu, nn.silu),
    "sinusoidal_positions": Case(
        lambda x: x + ops.sinusoidal_positions(jnp.arange(4), 1)[:, 0].astype(x.dtype),
        lambda x: x + np.sin(np.arange(4)).astype(x.dtype),
    ),
    "softmax": Case(ops.softmax, nn.softmax),
    "softmax_cross_entropy": Case(ops.softmax_cross_entropy, _cross_entropy, ((4,), None)),
    "softmax_cross_entropy of distributions": Case(
        lambda x, q: ops.softmax_cross_entropy(x, nn.softmax(q), label_smoothing=0.1),
        lambda x, q: -jnp.sum((0.9 * nn.softmax(q) + 0.025) * nn.log_softmax(x)),
        ((4,), (4,)),
    ),
    "softplus": Case(ops.softplus, nn.softplus),
    "softsign": Case(ops.softsign, nn.soft_sign),
    "spectral_norm": Case(
        lambda W: ops.spectral_norm(W, np.asarray([0.6, 0.8]), np.asarray([0.48, 0.6, 0.64])),
        lambda W: W / jnp.sum(np.outer([0.6, 0.8], [0.48, 0.6, 0.64]).astype(W.dtype) * W),
        ((2, 3),),
    ),
    "squared_error": Case(ops.squared_error, lambda a, b: jnp.sum((a - b) ** 2), ((4,), (4,))),
    "squareplus": Case(ops.squareplus, _squareplus),
    "swiglu": Case(ops.swiglu, _halves(nn.silu)),
    "tanh": Case(ops.tanh, jnp.tanh),
    "upsample": Case(
        functools.partial(ops.upsample, scale=(2,)), lambda x: jnp.repeat(x, 2, 0), ((2, 2),)
    ),
    "weight_norm": Case(
        ops.weight_norm,
        lambda v, g: v * (g / jnp.sqrt(jnp.sum(v * v, -1)))[:, None],
        ((2, 3), (2,)),
    ),
    "triplet": Case(
        functools.partial(ops.triplet, margin=9.0),
        lambda a, p, n: jnp.linalg.norm(a - p) - jnp.linalg.norm(a - n) + 9,
        ((4,), (4,), (4,)),
    ),
    "top_k_routing": Case(lambda z: ops.top_k_routing(z, 2).weights, _two_of_three, ((4, 3),)),
}

# Of a mesh: see test_ring_attention.py.
ELSEWHERE = {"ring_attention"}
assert {name.split()[0] for name in CASES} | ELSEWHERE == set(ops.__all__), (
    "each operation has its row"
)

"""A zoo of models, small but of every kind, to hold the library against JAX.

Each builder `model(dtype, batch) -> (loss, params, data)` gives a scalar function
`loss(params, *data)`. Parameters are random numbers of the right shapes (nothing here needs
to learn), so that building one costs no compilation. `PLAIN` is written in `jax.numpy`;
`PEERS` has the same kinds of models as Flax NNX, Flax Linen, Equinox and Haiku make them.
"""

from __future__ import annotations

import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# ------------------------------------------------------------------------------------- services


def normal(name: str, *shape, scale: float = 1.0, dtype="float32"):
    """Random numbers that depend on the name and the shape only."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), *shape])
    return jnp.asarray(scale * rng.standard_normal(shape), dtype)


def classes(name: str, *shape, count: int):
    rng = np.random.default_rng([zlib.crc32(name.encode()), *shape])
    return jnp.asarray(rng.integers(0, count, shape), "int32")


def filled(shapes, dtype):
    """Arrays for a tree of shapes, scaled by the fan in; the floating ones get the dtype."""

    def leaf(path, shape):
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return shape if isinstance(shape, jax.Array) else jnp.zeros(shape.shape, shape.dtype)
        fan = math.prod(shape.shape[:-1]) or 1
        return normal(jax.tree_util.keystr(path), *shape.shape, scale=fan**-0.5, dtype=dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def cross_entropy(logits, labels):
    """Mean over all positions of -log softmax(logits)[label]."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], axis=-1))


def weights(dtype, **shapes):
    """A dict of parameters by shape; a vector starts near one, so that it serves as a scale."""
    return {
        name: normal(name, *shape, scale=0.1, dtype=dtype) + 1
        if len(shape) == 1
        else normal(name, *shape, scale=math.prod(shape[:-1]) ** -0.5, dtype=dtype)
        for name, shape in shapes.items()
    }


def layer_norm(x, scale, shift):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale + shift


def rms_norm(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def conv(x, kernel, strides=(1, 1), padding="SAME", **more):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **more
    )


def pool(x, start, operation):
    return lax.reduce_window(x, start, operation, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def attend(q, k, v, causal):
    """Softmax attention; q: (batch, length, heads, size)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        length = q.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool))
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


# -------------------------------------------------------------------------- multilayer perceptrons


def mlp(dtype, batch):
    params = weights(dtype, W1=(784, 256), b1=(256,), W2=(256, 10), b2=(10,))

    def loss(p, x, y):
        h = jax.nn.relu(x @ p["W1"] + p["b1"])
        return cross_entropy(h @ p["W2"] + p["b2"], y)

    return loss, params, (normal("x", batch, 784, dtype=dtype), classes("y", batch, count=10))


def mlp_per_example(dtype, batch):
    """Written for one example, mapped over the batch, as this library's networks are."""
    params = weights(dtype, W1=(256, 784), b1=(256,), W2=(10, 256), b2=(10,))

    def loss_of_one(p, x, y):
        h = jnp.tanh(p["W1"] @ x + p["b1"])
        return -jax.nn.log_softmax(p["W2"] @ h + p["b2"])[y]

    def loss(p, x, y):
        return jnp.mean(jax.vmap(loss_of_one, (None, 0, 0))(p, x, y))

    return loss, params, (normal("x", batch, 784, dtype=dtype), classes("y", batch, count=10))


def mlp_activations(dtype, batch):
    """One layer for each of JAX's activations."""
    nn = jax.nn
    functions = (nn.relu6, nn.selu, nn.celu, nn.softplus, nn.sigmoid, nn.leaky_relu, nn.mish)
    functions += (nn.hard_tanh, nn.hard_silu, nn.squareplus, nn.soft_sign, nn.log_sigmoid)
    functions += (nn.glu, nn.softmax, nn.standardize)
    params = {f"W{i}": normal(f"W{i}", 16, 16, scale=0.1, dtype=dtype) for i in range(15)}

    def loss(p, x):
        for i, f in enumerate(functions):
            h = x @ p[f"W{i}"]
            x = x + (jnp.tile(f(h), 2) if f is nn.glu else f(h))
        return jnp.mean(x**2)

    return loss, params, (normal("x", batch, 16, dtype=dtype),)


def weight_norm(dtype, batch):
    params = weights(dtype, V1=(64, 48), g1=(48,), V2=(48, 10), g2=(10,))

    def loss(p, x, y):
        h = x
        for i in (1, 2):
            v = p[f"V{i}"]
            h = h @ (p[f"g{i}"] * v / jnp.linalg.norm(v, axis=0))
            h = jax.nn.elu(h) if i == 1 else h
        return cross_entropy(h, y)

    return loss, params, (normal("x", batch, 64, dtype=dtype), classes("y", batch, count=10))


def dropout(dtype, batch):
    params = weights(dtype, W1=(64, 128), W2=(128, 128), W3=(128, 10))

    def loss(p, key, x, y):
        for i, k in enumerate(jax.random.split(key)):
            x = jax.nn.silu(x @ p[f"W{i + 1}"])
            x = jnp.where(jax.random.bernoulli(k, 0.8, x.shape), x / 0.8, 0)
        return cross_entropy(x @ p["W3"], y)

    data = normal("x", batch, 64, dtype=dtype), classes("y", batch, count=10)
    return loss, params, (jax.random.key(0), *data)


def variational(dtype, batch):
    """A variational autoencoder: the noise is scaled by a learned deviation."""
    params = weights(dtype, enc=(64, 32), mean=(32, 8), dev=(32, 8), dec=(8, 32), out=(32, 64))

    def loss(p, key, x):
        h = jax.nn.relu(x @ p["enc"])
        mean, log_dev = h @ p["mean"], jnp.clip(h @ p["dev"], -5, 5)
        z = mean + jnp.exp(log_dev) * jax.random.normal(key, mean.shape, mean.dtype)
        logits = jax.nn.relu(z @ p["dec"]) @ p["out"]
        likelihood = jnp.sum(jnp.maximum(logits, 0) - logits * jax.nn.sigmoid(x), -1)
        likelihood += jnp.sum(jnp.log1p(jnp.exp(-jnp.abs(logits))), -1)
        divergence = 0.5 * jnp.sum(mean**2 + jnp.exp(2 * log_dev) - 2 * log_dev - 1, -1)
        return jnp.mean(likelihood + divergence)

    return loss, params, (jax.random.key(1), normal("x", batch, 64, dtype=dtype))


def mixed_precision(dtype, batch):
    """Parameters in the given dtype, the work in bfloat16, the loss in the dtype again."""
    params = weights(dtype, W1=(64, 128), b1=(128,), W2=(128, 10), b2=(10,))

    def loss(p, x, y):
        low = jax.tree.map(lambda a: a.astype("bfloat16"), p)
        h = jax.nn.gelu(x.astype("bfloat16") @ low["W1"] + low["b1"])
        return cross_entropy((h @ low["W2"] + low["b2"]).astype(dtype), y)

    return loss, params, (normal("x", batch, 64, dtype=dtype), classes("y", batch, count=10))


# ----------------------------------------------------------------------------------- convolutions


def cnn(dtype, batch):
    params = weights(
        dtype, K1=(3, 3, 1, 16), b1=(16,), K2=(3, 3, 16, 32), b2=(32,), W=(7 * 7 * 32, 10), b=(10,)
    )

    def loss(p, x, y):
        h = pool(jax.nn.relu(conv(x, p["K1"]) + p["b1"]), -jnp.inf, lax.max)
        h = pool(jax.nn.relu(conv(h, p["K2"]) + p["b2"]), -jnp.inf, lax.max)
        return cross_entropy(h.reshape(h.shape[0], -1) @ p["W"] + p["b"], y)

    return (
        loss,
        params,
        (normal("x", batch, 28, 28, 1, dtype=dtype), classes("y", batch, count=10)),
    )


def cnn_per_example(dtype, batch):
    params = weights(dtype, K1=(8, 3, 3, 3), b1=(8,), K2=(16, 8, 3, 3), b2=(16,), W=(10, 256))

    def loss_of_one(p, x, y):
        for i in (1, 2):
            x = lax.conv(x[None], p[f"K{i}"], (1, 1), "SAME")[0] + p[f"b{i}"][:, None, None]
            x = lax.reduce_window(jax.nn.relu(x), 0.0, lax.add, (1, 2, 2), (1, 2, 2), "VALID") / 4
        return -jax.nn.log_softmax(p["W"] @ x.ravel())[y]

    def loss(p, x, y):
        return jnp.mean(jax.vmap(loss_of_one, (None, 0, 0))(p, x, y))

    return (
        loss,
        params,
        (normal("x", batch, 3, 16, 16, dtype=dtype), classes("y", batch, count=10)),
    )


def resnet(dtype, batch):
    """Residual blocks with group normalisation and a strided shortcut."""
    params = weights(
        dtype,
        stem=(3, 3, 3, 16),
        A1=(3, 3, 16, 16),
        A2=(3, 3, 16, 16),
        s1=(16,),
        s2=(16,),
        B1=(3, 3, 16, 32),
        B2=(3, 3, 32, 32),
        short=(1, 1, 16, 32),
        s3=(16,),
        s4=(32,),
        W=(32, 10),
    )

    def group_norm(x, scale, groups=4):
        h = x.reshape(*x.shape[:3], groups, -1)
        mean = jnp.mean(h, axis=(1, 2, 4), keepdims=True)
        var = jnp.var(h, axis=(1, 2, 4), keepdims=True)
        return ((h - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape) * scale

    def loss(p, x, y):
        x = conv(x, p["stem"])
        h = conv(jax.nn.relu(group_norm(x, p["s1"])), p["A1"])
        x = x + conv(jax.nn.relu(group_norm(h, p["s2"])), p["A2"])
        h = conv(jax.nn.relu(group_norm(x, p["s3"])), p["B1"], (2, 2))
        x = conv(x, p["short"], (2, 2)) + conv(jax.nn.relu(group_norm(h, p["s4"])), p["B2"])
        return cross_entropy(jnp.mean(x, axis=(1, 2)) @ p["W"], y)

    return (
        loss,
        params,
        (normal("x", batch, 16, 16, 3, dtype=dtype), classes("y", batch, count=10)),
    )


def unet(dtype, batch):
    """Strided, dilated, grouped, depthwise and transposed convolutions, and a resize."""
    params = weights(
        dtype,
        inside=(3, 3, 3, 8),
        down=(4, 4, 8, 16),
        depthwise=(3, 3, 1, 16),
        grouped=(3, 3, 4, 16),
        dilated=(3, 3, 16, 16),
        up=(4, 4, 16, 8),
        mix=(3, 3, 24, 8),
        out=(1, 1, 8, 3),
    )

    def loss(p, x, y):
        skip = jax.nn.silu(conv(x, p["inside"]))
        h = jax.nn.silu(conv(skip, p["down"], (2, 2)))
        h = jax.nn.silu(conv(h, p["depthwise"], feature_group_count=16))
        h = jax.nn.silu(conv(h, p["grouped"], feature_group_count=4))
        h = jax.nn.silu(conv(h, p["dilated"], rhs_dilation=(2, 2)))
        up = lax.conv_transpose(h, p["up"], (2, 2), "SAME")
        resized = jax.image.resize(h[..., :8], up.shape, "bilinear")
        h = jnp.concatenate([skip, jax.nn.silu(up), resized], axis=-1)
        return jnp.mean((conv(jax.nn.silu(conv(h, p["mix"])), p["out"]) - y) ** 2)

    shape = batch, 16, 16, 3
    return loss, params, (normal("x", *shape, dtype=dtype), normal("y", *shape, dtype=dtype))


# ------------------------------------------------------------------------------------ transformers


def _block_weights(dtype, width, heads, hidden, kv_heads=None):
    size = width // heads
    kv_heads = kv_heads or heads
    return weights(
        dtype,
        s1=(width,),
        t1=(width,),
        q=(width, heads, size),
        k=(width, kv_heads, size),
        v=(width, kv_heads, size),
        o=(heads, size, width),
        s2=(width,),
        t2=(width,),
        up=(width, hidden),
        b=(hidden,),
        down=(hidden, width),
    )


def _block(p, x, causal=True):
    h = layer_norm(x, p["s1"], p["t1"])
    q, k, v = (jnp.einsum("bld,dhs->blhs", h, p[n]) for n in "qkv")
    x = x + jnp.einsum("blhs,hsd->bld", attend(q, k, v, causal), p["o"])
    h = layer_norm(x, p["s2"], p["t2"])
    return x + jax.nn.gelu(h @ p["up"] + p["b"]) @ p["down"]


def transformer_block(dtype, batch):
    params = _block_weights(dtype, 64, 4, 256)

    def loss(p, x, y):
        return jnp.mean((_block(p, x) - y) ** 2)

    shape = batch, 32, 64
    return loss, params, (normal("x", *shape, dtype=dtype), normal("y", *shape, dtype=dtype))


def language_model(dtype, batch):
    """Embeddings tied to the output, a scan over equal layers."""
    params = {
        "embed": normal("embed", 50, 32, scale=0.2, dtype=dtype),
        "place": normal("place", 16, 32, scale=0.2, dtype=dtype),
        "blocks": jax.tree.map(lambda w: jnp.stack([w, w / 2]), _block_weights(dtype, 32, 2, 64)),
    }

    def loss(p, tokens):
        x = p["embed"][tokens[:, :-1]] + p["place"]
        x, _ = lax.scan(lambda x, block: (_block(block, x), None), x, p["blocks"])
        return cross_entropy(x @ p["embed"].T, tokens[:, 1:])

    return loss, params, (classes("tokens", batch, 17, count=50),)


def _checkpointed(dtype, batch, **options):
    params = weights(dtype, s=(4, 32), up=(4, 32, 64), down=(4, 64, 32))

    def loss(p, x, y):
        def layer(x, w):
            return x + jax.nn.gelu(rms_norm(x, w["s"]) @ w["up"]) @ w["down"], None

        x, _ = lax.scan(jax.checkpoint(layer, **options), x, p)
        return jnp.mean((x - y) ** 2)

    shape = 8 * batch, 32
    return loss, params, (normal("x", *shape, dtype=dtype), normal("y", *shape, dtype=dtype))


def checkpointed_scan(dtype, batch):
    return _checkpointed(dtype, batch, prevent_cse=False)


def checkpoint_policy(dtype, batch):
    return _checkpointed(dtype, batch, policy=jax.checkpoint_policies.dots_saveable)


def checkpointed_layers(dtype, batch):
    """A Python loop over checkpointed layers."""
    params = [weights(dtype, W=(64, 64), b=(64,)) for _ in range(4)]

    def loss(p, x):
        for w in p:
            x = jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w["W"] + w["b"])))(w, x)
        return jnp.sum(x**2)

    return loss, params, (normal("x", batch, 64, dtype=dtype),)


def llama_block(dtype, batch):
    """RMSNorm, rotary positions, grouped-query attention, SwiGLU."""
    width, heads, kv_heads, size, hidden = 64, 4, 2, 16, 128
    params = weights(
        dtype,
        s1=(width,),
        s2=(width,),
        q=(width, heads * size),
        k=(width, kv_heads * size),
        v=(width, kv_heads * size),
        o=(heads * size, width),
        gate=(width, hidden),
        up=(width, hidden),
        down=(hidden, width),
    )

    def rotate(x):
        length, half = x.shape[1], size // 2
        frequency = 1e4 ** (-jnp.arange(half, dtype=dtype) / half)
        angle = jnp.arange(length, dtype=dtype)[:, None, None] * frequency
        a, b = jnp.split(x, 2, axis=-1)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def loss(p, x, y):
        h = rms_norm(x, p["s1"])
        q, k, v = ((h @ p[n]).reshape(*h.shape[:2], -1, size) for n in "qkv")
        k, v = (jnp.repeat(a, heads // kv_heads, axis=2) for a in (rotate(k), v))
        x = x + attend(rotate(q), k, v, True).reshape(x.shape) @ p["o"]
        h = rms_norm(x, p["s2"])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
        return jnp.mean((x - y) ** 2)

    shape = batch, 16, width
    return loss, params, (normal("x", *shape, dtype=dtype), normal("y", *shape, dtype=dtype))


def grouped_query(dtype, batch):
    """`jax.nn.dot_product_attention` with fewer heads for keys and values."""
    params = weights(dtype, q=(32, 4, 8), k=(32, 2, 8), v=(32, 2, 8), o=(4, 8, 32))

    def loss(p, x):
        q, k, v = (jnp.einsum("bld,dhs->blhs", x, p[n]) for n in "qkv")
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return jnp.mean(jnp.einsum("blhs,hsd->bld", out, p["o"]) ** 2)

    return loss, params, (normal("x", batch, 16, 32, dtype=dtype),)


def mixture_of_experts(dtype, batch):
    """The two best of four experts for each token, and a balancing loss."""
    params = weights(dtype, gate=(32, 4), up=(4, 32, 64), down=(4, 64, 32))

    def loss(p, x, y):
        probability = jax.nn.softmax(x @ p["gate"])
        best, chosen = lax.top_k(probability, 2)
        one_hot = jax.nn.one_hot(chosen, 4, dtype=x.dtype)
        share = jnp.einsum("nk,nke->ne", best / jnp.sum(best, -1, keepdims=True), one_hot)
        h = jax.nn.gelu(jnp.einsum("nd,edh->neh", x, p["up"]))
        out = jnp.einsum("neh,ehd,ne->nd", h, p["down"], share)
        balance = jnp.sum(jnp.mean(probability, 0) * jnp.mean(jnp.sum(one_hot, 1), 0))
        return jnp.mean((out - y) ** 2) + 0.01 * balance

    shape = 8 * batch, 32
    return loss, params, (normal("x", *shape, dtype=dtype), normal("y", *shape, dtype=dtype))


def fourier_mixing(dtype, batch):
    """FNet: Fourier transforms in the place of attention."""
    params = weights(dtype, s=(32,), t=(32,), up=(32, 64), down=(64, 32))

    def loss(p, x):
        x = layer_norm(x + jnp.fft.fft2(x).real * x.shape[1] ** -0.5, p["s"], p["t"])
        x = x + jax.nn.gelu(x @ p["up"]) @ p["down"]
        low = jnp.fft.irfft(jnp.fft.rfft(x, axis=1)[:, :4], n=16, axis=1)
        return jnp.mean(low**2)

    return loss, params, (normal("x", batch, 16, 32, dtype=dtype),)


# --------------------------------------------------------------------------------------- recurrence


def lstm(dtype, batch):
    params = weights(dtype, W=(16, 128), U=(32, 128), b=(128,), out=(32, 10))

    def loss(p, xs, y):
        def step(state, x):
            h, c = state
            i, f, g, o = jnp.split(x @ p["W"] + h @ p["U"] + p["b"], 4, axis=-1)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        zeros = jnp.zeros((xs.shape[1], 32), xs.dtype)
        (h, _), _ = lax.scan(step, (zeros, zeros), xs)
        return cross_entropy(h @ p["out"], y)

    return loss, params, (normal("x", 12, batch, 16, dtype=dtype), classes("y", batch, count=10))


def lstm_per_example(dtype, batch):
    """The same for one example, mapped: a scan under vmap whose weights are shared."""
    params = weights(dtype, W=(128, 16), U=(128, 32), b=(128,), out=(10, 32))

    def loss_of_one(p, xs, y):
        def step(state, x):
            h, c = state
            i, f, g, o = jnp.split(p["W"] @ x + p["U"] @ h + p["b"], 4)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros(32, xs.dtype)
        _, hs = lax.scan(step, (zeros, zeros), xs)
        return -jax.nn.log_softmax(p["out"] @ jnp.mean(hs, axis=0))[y]

    def loss(p, xs, y):
        return jnp.mean(jax.vmap(loss_of_one, (None, 0, 0))(p, xs, y))

    return loss, params, (normal("x", batch, 12, 16, dtype=dtype), classes("y", batch, count=10))


def gru_bidirectional(dtype, batch):
    params = weights(dtype, W=(2, 16, 96), U=(2, 32, 96), b=(2, 96), out=(64, 10))

    def loss(p, xs, ys):
        def run(d, reverse):
            def step(h, x):
                zr, zn = jnp.split(x @ p["W"][d] + p["b"][d], [64], axis=-1)
                hr, hn = jnp.split(h @ p["U"][d], [64], axis=-1)
                z, r = jnp.split(jax.nn.sigmoid(zr + hr), 2, axis=-1)
                h = (1 - z) * jnp.tanh(zn + r * hn) + z * h
                return h, h

            zeros = jnp.zeros((xs.shape[1], 32), xs.dtype)
            return lax.scan(step, zeros, xs, reverse=reverse)[1]

        both = jnp.concatenate([run(0, False), run(1, True)], axis=-1)
        return cross_entropy(both @ p["out"], ys)

    x = normal("x", 10, batch, 16, dtype=dtype)
    return loss, params, (x, classes("y", 10, batch, count=10))


def linear_recurrence(dtype, batch):
    """A diagonal state-space layer by a parallel (associative) scan."""
    params = weights(dtype, a=(24,), B=(16, 24), C=(24, 16), D=(16,))

    def loss(p, x, y):
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["a"]), (x.shape[0], x.shape[1], 24))

        def combine(left, right):
            (a, u), (b, v) = left, right
            return a * b, b * u + v

        _, state = lax.associative_scan(combine, (decay, x @ p["B"]), axis=1)
        return jnp.mean((state @ p["C"] + jnp.cumsum(x, axis=1) * p["D"] - y) ** 2)

    shape = batch, 12, 16
    return loss, params, (normal("x", *shape, dtype=dtype), normal("y", *shape, dtype=dtype))


def neural_ode(dtype, batch):
    """Runge-Kutta steps in a `fori_loop` with static bounds."""
    params = weights(dtype, W1=(16, 32), W2=(32, 16))

    def loss(p, x):
        def field(x):
            return jnp.tanh(x @ p["W1"]) @ p["W2"]

        def step(_, x, dt=0.1):
            k1 = field(x)
            k2 = field(x + dt / 2 * k1)
            k3 = field(x + dt / 2 * k2)
            return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + field(x + dt * k3))

        return jnp.mean(lax.fori_loop(0, 8, step, x) ** 2)

    return loss, params, (normal("x", batch, 16, dtype=dtype),)


def stochastic_depth(dtype, batch):
    """Layers that are skipped by `cond`, and chosen by `switch`, within a scan."""
    params = weights(dtype, W=(4, 32, 32), out=(32, 10))

    def loss(p, skip, which, x, y):
        def layer(x, given):
            W, skip, which = given
            branches = (jax.nn.relu, jnp.tanh, lambda h: h**2 / (1 + h**2))
            act = lambda x: x + lax.switch(which, branches, x @ W)
            return lax.cond(skip, lambda x: x, act, x), None

        x, _ = lax.scan(layer, x, (p["W"], skip, which))
        return cross_entropy(x @ p["out"], y)

    skip, which = jnp.asarray([False, True, False, False]), jnp.asarray([0, 1, 2, 1])
    data = normal("x", batch, 32, dtype=dtype), classes("y", batch, count=10)
    return loss, params, (skip, which, *data)


# ------------------------------------------------------------------------------- other structures


def graph_network(dtype, batch):
    """Messages along edges: gather, segment sums and maxima, normalised by degree."""
    params = weights(dtype, W1=(16, 32), W2=(32, 32), msg=(64, 32), out=(32, 4))
    nodes, edges = 8 * batch, 24 * batch

    def loss(p, x, source, target, y):
        h = jax.nn.relu(x @ p["W1"])
        pair = jnp.concatenate([h[source], h[target]], axis=-1)
        message = jax.nn.silu(pair @ p["msg"])
        score = jnp.sum(message * h[target], axis=-1)
        top = jax.ops.segment_max(score, target, nodes)
        weight = jnp.exp(score - lax.stop_gradient(top)[target])
        total = jax.ops.segment_sum(weight, target, nodes)
        weight = weight / (total[target] + 1e-6)
        h = h + jax.ops.segment_sum(weight[:, None] * message, target, nodes) @ p["W2"]
        return cross_entropy(h @ p["out"], y)

    return (
        loss,
        params,
        (
            normal("x", nodes, 16, dtype=dtype),
            classes("source", edges, count=nodes),
            classes("target", edges, count=nodes),
            classes("y", nodes, count=4),
        ),
    )


def gaussian_process(dtype, batch):
    """The marginal likelihood of deep-kernel regression: Cholesky and triangular solves."""
    params = weights(dtype, W=(8, 4)) | {"log_noise": jnp.asarray(-1.0, dtype)}

    def loss(p, x, y):
        z = jnp.tanh(x @ p["W"])
        squared = jnp.sum((z[:, None] - z[None]) ** 2, axis=-1)
        noise = jnp.exp(p["log_noise"]) * jnp.eye(x.shape[0], dtype=x.dtype)
        factor = jnp.linalg.cholesky(jnp.exp(-squared / 2) + noise)
        white = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
        return 0.5 * jnp.sum(white**2) + jnp.sum(jnp.log(jnp.diagonal(factor)))

    n = 256  # whatever the batch: in smaller matrices the masks of triangles weigh too much
    return loss, params, (normal("x", n, 8, dtype=dtype), normal("y", n, dtype=dtype))


def contrastive(dtype, batch):
    """CLIP's loss: two encoders, normalised, one matrix of similarities used twice."""
    params = weights(dtype, A=(32, 16), B=(24, 16)) | {"log_scale": jnp.asarray(2.0, dtype)}

    def loss(p, a, b):
        za, zb = a @ p["A"], b @ p["B"]
        za = za / jnp.linalg.norm(za, axis=-1, keepdims=True)
        zb = zb * lax.rsqrt(jnp.sum(zb**2, axis=-1, keepdims=True))
        logits = jnp.exp(p["log_scale"]) * za @ zb.T
        labels = jnp.arange(logits.shape[0])
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

    return (
        loss,
        params,
        (normal("a", batch, 32, dtype=dtype), normal("b", batch, 24, dtype=dtype)),
    )


def ranking(dtype, batch):
    """Sorted scores, a running product, a maximum over pairs, dynamic slices."""
    params = weights(dtype, W1=(16, 32), W2=(32, 12))

    def loss(p, x, start):
        scores = jax.nn.softplus(x @ p["W1"]) @ p["W2"]
        ordered = jnp.sort(scores, axis=-1)
        survive = jnp.cumprod(jax.nn.sigmoid(ordered), axis=-1)
        window = lax.dynamic_slice_in_dim(scores, start, 4, axis=1)
        margin = jnp.max(1 + window[:, :, None] - scores[:, None, :], axis=(1, 2))
        tail = jax.nn.logsumexp(lax.cumlogsumexp(scores, axis=1), axis=-1)
        return jnp.mean(survive) + jnp.mean(margin) + jnp.mean(tail) + jnp.std(scores)

    return loss, params, (normal("x", batch, 16, dtype=dtype), jnp.asarray(3))


PLAIN = {
    f.__name__: f
    for f in (
        mlp,
        mlp_per_example,
        mlp_activations,
        weight_norm,
        dropout,
        variational,
        mixed_precision,
        cnn,
        cnn_per_example,
        resnet,
        unet,
        transformer_block,
        language_model,
        checkpointed_scan,
        checkpoint_policy,
        checkpointed_layers,
        llama_block,
        grouped_query,
        mixture_of_experts,
        fourier_mixing,
        lstm,
        lstm_per_example,
        gru_bidirectional,
        linear_recurrence,
        neural_ode,
        stochastic_depth,
        graph_network,
        gaussian_process,
        contrastive,
        ranking,
    )
}

# ----------------------------------------------------------------------------- peers: the same data


def _digits(dtype, batch):
    return normal("x", batch, 64, dtype=dtype), classes("y", batch, count=10)


def _images(dtype, batch):
    return normal("x", batch, 16, 16, 3, dtype=dtype), classes("y", batch, count=10)


def _sequences(dtype, batch):
    return normal("x", batch, 12, 32, dtype=dtype), normal("y", batch, 12, 32, dtype=dtype)


# ---------------------------------------------------------------------------------------- Flax NNX


def _nnx(make, data, apply):
    """`loss(params, *data)` of an NNX model, by split and merge; batch statistics stay fixed."""
    from flax import nnx

    abstract = nnx.eval_shape(make)
    graph, params, rest = nnx.split(abstract, nnx.Param, ...)
    params, rest = filled(params, data[0].dtype), filled(rest, data[0].dtype)

    def loss(params, *data):
        return apply(nnx.merge(graph, params, rest, copy=True), *data)

    return loss, params, data


def nnx_mlp(dtype, batch):
    from flax import nnx

    def make():
        rngs = nnx.Rngs(0)
        layers = nnx.Linear(64, 32, rngs=rngs), nnx.relu, nnx.LayerNorm(32, rngs=rngs)
        return nnx.Sequential(*layers, nnx.Linear(32, 10, rngs=rngs))

    return _nnx(make, _digits(dtype, batch), lambda net, x, y: cross_entropy(net(x), y))


def nnx_cnn(dtype, batch):
    from flax import nnx

    def make():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(
            nnx.Conv(3, 8, (3, 3), rngs=rngs),
            nnx.BatchNorm(8, rngs=rngs),
            nnx.relu,
            functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2)),
            nnx.Conv(8, 16, (3, 3), strides=2, feature_group_count=2, rngs=rngs),
            nnx.GroupNorm(16, num_groups=4, rngs=rngs),
            nnx.gelu,
            functools.partial(nnx.avg_pool, window_shape=(4, 4)),
            lambda x: x.reshape(x.shape[0], -1),
            nnx.Linear(16, 10, rngs=rngs),
        )

    return _nnx(make, _images(dtype, batch), lambda net, x, y: cross_entropy(net(x), y))


def nnx_attention(dtype, batch):
    from flax import nnx

    def make():
        attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
        return nnx.Dict(attention=attention, norm=nnx.RMSNorm(32, rngs=nnx.Rngs(0)))

    def apply(net, x, y):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        return jnp.mean((x + net.attention(net.norm(x), mask=mask) - y) ** 2)

    return _nnx(make, _sequences(dtype, batch), apply)


def nnx_lstm(dtype, batch):
    from flax import nnx

    def make():
        rngs = nnx.Rngs(0)
        return nnx.RNN(nnx.OptimizedLSTMCell(32, 32, param_dtype=dtype, rngs=rngs), rngs=rngs)

    return _nnx(make, _sequences(dtype, batch), lambda net, x, y: jnp.mean((net(x) - y) ** 2))


# -------------------------------------------------------------------------------------- Flax Linen


def _linen(model, data, measure, **options):
    shapes = jax.eval_shape(functools.partial(model.init, jax.random.key(0), **options), data[0])
    variables = filled(shapes, data[0].dtype)
    params = variables.pop("params")

    def loss(params, x, y):
        out = model.apply({"params": params, **variables}, x, mutable=list(variables), **options)
        return measure(out[0], y)

    return loss, params, data


def linen_mlp(dtype, batch):
    from flax import linen as nn

    model = nn.Sequential([nn.Dense(32), nn.gelu, nn.LayerNorm(), nn.WeightNorm(nn.Dense(10))])
    return _linen(model, _digits(dtype, batch), cross_entropy)


def linen_cnn(dtype, batch):
    from flax import linen as nn

    model = nn.Sequential(
        [
            nn.Conv(8, (3, 3)),
            nn.BatchNorm(use_running_average=False),
            nn.relu,
            lambda x: nn.max_pool(x, (2, 2), (2, 2)),
            nn.ConvTranspose(8, (3, 3), strides=(2, 2)),
            nn.GroupNorm(4),
            nn.swish,
            nn.Conv(16, (3, 3), strides=2, kernel_dilation=1),
            lambda x: jnp.mean(x, axis=(1, 2)),
            nn.Dense(10),
        ]
    )
    return _linen(model, _images(dtype, batch), cross_entropy)


def linen_attention(dtype, batch):
    from flax import linen as nn

    attention = nn.MultiHeadDotProductAttention(4)
    model = nn.Sequential([nn.RMSNorm(), attention, nn.Dense(64), nn.silu, nn.Dense(32)])
    return _linen(model, _sequences(dtype, batch), lambda out, y: jnp.mean((out - y) ** 2))


def linen_lstm(dtype, batch):
    from flax import linen as nn

    model = nn.Sequential(
        [
            nn.RNN(nn.OptimizedLSTMCell(24, param_dtype=dtype)),
            nn.RNN(nn.GRUCell(32, param_dtype=dtype)),
        ]
    )
    return _linen(model, _sequences(dtype, batch), lambda out, y: jnp.mean((out - y) ** 2))


# ------------------------------------------------------------------------------------------ Equinox


def _equinox(make, data, apply):
    """`loss(params, *data)` of an Equinox model, by partition and combine."""
    import equinox as eqx

    abstract = eqx.filter_eval_shape(make, jax.random.key(0))
    shapes, static = eqx.partition(abstract, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def loss(params, *data):
        return apply(eqx.combine(params, static), *data)

    return loss, filled(shapes, data[0].dtype), data


def equinox_mlp(dtype, batch):
    import equinox as eqx

    make = functools.partial(eqx.nn.MLP, 64, 10, 32, 2)
    return _equinox(
        lambda key: make(key=key),
        _digits(dtype, batch),
        lambda net, x, y: cross_entropy(jax.vmap(net)(x), y),
    )


def equinox_cnn(dtype, batch):
    import equinox as eqx

    def make(key):
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(3, 8, 3, key=key),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.MaxPool2d(2, 2),
                eqx.nn.GroupNorm(2, 8),
                eqx.nn.ConvTranspose2d(8, 8, 2, stride=2, key=key),
                eqx.nn.AvgPool2d(2, 2),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.Linear(8 * 7 * 7, 10, key=key),
            ]
        )

    def apply(net, x, y):
        return cross_entropy(jax.vmap(net)(jnp.moveaxis(x, -1, 1)), y)

    return _equinox(make, _images(dtype, batch), apply)


def equinox_attention(dtype, batch):
    import equinox as eqx

    def make(key):
        attention = eqx.nn.MultiheadAttention(4, 32, key=key)
        return {"attention": attention, "norm": eqx.nn.LayerNorm(32)}

    def apply(net, x, y):
        def one(x):
            h = jax.vmap(net["norm"])(x)
            return x + net["attention"](h, h, h, mask=jnp.tril(jnp.ones((12, 12), bool)))

        return jnp.mean((jax.vmap(one)(x) - y) ** 2)

    return _equinox(make, _sequences(dtype, batch), apply)


def equinox_lstm(dtype, batch):
    import equinox as eqx

    def apply(cell, x, y):
        def one(x):
            def step(state, x):
                state = cell(x, state)
                return state, state[0]

            zeros = jnp.zeros(32, x.dtype)
            return lax.scan(step, (zeros, zeros), x)[1]

        return jnp.mean((jax.vmap(one)(x) - y) ** 2)

    return _equinox(lambda key: eqx.nn.LSTMCell(32, 32, key=key), _sequences(dtype, batch), apply)


# -------------------------------------------------------------------------------------------- Haiku


def _haiku(forward, data, measure):
    import haiku as hk

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    shapes, states = jax.eval_shape(model.init, jax.random.key(0), data[0])
    params, state = filled(shapes, data[0].dtype), filled(states, data[0].dtype)

    def loss(params, x, y):
        return measure(model.apply(params, state, x)[0], y)

    return loss, params, data


def haiku_mlp(dtype, batch):
    import haiku as hk

    return _haiku(lambda x: hk.nets.MLP([32, 32, 10])(x), _digits(dtype, batch), cross_entropy)


def haiku_cnn(dtype, batch):
    import haiku as hk

    def forward(x):
        x = hk.max_pool(jax.nn.relu(hk.Conv2D(8, 3)(x)), (2, 2, 1), (2, 2, 1), "SAME")
        x = hk.BatchNorm(True, True, 0.9)(x, is_training=True)
        x = hk.avg_pool(jax.nn.relu(hk.DepthwiseConv2D(2, 3)(x)), (2, 2, 1), (2, 2, 1), "SAME")
        return hk.Linear(10)(hk.Flatten()(x))

    return _haiku(forward, _images(dtype, batch), cross_entropy)


def haiku_attention(dtype, batch):
    import haiku as hk

    def forward(x):
        h = hk.LayerNorm(-1, True, True)(x)
        return x + hk.MultiHeadAttention(4, 8, w_init=hk.initializers.Constant(0.1))(h, h, h)

    return _haiku(forward, _sequences(dtype, batch), lambda out, y: jnp.mean((out - y) ** 2))


def haiku_lstm(dtype, batch):
    import haiku as hk

    def forward(x):
        core = hk.LSTM(32)
        state = jax.tree.map(lambda s: s.astype(x.dtype), core.initial_state(x.shape[0]))
        return hk.dynamic_unroll(core, x, state, time_major=False)[0]

    return _haiku(forward, _sequences(dtype, batch), lambda out, y: jnp.mean((out - y) ** 2))


PEERS = {
    f.__name__: f
    for f in (
        nnx_mlp,
        nnx_cnn,
        nnx_attention,
        nnx_lstm,
        linen_mlp,
        linen_cnn,
        linen_attention,
        linen_lstm,
        equinox_mlp,
        equinox_cnn,
        equinox_attention,
        equinox_lstm,
        haiku_mlp,
        haiku_cnn,
        haiku_attention,
        haiku_lstm,
    )
}

ZOO = PLAIN | PEERS

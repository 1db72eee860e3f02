"""Layers with all their options: against formulas in numpy; two modes, two orders, all dtypes."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from sweeps import exhaustive

from fnn import layers, ops
from fnn.layers import (
    GRU,
    LRU,
    LSTM,
    MLP,
    RNN,
    Attention,
    AveragePool,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dropout,
    DropPath,
    Embedding,
    GatedMLP,
    GroupNorm,
    InstanceNorm,
    Layer,
    LayerNorm,
    Linear,
    Maxout,
    MaxPool,
    MixtureOfExperts,
    RMSNorm,
    SpectralNorm,
    SqueezeExcite,
    Upsample,
    WeightNorm,
    bidirectional,
    training,
)
from fnn.layers.layer import run

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def moved(layer, *xs):
    """Parameters that aren't where they start: with biases that aren't 0, scales that aren't 1."""
    leaves, tree = jax.tree.flatten(layer.init(KEY, *xs))
    return jax.tree.unflatten(tree, [w + 0.3 * normal(i, *w.shape) for i, w in enumerate(leaves)])


def each(**options):
    return st.fixed_dictionaries(
        {name: st.sampled_from(values) for name, values in options.items()}
    )


def drawn(**options):
    """A property of whatever is drawn, a few times."""
    return lambda test: exhaustive(
        settings(max_examples=8, deadline=None, derandomize=True)(given(each(**options))(test))
    )


# --------------------------------------------------------------------- values: convolution, pools


def pads(padding, sizes, reach, strides):
    if padding in ("same", "circular"):
        total = [
            max((-(-n // s) - 1) * s + r - n, 0)
            for n, r, s in zip(sizes, reach, strides, strict=True)
        ]
        return [(t // 2, t - t // 2) for t in total]
    padding = 0 if padding == "valid" else padding
    by_axis = [padding] * len(sizes) if isinstance(padding, int) else padding
    return [(p, p) if isinstance(p, int) else p for p in by_axis]


def windows(x, window, stride, dilation, around, **options):
    """Each place, and what the window sees there, (*window, features)."""
    x = np.pad(x, [*around, (0, 0)], **options)
    reach = [1 + d * (k - 1) for k, d in zip(window, dilation, strict=True)]
    counts = [(n - r) // s + 1 for n, r, s in zip(x.shape, reach, stride, strict=False)]
    for place in np.ndindex(*counts):
        yield place, x[tuple(
            slice(o * s, o * s + r, d)
            for o, s, r, d in zip(place, stride, reach, dilation, strict=True)
        )]  # fmt: skip


def filled(places):
    """The array that has these values at these places."""
    places = dict(places)
    shape = np.max(list(places), axis=0) + 1
    return np.stack([places[p] for p in np.ndindex(*shape)]).reshape(*shape, -1)


SIZES = (7, 5, 6)
IN_SPACE = {
    "space": (1, 2, 3),
    "window": (1, 2, 3),
    "stride": (1, 2, 3),
    "dilation": (1, 2),
    "mixed": (False, True),
}


def in_space(space, window, stride, dilation, mixed):
    """One size for each axis; with `mixed` those of the second axis are others."""
    by_axis = [[n] * space for n in (window, stride, dilation)]
    if mixed and space > 1:
        for sizes, other in zip(by_axis, (2, 3 - min(stride, 2), 1), strict=True):
            sizes[1] = other
    return SIZES[:space], *map(tuple, by_axis)


@drawn(
    **IN_SPACE,
    padding=("same", "valid", "circular", 1, (1, (0, 2), 2)),
    groups=(1, 2, 4),
    use_bias=(False, True),
)
def test_conv_window_by_window(given):
    padding, groups, use_bias = (given.pop(name) for name in ("padding", "groups", "use_bias"))
    sizes, window, stride, dilation = in_space(**given)
    padding = padding[: len(sizes)] if isinstance(padding, tuple) else padding
    x = np.asarray(normal(1, *sizes, 4))
    layer = Conv(
        8, window, stride=stride, padding=padding, dilation=dilation, groups=groups,
        use_bias=use_bias,
    )  # fmt: skip
    params = moved(layer, x)
    W, b = np.asarray(params["W"]), np.asarray(params.get("b", 0))
    reach = [1 + d * (k - 1) for k, d in zip(window, dilation, strict=True)]
    around = pads(padding, sizes, reach, stride)
    W = W.reshape(groups, 8 // groups, 4 // groups, -1)
    mode = {"mode": "wrap"} if padding == "circular" else {}

    def at(seen):
        seen = seen.reshape(-1, groups, 4 // groups)
        return np.einsum("gfck,kgc->gf", W, seen).reshape(-1) + b

    wanted = filled((p, at(s)) for p, s in windows(x, window, stride, dilation, around, **mode))
    np.testing.assert_allclose(layer(params, x), wanted, rtol=1e-9, atol=1e-9)


@drawn(
    **IN_SPACE, padding=("same", "valid", 1, (0, (1, 0), 1)), groups=(1, 2, 4), more=(False, True)
)
def test_conv_transpose_adds_window_by_window(given):
    padding, groups, more = (given.pop(name) for name in ("padding", "groups", "more"))
    sizes, window, stride, dilation = in_space(**given)
    padding = padding[: len(sizes)] if isinstance(padding, tuple) else padding
    reach = [1 + d * (k - 1) for k, d in zip(window, dilation, strict=True)]
    by_axis = list(zip(stride, dilation, strict=True))
    extra = tuple(max(pair) - 1 if more else 0 for pair in by_axis)
    whole = [n * s for n, s in zip(sizes, stride, strict=True)]
    around = pads(padding, whole, reach, stride)
    full = [(n - 1) * s + r for n, s, r in zip(sizes, stride, reach, strict=True)]
    if padding == "same":
        out = [w + m for w, m in zip(whole, extra, strict=True)]
    else:
        out = [f - low - high + m for f, (low, high), m in zip(full, around, extra, strict=True)]
    if min(out) < 1:
        return
    x = np.asarray(normal(1, *sizes, 4))
    layer = ConvTranspose(
        8, window, stride=stride, padding=padding, dilation=dilation, groups=groups,
        output_padding=extra,
    )  # fmt: skip
    params = moved(layer, x)
    W = np.asarray(params["W"]).reshape(groups, 4 // groups, 8 // groups, *window)
    y = np.zeros((*(f + w for f, w in zip(full, whole, strict=True)), 8))
    for place in np.ndindex(*sizes):
        for k in np.ndindex(*window):
            at = tuple(o * s + j * d for o, s, j, d in zip(place, stride, k, dilation, strict=True))
            own = x[place].reshape(groups, -1)
            y[at] += np.einsum("gc,gcf->gf", own, W[(..., *k)]).reshape(-1)
    cut = tuple(slice(low, low + n) for (low, _), n in zip(around, out, strict=True))
    wanted = y[cut] + np.asarray(params["b"])
    np.testing.assert_allclose(layer(params, x), wanted, rtol=1e-9, atol=1e-9)


@drawn(**IN_SPACE, padding=("same", "valid", 1, ((0, 1), 0, (1, 1))), count=(False, True))
def test_pools_window_by_window(given):
    padding, count = given.pop("padding"), given.pop("count")
    sizes, window, stride, dilation = in_space(**given)
    if padding not in ("same", "valid"):
        window = tuple(k + 1 for k in window)  # the padding is less than the window
        padding = padding[: len(sizes)] if isinstance(padding, tuple) else padding
    x = np.asarray(normal(1, *sizes, 3))
    largest = MaxPool(window, stride=stride, padding=padding, dilation=dilation)
    mean = AveragePool(window, stride=stride, padding=padding, count_padding=count)
    reach = [1 + d * (k - 1) for k, d in zip(window, dilation, strict=True)]
    flat = lambda seen: seen.reshape(-1, seen.shape[-1])
    if all(r <= n for r, n in zip(reach, sizes, strict=True)):
        around = pads(padding, sizes, reach, stride)
        seen = windows(x, window, stride, dilation, around, constant_values=-np.inf)
        wanted = filled((p, flat(s).max(0)) for p, s in seen)
        np.testing.assert_allclose(largest({}, x), wanted, rtol=1e-12)
    around = pads(padding, sizes, window, stride)
    seen = windows(x, window, stride, (1,) * len(sizes), around, constant_values=np.nan)
    by = (lambda s: np.nan_to_num(flat(s)).mean(0)) if count else lambda s: np.nanmean(flat(s), 0)
    wanted = filled((p, by(s)) for p, s in seen)
    np.testing.assert_allclose(mean({}, x), wanted, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ values: attention, recurrence


def turned(x, base):
    """Pairs (i, i + half) of each head's features as complex numbers, turned."""
    positions, _, features = x.shape
    half = features // 2
    angle = np.arange(positions)[:, None] * base ** (-np.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], -1)


@drawn(
    kv_heads=(None, 1, 2),
    features=(None, 2, 4),
    causal=(False, True),
    window=(None, 1, 2, 9),
    rotary=(None, 10.0, 10000.0),
    alibi=(False, True),
    biases=((True, None), (False, None), (False, True)),
    cross=(False, True),
    mask=(None, "keys", "scores"),
    block=(None, 2),
)
def test_attention_query_by_query(given):
    cross, mask = given.pop("cross"), given.pop("mask")
    given["use_bias"], given["qkv_bias"] = given.pop("biases")
    layer = Attention(4, **given)
    x, memory = normal(1, 5, 8), normal(2, 6, 3) if cross else None
    params = moved(layer, x, memory)
    source = x if memory is None else memory
    keys = len(source)
    shape = {"keys": (keys,), "scores": (4, 5, keys)}.get(mask)
    mask = None if shape is None else np.random.default_rng(3).random(shape) > 0.3
    size = given["features"] or 2
    heads = lambda name, x: np.asarray(x @ params[name]["W"].T + params[name].get("b", 0)).reshape(
        len(x), -1, size
    )
    q, k, v = heads("q", x), heads("k", source), heads("v", source)
    if given["rotary"]:
        q, k = turned(q, given["rotary"]), turned(k, given["rotary"])
    y = np.zeros((5, 4, size))
    for t, head in itertools.product(range(5), range(4)):
        own = head // (4 // k.shape[1])
        scores = k[:, own] @ q[t, head] / np.sqrt(size)
        behind = t - np.arange(keys)
        if given["alibi"]:
            scores = scores - 4.0 ** -(head + 1) * np.abs(behind)
        seen = np.ones(keys, bool)
        if given["causal"]:
            seen &= behind >= 0
        if given["window"]:
            seen &= np.abs(behind) < given["window"]
        if mask is not None:
            seen &= np.broadcast_to(mask, (4, 5, keys))[head, t]
        e = np.where(seen, np.exp(scores), 0)
        y[t, head] = e @ v[:, own] / max(e.sum(), 1e-300)
    wanted = y.reshape(5, -1) @ params["out"]["W"].T + params["out"].get("b", 0)
    found = layer(params, x, memory, None if mask is None else jnp.asarray(mask))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def one_step(layer, p, carry, x):
    """The memory after a step, in numpy; h stands first in it."""
    W, U, b = (p[name] for name in "WUb")
    h, *c = carry
    if isinstance(layer, LSTM):
        i, f, g, o = np.split(W @ x + U @ h + b, 4)
        c = sigmoid(f) * c[0] + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    if isinstance(layer, GRU):
        a, u = np.split(W @ x + b, 3), np.split(U @ h, 3)
        r, z = sigmoid(a[0] + u[0]), sigmoid(a[1] + u[1])
        n = np.tanh(a[2] + r * (u[2] + p["b_n"]))
        return ((1 - z) * n + z * h,)
    z = W @ x + U @ h + b
    return (np.tanh(z) if layer.activation == "tanh" else np.maximum(z, 0),)


def all_steps(layer, p, x, mask, carry):
    order = range(len(x))[::-1] if layer.reverse else range(len(x))
    ys = np.zeros((len(x), 3))
    for t in order:
        if mask[t]:
            carry = one_step(layer, p, carry, x[t])
            ys[t] = carry[0]
    return ys, carry


@drawn(
    kind=((LSTM, {}), (GRU, {}), (RNN, {}), (RNN, {"activation": "relu"})),
    mask=(None, 4, 0, "some"),
    reverse=(False, True),
    both=(False, True),
    remat=(False, True),
    carried=(False, True),
)
def test_recurrent_layers_step_by_step(given):
    (kind, options), mask = given["kind"], given["mask"]
    both = given["both"] and not given["carried"]
    options = options | {"remat": given["remat"], "return_carry": given["carried"]}
    layer = kind(3, reverse=given["reverse"], **options)
    x = np.asarray(normal(1, 6, 2))
    of = lambda layer: jax.tree.map(np.asarray, moved(layer, x))
    given_mask = jnp.asarray([True, False, True, True, False, True]) if mask == "some" else mask
    counts = np.arange(6) < (6 if mask is None else mask) if mask != "some" else given_mask
    carry = tuple(np.asarray(normal(i, 3)) for i in range(2 if kind is LSTM else 1))
    start = carry if given["carried"] else tuple(0 * c for c in carry)
    if both:
        net = bidirectional(layer)
        params = of(net)
        other = kind(3, **options, reverse=not given["reverse"])
        wanted = np.concatenate(
            [all_steps(net, params[n], x, counts, start)[0]
             for n, net in (("forward", layer), ("backward", other))], -1
        )  # fmt: skip
        found = net(params, x, given_mask)
    else:
        params = of(layer)
        wanted = all_steps(layer, params, x, counts, start)
        own = (carry if kind is LSTM else carry[0]) if given["carried"] else None
        found = layer(params, x, given_mask, own)
        if given["carried"]:
            found = found[0], (found[1] if kind is LSTM else (found[1],))
        else:
            wanted = wanted[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), found, wanted)


# ------------------------------------------------------------- derivatives, transformations, dtypes


class Case(NamedTuple):
    layer: Layer
    x: jax.Array
    others: tuple = ()
    mode: layers.Mode = layers.EVALUATE


IMAGE, SEQUENCE = normal(1, 5, 4, 2), normal(2, 5, 4)
SOME = jnp.asarray([True, True, False, True, True])
FAMILIES = {
    "convolution": [
        Case(Conv(2, 2, stride=(2, 1), padding=((1, 0), 2), groups=2), IMAGE),
        Case(Conv(2, (3,), padding="circular", dilation=2), SEQUENCE),
        Case(Conv(2, (2, 1, 2), padding="valid", use_bias=False), normal(3, 3, 2, 3, 2)),
        Case(ConvTranspose(2, 3, stride=2, padding=1, output_padding=1, groups=2), IMAGE),
        Case(ConvTranspose(2, (2,), stride=3, dilation=2), SEQUENCE),
        Case(SqueezeExcite(2, gate=ops.hard_sigmoid), IMAGE),
    ],
    "pools": [
        Case(MaxPool((2, 3), stride=1, padding=1, dilation=(2, 1)), IMAGE),
        Case(AveragePool(2, padding="same", count_padding=False), IMAGE),
        Case(AveragePool((2,), stride=1), SEQUENCE),
        Case(layers.AdaptiveAveragePool((2, 3)), IMAGE),
        Case(layers.AdaptiveMaxPool(3), IMAGE),
        Case(layers.GlobalMaxPool(1), SEQUENCE),
        Case(Upsample(2, method="bilinear"), IMAGE),
        Case(layers.PixelShuffle(2), normal(3, 2, 2, 4)),
    ],
    "norms": [
        Case(LayerNorm(), SEQUENCE, (SOME[:, None],)),
        Case(LayerNorm(use_bias=False), SEQUENCE),
        Case(RMSNorm(use_scale=False), SEQUENCE),
        Case(RMSNorm(), SEQUENCE, (SOME[:, None],)),
        Case(GroupNorm(2), SEQUENCE, (SOME[:, None],)),
        Case(InstanceNorm(use_scale=False, use_bias=False), IMAGE),
        Case(BatchNorm(), SEQUENCE),
        Case(BatchNorm(), SEQUENCE, (SOME[:, None],), training(None)),
        Case(WeightNorm(Linear(3)), SEQUENCE),
        Case(SpectralNorm(Linear(3)), SEQUENCE),
    ],
    "attention": [
        Case(Attention(2, kv_heads=1, causal=True, window=2, rotary=10.0, block=2), SEQUENCE),
        Case(Attention(2, alibi=True, features=4, use_bias=False), SEQUENCE, (None, SOME)),
        Case(Attention(2), SEQUENCE, (normal(3, 3, 2),)),
    ],
    "recurrent": [
        Case(LSTM(2, remat=True), SEQUENCE, (SOME,)),
        Case(GRU(2, reverse=True), SEQUENCE, (3,)),
        Case(RNN(2), SEQUENCE, (None, normal(3, 2))),
        Case(LRU(2), SEQUENCE),
        Case(bidirectional(GRU(2)), SEQUENCE),
    ],
    "dense": [
        Case(Linear(3, use_bias=False), SEQUENCE),
        Case(Maxout(2, 3), SEQUENCE),
        Case(MLP(3, 2, activation=ops.silu), SEQUENCE),
        Case(GatedMLP(3, ops.gelu, use_bias=True), SEQUENCE),
        Case(MixtureOfExperts(MLP(3), 3, 2), SEQUENCE),
        Case(MixtureOfExperts(Linear(4), 2, 1, capacity_factor=1.0), SEQUENCE),
        Case(layers.MixerBlock(2, 3), SEQUENCE),
        Case(Dropout(0.4), SEQUENCE, (), training(KEY)),
        Case(DropPath(0.4), SEQUENCE, (), training(jax.random.key(1))),
        Case(layers.DropConnect(Linear(3), 0.4), SEQUENCE, (), training(KEY)),
        Case(layers.PositionEmbedding(6), SEQUENCE),
    ],
}


def in_its_dtype(others, x):
    """Numbers beside x in x's dtype; masks and lengths as they are."""
    is_float = lambda a: jnp.issubdtype(jnp.result_type(a), jnp.floating)
    return jax.tree.map(lambda a: a.astype(x.dtype) if is_float(a) else a, others)


def calls(family):
    """All of a family's layers as one function of parameters and inputs, and those."""
    cases = FAMILIES[family]
    params = [moved(c.layer, c.x, *c.others) for c in cases]
    states = [c.layer.init_state(c.x, *c.others) for c in cases]
    for i, case in enumerate(cases):
        if isinstance(case.layer, SpectralNorm):  # whose vectors depend on W until there are some
            trained = case.layer.apply(params[i], states[i], case.x, mode=training(None))
            states[i] = trained[1]

    def all_of(params, xs):
        return [
            run(c.layer, p, s, (x, *in_its_dtype(c.others, x)), c.mode)[0]
            for c, p, s, x in zip(cases, params, states, xs, strict=True)
        ]

    return all_of, params, [c.x for c in cases]


@exhaustive
@pytest.mark.parametrize("family", ["norms", "attention", "dense"])
def test_two_modes_and_two_orders_under_jit_and_vmap(family):
    """Of other layers the operations' own tests tell it."""
    all_of, params, xs = calls(family)
    f = jax.jit(all_of)
    loss = lambda params, xs: sum(jnp.sum(jnp.sin(y)) for y in all_of(params, xs))
    gradient = jax.jit(jax.grad(loss, (0, 1)))
    for of, modes in ((f, ("fwd", "rev")), (gradient, ("fwd",))):
        check_grads(of, (params, xs), order=1, modes=modes, atol=1e-4, rtol=1e-4)
    batch = [jnp.stack([x, x[::-1], 2 * x]) for x in xs]
    ys = jax.jit(jax.vmap(all_of, (None, 0)))(params, batch)
    for i in range(3):
        alone = f(params, [x[i] for x in batch])
        for case, found, wanted in zip(FAMILIES[family], ys, alone, strict=True):
            np.testing.assert_allclose(
                found[i], wanted, rtol=1e-7, atol=1e-9, err_msg=str(case.layer)
            )


@exhaustive
@pytest.mark.parametrize("family", ["convolution", "pools", "attention", "recurrent", "dense"])
def test_in_bfloat16(family):
    """As in float64, rounded; value and gradient have the dtype of what they are of."""
    dtype = "bfloat16"
    all_of, params, xs = calls(family)
    loss = lambda params, xs: sum(jnp.sum(jnp.sin(y.astype(float))) for y in all_of(params, xs))
    both = jax.jit(lambda p, xs: (all_of(p, xs), jax.grad(loss, (0, 1))(p, xs)))
    as_it = lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree)
    ys, gradients = both(as_it(params), as_it(xs))
    exact = both(*jax.tree.map(lambda a: a.astype(float), (as_it(params), as_it(xs))))
    tolerance = 40 * float(jnp.finfo(dtype).eps)
    for i, case in enumerate(FAMILIES[family]):
        own = ys[i], gradients[0][i], gradients[1][i]
        wanted = exact[0][i], exact[1][0][i], exact[1][1][i]
        assert all(a.dtype == dtype for a in jax.tree.leaves(own)), (case.layer, own)
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(wanted), strict=True):
            size = max(float(jnp.max(jnp.abs(b), initial=0)), 1)
            np.testing.assert_allclose(
                np.asarray(a, float), b, rtol=0, atol=tolerance * size, err_msg=str(case.layer)
            )


@exhaustive
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_an_embedding_s_gradient_in_two_modes(dtype):
    """Of tokens that come twice; in each dtype that of one-hot rows."""
    layer, tokens = Embedding(5, 3), jnp.asarray([[0, 4, 4], [2, 2, 2]])
    E = layer.init(KEY, tokens)["E"].astype(dtype)
    g, t = normal(1, 2, 3, 3).astype(dtype), normal(2, 5, 3).astype(dtype)
    f = lambda E: layer({"E": E}, tokens)
    rows = jax.nn.one_hot(tokens, 5, dtype=float)
    (pulled,) = jax.vjp(f, E)[1](g)
    pushed = jax.jvp(f, (E,), (t,))[1]
    assert pulled.dtype == pushed.dtype == dtype
    exact = lambda a: np.asarray(a, float)
    np.testing.assert_array_equal(exact(pushed), exact(t)[np.asarray(tokens)])
    wanted = np.einsum("abv,abf->vf", rows, exact(g))
    np.testing.assert_allclose(exact(pulled), wanted, rtol=0, atol=8 * float(jnp.finfo(dtype).eps))

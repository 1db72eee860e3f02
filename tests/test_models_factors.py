"""Each model's gradients of examples and Kronecker factors, against materialised ones.

A weight's factors are the second moments of what goes into its layer, and of what comes back to
its output. Here `jax.jacrev` tells both: to a layer's output a `tap` of zeros is added, whose
gradient is the cotangent there; and its input passes an identity with a `probe`, whose "gradient"
is that input.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path
from sweeps import exhaustive, sweep

import fnn
from fnn import curvature, layers, models, ops

KEY = jax.random.key(0)
VOCABULARY, N = 5, 2


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def tokens(*shape):
    return jnp.asarray(np.random.default_rng(5).integers(0, VOCABULARY, shape), jnp.int32)


# --------------------------------------------------------------- the models, tiny ones of each kind


class Model(NamedTuple):
    net: layers.Layer
    example: tuple  # the inputs of the network
    output: object = lambda y: y  # what the loss takes of its output
    wide: layers.Layer | None = None  # the same, wide enough for factors to be worth keeping


last = lambda y: y[-1]
MODELS = {
    "mlp": Model(models.mlp(3, (4, 4)), (normal(1, 5),)),
    "lenet": Model(models.lenet(3), (normal(1, 32, 32, 1),)),
    "resnet": Model(
        models.resnet((1, 1), 3, features=4, small=True),
        (normal(1, 6, 6, 2),),
        wide=models.resnet((1, 1), 3, features=24, small=True),
    ),
    "resnet, bottlenecks": Model(
        models.resnet((1, 2), 3, bottleneck=True, features=2, small=True),
        (normal(1, 6, 6, 2),),
        wide=models.resnet((1, 2), 3, bottleneck=True, features=32, small=True),
    ),
    "convnext": Model(
        models.convnext((1, 1), (4, 6), 3, layer_scale=0.5),
        (normal(1, 8, 8, 2),),
        wide=models.convnext((1, 1), (32, 48), 3),
    ),
    "vit": Model(
        models.vit(3, image=4, patch=2, features=4, depth=2, heads=2, hidden=6),
        (normal(1, 4, 4, 2),),
        wide=models.vit(3, image=4, patch=2, features=32, depth=2, heads=2, hidden=48),
    ),
    "gpt2": Model(
        models.gpt2(VOCABULARY, 3, features=4, depth=2, heads=2),
        (tokens(3),),
        last,
        models.gpt2(40, 3, features=32, depth=2, heads=2),
    ),
    "llama": Model(
        models.llama(VOCABULARY, features=4, depth=2, heads=2, kv_heads=1, hidden=6),
        (tokens(3),),
        last,
        models.llama(40, features=32, depth=2, heads=2, kv_heads=1, hidden=48),
    ),
    "bert": Model(
        models.bert(VOCABULARY, 3, features=4, depth=2, heads=2, hidden=6),
        (tokens(3), tokens(3) % 2),
        lambda y: y[1],
        models.bert(40, 3, features=32, depth=2, heads=2, hidden=48),
    ),
    "transformer": Model(
        models.transformer(VOCABULARY, features=4, depth=2, heads=2, hidden=6),
        (tokens(3), tokens(3)),
        last,
        models.transformer(40, features=32, depth=2, heads=2, hidden=48),
    ),
    "lstm": Model(
        models.lstm_language_model(VOCABULARY, 3),
        (tokens(3),),
        last,
        models.lstm_language_model(40, 32),
    ),
    "state space": Model(
        models.state_space_language_model(VOCABULARY, 4, 2, states=3),
        (tokens(3),),
        last,
        models.state_space_language_model(40, 32, 2),
    ),
    "vae": Model(
        models.vae((3, 2), latent=2, hidden=4), (normal(1, 3, 2),), lambda y: y.logits.reshape(-1)
    ),
    "unet": Model(
        models.unet(2, 3, 1, padding="same"),
        (normal(1, 4, 4, 1),),
        lambda y: y[:2, :2].reshape(-1),
        models.unet(2, 24, 1, padding="same"),
    ),
}


def batch_of(example):
    """N examples: the one that is given, and others like it."""
    rolled = lambda x, i: jnp.roll(x, i, 0) if x.dtype == jnp.int32 else (i + 1) * x - i
    return tuple(jnp.stack([rolled(x, i) for i in range(N)]) for x in example)


def as_function(net, example, output):
    """`outputs(params, xs)` with the statistics that the network starts from, moved."""
    state = jax.tree.map(lambda s: s + 0.1 * jnp.abs(normal(9, *s.shape)), net.init_state(*example))
    return lambda params, xs: output(net.apply(params, state, *xs)[0])


# ------------------------------------------------------------------------------ taps and probes


@jax.custom_vjp
def watched(x, probe):
    return x


watched.defvjp(lambda x, probe: (x, x), lambda x, g: (g, x))


def linear_rows(layer, x):
    return x[..., None, :]


def conv_rows(layer, x):
    """The patches, (*places, groups, in / groups · window)."""
    window = layer.window if isinstance(layer.window, tuple) else (layer.window,) * 2
    stride = layer.stride if isinstance(layer.stride, tuple) else (layer.stride,) * 2
    pad = layer.padding
    pad = pad.upper() if isinstance(pad, str) else [(pad, pad)] * 2
    rows = lax.conv_general_dilated_patches(
        x[None], window, stride, pad, dimension_numbers=("NHWC", "OIHW", "NHWC")
    )[0]
    return rows.reshape(*rows.shape[:2], layer.groups, -1)


def conv_transpose_rows(layer, x):
    """Those of the image with zeros between its entries; for windows as wide as the stride."""
    k = layer.window
    assert (layer.stride, layer.padding, layer.groups) == (k, "same", 1)
    between = [(k - 1, k - 1, k - 1)] * 2 + [(0, 0, 0)]
    x = lax.pad(x, jnp.zeros((), x.dtype), between)
    return conv_rows(layers.Conv(1, k, padding="valid"), x)


def embedding_rows(layer, x):
    return jax.nn.one_hot(x, layer.vocabulary, dtype=float)[..., None, :]


def matrices(kind, w, groups=1):
    """A weight as (groups, out / groups, in / groups · window)."""
    if kind is layers.Embedding:
        return w.T[None]
    if kind is layers.ConvTranspose:
        w = w[..., ::-1, ::-1].swapaxes(0, 1)
    if kind == "an LRU's B":  # (2, states, features)
        w = w.reshape(-1, w.shape[2])
    if kind == "an LRU's C":  # (2, features, states)
        w = w.swapaxes(0, 1)
    return w.reshape(groups, w.shape[0] // groups, -1)


ROWS = {
    layers.Linear: linear_rows,
    layers.Conv: conv_rows,
    layers.ConvTranspose: conv_transpose_rows,
    layers.Embedding: embedding_rows,
}


def tap(monkeypatch, kind):
    """Have layers of this kind multiply rows by matrices, and tell both factors."""
    rows_of, init, call_plain = ROWS[kind], kind.init, kind.__call__
    name = "E" if kind is layers.Embedding else "W"

    def with_taps(layer, key, x):
        params = init(layer, key, x)
        rows = jax.eval_shape(lambda x: rows_of(layer, x), x)
        out = jax.eval_shape(lambda x: call_plain(layer, params, x), x).shape[-1]
        tap = jnp.zeros((*rows.shape[:-2], out))
        return params | {f"tap {name}": tap, f"probe {name}": jnp.zeros(rows.shape)}

    def call(layer, params, x, **mode):
        rows = watched(rows_of(layer, x), params[f"probe {name}"])
        w = matrices(kind, params[name], rows.shape[-2])
        y = jnp.einsum("...gi,goi->...go", rows, w).reshape(*rows.shape[:-2], -1)
        return y + params.get("b", 0) + params[f"tap {name}"]

    monkeypatch.setattr(kind, "init", with_taps)
    monkeypatch.setattr(kind, "__call__", call)


def tap_lstm(monkeypatch):
    init = layers.LSTM.init

    def with_taps(layer, key, x):
        params, zeros = init(layer, key, x), jnp.zeros((len(x), 4 * layer.hidden))
        probes = {"probe W": jnp.zeros((len(x), 1, x.shape[1]))}
        probes |= {"probe U": jnp.zeros((len(x), 1, layer.hidden))}
        return params | probes | {"tap W": zeros, "tap U": zeros}

    def apply(layer, params, state, x, mode=None):
        h = c = jnp.zeros(layer.hidden)
        ys = []
        for t in range(len(x)):
            x_t = watched(x[t][None], params["probe W"][t])[0]
            h = watched(h[None], params["probe U"][t])[0]
            z = params["W"] @ x_t + params["U"] @ h + params["b"]
            i, f, g, o = jnp.split(z + params["tap W"][t] + params["tap U"][t], 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            ys.append(h)
        return jnp.stack(ys), state

    monkeypatch.setattr(layers.LSTM, "init", with_taps)
    monkeypatch.setattr(layers.LSTM, "apply", apply)


def tap_lru(monkeypatch):
    init = layers.LRU.init

    def with_taps(layer, key, x):
        params, steps = init(layer, key, x), len(x)
        features, states = x.shape[1], 2 * layer.states  # both parts of the complex ones
        probes = {"probe B": jnp.zeros((steps, 1, features))}
        probes |= {"probe C": jnp.zeros((steps, 1, states))}
        taps = {"tap B": jnp.zeros((steps, states)), "tap C": jnp.zeros((steps, features))}
        return params | probes | taps

    def apply(layer, params, state, x, mode=None):
        B, C = (matrices(f"an LRU's {name}", params[name])[0] for name in "BC")
        decay = jnp.exp(-jnp.exp(params["nu"]) + 1j * jnp.exp(params["theta"]))
        s, ys = 0.0, []
        for t in range(len(x)):
            x_t = watched(x[t][None], params["probe B"][t])[0]
            real, imaginary = jnp.split(B @ x_t + params["tap B"][t], 2)
            s = decay * s + jnp.exp(params["gamma"]) * (real + 1j * imaginary)
            halves = watched(jnp.concatenate([s.real, -s.imag])[None], params["probe C"][t])[0]
            ys.append(C @ halves + params["tap C"][t] + params["D"] * x[t])
        return jnp.stack(ys), state

    monkeypatch.setattr(layers.LRU, "init", with_taps)
    monkeypatch.setattr(layers.LRU, "apply", apply)


# ----------------------------------------------------------------------------- the expected factors


def kind_of(path, w, stacked):
    if path.endswith("['E']"):
        return layers.Embedding
    if w.ndim - stacked == 4:
        return layers.ConvTranspose if "grow" in path else layers.Conv
    if w.ndim - stacked == 3:
        return f"an LRU's {path[-3]}"
    return layers.Linear


def product(path, w, found, hessians):
    """G w A of the factors that the taps and probes tell of."""
    site, name = path[:-5], path[-3]
    a, g = found[f"{site}['probe {name}']"][:, 0], found[f"{site}['tap {name}']"]
    stacked = "blocks" in path or "coder" in path
    stack = w.shape[0] if stacked else 1
    a = a.reshape(N, stack, -1, *a.shape[-2:])  # (N, stack, positions, groups, in)
    positions, groups = a.shape[2:4]
    g = g.reshape(*g.shape[:2], stack, positions, groups, -1)
    A = np.einsum("nspgi,nspgj->sgij", a, a) / (N * positions)
    half = np.einsum("ncd,ndspgq->ncspgq", hessians, g)
    G = np.einsum("ncspgo,ncspgq->sgoq", g, half) / N
    kind = kind_of(path, w, stacked)
    places = np.arange(w.size).reshape(stack, *w.shape[stacked:])
    places = np.stack([matrices(kind, own, groups) for own in places])
    back = np.zeros(w.size)
    back[places] = G @ w.reshape(-1)[places] @ A
    return back


def by_path(tree, is_leaf=None):
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(tree, is_leaf)[0]}


# How each weight's gradient is kept, of one example, in a network wide enough for that to pay: as
# a product Gᵀ A, as a convolution of x with G, or as G for the rows of a table; of a weight that
# is used twice as a sum of two. All else, biases, scales, positions and decays, is formed, and so
# is what has more numbers in its factors than in itself: the weights of few features and many
# pixels.
A, X, ROW = "Gᵀ A", "x convolved with G", "G added to the rows"
ATTENTION = {f"attend.{name}.W": A for name in ("k", "out", "q", "v")}
BOTTLENECK = {"conv1.W": X, "conv2.W": X, "conv3.W": X}
OF_MLP = {"mlp.hidden.W": A, "mlp.output.W": A}


def within(part, kept):
    return {f"{part}.{path}": how for path, how in kept.items()}


FACTORED = {
    "mlp": {"hidden0.W": A, "hidden1.W": A, "output.W": A},
    "lenet": {"c5.W": X, "f6.W": A, "output.W": A},
    "resnet": {
        "fc.W": A,
        **within("layer1.0", {"conv1.W": X, "conv2.W": X}),
        **within("layer2.0", {"conv1.W": X, "conv2.W": X}),
    },
    "resnet, bottlenecks": {
        "fc.W": A,
        "layer1.0.conv2.W": X,
        **within("layer2.0", {**BOTTLENECK, "downsample.0.W": X}),
        **within("layer2.1", BOTTLENECK),
    },
    "convnext": {
        "stem.0.W": X,
        "down1.1.W": X,
        "output.W": A,
        **within("stage0.0", {"conv.W": X, "expand.W": A, "reduce.W": A}),
        **within("stage1.0", {"conv.W": X, "expand.W": A, "reduce.W": A}),
    },
    "vit": {"patches.W": A, "output.W": A, **within("blocks", ATTENTION | OF_MLP)},
    "gpt2": {"embed.E": f"{A} + {ROW}", **within("blocks", ATTENTION | OF_MLP)},
    "llama": {
        "embed.E": ROW,
        "output.W": A,
        **within("blocks", ATTENTION | {f"mlp.{name}.W": A for name in ("down", "gate", "up")}),
    },
    "bert": {"embed.E": ROW, "pooler.W": A, **within("blocks", ATTENTION | OF_MLP)},
    "transformer": {
        "embed.E": f"{A} + {ROW}",
        **within("encoder", ATTENTION | OF_MLP),
        **within("decoder", ATTENTION | OF_MLP),
        **within("decoder", {path.replace("attend", "cross"): A for path in ATTENTION}),
    },
    "lstm": {"embed.E": ROW, "blocks.lstm.W": A, "blocks.lstm.U": A, "output.W": A},
    "state space": {
        "embed.E": ROW,
        "output.W": A,
        "blocks.gate.W": A,
        **within("blocks.recurrence", {"B": A, "C": A}),
    },
    "vae": {
        **within("encode", {"hidden.W": A}),
        **within("decode", {"hidden.W": A, "output.W": A}),
        "mean.W": A,
    },
    "unet": {
        **within("bottom", {"0.W": X, "2.W": X}),
        **within("up0", {"0.W": X, "2.W": X}),
        "down0.2.W": X,
        "grow0.W": X,
    },
}

# What has factors of too many numbers there; for Kronecker factors that doesn't count.
TOO_MANY = {
    "lenet": {"c1.W", "c3.W"},
    "resnet": {"conv1.W", "layer2.0.downsample.0.W"},
    "resnet, bottlenecks": {
        "conv1.W",
        "layer1.0.conv1.W",
        "layer1.0.conv3.W",
        "layer1.0.downsample.0.W",
    },
    "bert": {"segment.E"},
    "unet": {"down0.0.W", "output.W"},
}


# Of these the norms are compared, too; of all they take long to compile.
NORMS = ("resnet", "transformer", "vit", "state space")


def dotted(path):
    return path[2:-2].replace("']['", ".")


@pytest.mark.parametrize("name", sweep(MODELS, ["llama"]))
def test_what_stays_factored(name):
    """By `explain`; nothing is computed."""
    net, example, output, wide = MODELS[name]
    net = wide or net
    f = as_function(net, example, output)
    loss = lambda p, xs: jnp.sum(jnp.sin(f(p, xs)))
    params = jax.eval_shape(net.init, KEY, *example)
    _, g = jax.eval_shape(fnn.per_example.grads(loss), params, batch_of(example))
    kept, too_many = {}, set()
    for row in fnn.per_example.explain(g):
        path = dotted(row["path"])
        if row["kept"] != "dense":
            kept.setdefault(path, []).append(row["why"].removeprefix("gradient is "))
        elif row["why"].startswith("its factors hold"):
            too_many.add(path)
    assert {path: " + ".join(sorted(how, reverse=True)) for path, how in kept.items()} == {
        path: " + ".join(sorted(how.split(" + "), reverse=True))
        for path, how in FACTORED[name].items()
    }
    assert too_many == TOO_MANY.get(name, set())


@exhaustive
@pytest.mark.parametrize("name", MODELS)
def test_against_materialised_ones(name, monkeypatch):
    net, example, output, _ = MODELS[name]
    f = as_function(net, example, output)
    keys = iter(range(100, 1000))
    random = lambda p: np.random.default_rng(next(keys)).normal(size=p.shape)
    params = jax.tree.map(lambda p: p + 0.3 * random(p), jax.jit(net.init)(KEY, *example))
    directions = jax.tree.map(random, params)
    xs = batch_of(example)
    is_class = jax.eval_shape(f, params, example).shape[0] in (3, VOCABULARY)
    targets = np.arange(N) % 3 if is_class else np.zeros(N)
    loss = ops.softmax_cross_entropy if is_class else lambda z, t: jnp.sum(jnp.cosh(z - t))
    is_factors = lambda x: isinstance(x, curvature.Kronecker | curvature.Block | curvature.Diagonal)
    kinds = {}

    @jax.jit
    def ours(params, xs):
        _, g = fnn.per_example.grads(lambda p, e: loss(f(p, e[0]), e[1]))(params, (xs, targets))
        factors = curvature.kronecker_factors(f, loss)(params, (xs, targets))
        kinds.update(by_path(factors, is_factors))
        times = jax.tree.map(lambda k, w: k.times(w), factors, directions, is_leaf=is_factors)
        z = jax.vmap(f, (None, 0))(params, xs)
        norms = fnn.per_example.norms(g) if name in NORMS else None
        return z, fnn.per_example.materialize(g), norms, times

    z, formed, norms, times = jax.tree.map(np.asarray, ours(params, xs))

    for kind in ROWS:
        tap(monkeypatch, kind)
    tap_lstm(monkeypatch)
    tap_lru(monkeypatch)
    given = by_path(params)
    shapes = jax.eval_shape(net.init, KEY, *example)
    start = lambda path, t: given.get(keystr(path), np.zeros(t.shape))
    full = tree_map_with_path(start, shapes)

    @jax.jit
    def materialised(full, xs):
        z = jax.vmap(f, (None, 0))(full, xs)
        jacobians = jax.vmap(jax.jacrev(f), (None, 0))(full, xs)
        derivatives = [jax.vmap(d(loss))(z, targets) for d in (jax.grad, jax.hessian)]
        return z, jacobians, *derivatives

    same, jacobians, slopes, hessians = jax.tree.map(np.asarray, materialised(full, xs))
    np.testing.assert_allclose(z, same, rtol=1e-9, atol=1e-9)
    found, direction = by_path(jacobians), by_path(directions)
    squares = 0
    for path, own in by_path(formed).items():
        wanted = np.einsum("nc,nc...->n...", slopes, found[path])
        np.testing.assert_allclose(own, wanted, rtol=1e-7, atol=1e-9, err_msg=path)
        squares += np.sum(wanted.reshape(N, -1) ** 2, 1)
    if name in NORMS:
        np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-8)
    factored = []
    for path, own in by_path(times).items():
        w, J = direction[path], found[path].reshape(N, z.shape[1], -1)
        if isinstance(kinds[path], curvature.Kronecker):
            wanted = product(path, w, found, hessians)
            factored.append(path)
        elif isinstance(kinds[path], curvature.Block):
            along = np.einsum("ncd,nd->nc", hessians, J @ w.reshape(-1))
            wanted = np.einsum("nci,nc->i", J, along) / N
        else:
            wanted = np.einsum("nci,nci->i", J, hessians @ J) / N * w.reshape(-1)
        np.testing.assert_allclose(own.reshape(-1), wanted, rtol=1e-6, atol=1e-8, err_msg=path)
    # All that stay factored, but what is used twice: a sum of products has no Kronecker factors.
    once = {path for path, how in FACTORED[name].items() if " + " not in how}
    assert {dotted(path) for path in factored} == once | TOO_MANY.get(name, set())

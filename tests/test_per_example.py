"""Factored per-example gradients against materialised `jax.vmap(jax.value_and_grad)`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import fnn.per_example as pe
from fnn.per_example.differentiate import factored, keys_of

HASTILY = {"xla_backend_optimization_level": 0}


def R(i, *shape, scale=1.0):
    """Random numbers."""
    return jnp.asarray(scale * np.random.default_rng([i, *shape]).standard_normal(shape))


def ints(i, *shape, below):
    return jnp.asarray(np.random.default_rng([i, *shape]).integers(0, below, shape))


# ---------------------------------------------------------------------------------------- cases
#
# Each returns (loss, parameters, batch), and maybe a dict: `key`, `static`, `tolerance`, and
# `kept`, the kinds of terms that must be there when nothing is materialised for thrift.

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@case
def perceptron():
    p = {"W": R(0, 7, 5), "b": R(1, 7), "V": R(2, 3, 7)}

    def loss(p, e):
        x, y = e
        return jnp.sum((p["V"] @ jnp.tanh(p["W"] @ x + p["b"]) - y) ** 2)

    return loss, p, (R(3, 6, 5), R(4, 6, 3)), {"kept": {"W": "Product", "V": "Product"}}


@case
def batched_weights():
    """A stack of matrices, each with a vector of its own, and einsums in odd orders."""
    p = {"W": R(0, 3, 4, 5), "V": R(1, 4, 2, 3, 2)}

    def loss(p, x):
        y = jnp.einsum("sij,sj->si", p["W"], x)
        z = jnp.einsum("ajbc,bj->ca", p["V"].transpose(1, 0, 2, 3), x[:, :4])
        return jnp.sum(y**3) + jnp.sum(jnp.sin(z))

    return loss, p, R(3, 4, 3, 5), {"kept": {"W": "Product", "V": "Product"}}


@case
def tied():
    """An embedding and, transposed, the output's weight; some words twice."""
    p = {"E": R(0, 11, 4), "W": R(1, 4, 4)}

    def loss(p, e):
        i, y = e
        z = jnp.tanh(p["E"][i] @ p["W"]) @ p["E"].T
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1))

    i = ints(3, 5, 6, below=11)
    return loss, p, (i, jnp.roll(i, 1, 1)), {"kept": {"E": "Product Rows"}}


@case
def embeddings():
    """Repeated, out of bounds and negative indices, in every mode; columns; one dynamic row."""
    p = {"E": R(0, 9, 3), "F": R(1, 9, 3), "C": R(2, 3, 9), "D": R(4, 9, 2, 3), "S": R(5, 9, 3)}

    def loss(p, e):
        i, y = e
        h = p["E"].at[i].get(mode="fill", fill_value=1.0) * p["F"].at[i].get(mode="clip")
        h += p["C"][:, i % 9].T + p["S"][-(i % 9)]
        h += lax.dynamic_index_in_dim(p["D"], i[0], 0, keepdims=False)[1]
        return jnp.sum(jnp.sin(h) * y)

    i = ints(3, 4, 6, below=14)
    kept = dict.fromkeys("EFCDS", "Rows")
    return loss, p, (i, R(6, 4, 6, 3)), {"kept": kept}


@case
def recurrent():
    p = {"Wx": R(0, 4, 3), "Wh": R(1, 4, 4), "b": R(2, 4), "h0": R(5, 4), "E": R(6, 5, 4)}

    def loss(p, e):
        def step(h, given):
            x, i = given
            h = jnp.tanh(p["Wx"] @ x + p["Wh"].T @ h + p["b"] + p["E"][i])
            return h, h

        h, hs = lax.scan(step, p["h0"], e)
        return jnp.sum(h**2) + jnp.sum(hs)

    kept = {"Wx": "Product", "Wh": "Product", "E": "Rows"}
    return loss, p, (R(3, 6, 7, 3), ints(7, 6, 7, below=5)), {"kept": kept}


@case
def stacked_layers():
    """Layers under scan, run backwards; a weight that all layers share; one view of each kind."""
    p = {"W": R(0, 3, 4, 4) / 2, "b": R(1, 3, 4), "T": R(6, 3, 4, 4), "U": R(7, 4, 4)}
    p |= {"S": R(8, 3, 5, 8), "E": R(9, 3, 4, 4)}

    def loss(p, e):
        def layer(x, w):
            x = jnp.tanh(x @ w["W"].T + w["b"]) + jnp.sin(x) @ w["T"] + x @ w["S"][1:, ::2][::-1]
            return x @ p["U"] + w["E"][e[1]], None

        w = {name: p[name] for name in "WbTSE"}
        x, _ = lax.scan(layer, e[0], w, reverse=True)
        return jnp.sum(x**2)

    kept = dict.fromkeys("WTUS", "Product")
    return loss, p, (R(3, 5, 2, 4), ints(4, 5, 2, below=4)), {"kept": kept}


@case
def nested_scans():
    p = {"W": R(0, 2, 3, 3) / 2, "V": R(1, 3, 3) / 2}

    def loss(p, x):
        def outer(x, w):
            def inner(x, _):
                return jnp.tanh(w @ x) + p["V"] @ x, None

            return lax.scan(inner, x, None, length=3)[0], None

        return jnp.sum(lax.scan(outer, x, p["W"])[0] ** 2)

    return loss, p, R(3, 4, 3), {"kept": {"W": "Product", "V": "Product"}}


@case
def views():
    """Reshaped, transposed, sliced with steps, reversed, repeated, put side by side, negated."""
    p = {"a": R(0, 12), "b": R(1, 3, 2, 4), "c": R(2, 6, 8), "d": R(5, 4), "e": R(6, 2, 4)}
    p |= {"f": R(7, 1, 4), "g": R(8, 3, 4)}

    def loss(p, x):
        y = p["a"].reshape(3, 4) @ x
        y = jnp.einsum("jkl,l->jk", p["b"], x) @ jnp.ones(2) + y * 2
        z = jnp.concatenate([y, x[:3]])
        q = p["c"][1:5:2, ::3] @ z[:3]
        r = p["c"][:3, 2:8] @ z + p["c"][3:, 2:] @ jnp.sin(z)
        s = p["c"][::-1].T @ z
        t = jnp.broadcast_to(p["d"], (3, 4)) @ x
        u = jnp.concatenate([p["e"], -p["f"], p["g"] / 3], axis=0).T @ z
        v = (jnp.squeeze(p["f"], 0)[:, None] * jnp.ones((4, 3))).T @ x
        out = jnp.sum(y**2) + jnp.sum(q**2) + jnp.sum(jnp.sin(r)) + jnp.sum(jnp.cos(s))
        return out + jnp.sum(t**3) + jnp.sum(u**2) + jnp.sum(v**2)

    kept = dict.fromkeys("abcdeg", "Product")
    return loss, p, R(3, 5, 4), {"kept": kept}


@case
def twice():
    """One weight at two depths: two positions of one term; added to and taken from another."""
    p = {"W": R(0, 6, 6), "V": R(1, 6, 6), "U": R(2, 6, 6)}

    def loss(p, x):
        h = p["W"] @ jnp.tanh(p["W"] @ x)
        return jnp.sum(((p["V"] - p["U"] + p["W"].T) @ h) ** 2) + jnp.sum((p["V"].T @ h) ** 2)

    return loss, p, R(3, 5, 6), {"kept": dict.fromkeys("WVU", "Product")}


@case
def weight_norm():
    p = {"v": R(0, 5, 4), "g": R(1, 5), "s": R(2), "W": R(4, 3, 5), "n": R(5, 3, 5)}

    def loss(p, x):
        W = p["g"][:, None] * p["v"] / jnp.linalg.norm(p["v"], axis=1, keepdims=True)
        h = jnp.tanh(W @ x)
        y = p["s"] * p["W"] @ h + jax.nn.softmax(p["n"]) @ h
        return jnp.sum(y**2) + jnp.sum(((-p["W"] / 3) @ h) ** 3)

    return loss, p, R(3, 6, 4), {}


@case
def normalisations():
    """LayerNorm, RMSNorm and GroupNorm, scales and shifts at several positions."""
    p = {"g": R(0, 8), "b": R(1, 8), "r": R(2, 8), "n": R(4, 4), "W": R(5, 8, 8)}

    def loss(p, x):
        h = zoo.rms_norm(zoo.layer_norm(x @ p["W"], p["g"], p["b"]), 1 + p["r"])
        k = h.reshape(-1, 4, 2)
        k = (k - k.mean((0, 2), keepdims=True)) / jnp.sqrt(k.var((0, 2), keepdims=True) + 1e-5)
        return jnp.sum(jnp.sin(k * p["n"][:, None]))

    return loss, p, R(3, 5, 3, 8), {"kept": {"W": "Product"}}


@case
def convolutions():
    """Strided, padded, dilated, grouped, depthwise and transposed; the last with few pixels."""
    p = {"k": R(0, 3, 3, 2, 4), "g": R(1, 3, 3, 2, 8), "d": R(2, 3, 2, 1, 8), "t": R(4, 2, 2, 8, 3)}

    def loss(p, x):
        x = zoo.conv(x[None], p["k"], (2, 1), ((1, 2), (0, 1)), rhs_dilation=(1, 2))
        x = zoo.conv(jnp.tanh(x), p["g"], feature_group_count=2)
        x = zoo.conv(jnp.tanh(x), p["d"], feature_group_count=8)
        return jnp.sum(lax.conv_transpose(jnp.tanh(x), p["t"], (2, 2), "SAME") ** 2)

    return loss, p, R(3, 3, 6, 7, 2), {"kept": dict.fromkeys("kgdt", "Convolution")}


@case
def convolutions_viewed():
    """Other orders of axes, one dimension, a kernel used twice, transposed and in a loop."""
    p = {"k": R(0, 4, 2, 3), "m": R(1, 8, 2, 3), "s": R(2, 2, 8, 4, 1)}

    def loss(p, x):
        x = lax.conv_general_dilated(x[None], p["k"], (1,), "SAME")
        x = jnp.tanh(lax.conv_general_dilated(jnp.tanh(x), p["k"].swapaxes(0, 1), (2,), "VALID"))
        x = lax.conv_general_dilated(x, p["k"], (1,), "SAME")

        def step(x, s):
            h = lax.conv_general_dilated(x, p["m"], (1,), "SAME", feature_group_count=2)
            return x + lax.conv_general_dilated(jnp.sin(h), s.swapaxes(0, 1), (1,), "SAME"), None

        return jnp.sum(lax.scan(step, x, p["s"])[0] ** 3)

    kept = {"k": "Convolution", "m": "Convolution", "s": "Product"}
    return loss, p, R(3, 3, 2, 7), {"kept": kept}


@case
def grouped_query_attention():
    p = {"q": R(0, 8, 4, 3) / 3, "k": R(1, 8, 2, 3) / 3, "v": R(2, 8, 2, 3) / 3}
    p |= {"o": R(4, 4, 3, 8) / 3}

    def loss(p, x):
        q, k, v = (jnp.einsum("td,dhk->thk", x, p[n])[None] for n in "qkv")
        o = jax.nn.dot_product_attention(q, k, v, is_causal=True)[0]  # in float32 inside
        return jnp.sum(jnp.einsum("thk,hkd->td", o, p["o"]) ** 2)

    kept = dict.fromkeys("qkvo", "Product")
    return loss, p, R(3, 4, 5, 8), {"tolerance": 1e-5, "kept": kept}


@case
def attention():
    """Queries, keys and values from one weight, split; positions with biases of their own."""
    p = {"qkv": R(0, 24, 8) / 3, "place": R(1, 5, 8), "o": R(2, 8, 8), "b": R(4, 24)}

    def loss(p, x):
        z = (x + p["place"]) @ p["qkv"].T + p["b"]
        q, k, v = (a.reshape(1, 5, 2, 4) for a in jnp.split(z, 3, axis=-1))
        return jnp.sum((zoo.attend(q, k, v, True).reshape(5, 8) @ p["o"]) ** 2)

    return loss, p, R(3, 4, 5, 8), {"kept": {"qkv": "Product", "o": "Product"}}


@case
def lora():
    W = R(9, 6, 5)
    p = {"A": R(0, 2, 5), "B": R(1, 6, 2), "C": R(2, 2, 5), "D": R(4, 6, 2), "F": R(5, 2, 6)}

    def loss(p, x):
        y = W @ x.T + p["B"] @ (p["A"] @ x.T)
        z = (W + 0.5 * p["D"] @ p["C"]) @ x.T + x[0] @ (p["C"].T @ p["F"]) @ y
        return jnp.sum(jnp.sin(y) * z)

    return loss, p, R(3, 4, 3, 5), {"kept": dict.fromkeys("ABCDF", "Product")}


@case
def mixture_of_experts():
    p = {"gate": R(0, 4, 3), "W": R(1, 3, 4, 5), "V": R(2, 3, 5, 4)}

    def loss(p, x):
        g = jax.nn.softmax(x @ p["gate"])
        h = jax.nn.relu(jnp.einsum("td,edf->tef", x, p["W"]))
        y = jnp.einsum("tef,efd,te->td", h, p["V"], g)
        i = jnp.argmax(x @ p["gate"], -1)
        z = jax.vmap(lambda x, i: x @ p["W"][i])(x, i)
        z2 = lax.switch(i[0], [lambda x, j=j: x @ p["W"][j] for j in range(3)], x[0])
        return jnp.sum(y**2) + jnp.sum(z**2) + jnp.sum(z2)

    return loss, p, R(3, 4, 6, 4), {"kept": {"gate": "Product"}}


@case
def complex_weights():
    p = {"W": R(0, 3, 4) + 1j * R(1, 3, 4), "v": R(2, 3) + 0j, "r": R(5, 4, 4), "b": R(6, 4)}
    p |= {"s": R(7, 4, 4), "E": R(8, 5, 4)}

    def loss(p, x):
        e = p["E"].astype(complex)[jnp.array([1, 3])].sum(0)
        h = p["W"] @ (p["r"] @ x + p["b"] + p["s"].astype(complex).T @ x + x * e) / 3
        return jnp.abs(jnp.sum(p["v"] * h * h)) ** 2 + jnp.sum(jnp.abs(h) ** 2)

    return loss, p, R(3, 4, 4) + 1j * R(4, 4, 4), {"kept": dict.fromkeys("Wrs", "Product")}


@case
def complex_at_positions():
    p = {"W": R(0, 5, 6) + 1j * R(1, 5, 6), "E": R(4, 4, 6) + 1j * R(5, 4, 6)}

    def loss(p, e):
        i, x = e
        return jnp.sum(jnp.abs((x + p["E"][i]) @ p["W"].T) ** 3)

    batch = ints(6, 4, 3, below=4), R(3, 4, 3, 6) + 1j * R(7, 4, 3, 6)
    return loss, p, batch, {"kept": {"W": "Product", "E": "Rows"}}


@case
def checkpoints():
    p = {"W": R(0, 4, 4), "V": R(1, 4, 4), "b": R(2, 4)}

    def loss(p, x):
        @jax.checkpoint
        def f(p, x):
            return jnp.tanh(jnp.tanh(x @ p["W"] + p["b"]) @ p["V"])

        x, _ = lax.scan(lambda x, _: (f(p, x), None), f(p, x), None, length=3)
        return jnp.sum(x**2)

    return loss, p, R(3, 4, 2, 4), {"kept": {"W": "Product", "V": "Product"}}


@case
def branches_and_loops():
    """cond, fori_loop, while_loop before the parameters, a custom rule."""
    p = {"W": R(0, 4, 4) / 4, "V": R(1, 4, 4) / 4}

    @jax.custom_vjp
    def times(w, x):
        return w @ x

    times.defvjp(lambda w, x: (w @ x, (w, x)), lambda r, g: (jnp.outer(g, r[1]), r[0].T @ g))

    def loss(p, x):
        x = lax.while_loop(lambda x: jnp.sum(x**2) > 1, lambda x: x / 2, x)
        x = lax.fori_loop(0, 3, lambda i, x: jnp.tanh(p["W"] @ x), x)
        x = lax.cond(x[0] > 0, lambda x: p["V"] @ x, lambda x: x * p["V"][0], x)
        return jnp.sum(times(p["V"], x) ** 2)

    return loss, p, R(3, 6, 4), {"kept": {"W": "Product"}}


@case
def cast():
    """Half-precision products; a penalty on the weights, the same for all examples."""
    p = {"W": R(0, 6, 6).astype(jnp.float32), "l": R(1, 3)}

    def loss(p, x):
        h = x.astype(jnp.bfloat16) @ p["W"].astype(jnp.bfloat16)
        penalty = 1e-2 * sum(jnp.sum(v**2) for v in jax.tree.leaves(p))
        return jnp.sum(h.astype(jnp.float64) ** 2) + penalty

    return loss, p, R(3, 4, 6), {"tolerance": 2e-2, "kept": {"W": "Dense Product"}}


@case
def unused():
    p = {"W": R(0, 4, 3), "V": R(1, 4, 4), "none": jnp.zeros((0, 3)), "one": R(2, 1, 1)}

    def loss(p, x):
        return jnp.sum(p["W"] @ x) * (p["one"] @ x[:1])[0] + jnp.sum(p["none"] @ x)

    return loss, p, R(3, 4, 3), {"kept": {"V": "Dense"}}


@case
def keyed():
    """A key for each example, and a static argument."""
    p = {"W": R(0, 5, 5)}

    def loss(p, x, key, *, rate):
        return jnp.sum((jax.random.bernoulli(key, rate, (5,)) * (p["W"] @ x)) ** 2)

    return loss, p, R(3, 6, 5), {"key": jax.random.key(7), "static": {"rate": 0.5}}


# ------------------------------------------------------------------------------------ quantities


def gradients(loss, params, batch, *, key=None, static=None, thrifty=False):
    """As `pe.grads`; but without thrift all factors are kept, whatever the shapes."""
    size = jax.tree.leaves(batch)[0].shape[0]
    one = lambda *inputs: factored(
        loss, params, inputs, static or {}, has_aux=False, thrifty=thrifty
    )
    return jax.vmap(one)(batch, *keys_of(key, size))


def theirs(loss, params, batch, *, key=None, static=None):
    size = jax.tree.leaves(batch)[0].shape[0]
    keys = keys_of(key, size)
    f = jax.value_and_grad(lambda p, *inputs: loss(p, *inputs, **(static or {})))
    return jax.vmap(f, in_axes=(None, 0, *[0] * len(keys)))(params, batch, *keys)


def weights_like(g):
    return jnp.arange(1.0, 1 + jax.tree.leaves(g)[0].shape[0]) - 2.5


def quantities(g, others, direction):
    """Everything, of factored gradients."""
    return {
        "materialize": pe.materialize(g),
        "norms": pe.norms(g),
        "norms by leaf": pe.norms(g, by="leaf"),
        "gram": pe.gram(g),
        "gram with others": pe.gram(g, others),
        "dot": pe.dot(g, direction),
        "sum": pe.sum(g),
        "mean": pe.mean(g),
        "weighted_sum": pe.weighted_sum(g, weights_like(g)),
        "second_moment": pe.second_moment(g),
        "variance": pe.variance(g),
        "noise_scale": pe.noise_scale(g),
    }


def flattened(tree):
    leaves = jax.tree.leaves(tree)
    rows = jnp.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1)
    if jnp.iscomplexobj(rows):
        rows = jnp.concatenate([rows.real, rows.imag], axis=1)
    return rows


def plain_quantities(d, others, direction):
    """The same from materialised gradients."""
    rows, n = flattened(d), jax.tree.leaves(d)[0].shape[0]
    squares = lambda x: jnp.mean(jnp.abs(x) ** 2, axis=0)
    mean = rows.mean(0)
    trace = jnp.sum((rows - mean) ** 2) / (n - 1)
    direction = flattened(jax.tree.map(lambda x: x[None], direction))[0]
    return {
        "materialize": d,
        "norms": jnp.linalg.norm(rows, axis=1),
        "norms by leaf": jax.tree.map(lambda x: jnp.linalg.norm(flattened(x), axis=1), d),
        "gram": rows @ rows.T,
        "gram with others": rows @ flattened(others).T,
        "dot": rows @ direction,
        "sum": jax.tree.map(lambda x: x.sum(0), d),
        "mean": jax.tree.map(lambda x: x.mean(0), d),
        "weighted_sum": jax.tree.map(lambda x: jnp.tensordot(weights_like(d), x, 1), d),
        "second_moment": jax.tree.map(squares, d),
        "variance": jax.tree.map(lambda x: squares(x - x.mean(0)), d),
        # McCandlish et al. (2018): both estimates without bias.
        "noise_scale": trace / (jnp.sum(mean**2) - trace / n),
    }


def close(ours, plain, tolerance=1e-10):
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    largest = max(float(jnp.max(jnp.abs(x), initial=0)) for x in jax.tree.leaves(plain))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(plain), strict=True
    ):
        assert a.shape == b.shape, (jax.tree_util.keystr(path), a.shape, b.shape)
        np.testing.assert_allclose(
            a, b, tolerance, tolerance * (largest + 1e-300), err_msg=jax.tree_util.keystr(path)
        )


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile(HASTILY)(*args)


def kinds(leaf):
    return " ".join(sorted({type(t).__name__ for t in leaf.terms}))


@pytest.mark.parametrize("name", CASES)
def test_every_quantity_is_exact(name):
    loss, params, batch, about = CASES[name]()
    options = {k: about[k] for k in ("key", "static") if k in about}
    tolerance = about.get("tolerance", 1e-10)
    direction = jax.tree.map(lambda x: jnp.sin(x + 1), params)
    found = {}

    def both(params, batch):
        losses, g = gradients(loss, params, batch, **options)
        _, thrifty = gradients(loss, params, batch, thrifty=True, **options)
        found.update(g=g, thrifty=thrifty)
        plain, d = theirs(loss, params, batch, **options)
        part = lambda tree: jax.tree.map(lambda x: x[:2], tree)
        ours = quantities(g, part(g), direction)
        few = pe.materialize(thrifty), pe.norms(thrifty), pe.sum(thrifty), pe.gram(thrifty)
        return (losses, ours, few), (plain, plain_quantities(d, part(d), direction))

    (losses, ours, few), (plain, expected) = compiled(both, params, batch)
    close(losses, plain, tolerance)
    for what in expected:
        scale = 10 if what in ("gram", "gram with others", "variance", "noise_scale") else 1
        close(ours[what], expected[what], tolerance * scale)
    close(few, tuple(expected[k] for k in ("materialize", "norms", "sum", "gram")), tolerance * 10)
    for dtype, leaf in zip(
        jax.tree.leaves(jax.tree.map(lambda x: x.dtype, params)),
        jax.tree.leaves(ours["materialize"]),
        strict=True,
    ):
        assert leaf.dtype == dtype
    for leaf, kept in about.get("kept", {}).items():
        assert kinds(found["g"][leaf]) == kept, f"{leaf}\n{pe.explain(found['g'])}"


if __name__ == "__main__":
    pytest.main([__file__])

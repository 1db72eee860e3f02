"""Factored per-example gradients against materialised `jax.vmap(jax.value_and_grad)`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from compiling import compiled_programs
from jax import lax
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn.per_example as pe
from fnn.jaxpr import all_equations, program
from fnn.per_example.differentiate import factored
from fnn.per_example.inputs import keys_of

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
def rows_that_are_the_same_for_all():
    """Positions: of P some rows are added to x, at known places."""
    p = {name: R(i, 9, 4) for i, name in enumerate(("some", "first", "each", "from"))}
    p |= {"columns": R(4, 3, 9), "deep": R(5, 2, 9, 4), "all": R(6, 5, 4)}

    def loss(p, x):
        y = x + p["some"][jnp.array([3, 1, 1, 8, 20])] + p["first"][:5] + p["each"][::2]
        y += lax.dynamic_slice_in_dim(p["from"], 7, 5) + p["all"] + p["deep"][:, 2:7].sum(0)
        return jnp.sum(jnp.sin(y) ** 2) + jnp.sum(jnp.cos(p["columns"][:, :5] @ x))

    named = ("some", "first", "each", "from", "deep")
    kept = dict.fromkeys(named, "Rows") | {"columns": "Product", "all": "Dense"}
    return loss, p, R(7, 6, 5, 4), {"kept": kept}


@case
def rows_from_a_place_of_the_example():
    p = {"P": R(0, 9, 4), "columns": R(1, 3, 9)}

    def loss(p, e):
        x, start = e
        y = x + lax.dynamic_slice_in_dim(p["P"], start, 5)
        return jnp.sum(jnp.sin(y)) + jnp.sum(
            lax.dynamic_slice(p["columns"], (0, start), (3, 2)) ** 3
        )

    starts = jnp.array([0, 3, -2, 8, 100, 4])
    return loss, p, (R(2, 6, 5, 4), starts), {"kept": dict.fromkeys(p, "Rows")}


@case
def made_by_a_network():
    """Of a weight and a bias that are made from an embedding z: gradients g zᵀ."""
    p = {"H": R(0, 20, 3), "z": R(1, 3), "B": R(2, 4, 3), "P": R(3, 5, 3)}

    def loss(p, x):
        W = (p["H"] @ p["z"]).reshape(4, 5) + p["B"] @ p["P"].T
        return jnp.sum(jnp.tanh(W @ x + p["B"] @ p["z"]) ** 2)

    kept = {"H": "Product", "z": "Dense", "B": "Product", "P": "Product"}
    return loss, p, R(4, 6, 5), {"kept": kept}


@case
def multiplied_by_one_number():
    """A number that is a parameter, a length, and the largest singular value."""
    p = {"W": R(0, 4, 5), "V": R(1, 5, 4), "U": R(2, 4, 4), "s": R(3), "k": R(4, 3, 3, 1, 2)}
    p |= {"E": R(5, 7, 4)}
    u, v = R(6, 4), R(7, 5)

    def loss(p, e):
        x, i = e
        h = p["W"] / (u @ p["W"] @ v) @ x
        h = p["V"] * p["s"] @ jnp.tanh(h) / 2
        h = p["U"] / jnp.linalg.norm(p["U"]) @ jnp.tanh(h[:4]) + (p["E"] / p["s"])[i]
        image = zoo.conv(h.reshape(1, 2, 2, 1), p["s"] * p["k"])
        return jnp.sum(jnp.sin(h) ** 2) + jnp.sum(image**3)

    kept = {"W": "Product", "V": "Product", "U": "Dense Product", "s": "Dense"}
    return loss, p, (R(8, 6, 5), ints(9, 6, below=7)), {"kept": kept | {"k": "Convolution"}}


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
    p = {"W": R(0, 5, 5), "b": R(1, 5)}

    def loss(p, x, key, *, rate):
        return jnp.sum((jax.random.bernoulli(key, rate, (5,)) * (p["W"] @ x + p["b"])) ** 2)

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


# Whose factors are in part given up for thrift.
THRIFTY = ["tied", "embeddings", "recurrent", "stacked_layers", "views", "convolutions"]
THRIFTY += ["complex_weights"]


def weights_like(g):
    return jnp.arange(1.0, 1 + jax.tree.leaves(g)[0].shape[0]) - 2.5


def quantities(g, others, direction):
    """Everything, of factored gradients."""
    return {
        "materialize": pe.materialize(g),
        "norms": pe.norms(g),
        "norms by leaf": pe.norms(g, by="leaf"),
        "gram with others": pe.gram(g, others),
        "dot": pe.dot(g, direction),
        "sum": pe.sum(g),
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
        "gram with others": rows @ flattened(others).T,
        "dot": rows @ direction,
        "sum": jax.tree.map(lambda x: x.sum(0), d),
        "weighted_sum": jax.tree.map(lambda x: jnp.tensordot(weights_like(d), x, 1), d),
        "second_moment": jax.tree.map(squares, d),
        "variance": jax.tree.map(lambda x: squares(x - x.mean(0)), d),
        # McCandlish et al. (2018): both estimates without bias.
        "noise_scale": trace / (jnp.sum(mean**2) - trace / n),
    }


def close(ours, plain, tolerance=1e-10):
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    ours, plain = jax.tree.map(np.asarray, (ours, plain))  # jnp would compile for each shape
    largest = max(float(np.max(np.abs(x), initial=0)) for x in jax.tree.leaves(plain))
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


# A term of each kind, in loops, conditionals and checkpoints, real, complex and half precision.
QUICK = ["tied", "keyed"]


@pytest.mark.parametrize("name", sweep(CASES, QUICK))
def test_every_quantity_is_exact(name):
    loss, params, batch, about = CASES[name]()
    options = {k: about[k] for k in ("key", "static") if k in about}
    tolerance = about.get("tolerance", 1e-10)
    direction = jax.tree.map(lambda x: np.sin(np.asarray(x) + 1), params)
    found = {}

    def both(params, batch):
        losses, g = gradients(loss, params, batch, **options)
        found.update(g=g)
        plain, d = theirs(loss, params, batch, **options)
        part = lambda tree: jax.tree.map(lambda x: x[:2], tree)
        ours = quantities(g, part(g), direction)
        few = ours["materialize"], ours["norms"]
        if name in THRIFTY:
            _, thrifty = gradients(loss, params, batch, thrifty=True, **options)
            few = pe.materialize(thrifty), pe.norms(thrifty)
        return (losses, ours, few), (plain, plain_quantities(d, part(d), direction))

    (losses, ours, few), (plain, expected) = compiled(both, params, batch)
    close(losses, plain, tolerance)
    for what in expected:
        scale = 10 if what in ("gram with others", "variance", "noise_scale") else 1
        close(ours[what], expected[what], tolerance * scale)
    close(few, (expected["materialize"], expected["norms"]), tolerance)
    for dtype, leaf in zip(
        jax.tree.leaves(jax.tree.map(lambda x: x.dtype, params)),
        jax.tree.leaves(ours["materialize"]),
        strict=True,
    ):
        assert leaf.dtype == dtype
    for leaf, kept in about.get("kept", {}).items():
        assert kinds(found["g"][leaf]) == kept, f"{leaf}\n{pe.explain(found['g'])}"


def test_gram_forms_gradients_only_where_that_is_cheaper():
    """Position by position, and one row of the matrix at a time."""
    p = {"W": R(0, 40, 50), "E": R(1, 9, 50)}

    def loss(p, e):
        x, i = e
        return jnp.sum(jnp.sin((x + p["E"][i]) @ p["W"].T))

    batch = R(2, 4, 2, 50), ints(3, 4, 2, below=9)

    def both(p, batch, others):
        (_, g), (_, h) = gradients(loss, p, batch), gradients(loss, p, others)
        (_, d), (_, e) = theirs(loss, p, batch), theirs(loss, p, others)
        return pe.gram(g, h), flattened(d) @ flattened(e).T

    others = R(4, 3, 2, 50), ints(5, 3, 2, below=9)
    close(*compiled(both, p, batch, others))


# ------------------------------------------------------------------------------- other libraries

MODELS = ["nnx_cnn", "nnx_attention", "linen_cnn", "linen_lstm", "equinox_cnn"]
MODELS += ["equinox_attention", "haiku_attention", "haiku_lstm"]


@pytest.mark.parametrize("name", sweep(MODELS, ["equinox_cnn"]))
def test_models_of_other_libraries(name):
    loss, params, data = zoo.ZOO[name]("float64", 3)
    one = lambda p, e: loss(p, *[x[None] for x in e])
    kept = {}

    def both(params, data):
        losses, g = pe.grads(one)(params, data)
        kept["text"] = str(pe.explain(g))
        plain, d = theirs(one, params, data)
        ours = losses, pe.materialize(g), pe.norms(g), pe.sum(g)
        sums = jax.tree.map(lambda x: x.sum(0), d)
        return ours, (plain, d, jnp.linalg.norm(flattened(d), axis=1), sums)

    close(*compiled(both, params, data))
    assert "A (" in kept["text"] or "x [" in kept["text"]


# -------------------------------------------------------------------------------------- clipping

# The parameters of the first group; those that a case has not are left out of it.
FIRST = ("['b']", "['E']", "['k']", "['g']")


def groups_for(params):
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    is_first = lambda path: path.startswith(FIRST)
    return {
        "first": [p for p in paths if is_first(p)],
        "rest": [p for p in paths if not is_first(p)],
    }


@exhaustive
@pytest.mark.parametrize("name", sweep(["perceptron", "tied", "recurrent", "keyed"], ["keyed"]))
def test_clipped_gradients(name):
    loss, params, batch, about = CASES[name]()
    key, static = about.get("key"), about.get("static", {})
    size = jax.tree.leaves(batch)[0].shape[0]
    mask = jnp.arange(size) != 1
    clip = functools.partial(pe.clipped_grad, loss)

    def both(params, batch):
        _, d = theirs(loss, params, batch, key=key, static=static)
        rows = jnp.linalg.norm(flattened(d), axis=1)
        limit = jnp.median(rows)  # about half of the examples are clipped
        added = lambda c: jax.tree.map(lambda x: jnp.tensordot(c, x, 1), d)
        weights = jnp.minimum(1, limit / rows)
        run = lambda f, **more: f(params, batch, key, **static, **more).gradient
        same = {
            "chosen": clip(limit),
            "1 sweep": clip(limit, sweeps=1),
            "2 sweeps": clip(limit, sweeps=2),
            "parts": clip(limit, microbatch_size=2),
        }
        ours = {what: run(f) for what, f in same.items()}
        expected = dict.fromkeys(same, added(weights))
        ours["mask"] = run(clip(limit), mask=mask)
        expected["mask"] = added(weights * mask)
        # Groups: each with a norm of its own, or the whole's shared out.
        groups = groups_for(params)
        in_first = lambda path: jax.tree_util.keystr(path).startswith(FIRST)
        of = jax.tree_util.tree_map_with_path(lambda path, _: in_first(path), params)
        part = lambda yes: [
            x for x, o in zip(jax.tree.leaves(d), jax.tree.leaves(of), strict=True) if o is yes
        ]
        norms = {yes: jnp.linalg.norm(flattened(part(yes)), axis=1) for yes in (True, False)}
        for what, limits, given in [
            ("groups", (limit / 2, limit), {"first": limit / 2, "rest": limit}),
            ("shared", (limit / 2**0.5,) * 2, limit),
        ]:
            by = {
                yes: jnp.minimum(1, c / norms[yes])
                for yes, c in zip((True, False), limits, strict=True)
            }
            ours[what] = run(clip(given, groups=groups, sweeps=2 if what == "groups" else None))
            expected[what] = jax.tree.map(lambda o, x, by=by: jnp.tensordot(by[o], x, 1), of, d)
        whole = clip(limit, microbatch_size=2)(params, batch, key, **static)
        ours["norms"], expected["norms"] = whole.norms, rows
        ours["losses"] = whole.losses
        expected["losses"] = theirs(loss, params, batch, key=key, static=static)[0]
        return ours, expected

    ours, expected = compiled(both, params, batch)
    for what in expected:
        close(ours[what], expected[what])


def test_two_sweeps_where_gradients_are_large(monkeypatch):
    from fnn.per_example import clipping

    called = []
    again = clipping._swept_again
    monkeypatch.setattr(clipping, "_swept_again", lambda *a: (called.append(1), again(*a))[1])
    products = lambda w, x: jnp.sum(jnp.sin(w @ x) ** 2)
    normed = lambda w, x: jnp.sum((w / jnp.linalg.norm(w) @ x) ** 2)
    w, x = R(0, 60, 50), R(1, 4, 50)
    halved = lambda w, x: normed(w, x).astype(jnp.float16)
    for loss, options, dtype, sweeps in [
        (products, {}, float, 1),
        (normed, {}, float, 2),
        (normed, {"sweeps": 1}, float, 1),
        (normed, {"groups": {"all": [""]}}, float, 1),
        (products, {"sweeps": 2}, float, 2),
        # In half precision a weight c would be rounded.
        (normed, {}, jnp.bfloat16, 1),
        (halved, {}, float, 1),
    ]:
        called.clear()
        jax.eval_shape(clipping.clipped_grad(loss, 1.0, **options), w.astype(dtype), x)
        assert len(called) == sweeps - 1


def test_half_precision_is_clipped_in_single():
    """Equal gradients, whose weight c in bfloat16 would be rounded down by 0.4 percent."""
    kernel = {"k": R(0, 3, 3, 2, 8), "W": R(1, 8, 64), "d": R(2, 64)}
    p = jax.tree.map(lambda x: x.astype(jnp.bfloat16), kernel)

    def loss(p, x):
        h = zoo.conv(x[None], p["k"]).reshape(-1, 8) @ p["W"]
        return jnp.sum((h * p["d"]).astype(jnp.float32)) / 50

    x = jnp.broadcast_to(R(3, 4, 4, 2), (1000, 4, 4, 2)).astype(jnp.bfloat16)

    def clipped(p, x):
        limit = pe.norms(pe.grads(loss)(p, x)[1])[0] * (1 + 0.49 / 128) / 2
        return limit, pe.clipped_grad(loss, limit)(p, x)

    limit, found = compiled(clipped, p, x)
    assert found.norms.dtype == jnp.float32
    total = np.sqrt(sum(np.sum(np.asarray(g, float) ** 2) for g in found.gradient.values()))
    np.testing.assert_allclose(total, 1000 * limit, 1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parts_in_half_precision_are_added_up_in_single(dtype):
    """2048 gradients of 1; in bfloat16 257 ones are 256, in float16 2049 are 2048."""
    loss = lambda w, x: (w * x).astype(jnp.float32)
    clip = pe.clipped_grad(loss, float("inf"), microbatch_size=2)
    x = jnp.ones(4098, dtype)
    found = jax.jit(clip)(jnp.ones((), dtype), x, mask=jnp.arange(4098) != 0).gradient
    assert found.dtype == dtype and found == jnp.asarray(4097, dtype)
    # With the noise it is rounded once: to half a step of its dtype, not a whole one.
    noisy = pe.clipped_grad(loss, 1.0, microbatch_size=2, noise_multiplier=1000.0)
    of = lambda w, key: noisy(w, x, noise_key=key).gradient
    keys = jax.random.split(jax.random.key(0), 50)
    single, half = (jax.jit(jax.vmap(functools.partial(of, jnp.ones((), d))))(keys)
                    for d in (jnp.float32, dtype))  # fmt: skip
    assert (half == single.astype(dtype)).all()


def test_a_parameter_that_is_a_number_of_pythons():
    found = pe.clipped_grad(lambda w, x: jnp.sum(w * x), 1.0)(2.0, jnp.ones((3, 2)))
    assert found.gradient == 3 and found.gradient.dtype == jnp.asarray(2.0).dtype


def test_a_zero_gradient_is_clipped_to_zero():
    loss = lambda w, x: jnp.sum((w * x) ** 2)
    found = pe.clipped_grad(loss, 1.0)(jnp.ones(3), jnp.array([[0.0] * 3, [2.0] * 3]))
    assert found.norms[0] == 0 and np.isfinite(found.gradient).all()
    np.testing.assert_allclose(np.linalg.norm(found.gradient), 1, 1e-6)


@pytest.mark.parametrize("options", [{}, {"sweeps": 2}, {"microbatch_size": 2}])
def test_examples_that_are_not_finite(options):
    """Masked out they contribute exactly 0; with nan_safe too, else the sum is nan."""
    w, x = R(0, 3, 4), np.array(R(1, 6, 4))
    x[1], x[4, 2] = np.nan, np.inf
    loss = lambda w, x: jnp.sum(jnp.sin(w) @ x)
    clip = functools.partial(pe.clipped_grad, loss, 1.0, **options)
    good = np.isfinite(x).all(1)
    expected = compiled(clip(), w, x[good])

    def all_ways(w, x):
        plain = clip()(w, x)
        masked = clip()(w, x, mask=jnp.asarray(good))
        safe = clip(nan_safe=True)(w, x)
        return plain, masked, safe, clip(nan_safe=True)(w, x, mask=jnp.arange(6) == 1)

    plain, masked, safe, none = compiled(all_ways, w, x)
    assert np.isnan(plain.gradient).all()
    assert (none.gradient == 0).all()
    for found in (masked, safe):
        close(found.gradient, expected.gradient)
        close(found.norms[good], expected.norms)
        assert not np.isfinite(found.norms[~good]).any()


@pytest.mark.parametrize("sweeps", sweep([1, 2], quick=[2]))
def test_clipping_from_the_smallest_to_the_largest_norms(sweeps):
    """Of 1e-30 and 1e30, whose squares are no float32, and no clipping with inf."""
    sizes = np.float32([1e-30, 1e-12, 1, 1e12, 1e30, 0])
    x, y = np.float32(R(0, 6, 2, 8)), np.float32(R(1, 6, 2, 8)) * sizes[:, None, None]
    one = lambda w, e: jnp.sum((e[0] @ w) * e[1])
    w = jnp.zeros((8, 8), jnp.float32)
    d = np.einsum("npi,npo->nio", np.float64(x), np.float64(y))
    norms = np.linalg.norm(d.reshape(6, -1), axis=1)
    for limit in (1.0, 1e-6, float("inf")):
        clip = pe.clipped_grad(one, limit, sweeps=sweeps)
        each = lambda e, clip=clip: clip(w, jax.tree.map(lambda x: x[None], e))
        found = compiled(lambda x, y, each=each: lax.map(each, (x, y)), x, y)
        np.testing.assert_allclose(found.norms[:, 0], norms, 1e-5)
        expected = d * np.minimum(1, limit / np.maximum(norms, 1e-300))[:, None, None]
        for a, b in zip(np.float64(found.gradient), expected, strict=True):
            np.testing.assert_allclose(a, b, 1e-4, 1e-5 * np.abs(b).max())
            assert np.linalg.norm(a) <= limit * (1 + 1e-6)


def test_multiples_and_sums_of_gradients():
    """Of products, an embedding, a convolution and what is dense; by one number and by many."""
    p = {"W": R(0, 7, 5), "E": R(1, 9, 5), "k": R(2, 3, 5, 5), "n": R(3, 5)}

    def loss(p, e):
        x, i = e
        h = lax.conv_general_dilated(
            (x + p["E"][i] * p["n"])[None],
            p["k"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )[0]
        return jnp.sum(jnp.tanh(p["W"] @ h.T))

    batch, others = ((R(i, 4, 6, 5), ints(i, 4, 6, below=9)) for i in (4, 5))
    c = np.array([2.0, -1.0, 0.0, 0.5])

    def both(p, batch, others):
        (_, g), (_, h) = gradients(loss, p, batch), gradients(loss, p, others)
        d, e = pe.materialize(g), pe.materialize(h)
        total = pe.add(pe.scale(g, c), pe.scale(h, -3))
        by = lambda c, x: c.reshape(-1, *[1] * (x.ndim - 1)) * x
        plain = jax.tree.map(lambda x, y: by(c, x) - 3 * y, d, e)
        return (pe.materialize(total), pe.norms(total), pe.sum(total)), (
            plain,
            jnp.linalg.norm(flattened(plain), axis=1),
            jax.tree.map(lambda x: x.sum(0), plain),
        )

    close(*compiled(both, p, batch, others))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dense_gradients_of_two_dtypes_are_added_up(dtype):
    """Scaled gradients are in float32; with strict promotion, too, they join those that aren't."""
    p = {"n": R(0, 5).astype(dtype)}
    batch = R(1, 4, 5).astype(dtype)
    with jax.numpy_dtype_promotion("strict"):
        _, g = gradients(lambda p, x: jnp.sum(jnp.sin(p["n"] * x)), p, batch)
        total = pe.materialize(pe.add(g, pe.scale(g, 2)))["n"]
    plain = np.float32(batch) * np.cos(np.float32(p["n"] * batch))
    assert total.dtype == dtype
    close(np.float32(total), 3 * plain, 5e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_terms_of_two_dtypes_make_one_norm(dtype):
    """The input, and so a factor, is wider than the weight, of which a part is dense."""
    w, x = R(0, 60, 50).astype(dtype), R(1, 4, 50)

    def loss(w, x):
        normed = w / jnp.sqrt(jnp.sum(w * w))
        return jnp.sum(jnp.sin(normed.astype(x.dtype) @ x))

    with jax.numpy_dtype_promotion("strict"):
        _, g = pe.grads(loss)(w, x)
        found = pe.norms(g), pe.gram(g), pe.second_moment(g), pe.dot(g, w)
    assert [kinds(t) for t in jax.tree.leaves(g, is_leaf=lambda t: hasattr(t, "terms"))] == [
        "Dense Product"
    ]
    exact = w.astype(float)
    plain = jax.vmap(jax.grad(loss), (None, 0))(exact, x)
    wanted = (
        jnp.linalg.norm(plain, axis=(1, 2)),
        jnp.einsum("nij,mij->nm", plain, plain),
        (plain**2).mean(0),
        jnp.einsum("nij,ij->n", plain, exact),
    )
    close(jax.tree.map(np.float64, found), wanted, {"bfloat16": 2e-2, "float32": 1e-5}[dtype])


def test_derivatives_where_one_parameter_has_no_gradient():
    """A whole gradient's norm has a derivative where those of its parts are zero."""
    p = {"W": R(0, 30, 20), "E": R(1, 7, 4), "b": R(2, 3)}
    used = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1.0]])
    batch = R(3, 5, 2, 20), ints(4, 5, 3, below=7), used

    def loss(p, e):
        x, i, used = e
        parts = x @ p["W"].T, jnp.sum(p["E"][i], axis=0), p["b"] * x[0, :3]
        return sum(u * jnp.sum(jnp.sin(part)) for u, part in zip(used, parts, strict=True))

    def ours(p):
        g = pe.grads(loss)(p, batch)[1]
        clipped = pe.clipped_grad(loss, 2.0)(p, batch).gradient
        return pe.norms(g), pe.gram(g), pe.noise_scale(g), clipped

    def plain(p):
        g = jax.vmap(jax.grad(loss), (None, 0))(p, batch)
        d = jnp.concatenate([x.reshape(5, -1) for x in jax.tree.leaves(g)], axis=1)
        norms, mean = jnp.linalg.norm(d, axis=1), d.mean(0)
        variance = jnp.sum((d - mean) ** 2) / 4
        scale = variance / (jnp.sum(mean**2) - variance / 5)
        c = jnp.minimum(1, 2 / norms)
        return norms, d @ d.T, scale, jax.tree.map(lambda x: jnp.tensordot(c, x, 1), g)

    direction = jax.tree.map(np.cos, p)

    def derivatives(f):
        total = lambda p: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(f(p)))
        both = lambda p: (jax.jvp(f, (p,), (direction,)), jax.grad(total)(p))
        return compiled(both, p)

    close(derivatives(ours), derivatives(plain))


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_weights_are_scaled_in_their_own_dtype_and_used_in_float16(size):
    """The numbers by which they are multiplied are out of float16's range; no gradient is."""
    p = {"V": R(0, 6, 5) / size, "W": R(1, 6, 5) * size, "s": np.array(size)}
    p |= {"P": R(2, 6, 6) / size, "Q": R(3, 6, 5) * size}

    def loss(p, x):
        made = p["s"] * p["V"], p["W"] / p["s"], p["P"] @ p["Q"]
        y = [w.astype(x.dtype) @ x for w in made]
        return sum(jnp.sum(jnp.sin(v.astype(jnp.float32))) for v in y)

    x = R(4, 3, 5)
    plain = jax.vmap(jax.grad(loss), (None, 0))(p, x)
    with jax.numpy_dtype_promotion("strict"):
        p = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), p)
        found = pe.materialize(gradients(loss, p, jnp.asarray(x, jnp.float16))[1])
    for name, g in found.items():
        largest = np.abs(plain[name]).max()
        np.testing.assert_allclose(g / largest, plain[name] / largest, atol=2e-2, err_msg=name)


@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_a_noise_multiplier_in_float32(promotion):
    """The norm that it multiplies is in float64."""
    loss = lambda w, x: jnp.sum(w * x)
    given = jnp.zeros(3, jnp.float32), jnp.ones((2, 3), jnp.float32)
    key = {"noise_key": jax.random.key(0)}
    with jax.numpy_dtype_promotion(promotion):
        found = pe.clipped_grad(loss, 1.0, noise_multiplier=jnp.float32(0.5))(*given, **key)
    wanted = pe.clipped_grad(loss, 1.0, noise_multiplier=0.5)(*given, **key)
    close(found.gradient, wanted.gradient)


@exhaustive
def test_noise_has_the_norm_that_was_asked_for():
    """Of every coordinate σ C; with groups σ √ΣC²; complex ones have two coordinates."""
    loss = lambda p, x: 0 * x * (jnp.sum(p["a"]) + jnp.sum(p["b"]).real)
    p = {"a": jnp.zeros((100, 100)), "b": jnp.zeros((50, 100)) + 0j}
    batch = jnp.ones(2)
    for clip, groups, expected in [
        (2.0, None, 3.0),
        (2.0, {"x": ["['a']"], "y": ["['b']"]}, 3.0),
        ({"x": 3.0, "y": 4.0}, lambda path: "x" if "a" in path else "y", 7.5),
    ]:
        clipped = jax.jit(pe.clipped_grad(loss, clip, groups=groups, noise_multiplier=1.5))
        g = clipped(p, batch, noise_key=jax.random.key(0)).gradient
        numbers = np.concatenate([g["a"].ravel(), np.real(g["b"]).ravel(), np.imag(g["b"]).ravel()])
        assert abs(numbers.std() / expected - 1) < 0.02
        assert abs(numbers.mean()) < 0.05 * expected
        assert abs(np.imag(g["b"]).std() / expected - 1) < 0.03
        other = clipped(p, batch, noise_key=jax.random.key(1)).gradient
        assert abs(np.corrcoef(g["a"].ravel(), other["a"].ravel())[0, 1]) < 0.05


def test_noise_and_optax_make_a_step_and_parts_get_noise_once():
    loss = lambda w, x: jnp.sum(w * x)
    clipped = pe.clipped_grad(loss, 1.0, noise_multiplier=1.0, microbatch_size=3)
    optimizer = optax.sgd(0.1)

    @jax.jit
    def step(w, state, x, key):
        found = clipped(w, x, noise_key=key)
        updates, state = optimizer.update(found.gradient / len(x), state, w)
        return optax.apply_updates(w, updates), state

    w = jnp.zeros(4000)
    w, _ = step(w, optimizer.init(w), jnp.zeros((8, 4000)), jax.random.key(0))
    assert abs(np.std(w) * 8 / 0.1 - 1) < 0.05


def test_aux_goes_through_sweeps_and_parts():
    def loss(w, x, key):
        y = w @ x
        return jnp.sum(y**2), {"y": y, "key": key}

    w, x, keys = R(0, 3, 4), R(1, 5, 4), jax.random.split(jax.random.key(0), 5)
    (losses, aux), g = compiled(pe.grads(loss, has_aux=True), w, x, keys)
    close(aux["y"], x @ w.T)
    close(losses, jnp.sum((x @ w.T) ** 2, 1))
    assert (jax.random.key_data(aux["key"]) == jax.random.key_data(keys)).all()
    close(g.materialize(), 2 * jnp.einsum("ni,nj->nij", x @ w.T, x))
    for options in ({}, {"sweeps": 2}, {"microbatch_size": 2}):
        found = compiled(pe.clipped_grad(loss, 1e9, has_aux=True, **options), w, x, keys)
        close(found.aux["y"], x @ w.T)
        close(found.gradient, 2 * (x @ w.T).T @ x)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int64])
@pytest.mark.parametrize("how", ["take", "clip", "slice"])
def test_rows_by_an_index_of_few_bits_or_many(how, dtype):
    """A table of more rows than the index's dtype has numbers; and an index beyond 32 bits."""
    last = min(2**32 + 1, jnp.iinfo(dtype).max)
    table, index = R(0, 300, 4), jnp.asarray([0, 3, last, last], dtype)

    def loss(table, i):
        if how == "take":
            filled = jnp.take(table, i, axis=0, mode="fill", fill_value=0)
            return jnp.sum(jnp.sin(filled))
        if how == "clip":
            return jnp.sum(jnp.sin(jnp.take(table, i, axis=0, mode="clip")))
        return jnp.sum(jnp.sin(lax.dynamic_index_in_dim(table, i, keepdims=False)))

    found = compiled(lambda t, i: pe.grads(loss)(t, i)[1].materialize(), table, index)
    # By jax.grad a lookup of 8 bits loses the last row, where XLA's older emitter is asked for.
    wanted = np.zeros((4, *table.shape))
    for n, i in enumerate(np.asarray(index).tolist()):
        if i < len(table) or how != "take":
            row = min(i, len(table) - 1)
            wanted[n, row] = np.cos(table[row])
    close(found, wanted)


@pytest.mark.parametrize("swapped", [False, True])
def test_inner_products_of_many_large_gradients_with_few(swapped):
    """W is used twice, as W and as its transpose; all gradients together are beyond 2²⁶ numbers."""
    size, many, few = 512, 257, 2
    loss = lambda W, e: e[0] @ (W @ e[1]) + (W @ e[3]) @ e[2] + e[3] @ (W.T @ e[2])
    W = jnp.zeros((size, size), jnp.float32)
    one, other = ([R(k, n, size).astype(jnp.float32) for k in range(4)] for n in (many, few))
    one, other = (other, one) if swapped else (one, other)

    def gram(W, one, other):
        (_, g), (_, h) = pe.grads(loss)(W, one), pe.grads(loss)(W, other)
        return pe.gram(g, h)

    closed = jax.make_jaxpr(gram)(W, one, other)
    sizes = [avals[i].size for e, avals in all_equations(program(closed)) for i in e.outs]
    assert max(sizes) <= 2**25
    inner = lambda i, k: one[i].astype(float) @ other[k].astype(float).T
    # The gradient is a xᵀ + 2 y bᵀ.
    factors = [((0, 1), 1), ((2, 3), 2)]
    pairs = itertools.product(factors, factors)
    wanted = sum(c * d * inner(i, k) * inner(j, l) for ((i, j), c), ((k, l), d) in pairs)
    found = jax.jit(gram)(W, one, other)
    np.testing.assert_allclose(found, wanted, 1e-4, 1e-4 * np.abs(wanted).max())


# ------------------------------------------------------------------------------- what is kept


def test_explain_says_what_is_kept_and_why():
    p = {"W": R(0, 20, 30), "V": R(1, 20, 20), "few": R(2, 2, 30), "n": R(3, 20), "E": R(4, 50, 30)}
    p |= {"k": R(5, 3, 3, 30, 40), "small": R(6, 3, 3, 1, 2)}

    def loss(p, e):
        x, i = e
        h = jnp.tanh((x + p["E"][i]) @ p["W"].T)
        z = jnp.sum((h @ p["V"]) * p["n"]) + jnp.sum(x @ p["few"].T)
        z += jnp.sum(zoo.conv(x[None, :, None], p["k"]) ** 2)
        return z + jnp.sum(zoo.conv(x[None, :, :, None], p["small"]) ** 2)

    # Shapes are enough to ask.
    _, g = jax.eval_shape(pe.grads(loss), p, (R(7, 2, 4, 30), ints(8, 2, 4, below=50)))
    found = {row["path"]: row for row in pe.explain(g)}
    assert found["['W']"]["kept"] == "A (4 × 30), G (4 × 20)"
    assert found["['W']"]["numbers"] == 200 and found["['W']"]["dense"] == 600
    assert found["['V']"]["kept"] == "A (4 × 20), G (4 × 20)"
    assert found["['E']"]["kept"] == "indices (4), G (4 × 30)"
    assert found["['k']"]["kept"] == "x [1, 4, 1, 30], G [1, 4, 1, 40]"
    # x and G hold 128 numbers, the gradient 60.
    assert found["['few']"]["kept"] == "dense"
    assert "128" in found["['few']"]["why"] and "60" in found["['few']"]["why"]
    assert found["['small']"]["kept"] == "dense" and "18" in found["['small']"]["why"]
    assert found["['n']"]["kept"] == "dense" and "mul" in found["['n']"]["why"]
    assert "test_per_example.py" in found["['n']"]["why"]
    text = str(pe.explain(g))
    assert "÷ dense" in text and "numbers for one example, where its gradient has" in text
    assert repr(g["W"]) == "FactoredGradient(['W']: float64[20, 30], Product)"


def test_both_ways_to_a_norm_are_taken():
    """Few positions: their inner products. Many: the gradient formed."""
    loss = lambda w, x: jnp.sum(jnp.sin(x @ w.T))
    w = R(0, 40, 50)
    for positions, by_gram in [(4, True), (30, False)]:
        x = R(1, 3, positions, 50)
        _, g = jax.eval_shape(functools.partial(gradients, loss), w, x)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), g.terms[0])
        assert one.norm_by_gram is by_gram

        def both(w, x):
            d = jax.vmap(jax.grad(loss), (None, 0))(w, x)
            return pe.norms(gradients(loss, w, x)[1]), jnp.linalg.norm(flattened(d), axis=1)

        close(*compiled(both, w, x))


@exhaustive
def test_the_methods_of_a_leaf_are_the_functions_of_a_tree():
    w, x = R(0, 3, 4), R(1, 5, 4)
    _, g = pe.grads(lambda w, x: jnp.sum(jnp.sin(w @ x)))(w, x)
    for name in ("sum", "mean", "norms", "gram", "second_moment", "variance", "materialize"):
        np.testing.assert_array_equal(getattr(g, name)(), getattr(pe, name)(g))
    np.testing.assert_array_equal(
        (2 * g + g).materialize(), pe.add(pe.scale(g, 2), g).materialize()
    )
    close((2 * g + g).norms(), 3 * g.norms())
    np.testing.assert_array_equal(g.dot(w), pe.dot(g, w))
    c = jnp.arange(5.0)
    np.testing.assert_array_equal(g.weighted_sum(c), pe.weighted_sum(g, c))
    by = pe.norms({"a": g, "b": [g, g]}, by=lambda path: "all")
    close(by["all"], g.norms() * 3**0.5)
    close(g.gram(), flattened(g.materialize()) @ flattened(g.materialize()).T)
    close(g.mean(), g.materialize().mean(0))


# --------------------------------------------------------------------------------- transforms


def mlp(out=3):
    def loss(p, e):
        x, y = e
        return jnp.sum((p["V"] @ jnp.tanh(p["W"] @ x + p["b"]) - y) ** 2)

    return loss, {"W": R(0, 7, 5), "b": R(1, 7), "V": R(2, out, 7)}


@exhaustive
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_the_tree_passes_through_transforms():
    loss, p = mlp()
    batch = R(3, 8, 5), R(4, 8, 3)
    _, d = jax.jit(functools.partial(theirs, loss))(p, batch)
    norms = np.linalg.norm(flattened(d), axis=1)

    # Out of one compiled function, into another, its memory given away.
    _, g = jax.jit(pe.grads(loss))(p, batch)
    close(jax.jit(pe.norms)(g), norms)
    summed = jax.jit(pe.sum, donate_argnums=0)
    close(summed(g), jax.tree.map(lambda x: x.sum(0), d))

    # Several networks at once.
    many = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), p)
    found = jax.jit(jax.vmap(lambda p: pe.norms(pe.grads(loss)(p, batch)[1])))(many)
    close(found[0], norms)
    _, twice = jax.jit(jax.vmap(lambda p: pe.grads(loss)(p, batch)))(many)
    close(jax.jit(jax.vmap(pe.norms))(twice), found)

    # A loop over parts of the batch: the trees stacked.
    parts = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), batch)
    _, stacked = lax.scan(lambda s, part: (s, pe.grads(loss)(p, part)[1]), None, parts)
    whole = jax.tree.map(lambda x: x.reshape(8, *x.shape[2:]), stacked)
    close(jax.jit(pe.norms)(whole), norms)
    # As a loop's carry, and as a conditional's result.
    _, g = jax.jit(pe.grads(loss))(p, batch)
    turned = lambda i, g: jax.tree.map(lambda x: x[::-1], g)
    close(jax.jit(lambda g: pe.norms(lax.fori_loop(0, 3, turned, g)))(g), norms[::-1])
    close(jax.jit(lambda b, g: pe.norms(lax.cond(b, turned, turned, 0, g)))(True, g), norms[::-1])


@exhaustive
@pytest.mark.parametrize("check_vma", sweep([True, False], quick=[True]))
def test_sharded_over_devices(check_vma):
    mesh = jax.make_mesh((4,), ("batch",), (jax.sharding.AxisType.Auto,))
    E = {"E": R(6, 9, 5)}
    mlp_loss, p = mlp()
    loss = lambda p, e: mlp_loss(p, (e[0] + p["E"][e[2]], e[1]))
    p |= E
    batch = R(3, 8, 5), R(4, 8, 3), ints(5, 8, below=9)
    losses, d = jax.jit(functools.partial(theirs, loss))(p, batch)
    norms = np.linalg.norm(flattened(d), axis=1)
    split = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)

    grads = split(pe.grads(loss), in_specs=(P(), P("batch")), out_specs=P("batch"))
    found, g = jax.jit(grads)(p, batch)
    close(found, losses)
    close(jax.jit(pe.materialize)(g), d)
    close(jax.jit(pe.norms)(g), norms)
    assert g["W"].terms[0].a.sharding.spec[0] == "batch"

    def clipped(p, batch):
        found = pe.clipped_grad(loss, 1.0)(p, batch)
        return found.norms, lax.psum(found.gradient, "batch")

    clip = split(clipped, in_specs=(P(), P("batch")), out_specs=(P("batch"), P()))
    found, total = jax.jit(clip)(p, batch)
    close(found, norms)
    c = jnp.minimum(1, 1 / norms)
    close(total, jax.tree.map(lambda x: jnp.tensordot(c, x, 1), d))


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_sharded_by_the_compiler(kind):
    mesh = jax.make_mesh((4,), ("batch",), (kind,))
    loss, p = mlp()
    batch = R(3, 8, 5), R(4, 8, 3)
    _, d = theirs(loss, p, batch)
    place = jax.NamedSharding(mesh, P("batch"))
    found = jax.jit(lambda p, b: pe.norms(pe.grads(loss)(p, b)[1]))(p, jax.device_put(batch, place))
    close(found, jnp.linalg.norm(flattened(d), axis=1))


# ------------------------------------------------------------------------------------- errors


def test_batch_statistics_are_refused():
    w, x = R(0, 3), R(1, 4, 3)
    for collective in (lax.pmean, lax.psum, lax.pmax):

        def loss(w, x, collective=collective):
            y = x * w
            return jnp.sum((y - collective(y, "batch")) ** 2)

        with pytest.raises(ValueError, match="depends on other examples"):
            pe.grads(loss)(w, x)
        # Where somebody has bound the name, too.
        with pytest.raises(ValueError, match="depends on other examples"):
            jax.vmap(lambda x: pe.grads(loss)(w, x), axis_name="batch")(x[:, None])

    def inside(w, x):
        step = lambda h, _: (jax.checkpoint(lambda h: h - lax.pmean(h, "batch"))(h * w), None)
        return jnp.sum(lax.scan(step, x, None, length=2)[0])

    with pytest.raises(ValueError, match="depends on other examples"):
        jax.vmap(lambda x: pe.grads(inside)(w, x), axis_name="batch")(x[:, None])


@pytest.mark.parametrize("collective", [lax.psum, lax.pmean])
def test_statistics_within_an_example_are_its_own(collective):
    """A `vmap` in the loss names an axis of one example, and no other example's."""
    w, x = R(0, 3), R(1, 4, 5, 3)

    def loss(w, x):
        centred = lambda v: w @ v - collective(w @ v, "positions")
        return jnp.sum(jnp.sin(jax.vmap(centred, axis_name="positions")(x)))

    found = jax.jit(lambda w, x: pe.materialize(pe.grads(loss)(w, x)[1]))(w, x)
    close(found, jax.vmap(jax.grad(loss), (None, 0))(w, x))


def _carried(w, x):
    """What is carried starts as a constant; after a step it is the example's."""
    step = lambda c, x: (c + jnp.sum(w * x), lax.psum(c, "batch"))
    return jnp.sum(lax.scan(step, jnp.zeros(()), x)[1])


def _in_a_condition(w, x):
    w_fixed, x_fixed = jax.tree.map(lax.stop_gradient, (w, x))
    goes_on = lambda c: c < lax.psum(jnp.sum(x_fixed), "batch")
    count = lax.while_loop(goes_on, lambda c: c + 1 + w_fixed[0] ** 2, jnp.zeros(()))
    return jnp.sum(w * x) * count


def _in_a_body(w, x):
    limit = jnp.sum(lax.stop_gradient(x))
    body = lambda c: (c[0] + 1, lax.pmax(c[0], "batch"))
    _, last = lax.while_loop(lambda c: c[0] < limit, body, (jnp.zeros(()), jnp.zeros(())))
    return jnp.sum(w * x) * last


@pytest.mark.parametrize("loss", [_carried, _in_a_condition, _in_a_body])
def test_batch_statistics_in_loops_are_refused(loss):
    w, x = R(0, 3), R(1, 4, 2, 3)
    with pytest.raises(ValueError, match="depends on other examples"):
        jax.vmap(lambda x: pe.grads(loss)(w, x), axis_name="batch")(x[:, None])


def _of_the_first(x):
    return lax.pbroadcast(x, ("batch",), 0)


def _exchanged(x):
    offsets, sizes = jnp.arange(4, dtype=jnp.int32), jnp.ones(4, jnp.int32)
    out = lax.ragged_all_to_all(
        jnp.broadcast_to(x.sum(), (4,)), jnp.zeros(4), offsets, sizes, offsets, sizes,
        axis_name="batch",
    )  # fmt: skip
    return out[:3]


@pytest.mark.parametrize("collective", [_of_the_first, _exchanged])
def test_all_kinds_of_collectives_are_refused(collective):
    """Where there are four devices, each with an example of its own."""
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    loss = lambda w, x: jnp.sum(w * x * collective(x))
    one = lambda w, x: pe.grads(loss)(w, x)[1].norms()
    norms = jax.shard_map(
        one, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P("batch"), check_vma=False
    )
    with pytest.raises(ValueError, match="depends on other examples"):
        jax.eval_shape(norms, R(0, 3), R(1, 4, 3))


def test_a_collective_of_constants_is_fine():
    loss = lambda w, x: jnp.sum(w * x) / lax.psum(1, "batch") * lax.axis_size("batch")
    found = jax.vmap(lambda x: pe.grads(loss)(R(0, 3), x)[1].norms(), axis_name="batch")
    close(found(R(1, 4, 2, 3)), jnp.linalg.norm(R(1, 4, 2, 3), axis=-1))


def test_batch_norm_of_other_libraries_is_refused():
    import equinox as eqx
    import flax.linen as nn
    from flax import nnx

    x = R(1, 4, 3)
    linen = nn.BatchNorm(use_running_average=False, axis_name="batch", param_dtype="float64")
    variables = linen.init(jax.random.key(0), x)

    def linen_loss(p, x):
        out, _ = linen.apply(variables | {"params": p}, x[None], mutable=["batch_stats"])
        return jnp.sum(out**2)

    with pytest.raises(ValueError, match="depends on other examples"):
        pe.grads(linen_loss)(variables["params"], x)

    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, axis_name="batch", mode="batch")
    p, static = eqx.partition(norm, eqx.is_inexact_array)
    equinox_loss = lambda p, x: jnp.sum(eqx.combine(p, static)(x, state)[0] ** 2)
    with pytest.raises(ValueError, match="depends on other examples"):
        pe.grads(equinox_loss)(p, x)

    net = nnx.BatchNorm(3, axis_name="batch", rngs=nnx.Rngs(0))
    graph, p, rest = nnx.split(net, nnx.Param, ...)
    nnx_loss = lambda p, x: jnp.sum(nnx.merge(graph, p, rest, copy=True)(x[None]) ** 2)
    with pytest.raises(ValueError, match="depends on other examples"):
        pe.grads(nnx_loss)(p, x)


def test_errors_say_what_to_do():
    w, x = R(0, 3), R(1, 4, 3)
    loss = lambda w, x: jnp.sum(w * x)
    grads = pe.grads(loss)
    with pytest.raises(ValueError, match="batch is empty"):
        grads(w, x[:0])
    with pytest.raises(ValueError, match=r"batch\[0\] has 4, batch\[1\] has 3"):
        grads(w, (x, x[:3]))
    with pytest.raises(ValueError, match="scalar, but .* the examples along its first axis"):
        grads(w, (x, jnp.ones(())))
    with pytest.raises(ValueError, match="holds no arrays"):
        grads(w, ())
    with pytest.raises(TypeError, match=r"\['i'\] has dtype int"):
        grads({"i": jnp.arange(3)}, x)
    with pytest.raises(TypeError, match=r"\['name'\] is no array but str"):
        grads({"name": "linear"}, x)
    with pytest.raises(TypeError, match="must be a real scalar, but has shape \\(3,\\)"):
        pe.grads(lambda w, x: w * x)(w, x)
    with pytest.raises(TypeError, match="dtype complex128"):
        pe.grads(lambda w, x: jnp.sum(w * x) * 1j)(w, x)
    with pytest.raises(TypeError, match="returned tuple.*has_aux"):
        pe.grads(lambda w, x: (jnp.sum(w * x), x))(w, x)
    with pytest.raises(TypeError, match="must return a pair"):
        pe.grads(loss, has_aux=True)(w, x)
    with pytest.raises(ValueError, match="one for each of the 4 examples"):
        pe.grads(lambda w, x, key: jnp.sum(w * x))(w, x, jax.random.split(jax.random.key(0), 3))

    _, g = grads(w, x)
    with pytest.raises(ValueError, match="weights has shape \\(3,\\), but there are 4"):
        pe.weighted_sum(g, jnp.ones(3))
    with pytest.raises(ValueError, match="has shape \\(3,\\), but the tensor.*\\(2,\\)"):
        pe.dot(g, w[:2])
    with pytest.raises(ValueError, match="structure must be the parameters'"):
        pe.dot(g, {"w": w})
    with pytest.raises(ValueError, match="gradients of the same parameters"):
        pe.gram({"a": g}, {"b": g})
    with pytest.raises(ValueError, match="same parameters"):
        pe.gram(g, pe.grads(loss)(w[:2], x[:, :2])[1])
    for bad, error, match in [
        (lambda: pe.grads(3), TypeError, "loss must be a function"),
        (lambda: pe.grads(loss, has_aux="yes"), TypeError, "has_aux must be True or False"),
        (lambda: grads(None, x), ValueError, "params must be a tree with at least one array"),
        (lambda: grads(w, None), ValueError, "holds no arrays"),
        (lambda: grads(w, x.tolist()), TypeError, r"batch\[0\]\[0\] is .* not an array"),
        (lambda: grads(w, x, 0), TypeError, "key must be a key"),
        (lambda: grads(w, x, "key"), TypeError, "key must be a key"),
        (lambda: grads(w, x, jnp.ones(2)), TypeError, "key must be a key"),
        (lambda: pe.weighted_sum(g, None), TypeError, "weights must be an array"),
        (lambda: pe.weighted_sum(g, [1.0] * 4), TypeError, "weights must be an array"),
        (lambda: pe.weighted_sum(g, 1j * jnp.ones(4)), TypeError, "weights must be a real number"),
        (lambda: pe.gram(g, x), TypeError, "tree of factored gradients"),
        (lambda: g.gram(x), TypeError, "gram: a factored gradient is needed, but got an array"),
        (lambda: g.add(x), TypeError, "add: a factored gradient is needed, but got an array"),
        (lambda: pe.dot(None, w), ValueError, "without parameters"),
        (lambda: pe.dot(g, "w"), TypeError, "dot: tensor must be an array, but got 'w'"),
    ]:
        with pytest.raises(error, match=match):
            bad()
    _, two = pe.grads(lambda p, x: jnp.sum(p["a"] * p["b"] * x))({"a": w, "b": w}, x)
    for by, error, match in [
        ({"x": ["['a']"]}, ValueError, r"parameter \['b'\] is in none of the groups \['x'\]"),
        ({"x": ["['a']", "['c"], "y": ["['b']"]}, ValueError, r"begins with \"\['c\", of the"),
        ({"x": ["['a']"], "y": ["["]}, ValueError, r"\['a'\] is in two groups: 'x' and 'y'"),
        ({"x": "['a']"}, TypeError, "lists of beginnings of paths, but for 'x'"),
        (lambda path: 3, TypeError, r"return a group's name, a str, but returned 3 for \['a'\]"),
        ("group", ValueError, 'must be None, "leaf"'),
        (3, TypeError, 'must be None, "leaf"'),
    ]:
        with pytest.raises(error, match=match):
            pe.norms(two, by=by)
    for factor, error, match in [
        (jnp.ones(3), ValueError, r"shape \(\) or \(4,\), one for each"),
        (1j, TypeError, "must be a real number"),
        ([1.0], TypeError, "must be an array"),
        (True, TypeError, "must be a real number"),
    ]:
        with pytest.raises(error, match=match):
            pe.scale(g, factor)
    with pytest.raises(ValueError, match="add: both trees must be gradients of the same"):
        pe.add({"a": g}, {"b": g})
    with pytest.raises(ValueError, match="of as many examples"):
        pe.add(g, grads(w, x[:2])[1])
    with pytest.raises(ValueError, match="at least 2 examples"):
        pe.noise_scale(grads(w, x[:1])[1])
    with pytest.raises(TypeError, match="tree of factored gradients"):
        pe.norms({"a": w})

    clip = functools.partial(pe.clipped_grad, loss)
    for bad, match in [
        (lambda: clip(0.0), "clip_norm must be a positive number"),
        (lambda: clip({"a": 1.0}), "no groups are given"),
        (lambda: clip(1.0, sweeps=3), "sweeps must be an integer .*at most 2"),
        (lambda: clip(1.0, microbatch_size=0), "microbatch_size must be an integer of at least 1"),
        (lambda: clip(1.0, noise_multiplier=1.0)(w, x), "pass noise_key"),
        (lambda: clip(1.0)(w, x, mask=jnp.ones(3)), "mask must have shape \\(4,\\)"),
        (lambda: clip({"a": 1.0}, groups=lambda path: "b")(w, x), "no entry for the groups"),
        (lambda: clip({"a": 1, "b": 1}, groups=lambda p: "b")(w, x), r"entries for \['a'\]"),
        (lambda: clip(float("nan")), "clip_norm must be a positive number, but got nan"),
        (lambda: clip(-1), "clip_norm must be a positive number"),
        (lambda: clip({"a": 0.0}, groups=lambda path: "a"), r"clip_norm\['a'\] must be a positive"),
        (lambda: clip(1.0, noise_multiplier=-1), "noise_multiplier must be a finite number"),
        (lambda: clip(1.0, noise_multiplier=float("nan")), "noise_multiplier must be a finite"),
        (lambda: clip(1.0, noise_multiplier=float("inf")), "noise_multiplier must be a finite"),
        (lambda: clip(float("inf"), noise_multiplier=1.0), "must be finite then"),
        (lambda: clip(1.0)(w, x, mask=jnp.array([0, 1, 2, 1])), "holds 2"),
        (lambda: clip(1.0)(w, x, mask=np.array([1, np.nan, 1, 1])), "holds nan"),
    ]:
        with pytest.raises(ValueError, match=match):
            bad()
    noisy = clip(1.0, noise_multiplier=1.0)
    for bad, match in [
        (lambda: clip("1"), "clip_norm must be a"),
        (lambda: clip(None), "clip_norm must be a"),
        (lambda: clip(True), "clip_norm must be a"),
        (lambda: clip([1.0]), "clip_norm must be a"),
        (lambda: clip({"a": "1"}, groups=lambda path: "a"), r"clip_norm\['a'\] must be a"),
        (lambda: clip(1.0, noise_multiplier="1"), "noise_multiplier must be a finite number"),
        (lambda: clip(1.0, sweeps=True), "sweeps must be an integer"),
        (lambda: clip(1.0, microbatch_size=2.5), "microbatch_size must be an integer"),
        (lambda: clip(1.0, microbatch_size=True), "microbatch_size must be an integer"),
        (lambda: clip(1.0, nan_safe=1), "nan_safe must be True or False"),
        (lambda: clip(1.0, has_aux="yes"), "has_aux must be True or False"),
        (lambda: clip(1.0)(w, x, mask="1111"), "mask must be an array"),
        (lambda: clip(1.0)(w, x, mask=jnp.ones(4) + 0j), "mask must hold True and False"),
        (lambda: noisy(w, x, noise_key=0), "noise_key must be a key"),
        (lambda: pe.clipped_grad(3, 1.0), "loss must be a function"),
    ]:
        with pytest.raises(TypeError, match=match):
            bad()


# ----------------------------------------------------------------------------------- efficiency


@exhaustive
def test_nothing_is_compiled_at_a_second_call():
    """Outside jit, with the functions and the loss made anew for each call."""
    w, batch = R(0, 6, 5), (R(1, 4, 3, 5), R(2, 4, 3, 6))

    def call():
        loss = lambda w, e: jnp.sum(jnp.tanh(e[0] @ w.T) * e[1])
        _, g = pe.grads(loss)(w, batch)
        pe.norms(g), pe.gram(g), pe.variance(g), pe.noise(g)
        return pe.clipped_grad(loss, 1.0, microbatch_size=2)(w, batch)

    call()
    with compiled_programs() as programs:
        call()
        assert not programs
        jax.jit(lambda x: x * 3.14159)(w)
        assert programs  # it counts


def test_norms_take_less_work_and_hardly_more_memory_than_a_gradient():
    """784-512-512-10 at batch 256, from the compiled programs."""
    sizes, dtype = (784, 512, 512, 10), jnp.float32
    shapes = {f"W{i}": (o, n) for i, (n, o) in enumerate(itertools.pairwise(sizes))}
    p = {name: jax.ShapeDtypeStruct(s, dtype) for name, s in shapes.items()}

    def loss(p, e):
        h, y = e
        for i in range(3):
            h = p[f"W{i}"] @ (h if i == 0 else jax.nn.relu(h))
        return -jax.nn.log_softmax(h)[y]

    batch = jax.ShapeDtypeStruct((256, 784), dtype), jax.ShapeDtypeStruct((256,), jnp.int32)
    mean = lambda p, b: jnp.mean(jax.vmap(loss, (None, 0))(p, b))
    program = lambda f: jax.jit(f).lower(p, batch).compile()
    one = program(jax.grad(mean))
    norms = program(lambda p, b: pe.norms(pe.grads(loss)(p, b)[1]))
    clipped = program(lambda p, b: pe.clipped_grad(loss, 1.0)(p, b).gradient)
    flops = lambda f: f.cost_analysis()["flops"]
    assert flops(norms) < 0.75 * flops(one)
    assert flops(clipped) < 1.05 * flops(one)
    temporary = lambda f: f.memory_analysis().temp_size_in_bytes
    whole = lambda f: temporary(f) + f.memory_analysis().output_size_in_bytes
    # Beside the values and their gradients, copies of the activations: see `norm_of`.
    assert temporary(norms) <= 2.5 * temporary(one) + 1024
    assert whole(norms) <= 0.75 * whole(one)
    assert whole(clipped) <= 1.5 * whole(one)

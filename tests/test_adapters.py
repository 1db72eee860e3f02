"""Low-rank adapters: what they compute, and that no gradient of a weight's size is formed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive, sweep

import fnn
import fnn.per_example as pe
from fnn.layers import (
    GRU,
    LRU,
    LSTM,
    Conv,
    ConvTranspose,
    LayerNorm,
    Linear,
    Maxout,
    WeightNorm,
    adapted,
    chain,
    lora,
    merge,
    network,
    repeat,
    residual,
)

KEY = jax.random.key(0)
BLOCK = residual(norm=LayerNorm(), hidden=Linear(12), act=jnp.tanh, out=Linear(6))


@network(embed=Linear(6), blocks=repeat(BLOCK, 2), head=Linear(3))
def net(net, x):
    return net.head(net.blocks(net.embed(x)))


def R(i, *shape):
    return jnp.asarray(np.random.default_rng([i, *shape]).normal(size=shape))


X = R(0, 4)
PARAMS = net.init(KEY, X)
ADAPTERS = lora(PARAMS, ["blocks.*.W", "head.W"], 2, KEY)
TRAINED = jax.tree.map(lambda a: R(1, *a.shape), ADAPTERS)


def test_what_is_chosen():
    shapes = jax.tree.map(jnp.shape, ADAPTERS)
    assert shapes == {
        "blocks": {
            "hidden": {"W": {"A": (2, 2, 6), "B": (2, 12, 2)}},
            "out": {"W": {"A": (2, 2, 12), "B": (2, 6, 2)}},
        },
        "head": {"W": {"A": (2, 6), "B": (3, 2)}},
    }
    by_function = lora(PARAMS, lambda path, W: path[-1] == "W" and W.ndim == 2, 1, KEY)
    assert sorted(fnn.params.flatten(by_function)) == [
        *("embed.W.A", "embed.W.B", "head.W.A", "head.W.B")
    ]
    A = lora({"W": jnp.zeros((2, 400))}, "W", 100, KEY)["W"]["A"]
    assert np.asarray(A).std() == pytest.approx(1 / 20, rel=0.05)


def test_adapted_and_merged():
    """At first nothing changes; then W x + B (A x) is what W + B A gives."""
    np.testing.assert_array_equal(net(adapted(PARAMS, ADAPTERS), X), net(PARAMS, X))
    whole = merge(PARAMS, TRAINED, scale=0.5)
    W, own = PARAMS["head"]["W"], TRAINED["head"]["W"]
    np.testing.assert_allclose(whole["head"]["W"], W + 0.5 * own["B"] @ own["A"], rtol=1e-12)
    chex.assert_trees_all_equal(whole["embed"], PARAMS["embed"])
    for x in (X, R(2, 5, 4), np.asarray(R(2, 5, 4))):
        found = jax.jit(net)(adapted(PARAMS, TRAINED, scale=0.5), x)
        np.testing.assert_allclose(found, jax.jit(net)(whole, x), rtol=1e-9)
    half = {"W": jnp.ones((3, 4), jnp.bfloat16)}
    assert merge(half, lora(half, "W", 2, KEY))["W"].dtype == jnp.bfloat16


@exhaustive
def test_a_kernel_is_a_matrix_of_all_its_window():
    parts = {
        "image": Conv(5, 3),
        "up": ConvTranspose(4, 2),
        "blocks": repeat(Conv(4, 3, groups=2), 2),
        "flat": lambda x: jnp.mean(x, (0, 1)),
        "twice": repeat(repeat(Linear(4), 2), 3),
    }
    net, x = chain(**parts), R(0, 4, 4, 3)
    params = net.init(KEY, x)
    own = jax.tree.map(lambda a: R(1, *a.shape), lora(params, "*.W", 2, KEY, net=net))
    assert {path: pair.shape for path, pair in fnn.params.flatten(own).items()} == {
        "image.W.A": (2, 27),
        "image.W.B": (5, 2),
        "up.W.A": (2, 16),
        "up.W.B": (5, 2),
        "blocks.W.A": (2, 2, 18),
        "blocks.W.B": (2, 4, 2),
        "twice.W.A": (3, 2, 2, 4),
        "twice.W.B": (3, 2, 4, 2),
    }
    whole = merge(params, own)
    change = (whole["image"]["W"] - params["image"]["W"]).reshape(5, 27)
    np.testing.assert_allclose(change, own["image"]["W"]["B"] @ own["image"]["W"]["A"], rtol=1e-9)
    np.testing.assert_allclose(net(adapted(params, own), x), net(whole, x), rtol=1e-9)

    for where in ("image.W", "twice.W"):
        with pytest.raises(ValueError, match=rf"lora: where chooses {where} of shape .* pass net="):
            lora(params, where, 2, KEY)
    sequences = Conv(4, (3,)).init(KEY, R(0, 5, 2))
    with pytest.raises(ValueError, match=r"chooses W of shape \(4, 2, 3\), which may be a conv"):
        lora(sequences, "W", 2, KEY)
    with pytest.raises(TypeError, match="lora: net must be a layer"):
        lora(params, "*.W", 2, KEY, net="net")


def test_all_ways_to_multiply():
    params = {"W": R(0, 6, 4)}
    own = jax.tree.map(lambda a: R(1, *a.shape), lora(params, "W", 2, KEY))
    W, M = adapted(params, own, scale=3.0)["W"], merge(params, own, scale=3.0)["W"]
    x, y = R(2, 4), R(3, 5, 6)
    for found, wanted in [
        (W @ x, M @ x),
        (y @ W, y @ M),
        (x @ W.T, x @ M.T),
        (W.T @ y.T, M.T @ y.T),
    ]:
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
    assert W.T.shape == (4, 6) and W.T.T.shape == (6, 4)
    with pytest.raises(TypeError):
        jnp.sum(W)


def loss(adapters, x):
    return jnp.sum(jnp.sin(net(adapted(PARAMS, adapters), x)))


@pytest.mark.parametrize("gradient", sweep([jax.grad, fnn.grad], [fnn.grad]))
def test_gradients(gradient):
    merged = lambda a: jnp.sum(jnp.sin(net(merge(PARAMS, a), X)))
    found = jax.jit(lambda a: gradient(loss)(a, X))(TRAINED)
    chex.assert_trees_all_close(found, jax.grad(merged)(TRAINED), rtol=1e-9)


@pytest.mark.parametrize("gradient", [jax.grad, fnn.grad])
def test_no_gradient_of_a_weight_is_formed(gradient):
    wide = chain(Linear(50), jnp.tanh, Linear(70))
    x = R(0, 60)
    params = wide.init(KEY, x)
    own = lora(params, "*.W", 2, KEY)
    of = lambda adapters, x: jnp.sum(wide(adapted(params, adapters), x) ** 2)
    text = jax.jit(lambda a, x: gradient(of)(a, x)).lower(own, x).as_text()
    made = [line.split("->")[-1] for line in text.splitlines() if "dot_general" in line]
    assert made and not any("50x60" in t or "70x50" in t or "60x50" in t for t in made)
    cost = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    whole = cost(lambda p, x: jax.grad(lambda p: jnp.sum(wide(p, x) ** 2))(p), params, x)
    assert cost(lambda a, x: gradient(of)(a, x), own, x) < whole


@exhaustive
def test_per_example_gradients_stay_factored():
    xs = R(4, 3, 4)
    _, g = pe.grads(loss)(TRAINED, xs)
    wanted = jax.vmap(jax.grad(loss), (None, 0))(TRAINED, xs)
    chex.assert_trees_all_close(pe.materialize(g), wanted, rtol=1e-9, atol=1e-12)
    kept = {row["path"]: row["kept"] for row in pe.explain(g)}
    assert kept["['head']['W']['A']"] == "A (1 × 6), G (1 × 2)"
    assert kept["['head']['W']['B']"] == "A (1 × 2), G (1 × 3)"
    assert kept["['blocks']['out']['W']['A']"] == "2 × A (1 × 12), G (1 × 2)"


@exhaustive
def test_fit_trains_the_adapters_alone():
    data = R(5, 16, 4), R(6, 16, 3)
    tuned = lambda adapters, x: net(adapted(PARAMS, adapters), x)
    result = fnn.fit(
        fnn.supervised(tuned, fnn.ops.squared_error),
        ADAPTERS,
        data,
        optax.adam(0.05),
        epochs=20,
        batch_size=16,
        key=KEY,
        progress=False,
    )
    assert result.history["loss"][-1] < 0.8 * result.history["loss"][0]
    assert jax.tree.structure(result.params) == jax.tree.structure(ADAPTERS)
    x = data[0][0]
    np.testing.assert_allclose(
        net(merge(PARAMS, result.params), x), tuned(result.params, x), rtol=1e-5
    )


@exhaustive
def test_recurrent_layers():
    """The product with the inputs is adapted; the loop's own weight has to be merged."""
    for layer in (LSTM(3), GRU(3)):
        x = R(0, 5, 4)
        params = layer.init(KEY, x)
        own = jax.tree.map(lambda a: R(1, *a.shape), lora(params, "W", 2, KEY))
        np.testing.assert_allclose(
            layer(adapted(params, own), x), layer(merge(params, own), x), rtol=1e-9
        )


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="chooses none of the parameters.*embed.W.*head.b"):
        lora(PARAMS, "*.V", 2, KEY)
    with pytest.raises(ValueError, match=r"chooses embed.b, wanted a real weight .* shape \(6,\)"):
        lora(PARAMS, "embed.*", 2, KEY)
    with pytest.raises(TypeError, match="where must be a pattern of paths"):
        lora(PARAMS, 3, 2, KEY)
    with pytest.raises(ValueError, match="rank must be an integer of at least 1"):
        lora(PARAMS, "*.W", 0, KEY)
    own = ADAPTERS["head"]["W"]
    for apply in (adapted, merge):
        with pytest.raises(ValueError, match=r"for 'top.W', wanted A and B, for one of blocks"):
            apply(PARAMS, {"top": {"W": own}})
        with pytest.raises(ValueError, match=r"head.W, of shape \(3, 6\), has A of shape \(6, 2\)"):
            apply(PARAMS, {"head": {"W": {"A": own["A"].T, "B": own["B"]}}})
        with pytest.raises(ValueError, match=r"has A of shape \(1, 1, 2, 6\) and B of shape"):
            apply(PARAMS, {"head": {"W": {"A": own["A"][None, None], "B": own["B"]}}})


@pytest.mark.parametrize("scale", [2.0, np.float32(2), np.float64(2)])
def test_a_scale_of_numpy_s_changes_no_dtype(scale):
    params = {"W": jnp.ones((4, 3), jnp.bfloat16)}
    made = lora(params, "W", 2, jax.random.key(0))
    made = jax.tree.map(lambda a: a.astype(jnp.bfloat16), made)
    y = adapted(params, made, scale=scale)["W"] @ jnp.ones(3, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("layer", "where"),
    [(LSTM(3), "U"), (WeightNorm(Linear(3)), "v"), (LRU(3), "B"), (Maxout(3), "W")],
)
def test_where_an_adapted_weight_is_refused_the_error_says_to_merge(layer, where):
    x = R(1, 4, 2)
    params = layer.init(KEY, x)
    adapters = lora(params, where, 2, KEY)
    with pytest.raises(TypeError, match=r"an adapted weight of shape .* merge\(params, adapters\)"):
        layer(adapted(params, adapters), x)
    chex.assert_trees_all_close(layer(merge(params, adapters), x), layer(params, x))


@pytest.mark.parametrize(
    "use", [lambda W: W + 1, lambda W: 2 * W, lambda W: jnp.ones((4, 3)) * W, lambda W: W[0]]
)
def test_what_an_adapted_weight_cannot_do_says_to_merge(use):
    params = {"W": jnp.ones((4, 3))}
    with pytest.raises(TypeError, match="multiplies by @ alone: merge"):
        use(adapted(params, lora(params, "W", 2, KEY))["W"])

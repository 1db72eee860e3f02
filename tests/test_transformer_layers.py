"""The layers of transformers: attention with its cache, embeddings, positions, gated MLPs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive, sweep

import fnn
from fnn import layers, ops
from fnn.layers import (
    Attention,
    Embedding,
    GatedMLP,
    LayerError,
    LayerNorm,
    Linear,
    Once,
    PositionEmbedding,
    SinusoidalPositions,
    chain,
    network,
    repeat,
)

KEY = jax.random.key(0)
T, D = 6, 8


def sequence(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape or (T, D)), jnp.float32)


def by_hand(params, x, memory, mask, heads):
    """Head by head, query by query, in numpy."""
    params, x, memory = jax.tree.map(np.asarray, (params, x, memory))
    q, k, v = (
        y @ params[n]["W"].T + params[n]["b"]
        for n, y in zip("qkv", (x, memory, memory), strict=True)
    )
    split = lambda y, n: np.split(y, n, axis=1)
    ys = []
    for head, qs in enumerate(split(q, heads)):
        ks, vs = (split(y, y.shape[1] // qs.shape[1]) for y in (k, v))
        own = head * len(ks) // heads
        rows = []
        for t, query in enumerate(qs):
            e = np.exp(ks[own] @ query / np.sqrt(len(query))) * mask[t]
            rows.append(e @ vs[own] / e.sum())
        ys.append(np.stack(rows))
    return np.concatenate(ys, axis=1) @ params["out"]["W"].T + params["out"]["b"]


def random_params(layer, *xs):
    """With biases that aren't 0."""
    params = layer.init(KEY, *xs)
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [sequence(*x.shape, seed=i) for i, x in enumerate(leaves)])


@exhaustive
@pytest.mark.parametrize("kv_heads", sweep([None, 2, 1], [2]))
def test_attention_by_hand(kv_heads):
    layer, x, memory = Attention(4, kv_heads=kv_heads), sequence(), sequence(5, 3, seed=1)
    mask = np.random.default_rng(0).random((T, 5)) > 0.4
    mask[:, 0] = True
    params = random_params(layer, x, memory)
    y = layer(params, x, memory, jnp.asarray(mask))
    np.testing.assert_allclose(y, by_hand(params, x, memory, mask, 4), rtol=1e-4, atol=1e-5)
    causal = Attention(4, kv_heads=kv_heads, causal=True)
    params = random_params(causal, x)
    wanted = by_hand(params, x, x, np.tri(T), 4)
    np.testing.assert_allclose(causal(params, x), wanted, rtol=1e-4, atol=1e-5)


CACHED = {
    "causal": {},
    "window": {"window": 3},
    "rotary": {"rotary": 10000.0, "use_bias": False},
    "grouped-query": {"kv_heads": 2, "rotary": 100.0, "window": 4},
    "alibi": {"kv_heads": 1, "alibi": True},
}


@exhaustive
@pytest.mark.parametrize("name", sweep(CACHED, ["grouped-query"]))
def test_step_by_step_as_at_once(name):
    """Blocks stacked by repeat, mapped over examples that are at different positions."""
    block = Attention(4, causal=True, **CACHED[name])
    net = repeat(block, 2)
    x = sequence(2, T, D).astype(jnp.result_type(float))
    params = net.init(KEY, x[0])
    wanted = jax.jit(jax.vmap(net, (None, 0)))(params, x)

    @jax.jit
    def generated(params, x):
        cache = net.init_cache(T, x[0, :1])
        # The first example begins with one position, the other with three.
        caches = [net.extend(params, cache, x[i, :n]) for i, n in ((0, 1), (1, 3))]
        firsts, cache = (
            [y for y, _ in caches],
            jax.tree.map(lambda *c: jnp.stack(c), *[c for _, c in caches]),
        )

        def step(cache, t):
            own = jnp.stack([x[0, 1 + t], x[1, jnp.minimum(3 + t, T - 1)]])[:, None]
            y, cache = jax.vmap(net.extend, (None, 0, 0))(params, cache, own)
            return cache, y[:, 0]

        return firsts, jax.lax.scan(step, cache, jnp.arange(T - 1))[1]

    firsts, steps = generated(params, x)
    close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-5)
    close(jnp.concatenate([firsts[0], steps[:, 0]]), wanted[0])
    close(jnp.concatenate([firsts[1], steps[: T - 3, 1]]), wanted[1])
    assert jnp.all(jnp.isnan(steps[T - 3 :, 1])), "beyond the cache"


def test_going_on_from_a_cache_that_has_room_makes_no_nan():
    layer, x = Attention(2, causal=True), sequence()
    params = layer.init(KEY, x)
    with jax.debug_nans(True):
        y, _ = layer.extend(params, layer.init_cache(T, x), x)
    np.testing.assert_allclose(y, layer(params, x), rtol=1e-5, atol=1e-6)


CROSSED = {
    "all": {},
    "rotary": {"rotary": 100.0, "kv_heads": 2},
    "window": {"window": 3, "use_bias": False},
    "causal": {"causal": True, "alibi": True},
}


@exhaustive
@pytest.mark.parametrize("name", CROSSED)
def test_cross_attention_step_by_step(name):
    """The memory is read in the first call, and never again."""
    layer, x, memory = Attention(4, **CROSSED[name]), sequence(), sequence(5, 3, seed=1)
    mask = jnp.asarray(np.random.default_rng(0).random((T, 5)) > 0.3)
    params = random_params(layer, x, memory)
    wanted = layer(params, x, memory, mask)
    gone = jnp.full_like(memory, jnp.nan)

    def pieces(params, x, memory):
        y, cache = layer.extend(params, layer.init_cache(T, x, memory), x[:2], memory, mask[:2])

        def step(cache, given):
            x, mask = given
            y, cache = layer.extend(params, cache, x[None], gone, mask[None])
            return cache, y[0]

        cache, ys = jax.lax.scan(step, cache, (x[2:], mask[2:]))
        return jnp.concatenate([y, ys]), cache

    y, cache = jax.jit(pieces)(params, x, memory)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    assert cache["cache"]["position"] == T and cache["cache"]["k"].shape[0] == 5
    batch = jax.vmap(pieces, (None, 0, 0))(params, x[None], memory[None])[0]
    np.testing.assert_allclose(batch[0], wanted, rtol=1e-4, atol=1e-5)


@exhaustive
def test_cross_attention_s_cache_outside_of_jit():
    layer, x, memory = Attention(2), sequence(), sequence(5, 3, seed=1)
    params, cache = layer.init(KEY, x, memory), layer.init_cache(T, x, memory)
    first, cache = layer.extend(params, cache, x[:1], memory)
    rest, _ = layer.extend(params, cache, x[1:], jnp.full_like(memory, jnp.nan))
    wanted = layer(params, x, memory)
    np.testing.assert_allclose(jnp.concatenate([first, rest]), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(LayerError, match="was given a cache and no memory"):
        layer.extend(params, cache, x[:1])
    with pytest.raises(LayerError, match=r"for a memory of 5 positions, but got one of .*\(4, 3\)"):
        layer.extend(params, cache, x[:1], memory[:4])


def test_what_is_computed_once():
    """With the parameters of the layer; of a tree of outputs; under jit as outside."""
    calls = []

    def both(x):
        calls.append(x)
        return {"double": 2 * x, "first": x[0]}

    layer, x = Once(both), jnp.arange(3.0)
    chex.assert_trees_all_equal(layer({}, x), both(x))
    cache, before = layer.init_cache(9, x), len(calls)
    y, cache = layer.extend({}, cache, x)
    again, cache = layer.extend({}, cache, x + 1)
    compiled, _ = jax.jit(layer.extend)({}, cache, x + 2)
    fresh, _ = jax.jit(layer.extend)({}, layer.init_cache(9, x), x)
    for other in (again, compiled, fresh):
        chex.assert_trees_all_equal(y, other)
    assert y["double"].tolist() == [0, 2, 4] and len(calls) == before + 4
    net = network(encode=Once(chain(Linear(4), LayerNorm())), decode=Linear(2))(
        lambda net, x: net.decode(net.encode(x))
    )
    params, plain = net.init(KEY, x), Once(Linear(4)).init(KEY, x)
    assert params["encode"]["0"]["W"].shape == (4, 3)
    chex.assert_trees_all_equal(plain, Linear(4).init(KEY, x))
    rows = {row.path for row in layers.summary(net, x).rows}
    assert ("encode", "0") in rows, rows


def test_a_cache_that_is_full():
    layer, x = Attention(2, causal=True), sequence()
    params, cache = layer.init(KEY, x), layer.init_cache(4, x)
    with pytest.raises(LayerError, match="room for 4 positions, of which 0 are taken; 6 more"):
        layer.extend(params, cache, x)
    _, cache = layer.extend(params, cache, x[:3])
    with pytest.raises(LayerError, match="room for 4 positions, of which 3 are taken; 2 more"):
        layer.extend(params, cache, x[:2])
    assert Attention(2).init_cache(4, x) == {}
    with pytest.raises(LayerError, match="extend wants what init_cache"):
        layer.extend(params, {}, x)


def test_embedding():
    layer = Embedding(5, 3)
    tokens = jnp.asarray([[0, 4], [2, 2]])
    params = layer.init(KEY, tokens)
    np.testing.assert_array_equal(layer(params, tokens), np.asarray(params["E"])[tokens])
    gradient = jax.grad(lambda p: jnp.sum(layer(p, tokens) * 2))(params)["E"]
    np.testing.assert_array_equal(gradient[:, 0], [2, 0, 4, 0, 2])
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=f"index holds {wrong}, but E has 5 rows"):
            layer(params, jnp.asarray([0, wrong]))
        assert jnp.all(jnp.isnan(jax.jit(layer)(params, jnp.asarray(wrong))))
    with pytest.raises(TypeError, match="wanted integers"):
        layer(params, jnp.ones(2))


@exhaustive
@pytest.mark.parametrize("layer", [PositionEmbedding(T), SinusoidalPositions()], ids=["P", "sin"])
def test_positions(layer):
    x = sequence()
    params = layer.init(KEY, x)
    y = layer(params, x)
    if params:
        np.testing.assert_allclose(y, x + params["P"], rtol=1e-6)
    else:
        t, i = np.arange(T)[:, None], np.arange(D // 2)[None]
        angle = t / 10000 ** (2 * i / D)
        wanted = np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(T, D)
        np.testing.assert_allclose(y - x, wanted, atol=1e-5)
    cache = layer.init_cache(T, x)
    first, cache = layer.extend(params, cache, x[:4])
    rest, cache = layer.extend(params, cache, x[4:])
    np.testing.assert_allclose(jnp.concatenate([first, rest]), y, rtol=1e-6)
    if params:
        with pytest.raises(LayerError, match="has 6 positions, but got an input of shape"):
            layer(params, sequence(T + 1, D))


def test_positions_of_integers_are_not_rounded():
    x = sequence()
    layer, zeros = SinusoidalPositions(), jnp.zeros((T, D), jnp.int32)
    np.testing.assert_allclose(layer({}, zeros), layer({}, x) - x, atol=1e-6)


def test_rotary_depends_on_differences():
    q, k = sequence(2, 1, D), sequence(2, 1, D, seed=1)
    at = lambda x, t: ops.rotary(x, jnp.asarray([t, t + 3]))
    products = lambda t: jnp.sum(at(q, t)[0] * at(k, t)[1])
    np.testing.assert_allclose(products(0), products(50), rtol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(at(q, 9)), jnp.linalg.norm(q), rtol=1e-5)
    with pytest.raises(ValueError, match="even number of features"):
        ops.rotary(sequence(2, 3))


def test_alibi_slopes():
    np.testing.assert_allclose(ops.alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    # Between a power of two and the next, as in the paper's code.
    np.testing.assert_allclose(ops.alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def test_gated_mlp_by_hand():
    x = sequence()
    layer = GatedMLP(5)
    p = random_params(layer, x)
    gate, up = x @ p["gate"]["W"].T, x @ p["up"]["W"].T
    hidden = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(layer(p, x), hidden @ p["down"]["W"].T, rtol=1e-4, atol=1e-5)
    assert set(p["gate"]) == {"W"}


@network(
    norm=LayerNorm(), attend=Attention(2, causal=True, rotary=100.0), norm2=LayerNorm(),
    mlp=GatedMLP(6),
)  # fmt: skip
def a_block(net, x):
    x = x + net.attend(net.norm(x))
    return x + net.mlp(net.norm2(x))


@network(embed=Embedding(30, 8), at=PositionEmbedding(4), blocks=repeat(a_block, 2))
def a_model(net, tokens):
    return net.blocks(net.at(net.embed(tokens)))


@exhaustive
def test_per_example_gradients_stay_factored():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30, (3, 2)))
    params = a_model.init(KEY, tokens[0])
    loss = lambda params, tokens: jnp.sum(a_model(params, tokens) ** 3)
    _, found = jax.jit(fnn.per_example.grads(loss))(params, tokens)
    kept = {row["path"]: row["kept"] for row in fnn.per_example.explain(found)}
    for path, how in kept.items():
        factored = "A (" in how or "indices (" in how
        is_matrix_or_table = any(name in path for name in ("['W']", "['E']", "['P']"))
        assert factored == is_matrix_or_table, (path, how)
    wanted = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, tokens)
    chex.assert_trees_all_close(fnn.per_example.materialize(found), wanted, rtol=1e-3, atol=1e-5)


@exhaustive
def test_summary_and_errors():
    x = sequence()
    text = str(layers.summary(a_model, jnp.asarray([1, 2])))
    assert "Attention(2, causal=True, rotary=100.0)" in text and "GatedMLP(6)" in text
    for make, error, words in (
        (lambda: Attention(0), ValueError, "heads must be"),
        (lambda: Attention(4, kv_heads=3), ValueError, "kv_heads must divide heads, 4, but got 3"),
        (lambda: Attention(2, causal=1), TypeError, "causal must be"),
        (lambda: Attention(2, rotary=0), ValueError, "rotary must be"),
        (lambda: Attention(3).init(KEY, x), LayerError, "multiple of its 3 heads"),
        (
            lambda: Attention(2).init(KEY, x[0]),
            LayerError,
            r"shape \(positions, in\), but got \(8,\)",
        ),
        (
            lambda: Attention(2)(Attention(2).init(KEY, x), x[:, :6]),
            LayerError,
            r"^Attention\(2\) has a q.W of shape \(8, 8\), so it wants an input of shape "
            r"\(positions, 8\), but got",
        ),
        (
            lambda: Attention(2)(Attention(2).init(KEY, x, x), x, x[:, :6]),
            LayerError,
            r"has a k.W of shape \(8, 8\), so it wants a memory of shape \(positions, 8\), but got",
        ),
        (lambda: Attention(2)({"q": {}}, x), LayerError, r"keys \['k', 'out', 'q', 'v'\]"),
        (lambda: Embedding(5, 0), ValueError, "features must be"),
        (lambda: PositionEmbedding(4)({}, x[0]), LayerError, r"\(positions, features\)"),
        (lambda: PositionEmbedding(4)({}, x[None]), LayerError, r"\(positions, features\)"),
        (lambda: SinusoidalPositions()({}, x[None]), LayerError, r"\(positions, features\)"),
        (lambda: GatedMLP(3, 4), TypeError, "activation must be"),
        (lambda: GatedMLP(3)({}, x), LayerError, r"keys \['down', 'gate', 'up'\]"),
        (lambda: SinusoidalPositions(-1), ValueError, "base must be"),
    ):
        with pytest.raises(error, match=words):
            make()


@exhaustive
def test_attention_of_no_positions():
    layer = Attention(2, kv_heads=1, rotary=100.0)
    params = layer.init(jax.random.key(0), jnp.zeros((0, 4)))
    assert layer(params, jnp.zeros((0, 4))).shape == (0, 4)
    assert layer(params, jnp.zeros((0, 4)), jnp.zeros((3, 4))).shape == (0, 4)
    assert layer(params, jnp.zeros((3, 4)), jnp.zeros((0, 4))).shape == (3, 4)

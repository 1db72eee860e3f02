"""Dropout: the same draws in both passes, in every mode, and nothing kept but the key."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn
from fnn import ops
from fnn.layers import DropConnect, Dropout, DropPath, LayerError, Linear, chain, training
from fnn.ops.stochastic import kept

KEY = jax.random.key(7)
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)))
RATE = 0.4


def plain(x, key):
    return jnp.where(kept(key, x.shape, RATE), x / (1 - 26214 / 2**16), 0)


def ours(x, key):
    return ops.dropout(x, key, rate=RATE)


def over_batch(drop):
    keys = jax.random.split(KEY, 5)
    return lambda x: jax.vmap(drop)(x, keys)


def in_scan(drop):
    def f(x):
        return jax.lax.scan(lambda c, k: (jnp.sin(drop(c, k)), None), x, jax.random.split(KEY, 3))[
            0
        ]

    return f


USES = {
    "typed key": lambda drop: lambda x: drop(x, KEY),
    "raw key": lambda drop: lambda x: drop(x, jax.random.PRNGKey(3)),
    "another kind of key": lambda drop: lambda x: drop(x, jax.random.key(3, impl="rbg")),
    "vmap of keys": over_batch,
    "one key for a batch": lambda drop: lambda x: jax.vmap(lambda x: drop(x, KEY))(x),
    "keys for one x": lambda drop: (
        lambda x: jax.vmap(lambda k: drop(x, k))(jax.random.split(KEY, 3))
    ),
    "scan": in_scan,
    "checkpoint": lambda drop: jax.checkpoint(lambda x: jnp.sin(drop(x, KEY))),
}


@pytest.mark.parametrize("use", sweep(USES, ["typed key", "raw key", "vmap of keys", "scan"]))
def test_as_the_plain_formula(use):
    def everything(drop):
        def of(x):
            f = USES[use](drop)
            loss = lambda x: jnp.sum(f(x) ** 3)
            return (
                f(x), jax.grad(loss)(x), fnn.grad(loss)(x), jax.jvp(f, (x,), (x * x,))[1],
                jax.jvp(jax.grad(loss), (x,), (x * x,))[1],
                jax.grad(lambda x: jax.grad(loss)(x)[0, 0])(x),
            )  # fmt: skip

        return jax.jit(of)(X)

    chex.assert_trees_all_close(everything(ours), everything(plain), rtol=1e-12)


def test_the_draws():
    """Each entry lives with the chance that it should, whatever the others do."""
    for rate in (0.1, 0.5, 0.97):
        m = np.asarray(jax.jit(lambda rate=rate: kept(KEY, (1000, 201), rate))())
        deviation = np.sqrt(rate * (1 - rate))
        assert abs(m.mean() - (1 - rate)) < 4 * deviation / np.sqrt(m.size)
        for shift in (1, 100, 101):  # the other half of the same bits is 101 places on
            both = (m[:, shift:] & m[:, :-shift]).mean()
            assert abs(both - (1 - rate) ** 2) < 4 * deviation / np.sqrt(m[:, shift:].size)
    assert kept(KEY, (), 0.5).shape == () and kept(KEY, (0, 3), 0.5).shape == (0, 3)
    tiny = ops.dropout(jnp.ones(10), KEY, rate=1e-9)
    np.testing.assert_allclose(tiny, 1, rtol=2**-15)


def test_draws_that_are_shared():
    x = jnp.ones((6, 5, 4))
    y = np.asarray(ops.dropout(x, KEY, rate=0.5, shared=(0, 1)))
    np.testing.assert_array_equal(y, np.broadcast_to(y[0, 0], y.shape))
    assert 0 < y[0, 0].sum() < 8
    for key in jax.random.split(KEY, 5):
        assert np.unique(ops.dropout(x, key, rate=0.5, shared=None)) in (0, 2)


def test_what_is_dropped_may_be_anything():
    drop = lambda x: ops.dropout(x, KEY, rate=RATE)
    dropped = np.asarray(drop(jnp.ones_like(X))) == 0
    y, pull = jax.vjp(drop, jnp.where(dropped, jnp.nan, X))
    np.testing.assert_array_equal(y, drop(X))
    np.testing.assert_array_equal(pull(jnp.where(dropped, jnp.inf, X))[0], drop(X))


def test_only_the_key_is_kept():
    x = jnp.ones((64, 32))
    for key in (KEY, jax.random.PRNGKey(0)):
        kept = jax.tree.leaves(jax.eval_shape(lambda x, k: jax.vjp(ours, x, k)[1], x, key))
        assert sum(k.size for k in kept) <= 2

    def loss(drop):
        def of(w, x, key):
            step = lambda x, wk: (x + drop(jnp.sin(x @ wk[0]), wk[1]), None)
            return jnp.sum(jax.lax.scan(step, x, (w, jax.random.split(key, 12)))[0] ** 2)

        return of

    w = jnp.ones((12, 32, 32)) / 32
    temporaries = lambda drop: (
        (
            jax.jit(jax.grad(loss(drop))).lower(w, x, KEY).compile().memory_analysis()
        ).temp_size_in_bytes
    )
    masks = 12 * x.size  # of one byte each
    assert temporaries(ours) <= temporaries(plain) - masks // 2


@exhaustive
@pytest.mark.parametrize("kind", sweep([AxisType.Explicit, AxisType.Auto], [AxisType.Explicit]))
def test_over_devices(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    x = jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, P("data")))
    keys = jax.device_put(jax.random.split(KEY, 8), jax.NamedSharding(mesh, P("data")))
    loss = lambda x: jnp.sum(jax.vmap(ours)(x, keys) ** 2)
    ones, twice = np.ones((8, 4)), lambda x, key: plain(plain(x, key), key)
    wanted = 2 * jax.vmap(twice)(ones, jax.random.split(KEY, 8))
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), wanted)
    one = lambda x: jnp.sum(ours(x, KEY) ** 2)
    wanted = 2 * twice(ones, KEY)
    np.testing.assert_allclose(jax.jit(jax.grad(one))(x), wanted)


@exhaustive
def test_rule():
    fnn.check_rule(ops.dropout, X, jax.random.PRNGKey(0), rate=0.3, dtypes=("bfloat16",))


def test_arguments():
    assert ops.dropout(X, KEY, rate=0) is not None and not np.any(ops.dropout(X, KEY, rate=1))
    for rate in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="dropout: rate must be a number"):
            ops.dropout(X, KEY, rate=rate)
    with pytest.raises(TypeError, match="dropout: key must be a key"):
        ops.dropout(X, 3, rate=0.5)
    with pytest.raises(ValueError, match="dropout: key must be one key"):
        ops.dropout(X, jax.random.split(KEY), rate=0.5)
    with pytest.raises(ValueError, match="dropout: axis 2 is out of range"):
        ops.dropout(X, KEY, rate=0.5, shared=2)


# ------------------------------------------------------------------------------------- layers


def test_drop_path():
    layer = DropPath(0.25)
    assert layer.init(KEY, X) == {} and layer({}, X) is X
    ys = jax.vmap(lambda k: layer({}, X, mode=training(k)))(jax.random.split(KEY, 2000))
    kept = np.any(np.asarray(ys) != 0, (1, 2))
    assert abs(kept.mean() - 0.75) < 0.03
    np.testing.assert_allclose(ys[kept], np.broadcast_to(X / 0.75, ys[kept].shape), rtol=1e-12)
    with pytest.raises(LayerError, match=r"DropPath\(0.25\) draws .* mode=training\(key\)"):
        layer({}, X, mode=training(None))


def test_drop_connect():
    layer = DropConnect(Linear(300), 0.25)
    params = layer.init(KEY, X[0])
    chex.assert_trees_all_equal(params, Linear(300).init(KEY, X[0]))
    np.testing.assert_array_equal(layer(params, X[0]), Linear(300)(params, X[0]))
    eye = jnp.eye(4)  # shows W
    W = np.asarray(layer(params, eye, mode=training(KEY)).T) - np.asarray(params["b"])[:, None]
    dropped = np.abs(W) < 1e-12
    assert abs(dropped.mean() - 0.25) < 0.05
    np.testing.assert_allclose(W[~dropped], np.asarray(params["W"] / 0.75)[~dropped], rtol=1e-6)
    with pytest.raises(LayerError, match=r"wants parameters with the key 'W', but got \[\]"):
        DropConnect(jnp.tanh, 0.5)({}, X, mode=training(KEY))
    with pytest.raises(TypeError, match="DropConnect, layer: Linear makes a layer"):
        DropConnect(Linear, 0.5)


def test_gradients_of_examples():
    net = chain(a=Linear(6), drop=Dropout(0.5), path=DropPath(0.5), b=DropConnect(Linear(3), 0.5))
    params = net.init(KEY, X[0])
    keys = jax.random.split(KEY, 5)
    loss = lambda p, xk: jnp.sum(jnp.sin(net(p, xk[0], mode=training(xk[1]))) ** 2)

    @jax.jit
    def found(params, batch):
        grads = fnn.per_example.grads(loss)(params, batch)[1]
        return grads, fnn.per_example.materialize(grads)

    grads, formed = found(params, (X, keys))
    wanted = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, (X, keys))
    chex.assert_trees_all_close(formed, wanted, rtol=1e-9, atol=1e-12)
    assert "gradient is Gᵀ A" in str(fnn.per_example.explain(grads)).split("['a']['W']")[1][:80]


@pytest.mark.parametrize("rate", [0.002, 0.1])
def test_the_mean_stays_in_16_bits_where_1_less_the_rate_is_rounded(rate):
    x = jnp.full((100, 1000), 1.0, jnp.bfloat16)
    y = fnn.ops.dropout(x, jax.random.key(0), rate=rate)
    alive = jnp.max(y).astype(jnp.float32)
    assert alive == jnp.asarray(1 / (1 - rate), jnp.bfloat16)

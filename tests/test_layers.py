"""The layer protocol: layers, networks of them, their keys, states, errors, and the summary."""

import copy
import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive

import fnn
from fnn import ops
from fnn.layers import (
    EVALUATE,
    LSTM,
    Attention,
    BatchNorm,
    DropConnect,
    Dropout,
    Layer,
    LayerError,
    LayerNorm,
    Linear,
    Maxout,
    MixtureOfExperts,
    Mode,
    Network,
    chain,
    network,
    parallel,
    repeat,
    residual,
    summary,
    training,
)

KEY = jax.random.key(0)


def shapes(tree):
    return jax.tree.map(lambda a: a.shape, tree)


@dataclasses.dataclass(frozen=True)
class Scale(Layer):
    """A layer of one's own, without state, that doesn't care for the mode."""

    start: float = 1.0

    def init(self, key, x):
        return {"scale": jnp.full(x.shape, self.start)}

    def __call__(self, params, x):
        return params["scale"] * x


@dataclasses.dataclass(frozen=True)
class RunningSum(Layer):
    """A layer with a cache: the sum of the inputs so far. Without one it sums positions."""

    def init_cache(self, length, x):
        return {"cache": {"sum": jnp.zeros(x.shape[1:]), "seen": jnp.zeros((), jnp.int32)}}

    def apply(self, params, state, x, mode=EVALUATE):
        if "cache" not in state:
            return jnp.cumsum(x, axis=0), state
        cache = state["cache"]
        y = cache["sum"] + jnp.cumsum(x, axis=0)
        return y, {**state, "cache": {"sum": y[-1], "seen": cache["seen"] + len(x)}}


@network(embed=Linear(6), norm=LayerNorm(), drop=Dropout(0.5), output=Linear(2))
def by_name(net, x):
    h = jnp.tanh(net.norm(net.embed(x)))
    return net.output(net.drop(h)) + jnp.sum(net.params["embed"]["W"])


# --------------------------------------------------------------------------------- the layers


def test_linear_is_W_x_plus_b():
    layer = Linear(3, bias_init=jax.nn.initializers.normal(1.0))
    x = jnp.arange(4.0)
    params = layer.init(KEY, x)
    assert shapes(params) == {"W": (3, 4), "b": (3,)}
    W, b = np.asarray(params["W"]), np.asarray(params["b"])
    wanted = [sum(W[i, j] * x[j] for j in range(4)) + b[i] for i in range(3)]
    np.testing.assert_allclose(layer(params, x), wanted, rtol=1e-6)


def test_linear_without_bias():
    layer = Linear(3, use_bias=False)
    params = layer.init(KEY, jnp.ones(4))
    assert set(params) == {"W"}
    np.testing.assert_allclose(layer(params, jnp.ones(4)), params["W"].sum(1), rtol=1e-6)


@pytest.mark.parametrize("layer", [Linear(3), Maxout(3, 4), LayerNorm()], ids=repr)
def test_positions_share_the_weights(layer):
    x = jax.random.normal(KEY, (5, 6, 4))
    params = layer.init(KEY, x)
    wanted = jax.vmap(jax.vmap(lambda x: layer(params, x)))(x)
    np.testing.assert_allclose(layer(params, x), wanted, rtol=1e-5, atol=1e-6)


def test_maxout_is_the_largest_of_linear_functions():
    layer = Maxout(3, pieces=4, bias_init=jax.nn.initializers.normal(1.0))
    x = jnp.arange(5.0)
    params = layer.init(KEY, x)
    assert shapes(params) == {"W": (4, 3, 5), "b": (4, 3)}
    wanted = np.max([W @ x + b for W, b in zip(params["W"], params["b"], strict=True)], axis=0)
    np.testing.assert_allclose(layer(params, x), wanted, rtol=1e-6)
    W = np.asarray(Maxout(400, 2).init(KEY, jnp.zeros(50))["W"])
    assert W.var() == pytest.approx(1 / 50, rel=0.05)  # LeCun's, with the fans of one piece
    assert not np.allclose(W[0], W[1])


@pytest.mark.parametrize("layer", [Linear(3), Maxout(3), LayerNorm(), BatchNorm()], ids=repr)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64, jnp.int32])
def test_parameters_are_float32_whatever_x_is(layer, dtype):
    for enabled, wanted in ((False, jnp.float32), (True, jnp.float64)):
        if dtype == jnp.float64 and not enabled:
            continue
        with jax.enable_x64(enabled):
            x = jax.ShapeDtypeStruct((4,), dtype)
            found = jax.eval_shape(layer.init, KEY, x), jax.eval_shape(layer.init_state, x)
            assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(wanted)}


def test_layer_norm():
    x = 3 + 2 * jax.random.normal(KEY, (5, 7))
    y = np.asarray(LayerNorm().__call__(LayerNorm().init(KEY, x), x))
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(-1), 1, rtol=1e-4)
    params = {"scale": jnp.arange(7.0), "bias": jnp.ones(7)}
    wanted = (
        np.arange(7.0)
        * (x - x.mean(-1, keepdims=True))
        / np.sqrt(np.asarray(x).var(-1, keepdims=True) + 1e-5)
    )
    np.testing.assert_allclose(LayerNorm()(params, x), wanted + 1, rtol=1e-5)
    assert LayerNorm(use_scale=False, use_bias=False).init(KEY, x) == {}
    half = (1000 + x).astype(jnp.bfloat16)  # its squares' sum has no digits left in bfloat16
    y = LayerNorm(use_scale=False, use_bias=False)({}, half)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(half, np.float64)
    wanted = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, atol=0.02)


def test_dropout():
    x = jnp.arange(1.0, 100_001.0).reshape(1000, 100)
    layer = Dropout(0.25)
    assert layer.init(KEY, x) == {} and layer({}, x) is x
    y = layer({}, x, mode=training(KEY))
    kept = np.asarray(y) != 0
    assert abs(kept.mean() - 0.75) < 0.01
    np.testing.assert_allclose(y[kept], x[kept] / 0.75, rtol=1e-6)
    again, other = (layer({}, x, mode=training(k)) for k in (KEY, jax.random.key(1)))
    np.testing.assert_array_equal(y, again)
    assert not np.array_equal(y, other)
    assert not np.any(Dropout(1)({}, x, mode=training(KEY)))
    assert Dropout(0.0)({}, x, mode=training(None)) is x
    assert layer({}, x.astype(jnp.bfloat16), mode=training(KEY)).dtype == jnp.bfloat16
    with pytest.raises(LayerError, match=r"Dropout\(0.25\) draws .* mode=training\(key\)"):
        layer({}, x, mode=training(None))


# ---------------------------------------------------------------------------------- batch norm


def batch_norm(layer, params, state, xs):
    apply = lambda x: layer.apply(params, state, x, mode=training(None, "batch"))
    return jax.vmap(apply, out_axes=(0, None), axis_name="batch")(xs)


@pytest.mark.parametrize("positions", [(), (5, 3)])
def test_batch_norm(positions):
    layer = BatchNorm(decay=0.75)
    xs = 3 + 2 * jax.random.normal(KEY, (6, *positions, 4))
    params = {"scale": jnp.arange(1.0, 5.0), "bias": jnp.ones(4)}
    state = layer.init_state(xs[0])
    assert shapes(state) == {"statistics": {"mean": (4,), "variance": (4,)}}
    ys, new = batch_norm(layer, params, state, xs)
    rows = np.asarray(xs).reshape(-1, 4)
    mean, variance = rows.mean(0), rows.var(0)
    wanted = np.arange(1.0, 5.0) * (xs - mean) / np.sqrt(variance + 1e-5) + 1
    np.testing.assert_allclose(ys, wanted, rtol=1e-5)
    running = new["statistics"]
    np.testing.assert_allclose(running["mean"], 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(running["variance"], 0.75 + 0.25 * rows.var(0, ddof=1), rtol=1e-5)
    y, same = layer.apply(params, new, xs[0])  # evaluation: by the running statistics
    deviation = np.sqrt(running["variance"] + 1e-5)
    np.testing.assert_allclose(
        y, np.arange(1.0, 5.0) * (xs[0] - running["mean"]) / deviation + 1, rtol=1e-5
    )
    assert same is new


@exhaustive
def test_batch_norm_of_large_numbers_and_its_gradient():
    xs = (1e4 + jax.random.normal(KEY, (8, 3))).astype(jnp.float32)
    layer = BatchNorm(use_scale=False, use_bias=False)
    state = jax.tree.map(lambda a: a.astype(jnp.float32), layer.init_state(xs[0]))
    ys, new = batch_norm(layer, {}, state, xs)
    exact = np.asarray(xs, np.float64)
    wanted = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(ys, wanted, atol=2e-3)
    chex.assert_trees_all_equal_dtypes(new, state)

    def of(gradient_of):
        def loss(params):
            with_scale = BatchNorm()
            state = with_scale.init_state(xs[0])
            ys, _ = batch_norm(with_scale, params, state, jnp.sin(xs) * params["scale"])
            return jnp.sum(ys**3)

        return gradient_of(loss)({"scale": jnp.arange(1.0, 4.0), "bias": jnp.ones(3)})

    chex.assert_trees_all_close(of(fnn.grad), of(jax.grad), rtol=1e-5)


def test_batch_norm_needs_its_state_and_a_batch():
    net = chain(hidden=Linear(3), norm=BatchNorm())
    x = jnp.ones(4)
    params, state = net.init(KEY, x), net.init_state(x)
    for layer, own in ((net, params), (BatchNorm(), params["norm"])):
        with pytest.raises(LayerError, match=r"has a state.*apply\(params, state, x\)"):
            layer(own, x if layer is net else jnp.ones(3))
    with pytest.raises(LayerError, match=r"^norm: BatchNorm\(\) in training .* axis='batch'"):
        net.apply(params, state, x, mode=training(KEY))
    with pytest.raises(LayerError, match=r"norm: .* wants mean of shape \(3,\), but got .*\(4,\)"):
        bad = {"statistics": {"norm": {"mean": jnp.ones(4), "variance": jnp.ones(3)}}}
        net.apply(params, bad, x)


# -------------------------------------------------------------------------------- combinators


def test_chain_by_position():
    net = chain(Linear(5), jnp.tanh, Linear(2))
    x = jnp.arange(3.0)
    params = net.init(KEY, x)
    assert shapes(params) == {"0": {"W": (5, 3), "b": (5,)}, "2": {"W": (2, 5), "b": (2,)}}
    first, last = params["0"], params["2"]
    wanted = last["W"] @ np.tanh(first["W"] @ x + first["b"]) + last["b"]
    np.testing.assert_allclose(net(params, x), wanted, rtol=1e-6)


def test_chain_by_name_keeps_only_parts_with_parameters():
    net = chain(hidden=Linear(5), act=jnp.tanh, twice=chain(jnp.sin, jnp.cos), output=Linear(2))
    x = jnp.arange(3.0)
    params = net.init(KEY, x)
    assert list(params) == ["hidden", "output"]
    h = np.cos(np.sin(np.tanh(params["hidden"]["W"] @ x + params["hidden"]["b"])))
    wanted = params["output"]["W"] @ h + params["output"]["b"]
    np.testing.assert_allclose(net(params, x), wanted, rtol=1e-6)


def test_chain_of_nothing_is_the_identity():
    assert chain().init(KEY, jnp.ones(3)) == {}
    np.testing.assert_array_equal(chain()({}, jnp.arange(3.0)), np.arange(3.0))


def test_parallel():
    x = jnp.arange(3.0)
    net = parallel(Linear(2), jnp.sin)
    params = net.init(KEY, x)
    assert shapes(params) == {"0": {"W": (2, 3), "b": (2,)}}
    linear, sine = net(params, x)
    np.testing.assert_allclose(linear, params["0"]["W"] @ x, rtol=1e-6)
    np.testing.assert_allclose(sine, np.sin(x), rtol=1e-6)
    net = parallel(left=Linear(2), right=jnp.sin)
    params = net.init(KEY, x)
    assert list(params) == ["left"]
    assert shapes(net(params, x)) == {"left": (2,), "right": (3,)}


def test_residual_adds_its_input():
    x = jnp.arange(3.0)
    net = residual(Linear(3), jnp.tanh)
    params = net.init(KEY, x)
    wanted = x + np.tanh(params["0"]["W"] @ x + params["0"]["b"])
    np.testing.assert_allclose(net(params, x), wanted, rtol=1e-6)
    named = residual(inner=Linear(3), act=jnp.tanh)
    assert list(named.init(KEY, x)) == ["inner"]


def test_nested_networks_have_readable_paths_and_gradients_by_jax():
    net = chain(
        encoder=chain(hidden=Linear(4), act=jax.nn.relu),
        heads=parallel(mean=Linear(2), scale=chain(Linear(2), jax.nn.softplus)),
    )
    x = jnp.arange(3.0)
    params = net.init(KEY, x)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert "['encoder']['hidden']['W']" in names and "['heads']['scale']['0']['b']" in names

    def by_hand(params, x):
        p = params["encoder"]["hidden"]
        h = jnp.maximum(p["W"] @ x + p["b"], 0)
        mean, scale = params["heads"]["mean"], params["heads"]["scale"]["0"]
        scale = jnp.log1p(jnp.exp(scale["W"] @ h + scale["b"]))
        return jnp.sum((mean["W"] @ h + mean["b"]) * scale)

    def by_net(params, x):
        out = net(params, x)
        return jnp.sum(out["mean"] * out["scale"])

    wanted = jax.grad(by_hand)(params, x)
    for gradient in (jax.grad, fnn.grad):
        chex.assert_trees_all_close(gradient(by_net)(params, x), wanted, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------- repeat

BLOCK = residual(norm=LayerNorm(), hidden=Linear(4), act=jnp.tanh, drop=Dropout(0.5))


@exhaustive
@pytest.mark.parametrize(
    "remat",
    [
        None,
        pytest.param(True, marks=exhaustive),
        pytest.param(jax.checkpoint_policies.dots_saveable, marks=exhaustive),
    ],
    ids=["no", "yes", "policy"],
)
def test_repeat_is_its_block_n_times(remat):
    net = repeat(BLOCK, 3, remat=remat)
    x = jnp.arange(4.0)
    params = net.init(KEY, x)
    assert shapes(params)["hidden"] == {"W": (3, 4, 4), "b": (3, 4)}
    assert not np.allclose(params["hidden"]["W"][0], params["hidden"]["W"][1])

    def one_by_one(params, x):
        for i in range(3):
            x = BLOCK(jax.tree.map(lambda a, i=i: a[i], params), x)
        return x

    np.testing.assert_allclose(net(params, x), one_by_one(params, x), rtol=1e-6)
    wanted = jax.grad(lambda p: jnp.sum(one_by_one(p, x) ** 2))(params)
    for gradient in (jax.grad, fnn.grad):
        found = jax.jit(gradient(lambda p: jnp.sum(net(p, x) ** 2)))(params)
        chex.assert_trees_all_close(found, wanted, rtol=1e-5)
    y = net(params, x, mode=training(KEY))
    assert not np.allclose(y, net(params, x, mode=training(jax.random.key(1))))
    more = repeat(BLOCK, 5).init(KEY, x)  # a block more changes no other's start
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[:3], more), params)


@exhaustive
@pytest.mark.parametrize("unroll", [2, 3, 7])
def test_several_blocks_in_a_turn_of_the_loop(unroll):
    net, loop = repeat(BLOCK, 3, unroll=unroll), repeat(BLOCK, 3)
    x = jnp.arange(8.0).reshape(2, 4)
    params = loop.init(KEY, x[0])
    assert repr(net).endswith(f"3, unroll={unroll})")
    of = lambda net: lambda params, x: jnp.sum(net(params, x) ** 2)
    wanted = jax.vmap(jax.grad(of(loop)), (None, 0))(params, x)
    for grad in (jax.grad, fnn.grad):
        found = jax.jit(jax.vmap(grad(of(net)), (None, 0))).lower(params, x).compile()
        chex.assert_trees_all_close(found(params, x), wanted, rtol=1e-5)
        assert unroll == 2 or " while(" not in found.as_text()
    _, factored = fnn.per_example.grads(of(net))(params, x)
    chex.assert_trees_all_close(fnn.per_example.materialize(factored), wanted, rtol=1e-5)


def test_repeat_stacks_states_and_caches():
    net = chain(blocks=repeat(chain(norm=BatchNorm(), add=RunningSum()), 2))
    x = jnp.arange(6.0).reshape(3, 2)
    params, state = net.init(KEY, x), net.init_state(x)
    assert shapes(state) == {
        "statistics": {"blocks": {"norm": {"mean": (2, 2), "variance": (2, 2)}}}
    }
    y, new = net.apply(params, state, x)
    assert shapes(new) == shapes(state)
    cache = net.init_cache(3, x[:1])
    assert shapes(cache)["cache"] == {"blocks": {"add": {"sum": (2, 2), "seen": (2,)}}}
    assert shapes(cache)["statistics"] == shapes(state)["statistics"]
    ys = []
    for row in x:  # position by position, each with the cache of the ones before
        y_row, cache = net.apply(params, cache, row[None])
        ys.append(y_row[0])
    np.testing.assert_allclose(ys, y, rtol=1e-6)
    np.testing.assert_array_equal(cache["cache"]["blocks"]["add"]["seen"], [3, 3])


def test_repeat_compiles_one_block():
    x = jnp.ones(4)

    def size(n):
        net = repeat(BLOCK, n)
        params = jax.eval_shape(net.init, KEY, x)
        return len(jax.jit(jax.grad(lambda p: net(p, x).sum())).lower(params).as_text())

    assert size(40) < 1.02 * size(4)


def test_repeat_refuses_what_does_not_fit():
    x = jnp.ones(4)
    with pytest.raises(LayerError, match=r"repeat\(Linear\(3\), 2\) wants a block .*\[4\].*\[3\]"):
        repeat(Linear(3), 2).init(KEY, x)
    net = chain(blocks=repeat(Linear(4), 2))
    params = net.init(KEY, x)
    with pytest.raises(LayerError, match=r"^blocks: repeat\(Linear\(4\), 2\).*length 2.*\['W'\]"):
        net(repeat_once(params), x)
    with pytest.raises(LayerError, match=r"^blocks: Linear\(4\).*\(2, 4\)"):
        net({"blocks": {"W": jnp.ones((2, 4, 4)), "b": jnp.ones((2, 2, 4))}}, x)


def repeat_once(params):
    return jax.tree.map(lambda a: a[:1], params)


# ------------------------------------------------------------------------------------ networks


def test_a_body_serves_init_and_apply_and_reads_parameters():
    x = jnp.arange(4.0)
    params = by_name.init(KEY, x)
    assert list(params) == ["embed", "norm", "output"]
    h = jnp.tanh(LayerNorm()(params["norm"], params["embed"]["W"] @ x + params["embed"]["b"]))
    wanted = params["output"]["W"] @ h + params["output"]["b"] + params["embed"]["W"].sum()
    np.testing.assert_allclose(by_name(params, x), wanted, rtol=1e-6)
    assert isinstance(by_name, Network) and repr(by_name).startswith("by_name(embed=Linear(6), ")


@exhaustive
def test_init_needs_only_the_shape_and_works_under_transforms():
    net = chain(h=Linear(3), a=by_name, p=parallel(Linear(1), repeat(residual(Linear(2)), 2)))
    x = jnp.zeros(4)
    by_array = net.init(KEY, x)
    by_type = net.init(KEY, jax.ShapeDtypeStruct((4,), x.dtype))
    chex.assert_trees_all_equal(by_array, by_type)
    assert shapes(jax.eval_shape(net.init, KEY, x)) == shapes(by_array)
    chex.assert_trees_all_close(jax.jit(net.init)(KEY, x), by_array, rtol=1e-6)
    many = jax.vmap(net.init, (0, None))(jax.random.split(KEY, 3), x)
    for i, key in enumerate(jax.random.split(KEY, 3)):
        one = jax.tree.map(lambda a, i=i: a[i], many)
        chex.assert_trees_all_close(one, net.init(key, x), rtol=1e-6)
    assert by_array["h"]["W"].dtype == jnp.result_type(float)


def test_init_runs_the_body_once_at_each_level():
    """In nests a body is run by each level around it; 2ⁿ runs would be too many."""
    runs = []

    def counted(x):
        runs.append(1)
        return x

    net = chain(counted, Linear(2))
    for _ in range(5):
        net = chain(net)
    net.init(KEY, jnp.ones(2))
    assert len(runs) == 6


def test_parts_inside_vmap_and_loops():
    @network(a=Linear(4), norm=LayerNorm(), b=chain(Linear(4)))
    def net(net, xs):
        ys = jax.vmap(lambda x: net.a(net.norm(x)))(xs)
        last, _ = jax.lax.scan(lambda y, x: (net.b(y) + x, None), ys[0], ys)
        return last + net.params["b"]["0"]["b"]

    xs = jax.random.normal(KEY, (3, 4))
    params = net.init(KEY, xs)
    assert shapes(params["b"]) == {"0": {"W": (4, 4), "b": (4,)}}
    h = np.stack([Linear(4)(params["a"], LayerNorm()(params["norm"], x)) for x in xs])
    y = h[0]
    for x in h:
        y = params["b"]["0"]["W"] @ y + params["b"]["0"]["b"] + x
    np.testing.assert_allclose(net(params, xs), y + params["b"]["0"]["b"], rtol=1e-5)


def test_a_part_that_is_called_twice_shares_its_weights():
    @network(layer=Linear(3), drop=Dropout(0.5))
    def twice(net, x):
        return net.drop(net.layer(net.layer(x))), net.drop(x)

    x = jnp.ones(3)
    params = twice.init(KEY, x)
    assert list(params) == ["layer"]
    W, b = params["layer"]["W"], params["layer"]["b"]
    np.testing.assert_allclose(twice(params, x)[0], W @ (W @ x + b) + b, rtol=1e-6)
    wide = jnp.ones(3000)
    one = chain(a=parallel(Dropout(0.5), Dropout(0.5)))({}, wide, mode=training(KEY))
    assert not np.array_equal(*one)

    @network(drop=Dropout(0.5))
    def calls(net, x):
        return net.drop(x), net.drop(x)

    assert not np.array_equal(*calls({}, wide, mode=training(KEY)))  # but draws anew


def test_a_part_more_changes_no_other_draw():
    x = jnp.ones(4)
    few = chain(a=Linear(4), b=Linear(4)).init(KEY, x)
    many = chain(a=Linear(4), drop=Dropout(0.5), more=Linear(4), b=Linear(4)).init(KEY, x)
    chex.assert_trees_all_equal(few, {name: many[name] for name in few})
    assert not np.allclose(few["a"]["W"], few["b"]["W"])
    few = chain(Linear(4), Linear(4)).init(KEY, x)
    many = chain(Linear(4), jnp.tanh, Dropout(0.5), Linear(4)).init(KEY, x)
    chex.assert_trees_all_equal([few["0"], few["1"]], [many["0"], many["3"]])
    wide = jnp.ones(1000)
    few = chain(drop=Dropout(0.5))({}, wide, mode=training(KEY))
    net = chain(other=Dropout(0.0), drop=Dropout(0.5), act=lambda x: x)
    many = net({}, wide, mode=training(KEY))
    np.testing.assert_array_equal(few, many)


def test_state_is_kept_by_kind_and_batches_by_kind():
    net = chain(hidden=Linear(3), norm=BatchNorm(), add=RunningSum())
    xs = jax.random.normal(KEY, (5, 2, 4))
    params, state = net.init(KEY, xs[0]), net.init_state(xs[0])
    assert set(state) == {"statistics"} and set(state["statistics"]) == {"norm"}
    state = state | {"cache": jax.vmap(lambda x: net.init_cache(4, x)["cache"])(xs)}
    axes = {"statistics": None, "cache": 0}
    ys, new = jax.vmap(
        lambda state, x: net.apply(params, state, x, mode=training(None, "batch")),
        in_axes=(axes, 0),
        out_axes=(0, axes),
        axis_name="batch",
    )(state, xs)
    assert shapes(new)["statistics"] == {"norm": {"mean": (3,), "variance": (3,)}}
    assert shapes(new)["cache"] == {"add": {"sum": (5, 3), "seen": (5,)}}
    assert ys.shape == (5, 2, 3)


def test_what_init_makes_leaks_no_tracer():
    net = chain(hidden=repeat(chain(Linear(3)), 2), norm=BatchNorm())
    with jax.checking_leaks():
        params, state = net.init(KEY, jnp.ones(3)), net.init_state(jnp.ones(3))
    assert params["hidden"]["0"]["W"].shape == (2, 3, 3)
    assert state["statistics"]["norm"]["mean"].shape == (3,)


def test_mode_is_a_pytree_whose_one_leaf_is_the_key():
    mode = training(KEY, "batch")
    assert len(jax.tree.leaves(mode)) == 1 and jax.tree.leaves(EVALUATE) == []
    assert Mode() == EVALUATE and not EVALUATE.train
    net = chain(drop=Dropout(0.5))
    keys = jax.random.split(KEY, 3)
    ys = jax.jit(jax.vmap(lambda k: net({}, jnp.ones(8), mode=training(k))))(keys)
    for y, key in zip(ys, keys, strict=True):
        np.testing.assert_array_equal(y, net({}, jnp.ones(8), mode=training(key)))


@exhaustive
def test_a_network_with_dropout_has_factored_gradients():
    xs = jax.random.normal(KEY, (6, 4))
    params = by_name.init(KEY, xs[0])
    loss = lambda p, x: jnp.sum(by_name(p, x, mode=training(jax.random.key(3))) ** 2)
    _, grads = fnn.per_example.grads(loss)(params, xs)
    wanted = jax.vmap(jax.grad(loss), (None, 0))(params, xs)
    chex.assert_trees_all_close(fnn.per_example.materialize(grads), wanted, rtol=1e-5, atol=1e-6)
    text = str(fnn.per_example.explain(grads))
    assert re.search(r"\['output'\]\['W'\] .*gradient is Gᵀ A", text)


@network(a=Linear(64), norm=BatchNorm(), b=Linear(32))
def beside_a_batch_norm(net, x):
    return net.b(ops.relu(net.norm(net.a(x))))


# The layer, one example's shape, and the factors that are kept of it; all else stays dense.
FACTORED = {
    "Maxout": (Maxout(64, 3), (48,), {"['W']": "A (1 × 48), G (1 × 192)"}),
    "Maxout at positions": (Maxout(64, 3), (5, 48), {"['W']": "A (5 × 48), G (5 × 192)"}),
    "DropConnect": (DropConnect(Linear(64), 0.5), (48,), {"['W']": "A (1 × 48), G (1 × 64)"}),
    "Linears beside a BatchNorm": (
        beside_a_batch_norm,
        (5, 48),
        {"['a']['W']": "A (5 × 48), G (5 × 64)", "['b']['W']": "A (5 × 64), G (5 × 32)"},
    ),
}


def factors_of(loss, params, batch):
    """The factors by their paths, of shapes alone."""
    _, g = jax.eval_shape(fnn.per_example.grads(loss), params, batch)
    rows = fnn.per_example.explain(g)
    return {row["path"]: row["kept"] for row in rows if row["kept"] != "dense"}


@pytest.mark.parametrize("name", FACTORED)
def test_weights_of_these_stay_factored(name):
    layer, shape, wanted = FACTORED[name]
    params, state = layer.init(KEY, jnp.zeros(shape)), layer.init_state(jnp.zeros(shape))
    loss = lambda p, x: jnp.sum(jnp.sin(layer.apply(p, state, x)[0]))
    assert factors_of(loss, params, jnp.zeros((3, *shape))) == wanted


@exhaustive
@pytest.mark.parametrize("name", FACTORED)
def test_gradients_of_those_factors(name):
    layer, shape, _ = FACTORED[name]
    xs = jax.random.normal(KEY, (3, *shape))
    state = layer.init_state(xs[0])
    random = lambda p: jax.random.normal(KEY, p.shape) / 4
    params = jax.tree.map(random, layer.init(KEY, xs[0]))
    loss = lambda p, x: jnp.sum(jnp.sin(layer.apply(p, state, x)[0]))
    found = jax.jit(lambda p, b: fnn.per_example.materialize(fnn.per_example.grads(loss)(p, b)[1]))
    wanted = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, xs)
    chex.assert_trees_all_close(found(params, xs), wanted, rtol=1e-9, atol=1e-12)


def test_dropped_weights_leave_no_factors():
    """In training DropConnect's gradient is a product times the mask, which is of full rank."""
    layer, keys = DropConnect(Linear(64), 0.5), jax.random.split(KEY, 3)
    loss = lambda p, e: jnp.sum(jnp.sin(layer(p, e[0], mode=training(e[1]))))
    params = layer.init(KEY, jnp.zeros(48))
    assert factors_of(loss, params, (jnp.zeros((3, 48)), keys)) == {}


def test_linears_beside_a_batch_norm_in_training():
    """Over the positions of an example they stay factored; over examples there are no gradients."""
    net, xs = beside_a_batch_norm, jnp.zeros((3, 5, 48))
    params, state = net.init(KEY, xs[0]), net.init_state(xs[0])

    def of_positions(p, x):
        h, n = x @ p["a"]["W"].T + p["a"]["b"], p["norm"]
        h = ops.relu(ops.batch_norm(h, n["scale"], n["bias"])[0])
        return jnp.sum(jnp.sin(h @ p["b"]["W"].T))

    assert factors_of(of_positions, params, xs) == FACTORED["Linears beside a BatchNorm"][2]
    of_batch = lambda p, x: jnp.sum(net.apply(p, state, x, mode=training(KEY, axis="batch"))[0])
    with pytest.raises(ValueError, match="the loss of one example depends on other examples"):
        fnn.per_example.grads(of_batch)(params, xs)


# --------------------------------------------------------------------- layers are dataclasses


@pytest.mark.parametrize(
    ("layer", "other", "text"),
    [
        (Linear(3), Linear(4), "Linear(3)"),
        (Maxout(3, use_bias=False), Maxout(3), "Maxout(3, use_bias=False)"),
        (Maxout(3, 4), Maxout(3), "Maxout(3, 4)"),
        (Dropout(0.5), Dropout(0.1), "Dropout(0.5)"),
        (BatchNorm(decay=0.99), BatchNorm(), "BatchNorm(decay=0.99)"),
        (
            Linear(2, weight_init=fnn.initializers.xavier_normal),
            Linear(2),
            "Linear(2, weight_init=xavier_normal)",
        ),
        (chain(a=Linear(3), b=ops.relu), chain(a=Linear(3)), "chain(a=Linear(3), b=relu)"),
        (
            residual(Maxout(3, pieces=4), jax.nn.relu),
            chain(Maxout(3, pieces=4), jax.nn.relu),
            "residual(Maxout(3, 4), relu)",
        ),
        (repeat(Linear(3), 2), repeat(Linear(3), 3), "repeat(Linear(3), 2)"),
        (repeat(Maxout(3), 2, remat=True), Maxout(3), "repeat(Maxout(3), 2, remat=True)"),
    ],
)
def test_layers_compare_hash_copy_and_print(layer, other, text):
    again = copy.deepcopy(layer)
    assert again == layer and hash(again) == hash(layer) and layer != other
    assert dataclasses.replace(layer) == layer
    assert repr(layer) == str(layer) == text
    with pytest.raises(dataclasses.FrozenInstanceError):
        layer.anything = 3


def test_replace():
    assert dataclasses.replace(Linear(3, use_bias=False), features=4) == Linear(4, use_bias=False)
    with pytest.raises(ValueError, match="features must be .* at least 1, but got -1"):
        dataclasses.replace(Linear(3), features=-1)
    net = chain(hidden=Linear(3), act=ops.relu)
    assert dataclasses.replace(net, parts={"hidden": Linear(3), "act": ops.relu}) == net
    assert dataclasses.replace(net, parts={"act": ops.relu}) == chain(act=ops.relu)


def test_layers_are_static_arguments():
    @chex.assert_max_traces(n=2)
    def double(net, params, x):
        return 2 * net(params, x)

    run, x = jax.jit(double, static_argnums=0), jnp.ones(3)
    params = Linear(3).init(KEY, x)
    for net in (Linear(3), Linear(3), Linear(3, use_bias=False), Linear(3)):
        own = params if net.use_bias else {"W": params["W"]}
        np.testing.assert_allclose(run(net, own, x), 2 * net(own, x), rtol=1e-6)


def test_names_reach_the_compiled_program_and_the_graph():
    net = chain(encoder=chain(hidden=Linear(3), act=jnp.tanh))
    params = net.init(KEY, jnp.zeros(3))
    text = jax.jit(net.__call__).lower(params, jnp.zeros(3)).as_text(debug_info=True)
    assert "encoder/hidden" in text
    graph = fnn.graph(lambda p, x: net(p, x).sum())(params, jnp.ones(3))
    assert any(node.scope[:2] == ("encoder", "hidden") for node in graph)


# ------------------------------------------------------------------------------------- errors


def test_wrong_input_names_layer_shapes_and_place():
    net = chain(encoder=chain(hidden=Linear(100), act=jnp.tanh), output=Linear(10))
    params = net.init(KEY, jnp.zeros(784))
    wanted = r"^encoder\.hidden: Linear\(100\) .*W of shape \(100, 784\).*\(784,\).*\(785,\)"
    with pytest.raises(LayerError, match=wanted):
        net(params, jnp.zeros(785))
    with pytest.raises(LayerError, match=wanted):
        jax.jit(net.__call__)(params, jnp.zeros(785))


def test_other_errors_from_inside_get_a_note_with_the_path():
    net = chain(encoder=chain(Linear(3), lambda x: x @ jnp.ones(9)), output=Linear(10))
    with pytest.raises(TypeError) as error:
        net.init(KEY, jnp.zeros(4))
    assert "in the network's part encoder.1, <lambda>" in error.value.__notes__


@pytest.mark.parametrize("layer", [Linear(3), Maxout(3)], ids=repr)
def test_wrong_input_of_one_layer(layer):
    params = layer.init(KEY, jnp.zeros(4))
    with pytest.raises(ValueError, match=re.escape(f"{layer!r}"[:6]) + r".*\(4,\).*\(5,\)"):
        layer(params, jnp.zeros(5))
    with pytest.raises(ValueError, match=r"shape \(in,\).*shape \(\)"):
        layer.init(KEY, jnp.zeros(()))
    with pytest.raises(ValueError, match=r"keys \['W', 'b'\], but got \['W'\]"):
        layer({"W": params["W"]}, jnp.zeros(4))


@pytest.mark.parametrize(
    ("layer", "name", "bad"),
    [
        (Linear(3), "b", jnp.ones((3, 1))),
        (Linear(3), "b", jnp.ones(1)),
        (Linear(3), "b", 1.0),
        (Linear(3), "W", jnp.ones((4, 4))),
        (Linear(3), "W", jnp.ones((2, 3, 4))),
        (Maxout(3), "b", jnp.ones(3)),
        (Maxout(3), "W", jnp.ones((3, 3, 4))),
        (LayerNorm(), "scale", jnp.ones(1)),
        (LayerNorm(), "bias", jnp.ones((2, 4))),
        (BatchNorm(), "scale", jnp.ones(())),
    ],
)
def test_a_parameter_of_the_wrong_shape(layer, name, bad):
    x = jnp.ones(4)
    net = chain(inner=chain(part=layer))
    params, state = net.init(KEY, x), net.init_state(x)
    wanted = params["inner"]["part"][name].shape
    params["inner"]["part"][name] = bad
    with pytest.raises(LayerError) as error:
        net.apply(params, state, x)
    message = str(error.value)
    assert message.startswith(f"inner.part: {layer!r} wants {name} of shape {wanted}, but got ")
    assert str(getattr(bad, "shape", bad)) in message


def test_the_parameters_of_another_network():
    x = jnp.zeros(3)
    net = chain(hidden=Linear(3), act=jnp.tanh, out=Linear(3))
    params = net.init(KEY, x)
    refused = lambda params, match: pytest.raises(LayerError, match=match)
    for wrong, match in [
        ({"hiden": params["hidden"], "out": params["out"]}, r"chain.*'out'\], but got \['hiden'"),
        ({"out": params["out"]}, r"^hidden: Linear\(3\) wants .*\['W', 'b'\], but got \[\]"),
        (params | {"act": params["out"]}, r"^act: tanh has no parameters, but got \['W', 'b'\]"),
        ((params["hidden"], params["out"]), "wants parameters as a dict .*, but got a tuple"),
        (None, "wants parameters as a dict .*, but got None"),
    ]:
        with refused(wrong, match):
            net(wrong, x)
    with pytest.raises(LayerError, match=r"state as a dict by kind.*\['hidden', 'act', 'out'\]"):
        net.apply(params, {"statistics": {"norm": {}}}, x)
    with pytest.raises(LayerError, match="state as a dict by kind"):
        net.apply(params, x, x)
    with pytest.raises(TypeError, match=r"mode must be EVALUATE or training\(key\), but got True"):
        net(params, x, mode=True)


def test_what_is_no_layer():
    with pytest.raises(TypeError, match=r"chain, part '1': Linear makes a layer.*write Linear\("):
        chain(jnp.tanh, Linear)
    with pytest.raises(TypeError, match=r"parallel, part 'b'.*chain makes a layer"):
        parallel(a=jnp.tanh, b=chain)
    with pytest.raises(TypeError, match="part '0'.*function of one array, but got 3"):
        residual(3)
    with pytest.raises(TypeError, match="Name all of them or none"):
        chain(jnp.tanh, out=Linear(3))
    for name in ("params", "state", "mode", "_hidden"):
        with pytest.raises(ValueError, match=f"no part can be called '{name}'"):
            network(**{name: Linear(3)})


def test_what_a_body_gets_wrong():
    @network(embed=Linear(3))
    def misspelt(net, x):
        return net.embedd(x)

    @network(embed=Linear(3))
    def early(net, x):
        return net.params["embed"]["W"] @ net.embed(x)

    with pytest.raises(AttributeError, match=r"misspelt has no part 'embedd'.*\['embed'\]"):
        misspelt.init(KEY, jnp.ones(3))
    with pytest.raises(KeyError, match="read before the part is called"):
        early.init(KEY, jnp.ones(3))


def test_what_a_layer_of_ones_own_gets_wrong():
    class NotADataclass(Layer):
        features: int = 3

        def __call__(self, params, x):
            return x

    with pytest.raises(TypeError, match=r"@dataclasses.dataclass\(frozen=True\) above"):
        NotADataclass()

    @dataclasses.dataclass(frozen=True)
    class Idle(Layer):
        pass

    with pytest.raises(TypeError, match=r"Idle must define __call__"):
        Idle()({}, jnp.ones(3))
    with pytest.raises(TypeError, match=r"Idle must define __call__"):
        chain(a=Idle()).init(KEY, jnp.ones(3))
    with pytest.raises(TypeError, match="Scale: start is an array .* never arrays"):
        Scale(jnp.ones(3))
    net = chain(Scale(2.0), Scale())
    np.testing.assert_array_equal(net(net.init(KEY, jnp.ones(3)), jnp.ones(3)), 2 * np.ones(3))


def test_residual_must_keep_the_shape():
    net = residual(Linear(4))
    with pytest.raises(ValueError, match=r"residual.*\(3,\).*\(4,\).*Linear\(4\)"):
        net.init(KEY, jnp.zeros(3))


# ------------------------------------------------------------------------------------ summary


def test_summary():
    net = chain(
        body=chain(hidden=Linear(100), act=jax.nn.relu),
        skip=residual(Linear(100)),
        output=Linear(10, use_bias=False),
    )
    x = jax.ShapeDtypeStruct((784,), jnp.float32)
    with jax.enable_x64(False):
        table = summary(net, x)
    rows = {row.path: row for row in table.rows}
    assert list(rows) == [
        (),
        ("body",),
        ("body", "hidden"),
        ("body", "act"),
        ("skip",),
        ("skip", "0"),
        ("output",),
    ]
    params = net.init(KEY, x)
    assert table.parameters == sum(p.size for p in jax.tree.leaves(params)) == 89_600
    assert rows["body", "hidden"].parameters == 78_500
    assert rows["output",].output.shape == (10,)
    assert rows["output",].flops == 2 * 100 * 10  # a product and a sum for each weight
    assert rows["skip",].flops == rows["skip", "0"].flops + 100
    # The whole is counted by itself: where XLA fuses, it may compute a number twice.
    parts = sum(rows[p,].flops for p in ("body", "skip", "output"))
    assert table.flops == pytest.approx(parts, rel=0.01)
    text = str(table)
    assert re.search(r"\n  hidden +Linear\(100\) +float32\[100\] +78,500 +156,900 +3,136\n", text)
    assert re.search(r"total .*float32\[10\] +89,600 +\d", text)
    # Of each Linear its input; of jax.nn.relu a mask of one byte for each number.
    assert rows["body", "hidden"].kept == 4 * 784
    assert rows["output",].kept == 4 * 100
    assert table.kept == 4 * 784 + 100 + 4 * 100 + 4 * 100
    assert len({len(line) for line in text.splitlines() if "─" not in line}) <= 2


@exhaustive
def test_summary_counts_what_is_kept():
    """Each array once; of a loop, what all rounds keep; of checkpoints, where they start."""
    block = residual(hidden=Linear(16), act=ops.tanh)
    x = jax.ShapeDtypeStruct((3, 16), jnp.float32)
    with jax.enable_x64(False):
        kept = lambda net: summary(net, x).kept
        assert kept(block) == 4 * 2 * 48  # the input, and tanh's output
        assert kept(chain(block, block)) == 4 * 4 * 48
        assert kept(chain(lambda x: x * 2, lambda x: x + 1)) == 0
        assert kept(chain(ops.tanh, ops.tanh)) == 4 * 2 * 48
        rounds, again = (summary(chain(repeat(block, 5, remat=r)), x) for r in (None, True))
        # With the weights' transposes, which the rounds of a loop keep as well.
        assert rounds.kept == 5 * 4 * (2 * 48 + 256) and again.kept == 5 * 4 * 48
        assert rounds.rows[2].kept == again.rows[2].kept == 5 * 4 * 48


def test_summary_of_one_layer_of_a_function_and_of_a_tree():
    assert "Linear(3)" in str(summary(Linear(3), jnp.zeros(2)))
    assert summary(jnp.tanh, jnp.zeros(2)).parameters == 0
    net = chain(pair=lambda xs: xs["a"] + xs["b"], out=Linear(2))
    table = summary(net, {"a": jnp.zeros(3), "b": jnp.zeros(3)})
    assert table.parameters == 8
    table = summary(parallel(a=Linear(2), b=jnp.sin), jnp.zeros(3))
    assert "float64[2], float64[3]" in str(table)


def test_summary_of_shared_and_repeated_parts():
    @network(layer=Linear(3))
    def twice(net, x):
        return net.layer(net.layer(x))

    table = summary(chain(twice=twice, blocks=repeat(residual(Linear(3)), 5)), jnp.zeros(3))
    rows = [(row.path, row.layer, row.parameters) for row in table.rows]
    assert rows[1:] == [
        (("twice",), "twice(layer=Linear(3))", 12),
        (("twice", "layer"), "Linear(3)", 12),
        (("twice", "layer"), "Linear(3)", 0),
        (("blocks",), "repeat(residual(Linear(3)), 5)", 60),
        (("blocks", "0"), "Linear(3)", 60),
    ]
    assert table.parameters == 72
    by_path = {row.path: row.flops for row in table.rows}
    assert by_path["blocks", "0"] == 5 * (2 * 9 + 3)
    assert 5 * (2 * 9 + 6) <= by_path["blocks",] <= 5 * (2 * 9 + 6) + 25  # XLA counts its counter


def test_summary_counts_all_turns_of_loops():
    """As if they were written out: unrolled in part, loops in loops, side by side, in pieces."""
    x = jnp.zeros((3, 8))
    flops = lambda net, x=x: summary(net, x).flops
    wanted = lambda count: pytest.approx(count * flops(Linear(8)), abs=60)  # and XLA's counters
    for n, unroll in ((4, 2), (5, 2), (4, 4), (2, 5)):
        assert flops(repeat(Linear(8), n, unroll=unroll)) == wanted(n)
    assert flops(repeat(repeat(Linear(8), 5, unroll=2), 3)) == wanted(15)
    experts = MixtureOfExperts(repeat(Linear(8), 5), 4)
    assert flops(experts) == pytest.approx(
        flops(MixtureOfExperts(chain(*[Linear(8)] * 5), 4)), abs=60
    )
    sequence = jnp.zeros((10, 8))
    once = flops(LSTM(8), sequence)
    assert flops(repeat(LSTM(8), 3), sequence) == pytest.approx(3 * once, abs=60)
    assert flops(LSTM(8, remat=True), sequence) == pytest.approx(once, abs=60)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 100}])
def test_summary_counts_all_blocks_of_attention(options):
    """Products of whole blocks of 128 positions, in a loop from two on; and softmax beside them."""
    features, count = 64, 512
    layer = Attention(4, **options)
    found = summary(layer, jnp.zeros((count, features))).flops
    blocks = {1: 16, 2: 10, 3: 7}[1 + len(options)]  # of 4 x 4; the window's reach one beside
    products = 8 * count * features**2 + blocks * 4 * 128**2 * features
    assert products < found < 1.12 * products
    assert summary(repeat(layer, 3), jnp.zeros((count, features))).flops == pytest.approx(
        3 * found, rel=1e-3
    )


def test_summary_of_a_network_with_state_and_several_inputs():
    @network(left=Linear(2), norm=BatchNorm(), drop=Dropout(0.5))
    def both(net, x, y):
        return net.drop(net.norm(net.left(x) + y))

    table = summary(both, jnp.zeros(3), jnp.zeros(2))
    assert [row.path for row in table.rows] == [(), ("left",), ("norm",), ("drop",)]
    assert table.parameters == 8 + 4

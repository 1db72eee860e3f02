"""Routing and mixtures of experts: against loops over tokens and experts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from sweeps import exhaustive, sweep

import fnn
import fnn.per_example as pe
from fnn import layers, ops
from fnn.layers import (
    Dropout,
    LayerError,
    Linear,
    MixtureOfExperts,
    chain,
    network,
    repeat,
    summary,
    training,
)

KEY = jax.random.key(0)
EXPERT = chain(hidden=Linear(6), act=ops.gelu, out=Linear(4))


def R(i, *shape):
    return jnp.asarray(np.random.default_rng([i, *shape]).normal(size=shape))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def places_by_hand(experts, capacity):
    """All first choices, token by token, then all second ones."""
    taken, places = {}, np.zeros(experts.shape, int)
    for choice in range(experts.shape[1]):
        for token in range(len(experts)):
            e = experts[token, choice]
            places[token, choice] = min(taken.get(e, 0), capacity)
            taken[e] = taken.get(e, 0) + 1
    return places


@pytest.mark.parametrize(("k", "capacity"), [(1, 2), (2, 3), (3, None)])
def test_routing(k, capacity):
    logits = R(0, 7, 4)
    found = ops.top_k_routing(logits, k, capacity)
    p = np.stack([softmax(z) for z in np.asarray(logits)])
    experts = np.argsort(-p, axis=1)[:, :k]
    np.testing.assert_array_equal(found.experts, experts)
    assert found.capacity == (capacity or 7)
    places = places_by_hand(experts, found.capacity)
    np.testing.assert_array_equal(found.places, places)
    weights = np.take_along_axis(p, experts, 1)
    if k > 1:
        weights = weights / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(found.weights, np.where(places < found.capacity, weights, 0))
    share = np.bincount(experts.ravel(), minlength=4) / experts.size
    np.testing.assert_allclose(found.balance_loss, 4 * share @ p.mean(0))
    sums = np.log(np.exp(np.asarray(logits)).sum(1))
    np.testing.assert_allclose(found.z_loss, np.mean(sums**2))


def test_the_second_best_is_second_however_far_behind():
    """Where the softmax of all others is 0."""
    logits = jnp.asarray([[0.0, -3000.0, -2000.0, -4000.0]])
    np.testing.assert_array_equal(ops.top_k_routing(logits, 3).experts, [[0, 2, 1]])
    np.testing.assert_array_equal(ops.top_k_routing(logits, 3).weights, [[1, 0, 0]])


def test_the_balance_loss_is_1_where_all_is_balanced_and_its_gradient_balances():
    balance = lambda z: ops.top_k_routing(z, 1).balance_loss
    crowded = jnp.zeros((5, 4)).at[:, 2].set(1.0)
    excluded = jnp.zeros((3, 4)).at[:, 1].set(-jnp.inf)
    balanced, g, none, finite = jax.jit(
        lambda: (
            balance(10 * jnp.eye(4)),
            jax.grad(balance)(crowded),
            jax.grad(lambda z: sum(map(jnp.sum, ops.top_k_routing(z, 2)[-2:])))(jnp.zeros((0, 4))),
            jax.grad(balance)(excluded),
        )
    )()
    assert balanced == pytest.approx(1, rel=1e-3)
    assert np.all(g[:, 2] > 0) and np.all(np.delete(g, 2, 1) < 0)
    assert none.shape == (0, 4)
    chex.assert_tree_all_finite(finite)
    half = jax.eval_shape(lambda z: ops.top_k_routing(z, 2), crowded.astype(jnp.bfloat16))
    assert half.weights.dtype == jnp.bfloat16 and half.balance_loss.dtype == jnp.float32


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"'logits' has shape \(4,\), wanted \(tokens, experts\)"):
        ops.top_k_routing(jnp.zeros(4), 1)
    with pytest.raises(ValueError, match="at least k=5 experts"):
        ops.top_k_routing(jnp.zeros((3, 4)), 5)
    with pytest.raises(TypeError, match="'logits' .* wanted a real floating dtype"):
        ops.top_k_routing(jnp.zeros((3, 4), int), 2)
    with pytest.raises(ValueError, match="capacity must be an integer of at least 1"):
        ops.top_k_routing(jnp.zeros((3, 4)), 2, 0)


# ------------------------------------------------------------------------------------ the layer


def by_hand(layer, params, x, capacity):
    """Token by token, expert by expert."""
    routing = ops.top_k_routing(x @ params["router"]["W"].T, layer.k, capacity)
    ys = []
    for t in range(len(x)):
        y = jnp.zeros(4)
        for j in range(layer.k):
            e = int(routing.experts[t, j])
            own = jax.tree.map(lambda a, e=e: a[e], params["experts"])
            if routing.places[t, j] < capacity:
                y += routing.weights[t, j] * EXPERT(own, x[t])
        ys.append(y)
    return jnp.stack(ys)


@exhaustive
@pytest.mark.parametrize("way", sweep([(1, 1.0, 2), (2, None, 8)], [(1, 1.0, 2)]), ids=str)
def test_the_layer(way):
    k, factor, capacity = way
    layer, x = MixtureOfExperts(EXPERT, 4, k, capacity_factor=factor), R(0, 8, 5)
    params = layer.init(KEY, x)
    assert params["router"]["W"].shape == (4, 5)
    assert params["experts"]["hidden"]["W"].shape == (4, 6, 5)
    W = np.asarray(params["experts"]["hidden"]["W"])
    assert not np.allclose(W[0], W[1])
    loss = lambda f: lambda p, x: jnp.sum(jnp.sin(f(p, x)))
    found = jax.jit(jax.value_and_grad(loss(layer), (0, 1)))(params, x)
    by_loop = loss(lambda p, x: by_hand(layer, p, x, capacity))
    np.testing.assert_allclose(found[0], by_loop(params, x), rtol=1e-6)
    if factor is not None:
        return
    chex.assert_trees_all_close(
        jax.jit(fnn.grad(loss(layer), (0, 1)))(params, x), found[1], rtol=1e-6, atol=1e-9
    )


@exhaustive
def test_per_example_gradients_stay_factored():
    layer, xs = MixtureOfExperts(EXPERT, 4, 2), R(0, 3, 2, 5)
    params = layer.init(KEY, xs[0])
    loss = lambda p, x: jnp.sum(jnp.sin(layer(p, x)))

    @jax.jit
    def both(params, xs):
        _, g = pe.grads(loss)(params, xs)
        wanted = jax.vmap(jax.grad(loss), (None, 0))(params, xs)
        return (pe.materialize(g), pe.norms(g)), wanted

    (found, norms), wanted = both(params, xs)
    chex.assert_trees_all_close(found, wanted, rtol=1e-9, atol=1e-12)
    flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(wanted)
    np.testing.assert_allclose(norms, jnp.linalg.norm(flat, axis=1), rtol=1e-9)
    _, g = jax.eval_shape(pe.grads(loss), params, xs)
    kept = {row["path"]: row["kept"] for row in pe.explain(g)}
    assert kept["['experts']['hidden']['W']"] == "4 × A (2 × 5), G (2 × 6)"
    assert kept["['router']['W']"] == "A (2 × 5), G (2 × 4)"


@exhaustive
def test_kronecker_factors():
    layer, xs = MixtureOfExperts(EXPERT, 2, 1), R(0, 1, 1, 3)
    params = layer.init(KEY, xs[0])
    model = lambda p, x: jnp.sum(layer(p, x))
    found = fnn.curvature.kronecker_factors(model, lambda y, _: y**2)(params, (xs, jnp.zeros(1)))
    flat, unravel = ravel_pytree(params)
    J = jax.grad(lambda v: model(unravel(v), xs[0]))(flat)
    # Within each expert; between two experts a block of a stack is zero.
    start = 0
    leaves = jax.tree.leaves(found, is_leaf=lambda f: hasattr(f, "to_dense"))
    for leaf, p in zip(leaves, jax.tree.leaves(params), strict=True):
        own = np.asarray(J[start : start + p.size])
        start += p.size
        np.testing.assert_allclose(np.diag(leaf.to_dense()), 2 * own**2, rtol=1e-8, atol=1e-12)


@exhaustive
def test_in_networks():
    @network(moe=MixtureOfExperts(EXPERT, 3, 2, return_losses=True))
    def block(net, carried):
        x, losses = carried
        y, own = net.moe(x)
        return x + y, losses + 0.01 * own["balance"] + 0.001 * own["z"]

    net, x = repeat(block, 2), R(0, 5, 4)
    params = net.init(KEY, (x, jnp.zeros(())))
    y, losses = jax.jit(net)(params, (x, jnp.zeros(())))
    assert y.shape == (5, 4) and losses.shape == () and losses > 0.02
    layer = MixtureOfExperts(chain(hidden=Linear(4), drop=Dropout(0.5)), 3)
    own = layer.init(KEY, x)
    ys = jax.jit(lambda: (layer(own, x), layer(own, x, mode=training(KEY))))()
    assert not np.allclose(*ys)
    table = summary(layer, x)
    rows = {row.path: row for row in table.rows}
    assert rows["hidden",].parameters == 3 * 20
    assert rows["hidden",].flops == 3 * (2 * 5 * 16 + 20)
    assert table.flops < 4 * rows["hidden",].flops
    with pytest.raises(LayerError, match=r"wants an input of shape \(positions, features\)"):
        layer.init(KEY, x[0])
    with pytest.raises(
        LayerError, match=r"axis of length 3 in front.*\['W'\] has shape \(2, 4, 4\)"
    ):
        few = jax.tree.map(lambda a: a[:2], own["experts"])
        layer({"router": own["router"], "experts": few}, x)
    with pytest.raises(
        LayerError, match=r"wants W of shape \(3, 4\), but got one of shape \(4, 3\)"
    ):
        layer({"router": {"W": own["router"]["W"].T}, "experts": own["experts"]}, x)
    with pytest.raises(ValueError, match="k must be an integer of at most 3"):
        MixtureOfExperts(Linear(4), 3, 4)


def test_strict_promotion_of_float32_with_x64():
    layer, x = MixtureOfExperts(Linear(3), 2, 1, capacity_factor=1.0), R(0, 4, 5).astype("float32")
    params = jax.tree.map(lambda a: a.astype("float32"), layer.init(KEY, x))
    with jax.numpy_dtype_promotion("strict"):
        found = jax.jit(layer)(params, x)
    assert found.dtype == "float32"
    np.testing.assert_allclose(found, layer(params, x), rtol=1e-5)


def test_positions_of_numpy():
    layer, x = MixtureOfExperts(Linear(3), 2), np.ones((4, 5))
    params = layer.init(KEY, x)
    np.testing.assert_array_equal(layer(params, x), layer(params, jnp.asarray(x)))


@exhaustive
def test_no_positions():
    layer = layers.MixtureOfExperts(layers.GatedMLP(4), 3, return_losses=True)
    x = jnp.zeros((0, 4))
    params = layer.init(jax.random.key(0), x)
    y, losses = layer(params, x)
    assert y.shape == (0, 4)
    assert losses == {"balance": 0, "z": 0}

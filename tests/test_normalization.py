"""Normalisation, operations and layers: against plain formulas, Flax and materialised gradients."""

import functools
import re

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn
from fnn import layers, ops
from fnn.layers import (
    BatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerError,
    LayerNorm,
    Linear,
    RMSNorm,
    SpectralNorm,
    WeightNorm,
    chain,
    training,
)
from fnn.ops.normalization import power_iteration

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


X, SCALE, BIAS, G = normal(0, 3, 5, 6), normal(1, 6), normal(2, 6), normal(3, 3, 5, 6)
MASKS = {
    "all": None,
    "positions": normal(4, 3, 5, 1) > -0.5,
    "entries": (normal(5, 3, 5, 6) > -0.5).at[0].set(False),  # of some sets, none
    "features": jnp.asarray([True, True, False, True, True, False]),
}


def plain(x, scale, bias, mask, axes, epsilon=1e-5, centred=True):
    """The formula, with the statistics of what counts, and 0 for the rest."""
    counts = jnp.broadcast_to(True if mask is None else mask, x.shape)
    mean_of = lambda a: (
        jnp.sum(jnp.where(counts, a, 0), axes, keepdims=True)
        / jnp.maximum(jnp.sum(counts, axes, keepdims=True), 1)
    )
    c = x - mean_of(x) if centred else x
    y = scale * c / jnp.sqrt(mean_of(c * c) + epsilon) + bias
    return jnp.where(counts, y, 0)


def plain_groups(x, scale, bias, mask, groups=2):
    cut = lambda a: a.reshape(*a.shape[:-1], groups, -1)
    mask = None if mask is None else cut(jnp.broadcast_to(mask, x.shape))
    y = plain(cut(x), cut(scale), cut(bias), mask, (*range(x.ndim - 1), x.ndim))
    return y.reshape(x.shape)


NORMS = {
    "rms_norm": (
        lambda x, s, b, m: ops.rms_norm(x, s, m),
        lambda x, s, b, m: plain(x, s, 0, m, (-1,), 1e-6, centred=False),
    ),
    "layer_norm": (ops.layer_norm, lambda *a: plain(*a, (-1,))),
    "layer_norm of two axes": (
        lambda x, s, b, m: ops.layer_norm(x, X[0] * s, b + X[1], m, axis=(2, 1)),
        lambda x, s, b, m: plain(x, X[0] * s, b + X[1], m, (1, 2)),
    ),
    "group_norm": (functools.partial(ops.group_norm, groups=2), plain_groups),
    "instance_norm": (ops.instance_norm, lambda *a: plain(*a, (0, 1))),
    "batch_norm": (
        lambda x, s, b, m: jax.vmap(
            lambda x, m: ops.batch_norm(x, s, b, m, axis_name="batch")[0],
            (0, 0 if m is not None and m.ndim == 3 else None),
            axis_name="batch",
        )(x, m),
        lambda *a: plain(*a, (0, 1)),
    ),
}


def derivatives(f, mask):
    def of(x, s, b):
        value = lambda x, s, b: jnp.sum(G * f(x, s, b, mask))
        gradient = jax.grad(value, (0, 1, 2))
        along = G, s * b, b * b
        return f(x, s, b, mask), gradient(x, s, b), jax.jvp(gradient, (x, s, b), along)[1]

    return of


@exhaustive
@pytest.mark.parametrize("mask", sweep(MASKS, ["all", "entries"]))
def test_formulas(mask):
    """Values, gradients, and a derivative of these."""
    ours, wanted = (
        jax.jit(lambda *a, k=k: {n: derivatives(f[k], MASKS[mask])(*a) for n, f in NORMS.items()})(
            X, SCALE, BIAS
        )
        for k in (0, 1)
    )
    chex.assert_trees_all_close(ours, wanted, rtol=1e-8, atol=1e-9)


@exhaustive
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "group_norm"])
def test_rules(name):
    static = {"groups": 2} if name == "group_norm" else {}
    weights = (SCALE,) if name == "rms_norm" else (SCALE, BIAS)
    options = {"dtypes": ("bfloat16",), "max_entries": 16}
    fnn.check_rule(getattr(ops, name), X[0], *weights, **static, **options)


def test_gradients_are_at_right_angles_to_what_changes_nothing():
    """x of another length gives the same y, and so does x + 1 but for `rms_norm`."""
    norms = {
        "rms_norm": lambda x: ops.rms_norm(x, SCALE, epsilon=0),
        "layer_norm": lambda x: ops.layer_norm(x, SCALE, BIAS, epsilon=0),
        "group_norm": lambda x: ops.group_norm(x, SCALE, BIAS, groups=2, epsilon=0),
    }
    gradients = jax.jit(lambda x: {n: jax.vjp(f, x)[1](G)[0] for n, f in norms.items()})(X)
    for name, d in gradients.items():
        axis = None if name == "group_norm" else -1
        assert np.max(np.abs(d)) > 0.1
        np.testing.assert_allclose(np.sum(d * X, axis), 0, atol=1e-9, err_msg=name)
        if name != "rms_norm":
            np.testing.assert_allclose(np.sum(d, axis), 0, atol=1e-9, err_msg=name)


def test_what_does_not_count_may_be_anything():
    """No nan comes of it, neither in the value nor in first and second derivatives."""
    mask = MASKS["entries"]

    @jax.jit
    def of(x):
        everything = {}
        for name, (norm, _) in NORMS.items():
            f = lambda x, norm=norm: norm(x, SCALE, BIAS, mask)
            gradient = jax.grad(lambda x, f=f: jnp.sum(G * f(x)))
            everything[name] = f(x), gradient(x), jax.jvp(gradient, (x,), (G,))[1]
        return everything

    wanted = of(X)
    for anything in (jnp.nan, jnp.inf, -jnp.inf):
        found = of(jnp.where(mask, X, anything))
        chex.assert_trees_all_close(found, wanted, rtol=1e-9)
    hidden = jax.tree.map(lambda a: jnp.where(mask, 0, a), wanted)
    assert all(not np.any(a) for a in jax.tree.leaves(hidden))


@pytest.mark.parametrize(
    ("dtype", "shift", "size", "tolerance"),
    [
        pytest.param("float32", 0, 1e-12, 1e-5, marks=exhaustive),
        ("float32", 0, 1e12, 1e-5),
        ("float32", 1e12, 1e8, 2e-2),  # of which a unit in the last place is 65,536
        pytest.param("bfloat16", 1000, 100, 2e-2, marks=exhaustive),
        ("float16", 0, 1e4, 2e-3),  # whose squares are no float16
    ],
)
def test_sizes(dtype, shift, size, tolerance):
    """As in float64, from the numbers as they are rounded: the variance isn't E[x²] − μ²."""
    x = (shift + size * X).astype(dtype)
    exact = x.astype("float64")
    epsilon = 1e-36

    @jax.jit
    def both(x):
        norms = (
            lambda x: ops.layer_norm(x, epsilon=epsilon),
            lambda x: ops.rms_norm(x, epsilon=epsilon),
            lambda x: ops.group_norm(x, groups=2, epsilon=epsilon),
            lambda x: ops.batch_norm(x, epsilon=epsilon)[0],
        )
        return [(f(x), jax.vjp(f, x)[1](G.astype(x.dtype))[0]) for f in norms]

    for (y, d), (y_exact, d_exact) in zip(both(x), both(exact), strict=True):
        assert y.dtype == d.dtype == dtype
        np.testing.assert_allclose(np.asarray(y, float), y_exact, atol=2 * tolerance)
        largest = np.max(np.abs(d_exact))
        least = float(jnp.finfo(dtype).smallest_subnormal)
        np.testing.assert_allclose(
            np.asarray(d, float), d_exact, atol=3 * tolerance * largest + least
        )


def test_equal_numbers_without_epsilon_and_no_numbers():
    everything = (
        lambda x: ops.layer_norm(x, epsilon=0),
        lambda x: ops.rms_norm(x - x, epsilon=0),
        lambda x: ops.group_norm(x, groups=2, epsilon=0),
        lambda x: ops.batch_norm(x, epsilon=0)[0],
    )

    @jax.jit
    def both(x):
        return [(f(x), jax.vjp(f, x)[1](jnp.ones_like(x))[0]) for f in everything]

    for x in (jnp.full((3, 4), 7.0), jnp.zeros((0, 4))):
        for y, d in both(x):
            assert y.shape == x.shape and not np.any(y) and not np.any(d)
    assert ops.layer_norm(jnp.zeros((3, 0))).shape == (3, 0)


def test_what_is_kept():
    """x itself, and the statistics: not what is normalised."""
    x = jnp.ones((16, 64), jnp.bfloat16)
    w = jnp.ones(64, jnp.bfloat16)
    for f, statistics in (
        (lambda x: ops.rms_norm(x, w), 16),
        (lambda x: ops.layer_norm(x, w, w), 32),
        (lambda x: ops.group_norm(x, w, w, groups=4), 8),
        (lambda x: ops.batch_norm(x, w, w)[0], 3 * 64),
    ):
        kept = jax.tree.leaves(jax.eval_shape(lambda x, f=f: jax.vjp(f, x)[1], x))
        numbers = sum(k.size for k in kept if k.shape != x.shape)
        assert {k.dtype for k in kept if k.shape == x.shape} == {jnp.dtype("bfloat16")}
        assert numbers <= statistics + 2 * w.size


def test_a_batch_over_devices():
    """Under shard_map the statistics go over the devices' axis."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    xs = normal(6, 8, 6)

    def ours(xs, s, b):
        y = ops.batch_norm(xs, s, b, axis_name="data")[0]
        return jax.lax.psum(jnp.sum(y**3), "data")

    total = jax.shard_map(ours, mesh=mesh, in_specs=(P("data"), P(), P()), out_specs=P())
    wanted = lambda xs, s, b: jnp.sum(plain(xs, s, b, None, (0,)) ** 3)
    found, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2)))(xs, SCALE, BIAS) for f in (total, wanted)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-12)


def test_arguments():
    for call, message in (
        (
            lambda: ops.layer_norm(X, SCALE[:3]),
            r"layer_norm: argument 'scale' .*\(3,\), wanted \(6,\)",
        ),
        (
            lambda: ops.layer_norm(X, axis=(0, 1), bias=BIAS),
            r"'bias' has shape \(6,\), wanted \(3, 5\)",
        ),
        (
            lambda: ops.rms_norm(X, mask=MASKS["positions"][..., 0]),
            r"'mask' .*\(3, 5\).*\(3, 5, 6\)",
        ),
        (lambda: ops.instance_norm(X, epsilon=-1), "instance_norm: epsilon must be"),
        (lambda: ops.instance_norm(X, SCALE[:2]), "instance_norm: argument 'scale' has shape"),
        (lambda: ops.group_norm(X, groups=4), r"'x' has shape \(3, 5, 6\).* groups=4 divides"),
        (
            lambda: ops.instance_norm(X[0, 0, 0]),
            r"instance_norm: .*\(\), wanted \(\.\.\., features\)",
        ),
        (
            lambda: ops.batch_norm(X, SCALE[:2]),
            r"batch_norm: argument 'scale' .*\(2,\), wanted \(6,\)",
        ),
        (lambda: ops.group_norm(X, groups=0), "groups must be an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="layer_norm: argument 'mask' .* wanted booleans"):
        ops.layer_norm(X, mask=jnp.ones(6))
    with pytest.raises(TypeError, match="batch_norm: .* wanted a real floating dtype"):
        ops.batch_norm(jnp.ones((3, 4), int))


# ------------------------------------------------------------------------------------- layers

LAYERS = {
    "LayerNorm": (LayerNorm(), linen.LayerNorm(epsilon=1e-5, use_fast_variance=False)),
    "RMSNorm": (RMSNorm(), linen.RMSNorm()),
    "GroupNorm": (GroupNorm(3), linen.GroupNorm(3, epsilon=1e-5, use_fast_variance=False)),
    "InstanceNorm": (
        InstanceNorm(),
        linen.InstanceNorm(epsilon=1e-5, use_fast_variance=False),
    ),
}


@exhaustive
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_flax_s(name):
    layer, theirs = LAYERS[name]
    params = layer.init(KEY, X)
    assert all(w.shape == (6,) for w in params.values())
    params = {n: w + 0.1 * SCALE for n, w in params.items()}
    for mask in (None, jnp.broadcast_to(MASKS["positions"], X.shape)):
        y = layer(params, X, mask)
        wanted = theirs.apply(
            {"params": params}, X[None], mask=None if mask is None else mask[None]
        )
        counts = True if mask is None else mask
        np.testing.assert_allclose(y, jnp.where(counts, wanted[0], 0), rtol=1e-6, atol=1e-6)
    assert layer(params, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    assert type(layer)(**{"groups": 3} if name == "GroupNorm" else {}) == layer
    assert f"{len(params) * 6:>12}" in str(fnn.layers.summary(layer, X))


@exhaustive
def test_batch_norm_with_a_mask_is_flax_s():
    layer, mask = BatchNorm(decay=0.75), MASKS["positions"]
    params = {"scale": SCALE, "bias": BIAS}
    state = layer.init_state(X[0])
    apply = lambda x, m: layer.apply(params, state, x, m, mode=training(None, "batch"))
    ys, new = jax.vmap(apply, out_axes=(0, None), axis_name="batch")(X, mask)
    theirs = linen.BatchNorm(use_running_average=False, epsilon=1e-5, use_fast_variance=False)
    given = {"params": params, "batch_stats": {"mean": jnp.zeros(6), "var": jnp.ones(6)}}
    wanted, stats = theirs.apply(given, X, mask=mask, mutable="batch_stats")
    np.testing.assert_allclose(ys, jnp.where(mask, wanted, 0), rtol=1e-6, atol=1e-6)
    count = float(mask.sum())
    mean, variance = (
        stats["batch_stats"]["mean"] / 0.01,
        (stats["batch_stats"]["var"] - 0.99) / 0.01,
    )
    found = new["statistics"]
    np.testing.assert_allclose(found["mean"], 0.25 * mean, rtol=1e-6)
    unbiased = variance * count / (count - 1)
    np.testing.assert_allclose(found["variance"], 0.75 + 0.25 * unbiased, rtol=1e-6)
    # A batch in which nothing counts leaves the statistics as they are.
    _, same = jax.vmap(apply, out_axes=(0, None), axis_name="batch")(X, mask & False)
    chex.assert_trees_all_equal(same, state)


def test_layer_errors():
    of_batch = BatchNorm()
    params, state = of_batch.init(KEY, X), of_batch.init_state(X)
    with pytest.raises(TypeError, match="'x' of shape .* has dtype int64, wanted a real floating"):
        of_batch.apply(params, state, X.astype(int))
    for mask, error, message in (
        (jnp.ones((7, 1, 1), bool), ValueError, r"'mask' has shape \(7, 1, 1\), which doesn't"),
        (jnp.ones(5, bool), ValueError, r"'mask' has shape \(5,\), which doesn't broadcast"),
        (jnp.ones((3, 5, 1)), TypeError, r"'mask' of shape \(3, 5, 1\) has dtype float64, wanted"),
    ):
        with pytest.raises(error, match=f"batch_norm: argument {message}"):
            of_batch.apply(params, state, X, mask)
    with pytest.raises(LayerError, match=r"GroupNorm\(4\) wants .* 4 groups divide, .*\(3, 5, 6\)"):
        GroupNorm(4).init(KEY, X)
    with pytest.raises(LayerError, match=r"InstanceNorm\(\) .* over positions, .*\(6,\)"):
        InstanceNorm()({"scale": SCALE, "bias": BIAS}, X[0, 0])
    with pytest.raises(LayerError, match=r"^1: RMSNorm\(\) wants scale of shape \(2,\)"):
        chain(Linear(2), RMSNorm())(
            {"0": {"W": jnp.ones((2, 6)), "b": jnp.ones(2)}, "1": {"scale": SCALE}}, X
        )


@exhaustive
def test_gradients_of_examples():
    """Weights on either side of a norm keep their factors; scale and bias are a few numbers."""
    net = chain(
        a=Linear(8), rms=RMSNorm(), b=Linear(8), layer=LayerNorm(), c=Linear(8),
        group=GroupNorm(2), d=Linear(8),
    )  # fmt: skip
    batch = normal(7, 3, 2, 8)
    params = net.init(KEY, batch[0])
    loss = lambda p, x: jnp.sum(jnp.sin(net(p, x)) ** 2)

    @jax.jit
    def found(params, batch):
        _, grads = fnn.per_example.grads(loss)(params, batch)
        return grads, fnn.per_example.materialize(grads), fnn.per_example.norms(grads)

    grads, formed, norms = found(params, batch)
    wanted = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
    chex.assert_trees_all_close(formed, wanted, rtol=1e-9, atol=1e-9)
    squares = sum(np.sum(np.square(g), (*range(1, g.ndim),)) for g in jax.tree.leaves(wanted))
    np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-9)
    text = str(fnn.per_example.explain(grads))
    for part in "abcd":
        assert re.search(rf"\['{part}'\]\['W'\] .*gradient is Gᵀ A", text), text


@exhaustive
def test_kronecker_factors():
    """Of weights beside a norm, products; of scales and biases, blocks that are the GGN's."""
    net = chain(a=Linear(4), layer=LayerNorm(), b=Linear(4), rms=RMSNorm(), c=Linear(3))
    batch = normal(7, 5, 4), jnp.arange(5) % 3
    params = net.init(KEY, batch[0][0])
    both = lambda make: jax.jit(lambda p, b: make(net, ops.softmax_cross_entropy)(p, b))
    factors = both(fnn.curvature.kronecker_factors)(params, batch)
    diagonal = both(fnn.curvature.ggn_diagonal)(params, batch)
    for part in ("a", "b", "c"):
        assert isinstance(factors[part]["W"], fnn.curvature.Kronecker)
    for part, name in (("layer", "scale"), ("layer", "bias"), ("rms", "scale"), ("c", "b")):
        found = jnp.diag(factors[part][name].to_dense())
        np.testing.assert_allclose(found, diagonal[part][name], rtol=1e-9)


def test_the_gradient_of_one_example_of_a_batch_is_refused():
    net = chain(Linear(3), BatchNorm())
    x = normal(8, 4)
    params, state = net.init(KEY, x), net.init_state(x)
    loss = lambda p, x: jnp.sum(net.apply(p, state, x, mode=training(None, "batch"))[0])
    with pytest.raises(ValueError, match="depends on other examples"):
        fnn.per_example.grads(loss)(params, x[None])


# ------------------------------------------------------------------------------------ weights


def test_weight_norm():
    layer = WeightNorm(Linear(3))
    params = layer.init(KEY, X[0, 0])
    assert jax.tree.map(jnp.shape, params) == {"v": (3, 6), "g": (3,), "b": (3,)}
    np.testing.assert_allclose(layer(params, X), Linear(3)(Linear(3).init(KEY, X), X), rtol=1e-12)
    for dtype, size in (("float64", 1e-200), ("float64", 1e200), ("float16", 1e-4)):
        start = lambda key, shape, _, dtype=dtype, size=size: jnp.full(shape, size, dtype)
        small = WeightNorm(Linear(3, weight_init=start, use_bias=False)).init(KEY, X[0, 0])
        np.testing.assert_allclose(small["g"], size * np.sqrt(6), rtol=1e-3)
        assert small["g"].dtype == dtype
    params["g"] = 2 * params["g"]
    params["v"] = params["v"] * jnp.asarray([[1e-200], [1.0], [1e200]])  # whose squares are none
    wanted = 2 * (layer(layer.init(KEY, X[0, 0]), X))
    np.testing.assert_allclose(layer(params, X), wanted, rtol=1e-12)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(layer(p, X) ** 2)))(params)
    chex.assert_tree_all_finite(gradient)
    along = np.sum(np.asarray(gradient["v"] * params["v"]), 1)  # the length of v changes nothing
    assert np.all(np.abs(along) < 1e-9)
    zero = jax.jit(jax.grad(lambda v: jnp.sum(ops.weight_norm(v, jnp.ones(2)))))(jnp.zeros((2, 3)))
    assert not np.any(zero)
    with pytest.raises(LayerError, match=r"wants g of shape \(3,\), but got one of shape \(1,\)"):
        layer(params | {"g": jnp.ones(1)}, X)
    with pytest.raises(ValueError, match=r"weight_norm: argument 'g' .*\(2,\), wanted \(3,\)"):
        ops.weight_norm(jnp.ones((3, 4)), jnp.ones(2))


def test_spectral_norm():
    layer = SpectralNorm(Linear(5))
    params, state = layer.init(KEY, X[0, 0]), layer.init_state(X[0, 0])
    assert jax.tree.map(jnp.shape, state) == {"statistics": {"u": (5,), "v": (6,)}}
    train = jax.jit(lambda state: layer.apply(params, state, X, mode=training(None)))
    for _ in range(200):
        y, state = train(state)
    sigma = np.linalg.svd(np.asarray(params["W"]), compute_uv=False)[0]
    wanted = X @ params["W"].T / sigma + params["b"]
    np.testing.assert_allclose(y, wanted, rtol=1e-6)
    evaluated, same = layer.apply(params, state, X)
    np.testing.assert_allclose(evaluated, wanted, rtol=1e-6)
    assert same is state
    # Moving W along itself changes nothing.
    loss = lambda params: jnp.sum(layer.apply(params, state, X)[0] ** 3)
    gradient = jax.jit(jax.grad(loss))(params)
    assert abs(jnp.vdot(gradient["W"], params["W"])) < 1e-9 * jnp.linalg.norm(gradient["W"])
    fresh, _ = layer.apply(params, layer.init_state(X[0, 0]), X)
    assert np.all(np.isfinite(fresh))
    with pytest.raises(LayerError, match="has a state"):
        layer(params, X)
    with pytest.raises(LayerError, match="wants a layer without a state"):
        SpectralNorm(BatchNorm()).init_state(X)
    with pytest.raises(ValueError, match=r"spectral_norm: argument 'v' .*\(4,\), wanted \(3,\)"):
        ops.spectral_norm(jnp.ones((2, 3)), jnp.ones(2), jnp.ones(4))


def test_norms_of_weights_are_pytorch_s():
    torch = pytest.importorskip("torch")
    parametrizations = torch.nn.utils.parametrizations
    x = normal(9, 4, 6)
    for make, wrap in (
        (parametrizations.weight_norm, WeightNorm),
        (parametrizations.spectral_norm, SpectralNorm),
    ):
        theirs = torch.nn.Linear(6, 5, dtype=torch.float64)
        layer = wrap(Linear(5))
        W = jnp.asarray(theirs.weight.detach().numpy())
        b = jnp.asarray(theirs.bias.detach().numpy())
        theirs = make(theirs)
        params, state = {"W": W, "b": b}, {}
        if wrap is WeightNorm:
            params = {"v": W, "g": jnp.linalg.norm(W, axis=1), "b": b}
        else:
            theirs.eval()  # in training each call moves u and v
            kept = theirs.parametrizations.weight[0]
            state = {"u": jnp.asarray(kept._u.numpy()), "v": jnp.asarray(kept._v.numpy())}
            state = {"statistics": state}
        loss = lambda p, layer=layer, state=state: jnp.sum(layer.apply(p, state, x)[0] ** 2)
        total = (theirs(torch.tensor(np.asarray(x))) ** 2).sum()
        total.backward()
        value, gradient = jax.value_and_grad(loss)(params)
        np.testing.assert_allclose(value, total.item(), rtol=1e-9)
        if wrap is WeightNorm:
            pairs = {"v": theirs.parametrizations.weight.original1}
            pairs["g"] = theirs.parametrizations.weight.original0
        else:
            pairs = {"W": theirs.parametrizations.weight.original}
        for name, w in pairs.items():
            wanted = w.grad.numpy().reshape(gradient[name].shape)
            np.testing.assert_allclose(gradient[name], wanted, rtol=1e-7, atol=1e-9)


@exhaustive
def test_gradients_of_examples_through_norms_of_weights():
    net = chain(a=WeightNorm(Linear(6)), f=jnp.tanh, b=SpectralNorm(Linear(5)))
    batch = normal(7, 4, 5)
    params, state = net.init(KEY, batch[0]), net.init_state(batch[0])
    loss = lambda p, x: jnp.sum(jnp.sin(net.apply(p, state, x)[0]) ** 2)

    @jax.jit
    def both(p, b):
        _, g = fnn.per_example.grads(loss)(p, b)
        return g, fnn.per_example.materialize(g)

    grads, formed = both(params, batch)
    # As the layers' docstrings say: that of v isn't a product, that of W is one of two positions.
    why = {row["path"]: (row["kept"], row["why"]) for row in fnn.per_example.explain(grads)}
    kept, reason = why["['a']['v']"]
    assert kept == "dense" and reason.startswith("made from it by mul"), why
    assert "its gradient is then a sum, of which more than one pair" in reason, why
    assert why["['b']['W']"] == ("A (2 × 6), G (2 × 5)", "gradient is Gᵀ A"), why
    wanted = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
    chex.assert_trees_all_close(formed, wanted, rtol=1e-9, atol=1e-12)


@exhaustive
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_power_iteration_of_weights_whose_squares_are_out_of_range(size):
    W = jax.random.normal(jax.random.key(0), (6, 5), jnp.float32)
    u, v = jnp.ones(6, jnp.float32), jnp.zeros(5, jnp.float32)
    found = power_iteration(size * W, u, v, iterations=100)
    left, values, right = np.linalg.svd(np.asarray(W, np.float64))
    np.testing.assert_allclose(ops.spectral_norm(size * W, *found), W / values[0], rtol=1e-4)
    np.testing.assert_allclose(np.abs(found[0]), np.abs(left[:, 0]), atol=1e-3)


def test_spectral_norm_before_training_divides_by_a_length():
    """Of v after many steps from u, u W v may be anything, below 0 too."""
    layer = layers.SpectralNorm(layers.Linear(6, use_bias=False), iterations=50)
    x = jnp.arange(5.0)
    params, state = layer.init(jax.random.key(0), x), layer.init_state(x)
    W, u = params["W"], state["statistics"]["u"]
    wanted = W @ x / jnp.linalg.norm(W.T @ u)
    np.testing.assert_allclose(layer.apply(params, state, x)[0], wanted, rtol=1e-4)

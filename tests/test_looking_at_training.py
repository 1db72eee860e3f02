"""Learning rates, activations and the loss's surface: measured, and drawn."""

import functools
import gc
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled_programs
from sweeps import exhaustive, sweep

import fnn
from fnn import ops, plot
from fnn.layers import BatchNorm, Conv, Dropout, Linear, chain, repeat, residual

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(24, 4)).astype(np.float32)
Y = RANDOM.integers(3, size=24).astype(np.int32)

# ---------------------------------------------------------------------------- learning rates


def quadratic(p, x):
    return 0.5 * jnp.sum(jnp.square(p)) + 0 * x[0]


def test_losses_are_those_of_the_steps():
    """Of a quadratic by gradient descent: p ← (1 − rate) p."""
    start = jnp.array([2.0, -1.0])
    found = fnn.find_learning_rate(
        quadratic, start, X, optax.sgd, lowest=1e-3, highest=10, steps=60
    )
    np.testing.assert_allclose(found.rates, 1e-3 * 10 ** (4 * np.arange(60) / 59))
    p = np.array([2.0, -1.0])
    wanted = []
    for rate in found.rates:
        p = (1 - rate) * p
        wanted.append(0.5 * np.sum(p**2))
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-5)
    assert found.suggestion is not None and 0.02 < found.suggestion < 2
    first = found.rates[np.array(wanted) > 4 * np.mean(wanted[:4])]
    assert found.diverged == (first[0] if len(first) else None)
    np.testing.assert_array_equal(start, [2.0, -1.0])


def test_smoothing_and_suggestion_against_least_squares():
    found = fnn.find_learning_rate(quadratic, jnp.ones(2), X, optax.sgd, lowest=1e-2, steps=40)
    n, slopes = len(found.smoothed), []
    for i in range(n):
        near = slice(max(0, i - 2), min(n, i + 3))
        A = np.stack([np.log(found.rates[near]), np.ones(near.stop - near.start)], axis=1)
        (slope, height), *_ = np.linalg.lstsq(A, found.losses[near], rcond=None)
        slopes.append(slope)
        np.testing.assert_allclose(found.smoothed[i], slope * np.log(found.rates[i]) + height)
    assert found.suggestion == found.rates[np.argmin(slopes[: np.argmin(found.smoothed) + 1])]


def test_what_falls_again_after_it_has_risen_is_not_suggested():
    """The loss of the steps of a rate above 2, where a quadratic's grow, is made to fall again."""

    def loss(p, x):
        size = jnp.sum(jnp.square(p))
        return jnp.where(size < 0.9, size, jnp.maximum(2.0 - 0.5 * jnp.log(size), 0.5)) + 0 * x[0]

    found = fnn.find_learning_rate(loss, jnp.array([0.9]), X, optax.sgd, lowest=1e-3, highest=1e3)
    steepest = np.argmin(np.gradient(found.smoothed))
    assert found.suggestion is not None and found.suggestion < 1.5 < found.rates[steepest]


@pytest.mark.parametrize("far", [jnp.inf, jnp.nan])
def test_training_that_diverges_at_once(far):
    """Of the quadratic whose steps of a rate above 2 grow, the fourth loss and all after it."""

    def loss(p, x):
        size = jnp.sum(jnp.square(p))
        return jnp.where(size < 10.0, size / 2, far) + 0 * x[0]

    found = fnn.find_learning_rate(
        loss, jnp.array([1.0]), X, optax.sgd, lowest=2.4, highest=2.5, steps=60
    )
    p, sizes = 1.0, []
    for rate in found.rates:
        p = (1 - rate) * p
        sizes.append(p**2)
    first = int(np.argmax(np.array(sizes) >= 10))
    assert first == 3 and found.diverged == found.rates[first]
    assert len(found.smoothed) == first and np.isfinite(found.smoothed).all()


@exhaustive
def test_optimiser_key_and_data_as_in_fit():
    """With rates that hardly differ, the losses are those of `fit`."""
    net = chain(hidden=Linear(5), f=ops.tanh, output=Linear(3))
    params = net.init(KEY, X[0])
    loss = fnn.supervised(net, ops.softmax_cross_entropy)
    batches = [(X[:8], Y[:8]), (X[8:16], Y[8:16]), (X[16:], Y[16:])]
    options = {"lowest": 1e-2, "highest": 1e-2 * (1 + 1e-9), "steps": 5}
    make = lambda rate: optax.sgd(2 * rate, momentum=0.9)
    found = fnn.find_learning_rate(loss, params, batches, make, **options)
    result = fnn.fit(loss, params, batches, make(1e-2), epochs=2, progress=False)
    np.testing.assert_allclose(found.losses, result.steps["loss"][1:], rtol=1e-5)
    again = fnn.find_learning_rate(loss, result.state, batches, make, **options)
    assert again.losses[0] < found.losses[0]

    def noisy(params, example, key):
        return loss(params, example) + jax.random.normal(key)

    drawn = {"key": KEY, "batch_size": 8}
    found = fnn.find_learning_rate(noisy, params, (X, Y), make, **options, **drawn)
    result = fnn.fit(noisy, params, (X, Y), make(1e-2), epochs=2, progress=False, **drawn)
    np.testing.assert_allclose(found.losses, result.steps["loss"][1:], rtol=1e-5)


@exhaustive
def test_losses_with_key_mode_and_state():
    net = chain(Linear(6), BatchNorm(), Dropout(0.5), ops.relu, Linear(3))
    loss = fnn.supervised(net, ops.softmax_cross_entropy)
    params = net.init(KEY, X[0])
    found = fnn.find_learning_rate(loss, params, (X, Y), key=KEY, steps=8, batch_size=8)
    assert np.isfinite(found.losses[:4]).all()


def test_nothing_falls():
    found = fnn.find_learning_rate(
        lambda p, x: p + x[0] * 0,
        jnp.ones(()),
        X,
        lambda rate: optax.sgd(-rate),
        steps=9,
    )
    assert found.suggestion is None and "suggestion=none" in repr(found)
    if pytest.importorskip("matplotlib"):
        plot.learning_rates(found)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"optimizer": optax.adam(1e-3)}, TypeError, "optimizer must be a function of a learning"),
        ({"optimizer": lambda rate: rate}, TypeError, "must be an optax transformation"),
        ({"lowest": 0}, ValueError, "lowest must be a positive"),
        ({"highest": 1e-7}, ValueError, "highest must be"),
        ({"steps": 2.0}, TypeError, "steps must be an integer"),
        ({"steps": 3}, ValueError, "steps must be an integer of at least 5"),
        ({"data": iter([X, X])}, ValueError, "5 steps take 6 batches.*gave 2"),
        ({"loss": lambda p, x, key: p.sum()}, TypeError, "takes a key"),
        ({"loss": 3}, TypeError, "loss must be a function"),
    ],
)
def test_bad_search(changes, error, message):
    given = {"loss": quadratic, "params": jnp.ones(2), "data": X, "steps": 5} | changes
    with pytest.raises(error, match=message):
        fnn.find_learning_rate(**given)


def test_picture_of_learning_rates():
    pytest.importorskip("matplotlib")
    found = fnn.find_learning_rate(quadratic, jnp.ones(2), X, optax.sgd, highest=100.0)
    (axes,) = plot.learning_rates(found).axes
    dots, line, suggestion, diverged = axes.lines
    np.testing.assert_array_equal(dots.get_ydata(), found.losses)
    np.testing.assert_array_equal(line.get_xdata(), found.rates[: len(found.smoothed)])
    np.testing.assert_array_equal(line.get_ydata(), found.smoothed)
    assert (
        suggestion.get_xdata()[0] == found.suggestion and diverged.get_xdata()[0] == found.diverged
    )
    assert axes.get_xscale() == "log"
    with pytest.raises(TypeError, match="what fnn.find_learning_rate returned"):
        plot.learning_rates([1, 2])
    losses = np.where(np.arange(found.losses.size) == 2, np.nan, found.losses)
    (axes,) = plot.learning_rates(found._replace(losses=losses)).axes
    assert np.isfinite(axes.get_ylim()).all()


# -------------------------------------------------------------------------------- loss surface


def test_surface_on_given_directions():
    """L = ½ (p − c)ᵀ A (p − c), in closed form."""
    A, c, p = np.array([[3.0, 1.0], [1.0, 2.0]]), np.array([0.5, -0.25]), np.array([1.0, 2.0])

    def loss(params, x):
        d = params["p"] - c
        return 0.5 * d @ A @ d + x

    directions = ({"p": np.array([1.0, 0.0])}, {"p": np.array([0.5, -2.0])})
    data = np.array([0.0, 2.0])
    surface = fnn.loss_surface(
        loss, {"p": jnp.asarray(p)}, data, directions=directions, span=2, points=5
    )
    np.testing.assert_allclose(surface.a, [-2, -1, 0, 1, 2])
    for i, a in enumerate(surface.a):
        for j, b in enumerate(surface.b):
            d = p + a * directions[0]["p"] + b * directions[1]["p"] - c
            np.testing.assert_allclose(surface.losses[j, i], 0.5 * d @ A @ d + 1, rtol=1e-6)


@pytest.mark.parametrize("value, inputs", [(1e-4, 4), (5, 4000)])
def test_directions_where_float16_has_no_square_of_a_norm(value, inputs):
    params = jnp.full((2, inputs), value, jnp.float16)
    loss = lambda W, x: jnp.mean(W @ x)
    x = jnp.ones((1, inputs), jnp.float16)
    for direction in fnn.loss_surface(loss, params, x, KEY, points=3).directions:
        norms = np.linalg.norm(np.asarray(direction, np.float64), axis=1)
        np.testing.assert_allclose(norms, value * inputs**0.5, rtol=2e-3)


@exhaustive
def test_directions_are_normalised_by_filter():
    """Those of a convolution's kernel and of a matrix; biases stay."""

    def loss(params, x):
        return x * sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(params))

    draw = lambda *shape: jnp.asarray(RANDOM.normal(size=shape))
    shapes = {"c": (4, 2, 3, 3), "l": (4, 5)}
    params = {name: {"W": draw(*shape), "b": draw(4)} for name, shape in shapes.items()}
    surface = fnn.loss_surface(loss, params, np.array([1.0, 2.0]), KEY, points=3)
    for direction in surface.directions:
        for layer, own in params.items():
            W, d = (np.asarray(tree["W"]) for tree in (own, direction[layer]))
            norms = [np.linalg.norm(a.reshape(len(a), -1), axis=1) for a in (W, d)]
            np.testing.assert_allclose(*norms, rtol=1e-5)
            np.testing.assert_array_equal(direction[layer]["b"], 0)
    first, second = surface.directions
    assert not np.allclose(first["c"]["W"], second["c"]["W"])
    moved = jax.tree.map(lambda p, d, e: np.asarray(p - d + e), params, first, second)
    for at, where in ((params, (1, 1)), (moved, (2, 0))):
        wanted = 1.5 * sum(np.sum(np.sin(leaf)) for leaf in jax.tree.leaves(at))
        np.testing.assert_allclose(surface.losses[where], wanted, rtol=1e-6)
    last = fnn.loss_surface(
        lambda p, x: jnp.sum(p), jnp.ones((3, 4)), np.ones(1), KEY, points=3, filter_axis=-1
    )
    np.testing.assert_allclose(np.linalg.norm(last.directions[0], axis=0), np.sqrt(3), rtol=1e-5)


@pytest.mark.parametrize("dtype", sweep(["bfloat16", "float32", "float64"], quick=["bfloat16"]))
def test_surface_of_other_dtypes_under_strict_promotion(dtype):
    with jax.numpy_dtype_promotion("strict"):
        p, x = jnp.ones((2, 2), dtype), jnp.ones(2, dtype)
        surface = fnn.loss_surface(lambda p, x: jnp.sum(p * p) * x, p, x, KEY, points=3)
    np.testing.assert_allclose(surface.losses[1, 1], 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key": None}, TypeError, "directions are random: pass key"),
        ({"points": 4}, ValueError, "points must be odd"),
        ({"span": 0}, ValueError, "span must be a positive"),
        ({"directions": jnp.ones(2)}, TypeError, "directions must be two trees"),
        ({"directions": ([1], [2])}, ValueError, r"directions\[0\] must be a tree like params"),
        (
            {"directions": (jnp.ones(2), jnp.ones(3))},
            ValueError,
            r"directions\[1\].*\(2,\).*\(3,\)",
        ),
        ({"params": jnp.ones((2, 2)), "filter_axis": 5}, ValueError, "filter_axis is 5"),
        ({"data": jnp.ones(())}, ValueError, "data is a scalar"),
    ],
)
def test_bad_surface(changes, error, message):
    given = {"loss": quadratic, "params": jnp.ones(2), "data": X, "key": KEY} | changes
    with pytest.raises(error, match=message):
        fnn.loss_surface(**given)


def test_searches_and_surfaces_compile_once():
    factor = [1.0]

    def loss(p, x):
        return factor[0] * quadratic(p, x)

    def run(loss, highest=1.0):
        p = jnp.ones((2, 2))
        found = fnn.find_learning_rate(loss, p, X, optax.sgd, steps=5, highest=highest)
        surface = fnn.loss_surface(loss, p, X, KEY, points=3, span=highest)
        return found.losses, surface.losses

    run = functools.partial(run, loss)
    first = run()
    with compiled_programs() as programs:
        again, other = run(), run(highest=0.5)
    assert not programs
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.allclose(a, c)
    factor[0] = 2.0
    np.testing.assert_allclose(run()[1], 2 * first[1])
    gone = weakref.ref(loss)
    del loss, run
    gc.collect()
    assert gone() is None


def test_picture_of_a_surface():
    pytest.importorskip("matplotlib")
    a, b = np.linspace(-1, 1, 5), np.linspace(-2, 2, 3)
    losses = np.exp(a[None] + b[:, None]) + 1
    losses[0, 0] = np.inf
    surface = types.SimpleNamespace(a=a, b=b, losses=losses)
    figure = plot.loss_surface(surface)
    mesh = figure.axes[0].collections[0]
    drawn = mesh.get_array()
    assert drawn.mask[0, 0] and drawn.mask.sum() == 1
    np.testing.assert_allclose(drawn[~drawn.mask], np.log10(losses[~drawn.mask]))  # from 1 to 20
    assert figure.axes[1].get_ylabel() == "log₁₀ loss"
    plain = plot.loss_surface(surface, log=False).axes[0].collections[0].get_array()
    np.testing.assert_allclose(plain[~plain.mask], losses[~plain.mask])
    corners = mesh.get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], np.linspace(-1.25, 1.25, 6))
    np.testing.assert_allclose(corners[:, 0, 1], np.linspace(-3, 3, 4))
    for wrong, message in [
        ({"losses": losses.T}, r"\(3, 5\), but has \(5, 3\)"),
        ({"losses": losses * np.nan}, "no loss is finite"),
        ({"a": a * np.nan}, "a holds inf or nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            plot.loss_surface(types.SimpleNamespace(**{"a": a, "b": b, "losses": losses} | wrong))
    with pytest.raises(ValueError, match="log=True wants positive"):
        plot.loss_surface(types.SimpleNamespace(a=a, b=b, losses=losses - 9), log=True)
    with pytest.raises(TypeError, match="what fnn.loss_surface returned"):
        plot.loss_surface(losses)


# --------------------------------------------------------------------------------- activations

NET = chain(hidden=Linear(6), f=ops.relu, output=Linear(3))
LOSS = fnn.supervised(NET, ops.softmax_cross_entropy)
PARAMS = NET.init(KEY, X[0])
PARAMS["hidden"]["b"] = jnp.array([0.0, -100.0, 0.0, 0.0, -100.0, 0.0])  # two are dead


def by_hand():
    """Activations of the two-layer network and each example's gradients, by numpy."""
    W1, b1, W2, b2 = (
        np.asarray(PARAMS[k][n], float) for k in ("hidden", "output") for n in ("W", "b")
    )
    z = X @ W1.T + b1
    h = np.maximum(z, 0)
    s = h @ W2.T + b2
    p = np.exp(s - s.max(1, keepdims=True))
    ds = p / p.sum(1, keepdims=True) - np.eye(3)[Y]
    dh = ds @ W2
    return {"hidden": (z, dh * (z > 0)), "f": (h, dh), "output": (s, ds)}


def test_activations_against_numpy():
    found = fnn.activation_statistics(LOSS)(PARAMS, (X, Y))
    wanted = by_hand()
    assert [p.name for p in found] == list(wanted) and found.examples == 24
    for part in found:
        y, g = wanted[part.name]
        assert part.shape == y.shape[1:]
        np.testing.assert_allclose([part.mean, part.std], [y.mean(), y.std()], rtol=1e-4)
        np.testing.assert_allclose(part.gradient_rms, np.sqrt(np.mean(g**2)), rtol=1e-4)
        np.testing.assert_allclose(part.zero_gradients, np.mean(g == 0))
        assert part.values.counts.sum() == y.size
        np.testing.assert_allclose(part.values.edges[[0, -1]], [y.min(), y.max()], rtol=1e-5)
        sizes = np.log10(np.abs(g[g != 0]))
        assert part.gradients.counts.sum() == sizes.size
        np.testing.assert_allclose(
            part.gradients.edges[[0, -1]], [sizes.min(), sizes.max()], rtol=1e-4
        )
    np.testing.assert_array_equal(found["f"].dead, (wanted["f"][0] == 0).all(axis=0))
    assert found["f"].dead[[1, 4]].all() and found["hidden"].dead is None
    count = int(found["f"].dead.sum())
    assert found["f"].trouble == f"{count} of 6 dead"
    assert f"{count} of 6 dead" in str(found) and f"{count} of 6 dead" in repr(found)
    with pytest.raises(KeyError, match="no part 'x': hidden, f, output"):
        found["x"]


def test_saturated_sigmoids_and_tanhs():
    """|x| where the local gradient is 4 % of its greatest: 4 for both, halved for tanh."""

    def loss(scale, x):
        return jnp.sum(jax.nn.sigmoid(scale * x)) + jnp.sum(jnp.tanh(scale * x / 2))

    look = fnn.activation_statistics(loss)
    x = np.stack([np.array([1.0, -1.0, 0.5, 2.0])] * 20)
    x[0, 3] = x[1, 3] = 0.0  # of 20 values 18 are saturated: 90 %
    edge = 2 * np.arctanh(np.sqrt(1 - 0.04))
    for scale, wanted in [(edge * 1.01, [True, True, False, False]), (edge * 0.99, [False] * 4)]:
        found = look(jnp.float32(scale), x)
        assert [p.operation for p in found] == ["logistic", "tanh"]
        for part in found:
            np.testing.assert_array_equal(part.saturated, wanted)
            assert part.dead is None


@exhaustive
def test_a_convolution_counts_its_features_over_pixels():
    net = chain(c=Conv(3, 3), f=ops.relu, flat=lambda x: x.ravel(), o=Linear(2))
    images = RANDOM.normal(size=(5, 6, 6, 1)).astype(np.float32)
    params = net.init(KEY, images[0])
    params["c"]["b"] = jnp.array([0.0, -50.0, 0.0])
    loss = fnn.supervised(net, ops.softmax_cross_entropy)
    found = fnn.activation_statistics(loss)(params, (images, Y[:5] % 2))
    assert [p.name for p in found] == ["c", "f", "o"]  # `flat` makes no number
    np.testing.assert_array_equal(found["f"].dead, [False, True, False])
    assert found["f"].shape == (6, 6, 3) and found["f"].values.counts.sum() == 5 * 108


def test_names_of_inner_parts_of_parts_called_twice_and_of_functions():
    inner = chain(a=Linear(4), act=jax.nn.relu)
    net = chain(first=inner, skip=residual(Linear(4)), gate=lambda x: jnp.maximum(x, 0.0) * 2)
    params = net.init(KEY, X[0])

    def twice(params, x):
        return jnp.sum(net(params, net(params, x)))

    names = [p.name for p in fnn.activation_statistics(twice)(params, X)]
    assert names[:2] == ["first.a", "first.act"] and "first.a (2)" in names
    assert "gate: " in " ".join(names) or "gate" in names

    def plain(params, x):
        h = jnp.tanh(params["W"] @ x)
        with jax.named_scope("readout"):
            return jnp.sum(params["v"] * h)

    weights = {"W": jnp.ones((3, 4)), "v": jnp.ones(3)}
    found = fnn.activation_statistics(plain)(weights, X)
    assert [p.name for p in found] == ["h", "readout"]
    np.testing.assert_allclose(found["h"].mean, np.tanh(X.sum(1)).mean(), rtol=1e-5)
    # A gelu's inner tanh is no activation of its own.
    with pytest.raises(ValueError, match="has no parts to look at"):
        fnn.activation_statistics(lambda w, x: jnp.sum(jax.nn.gelu(w * x)))(jnp.ones(4), X)


@exhaustive
def test_activations_through_training():
    look, seen = fnn.activation_statistics(LOSS), []
    fnn.fit(
        LOSS,
        PARAMS,
        (X, Y),
        optax.sgd(0.1),
        epochs=3,
        key=KEY,
        progress=False,
        after_epoch=lambda epoch, state, record: seen.append(look(state, (X, Y))),
    )
    assert len(seen) == 3 and seen[0]["output"].mean != seen[2]["output"].mean


@exhaustive
def test_loops_and_batch_statistics():
    net = chain(blocks=repeat(chain(Linear(4), ops.tanh), 3), n=BatchNorm(), o=Linear(2))
    x = X.astype(float)
    params, state = net.init(KEY, x[0]), net.init_state(x[0])
    loss = fnn.supervised(net, ops.softmax_cross_entropy)
    found = fnn.activation_statistics(loss)(params, (x, Y % 2), model_state=state)
    rounds = [f"blocks[{i}].{part}" for i in range(3) for part in ("Linear 0", "tanh 1")]
    assert [p.name for p in found] == [*rounds, "n", "o"]
    plain = x
    for i in range(3):
        W, b = (np.asarray(params["blocks"]["0"][name][i]) for name in ("W", "b"))
        plain = np.tanh(plain @ W.T + b)
        values = found[f"blocks[{i}].tanh 1"]
        np.testing.assert_allclose([values.mean, values.std], [plain.mean(), plain.std()])


@exhaustive
def test_a_network_of_flax():
    linen = pytest.importorskip("flax.linen")
    model = linen.Sequential([linen.Dense(5), linen.relu, linen.Dense(1)])
    weights = model.init(KEY, X[0])
    found = fnn.activation_statistics(lambda w, x: jnp.sum(model.apply(w, x)))(weights, X)
    assert any(p.dead is not None and p.dead.shape == (5,) for p in found)


@pytest.mark.parametrize("reverse", sweep([False, True], quick=[True]))
def test_scans_are_written_out(reverse):
    """With constants, carried values, stacked results, a scan inside, and a checkpoint around."""
    from fnn.backprop import sweep
    from fnn.backprop.primitives import rule_of
    from fnn.jaxpr import program, trace
    from fnn.train.written_out import written_out

    @jax.checkpoint
    def f(w, xs):
        def outer(h, x):
            inner, _ = jax.lax.scan(lambda s, r: (jnp.tanh(s * w + r), None), h, x)
            return inner + h, jnp.sum(inner * w)

        h, ys = jax.lax.scan(outer, jnp.zeros(()), xs, reverse=reverse)
        return h + jnp.sum(jax.jit(jnp.square)(ys) * jnp.arange(4.0))

    w, xs = jnp.float64(0.7), jnp.asarray(RANDOM.normal(size=(4, 3)))
    flat = written_out(program(trace(lambda w, xs: [f(w, xs)], [w, xs])))
    assert not {"scan", "checkpoint", "remat2"} & {e.name for e in flat.equations}
    assert sum(e.name == "tanh" for e in flat.equations) == 12
    scopes = {tuple(n for n in e.scope if n[0] == "[") for e in flat.equations if e.name == "tanh"}
    assert scopes == {(f"[{i}]", f"[{k}]") for i in range(4) for k in range(3)}
    tape = sweep.forward(flat, [w, xs], [True, True], rule_of)
    value, gradient = jax.value_and_grad(f, argnums=(0, 1))(w, xs)
    np.testing.assert_allclose(tape.outputs[0], value, rtol=1e-12)
    found = sweep.backward(tape, [jnp.ones(())])
    for i, wanted in zip(flat.inputs, gradient, strict=True):
        np.testing.assert_allclose(found[i], wanted, rtol=1e-10)
    calls = [call for call in flat.calls if call.name == "square"]
    assert [flat.equations[c.start].name for c in calls] == ["square"]

    def long(x):
        return [jax.lax.scan(lambda h, _: (jnp.tanh(h), None), x, None, length=65)[0]]

    assert [e.name for e in written_out(program(trace(long, [w]))).equations] == ["scan"]


def test_nonfinite_values_are_counted():
    found = fnn.activation_statistics(lambda w, x: jnp.sum(ops.relu(w * x)))(
        jnp.array([1.0, jnp.inf]), np.ones((3, 2), np.float32)
    )
    (part,) = found
    assert part.nonfinite == 3 and part.trouble == "3 inf or nan" and part.mean == 1


@pytest.mark.parametrize("values", [1 + np.arange(6) % 3 * 2.0**-52, [3e17] * 6, [1e150] * 6])
def test_values_that_rounding_hardly_tells_apart(values):
    look = fnn.activation_statistics(lambda w, x: jnp.sum(ops.relu(w * x)) / 1e9)
    (part,) = look(jnp.ones(()), np.asarray(values).reshape(3, 2))
    counts, edges = part.values
    assert counts.sum() == 6 and (np.diff(edges) > 0).all()
    assert edges[0] <= min(values) and max(values) <= edges[-1]


def test_a_loop_of_no_rounds():
    def loss(w, x):
        h, ys = jax.lax.scan(lambda h, r: (ops.tanh(h * r), h), w, x[:0])
        return jnp.sum(ops.tanh(h)) + jnp.sum(ys)

    (part,) = fnn.activation_statistics(loss)(jnp.float64(0.5), np.ones((3, 2)))
    np.testing.assert_allclose(part.mean, np.tanh(0.5))
    np.testing.assert_allclose(part.gradient_rms, 1.0)


def test_looking_compiles_once_and_holds_no_data():
    look = fnn.activation_statistics(LOSS)
    look(PARAMS, (X, Y))
    with compiled_programs() as programs:
        look(jax.tree.map(lambda p: 2 * p, PARAMS), (X[::-1], Y))
        state = fnn.train_step(LOSS, optax.sgd(0.1)).init(PARAMS)
        look(state, (X, Y))
    assert "jit(read)" not in programs
    data = jnp.asarray(X) + 1
    gone = weakref.ref(data)
    look(PARAMS, (data, Y))
    del data
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((PARAMS, (X, Y[1:])), ValueError, "differ in their number of examples"),
        ((None, (X, Y)), ValueError, "params holds no arrays"),
        (({"a": "1"}, (X, Y)), TypeError, "parameters are"),
    ],
)
def test_bad_looks(given, error, message):
    with pytest.raises(error, match=message):
        fnn.activation_statistics(LOSS)(*given)


def test_integers_that_a_training_left_out_stay_as_they_are():
    table = np.array([2, 0, 1])

    def loss(params, x):
        order = jnp.argsort(params["table"])  # 1, 2, 0
        return 0.5 * jnp.sum(jnp.square(jnp.tanh(params["w"][order, order]) - 0.5)) + 0 * x[0]

    w = np.asarray(RANDOM.normal(size=(3, 3)), np.float32)
    step = fnn.train_step(loss, optax.sgd(0.1), trainable=lambda path, x: path == "w")
    state = step.init({"w": jnp.asarray(w), "table": jnp.asarray(table)})
    at = lambda w: np.sum(np.square(np.tanh(np.diag(w)) - 0.5)) / 2

    surface = fnn.loss_surface(loss, state, X, KEY, points=3)
    first, second = surface.directions
    assert not np.any(first["table"]) and not np.any(second["table"])
    moved = w - np.asarray(first["w"]) + np.asarray(second["w"])
    np.testing.assert_allclose(surface.losses[2, 0], at(moved), rtol=1e-5)

    (part,) = fnn.activation_statistics(loss)(state, X)
    np.testing.assert_allclose(part.mean, np.tanh(np.diag(w)).mean(), rtol=1e-5)

    found = fnn.find_learning_rate(loss, state, X, optax.sgd, lowest=0.1, steps=5)
    wanted = []
    for rate in found.rates:
        y = np.tanh(np.diag(w))
        w = w - rate * np.diag((y - 0.5) * (1 - y**2))
        wanted.append(at(w))
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-4)

    whole = {"table": jnp.asarray(table)}
    with pytest.raises(TypeError, match="loss_surface: params holds no floats to move"):
        fnn.loss_surface(loss, whole, X, KEY, points=3)
    with pytest.raises(TypeError, match="find_learning_rate: params holds no floats to train"):
        fnn.find_learning_rate(loss, whole, X, optax.sgd, steps=5)


def test_looks_want_key_and_state():
    with pytest.raises(TypeError, match="takes a key"):
        fnn.activation_statistics(lambda p, x, key: 0.0)(PARAMS, (X, Y))
    with pytest.raises(TypeError, match="takes a state"):
        fnn.activation_statistics(lambda p, x, state: 0.0)(PARAMS, (X, Y))


def test_picture_of_activations():
    pytest.importorskip("matplotlib")
    look = fnn.activation_statistics(LOSS)
    seen = [look(jax.tree.map(lambda p, k=k: k * p, PARAMS), (X, Y)) for k in (1.0, 1.5, 2.0)]
    figure = plot.activations(seen, parts=["f", "output"])
    above, below = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title() for axes in above] == ["f\nrelu", "output\nadd"]
    assert above[0].get_xlabel() == seen[-1]["f"].trouble and "dead" in above[0].get_xlabel()
    for axes, kind in ((above, "values"), (below, "gradients")):
        for panel, name in zip(axes, ("f", "output"), strict=True):
            assert len(panel.collections) == 3
            for mesh, statistics in zip(panel.collections, seen, strict=True):
                counts, edges = getattr(statistics[name], kind)
                shares = np.sqrt(counts / counts.sum())
                np.testing.assert_allclose(mesh.get_array().ravel(), shares)
                np.testing.assert_allclose(mesh.get_coordinates()[:, 0, 1], edges)
    alone = plot.activations(seen[0], most=2)
    assert len(alone.axes) == 4
    stairs = alone.axes[0].patches[0].get_data()
    np.testing.assert_array_equal(stairs.values, seen[0]["hidden"].values.counts)
    np.testing.assert_array_equal(stairs.edges, seen[0]["hidden"].values.edges)
    for bad, error, message in [
        ([], ValueError, "the list is empty"),
        (PARAMS, TypeError, "pass what fnn.activation_statistics"),
        ([1], TypeError, "pass what fnn.activation_statistics"),
    ]:
        with pytest.raises(error, match=message):
            plot.activations(bad)
    with pytest.raises(ValueError, match="no part 'x'; there are hidden, f, output"):
        plot.activations(seen, parts=["x"])
    with pytest.raises(TypeError, match="parts must be a list"):
        plot.activations(seen, parts="f")

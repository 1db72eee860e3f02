"""Losses that name a key, a mode or a state: dropout and batch statistics in training."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive, sweep

import fnn
from fnn import ops
from fnn.layers import EVALUATE, BatchNorm, Dropout, LayerError, Linear, Mode, chain, training

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 5)) + 2, RNG.integers(0, 3, 24).astype(np.int32)
DATA = (X, Y)
NET = chain(hidden=Linear(6), norm=BatchNorm(), f=ops.tanh, drop=Dropout(0.5), out=Linear(3))
STEADY = chain(hidden=Linear(6), norm=BatchNorm(decay=0.5), f=ops.tanh, out=Linear(3))
PARAMS, START = STEADY.init(KEY, X[0]), STEADY.init_state(X[0])
assert jax.tree.structure(NET.init(KEY, X[0])) == jax.tree.structure(PARAMS)


def accuracy(scores, label):
    return jnp.argmax(scores) == label


def loss_of(net, **metrics):
    return fnn.supervised(net, ops.softmax_cross_entropy, **metrics)


def fit(loss, params=PARAMS, optimizer=None, **options):
    options = {"epochs": 2, "batch_size": 8, "key": KEY, "progress": False} | options
    return fnn.fit(loss, params, DATA, optimizer or optax.sgd(0.1), **options)


def by_hand(params, state, x):
    """The network on a whole batch, in numpy's terms; the new state."""
    h = x @ params["hidden"]["W"].T + params["hidden"]["b"]
    mean, variance = h.mean(0), h.var(0)
    n = (h - mean) / jnp.sqrt(variance + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    scores = jnp.tanh(n) @ params["out"]["W"].T + params["out"]["b"]
    old = state["statistics"]["norm"]
    new = {
        "mean": 0.5 * old["mean"] + 0.5 * mean,
        "variance": 0.5 * old["variance"] + 0.5 * h.var(0, ddof=1),
    }
    return scores, {"statistics": {"norm": new}}


# ------------------------------------------------------------------------- batch norm in a step


@exhaustive
def test_steps_with_batch_statistics_are_those_by_hand():
    step = fnn.train_step(loss_of(STEADY, accuracy=accuracy), optax.sgd(0.1))
    state = step.init(PARAMS, START)
    params, model_state = PARAMS, START
    for start in (0, 8, 16):
        x, y = X[start : start + 8], Y[start : start + 8]
        state, metrics = step(state, (x, y))

        def mean_loss(params, x=x, y=y, model_state=model_state):
            scores, new = by_hand(params, model_state, x)
            losses = jax.nn.logsumexp(scores, axis=1) - scores[jnp.arange(8), y]
            return losses.mean(), (scores, new)

        (value, (scores, model_state)), g = jax.value_and_grad(mean_loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, g)
        assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
        assert metrics["accuracy"] == np.mean(np.argmax(scores, 1) == y)
        chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(state.model_state, model_state, rtol=1e-5)
    assert "model_state: 2 arrays, 12 numbers" in repr(state)


@exhaustive
def test_evaluation_takes_the_running_statistics():
    loss = loss_of(STEADY, accuracy=accuracy)
    result = fit(loss)
    found = fnn.evaluate(loss, result.state, DATA, batch_size=7)
    running = result.state.model_state["statistics"]["norm"]
    p = result.params
    h = X @ p["hidden"]["W"].T + p["hidden"]["b"]
    h = (h - running["mean"]) / np.sqrt(running["variance"] + 1e-5)
    h = np.tanh(h * p["norm"]["scale"] + p["norm"]["bias"])
    scores = np.asarray(h @ p["out"]["W"].T + p["out"]["b"])
    losses = jax.nn.logsumexp(scores, axis=1) - scores[np.arange(24), Y]
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(scores.argmax(1) == Y))
    same = fnn.evaluate(loss, result.params, DATA, model_state=result.state.model_state)
    assert same["loss"] == pytest.approx(found["loss"], rel=1e-6)


@exhaustive
def test_a_bad_step_leaves_the_statistics_alone():
    bad = X.copy()
    bad[3] = np.inf
    for nonfinite in ("skip", "raise"):
        step = fnn.train_step(loss_of(STEADY), optax.sgd(0.1), nonfinite=nonfinite, check=False)
        state, _ = step(step.init(PARAMS, START), DATA)
        before = jax.tree.map(np.asarray, state)
        if nonfinite == "skip":
            state, metrics = step(state, (bad, Y))
            assert metrics["skipped"] == 1
            chex.assert_trees_all_equal(jax.tree.map(np.asarray, state), before)
        else:
            state, _ = step(state, (bad, Y))
            with pytest.raises(fnn.NonFiniteError):
                step.finish(state)
            chex.assert_trees_all_equal(jax.tree.map(np.asarray, state), before)


@exhaustive
def test_statistics_that_would_overflow_are_a_bad_step():
    """The loss and its gradient stay finite: y is 0 where the variance is infinite."""
    x = X.astype(np.float32)
    x[0], x[1] = 3e19, -3e19
    net = chain(norm=BatchNorm(), out=Linear(3))
    with jax.enable_x64(False):
        step = fnn.train_step(loss_of(net), optax.sgd(0.1))
        state = step.init(net.init(KEY, x[0]), net.init_state(x[0]))
        state, metrics = step(state, (x, Y))
        assert np.isfinite(metrics["loss"])
        with pytest.raises(fnn.NonFiniteError, match=r"model_state\['statistics'\]\['norm'\]"):
            step.finish(state)


@exhaustive
def test_going_on_is_the_same_as_going_through():
    loss = loss_of(NET)
    whole = fit(loss, epochs=4)
    half = fit(loss, epochs=2)
    rest = fit(loss, half.state, epochs=2)
    chex.assert_trees_all_equal(rest.state, whole.state)
    assert fit(loss).history["loss"] == half.history["loss"]


@exhaustive
def test_a_line_search_evaluates_in_training_too():
    result = fit(loss_of(STEADY), optimizer=optax.lbfgs(), batch_size=24, epochs=15)
    assert result.history["loss"][-1] < 0.2 * result.history["loss"][0]


# ------------------------------------------------------------------------- dropout, keys, modes


def test_each_example_draws_its_own_mask_and_evaluation_none():
    net = chain(drop=Dropout(0.5), scale=Linear(1, use_bias=False))
    params = {"scale": {"W": jnp.linspace(0, 2, 200)[None]}}
    loss = fnn.supervised(net, lambda y, target: y[0], zeros=lambda y, target: y[0])
    x = np.ones((4, 200))
    step = fnn.train_step(loss, optax.sgd(0.0))
    seen = []
    for key in (KEY, KEY, jax.random.key(1)):
        _, metrics = step(step.init(params), (x, np.zeros(4)), key)
        seen.append(float(metrics["loss"]))
    assert seen[0] == seen[1] != seen[2] and abs(seen[0] - 200) > 1e-6
    by_example = [
        loss(params, (x[0], 0.0), mode=training(k, "batch"))[0] for k in jax.random.split(KEY, 4)
    ]
    assert len(set(map(float, by_example))) == 4 and np.mean(by_example) == pytest.approx(seen[0])
    assert fnn.evaluate(loss, params, (x, np.zeros(4)))["loss"] == pytest.approx(200)
    with pytest.raises(
        LayerError, match=r"^drop: Dropout\(0.5\) draws .*step\(state, batch, key\)"
    ):
        step(step.init(params), (x, np.zeros(4)))


@pytest.mark.parametrize("named", [("key",), ("mode",), ("state",), ("key", "mode", "state")])
@pytest.mark.parametrize("by", sweep(["keyword", "position", "default"], quick=["position"]))
def test_a_loss_is_given_what_it_names(named, by):
    seen = {}

    def record(params, example, **given):
        seen.update(given)
        value = params * example
        return (value, {"m": value}, given["state"]) if "state" in given else (value, {"m": value})

    names = {
        "keyword": "*, " + ", ".join(named),
        "position": ", ".join(named),
        "default": ", ".join(f"{name}=None" for name in named),
    }[by]
    call = ", ".join(f"{name}={name}" for name in named)
    loss = eval(f"lambda params, example, {names}: record(params, example, {call})", locals())
    step = fnn.train_step(loss, optax.sgd(0.1), check=False)
    key = KEY if named != ("state",) else None
    own = {"statistics": jnp.ones(())} if "state" in named else None
    state = step.init(jnp.ones(()), own)
    state, metrics = step(state, np.ones(3), key)
    assert set(seen) == set(named) and metrics["m"] == 1
    assert own is None or state.model_state == {"statistics": 1}
    if "mode" in named:
        mode = seen["mode"]
        assert mode.train and mode.axis == "batch" and mode.key is not None
        if "key" in named:
            assert mode.key is not seen["key"]
    if "key" in named:
        assert seen["key"].shape == ()
    options = {"key": key} if "key" in named else {}
    found = fnn.evaluate(loss, jnp.ones(()), np.ones(3), model_state=state.model_state, **options)
    assert found == {"loss": 1.0, "m": 1.0}
    if "mode" in named:
        assert seen["mode"] == EVALUATE


@exhaustive
def test_fit_gives_a_loss_of_ones_own_mode_and_state():
    def loss(params, example, state, mode: Mode):
        x, y = example
        scores, state = NET.apply(params, state, x, mode=mode)
        return ops.softmax_cross_entropy(scores, y), {"right": accuracy(scores, y)}, state

    ours = fit(loss, model_state=START, validation=DATA)
    supervised = fit(loss_of(NET, right=accuracy), validation=DATA)
    chex.assert_trees_all_equal(ours.state, supervised.state)
    assert ours.history["validation_loss"] == supervised.history["validation_loss"]


# ------------------------------------------------------------------------------------ supervised


@exhaustive
def test_supervised_is_a_loss_of_one_example():
    net = chain(hidden=Linear(4), f=ops.relu, out=Linear(3))
    params = net.init(KEY, X[0])
    loss = loss_of(net)
    wanted = ops.softmax_cross_entropy(net(params, X[0]), Y[0])
    assert loss(params, (X[0], Y[0])) == wanted
    value, found = loss_of(net, right=accuracy)(params, (X[0], Y[0]))
    assert value == wanted and found["right"] == (jnp.argmax(net(params, X[0])) == Y[0])
    gradients = fnn.per_example.materialize(fnn.per_example.grads(loss)(params, DATA)[1])
    exact = jax.vmap(jax.grad(loss), (None, 0))(params, DATA)
    chex.assert_trees_all_close(gradients, exact, rtol=1e-5, atol=1e-7)
    function = fnn.supervised(lambda p, x: net(p, x), ops.softmax_cross_entropy)
    chex.assert_trees_all_equal(fit(function, params).params, fit(loss, params).params)
    assert repr(loss_of(net, right=accuracy)) == (
        "supervised(chain(hidden=Linear(4), f=relu, out=Linear(3)), softmax_cross_entropy, "
        "right=accuracy)"
    )
    assert loss == loss_of(net) and hash(loss) == hash(loss_of(net))


def test_supervised_is_compiled_anew_if_what_it_reads_has_changed():
    net, scale = Linear(3), [1.0]
    params = net.init(KEY, X[0])
    loss = fnn.supervised(net, lambda y, target: scale[0] * jnp.sum(y * y))
    first = fnn.evaluate(loss, params, DATA)["loss"]
    scale[0] = 2.0
    assert fnn.evaluate(loss, params, DATA)["loss"] == pytest.approx(2 * first)


def test_labels_of_a_supervised_loss_are_looked_at():
    wrong = Y.copy()
    wrong[5] = 7
    with pytest.raises(ValueError, match=r"label 7 at index 5.*labels are 0, ..., 2"):
        fnn.fit(loss_of(NET), PARAMS, (X, wrong), optax.sgd(0.1), epochs=1, key=KEY)


# ---------------------------------------------------------------------------------------- errors


def test_a_state_that_is_missing():
    def loss(params, example, state):
        return jnp.sum(params["hidden"]["W"]), state

    with pytest.raises(TypeError, match=r"takes a state: step.init\(params, model_state\)"):
        fnn.train_step(loss, optax.sgd(0.1)).init(PARAMS)
    with pytest.raises(TypeError, match="takes a state: pass model_state=net.init_state"):
        fit(loss)
    with pytest.raises(TypeError, match=r"takes a state: .*evaluate\(loss, result.state, data\)"):
        fnn.evaluate(loss, PARAMS, DATA)
    with pytest.raises(LayerError, match=r"^norm: BatchNorm.*model_state=net.init_state\(x\)"):
        fnn.evaluate(loss_of(STEADY), PARAMS, DATA)
    batches = [(X[:8], Y[:8])]
    with pytest.raises(LayerError, match=r"^norm: BatchNorm.*model_state=net.init_state\(x\)"):
        fnn.fit(loss_of(STEADY), PARAMS, batches, optax.sgd(0.1), epochs=1, progress=False)
    given = {"model_state": START, "progress": False, "epochs": 1}
    fnn.fit(loss_of(STEADY), PARAMS, batches, optax.sgd(0.1), **given)
    state = fnn.train_step(loss_of(STEADY), optax.sgd(0.1)).init(PARAMS, START)
    with pytest.raises(TypeError, match="has a model_state: give only one"):
        fit(loss_of(STEADY), state, model_state=START)


@pytest.mark.parametrize(
    ("out", "kind", "match"),
    [
        (lambda x, state: x, TypeError, r"must return \(loss, state\) or \(loss, metrics, state\)"),
        (lambda x, state: (x, {}, {}, state), TypeError, "but returned a tuple of 4"),
        (lambda x, state: (x, {"seen": x}), ValueError, r"differs from example to example.*pmean"),
        (lambda x, state: (x, {}), ValueError, r"seen: float64\[\].*returned {}"),
        (lambda x, state: (x, {"seen": jnp.ones(3)}), ValueError, r"returned {seen: float64\[3\]}"),
    ],
)
def test_a_state_that_is_not_one(out, kind, match):
    def loss(params, example, state):
        return out(params * example, state)

    step = fnn.train_step(loss, optax.sgd(0.1), check=False)
    with pytest.raises(kind, match=match):
        step(step.init(jnp.ones(()), {"seen": jnp.zeros(())}), np.ones(3))


def test_what_supervised_refuses():
    with pytest.raises(TypeError, match=r"Linear makes a layer and isn't one: write Linear\("):
        fnn.supervised(Linear, ops.squared_error)
    with pytest.raises(TypeError, match="net must be a layer.*, but got 3"):
        fnn.supervised(3, ops.squared_error)
    with pytest.raises(TypeError, match="loss must be a function"):
        fnn.supervised(NET, "mse")
    with pytest.raises(TypeError, match="right must be a function metric"):
        fnn.supervised(NET, ops.squared_error, right=0.5)
    with pytest.raises(TypeError, match=r"pair \(x, target\), but got float64\[5\]"):
        loss_of(STEADY)(PARAMS, X[0])
    with pytest.raises(TypeError, match=re.escape("but got {x: float64[5]}")):
        loss_of(STEADY)(PARAMS, {"x": X[0]})


def test_a_state_that_the_loss_takes_none_of_is_refused():
    loss = lambda params, example: jnp.sum(params["w"] ** 2) + 0 * example[0][0]
    start, sgd, state = {"w": jnp.ones(2)}, optax.sgd(0.1), {"statistics": {"norm": jnp.ones(2)}}
    given = {"model_state": state}
    for call in (
        lambda: fit(loss, start, **given),
        lambda: fnn.train_step(loss, sgd).init(start, state),
        lambda: fnn.evaluate(loss, start, DATA, **given),
        lambda: fnn.find_learning_rate(loss, start, DATA, **given),
        lambda: fnn.loss_surface(loss, start, DATA, KEY, **given),
        lambda: fnn.train.activation_statistics(loss)(start, DATA, **given),
        lambda: fnn.sweep(loss, {"seed": [0]}, DATA, optimizer=sgd, init=start, epochs=1, **given),
    ):
        with pytest.raises(TypeError, match="model_state is given, but the loss .* takes no state"):
            call()
    assert fnn.evaluate(loss, start, DATA, model_state={})["loss"] == 2  # as of a stateless network
    # A training state's own, of a loss that took one, is left aside.
    trained = fnn.train_step(loss, sgd).init(start)._replace(model_state=state)
    assert fnn.evaluate(loss, trained, DATA)["loss"] == 2
    assert fnn.find_learning_rate(loss, trained, DATA, optax.sgd, key=KEY, steps=5).losses[0] <= 2

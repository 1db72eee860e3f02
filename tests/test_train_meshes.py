"""Training over a mesh of four devices gives what one device gives, whatever its axes."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

from fnn import ops
from fnn.layers import BatchNorm, Dropout, Linear, chain
from fnn.train import evaluate, find_learning_rate, fit, supervised, train_step

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 4)), RNG.integers(3, size=24)
NET = chain(hidden=Linear(8), act=ops.relu, out=Linear(3))
PARAMS = NET.init(KEY, jnp.zeros(4))
SPECS = {
    "hidden": {"W": P("model", None), "b": P("model")},
    "out": {"W": P(None, "model"), "b": P()},
}


def loss(params, example, key):
    x, label = example
    logits = NET(params, x + 0.1 * jax.random.normal(key, x.shape))
    return ops.softmax_cross_entropy(logits, label), {"right": jnp.argmax(logits) == label}


def train(params, data, **options):
    options = {"epochs": 1, "batch_size": 8, "key": KEY, "progress": False} | options
    result = fit(loss, params, data, optax.adam(0.1), validation=data, **options)
    return result.params, result.history["validation_loss"], result.steps["loss"]


def close(a, b):
    chex.assert_trees_all_close(jax.device_get(a), jax.device_get(b), rtol=2e-5, atol=1e-12)


@pytest.fixture(scope="module")
def alone():
    return train(PARAMS, (X, Y))


@pytest.mark.parametrize(
    ("kind", "in_context"),
    [
        pytest.param(AxisType.Explicit, True, id="explicit, set_mesh"),
        pytest.param(AxisType.Explicit, False, id="explicit", marks=exhaustive),
        pytest.param(AxisType.Auto, False, id="auto", marks=exhaustive),
    ],
)
def test_a_mesh_gives_the_same_numbers(kind, in_context, alone):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        put = lambda x, spec: jax.device_put(jnp.asarray(x), NamedSharding(mesh, spec))
        data = put(X, P("data")), put(Y, P("data"))
        if kind == AxisType.Auto:
            params = jax.tree.map(put, PARAMS, SPECS)
        else:
            params = PARAMS if in_context else jax.tree.map(lambda p: put(p, P()), PARAMS)
        close(train(params, data), alone)


@exhaustive
@pytest.mark.parametrize("kind", sweep([AxisType.Explicit, AxisType.Auto], [AxisType.Explicit]))
def test_batch_statistics_are_those_of_the_whole_batch(kind):
    net = chain(hidden=Linear(6), norm=BatchNorm(), drop=Dropout(0.25), out=Linear(3))
    loss = supervised(net, ops.softmax_cross_entropy)
    step = train_step(loss, optax.sgd(0.1))
    found = []
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    for place in (jnp.asarray, lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))):
        state = step.init(net.init(KEY, X[0]), net.init_state(X[0]))
        batch = place(X), place(Y)
        for i in range(2):
            state, metrics = step(state, batch, jax.random.key(i))
        found.append((state.params, state.model_state, metrics["loss"]))
        found[-1] += (evaluate(loss, state, batch)["loss"],)
    close(found[1], found[0])


def test_batches_that_cannot_be_dealt_out_evenly():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    data = jax.device_put(X, NamedSharding(mesh, P("data")))
    squares = lambda params, x: jnp.sum((params - x) ** 2)
    found = evaluate(squares, jnp.ones(4), data, batch_size=9)
    assert found["loss"] == pytest.approx(np.mean(np.sum((1 - X) ** 2, 1)))


@exhaustive
def test_learning_rates_are_searched_for_on_an_explicit_mesh():
    data = jax.device_put((X, Y), NamedSharding(jax.make_mesh((8,), ("data",)), P("data")))
    squares = lambda params, example: jnp.sum((params["W"] @ example[0] - example[1]) ** 2)
    params = {"W": jnp.zeros((3, 4))}
    of = lambda data: find_learning_rate(
        squares, params, data, optax.sgd, batch_size=16, steps=6, key=KEY
    )
    np.testing.assert_allclose(of(data).losses, of((X, Y)).losses, rtol=1e-9)


@pytest.mark.parametrize("spec", [P(), P("data")], ids=str)
def test_sharded_parameters_and_explicit_axes(spec):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))

    def squares(params, x):
        return jnp.sum((params["w"] - x) ** 2) + params["b"] ** 2

    start = {"w": np.zeros(4), "b": np.ones(())}
    step = train_step(squares, optax.adam(0.1))
    states = []
    for put in (
        lambda x, spec: jnp.asarray(x),
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)),
    ):
        params = {"w": put(start["w"], spec), "b": put(start["b"], P())}
        state = step.init(params)
        for _ in range(2):
            state, metrics = step(state, put(X, P("data") if spec == P() else P()))
        step.finish(state)
        states.append((state.params, metrics))
    close(states[1], states[0])

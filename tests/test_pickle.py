"""What fnn makes can be pickled: every exception, and layers and steps of named functions."""

import concurrent.futures
import copy
import dataclasses
import importlib
import multiprocessing
import pickle
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive

import fnn
from fnn import ops
from fnn.layers import (
    MLP,
    BatchNorm,
    Dropout,
    DropPath,
    GroupNorm,
    LayerNorm,
    Linear,
    Maxout,
    Once,
    RMSNorm,
    SpectralNorm,
    WeightNorm,
    chain,
    network,
    parallel,
    repeat,
    residual,
)
from fnn.params import PathError
from fnn.train import CheckpointError, NonFiniteError, TrainStep, fit, train_step

A = np.random.default_rng(0).normal(size=(8, 3))


@network(hidden=Linear(4), output=Linear(2))
def BY_NAME(net, x):
    return net.output(ops.relu(net.hidden(x)))


NET = chain(a=Linear(4), b=ops.relu, out=residual(Linear(4)), last=Linear(1))


def squares(params, x):
    return jnp.sum((params - x) ** 2)


def init(params):
    return ()


def update(updates, state, params=None):
    return jax.tree.map(lambda u: -0.1 * u, updates), state


DESCENT = optax.GradientTransformation(init, update)


@fnn.rule
def wrong(x):
    return x * x


@wrong.forward
def _(x):
    return x * x, x


@wrong.backward
def _(x, g):
    return (3 * x * g,)


def gradient_error():
    try:
        fnn.check_rule(wrong, jnp.ones(2)).raise_if_wrong()
    except fnn.GradientError as error:
        return error
    return fnn.check_rule(wrong, jnp.ones(2))


def nonfinite_error():
    with pytest.raises(NonFiniteError) as error:
        fit(squares, jnp.zeros(3), A, optax.sgd(np.inf), epochs=1, shuffle=False, progress=False)
    return error.value


def exceptions():
    """Every exception class that a module of fnn defines."""
    found = set()
    for module in pkgutil.walk_packages(fnn.__path__, "fnn."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, BaseException):
                found |= {value} if value.__module__.startswith("fnn.") else set()
    return sorted(found, key=lambda kind: kind.__name__)


EXAMPLES = {
    "CheckpointError": lambda: CheckpointError("a message", "runs", 4, 2),
    "NonFiniteError": nonfinite_error,
    "GradientError": gradient_error,
    "PathError": lambda: PathError("load", ("a.W",), (), {"b": ("float32[3]", "float32[4]")}),
}


@pytest.mark.parametrize("kind", exceptions(), ids=lambda kind: kind.__name__)
def test_exceptions(kind):
    error = EXAMPLES.get(kind.__name__, lambda: kind("a message"))()
    assert type(error) is kind
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind and str(again) == str(error)
        assert vars(again).keys() == vars(error).keys()
        for name, value in vars(error).items():
            if isinstance(value, (str, int, tuple, type(None))) and not hasattr(value, "_fields"):
                assert getattr(again, name) == value


def test_an_error_carries_its_work_along():
    error = nonfinite_error()
    again = pickle.loads(pickle.dumps(error))
    assert (again.step, again.names, again.refused) == (error.step, error.names, error.refused)
    np.testing.assert_array_equal(again.result.params, np.zeros(3))
    more = fit(
        squares, again.result.state, A, optax.sgd(0.1), epochs=1, shuffle=False, progress=False
    )
    assert more.state.step == 1


def in_the_pool(_):
    raise NonFiniteError("step 3: a message", 3, ("loss",), 2)


@exhaustive
def test_an_error_comes_out_of_a_pool():
    context = multiprocessing.get_context("forkserver")
    with (
        concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool,
        pytest.raises(NonFiniteError, match="step 3") as error,
    ):
        pool.submit(in_the_pool, 0).result(timeout=120)
    assert error.value.refused == 2 and error.value.names == ("loss",)


@pytest.mark.parametrize(
    "layer",
    [
        Linear(3),
        Maxout(2, pieces=3),
        NET,
        parallel(a=Linear(2), b=ops.tanh),
        Linear(3, weight_init=fnn.initializers.he_uniform, use_bias=False),
        BY_NAME,
        dataclasses.replace(BY_NAME, parts={"hidden": Linear(5), "output": Linear(2)}),
        chain(
            Once(Linear(4)),
            WeightNorm(Linear(4)),
            RMSNorm(),
            DropPath(0.5),
            GroupNorm(2),
            SpectralNorm(Linear(3)),
            MLP(5),
        ),
        chain(repeat(residual(LayerNorm(), Linear(4), Dropout(0.5)), 3), BatchNorm()),
    ],
    ids=str,
)
def test_layers(layer):
    again = pickle.loads(pickle.dumps(layer))
    for other in (again, copy.deepcopy(layer), copy.copy(layer)):
        assert other == layer and hash(other) == hash(layer) and repr(other) == repr(layer)
    x = jnp.ones(4)
    params, state = layer.init(jax.random.key(0), x), layer.init_state(x)
    same = again.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    outputs = layer.apply(params, state, x), again.apply(same, state, x)
    jax.tree.map(np.testing.assert_array_equal, *outputs)


def test_what_has_no_name_says_so():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(chain(Linear(3), lambda x: x))


def test_steps():
    step = train_step(squares, DESCENT, nonfinite="skip", check=False)
    state, _ = step(step.init(jnp.zeros(3)), A)
    for again in (pickle.loads(pickle.dumps(step)), copy.deepcopy(step), copy.copy(step)):
        assert type(again) is TrainStep and again.loss is squares and again is not step
        other, metrics = again(again.init(jnp.zeros(3)), A)
        np.testing.assert_array_equal(other.params, state.params)
        assert "skipped" in metrics
    # Optax's are functions inside functions: copied, but not pickled.
    copy.deepcopy(train_step(squares, optax.adam(0.1)))
    with pytest.raises((pickle.PicklingError, AttributeError), match="local"):
        pickle.dumps(train_step(squares, optax.adam(0.1)))


def test_results():
    result = fit(squares, jnp.zeros(3), A, optax.adam(0.1), epochs=2, shuffle=False, progress=False)
    again = pickle.loads(pickle.dumps(result))
    jax.tree.map(np.testing.assert_array_equal, again.state, result.state)
    assert again.history == result.history and type(again.state) is type(result.state)

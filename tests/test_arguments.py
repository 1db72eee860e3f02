"""The checks of arguments: what they take, what they refuse, and in which words."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn import arguments

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "value", [1, 0.5, np.float32(2), np.int8(3), jnp.float16(1), np.array(2.0)]
)
def test_number_takes_real_scalars(value):
    assert arguments.number("f", "x", value, above=0) is value


@pytest.mark.parametrize("value", [0, -1.0, NAN, INF, -INF, jnp.float32(NAN), np.float64(INF)])
def test_number_refuses_what_is_out_of_range(value):
    with pytest.raises(ValueError, match="^f: x must be a positive finite number, but got "):
        arguments.number("f", "x", value, above=0)


@pytest.mark.parametrize(
    "value", [None, "1", True, np.True_, 1j, [1.0], (1,), jnp.ones(2), {}, len]
)
def test_number_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match="^f: x must be a positive finite number, but got "):
        arguments.number("f", "x", value, above=0)


def test_number_names_its_bounds():
    with pytest.raises(ValueError, match="a number of at least 0 and below 1, but got 1.0"):
        arguments.number("f", "x", 1.0, least=0, below=1)
    assert arguments.number("f", "x", INF, above=0, infinite=True) == INF
    with pytest.raises(ValueError, match="must be a positive number, but got nan"):
        arguments.number("f", "x", NAN, above=0, infinite=True)


def test_number_takes_a_traced_scalar_and_refuses_a_traced_array():
    jax.jit(lambda x: arguments.number("f", "x", x, above=0))(1.0)
    with pytest.raises(TypeError, match=r"got a traced array of dtype float.. and shape \(2,\)"):
        jax.jit(lambda x: arguments.number("f", "x", x, above=0))(jnp.ones(2))


def test_integer():
    assert arguments.integer("f", "n", np.int64(3), least=1) == 3
    assert type(arguments.integer("f", "n", jnp.int32(3))) is int
    for value in (1.0, True, None, "3", NAN, INF, jnp.ones(1, int), jnp.float32(1)):
        with pytest.raises(TypeError, match="^f: n must be an integer of at least 1, but got "):
            arguments.integer("f", "n", value, least=1)
    with pytest.raises(ValueError, match="an integer of at least 1, but got 0"):
        arguments.integer("f", "n", 0, least=1)


def test_flag_and_choice():
    assert arguments.flag("f", "check", np.True_) is True
    for value in (1, 0, None, "yes", jnp.array(True)):
        with pytest.raises(TypeError, match="^f: check must be True or False, but got "):
            arguments.flag("f", "check", value)
    assert arguments.choice("f", "mode", "a", ("a", "b")) == "a"
    with pytest.raises(ValueError, match="mode must be 'a' or 'b', but got 'c' of type str"):
        arguments.choice("f", "mode", "c", ("a", "b"))
    for value in (None, 1, ["a"], jnp.ones(2)):
        with pytest.raises(TypeError, match="^f: mode must be 'a' or 'b', but got "):
            arguments.choice("f", "mode", value, ("a", "b"))


def test_function():
    assert arguments.function("f", "loss", len) is len
    with pytest.raises(TypeError, match=r"loss must be a function loss\(p, x\), but got None\."):
        arguments.function("f", "loss", None, "a function loss(p, x)")


def test_key():
    for value in (jax.random.key(0), jax.random.PRNGKey(0), jax.random.key(0, impl="rbg")):
        assert arguments.key("f", "key", value) is value
    jax.jit(lambda k: arguments.key("f", "key", k))(jax.random.key(0))
    for value in (None, 0, 1.0, "0", jnp.ones(2), np.arange(2), [0, 1]):
        with pytest.raises(TypeError, match=r"key must be a key, such as jax.random.key\(0\), but"):
            arguments.key("f", "key", value)
    with pytest.raises(ValueError, match=r"one key \(shape \(\)\), but got an array of dtype key"):
        arguments.key("f", "key", jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match="must be a key"):
        arguments.key("f", "key", jnp.zeros(3, jnp.uint32))


def test_array():
    for value in (1, 1.0, np.ones(2), jnp.ones(2), jax.random.key(0)):
        assert arguments.array("f", "x", value) is value
    for value in (None, [1.0], "a", np.array(["a"]), (1.0,), {"x": 1}):
        with pytest.raises(TypeError, match="^f: x must be an array, but got "):
            arguments.array("f", "x", value)


# ------------------------------------------------------------------- what training returns, hints


def results():
    def loss(params, x):
        return jnp.sum((params["w"] * x) ** 2)

    data, params = np.ones((4, 2)), {"w": jnp.ones(2)}
    options = {"epochs": 1, "shuffle": False, "progress": False}
    return loss, data, fnn.fit(loss, params, data, optax.sgd(0.1), **options)


def test_a_result_in_the_place_of_parameters():
    loss, data, result = results()
    step = fnn.train_step(loss, optax.sgd(0.1))
    x, pair, outputs = data[0], (data, data), lambda z, t: z
    ways = [
        step.init,
        lambda given: fnn.grad(loss)(given, x),
        lambda given: fnn.value_and_grad(loss)(given, x),
        lambda given: fnn.vjp(loss, given, x),
        lambda given: fnn.graph(loss)(given, x),
        lambda given: fnn.per_example.grads(loss)(given, data),
        lambda given: fnn.per_example.clipped_grad(loss, 1.0)(given, data),
        lambda given: fnn.curvature.ggn_diagonal(loss, outputs)(given, pair),
        lambda given: fnn.curvature.hessian_vector_product(loss, outputs)(given, pair),
        lambda given: fnn.curvature.ggn_vector_product(loss, outputs)(given, pair),
        lambda given: fnn.curvature.empirical_fisher(loss, outputs)(given, pair),
    ]
    for way in ways:
        with pytest.raises(TypeError, match=r"the FitResult of fnn.fit: pass its `.params`"):
            way(result)
        with pytest.raises(TypeError, match=r"a training State: pass its `.params`"):
            way(result.state)
    with pytest.raises(TypeError, match=r"the FitResult of fnn.fit: pass its `.params`"):
        fnn.evaluate(loss, result, data)
    assert fnn.evaluate(loss, result.state, data) == fnn.evaluate(loss, result.params, data)
    with pytest.raises(TypeError, match=r"FitResult.*`.params`.*go on from its `.state`"):
        fnn.fit(loss, result, data, optax.sgd(0.1), epochs=1, shuffle=False)
    with pytest.raises(TypeError, match=r"FitResult.*`.state`"):
        step(result, data)


def test_no_hint_names_a_distribution_that_a_checkout_does_not_have():
    root = pathlib.Path(__file__).parents[1]
    for file in [*root.glob("fnn/**/*.py"), *root.glob("examples/*.py")]:
        if file.name != "arguments.py":
            assert not re.search(r"pip install [\"']?fnn", file.read_text()), file
    declared = (root / "pyproject.toml").read_text()
    for requirement in ("matplotlib>=3.9", "pygraphviz>=2.0", "scikit-learn>=1.5", "rich>=13"):
        assert f'"{requirement}"' in declared
    error = arguments.missing("x", "a>=1", "b", otherwise="Or not.")
    assert str(error) == 'x needs a and b: pip install "a>=1" b\nOr not.'

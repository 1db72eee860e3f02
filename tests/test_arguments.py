"""The checks of arguments: what they take, what they refuse, and in which words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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

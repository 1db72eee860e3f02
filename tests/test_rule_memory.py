"""What a rule remembers between its uses: nothing that changes, nothing that isn't needed."""

import copy
import gc
import pickle
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive, sweep

import fnn
from fnn import ops

X = jnp.arange(1.0, 4.0)

# ------------------------------------------------------------- what else changes a program


def matvec():
    op = fnn.rule(lambda W, x: W @ x)
    op.backward(lambda residuals, g: (jnp.outer(g, residuals[1]), residuals[0].T @ g))
    return op


def hvp(f):
    return lambda x: jax.jvp(jax.grad(f), (x,), (x,))[1]


PROGRAMS = {
    "value": lambda f: f,
    "grad": lambda f: jax.grad(f),
    "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(f))(x[None]),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
    "vmap of hvp": lambda f: lambda x: jax.vmap(hvp(f))(x[None]),
    "vjp by all": lambda f: lambda x: jax.vjp(lambda W, x: f(x, W), jnp.eye(3), x)[1](1.0),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_matmul_precision(program):
    """Set after the first use, changed, and unset again: each program has what holds now."""
    op = matvec()
    W = jnp.eye(3)
    f = PROGRAMS[program](lambda x, W=W: jnp.sum(op(W, x) ** 2))
    for precision in (None, "highest", None, "high", "highest", None):
        with jax.default_matmul_precision(precision):
            text = jax.jit(f).lower(X).as_text()
        found = set(re.findall(r"\b(DEFAULT|HIGH|HIGHEST), \1\b", text)) or {"DEFAULT"}
        assert "dot_general" in text
        assert found == {(precision or "default").upper()}


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
def test_dtypes_and_promotion():
    """64-bit mode and strict promotion, on and off again."""

    @fnn.rule
    def shifted(x):
        return x + jnp.sum(jnp.zeros((), "float64"))

    @shifted.backward
    def _(residuals, g):
        return (g.astype(residuals[0].dtype),)

    x = np.ones(2, np.float32)
    grad = jax.grad(lambda x: jnp.sum(shifted(x)))
    for _ in range(2):
        assert shifted(x).dtype == jnp.float64
        with jax.enable_x64(False):
            assert shifted(x).dtype == jnp.float32
            assert jax.jit(shifted)(x).dtype == grad(x).dtype == jnp.float32
        with jax.numpy_dtype_promotion("strict"):
            for f in (shifted, jax.jit(shifted), grad):
                with pytest.raises(ValueError, match="promotion"):
                    f(jnp.asarray(x))
        assert jax.jit(shifted)(x).dtype == jnp.float64


def test_rank_promotion():
    op = fnn.rule(lambda x, y: jnp.sum(x + y))
    op.backward(lambda residuals, g: (g * jnp.ones((2, 3)), None))
    grad = jax.grad(op)
    for _ in range(2):
        grad(jnp.ones((2, 3)), X)
        with jax.numpy_rank_promotion("raise"), pytest.raises(ValueError, match="rank"):
            grad(jnp.ones((2, 3)), X)


@exhaustive
def test_random_bits():
    """Keys of another kind, and the other way to draw bits from one of the same kind."""

    @fnn.rule
    def noisy(x):
        return x * jax.random.uniform(jax.random.key(0), x.shape)

    @noisy.backward
    def _(residuals, g):
        return (g * jax.random.uniform(jax.random.key(0), g.shape),)

    plain = lambda x: x * jax.random.uniform(jax.random.key(0), x.shape)
    for _ in range(2):
        for options in ({}, {"threefry_partitionable": False}, {"default_prng_impl": "rbg"}):
            before = {name: getattr(jax.config, f"jax_{name}") for name in options}
            try:
                for name, value in options.items():
                    jax.config.update(f"jax_{name}", value)
                wanted = plain(X)
                value, pull = jax.vjp(noisy, X)
                np.testing.assert_array_equal(value, wanted)
                np.testing.assert_array_equal(pull(X)[0], wanted)
                np.testing.assert_array_equal(jax.jvp(noisy, (X,), (X,))[1], wanted)
            finally:
                for name, value in before.items():
                    jax.config.update(f"jax_{name}", value)


def test_a_named_axis():
    """Its size is a number to the rule, and another one at the next use."""

    @fnn.rule
    def share(x):
        return x / jax.lax.axis_size("batch")

    share.backward(lambda residuals, g: (g / jax.lax.axis_size("batch"),))
    for size in (2, 4, 2):
        grad = jax.vmap(jax.grad(share), axis_name="batch")(jnp.ones(size))
        np.testing.assert_array_equal(grad, np.full(size, 1 / size))


# --------------------------------------------------------------------- what changes between uses


class Setting:
    """Hashable and mutable, as configuration objects are."""

    def __init__(self, scale):
        self.scale = scale


def all_derivatives(f, x):
    value, grad = jax.value_and_grad(f)(x)
    return value, grad, jax.jvp(f, (x,), (1.0,))[1], jax.vmap(jax.grad(f))(x[None])[0]


def test_a_static_argument_that_changes():
    """A call outside jit sees what it holds now: value, gradient and tangent alike."""

    @fnn.rule
    def times(x, *, setting):
        return setting.scale * x

    times.backward(lambda residuals, g, *, setting: (setting.scale * g,))
    setting = Setting(2.0)
    for scale in (2.0, 5.0, 3.0):
        setting.scale = scale
        found = all_derivatives(lambda x: times(x, setting=setting), jnp.asarray(2.0))
        assert found == (2 * scale, scale, scale, scale)
        compiled = jax.jit(lambda x: all_derivatives(lambda x: times(x, setting=setting), x))
        assert compiled(jnp.asarray(2.0)) == found


def test_a_closure_that_changes():
    """Rebound names, lists and numpy arrays; with residuals of another structure too."""
    scale, box, array = 2.0, [2.0], np.full((), 2.0)

    @fnn.rule
    def times(x):
        return scale * box[0] * array * x

    @times.forward
    def _(x):
        return scale * box[0] * array * x, [jnp.float32(scale)] * len(box)

    @times.backward
    def _(residuals, g):
        return (scale * box[0] * array * g,)

    x = jnp.asarray(2.0)
    assert all_derivatives(times, x) == (16, 8, 8, 8)
    scale = 3.0
    assert all_derivatives(times, x) == (24, 12, 12, 12)
    box[:] = [1.0, 1.0]
    assert all_derivatives(times, x) == (12, 6, 6, 6)
    array[...] = 1.0
    assert all_derivatives(times, x) == (6, 3, 3, 3)


def test_a_gradient_that_becomes_none():
    is_frozen = False
    op = fnn.rule(lambda x, y: x * y)
    op.backward(lambda r, g: (g * r[1], None if is_frozen else g * r[0]))
    grad = jax.grad(op, (0, 1))
    assert grad(2.0, 3.0) == (3, 2)
    is_frozen = True
    assert grad(2.0, 3.0) == (3, 0)


# --------------------------------------------------------------------------- what can be dropped

USES = {
    "call": lambda f: f(X),
    "jit": lambda f: jax.jit(f)(X),
    "grad": lambda f: jax.grad(lambda x: jnp.sum(f(x)))(X),
    "vjp": lambda f: jax.vjp(f, X)[1](X),
    "jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "vmap": lambda f: jax.vmap(f)(X[None]),
    "jacfwd": lambda f: jax.jacfwd(f)(X),
    "linearize": lambda f: jax.linearize(f, X)[1](X),
    "jit of vmap of grad": lambda f: jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(f(x)))))(X[None]),
    "hessian": lambda f: jax.hessian(lambda x: jnp.sum(f(x) ** 2))(X),
    "checkpoint": lambda f: jax.jit(jax.grad(lambda x: jnp.sum(jax.checkpoint(f)(x))))(X),
    "scan in jit": lambda f: jax.jit(
        lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)
    )(X),
    "graph": lambda f: fnn.grad(lambda x: jnp.sum(f(x)))(X),
    "make_jaxpr": lambda f: jax.make_jaxpr(f)(X),
    "eval_shape": lambda f: jax.eval_shape(f, X),
}


@pytest.mark.parametrize(
    "use", sweep(USES, ["call", "jit of vmap of grad", "hessian", "checkpoint", "graph"])
)
def test_a_dropped_rule_goes_with_its_closure(use):
    """Without `jax.clear_caches()`."""

    def used():
        big, owner = jnp.arange(3.0), Setting(2.0)
        op = fnn.rule(lambda x: x * big * owner.scale)
        op.backward(lambda residuals, g: (g * big * owner.scale,))
        USES[use](op)
        return weakref.ref(owner), weakref.ref(op)

    owner, op = used()
    gc.collect()
    gc.collect()  # what JAX holds of the dropped functions goes first
    assert owner() is None and op() is None


@pytest.mark.parametrize(
    "use", sweep(["call", "grad", "jit of vmap of grad", "hessian", "graph"], ["hessian"])
)
def test_a_dropped_rule_that_calls_itself(use):
    def used():
        owner = Setting(2.0)

        @fnn.rule
        def op(x):
            return jnp.exp(owner.scale * x)

        @op.forward
        def _(x):
            y = op(x)
            return y, y

        op.backward(lambda y, g: (owner.scale * y * g,))
        USES[use](op)
        return weakref.ref(owner)

    owner = used()
    gc.collect()
    gc.collect()  # what JAX holds of the dropped functions goes first
    assert owner() is None


def test_a_jaxpr_keeps_its_rules():
    """The operation was made inside the function, and is gone; it can still be differentiated."""

    def f(x):
        op = fnn.rule(lambda x: x**2)
        op.backward(lambda residuals, g: (2 * residuals[0] * g,))
        return op(x)

    closed = jax.make_jaxpr(f)(2.0)
    jitted = jax.jit(f)
    gc.collect()
    again = lambda x: jax.core.eval_jaxpr(closed.jaxpr, closed.consts, x)[0]
    for g in (again, jitted):
        assert (g(3.0), jax.grad(g)(3.0), jax.grad(jax.grad(g))(3.0)) == (9, 6, 2)
        assert jax.vmap(jax.grad(g))(jnp.ones(2)).tolist() == [2, 2]


def test_names_are_no_identities():
    """Two operations of one name are two."""

    def made(power):
        def op(x):
            return x**power

        op = fnn.rule(op)
        op.backward(lambda residuals, g: (power * residuals[0] ** (power - 1) * g,))
        return op

    square, cube = made(2), made(3)
    assert square.name == cube.name and square != cube
    f = jax.jit(lambda x: square(x) + cube(x))
    assert (f(2.0), jax.grad(f)(2.0)) == (12, 16)


# ------------------------------------------------------------------------------ copies, pickles


def double(x):
    return 2 * x


def double_backward(residuals, g):
    return (2 * g,)


def test_a_rule_without_a_name_of_its_own_is_pickled_by_its_functions():
    op = fnn.rule(double)  # the name `double` is the function's
    op.backward(double_backward)
    again = pickle.loads(pickle.dumps(op))
    assert again != op and again.name == "double"
    assert (again(3.0), jax.grad(again)(3.0)) == (6, 2)


def test_copies_and_pickles():
    assert copy.deepcopy(ops.relu) is copy.copy(ops.relu) is ops.relu
    assert pickle.loads(pickle.dumps(ops.relu)) is ops.relu
    local = matvec()
    assert copy.deepcopy({"f": local})["f"] is local
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda|local"):
        pickle.dumps(local)
    error = fnn.RuleError("op.backward: wrong")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is fnn.RuleError and again.args == error.args

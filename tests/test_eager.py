"""Outside jit: a second call compiles nothing, and keeps no function and no array alive."""

import functools
import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import compiled_programs
from jax import lax
from sweeps import exhaustive, sweep

import fnn
from fnn import curvature, ops, per_example
from fnn.eager import once
from fnn.layers import LSTM, Linear, chain, recurrent, repeat

W = 0.3 * jnp.eye(3) + 0.1
X = jnp.linspace(0.5, 1, 3)
BATCH = jnp.linspace(-1, 1, 6).reshape(2, 3)


def plain(K):
    return lambda W, x: jnp.sum(jnp.tanh(W @ jnp.tanh(W @ x + K)) ** 2)


def operations(K):
    return lambda W, x: jnp.sum(ops.softmax(W @ ops.gelu(W @ x + K)) ** 2)


def loops(K):
    """Scan, cond, fori_loop, while_loop and checkpoint, with custom rules and operations inside."""

    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, g: (g * cos,))

    def loss(W, x):
        def step(c, a):
            c = jax.nn.relu(W @ c + a + K)
            c = lax.cond(c[0] > 0, lambda c: c * K, lambda c: c * 2, c)
            c = jax.checkpoint(lambda c: jnp.sin(W @ c))(ops.tanh(c))
            return sine(c), jnp.where(c > 0, c, 0.0)

        c, ys = lax.scan(step, x, jnp.arange(12.0).reshape(4, 3))
        c = lax.cond(c[0] > 0, lambda c: c * K, lambda c: c * 2, sine(c))
        c = lax.fori_loop(0, 3, lambda i, c: c * W[0], c)
        small = lax.stop_gradient(jnp.abs(c[0])) + 1
        n, _ = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + s[1], s[1]), (small, small))
        return jnp.sum(c * n) + jnp.sum(ys)

    return loss


def solve(K):
    def loss(W, x):
        found, _ = jax.scipy.sparse.linalg.cg(lambda v: W @ (W.T @ v) + v, x * K)
        return jnp.sum(found**2)

    return loss


def _vjp_of_vjp(f):
    return fnn.vjp(lambda W: fnn.vjp(f, W, X)[1](jnp.ones(()))[0], W)[1](W)


def _microbatches(f):
    return per_example.clipped_grad(f, 1.0, microbatch_size=1)(W, BATCH)


CALLS = {
    "grad": lambda f: fnn.grad(f, (0, 1))(W, X),
    "value_and_grad": lambda f: fnn.value_and_grad(f)(W, X),
    "vjp": lambda f: fnn.vjp(f, W, X)[1](jnp.ones(())),
    "vjp of vjp": _vjp_of_vjp,
    "vmap of grad": lambda f: jax.vmap(fnn.grad(f), (None, 0))(W, BATCH),
    "graph": lambda f: fnn.graph(f)(W, X).backprop()["x"].gradient,
    "grads": lambda f: per_example.grads(f)(W, BATCH)[1].norms(),
    "clipped_grad": lambda f: per_example.clipped_grad(f, 1.0)(W, BATCH),
    "microbatches": _microbatches,
}


def counted(call):
    with compiled_programs() as programs:
        jax.block_until_ready(call())
    return len(programs)


def _calls():
    """Quickly: each call of one function, and each function by one call."""
    for name in CALLS:
        for make in (plain, operations, loops, solve):
            quick = make is operations or name == "value_and_grad"
            yield pytest.param(
                name, make, id=f"{name}-{make.__name__}", marks=() if quick else exhaustive
            )


@pytest.mark.parametrize(("name", "make"), list(_calls()))
def test_a_second_call_compiles_nothing(name, make):
    """Even if the function, and all functions in it, are made anew for each call."""
    call = lambda: CALLS[name](make(jnp.arange(1.0, 4.0)))
    call()
    assert counted(call) == 0


def _mapped(net):
    return lambda p, x: jax.vmap(net, (None, 0))(p, jnp.stack([x, 2 * x]))


LOOPS = {
    "repeat": repeat(chain(Linear(8), ops.tanh), 3),
    "repeat remat": repeat(chain(Linear(8), ops.tanh), 3, remat=True),
    "recurrent": recurrent(chain(lambda h, x: (jnp.tanh(h + x), h)), lambda x: jnp.zeros(8)),
    "LSTM remat": LSTM(8, remat=True),
}


@pytest.mark.parametrize("of", [lambda net: net, _mapped], ids=["one", "vmap"])
@pytest.mark.parametrize("name", sweep(LOOPS, ["repeat", "recurrent"]))
def test_a_second_call_of_a_network_with_a_loop_compiles_nothing(name, of):
    net, x = LOOPS[name], jnp.linspace(-1, 1, 48).reshape(6, 8)
    params = net.init(jax.random.key(0), x)
    call = lambda: of(net)(params, x)
    np.testing.assert_allclose(call(), jax.jit(of(net))(params, x), rtol=1e-5, atol=1e-6)
    assert counted(call) == 0


def _model(K):
    def model(p, x):
        h, _ = lax.scan(lambda h, w: (jnp.tanh(w @ h + K), None), x, p["W"])
        return p["V"] @ h

    return model


PARAMS = {"W": jnp.stack([W, W.T]), "V": jnp.ones((2, 3)).at[0, 0].set(0.5)}
DATA = (BATCH, jnp.array([0, 1]))
LOSS = ops.softmax_cross_entropy
CURVATURE = {
    "ggn_vector_product": lambda m: curvature.ggn_vector_product(m, LOSS)(PARAMS, DATA) @ PARAMS,
    "hessian_vector_product": lambda m: (
        curvature.hessian_vector_product(m, LOSS)(PARAMS, DATA) @ PARAMS
    ),
    "fisher_vector_product": lambda m: (
        curvature.fisher_vector_product(m, LOSS, key=jax.random.key(0), samples=2)(PARAMS, DATA)
        @ PARAMS
    ),
    "ggn_diagonal": lambda m: curvature.ggn_diagonal(m, LOSS)(PARAMS, DATA),
    "hessian_diagonal": lambda m: curvature.hessian_diagonal(m, LOSS)(PARAMS, DATA),
    "ntk": lambda m: curvature.ntk(m)(PARAMS, BATCH),
    "kronecker_factors": lambda m: jax.tree.leaves(
        curvature.kronecker_factors(m, LOSS)(PARAMS, DATA)
    ),
    "eigenpairs": lambda m: curvature.eigenpairs(
        curvature.ggn_vector_product(m, LOSS)(PARAMS, DATA), 2, jax.random.key(0)
    ),
    "natural_gradient": lambda m: curvature.natural_gradient(m, LOSS)(PARAMS, DATA),
}


@exhaustive
@pytest.mark.parametrize("name", sweep(CURVATURE, ["ggn_diagonal"]))
def test_a_second_call_for_curvature_compiles_nothing(name):
    call = lambda: CURVATURE[name](_model(jnp.ones(3)))
    call()
    assert counted(call) == 0


@exhaustive
@pytest.mark.parametrize("make", [loops, solve])
def test_gradients_outside_jit_are_those_inside(make):
    f = make(jnp.arange(1.0, 4.0))
    ours, theirs = fnn.grad(f, (0, 1))(W, X), jax.jit(jax.grad(f, (0, 1)))(W, X)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-12)
    by_vmap = jax.vmap(fnn.grad(f, (0, 1)), (None, 0))(W, BATCH)
    theirs = jax.jit(jax.vmap(jax.grad(f, (0, 1)), (None, 0)))(W, BATCH)
    chex.assert_trees_all_close(by_vmap, theirs, rtol=1e-12)


@exhaustive
def test_jax_differentiates_a_gradient_outside_jit():
    """By the rules that stand in the loops' bodies, custom ones too."""
    f = loops(jnp.arange(1.0, 4.0))
    ours = jax.grad(lambda x: jnp.sum(fnn.grad(f)(W, x) ** 2))(X)
    theirs = jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(f)(W, x) ** 2)))(X)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_what_differs_in_a_loop_is_compiled_by_itself():
    """Loops that differ in one number, dtype, operation or setting aren't taken for each other."""

    def run(x, times, function, dtype=jnp.float64):
        loop = lambda x: lax.scan(lambda c, _: (function(c) * times, None), x, None, length=2)[0]
        return once(loop)(x.astype(dtype))

    x = jnp.linspace(0.1, 1, 3)
    np.testing.assert_allclose(run(x, 2.0, jnp.sin), 2 * np.sin(2 * np.sin(x)))
    np.testing.assert_allclose(run(x, 3.0, jnp.sin), 3 * np.sin(3 * np.sin(x)))
    np.testing.assert_allclose(run(x, 3.0, jnp.cos), 3 * np.cos(3 * np.cos(x)))
    assert run(x, 3.0, jnp.cos, jnp.float32).dtype == jnp.float32
    for K in (jnp.array([1.0, 2, 3]), jnp.array([3.0, 2, 1])):  # held arrays
        np.testing.assert_allclose(run(x, K, jnp.sin), K * np.sin(K * np.sin(x)))
    for power in (2.0, 3.0):  # an operation's static argument, and rules made in functions

        @fnn.rule
        def raised(x, *, n=power):
            return x**n

        np.testing.assert_allclose(run(x, 1.0, raised), x ** (power * power))


class Held:
    """Something of the user's that a function closes over."""


def _holding(kind):
    """A function that holds an array and an object, and weak references to them."""
    K, held = jnp.full(3, 2.0) + 0, Held()

    def inside(x):
        held  # noqa: B018
        return jnp.sin(x) * K

    by_vjp = jax.custom_vjp(lambda x: inside(x))
    by_vjp.defvjp(lambda x: (inside(x), x), lambda x, g: (held and g * jnp.cos(x) * K,))

    by_rule = fnn.rule(inside)
    by_rule.backward(lambda residuals, g: (held and g * jnp.cos(residuals[0]) * K,))

    def scanned(f):
        return lambda x: lax.scan(lambda c, _: (f(c), c), x, None, length=3)[0].sum()

    functions = {
        "closure": lambda x: inside(x).sum(),
        "custom_vjp": lambda x: by_vjp(x).sum(),
        "scan": scanned(inside),
        "scan of custom_vjp": scanned(by_vjp),
        "scan of rule": scanned(by_rule),
        "cond": lambda x: lax.cond(x[0] > 0, inside, lambda x: x, x).sum(),
        "checkpoint": lambda x: jax.checkpoint(inside)(x).sum(),
        "jit": lambda x: jax.jit(inside)(x).sum(),
    }
    return functions[kind], weakref.ref(K), weakref.ref(held)


@pytest.mark.parametrize(
    "kind",
    sweep(
        [
            "closure",
            "custom_vjp",
            "scan",
            "scan of custom_vjp",
            "scan of rule",
            "cond",
            "checkpoint",
            "jit",
        ],
        quick=["closure", "scan of custom_vjp", "scan of rule", "jit"],
    ),
)
@pytest.mark.parametrize(
    "call",
    [
        lambda f: fnn.grad(f)(X),
        lambda f: fnn.vjp(f, X)[1](jnp.ones(())),
        lambda f: jax.vmap(fnn.grad(f))(BATCH),
        lambda f: jax.jit(fnn.grad(f))(X),
        lambda f: per_example.grads(lambda p, x: f(p * x))(X, BATCH),
    ],
    ids=["grad", "vjp", "vmap", "jit", "per-example"],
)
def test_no_function_and_no_array_is_kept(kind, call):
    function, array, held = _holding(kind)
    call(function)
    del function
    gc.collect(), gc.collect()  # JAX's own caches let go in the second round
    assert array() is None and held() is None


def test_the_value_of_a_closure_is_read_at_each_call():
    scale = [2.0]
    f = lambda x: lax.scan(lambda c, _: (c * scale[0], None), x, None, length=2)[0].sum()
    np.testing.assert_allclose(fnn.grad(f)(X), 4)
    scale[0] = 3.0
    np.testing.assert_allclose(fnn.grad(f)(X), 9)
    np.testing.assert_allclose(once(functools.partial(f))(X), 9 * X.sum())


def _loop_of_a_rule(kind):
    """A loop, and what its body's rule reads of its closure: a number and an array."""
    box = [2.0, jnp.ones(3)]

    @fnn.rule
    def scaled(x):
        return x * box[0] * box[1]

    @fnn.rule
    def outer(x):
        return scaled(x)

    for operation in (scaled, outer):
        operation.backward(lambda residuals, g: (g * box[0] * box[1],))

    def three_times(f):
        return lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=3)[0]

    loops = {
        "scan": three_times(scaled),
        "while": lambda x: lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, scaled(s[1])), (0, x)
        )[1],
        "fori": lambda x: lax.fori_loop(0, 3, lambda i, c: scaled(c), x),
        "rule in a rule": three_times(outer),
        "cond": three_times(lambda c: lax.cond(c[0] > 0, scaled, lambda c: c, c)),
        "jit": three_times(lambda c: jax.jit(lambda c: scaled(c))(c)),
        "scan in a scan": three_times(
            lambda c: lax.scan(lambda c, _: (scaled(c), None), c, None, length=1)[0]
        ),
        "vmap": lambda x: jax.vmap(three_times(scaled))(jnp.stack([x, 2 * x]))[0],
        "jvp": lambda x: jax.jvp(three_times(scaled), (x,), (x,))[1],
    }
    loop = loops[kind]
    return lambda x: loop(x).sum(), box


RULE_CALLS = {
    "once": lambda f: once(lambda x: f(x))(X),
    "value_and_grad": lambda f: fnn.value_and_grad(lambda x: f(x))(X)[0],
    "vjp": lambda f: fnn.vjp(lambda x: f(x), X)[0],
    "graph": lambda f: fnn.graph(lambda x: f(x))(X).value,
}


@pytest.mark.parametrize(
    "kind",
    sweep(
        ["scan", "while", "fori", "rule in a rule", "cond", "jit", "scan in a scan", "vmap", "jvp"],
        quick=["scan", "jvp", "cond"],
    ),
)
@pytest.mark.parametrize("call", sweep(RULE_CALLS, quick=["value_and_grad"]))
def test_a_rule_in_a_loop_sees_what_its_closure_holds_at_each_call(kind, call):
    """And a call with the same values compiles nothing."""
    f, box = _loop_of_a_rule(kind)
    run = RULE_CALLS[call]
    for number, array in ((2.0, jnp.ones(3)), (5.0, jnp.ones(3)), (5.0, jnp.full(3, 3.0))):
        box[:] = number, array
        expected = (number * array[0]) ** 3 * X.sum()
        np.testing.assert_allclose(run(f), expected, rtol=1e-12)
    box[1] = jnp.full(3, 7.0)  # arrays are arguments
    assert counted(lambda: run(f)) == 0
    np.testing.assert_allclose(run(f), (5 * 7) ** 3 * X.sum(), rtol=1e-12)


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_a_jit_with_shardings_sees_the_arrays_of_its_closure(in_a_loop):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(K):
        inside = jax.jit(lambda x: x * K)
        f = jax.jit(lambda x: inside(x), in_shardings=jax.NamedSharding(mesh, jax.P()))
        loop = lambda x: lax.scan(lambda c, _: (f(c), None), x, None, length=1)[0]
        return fnn.value_and_grad(lambda x: (loop if in_a_loop else f)(x).sum())(X)

    for K in (jnp.ones(3), jnp.arange(3.0)):
        value, gradient = run(K)
        np.testing.assert_allclose(value, (X * K).sum(), rtol=1e-12)
        np.testing.assert_allclose(gradient, K)

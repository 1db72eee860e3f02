"""The rules of loops, branches, checkpoints and custom derivatives, against JAX's own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas
from sweeps import sweep

import fnn

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape))


W, H, XS = normal(4, 4), normal(4), normal(6, 4)


def rnn(W, h, xs):
    def step(h, x):
        h = jnp.tanh(W @ h + x)
        return h, h * x

    h, ys = lax.scan(step, h, xs)
    return jnp.sum(h**2) + jnp.sum(ys**3)


def reversed_scan(W, h, xs):
    h, ys = lax.scan(lambda h, x: (jnp.tanh(W @ h + x), jnp.sin(h)), h, xs, reverse=True)
    return jnp.sum(h**2) + jnp.sum(ys)


def unrolled_scan_without_ys(W, h, xs):
    return jnp.sum(lax.scan(lambda h, x: (jnp.tanh(W @ h + x), jnp.sin(h)), h, xs, unroll=4)[0])


def scan_that_closes_over_a_constant(h, xs):
    return jnp.sum(lax.scan(lambda h, x: (jnp.tanh(W @ h + x), None), h, xs)[0])


def scan_that_counts(h, xs):
    def step(carry, x):
        n, h = carry
        return (n + 1, jnp.tanh(h * n + x)), n

    return jnp.sum(lax.scan(step, (0, h), xs)[0][1])


def scan_of_weight_norm(V, h, xs):
    """What depends on the weights alone is hoisted out of the loop."""

    def step(h, x):
        return jnp.tanh((V / jnp.linalg.norm(V)) @ h + x), None

    return jnp.sum(lax.scan(step, h, xs)[0])


def nested_scan(W, h, xs):
    def outer(h, x):
        inner = lax.scan(lambda a, b: (jnp.sin(a * b) + W @ a, None), h, xs)[0]
        return 0.1 * inner + x, None

    return jnp.sum(lax.scan(outer, h, xs)[0])


def scan_without_steps(h):
    return jnp.sum(lax.scan(lambda h, x: (h * x, h), h, jnp.zeros((0, 4)))[0] ** 2)


def lstm(p, xs):
    def step(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(p["W"] @ jnp.concatenate([h, x]) + p["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return jnp.sum(lax.scan(step, (jnp.zeros(4), jnp.zeros(4)), xs)[1] ** 2)


def two_branches(x):
    return jnp.sum(lax.cond(x[0] > 0, lambda x: jnp.sin(x) * 2, lambda x: x**3, x))


def five_branches(x, W):
    branches = [
        lambda x: x,
        lambda x: jnp.exp(W @ x),
        lambda x: W @ jnp.cos(x),
        lambda x: jnp.ones(4),
        lambda x: x * jax.random.normal(jax.random.key(0), (4,)),
    ]
    return sum(jnp.sum(lax.switch(i, branches, x)) for i in range(5))


def branches_with_a_key(x):
    def noisy(x):
        key = jax.random.fold_in(jax.random.key(0), 1)
        return x * jax.random.normal(key, x.shape)

    return jnp.sum(lax.cond(x[0] > 0, noisy, jnp.sin, x))


def branch_in_scan(W, h, xs):
    def step(h, x):
        return lax.cond(x[0] > 0, lambda h: jnp.tanh(W @ h), jnp.sin, h), h

    return jnp.sum(lax.scan(step, h, xs)[1])


def fori(x):
    return jnp.sum(lax.fori_loop(0, 5, lambda i, h: jnp.sin(h) * x + i, x))


def inner(W, x):
    return jnp.sin(W @ jnp.tanh(W @ x))


def checkpointed(policy):
    def f(W, x):
        return jnp.sum(jax.checkpoint(inner, policy=policy)(W, x) ** 2)

    return f


def checkpoint_by_name(W, x):
    def inner(W, x):
        y = checkpoint_name(jnp.tanh(W @ x), "kept")
        return jnp.sin(W @ y)

    policy = jax.checkpoint_policies.save_only_these_names("kept")
    return jnp.sum(jax.checkpoint(inner, policy=policy)(W, x))


def checkpoint_in_scan(W, h, xs):
    step = jax.checkpoint(lambda h, x: (jnp.tanh(W @ jnp.sin(W @ h) + x), None))
    return jnp.sum(lax.scan(step, h, xs)[0])


@jax.custom_vjp
def doubled(x, n):
    return 2 * x


# Deliberately not the true derivative: a rule that somebody wrote must be the one that is used.
doubled.defvjp(lambda x, n: (2 * x, x), lambda x, g: (g * x, None))


@jax.custom_jvp
def tripled(x):
    return 3 * x


tripled.defjvp(lambda primals, tangents: (3 * primals[0], 5 * primals[0] * tangents[0]))


@fnn.rule
def bend(x):
    return x**2


@bend.backward
def _(residuals, g):
    (x,) = residuals
    return (7 * x * g,)  # not the true derivative either


CASES = {
    "scan": (rnn, W, H, XS),
    "reversed scan": (reversed_scan, W, H, XS),
    "unrolled scan": (unrolled_scan_without_ys, W, H, XS),
    "scan over a constant": (scan_that_closes_over_a_constant, H, XS),
    "scan with a counter": (scan_that_counts, H, XS),
    "scan of weight norm": (scan_of_weight_norm, W, H, XS),
    "nested scan": (nested_scan, W, H, XS),
    "scan without steps": (scan_without_steps, H),
    "lstm": (lstm, {"W": normal(16, 8), "b": normal(16)}, XS),
    "cond": (two_branches, H),
    "switch": (five_branches, H, W),
    "cond with a key": (branches_with_a_key, H),
    "cond in scan": (branch_in_scan, W, H, XS),
    "fori": (fori, H),
    "checkpoint": (checkpointed(None), W, H),
    "checkpoint, dots": (checkpointed(jax.checkpoint_policies.dots_saveable), W, H),
    "checkpoint, all": (checkpointed(jax.checkpoint_policies.everything_saveable), W, H),
    "checkpoint, names": (checkpoint_by_name, W, H),
    "checkpoint in scan": (checkpoint_in_scan, W, H, XS),
    "custom_vjp": (lambda x: jnp.sum(doubled(x, 3) ** 2), H),
    "custom_vjp in scan": (
        lambda x, xs: jnp.sum(lax.scan(lambda h, y: (doubled(h, 3) * y, None), x, xs)[0]),
        H,
        XS,
    ),
    "custom_jvp": (lambda x: jnp.sum(tripled(x) ** 2), H),
    "operation": (lambda x: jnp.sum(bend(x) ** 2), H),
    "operation in scan": (
        lambda x, xs: jnp.sum(lax.scan(lambda h, y: (bend(h) * y, None), x, xs)[0]),
        H,
        XS,
    ),
    "operation under vmap": (lambda W, xs: jnp.sum(jax.vmap(lambda x: bend(W @ x))(xs)), W, XS),
    "linear solve": (lambda A, b: jnp.sum(jnp.linalg.solve(A, b) ** 2), W + 4 * jnp.eye(4), H),
    "conjugate gradients": (
        lambda A, b: jnp.sum(jax.scipy.sparse.linalg.cg(lambda x: A @ (A.T @ x) + x, b)[0] ** 2),
        W,
        H,
    ),
    "jit in jit": (lambda x: jax.jit(lambda x: jnp.sum(jax.jit(jnp.sin)(x) * x))(x), H),
}


# One of each kind; and of loops, one that starts with zero steps and one that holds constants.
QUICK = ["scan of weight norm", "scan without steps", "fori", "cond in scan", "checkpoint, names"]
QUICK += ["custom_vjp in scan", "custom_jvp", "operation in scan", "linear solve"]
QUICK_TWICE = ["cond with a key", "checkpoint", "operation in scan"]


@pytest.mark.parametrize("name", sweep(CASES, QUICK))
def test_gradient_is_jaxs(name):
    f, *args = CASES[name]
    argnums = tuple(range(len(args)))
    want = jax.value_and_grad(f, argnums)(*args)
    for transform in (lambda g: g, jax.jit):
        got = transform(fnn.value_and_grad(f, argnums))(*args)
        chex.assert_trees_all_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sweep(CASES, QUICK_TWICE))
def test_second_order_in_every_nesting(name):
    f, *args = CASES[name]
    argnums = tuple(range(len(args)))

    def twice(outer, inner):
        def of_gradient(*args):
            return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(inner(f, argnums)(*args)))

        return jax.jit(outer(of_gradient, argnums))(*args)

    want = twice(jax.grad, jax.grad)
    for outer, inner in ((fnn.grad, fnn.grad), (jax.grad, fnn.grad), (fnn.grad, jax.grad)):
        got = twice(outer, inner)
        chex.assert_trees_all_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["scan", "lstm", "cond", "checkpoint in scan", "switch"])
def test_costs_no_more_than_jax(name):
    f, *args = CASES[name]
    argnums = tuple(range(len(args)))

    def cost(value_and_grad):
        compiled = jax.jit(value_and_grad(f, argnums)).lower(*args).compile()
        return (
            compiled.cost_analysis()["flops"],
            compiled.memory_analysis().temp_size_in_bytes,
        )

    ours, theirs = cost(fnn.value_and_grad), cost(jax.value_and_grad)
    assert ours[0] <= 1.02 * theirs[0] + 4  # a handful of scalar operations aside
    assert ours[1] <= 1.02 * theirs[1]


def test_checkpoint_forgets_in_a_loop():
    """The loop's residuals are each step's inputs, not what the checkpoint computes inside."""
    xs = normal(50, 64)
    W = normal(64, 64) / 8

    def f(use_checkpoint):
        def step(h, x):
            for _ in range(8):
                h = jnp.tanh(W @ h)
            return h + x, None

        step = jax.checkpoint(step) if use_checkpoint else step
        return lambda xs: jnp.sum(lax.scan(step, jnp.zeros(64), xs)[0])

    def temporaries(g):
        return jax.jit(g).lower(xs).compile().memory_analysis().temp_size_in_bytes

    plain, remat = (temporaries(fnn.grad(f(use))) for use in (False, True))
    assert remat < plain / 3
    assert remat <= 1.02 * temporaries(jax.grad(f(True)))


def test_while_with_a_counter_is_a_scan():
    def f(x, start, step):
        def body(state):
            i, y = state
            return i + step, jnp.sin(y) * x

        return jnp.sum(lax.while_loop(lambda s: s[0] < 7, body, (start, x))[1])

    def g(x, n):
        for _ in range(n):
            pass
        y = x
        for _ in range(n):
            y = jnp.sin(y) * x
        return jnp.sum(y)

    for start, step, n in ((0, 1, 7), (2, 2, 3), (7, 1, 0), (-1, 3, 3)):
        got = fnn.grad(lambda x: f(x, start, step))(H)  # noqa: B023
        np.testing.assert_allclose(got, jax.grad(g)(H, n), rtol=1e-12)


def test_while_counting_down():
    def f(x):
        loop = lax.while_loop(lambda s: s[0] >= 0, lambda s: (s[0] - 2, s[1] * x), (5, x))
        return jnp.sum(loop[1])

    np.testing.assert_allclose(fnn.grad(f)(H), 4 * H**3, rtol=1e-12)


def test_while_with_unknown_trip_count_is_jaxs_error():
    def f(x):
        return lax.while_loop(lambda s: s[1] < 5.0, lambda s: (s[0], s[1] + s[0]), (x, x))[1]

    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work for"):
        jax.grad(f)(1.0)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work for") as e:
        fnn.grad(f)(1.0)
    assert "lax.scan" in str(e.value)


def test_while_that_nothing_differentiable_enters():
    def f(x):
        n = lax.while_loop(lambda n: n < 10, lambda n: 2 * n, 1)
        return jnp.sum(x) * n

    np.testing.assert_allclose(fnn.grad(f)(H), 16 * jnp.ones(4))


def test_a_branch_of_another_platform_is_not_compiled_here():
    @jax.custom_vjp
    def for_tpu(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pallas.pallas_call(kernel, out_shape=shape)(x)

    def kernel(x, y):
        y[...] = 2 * x[...]

    for_tpu.defvjp(lambda x: (for_tpu(x), None), lambda _, g: (for_tpu(g),))

    def f(x):
        y = lax.platform_dependent(x, tpu=for_tpu, default=lambda x: x**3)
        return jnp.sum(jnp.sin(y))

    x = jnp.linspace(-1, 1, 8, dtype="float32")
    np.testing.assert_allclose(jax.jit(fnn.grad(f))(x), jax.grad(f)(x), rtol=1e-6)


@pytest.mark.parametrize("dtype", sweep(["float16", "bfloat16"], ["bfloat16"]))
def test_a_weight_used_in_more_steps_than_half_precision_can_count(dtype):
    """The sum over the steps is made in float32."""

    def f(w, xs):
        step = lambda total, x: (total + (w * x).astype("float32"), None)
        return lax.scan(step, jnp.float32(0), xs)[0]

    found = fnn.grad(f)(jnp.ones((), dtype), jnp.ones(5000, dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(np.float32(found), 5000, rtol=4e-3)

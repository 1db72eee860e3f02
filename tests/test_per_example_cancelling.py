"""Norms, inner products and variances of gradients that are small beside what they're sums of.

The true value is that of the same factors in float64, materialised. An error is allowed that the
materialised gradient in the factors' own precision has too: eps times the sum of the positions'
norms, and a few eps of the value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive

import fnn.per_example as pe
from fnn.per_example import exact_norms
from fnn.per_example.gradient import FactoredGradient
from fnn.per_example.terms import Product, Rows

N = 6
HASTILY = {"xla_backend_optimization_level": 0}


def R(i, *shape):
    return np.random.default_rng([i, *shape]).standard_normal(shape)


def cancelling(c, axis, rest=1e-3):
    """c with most of its mean over the positions removed; in the first example all of it."""
    left = np.where(np.arange(len(c)) == 0, 0, rest * 10.0 ** (np.arange(len(c)) - 2))
    return c - c.mean(axis, keepdims=True) * (1 - np.minimum(left, 1)).reshape(
        -1, *[1] * (c.ndim - 1)
    )


def same(x, positions):
    return np.repeat(x[:, None], positions, 1)


def products(w=(12, 10), positions=3):
    x, c = same(R(0, N, w[0]), positions), cancelling(R(1, N, positions, w[1]), 1)
    return lambda p, e: jnp.sum((e[0] @ p) * e[1]), np.zeros(w), (x, c)


def many_positions():
    return products((12, 10), 40)


def one_position():
    return lambda p, e: jnp.sum((p @ e[0]) * e[1]), np.zeros((4, 5)), (R(0, N, 5), R(1, N, 4))


def loop():
    x, c = same(R(0, N, 12), 4), cancelling(R(1, N, 4, 10), 1)

    def loss(p, e):
        step = lambda s, e: (s + jnp.sum((e[0] @ p) * e[1]), None)
        return lax.scan(step, jnp.zeros((), p.dtype), e)[0]

    return loss, np.zeros((12, 10)), (x, c)


def stacked():
    """Matrices of a loop's steps, each used at several positions."""
    x, c = same(R(0, N, 12), 3), cancelling(R(1, N, 3, 10), 1)

    def loss(p, e):
        step = lambda s, w: (s + jnp.sum((e[0] @ w) * e[1]), None)
        return lax.scan(step, jnp.zeros((), p.dtype), p)[0]

    return loss, np.zeros((2, 12, 10)), (x, c)


def used_twice():
    """Terms of different forms, a product, its transpose's, an embedding and an entry's."""
    x, c = R(0, N, 12), R(1, N, 12)

    def loss(p, e):
        x, c, left, i = e
        one = jnp.sum((p @ x[:, None])[:, 0] * c) - (1 - left) * jnp.sum(
            (p.T @ c[:, None])[:, 0] * x
        )
        return one + left * jnp.sum(p[i] * c) - left * jnp.sum(jnp.sin(p)[i] * c)

    left = np.array([0, 1e-7, 1e-5, 1e-3, 0.1, 1])
    return loss, np.zeros((12, 12)), (x, c, left, np.arange(N))


def tied():
    """An embedding whose gradient the output's takes away again."""
    i = np.arange(N)[:, None] + np.arange(3)
    c = R(1, N, 3, 8)

    def loss(p, e):
        i, c, left = e
        one_hot = jax.nn.one_hot(i, 20, dtype=p.dtype)
        return jnp.sum(p[i] * c) - (1 - left) * jnp.sum((one_hot @ p) * c)

    return loss, np.zeros((20, 8)), (i, c, np.array([0, 1e-7, 1e-5, 1e-3, 0.1, 1]))


def embedding():
    """The same words many times, with gradients that cancel."""
    i = same(np.arange(N), 4)
    return lambda p, e: jnp.sum(p[e[0]] * e[1]), np.zeros((9, 5)), (i, cancelling(R(1, N, 4, 5), 1))


def convolution(space=2, features=6):
    x = np.ones((N, space + 2, features)) * R(0, N, 1, features)
    c = cancelling(R(1, N, space, features), 1)

    def loss(p, e):
        y = lax.conv_general_dilated(
            e[0][None], p, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jnp.sum(y[0] * e[1])

    return loss, np.zeros((3, features, features)), (x, c)


def long_convolution():
    return convolution(30, 3)


def complex_products():
    x = same(R(0, N, 12) + 1j * R(2, N, 12), 3)
    c = cancelling(R(1, N, 3, 10) + 1j * R(3, N, 3, 10), 1)
    return lambda p, e: jnp.sum(((e[0] @ p) * e[1]).real), np.zeros((12, 10)) + 0j, (x, c)


def one_row_huge():
    """A position of size 1e20 whose upstream gradient is 1e-20, beside the contrary."""
    x, c = R(0, N, 2, 12), R(1, N, 2, 10)
    size = np.array([1e20, 1e-15])[:, None]
    return lambda p, e: jnp.sum((e[0] @ p) * e[1]), np.zeros((12, 10)), (x * size, c / size)


CASES = {
    f.__name__: f
    for f in (
        products,
        many_positions,
        one_position,
        loop,
        stacked,
        used_twice,
        tied,
        embedding,
        convolution,
        long_convolution,
        complex_products,
        one_row_huge,
    )
}


def cast(tree, dtype, scale=1.0):
    def to(x):
        if np.issubdtype(x.dtype, np.integer):
            return jnp.asarray(x)
        wide = {"bfloat16": "complex64", "float16": "complex64"}.get(dtype)
        wide = wide or {"float32": "complex64", "float64": "complex128"}[dtype]
        return jnp.asarray(x * scale).astype(wide if np.iscomplexobj(x) else dtype)

    return jax.tree.map(to, tree)


def factored(loss, p, batch):
    from fnn.per_example.differentiate import factored

    one = lambda *e: factored(loss, p, e, {}, has_aux=False, thrifty=False)[1]
    return jax.vmap(one)(batch)


def wide(g):
    """The same factors in float64."""
    to = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float64))
    terms = jax.tree.map(lambda x: to(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, g.terms)
    dtype = jnp.promote_types(g.dtype, jnp.float64)
    return FactoredGradient(terms, g.path, g.shape, dtype)


def lengths(g):
    """Σ over terms and positions of |gₜ| |aₜ|, in float64: a bound of what cancels."""
    total = 0
    for t in wide(g).terms:
        if isinstance(t, Product):
            size = jnp.linalg.norm(t.a, axis=-1) * jnp.linalg.norm(t.g, axis=-1)
        elif isinstance(t, Rows):
            size = jnp.linalg.norm(t.g, axis=-1)
        elif hasattr(t, "x"):
            size = jnp.linalg.norm(t.x.reshape(N, -1), axis=1) * 3**0.5
            size = (size * jnp.linalg.norm(t.g.reshape(N, -1), axis=1))[:, None]
        else:
            size = jnp.linalg.norm(t.value.reshape(N, -1), axis=1)[:, None]
        total += jnp.sum(size.reshape(N, -1), axis=1)
    return np.asarray(total)


def rows(x):
    x = np.asarray(x).reshape(len(x), -1)
    return np.concatenate([x.real, x.imag], 1) if np.iscomplexobj(x) else x


def eps_of(g):
    return float(jnp.finfo(jnp.promote_types(g.dtype, jnp.float32)).eps)


SOME = [("float64", "products"), ("float16", "used_twice"), ("bfloat16", "tied")]
SOME += [("bfloat16", "convolution"), ("float16", "products")]


ALL = [("float32", name) for name in CASES] + SOME
QUICK = [("float32", "convolution"), ("bfloat16", "tied")]


@exhaustive
@pytest.mark.parametrize(
    ("dtype", "name"),
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.exhaustive) for c in ALL],
)
def test_norms_and_products(dtype, name):
    loss, p, batch = CASES[name]()
    direction = cast(1 + np.sin(1 + np.arange(p.size)).reshape(p.shape) + 0 * p, "float32")

    def found(p, batch):
        g = factored(loss, p, batch)
        return g, g.norms(), g.gram(), g.dot(direction)

    inputs = lambda size: (
        *cast(batch[:1], dtype),
        cast(batch[1], dtype, size),
        *cast(batch[2:], dtype),
    )
    p = cast(p, dtype)
    ours = jax.jit(found).lower(p, inputs(1)).compile(HASTILY)
    for size in (1e-12, 1, 1e12) if dtype == "float32" else (1,):
        g, norms, gram, dot = ours(p, inputs(size))
        d, S, eps = rows(wide(g).materialize()), lengths(g), eps_of(g)
        true = np.linalg.norm(d, axis=1)
        error = 8 * eps * S + 400 * eps * true
        assert norms.dtype == jnp.promote_types(jnp.finfo(g.dtype).dtype, jnp.float32)
        assert (abs(norms - true) <= error + 1e-37).all(), (norms, true, S)
        assert (np.diagonal(gram) >= 0).all()
        if 1e-12 < size < 1e12:
            np.testing.assert_allclose(np.diagonal(gram), np.asarray(norms, float) ** 2, 1e-5)
            bound = error[:, None] * true + error * true[:, None] + error[:, None] * error
            assert (abs(gram - d @ d.T) <= bound + 1e-37).all()
        w = rows(direction[None])[0]
        assert (abs(dot - d @ w) <= 2 * error * np.linalg.norm(w) + 1e-37).all()


def test_a_convolution_of_several_images_in_one_example():
    """Each makes one pixel; what they give the kernel cancels."""
    x = R(0, N, 1, 3, 3, 8)
    x = np.concatenate([x, x * (1 + 1e-4 * R(1, *x.shape))], 1).astype(np.float32)

    def loss(w, x):
        y = lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(y[0] - y[1])

    g = factored(loss, jnp.zeros((3, 3, 8, 64), jnp.float32), x)
    assert g.terms[0].norm_by_gram
    true = np.linalg.norm(rows((x[:, 0] - x[:, 1]).astype(float)), axis=1) * 64**0.5
    np.testing.assert_allclose(g.norms(), true, 1e-5)


@pytest.mark.exhaustive
def test_the_example_of_the_issue():
    """42 of its 100 norms were nan. Jitted, eager, mapped, in a loop, under shard_map."""
    x, c = same(R(0, 100, 8), 3), R(1, 100, 3, 8)
    x, c = cast((x, c - c.mean(1, keepdims=True)), "float32")
    loss = lambda w, e: jnp.sum((e[0] @ w) * e[1])
    w = jnp.zeros((8, 8), jnp.float32)
    norms = lambda x, c: pe.norms(pe.grads(loss)(w, (x, c))[1])
    own = np.linalg.norm(rows(pe.grads(loss)(w, (x, c))[1].materialize()), axis=1)
    assert own.max() < 1e-5
    one = lambda e: norms(*jax.tree.map(lambda x: x[None], e))[0]
    mesh = jax.make_mesh((4,), ("b",), (jax.sharding.AxisType.Auto,))
    for way in (
        norms,
        jax.jit(norms),
        jax.jit(lambda x, c: jax.vmap(lambda *e: one(e))(x, c)),
        jax.jit(lambda x, c: lax.map(one, (x, c))),
        jax.jit(jax.shard_map(norms, mesh=mesh, in_specs=(P("b"), P("b")), out_specs=P("b"))),
    ):
        np.testing.assert_allclose(way(x, c), own, 1e-5)

    # Clipped far below the rounding errors: each example alone keeps to the bound.
    def alone(x, c, sweeps, parts):
        e = (x[None], c[None]) if parts is None else (jnp.stack([x, 0 * x]), jnp.stack([c, 0 * c]))
        return pe.clipped_grad(loss, 1e-8, sweeps=sweeps, microbatch_size=parts)(w, e).gradient

    for sweeps, parts in [(1, None), (2, None), (1, 1)]:
        one = lambda e, s=sweeps, k=parts: alone(*e, s, k)
        found = np.linalg.norm(rows(jax.jit(lambda e, f=one: lax.map(f, e))((x, c))), axis=1)
        assert (found <= 1e-8 * (1 + 1e-5)).all() and found.max() > 1e-10


@exhaustive
def test_nothing_is_formed_where_nothing_cancels():
    """The branch that forms gradients is one that is not taken."""
    loss, p, _ = products()
    x, c = cast((R(0, N, 3, 12), R(1, N, 3, 10)), "float32")
    g = jax.jit(lambda p, e: factored(loss, p, e))(cast(p, "float32"), (x, c))
    found = jax.vmap(exact_norms.measured)(list(g.terms))
    assert not (found.cancels | ~found.is_in_range).any()


def quadratic(p, e):
    return jnp.sum(p * e)


@exhaustive
@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float64", marks=pytest.mark.exhaustive)]
)
def test_variances_beside_a_large_mean(dtype):
    """Of one position, several, rows, and what is dense; a true 0.9 at a mean of 1e4."""
    x = 1e4 + R(0, 20, 6)
    d = np.array(np.asarray(x, dtype), float)
    cases = {
        "dense": (quadratic, jnp.zeros(6, dtype), d[:, None]),
        "one position": (lambda p, x: jnp.sum(p @ x), jnp.zeros((2, 6), dtype), d[:, None]),
        "positions": (
            lambda p, x: jnp.sum(jnp.stack([x, 0 * x]) @ p), jnp.zeros((6, 5), dtype),
            np.repeat(d[:, :, None], 5, 2)[:, None],
        ),
        "rows": (
            lambda p, x: jnp.sum(p[jnp.asarray(x[0] * 0, int)] * x), jnp.zeros((3, 6), dtype),
            np.eye(3)[0][None, :, None] * d[:, None],
        ),
    }  # fmt: skip
    rtol = 2e-4 if dtype == "float32" else 1e-9
    for name, (loss, p, true) in cases.items():
        true = np.broadcast_to(
            true.reshape(20, -1, *p.shape)[:, 0]
            if name != "one position"
            else np.repeat(d[:, None], 2, 1),
            (20, *p.shape),
        )
        _, g = jax.jit(pe.grads(loss))(p, jnp.asarray(x, dtype))
        variance, noise = jax.jit(lambda g: (pe.variance(g), pe.noise(g)))(g)
        np.testing.assert_allclose(variance, true.var(0), rtol, err_msg=name)
        np.testing.assert_allclose(noise.variance, true.var(0, ddof=1).sum(), rtol, err_msg=name)
        mean = true.mean(0)
        signal = np.sum(mean**2) - true.var(0, ddof=1).sum() / 20
        np.testing.assert_allclose(noise.signal, signal, 1e-5, err_msg=name)
        np.testing.assert_array_equal(
            jax.jit(pe.variance)(jax.tree.map(lambda x: x[:1], g)), 0, err_msg=name
        )


@pytest.mark.exhaustive
def test_second_moments_whose_factors_are_out_of_range():
    """1e25 times 1e-25: each squared is no float32, their product is one."""
    loss = lambda w, e: jnp.sum((w @ e[0]) * e[1])
    x, c = R(0, N, 5), R(1, N, 4)
    _, g = pe.grads(loss)(jnp.zeros((4, 5), jnp.float32), cast((x * 1e25, c * 1e-25), "float32"))
    d = c[:, :, None] * x[:, None]
    np.testing.assert_allclose(g.second_moment(), (d**2).mean(0), 1e-5)
    np.testing.assert_allclose(g.variance(), d.var(0), 1e-4)
    found = pe.noise(pe.scale(g, 1e15)), pe.noise_scale(pe.scale(g, 1e30)), pe.noise_scale(g)
    np.testing.assert_allclose(found[0].variance, d.var(0, ddof=1).sum() * 1e30, 1e-4)
    np.testing.assert_allclose(found[1], found[2], 1e-5)

"""Gradients under JAX's strict modes: nothing is promoted, ranked or leaked by our rules.

Traced only, which is when these modes complain; types must be those of `jax.grad`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from sweeps import exhaustive, sweep

import fnn
from fnn import ops

MODES = {
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
    "dtypes": lambda: jax.numpy_dtype_promotion("strict"),
    "leaks": jax.checking_leaks,
    "keys": lambda: jax.debug_key_reuse(True),
    "32 bits": lambda: jax.enable_x64(False),
}


def entries(W, x):
    y = jnp.maximum(x, x[::-1]) + jnp.abs(x) + x**2.5 + jnp.power(x, x) + jnp.clip(x, 0.6, 0.9)
    y = y + jnp.arctan2(x, x) + jnp.log1p(x) + jnp.expm1(x) + jax.nn.sigmoid(x) + jax.nn.gelu(x)
    return jnp.where(x > 0, y, jnp.zeros_like(y)) + ops.gelu(x) + ops.softmax(x) + lax.cbrt(x)


def reductions(W, x):
    y = jnp.sort(x) * jnp.max(W) + jnp.cumsum(x) + lax.cumlogsumexp(x) + jnp.prod(W[0]) * x
    y = y + lax.cummax(x) + lax.cumprod(x) + jax.nn.logsumexp(W, axis=-1) + jax.nn.softmax(x)
    return y + lax.top_k(x, 2)[0].sum() * x


def indexing(W, x):
    ids = jnp.array([0, 2])
    y = W[ids].sum(0) + x.at[ids].add(x[:2]) + x.at[ids].set(x[:2]) + x.at[ids].max(x[:2])
    return y + jnp.pad(x, 1)[1:-1] + lax.dynamic_slice_in_dim(x, 1, 1, 0) * x


def loops(W, x):
    def step(c, a):
        c = jax.nn.relu(W @ c + a)
        c = lax.cond(c[0] > 0, lambda c: c * x, lambda c: c * 2, c)
        return jax.checkpoint(lambda c: jnp.sin(W @ c))(ops.tanh(c)), c

    c, ys = lax.scan(step, x, jnp.stack([x, x]))
    return lax.fori_loop(0, 3, lambda i, c: c * W[0], c) + ys.sum(0)


def random(W, x):
    k1, k2 = jax.random.split(jax.random.key(0))
    noise = lambda c, k: (c * jax.random.uniform(k, (3,), x.dtype), None)
    return jax.random.normal(k1, (3,), x.dtype) * lax.scan(noise, x, jax.random.split(k2, 3))[0]


def cases():
    """Checks for leaks are slow; quickly, they see loops, where tracers could leak."""
    for mode in MODES:
        for dtype in ("float32", "bfloat16", "float16"):
            for function in (entries, reductions, indexing, loops, random):
                quick = dtype == "float32" and (mode != "leaks" or function is loops)
                quick = quick or (mode, dtype) == ("dtypes", "bfloat16")
                name = f"{mode}-{dtype}-{function.__name__}"
                marks = () if quick else exhaustive
                yield pytest.param(mode, dtype, function, id=name, marks=marks)


@pytest.mark.parametrize(("mode", "dtype", "function"), list(cases()))
def test_types_are_those_of_jax(mode, dtype, function):
    loss = lambda W, x: jnp.sum(function(W, x))
    with MODES[mode]():
        args = jnp.ones((3, 3), dtype), jnp.ones(3, dtype)
        theirs = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*args).out_avals
        assert jax.make_jaxpr(fnn.grad(loss, (0, 1)))(*args).out_avals == theirs
        by_vjp = jax.make_jaxpr(lambda *a: fnn.vjp(loss, *a)[1](jnp.ones((), dtype)))
        assert by_vjp(*args).out_avals == theirs


def test_a_loop_outside_jit_under_strict_modes():
    """What compiles it once obeys them too; and a nan in it is found."""
    loss = lambda x: lax.scan(lambda c, _: (jnp.sqrt(c) * 2, None), x, None, length=2)[0].sum()
    with jax.checking_leaks(), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        fnn.grad(loss)(jnp.ones(3, "float32"))
        with pytest.raises(FloatingPointError):
            fnn.grad(loss)(-jnp.ones(3, "float32"))


def _positive(a):
    return a @ a.mT.conj() + 4 * jnp.eye(a.shape[-2], dtype=a.dtype)


DECOMPOSITIONS = {
    "qr": jnp.linalg.qr,
    "wide qr": lambda a: jnp.linalg.qr(a.mT),
    "complete qr": lambda a: jnp.linalg.qr(a, mode="complete"),
    "svd": lambda a: jnp.linalg.svd(a, full_matrices=False),
    "wide svd": lambda a: jnp.linalg.svd(a.mT, full_matrices=False),
    "singular values": lambda a: jnp.linalg.svd(a, compute_uv=False),
    "eigh": lambda a: lax.linalg.eigh(_positive(a), symmetrize_input=False),
    "eigenvalues": lambda a: lax.linalg.eigh(_positive(a))[1],
    "eig": lambda a: jnp.linalg.eigvals(a[:3]),
    "cholesky": lambda a: jnp.linalg.cholesky(_positive(a)),
    "lu": lambda a: lax.linalg.lu(a)[0],
    "solve": lambda a: jnp.linalg.solve(_positive(a), a),
    "triangular solve": lambda a: lax.linalg.triangular_solve(_positive(a), a, left_side=True),
    "fft": jnp.fft.fft,
    "inverse": lambda a: jnp.linalg.inv(a[:3]),
    "determinant": lambda a: jnp.linalg.slogdet(a[:3])[1],
}


@pytest.mark.parametrize("dtype", sweep(["float32", "complex64", "complex128"], ["complex64"]))
@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_decompositions_are_strict_about_real_and_complex_numbers(name, dtype):
    a = np.random.default_rng(0).standard_normal((2, 4, 3))
    a = jnp.asarray(a[0] + 1j * a[1] if "complex" in dtype else a[0], dtype)

    def loss(a):
        return sum(
            jnp.sum(jnp.square(jnp.real(x))) for x in jax.tree.leaves(DECOMPOSITIONS[name](a))
        )

    theirs = jax.make_jaxpr(jax.grad(loss))(a).out_avals
    with jax.numpy_dtype_promotion("strict"):
        assert jax.make_jaxpr(fnn.grad(loss))(a).out_avals == theirs

"""Attention by cuDNN: chosen where cuDNN can, equal to the formula in value and all derivatives.

Without a GPU its operations compute the formula, so that their derivatives are tested anywhere.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive

from fnn import check_rule, layers, ops
from fnn.ops.sequences import cudnn
from fnn.ops.sequences.blockwise import blockwise_attention

on_a_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")
without_a_gpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="in 16 bits only")
STATIC = {"causal": True, "window": None, "scale": 0.3, "block": 4}


def arrays(queries=8, keys=8, heads=2, kv_heads=2, features=8, dtype=jnp.float32, count=3):
    shapes = (queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)
    drawn = (
        jax.random.normal(jax.random.key(i), (*shape, features), jnp.float32)
        for i, shape in enumerate(shapes[:count])
    )
    return tuple(x.astype(dtype) for x in drawn)


def formula(q, k, v, **static):
    return blockwise_attention(q, k, v, {}, **static)[0]


def softmax_formula(q, k, v, causal=False, window=None):
    """In float64 by numpy, heads repeated."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    s = np.einsum("qhf,khf->hqk", q, k) / np.sqrt(q.shape[-1])
    behind = np.arange(len(q))[:, None] - np.arange(len(k))[None]
    allowed = np.ones_like(behind, bool) if not causal else behind >= 0
    if window is not None:
        allowed &= behind < window
    s = np.where(allowed, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("hqk,khf->qhf", p / p.sum(-1, keepdims=True), v)


@exhaustive
@without_a_gpu
def test_the_operations_are_the_formula_and_its_derivatives():
    q, k, v, g = (0.5 * x for x in arrays(4, 4, features=2, count=4))
    check_rule(cudnn.cudnn_attention, q, k, v, **STATIC)
    check_rule(cudnn.cudnn_gradients, q, k, v, g, **STATIC)


@exhaustive
@without_a_gpu
def test_gradients_are_those_of_the_formula_batched_and_twice():
    q, k, v = (x[None] for x in arrays())

    def second(function):
        of = lambda q, k, v: jnp.sum(jnp.tanh(function(q, k, v, **STATIC)))
        once = lambda q, k, v: jnp.sum(jax.grad(of)(q, k, v) ** 2)
        return jax.vmap(jax.value_and_grad(once, (0, 1, 2)))(q, k, v)

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        second(cudnn.cudnn_attention),
        second(formula),
    )


def test_it_is_chosen_where_cudnn_computes_it(monkeypatch):
    monkeypatch.setattr(cudnn, "_has_gpu", lambda: True)
    q, k, v = arrays(dtype=jnp.bfloat16)
    chosen = lambda *a, **kw: cudnn.is_for_cudnn(*a, kw.pop("given", {}), **kw)
    usual = {"causal": True, "window": None}
    assert chosen(q, k, v, **usual)
    assert chosen(q, k, v, causal=True, window=3)
    assert not chosen(*arrays(), **usual)
    assert not chosen(q, k, v, given={"mask": True}, **usual)
    assert not chosen(q[:1], k, v, **usual)
    assert not chosen(*arrays(features=12, dtype=jnp.bfloat16), **usual)
    assert not chosen(q, k, v, causal=False, window=3)


@without_a_gpu
def test_it_is_not_chosen_without_a_gpu():
    program = str(jax.make_jaxpr(ops.attention)(*arrays(dtype=jnp.bfloat16)))
    assert "cudnn" not in program


CASES = {
    "causal": ({}, {"causal": True}),
    "all": ({}, {}),
    "window": ({}, {"causal": True, "window": 17}),
    "grouped": ({"heads": 8, "kv_heads": 2}, {"causal": True}),
    "cross": ({"queries": 64}, {}),
    "wide": ({"features": 128}, {"causal": True}),
}


@on_a_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_value_and_gradient_are_the_formulas(name, dtype):
    sizes, options = CASES[name]
    q, k, v = arrays(**{"queries": 128, "keys": 128, "features": 64} | sizes, dtype=dtype)
    function = jax.jit(functools.partial(ops.attention, **options))
    assert "cudnn" in str(jax.make_jaxpr(function)(q, k, v))
    assert "fmha" in function.lower(q, k, v).compile().as_text().lower()
    np.testing.assert_allclose(
        np.asarray(function(q, k, v), np.float64), softmax_formula(q, k, v, **options), atol=3e-2
    )
    total = lambda function: lambda q, k, v: jnp.sum(jnp.sin(function(q, k, v)).astype(float))
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    found = jax.jit(jax.grad(total(function), (0, 1, 2)))(q, k, v)
    wanted = jax.jit(jax.grad(total(functools.partial(ops.attention, **options)), (0, 1, 2)))(*wide)
    for a, b in zip(found, wanted, strict=True):
        error = np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64))
        assert error < 2e-2 * np.linalg.norm(np.asarray(b, np.float64))


@on_a_gpu
def test_on_a_gpu_a_batch_is_one_kernel_and_other_derivatives_are_the_formulas():
    q, k, v = (x[None] for x in arrays(64, 64, features=64, dtype=jnp.bfloat16))
    batch = jax.jit(jax.vmap(functools.partial(ops.attention, causal=True)))
    text = batch.lower(q, k, v).compile().as_text().lower()
    assert text.count('custom_call_target="__cudnn$fmha') == 1
    one = lambda q, k, v: ops.attention(q, k, v, causal=True).astype(float)
    dy = jax.jvp(one, (q[0], k[0], v[0]), (k[0], v[0], q[0]))[1]
    wide = [x[0].astype(jnp.float32) for x in (q, k, v)]
    wanted = jax.jvp(one, wide, [wide[1], wide[2], wide[0]])[1]
    assert np.linalg.norm(dy - wanted) < 2e-2 * np.linalg.norm(wanted)


@on_a_gpu
def test_on_a_gpu_a_transformer_of_16_bits_trains_by_it():
    net = layers.Attention(4, causal=True)
    x = jax.random.normal(jax.random.key(0), (64, 128), jnp.bfloat16)
    params = jax.tree.map(lambda w: w.astype(x.dtype), net.init(jax.random.key(1), x))
    loss = jax.jit(jax.grad(lambda params: jnp.sum(net(params, x).astype(float) ** 2)))
    assert "fmha" in loss.lower(params).compile().as_text().lower()
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(loss(params)))

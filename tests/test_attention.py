"""`ops.attention` against the plain formula, which holds all scores at once."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive, sweep

import fnn
from fnn import ops

QUERIES, KEYS, HEADS, KV_HEADS, FEATURES, VALUES = 7, 5, 4, 2, 3, 2


def arrays(*shapes, dtype=jnp.float32, seed=0):
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)


def qkv(dtype=jnp.float32):
    shapes = (QUERIES, HEADS, FEATURES), (KEYS, KV_HEADS, FEATURES), (KEYS, KV_HEADS, VALUES)
    return arrays(*shapes, dtype=dtype)


def plain(
    q,
    k,
    v,
    *,
    causal=False,
    window=None,
    mask=None,
    bias=None,
    slopes=None,
    q_positions=None,
    k_positions=None,
    scale=None,
    block=None,
):
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    s = jnp.einsum("qnh,knh->nqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    q_positions = jnp.arange(q.shape[0]) if q_positions is None else q_positions
    k_positions = jnp.arange(k.shape[0]) if k_positions is None else k_positions
    behind = q_positions[:, None] - k_positions[None]
    if bias is not None:
        s = s + bias
    if slopes is not None:
        s = s - slopes[:, None, None] * jnp.abs(behind)
    allowed = jnp.ones(s.shape, bool)
    if causal:
        allowed &= behind >= 0
    if window is not None:
        allowed &= jnp.abs(behind) < window
    if mask is not None:
        allowed &= mask
    s = jnp.where(allowed, s, jnp.finfo(s.dtype).min)
    p = jnp.where(allowed, jax.nn.softmax(s), 0)
    return jnp.einsum("nqk,knh->qnh", p, v)


random = np.random.default_rng(1)
booleans = lambda *shape: jnp.asarray(random.random(shape) > 0.4)
floats = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
OPTIONS = {
    "all keys": {},
    "causal": {"causal": True},
    "window": {"window": 2},
    "causal window": {"causal": True, "window": 2, "scale": 0.3},
    "mask of scores": {"mask": booleans(HEADS, QUERIES, KEYS)},
    "mask of keys": {"mask": booleans(KEYS), "causal": True},
    "bias of scores": {"bias": floats(HEADS, QUERIES, KEYS)},
    "bias of queries": {"bias": floats(QUERIES, 1), "causal": True},
    "bias of keys": {"bias": floats(1, 1, KEYS)},
    "alibi": {"slopes": floats(HEADS), "causal": True},
    "positions": {
        "causal": True,
        "slopes": floats(HEADS),
        "q_positions": jnp.asarray([3, 0, 9, 2, 2, 1, 4], jnp.uint32),
        "k_positions": jnp.asarray([4, 0, 2, 1, 3]),
    },
}


def split(options):
    """What has a gradient, and the rest."""
    moving = {n: x for n, x in options.items() if n in ("bias", "slopes")}
    return moving, {n: x for n, x in options.items() if n not in moving}


def derivatives(f, options, order=1):
    moving, rest = split(options)

    def total(q, k, v, moving):
        return jnp.sum(jnp.sin(f(q, k, v, **moving, **rest)))

    def of(q, k, v):
        args = q, k, v, moving
        gradient = jax.grad(total, (0, 1, 2, 3))
        found = f(q, k, v, **moving, **rest), gradient(*args)
        if order == 1:
            return found
        squares = lambda *args: sum(jnp.sum(x**2) for x in jax.tree.leaves(gradient(*args)))
        return (
            *found,
            jax.jvp(total, args, args),
            jax.jvp(gradient, args, args),
            jax.grad(squares, (0, 1, 2, 3))(*args),
        )

    return of


def test_value_and_gradient():
    """What else there is stands below."""
    names = "causal window", "bias of scores", "alibi"

    def all_of(f, block):
        options = {n: OPTIONS[n] | {"block": block} for n in names}
        return jax.jit(lambda *x: {n: derivatives(f, o)(*x) for n, o in options.items()})(*qkv())

    chex.assert_trees_all_close(all_of(ops.attention, 3), all_of(plain, None), rtol=1e-4, atol=1e-5)


@exhaustive
@pytest.mark.parametrize("block", sweep([2, 3, 128], [2]))
@pytest.mark.parametrize("name", sweep(OPTIONS, ["positions"]))
def test_two_modes_and_two_orders(name, block):
    found, wanted = (
        jax.jit(derivatives(f, OPTIONS[name] | {"block": block}, order=2))(*qkv())
        for f in (ops.attention, plain)
    )
    chex.assert_trees_all_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_against_jax_in_a_batch():
    """Multi-query, with a bias and a query that the examples share."""
    q, k, v = arrays((2, 6, 4, 3), (2, 6, 1, 3), (2, 6, 1, 3))
    (bias,) = arrays((4, 6, 6), seed=1)

    def ours(q, k, v, bias):
        one = functools.partial(ops.attention, causal=True, block=4)
        return jax.vmap(lambda q, k, v: one(q, k, v, bias=bias))(q, k, v)

    def theirs(q, k, v, bias):
        return jax.nn.dot_product_attention(q, k, v, bias[None], is_causal=True)

    def gradient(f):
        return jax.jit(jax.grad(lambda *args: jnp.sum(f(*args) ** 2), (0, 1, 2, 3)))(q, k, v, bias)

    chex.assert_trees_all_close(gradient(ours), gradient(theirs), rtol=1e-4, atol=1e-5)


@exhaustive
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("block", sweep([128, 2], [2]))
def test_a_query_without_keys_gives_0(block, dtype):
    """Neither nan in the value nor in a derivative, with the mask or with a bias of -inf."""
    q, k, v = arrays((5, 2, 3), (5, 2, 3), (5, 2, 3), dtype=dtype)
    mask = jnp.ones((5, 5), bool).at[2].set(False)
    bias = jnp.where(mask, 0.5, -jnp.inf)

    def everything(q, k, v, bias):
        masked = lambda q: ops.attention(q, k, v, mask=mask, block=block)
        biased = lambda q, k, v, bias: ops.attention(q, k, v, bias=bias, block=block)
        y, pull = jax.vjp(biased, q, k, v, bias)
        return masked(q), jax.jacrev(masked)(q), y, pull(y), jax.jvp(masked, (q,), (q,))[1]

    with jax.debug_nans(True):
        y, jacobian, biased, gradients, tangent = jax.jit(everything)(q, k, v, bias)
    # The bias is rounded in; y is a sum of values near 1, and may be much smaller than they are.
    chex.assert_trees_all_close(y, biased, rtol=1e-6, atol=4 * float(jnp.finfo(dtype).eps))
    assert not jnp.any(y[2]) and not jnp.any(jacobian[:, :, :, 2]) and not jnp.any(tangent[2])
    assert not jnp.any(gradients[0][2]) and jnp.any(gradients[0][1])


def test_decoding_sees_the_past():
    """One query, with its position, against a cache that is filled so far."""
    q, k, v = arrays((6, 2, 3), (6, 2, 3), (6, 2, 3))
    whole = ops.attention(q, k, v, causal=True)

    @jax.jit
    def step(t):
        cut = lambda x: jnp.where(jnp.arange(6)[:, None, None] <= t, x, 1e6)
        position = jnp.reshape(t, 1)
        return ops.attention(q[t][None], cut(k), cut(v), causal=True, q_positions=position)[0]

    chex.assert_trees_all_close(jnp.stack([step(t) for t in range(6)]), whole, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 3), (4, 0, 3), (4, 2, 0)])
@pytest.mark.parametrize("keys", [0, 4])
def test_empty_axes(shape, keys):
    q, k = jnp.ones(shape), jnp.ones((keys, *shape[1:]))
    v = jnp.ones((keys, shape[1], 2))
    y, pull = jax.vjp(ops.attention, q, k, v)
    assert y.shape == (*shape[:2], 2) and jnp.all(y == (keys > 0))
    assert not any(jnp.any(dx) for dx in pull(y)[:2])


@pytest.mark.parametrize("dtype", sweep(["float16", "bfloat16"], ["bfloat16"]))
def test_half_precision(dtype):
    """As in float32, rounded: also over so many keys that a sum of ones would stop growing."""
    q, k, v = arrays((4, 2, 8), (600, 2, 8), (600, 2, 8), dtype=dtype)
    total = lambda q, k, v: jnp.sum(ops.attention(q, k, v + 1, block=64).astype(jnp.float32) ** 2)
    both = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    found, wanted = both(q, k, v), both(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert all(dx.dtype == dtype for dx in found[1])
    scale = max(float(jnp.max(jnp.abs(x))) for x in wanted[1])
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), found),
        wanted,
        rtol=4 * float(jnp.finfo(dtype).eps),
        atol=4 * float(jnp.finfo(dtype).eps) * scale,
    )


@pytest.mark.parametrize("size", sweep([1e-12, 1e12], [1e12]))
def test_numbers_of_any_size(size):
    """With equal keys all probabilities are equal, however large the scores."""
    q, v = arrays((4, 2, 3), (5, 2, 3))
    k = jnp.full((5, 2, 3), size, jnp.float32)
    f = lambda q, k, v: ops.attention(q, k, v, block=2)
    y, pull = jax.jit(lambda *x: (f(*x), jax.vjp(f, *x)[1](jnp.ones_like(q))))(q * size, k, v)
    chex.assert_trees_all_close(y, jnp.broadcast_to(jnp.mean(v, 0), y.shape), rtol=1e-5)
    chex.assert_trees_all_close(pull[2], jnp.full(v.shape, 4 / 5), rtol=1e-5)


@pytest.mark.parametrize("block", [2, 16])
def test_of_very_large_scores_the_largest_takes_all(block):
    """Where scores are rounded to thousands, y is the values of one key, whose gradient is 1."""
    q, v = arrays((16, 2, 8), (16, 2, 3))
    f = lambda q, v: ops.attention(1e6 * q, 1e6 * q, v, causal=True, block=block)
    both = jax.jit(lambda q, v: (f(q, v), jax.vjp(f, q, v)[1](jnp.ones_like(v))))
    # As users compile it: without LLVM's optimisations a product and a sum are two operations.
    y, pull = both.lower(q, v).compile({"xla_backend_optimization_level": 3})(q, v)
    scores = np.einsum("qnh,knh->nqk", *[np.asarray(q, np.float64)] * 2)
    best = np.argmax(np.where(np.tri(16, dtype=bool), scores, -np.inf), axis=-1)
    heads = np.arange(2)[:, None]
    np.testing.assert_allclose(y, np.moveaxis(np.asarray(v)[best, heads], 0, 1), rtol=1e-6)
    counts = np.stack([np.bincount(of_head, minlength=16) for of_head in best], axis=1)
    np.testing.assert_allclose(pull[1], np.repeat(counts[..., None], 3, axis=-1), rtol=1e-6)
    chex.assert_tree_all_finite(pull)


def temporaries(f, *types):
    gradient = jax.value_and_grad(lambda *args: jnp.sum(f(*args)), range(len(types)))
    return jax.jit(gradient).lower(*types).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_positions():
    f = functools.partial(ops.attention, causal=True)
    of = lambda n: temporaries(f, *[jax.ShapeDtypeStruct((n, 4, 64), jnp.float32)] * 3)
    plain_too = temporaries(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        *[jax.ShapeDtypeStruct((2048, 4, 64), jnp.float32)] * 3,
    )
    assert of(2048) <= plain_too / 32
    assert of(4096) <= 2.2 * of(2048)


@exhaustive
def test_memory_of_the_second_order():
    """A gradient of a gradient keeps no probabilities of all blocks either."""

    def f(q, k, v):
        total = lambda q: jnp.sum(jnp.sin(ops.attention(q, k, v, causal=True)))
        return jnp.sum(jax.grad(total)(q) ** 2)

    of = lambda n: temporaries(f, *[jax.ShapeDtypeStruct((n, 2, 16), jnp.float32)] * 3)
    assert of(4096) <= 2.5 * of(2048)


@exhaustive
@pytest.mark.parametrize("name", ["causal", "alibi", "bias of scores"])
def test_check_grads(name):
    moving, rest = split(OPTIONS[name] | {"block": 3})
    args = *qkv(jnp.float64), jax.tree.map(lambda x: x.astype(jnp.float64), moving)
    fnn.check_grads(lambda q, k, v, moving: ops.attention(q, k, v, **moving, **rest), *args)


def test_errors():
    q, k, v = qkv()
    for error, words, args, options in (
        (TypeError, "q must be an array", (None, k, v), {}),
        (TypeError, "'q' of shape .* has dtype int32", (jnp.ones((2, 1, 3), "int32"), k, v), {}),
        (
            ValueError,
            r"'q' has shape \(3,\), wanted \(queries, heads, features\)",
            (q[0, 0], k, v),
            {},
        ),
        (
            TypeError,
            "'k' .* has dtype float16, wanted q's, float32",
            (q, k.astype("float16"), v),
            {},
        ),
        (ValueError, r"'k' has shape .*, wanted \(keys, kv_heads, 3\)", (q, k[..., :2], v), {}),
        (ValueError, r"'v' has shape .*, wanted \(5, 2, value_features\)", (q, k, v[1:]), {}),
        (
            ValueError,
            "'k' has 3 heads .* divides q's 4",
            (q, *[jnp.ones((5, 3, 3), "float32")] * 2),
            {},
        ),
        (TypeError, "'mask' .* wanted booleans", (q, k, v), {"mask": jnp.ones((7, 5))}),
        (ValueError, r"'mask' .* broadcast to \(4, 7, 5\)", (q, k, v), {"mask": booleans(5, 7)}),
        (ValueError, "'bias' has shape", (q, k, v), {"bias": jnp.ones((2, 7, 5))}),
        (TypeError, "'bias' .* dtype bool", (q, k, v), {"bias": booleans(7, 5)}),
        (
            ValueError,
            r"'slopes' has shape \(2,\), wanted \(4,\)",
            (q, k, v),
            {"slopes": jnp.ones(2)},
        ),
        (TypeError, "'q_positions' .* integers", (q, k, v), {"q_positions": jnp.ones(7)}),
        (ValueError, r"'k_positions' .* wanted \(5,\)", (q, k, v), {"k_positions": jnp.arange(7)}),
        (ValueError, "window must be", (q, k, v), {"window": 0}),
        (TypeError, "causal must be", (q, k, v), {"causal": 1}),
        (ValueError, "block must be", (q, k, v), {"block": 0}),
        (TypeError, "scale must be", (q, k, v), {"scale": "1"}),
    ):
        with pytest.raises(error, match=f"attention: .*{words}"):
            ops.attention(*args, **options)

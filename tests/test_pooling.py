"""Pooling and upsampling: against `lax.reduce_window`, numpy and PyTorch."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn
from fnn import ops

R = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")
X = R(0, 7, 9, 3)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def must_agree(f, plain, x):
    """Values and gradients, alone and under vmap; forward mode; products with the Hessian."""

    def found(f):
        loss = lambda x: jnp.sum(jnp.sin(f(x)))
        xs, grad = jnp.stack([x, 2 * x + 1]), jax.grad(loss)
        twice = jax.jvp(grad, (x,), (x + 1,))[1]
        return f(x), grad(x), jax.vmap(grad)(xs), jax.jvp(f, (x,), (x + 1,))[1], twice

    ours, theirs = jax.jit(lambda: (found(f), found(plain)))()
    jax.tree.map(close, ours, theirs)


def windows(x, window, stride, pad, dilation=(1, 1), *, by_max: bool):
    """Of one image, by JAX."""
    start, op = (-jnp.inf, lax.max) if by_max else (0.0, lax.add)
    pad = ((0, 0), *pad, (0, 0))
    sizes = (1, *window, 1), (1, *stride, 1)
    options = {"window_dilation": (1, *dilation, 1)}
    return lax.reduce_window(x[None], start, op, *sizes, pad, **options)[0]


MAXIMA = {
    "apart": ((2, 2), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    "overlapping": ((3, 2), (1, 2), ((1, 0), (0, 1)), (1, 1)),
    "dilated": ((2, 3), (2, 1), ((0, 1), (2, 0)), (2, 2)),
    "many places": ((6, 5), (1, 2), ((2, 2), (0, 3)), (1, 1)),
}


def by_patches(x, window, stride, pad, dilation):
    """The maximum of stacked patches: JAX differentiates no dilated window."""
    x = jnp.pad(x, (*pad, (0, 0)), constant_values=-jnp.inf)
    reach = [1 + d * (k - 1) for k, d in zip(window, dilation, strict=True)]
    count = [(n - r) // s + 1 for n, r, s in zip(x.shape, reach, stride, strict=False)]
    at = lambda i, j: x[i : i + (count[0] - 1) * stride[0] + 1 : stride[0],
                        j : j + (count[1] - 1) * stride[1] + 1 : stride[1]]  # fmt: skip
    places = itertools.product(range(window[0]), range(window[1]))
    return jnp.max(jnp.stack([at(i * dilation[0], j * dilation[1]) for i, j in places]), 0)


@pytest.mark.parametrize("name", MAXIMA)
def test_the_largest(name):
    window, stride, pad, dilation = MAXIMA[name]
    options = {"stride": stride, "padding": pad, "dilation": dilation}
    close(ops.max_pool(X, window, **options), windows(X, *MAXIMA[name], by_max=True))
    ours = functools.partial(ops.max_pool, window=window, **options)
    must_agree(ours, lambda x: by_patches(x, *MAXIMA[name]), X)


@exhaustive
def test_of_equal_ones_the_first_gets_the_gradient():
    for window in (2, (2, 14)):
        x = jnp.ones((2, 14, 1))
        g = jax.grad(lambda x: jnp.sum(ops.max_pool(x, window) ** 2))(x)  # noqa: B023
        assert g[0, 0, 0] == 2 and g[1].sum() == 0
    g = jax.grad(lambda x: ops.max_pool(x, (2,))[0, 0])(jnp.asarray([[-jnp.inf], [-jnp.inf]]))
    assert g.tolist() == [[1.0], [0.0]]
    assert jnp.isnan(ops.max_pool(jnp.asarray([[1.0], [jnp.nan]]), (2,))).all()


def test_what_is_kept_of_the_largest():
    """One byte for each output, where JAX's keeps input and output."""
    x = R(0, 4, 32, 32, 8)
    pull = jax.vjp(functools.partial(ops.max_pool, window=2), x)[1]
    kept = [r for r in jax.tree.leaves(pull) if r.size > 100]
    assert [(r.shape, r.dtype) for r in kept] == [((4, 16, 16, 8), jnp.uint8)]


@pytest.mark.parametrize(
    "count_padding, window, stride",
    [
        (True, (3, 2), (2, 1)),
        (False, (3, 2), (2, 1)),
        (True, (3, 2), (3, 2)),  # side by side, and some are left over
        (False, (3, 2), (3, 2)),
    ],
)
def test_the_mean(count_padding, window, stride):
    pad = ((1, 1), (0, 1))

    def plain(x):
        sums = windows(x, window, stride, pad, by_max=False)
        ones = windows(jnp.ones_like(x), window, stride, pad, by_max=False)
        return sums / (6 if count_padding else ones)

    ours = functools.partial(
        ops.average_pool, window=window, stride=stride, padding=pad, count_padding=count_padding
    )
    must_agree(ours, plain, X)
    assert ops.average_pool(jnp.full((300, 1), 300, "float16"), (300,))[0, 0] == 300


def test_the_gradient_of_means_side_by_side_is_one_copy():
    """Of XLA's own windows and of slices there would be a padded copy for each place."""
    x = R(0, 16, 28, 28, 8)
    f = lambda x: jnp.sum(ops.average_pool(x, 2) ** 2)
    memory = jax.jit(jax.grad(f)).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= x.nbytes // 4 + 4096


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (7, 4)], ids=str)
def test_adaptive(sizes):
    def by(f):
        def plain(x):
            for axis, m in reversed(list(enumerate(sizes))):
                n = x.shape[axis]
                cuts = [(o * n // m, -(-(o + 1) * n // m)) for o in range(m)]
                parts = [lax.slice_in_dim(x, a, b, axis=axis) for a, b in cuts]
                x = jnp.stack([f(p, axis) for p in parts], axis)
            return x

        return plain

    must_agree(lambda x: ops.adaptive_average_pool(x, sizes), by(jnp.mean), X)
    must_agree(lambda x: ops.adaptive_max_pool(x, sizes), by(jnp.max), X)


@exhaustive
def test_upsampling():
    image = lambda x, sizes, method: jax.image.resize(x, (*sizes, 3), method, antialias=False)
    for method in ("nearest", "bilinear"):
        must_agree(
            lambda x: ops.upsample(x, (2, 3), method=method),  # noqa: B023
            lambda x: image(x, (14, 27), method),  # noqa: B023
            X,
        )
    must_agree(
        lambda x: ops.resize(x, (5, 12), method="bilinear"),
        lambda x: image(x, (5, 12), "bilinear"),
        X,
    )
    rows, columns = np.arange(5) * 7 // 5, np.arange(12) * 9 // 12
    assert jnp.array_equal(ops.resize(X, (5, 12)), X[rows][:, columns])
    assert ops.upsample(jnp.ones((0, 2, 3)), 2).shape == (0, 4, 3)


@pytest.mark.parametrize("dtype", sweep(["float16", "bfloat16"], quick=["bfloat16"]))
def test_bilinear_weights_are_not_of_16_bits(dtype):
    """Rounded once: an even surface stays even, and each number is next to that of float64."""
    even, rough = jnp.full((7, 9, 3), 0.9, dtype), X.astype(dtype)
    spacing = float(jnp.finfo(dtype).eps)
    for scale, method in ((3, ops.upsample), (5, ops.upsample), (11, ops.resize)):
        f = functools.partial(method, method="bilinear")
        y, exact = f(rough, scale), f(rough.astype("float64"), scale)
        assert y.dtype == dtype and jnp.array_equal(jnp.unique(f(even, scale)), even[0, 0, :1])
        assert jnp.all(jnp.abs(y - exact) <= 0.51 * spacing * jnp.maximum(jnp.abs(exact), 1e-4))


def test_pixels_and_features():
    x = R(1, 2, 3, 4, 12)
    y = ops.pixel_shuffle(x, 2)
    assert y.shape == (2, 6, 8, 3) and y[1, 3, 4, 2] == x[1, 1, 2, 2 * 4 + 1 * 2 + 0]
    assert jnp.array_equal(ops.pixel_unshuffle(y, 2), x)


@pytest.mark.parametrize("spec", [("data",), (None, "data"), (None, None, "data")], ids=str)
def test_pixels_and_features_on_an_explicit_mesh(spec):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    x = R(1, 4, 4, 4, 8)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P(*spec)))
        for f in (ops.pixel_shuffle, ops.pixel_unshuffle):
            found = jax.jit(functools.partial(f, scale=2))(sharded)
            assert np.array_equal(found, f(x, 2))
            assert found.sharding.spec[: len(spec)] == spec
            gradient = jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x, 2) ** 2)))(sharded)
            assert np.array_equal(gradient, 2 * x)


def test_piecewise_linear():
    model = lambda p, x: ops.max_pool(ops.convolution(x, p), 2).reshape(-1)
    assert fnn.curvature.piecewise_linear.piecewise_linear(model, R(0, 2, 3, 3, 3), X[None])


@exhaustive
def test_as_pytorch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    image = torch.tensor(np.moveaxis(np.asarray(X), -1, 0)[None].copy())
    same = lambda ours, theirs: close(ours, np.moveaxis(theirs.numpy()[0], 0, -1))
    for window, stride, pad in itertools.product((2, 3, (3, 2)), (None, 1, 2), (0, 1)):
        options = {"stride": stride, "padding": pad}
        same(ops.max_pool(X, window, **options), functional.max_pool2d(image, window, stride, pad))
        same(
            ops.average_pool(X, window, **options),
            functional.avg_pool2d(image, window, stride, pad),
        )
    for sizes in (1, 2, 3, (4, 5), 7):
        same(ops.adaptive_average_pool(X, sizes), functional.adaptive_avg_pool2d(image, sizes))
        same(ops.adaptive_max_pool(X, sizes), functional.adaptive_max_pool2d(image, sizes))
    for method in ("nearest", "bilinear"):
        for sizes in ((5, 11), (14, 4), (7, 9), (1, 20)):
            theirs = functional.interpolate(image, size=sizes, mode=method)
            same(ops.resize(X, sizes, method=method), theirs)
        theirs = functional.interpolate(image, scale_factor=3, mode=method)
        same(ops.upsample(X, 3, method=method), theirs)


WRONG = [
    (lambda: ops.max_pool(X, 10), "a window (10, 10) doesn't fit into argument 'x' of shape"),
    (lambda: ops.max_pool(X, 2, padding=2), "the padding must be less than the window"),
    (lambda: ops.max_pool(X, (2, 2, 2)), "wanted (..., *space, features) with 3 axes"),
    (lambda: ops.average_pool(X, 2, stride=(1,)), "stride must be one integer or one for each"),
    (lambda: ops.adaptive_max_pool(X[:0], 1), "axes of space that aren't empty"),
    (lambda: ops.upsample(X[0], 2), "with 2 axes of space, for scale=2"),
    (lambda: ops.upsample(X, 2, method="cubic"), "method must be"),
    (lambda: ops.resize(X[:0], 2), "with nothing to be resized"),
    (lambda: ops.pixel_shuffle(X, 2), "wanted a number of features that 4 divides"),
    (lambda: ops.pixel_unshuffle(X, 2), "wanted a height and a width that 2 divides"),
    (lambda: ops.pixel_shuffle(X[0], 2), "wanted (..., height, width, features)"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=range(len(WRONG)))
def test_what_does_not_fit(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        wrong()

"""Initialisers: their fans, their variances, what is orthogonal, what they do to a signal."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import exhaustive

from fnn import initializers as init

KEY = jax.random.key(0)
DENSE, KERNEL = (400, 150), (40, 30, 5, 3)


def counted_fans(shape):
    """How many inputs an output sums over, and how many outputs an input reaches."""
    out, in_, *window = shape
    return in_ * math.prod(window), out * math.prod(window)


@pytest.mark.parametrize("shape", [DENSE, KERNEL, (7, 1), (6, 5, 4)])
def test_fans(shape):
    assert init.fans(shape) == counted_fans(shape)


def test_fans_agree_with_torch():
    torch = pytest.importorskip("torch")
    for shape in (DENSE, KERNEL):
        kernel = torch.empty(shape)
        assert init.fans(shape) == torch.nn.init._calculate_fan_in_and_fan_out(kernel)


VARIANCES = [
    (init.xavier_normal, lambda i, o: 2 / (i + o)),
    (init.xavier_uniform, lambda i, o: 2 / (i + o)),
    (functools.partial(init.xavier_uniform, gain=3.0), lambda i, o: 9 * 2 / (i + o)),
    (init.he_normal, lambda i, o: 2 / i),
    (init.he_uniform, lambda i, o: 2 / i),
    (functools.partial(init.he_normal, slope=0.5), lambda i, o: 2 / (1.25 * i)),
    (functools.partial(init.he_normal, fan="out"), lambda i, o: 2 / o),
    (functools.partial(init.he_uniform, fan="out"), lambda i, o: 2 / o),
    (init.lecun_normal, lambda i, o: 1 / i),
    (init.lecun_uniform, lambda i, o: 1 / i),
    (
        functools.partial(init.variance_scaling, distribution="truncated_normal"),
        lambda i, o: 1 / i,
    ),
]


@pytest.mark.parametrize("shape", [DENSE, KERNEL])
@pytest.mark.parametrize(("initializer", "variance"), VARIANCES)
def test_variance(initializer, variance, shape):
    W = np.asarray(initializer(KEY, shape, jnp.float32))
    assert W.shape == shape and W.dtype == np.float32
    wanted = variance(*counted_fans(shape))
    # The deviation of a sample variance is about var·√(2/n) for a normal, here 0.8 % of it.
    assert W.var() == pytest.approx(wanted, rel=0.04)
    assert abs(W.mean()) < 5 * math.sqrt(wanted / W.size)


def test_uniform_fills_its_bounds():
    fan_in, fan_out = counted_fans(DENSE)
    W = np.abs(init.xavier_uniform(KEY, DENSE, jnp.float32))
    bound = math.sqrt(6 / (fan_in + fan_out))
    assert 0.999 * bound < W.max() <= bound * (1 + 1e-6)
    W = np.abs(init.uniform(KEY, DENSE, jnp.float32, bound=0.25))
    assert 0.2499 < W.max() <= 0.25


def test_he_keeps_a_relu_networks_signal_where_xavier_loses_it():
    """The point of He et al. 2015, figure 3: after 20 layers of relu."""
    keys = jax.random.split(KEY, 20)
    x = jax.random.normal(jax.random.key(1), (256, 32))

    def size_after(initializer):
        h = x
        for k in keys:
            h = jax.nn.relu(initializer(k, (256, 256), jnp.float32) @ h)
        return float(jnp.mean(h**2) / jnp.mean(x**2))

    assert 0.2 < size_after(init.he_normal) < 5
    assert size_after(init.xavier_normal) < 1e-4


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6), (8, 3, 2, 2), (20, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_orthogonal(shape, dtype):
    W = init.orthogonal(KEY, shape, dtype, gain=2.0)
    assert W.dtype == dtype and W.shape == shape
    W = np.asarray(W, np.float64).reshape(shape[0], -1)
    gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=tolerance)


def same_padded(x, W):
    """A convolution of x (H, W, C) with "same" padding."""
    dims = ("NHWC", "OIHW", "NHWC")
    return jax.lax.conv_general_dilated(x[None], W, (1, 1), "SAME", dimension_numbers=dims)[0]


@exhaustive
@pytest.mark.parametrize("window", [(3, 5), (2, 4)])
def test_convolutions_that_start_as_the_identity(window):
    x = jax.random.normal(KEY, (6, 7, 3), jnp.float32)
    W = init.identity(KEY, (3, 3, *window))
    np.testing.assert_allclose(same_padded(x, W), x, rtol=1e-6)
    more = same_padded(x, init.identity(KEY, (5, 3, *window), gain=2.0))
    np.testing.assert_allclose(more, jnp.pad(2 * x, ((0, 0), (0, 0), (0, 2))), rtol=1e-6)
    turned = same_padded(x, init.delta_orthogonal(KEY, (3, 3, *window)))
    length = lambda x: np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(length(turned), length(x), rtol=1e-5)
    assert not np.allclose(turned, x)


def test_identity_of_a_linear_layer():
    np.testing.assert_array_equal(init.identity(KEY, (2, 3)), np.eye(2, 3))
    assert init.identity(KEY, (2, 2, 0)).shape == (2, 2, 0)
    assert init.delta_orthogonal(KEY, (4, 2), jnp.bfloat16).dtype == jnp.bfloat16


def test_truncated_normal():
    W = np.asarray(init.truncated_normal(KEY, (300, 300), jnp.float32, stddev=0.5))
    assert np.abs(W).max() <= 1.0
    # The deviation of a standard normal cut at ±2, by its closed form.
    phi, inside = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    assert W.std() == pytest.approx(0.5 * math.sqrt(1 - 4 * phi / inside), rel=0.01)


def test_plain_ones():
    assert not init.zeros(KEY, (3,), jnp.float16).any()
    assert init.ones(KEY, (3,), jnp.float16).dtype == jnp.float16
    assert (init.constant(KEY, (2, 2), jnp.float32, value=0.1) == np.float32(0.1)).all()
    assert init.normal(KEY, (200, 200), jnp.float32).std() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize(
    "initializer", [init.he_normal, init.xavier_uniform, init.orthogonal, init.delta_orthogonal]
)
def test_needs_two_axes(initializer):
    with pytest.raises(ValueError, match=r"\(out, in\).*the shape is \(5,\).*zeros"):
        initializer(KEY, (5,), jnp.float32)


@pytest.mark.parametrize("initializer", [init.he_normal, init.lecun_uniform, init.orthogonal])
def test_sizes_of_zero(initializer):
    assert initializer(KEY, (0, 5), jnp.float32).shape == (0, 5)
    assert initializer(KEY, (5, 0), jnp.float32).shape == (5, 0)


def test_unknown_fan():
    with pytest.raises(ValueError, match="fan must be 'in', 'out' or 'average', but got 'both'"):
        init.he_normal(KEY, (3, 3), jnp.float32, fan="both")


def test_jax_initialisers_fit_in():
    from fnn.layers import Linear

    layer = Linear(3, weight_init=jax.nn.initializers.orthogonal())
    W = layer.init(KEY, jnp.zeros(3))["W"]
    np.testing.assert_allclose(W @ W.T, np.eye(3), atol=1e-6)


@pytest.mark.parametrize("gain", [2.0, np.float32(2), np.float64(2)])
def test_the_identity_is_of_the_dtype_that_is_asked_for(gain):
    with jax.numpy_dtype_promotion("strict"):
        made = init.identity(jax.random.key(0), (3, 3), jnp.bfloat16, gain=gain)
    assert made.dtype == jnp.bfloat16
    np.testing.assert_array_equal(made, 2 * np.eye(3))


@pytest.mark.parametrize("shape", ["ab", None, (3.0, 2), (True, 2), (3, None)])
@pytest.mark.parametrize("name", ["zeros", "normal", "truncated_normal", "he_normal", "orthogonal"])
def test_what_is_no_shape(name, shape):
    with pytest.raises(TypeError, match=f"^{name}: shape must be a sequence of integers"):
        getattr(init, name)(KEY, shape)
    with pytest.raises(ValueError, match=rf"^{name}: shape must be .* but got \(-3, 2\)"):
        getattr(init, name)(KEY, (-3, 2))


@pytest.mark.parametrize(
    "name", ["xavier_uniform", "he_normal", "lecun_normal", "delta_orthogonal"]
)
def test_errors_name_the_function_that_was_called(name):
    with pytest.raises(TypeError, match=f"^{name}: key must be a key"):
        getattr(init, name)(3, (3, 2))

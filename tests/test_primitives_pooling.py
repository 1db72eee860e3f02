"""Max and min pooling with and without overlap, with ties, against JAX's own gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fnn

WINDOWS = {  # window, strides, padding
    "tiles": ((2, 2), (2, 2), "VALID"),
    "tiles that don't fill x": ((3, 2), (3, 4), "VALID"),
    "tiles and padding": ((2, 3), (2, 3), "SAME"),
    "no window": ((1, 1), (1, 1), "VALID"),
    "subsampled": ((1, 1), (2, 3), "VALID"),
    "overlap": ((3, 3), (2, 2), "SAME"),
    "every place": ((2, 3), (1, 1), ((1, 0), (2, 1))),
    "large": ((6, 5), (1, 2), "SAME"),
    "all of x": ((9, 11), (1, 1), "VALID"),
}


def pooled(extremum, window, strides, padding):
    start = -jnp.inf if extremum is lax.max else jnp.inf
    return lambda x: lax.reduce_window(x, start, extremum, window, strides, padding)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("extremum", [lax.max, lax.min], ids=["max", "min"])
def test_gradient_of_a_windows_extremum(name, extremum):
    pool = pooled(extremum, *WINDOWS[name])
    rng = np.random.default_rng(0)
    smooth = jnp.asarray(rng.standard_normal((9, 11)))
    tied = jnp.asarray(rng.integers(0, 3, (9, 11)), "float64")
    weights = jnp.asarray(rng.standard_normal(jax.eval_shape(pool, smooth).shape))

    def f(x):
        return jnp.sum(weights * pool(x) ** 3)

    def derivatives(grad):
        # JAX's second derivative isn't that of its first where entries tie.
        second = grad(lambda x: jnp.vdot(grad(f)(x), tied))
        return jax.jit(lambda: (jax.vmap(grad(f))(jnp.stack([smooth, tied])), second(smooth)))()

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
        derivatives(fnn.grad),
        derivatives(jax.grad),
    )


@pytest.mark.parametrize("name", WINDOWS)
def test_it_costs_no_more_than_jaxs(name):
    window, strides, padding = WINDOWS[name]
    around = ((0, 0), *padding, (0, 0)) if isinstance(padding, tuple) else padding
    pool = pooled(lax.max, (1, *window, 1), (1, *strides, 1), around)

    def cost(grad):
        x = jax.ShapeDtypeStruct((4, 9, 11, 8), "float32")
        compiled = jax.jit(grad(lambda x: jnp.sum(pool(x) ** 2))).lower(x).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    (flops, memory), (flops_jax, memory_jax) = cost(fnn.grad), cost(jax.grad)
    assert flops <= 1.02 * flops_jax
    assert memory <= 1.02 * memory_jax + 256


def test_of_no_windows_at_all():
    pool = pooled(lax.max, (2, 2), (1, 1), "VALID")
    np.testing.assert_array_equal(fnn.grad(lambda x: jnp.sum(pool(x)))(jnp.ones((1, 1))), [[0]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("reducer", ["sum", "max"])
def test_many_windows_are_summed_in_float32(reducer, dtype):
    """An entry in 300 windows, each of which passes a gradient of 1 (or 200) on."""
    reduce, start = {"sum": (lax.add, 0), "max": (lax.max, -np.inf)}[reducer]
    size = 200.0 if dtype == "float16" else 1.0

    def loss(x):
        pooled = lax.reduce_window(x, np.array(start, x.dtype), reduce, (300,), (1,), "VALID")
        return jnp.sum(size * pooled.astype("float32"))

    x = jnp.zeros(599, dtype).at[299].set(1)  # it is in each of the 300 windows
    found = fnn.grad(loss)(x)
    assert found.dtype == dtype
    expected = np.convolve(np.ones(300), np.full(300, size)) if reducer == "sum" else 300 * size * x
    np.testing.assert_array_equal(found, np.asarray(expected).astype(x.dtype))

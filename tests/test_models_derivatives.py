"""Each model's gradients and Hessian-vector products: in both modes, and as differences."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from sweeps import sweep
from test_models_factors import KEY, MODELS, as_function

import fnn


def close(found, wanted, rtol):
    """On the scale of the largest entry."""
    scale = np.max(np.abs(wanted))
    assert scale > 0
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("name", sweep(MODELS, ["mlp", "vae"]))
def test_first_and_second_derivatives(name):
    """Forwards, backwards, one over the other in either order, and as central differences.

    A step of 1e-6 at a random point passes no kink of a relu, or of a maximum.
    """
    net, example, output, _ = MODELS[name]
    f = as_function(net, example, output)
    rng = np.random.default_rng(3)
    random = lambda p: p + 0.3 * rng.normal(size=p.shape)
    start, unravel = ravel_pytree(jax.tree.map(random, jax.jit(net.init)(KEY, *example)))
    towards = rng.normal(size=start.shape)
    v = towards / np.linalg.norm(towards)
    weights = rng.normal(size=jax.eval_shape(f, unravel(start), example).shape)
    loss = lambda p: jnp.sum(weights * jnp.sin(f(unravel(p), example)))
    gradient = jax.grad(loss)
    slope = lambda p: jax.jvp(loss, (p,), (v,))[1]
    step = 1e-6

    @jax.jit
    def derivatives(p):
        return {
            "backward": gradient(p),
            "fnn.grad": fnn.grad(loss)(p),
            "forward": slope(p),
            "forward over backward": jax.jvp(gradient, (p,), (v,))[1],
            "backward over backward": jax.grad(lambda p: gradient(p) @ v)(p),
            "backward over forward": jax.grad(slope)(p),
        }

    @jax.jit
    def difference(p):
        above, below = (jax.value_and_grad(loss)(p + s * v) for s in (step, -step))
        return jax.tree.map(lambda a, b: (a - b) / (2 * step), above, below)

    found = derivatives(start)
    chex.assert_tree_all_finite(found)
    assert {x.dtype for x in found.values()} == {jnp.dtype("float64")}
    along, of_gradients = difference(start)
    np.testing.assert_allclose(found["fnn.grad"], found["backward"], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found["forward"], found["backward"] @ v, rtol=1e-9)
    np.testing.assert_allclose(along, found["forward"], rtol=1e-6)
    product = found["forward over backward"]
    close(found["backward over backward"], product, 1e-9)
    close(found["backward over forward"], product, 1e-9)
    close(of_gradients, product, 1e-6)

"""Repeated blocks in stages, through which microbatches go: as on one device, and what is sent."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sweeps import exhaustive, sweep

import fnn
from fnn import ops
from fnn.layers import EVALUATE, BatchNorm, Dropout, LayerError, Linear, chain, repeat, training
from fnn.layers.mode import Across
from fnn.sharding import collectives

MESH = jax.make_mesh((2, 4), ("data", "stage"), axis_types=(AxisType.Auto,) * 2)
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)))
BLOCK = chain(Linear(6), ops.tanh, Dropout(0.5))
NET = repeat(BLOCK, 8)
PARAMS = NET.init(jax.random.key(0), X[0])


def across(microbatches=4):
    return Across(MESH, None, "stage", microbatches)


def gradients(net, where, key=None):
    def loss(params, X, shift):
        keys = None if key is None else jax.random.split(key, len(X))

        def of(x, key):
            mode = EVALUATE if key is None else training(key, "batch")
            mode = dataclasses.replace(mode, across=where)
            return net(params, x + shift, mode=mode)

        y = jax.vmap(of, axis_name="batch")(X, keys)
        return jnp.mean(y**2), y

    return jax.jit(fnn.value_and_grad(loss, (0, 1, 2), has_aux=True))


def placed():
    params = jax.device_put(PARAMS, NamedSharding(MESH, P("stage")))
    return params, jax.device_put(X, NamedSharding(MESH, P("data"))), jnp.zeros(6)


@exhaustive
@pytest.mark.parametrize("microbatches", sweep([1, 2, 3, 4, 8], [4]))
@pytest.mark.parametrize("remat", sweep([None, True], [None]))
def test_stages_give_what_one_device_gives(microbatches, remat):
    """With dropout: each block and each example draws what it draws on one device."""
    net = dataclasses.replace(NET, remat=remat)
    key = jax.random.key(3)
    alone = gradients(net, None, key)(PARAMS, X, jnp.zeros(6))
    ours = gradients(net, across(microbatches), key)(*placed())
    chex.assert_trees_all_close(jax.device_get(ours), jax.device_get(alone), rtol=2e-5, atol=1e-6)


def test_what_is_sent():
    """A microbatch from each stage to the next in each of M + S − 1 turns; the results to all."""
    program = gradients(NET, across(4)).lower(*placed()).compile()
    found = [c for c in collectives(program) if c.size > 8]
    micro = 8 // 2 // 4 * 6 * 8  # bytes on a device: examples / data / M, features, float64
    passed = [c for c in found if c.kind == "collective-permute"]
    assert sum(c.size * c.times for c in passed) == 2 * (4 + 4 - 1) * micro
    largest = jax.tree.leaves(PARAMS["0"]["W"])[0].nbytes // 4
    assert {c.kind for c in found} <= {"collective-permute", "all-reduce"}
    assert max(c.size for c in found if c.kind == "all-reduce") <= max(largest, 8 // 2 * 6 * 8) * 2


def test_one_example_alone():
    mode = dataclasses.replace(EVALUATE, across=across())
    params, _, _ = placed()
    y = jax.jit(lambda p, x: NET(p, x, mode=mode))(params, X[0])
    np.testing.assert_allclose(y, NET(PARAMS, X[0]), rtol=1e-5)


@exhaustive
def test_what_cannot_be_divided():
    mode = dataclasses.replace(EVALUATE, across=across())
    six = repeat(BLOCK, 6)
    with pytest.raises(LayerError, match="4 divides their number, 6"):
        six(six.init(jax.random.key(0), X[0]), X[0], mode=mode)
    norms = repeat(chain(Linear(6), BatchNorm()), 4)
    params, state = norms.init(jax.random.key(0), X[0]), norms.init_state(X[0])
    with pytest.raises(LayerError, match="but no state"):
        norms.apply(params, state, X[0], mode=mode)
    stacked = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    with pytest.raises(LayerError, match="share their parameters"):
        jax.vmap(lambda p: NET(p, X[0], mode=mode))(stacked)

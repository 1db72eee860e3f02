"""Our gradients against JAX's, on the zoo: the same numbers, for no more work and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import sweep
from zoo import ZOO

from fnn.backprop import value_and_grad
from fnn.backprop.coverage import coverage
from fnn.jaxpr import is_inexact, program, trace

# What the program computes, its FLOPs and its buffers don't depend on how well LLVM optimises
# the inside of its loops; compiling hastily saves most of this file's time.
HASTILY = {"xla_backend_optimization_level": 0}

SLACK = 1.02
BYTES = 256  # some scalars more or fewer, each in a buffer of 64 bytes

# A gradient that is zero but for rounding (a bias before a normalisation, or of attention's
# keys) is compared on the scale of the largest one. bfloat16 rounds to 8 bits, wherever.
TOLERANCE = {"float32": 1e-5, "float64": 1e-13}
TOLERANCE_OF = {"mixed_precision": 1e-2}
# JAX 0.10 takes y + 1 for the derivative of y = eˣ − 1, which cancels; we take eˣ, as JAX 0.12.
EXPONENTIALS_MORE = {"mlp_activations": 1.15, "weight_norm": 1.7}
# Convolutions are computed by other formulas. XLA counts no products with the padding's zeros for
# its own, and they make blocks of patches, whatever the batch.
CONVOLUTIONS = dict.fromkeys(
    ("cnn", "cnn_per_example", "resnet", "unet", "linen_cnn", "equinox_cnn", "haiku_cnn"), 1.15
)
CONVOLUTIONS |= {"nnx_cnn": 1.2}
PATCHES = 2**20


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile(HASTILY)


def assert_close(ours, theirs, tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(theirs))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
        np.testing.assert_allclose(
            a,
            b,
            rtol=tolerance,
            atol=tolerance * largest,
            err_msg=jax.tree_util.keystr(path),
        )


# One of each kind: dense, convolutions, attention, recurrence, checkpoints, experts, solvers,
# graphs, linear algebra, and a model of each other library.
QUICK = ["mlp_activations", "transformer_block", "checkpointed_layers", "gaussian_process"]


@pytest.mark.parametrize("name", sweep(ZOO, QUICK))
def test_equal_to_jax_for_no_more_work(name):
    loss, params, data = ZOO[name]("float32", 4)
    theirs = compiled(jax.value_and_grad(loss), params, *data)
    ours = compiled(value_and_grad(loss), params, *data)

    tolerance = TOLERANCE_OF.get(name, TOLERANCE["float32"])
    assert_close(ours(params, *data), theirs(params, *data), tolerance)

    flops, flops_jax = (c.cost_analysis().get("flops", 0) for c in (ours, theirs))
    most = CONVOLUTIONS.get(name, SLACK) * flops_jax
    assert flops <= most, f"{flops / flops_jax:.3f} times JAX's FLOPs"
    functions, functions_jax = (c.cost_analysis().get("transcendentals", 0) for c in (ours, theirs))
    most = EXPONENTIALS_MORE.get(name, SLACK) * functions_jax
    assert functions <= most, f"{functions / functions_jax:.3f} times JAX's exp"
    memory, memory_jax = (c.memory_analysis().temp_size_in_bytes for c in (ours, theirs))
    more = PATCHES if name in CONVOLUTIONS else BYTES
    assert memory <= SLACK * memory_jax + more, f"{memory / memory_jax:.3f} times JAX's bytes"


@pytest.mark.parametrize("name", sweep(ZOO, ["mlp_per_example", "gru_bidirectional"]))
def test_equal_to_jax_in_double_precision(name):
    loss, params, data = ZOO[name]("float64", 4)
    both = compiled(
        lambda *args: (value_and_grad(loss)(*args), jax.value_and_grad(loss)(*args)), params, *data
    )
    ours, theirs = both(params, *data)
    assert_close(ours, theirs, TOLERANCE_OF.get(name, TOLERANCE["float64"]))


@pytest.mark.parametrize("name", ZOO)
def test_every_operation_has_a_rule(name):
    loss, params, data = ZOO[name]("float32", 4)
    leaves, tree = jax.tree.flatten((params, *data))
    flat = program(trace(lambda *leaves: [loss(*jax.tree.unflatten(tree, leaves))], leaves))
    active = [is_inexact(flat.avals[i]) for i in flat.inputs]
    found = coverage(flat, active, lambda equation: equation.name)
    assert found.ruled and not found.fallback

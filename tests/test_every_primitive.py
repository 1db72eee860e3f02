"""Every primitive of the installed JAX has a rule, or stands here with the reason why not.

A new JAX's new primitive fails the test by name: write its rule, or tell why it needs none.
"""

import subprocess
import sys

import jax
import jax.experimental.hijax as hijax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from sweeps import sweep

import fnn
from fnn.backprop.primitives import RULES

# `fnn.grad` of what has no rule is `jax.vjp` of that one equation.
WITHOUT_A_RULE = {
    "inlined: the equations of the called function have the rules": """
        jit closed_call core_closed_call call pjit
    """,
    "between devices: JAX's derivative says who sums what, and no array need be kept for it": """
        psum psum_invariant psum2 pmax pmin ppermute all_gather all_gather_invariant
        all_gather_reduced all_to_all ragged_all_to_all reduce_scatter pbroadcast pvary preduced
        unreduced_psum unreduced_reduce_scatter reduced_vary_cast reduced_vary_cast_p
        vary_unreduced_cast vary_unreduced_cast_p pbroadcast_dynamic axis_index shard_map
    """,
    "of functions that JAX was given: it knows their derivative, or there is none": """
        custom_lin custom_vmap_call linear_call composite ffi_call pallas_call mpmd_map
        reduce reduce_window select_and_scatter remat_opt xla_metadata_call
    """,
    "changes memory in place, or talks to the world; no gradient, or JAX's own": """
        accum_grad_in_ref addupdate box_get box_set check create_token after_all dce_sink
        debug_callback debug_print empty2 empty_ref free_ref freeze get get_global inspect_sharding
        io_callback pure_callback log_extend log_read masked_load masked_swap new_box new_log
        new_ref run_state stage swap rng_uniform
    """,
    "changes where or how numbers are stored, not the numbers": """
        from_edtype to_edtype layout_constraint relayout with_memory_space_constraint
        xla_metadata_value eval_jaxpr
    """,
    "decompositions whose derivative JAX doesn't have either, or only as a helper of others'": """
        cholesky_update hessenberg householder_product igamma_grad_a ormqr schur
        symmetric_product tridiagonal
    """,
}

LIST = """
import jax, jax.lax.linalg, jax.random, jax.scipy.special, jax.experimental.hijax
import jax.extend.core.primitives
from jax.extend.core import Primitive
from jax.interpreters import ad

places = [vars(m).values() for m in (jax.lax, jax.lax.linalg, jax.extend.core.primitives)]
places += [ad.primitive_jvps, ad.primitive_transposes, getattr(ad, "primitive_linearizations", [])]
print(*sorted({p.name for place in places for p in place if isinstance(p, Primitive)}))
"""


def test_every_primitive_has_a_rule_or_a_reason():
    """The primitives that JAX's modules show, and all that it can differentiate."""
    ran = subprocess.run([sys.executable, "-c", LIST], capture_output=True, text=True, check=True)
    primitives = set(ran.stdout.split())
    assert {"mul", "dot_general", "cholesky", "fft", "scan", "random_gamma"} <= primitives
    explained = set(" ".join(WITHOUT_A_RULE.values()).split())
    assert not explained & set(RULES), "explained, but they have rules"
    missing = primitives - set(RULES) - explained
    assert not missing, f"new in JAX {jax.__version__}, without a rule or a reason: {missing}"


# ---------------------------------------------------------------- JAX's newer kind of primitive

NEW = hasattr(hijax, "HiPrim")
Base = hijax.HiPrim if NEW else hijax.VJPHiPrimitive


class Cubed(Base):
    """s x³, with its author's derivatives."""

    def __init__(self, aval, scale):
        self.in_avals, self.out_aval = (aval,), aval
        self.params = {"aval": aval, "scale": scale}
        super().__init__()

    def expand(self, x):
        return self.scale * x**3

    def vjp_fwd(self, nzs_in, x):
        return self(x), x

    def vjp_bwd_retval(self, x, g):
        return (g * 3 * self.scale * x**2,)

    def jvp(self, primals, tangents):
        return self(*primals), tangents[0] * 3 * self.scale * primals[0] ** 2

    def batch(self, axis_data, args, dims):
        return Cubed(jax.typeof(args[0]), self.scale)(*args), dims[0]


def cubed(x):
    return Cubed(jax.typeof(x), 2.0)(x)


def root(a):
    """√a by Newton's method; its derivative is that of what it solves."""

    def solve(f, x):
        return lax.while_loop(
            lambda x: jnp.any(jnp.abs(f(x)) > 1e-12), lambda x: x - f(x) / (2 * x), x
        )

    start = 2 * jnp.ones_like(a)
    return lax.custom_root(lambda x: x**2 - a, start, solve, lambda g, y: y / g(jnp.ones_like(y)))


PLAIN = {cubed: lambda x: 2 * x**3, root: jnp.sqrt}
W = 0.5 * jnp.eye(3) + 0.1
X = jnp.array([1.3, 2.0, 0.7])
PLACES = {
    "alone": lambda f: lambda W, x: jnp.sum(jnp.sin(f(jnp.abs(W @ x) + 0.5)) * f(x)),
    "scan": lambda f: (
        lambda W, x: jnp.sum(
            lax.scan(lambda c, _: (jnp.tanh(W @ f(jnp.abs(c) + 0.3)), c), x, None, length=3)[1]
        )
    ),
    "checkpoint": lambda f: lambda W, x: jnp.sum(jax.checkpoint(lambda x: f(W @ x) * W[0])(x)),
}
BATCH = jnp.stack([X, X])


@pytest.mark.parametrize("place", sweep(PLACES, list(PLACES)[:1]))
@pytest.mark.parametrize("function", PLAIN)
def test_hi_primitives(function, place):
    """The gradients are those of the same function written plainly."""
    f, plain = PLACES[place](function), PLACES[place](PLAIN[function])
    true = jax.jit(jax.grad(plain, (0, 1)))(W, X)
    both = (0, 1)
    g = fnn.graph(f)(W, X).backprop()
    ways = {
        "jit": jax.jit(fnn.grad(f, both))(W, X),
        "not jit": fnn.grad(f, both)(W, X),
        "vjp": fnn.vjp(f, W, X)[1](jnp.ones(())),
        "vmap": [a[1] for a in jax.vmap(fnn.grad(f, both), (None, 0))(W, BATCH)],
        "graph": (g["W"].gradient, g["x"].gradient),
        "per-example": (fnn.per_example.grads(f)(W, BATCH)[1].materialize()[1], true[1]),
    }
    for way, found in ways.items():
        for a, b in zip(found, true, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, err_msg=way)
    assert not g.coverage().fallback
    if function is cubed and place == "alone":
        assert g.coverage().ruled["Cubed"] == 2  # by its own name


@pytest.mark.parametrize("function", PLAIN)
def test_curvature_through_hi_primitives(function):
    found, true = (
        fnn.curvature.ggn_diagonal(
            lambda W, x, f=f: f(jnp.abs(W @ x) + 0.5), fnn.ops.squared_error
        )(W, (BATCH, jnp.zeros((2, 3))))
        for f in (function, PLAIN[function])
    )
    np.testing.assert_allclose(found, true, rtol=1e-9)

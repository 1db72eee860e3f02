"""Every primitive that JAX differentiates has a hand-written rule, or a reason why not."""

import jax.extend.core.primitives
from jax.interpreters import ad

from fnn.backprop.primitives import RULES

# These fall back to jax.vjp of their one equation.
FALLBACK = {
    # between devices, inside shard_map: linear, and JAX knows how devices vary
    *("all_gather", "all_to_all", "ppermute", "psum", "ragged_all_to_all"),
    # mutable references
    *("get", "swap"),
    # generic reductions over a user's function; JAX differentiates only some of them itself
    *("reduce", "reduce_window"),
    # a jitted function with shardings of its own (any other is inlined), and JAX's own plumbing
    *("jit", "custom_lin", "eval_jaxpr"),
}


def test_every_differentiable_primitive_has_a_rule():
    differentiable = set(ad.primitive_jvps) | set(ad.primitive_transposes)
    module = jax.extend.core.primitives
    public = [getattr(module, name) for name in dir(module) if name.endswith("_p")]
    missing = {p.name for p in public if p in differentiable} - set(RULES) - FALLBACK
    assert not missing


def test_the_rules_table_has_no_unknown_names():
    """A misspelt name would silently fall back."""
    known = {p.name for p in (*ad.primitive_jvps, *ad.primitive_transposes)}
    without_gradient = {"empty", "lu_pivots_to_permutation", "random_clone"}
    module = jax.extend.core.primitives
    known |= {getattr(module, n).name for n in dir(module) if n.endswith("_p")}
    other_versions = {
        *("checkpoint", "one_minus_square", "polynomial", "log2"),
        *("call_hi_primitive", "call_hi_primitive_linearized"),
    }
    unknown = set(RULES) - known - other_versions - without_gradient
    assert not unknown, unknown

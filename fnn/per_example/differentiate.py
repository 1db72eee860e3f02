"""`fnn.per_example.grads`: the gradients of a batch, one for each example, factored."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.backprop.partial_evaluation import PartialEvaluation, partially_evaluate
from fnn.backprop.primitives import rule_of
from fnn.batch import batch_size
from fnn.jaxpr import program
from fnn.meshes import as_varying, batch_spec, with_auto_axes, zeros
from fnn.per_example.factors import factored_gradients
from fnn.per_example.gradient import FactoredGradient
from fnn.per_example.independence import check_independent, traced
from fnn.per_example.inputs import (
    join_static,
    keys_of,
    parameters,
    real_scalar,
    split_static,
    value_and_aux,
)
from fnn.per_example.sides import EXAMPLE, PARAMETERS
from fnn.per_example.terms import Dense, Term, Terms, economical, merged, no_wider
from fnn.precision import wide_dtype


def grads(loss: Callable, *, has_aux: bool = False) -> Callable:
    """The gradient of each example's loss, kept as the factors that it is a product of.

    One reverse sweep for the batch, as for one gradient, but the parameters' gradients aren't
    formed: where a weight meets an input, the input and the upstream gradient are kept (see
    `fnn/per_example/terms.py`). Exact for any function; where factors would hold more numbers
    than the gradient, or there are none, the gradient itself is kept, of that parameter alone;
    `fnn.per_example.explain` tells.

    Args:
        loss: `loss(params, example)`, the real scalar loss of ONE example, or
            `loss(params, example, key)`; with `has_aux` it returns `(loss, aux)`.
        has_aux: whether `loss` returns auxiliary data too.

    Returns:
        A function `(params, batch, key=None, **static)`:

        params: a tree of real or complex arrays.
        batch: a tree of arrays, with the examples along their first axis.
        key: one key, split into one for each example, or an array of as many keys.
        static: passed on to `loss` as it is, the same for all examples.

        It returns `(losses, grads)`, or `((losses, aux), grads)`: losses (batch,), and a tree
        like params with a `FactoredGradient` for each array. The tree is a pytree of arrays
        with the batch as first axis; it passes through jit, vmap, scan and shard_map.

    Raises:
        TypeError: a parameter is no real or complex array, or the loss no real scalar.
        ValueError: the batch is empty, its first axes differ, or the loss of an example depends
            on other examples (batch normalisation over examples, or any collective), so that
            there is no gradient of one example.

    >>> import jax.numpy as jnp
    >>> loss = lambda w, example: (w @ example[0] - example[1]) ** 2
    >>> losses, g = grads(loss)(jnp.ones(2), (jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.zeros(2)))
    >>> print(losses, g.norms().round(3))
    [9. 1.] [13.416  2.   ]
    """

    arguments.function("per_example.grads", "loss", loss, "a function loss(params, example)")
    arguments.flag("per_example.grads", "has_aux", has_aux)

    def of_batch(
        params: chex.ArrayTree,
        batch: chex.ArrayTree,
        key: chex.PRNGKey | None = None,
        **static: Any,
    ) -> tuple[Any, Any]:
        size = batch_size(batch)
        keys = keys_of(key, size)
        parameters(params)
        static_arrays, static_rest = split_static(static)

        def of_arrays(params, batch, keys, static_arrays):
            given = join_static(static_arrays, static_rest)
            one = lambda *inputs: factored(loss, params, inputs, given, has_aux=has_aux)
            return jax.vmap(one)(batch, *keys)

        inputs = params, batch, keys, static_arrays
        return with_auto_axes(of_arrays, inputs, batch_spec(batch))

    return of_batch


def factored(
    loss: Callable,
    params: chex.ArrayTree,
    inputs: tuple,
    static: dict,
    *,
    has_aux: bool,
    thrifty: bool = True,
    costs: dict[str, int] | None = None,
) -> tuple[Any, Any]:
    """`(loss, factored gradients)` of one example, as a function to vmap.

    In `costs`, where given, is noted how many numbers any reverse sweep keeps of one example,
    "residuals", and how many of its gradients' factors come on top, "on top".
    """
    paths, leaves, tree = parameters(params)
    example, example_tree = jax.tree.flatten(inputs)
    seen: dict[str, Any] = {}

    def flat(*args):
        here = jax.tree.unflatten(tree, args[: len(leaves)])
        own = jax.tree.unflatten(example_tree, args[len(leaves) :])
        with arguments.one_example(loss, own[0]):
            out = loss(here, *own, **static)
        value, aux = value_and_aux(out, has_aux)
        aux_leaves, seen["aux"] = jax.tree.flatten(aux)
        return [real_scalar(value), *aux_leaves]

    cut = partial_evaluation_of_example(flat, leaves, example)
    outs, residuals = cut.run_forward([*leaves, *example])
    seed = as_varying(jnp.ones((), outs[0].dtype), jax.typeof(outs[0]))
    terms = cut.run_backward(residuals, [seed])
    gradients = [
        leaf_gradient(t, path, leaf, thrifty)
        for t, path, leaf in zip(terms, paths, leaves, strict=True)
    ]
    if costs is not None:
        costs["residuals"] = sum(r.size for r in residuals if not any(r is x for x in leaves))
        # A product's first factor, the input, is kept for an ordinary sweep too.
        kept = [t for g in gradients for t in g.terms]
        costs["on top"] = sum(jax.tree.leaves(t)[-1].size for t in kept)
    value = (outs[0], jax.tree.unflatten(seen["aux"], outs[1:])) if has_aux else outs[0]
    return value, jax.tree.unflatten(tree, gradients)


def partial_evaluation_of_example(flat: Callable, leaves: list, example: list) -> PartialEvaluation:
    """Forward and backward half of the gradient of flat(*leaves, *example)'s first result.

    The backward half gives the gradients with respect to the leaves, as `Terms`.
    """
    closed = traced(flat, [*leaves, *example])
    kinds = [PARAMETERS] * len(leaves) + [EXAMPLE] * len(example)
    check_independent(program(closed), kinds)
    has_cotangent = [True] + [False] * (len(closed.out_avals) - 1)
    needed = [k == PARAMETERS for k in kinds]
    gradients_of = functools.partial(factored_gradients, inputs=kinds)
    return partially_evaluate(closed, needed, rule_of, has_cotangent, gradients_of=gradients_of)


def leaf_gradient(gradient: Terms, path: str, leaf, thrifty: bool) -> FactoredGradient:
    """A parameter's terms, joined, and each formed where its factors don't pay."""
    terms = gradient.terms
    if len(terms) > 1:
        terms = tuple(no_wider(t, wide_dtype(leaf.dtype)) for t in terms)
    joined = merged(terms)
    if thrifty:
        joined = merged([economical(t) for t in joined])
    if any(isinstance(t, Dense) for t in joined) and len(joined) > 1 and thrifty:
        # One is dense already: so may be all, unless the others are much smaller.
        size = leaf.size
        small = [not isinstance(t, Dense) and _numbers(t) * 4 < size for t in joined]
        if not all(s for s, t in zip(small, joined, strict=True) if not isinstance(t, Dense)):
            joined = merged(
                [t if isinstance(t, Dense) else Dense(t.materialize(), "") for t in joined]
            )
    if not joined:
        zero = zeros(jax.typeof(leaf))
        joined = (Dense(zero, "the loss doesn't depend on it"),)
    return FactoredGradient(joined, path, leaf.shape, leaf.dtype)


def _numbers(term: Term) -> int:
    return sum(x.size for x in jax.tree.leaves(term))

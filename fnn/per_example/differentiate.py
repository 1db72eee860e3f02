"""`fnn.per_example.grads`: the gradients of a batch, one for each example, factored."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.backprop.partial_evaluation import PartialEvaluation, partially_evaluate
from fnn.backprop.primitives import rule_of
from fnn.batch import batch_size
from fnn.jaxpr import Program, inner_jaxprs, is_inexact, program, trace
from fnn.meshes import as_varying, batch_spec, with_auto_axes, zeros
from fnn.per_example.factors import factored_gradients
from fnn.per_example.gradient import FactoredGradient
from fnn.per_example.sides import CONSTANT, EXAMPLE, PARAMETERS, sides
from fnn.per_example.terms import Dense, Term, Terms, economical, merged

# What makes one device's, or one example's, value depend on others'.
COLLECTIVES = (
    "psum",
    "psum_invariant",
    "pmax",
    "pmin",
    "all_gather",
    "all_to_all",
    "ppermute",
    "reduce_scatter",
    "all_gather_invariant",
    "psum2",
    "pbroadcast_invariant",
)


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

    def of_batch(params: Any, batch: Any, key: Any = None, **static: Any) -> tuple[Any, Any]:
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
    params: Any,
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
        value, aux = _value_and_aux(out, has_aux)
        aux_leaves, seen["aux"] = jax.tree.flatten(aux)
        return [_scalar(value), *aux_leaves]

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
    joined = merged(gradient.terms)
    if thrifty:
        joined = merged([economical(t) for t in joined])
    if any(isinstance(t, Dense) for t in joined) and len(joined) > 1 and thrifty:
        # One is dense already: so may be all, unless the others are much smaller.
        size = leaf.size
        small = [not isinstance(t, Dense) and _numbers(t) * 4 < size for t in joined]
        if not all(s for s, t in zip(small, joined) if not isinstance(t, Dense)):
            joined = merged(
                [t if isinstance(t, Dense) else Dense(t.materialize(), "") for t in joined]
            )
    if not joined:
        zero = zeros(jax.typeof(leaf))
        joined = (Dense(zero, "the loss doesn't depend on it"),)
    return FactoredGradient(joined, path, leaf.shape, leaf.dtype)


def _numbers(term: Term) -> int:
    return sum(x.size for x in jax.tree.leaves(term))


def parameters(params: Any) -> tuple[list[str], list[jax.Array], Any]:
    """The paths and arrays of a tree of parameters, checked."""
    arguments.no_result("fnn.per_example and fnn.curvature", "params", params)
    with_paths, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = [jax.tree_util.keystr(path) for path, _ in with_paths]
    if not paths:
        raise ValueError(
            f"params must be a tree with at least one array, but is {arguments.show(params)}."
        )
    leaves = []
    for path, (_, leaf) in zip(paths, with_paths, strict=True):
        where = path or "params"
        try:
            aval = jax.typeof(leaf)
        except TypeError:
            raise TypeError(
                f"the parameter {where} is no array but {type(leaf).__name__}; separate what "
                "isn't an array from the parameters (equinox.partition, nnx.split)."
            ) from None
        if not is_inexact(aval):
            raise TypeError(
                f"the parameter {where} has dtype {aval.dtype}, but gradients are by real or "
                "complex parameters; pass integers with the batch or close over them."
            )
        leaves.append(leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf))
    return paths, leaves, tree


def split_static(static: dict) -> tuple[list, tuple]:
    """Keyword arguments as their arrays, and all that they hold else."""
    leaves, tree = jax.tree.flatten(static)
    is_array = [isinstance(x, jax.Array) for x in leaves]
    rest = [None if yes else x for x, yes in zip(leaves, is_array, strict=True)]
    return [x for x, yes in zip(leaves, is_array, strict=True) if yes], (tree, is_array, rest)


def join_static(arrays: list, rest: tuple) -> dict:
    """The keyword arguments again."""
    tree, is_array, others = rest
    given = iter(arrays)
    leaves = [next(given) if yes else x for x, yes in zip(others, is_array, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def keys_of(key: Any, size: int) -> tuple:
    """`()` without a key, else one key for each example."""
    if key is None:
        return ()
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and dtype != jnp.uint32:
        raise TypeError(
            "key must be a key, such as jax.random.key(0), or one for each example, but got "
            f"{arguments.show(key)}."
        )
    axes = jnp.ndim(key) - (0 if typed else 1)
    if axes == 0:
        return (jax.random.split(key, size),)
    if axes != 1 or key.shape[0] != size:
        raise ValueError(
            f"key must be one key, or one for each of the {size} examples, but has shape "
            f"{key.shape}."
        )
    return (key,)


def traced(flat: Callable, args: list) -> Any:
    """The jaxpr of one example's function; or the error that it depends on other examples."""
    try:
        return trace(flat, args)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ValueError(_DEPENDENT.format(what=f"a collective over an axis ({error})")) from error


_DEPENDENT = (
    "the loss of one example depends on other examples, by {what}: so it does with batch "
    "normalisation over examples. Then there is no gradient of one example alone. Use statistics "
    "that are held fixed (in evaluation mode), or layer or group normalisation."
)


def check_independent(flat: Program, kinds: list[int]) -> None:
    """An error if what depends on the example goes into a collective, also inside loops."""
    side = sides(flat, kinds)
    for equation in flat.equations:
        ins = [side[i] for i in equation.ins]
        if equation.name in COLLECTIVES and EXAMPLE in ins:
            raise ValueError(_DEPENDENT.format(what=equation.name))
        for inner in inner_jaxprs(equation).values():
            inner_flat = program(inner)
            if len(inner_flat.inputs) <= len(ins):
                # Those of a conditional's branches are the last.
                kinds = ins[len(ins) - len(inner_flat.inputs) :]
                check_independent(inner_flat, kinds if EXAMPLE in ins else [CONSTANT] * len(kinds))


def _value_and_aux(out, has_aux):
    if not has_aux:
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(
            f"with has_aux=True the loss must return a pair (loss, auxiliary data), not {out!r}."
        )
    return out


def _scalar(value):
    try:
        aval = jax.typeof(value)
    except TypeError:
        raise TypeError(
            f"the loss must return a real scalar, but returned {type(value).__name__}; return "
            "(loss, aux) and pass has_aux=True for more."
        ) from None
    if aval.shape != () or not jnp.issubdtype(aval.dtype, jnp.floating):
        raise TypeError(
            f"the loss of one example must be a real scalar, but has shape {aval.shape} and dtype "
            f"{aval.dtype}. It is given one example, without the batch's axis."
        )
    return value

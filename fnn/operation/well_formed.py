"""What is refused and why: arguments that JAX would change, and rules that don't fit.

A rule is checked when its operation is first differentiated at arrays of some types. Its functions
are traced then, and what they return is compared with what the plain function takes and returns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from itertools import compress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.jaxpr import is_inexact
from fnn.meshes import as_varying, zeros
from fnn.operation import linearity
from fnn.operation.call import Call
from fnn.operation.form import Rule, RuleError, remembered

# --------------------------------------------------------------------------- a call's arguments


def check_arrays(rule: Rule, leaves: Sequence, count: int) -> None:
    """The leaves of a call's `count` positional arguments are arrays that JAX keeps as they are.

    Raises:
        TypeError: one isn't an array, or is a masked one.
        ValueError: one holds an integer whose high bits JAX would drop.
    """
    for leaf in leaves:
        _must_be_kept(rule.name, leaf)
        try:
            jax.typeof(leaf)
        except TypeError:
            names = ", ".join(f"'{n}'" for n in rule.argument_names(count))
            raise TypeError(
                f"{rule.name}: its positional arguments ({names}) are pytrees of arrays, but "
                f"one holds {leaf!r} of type {type(leaf).__name__}. Configuration goes into "
                "keyword-only arguments (after a `*` in the operation's signature)."
            ) from None


def _must_be_kept(where: str, x) -> None:
    """JAX drops the mask of a masked array, and the high bits of an integer without x64."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{where}: an argument is a masked array of shape {x.shape}, whose mask JAX would "
            "drop. Fill it (x.filled(value)), and give the mask as weights."
        )
    is_wide = isinstance(x, (np.ndarray, np.generic)) and x.dtype in (np.int64, np.uint64)
    if not is_wide or not x.size or jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        return
    kept = np.iinfo(np.int32 if x.dtype == np.int64 else np.uint32)
    low, high = int(x.min()), int(x.max())
    if low < kept.min or high > kept.max:
        raise ValueError(
            f"{where}: an argument of dtype {x.dtype} and shape {x.shape} holds "
            f"{high if high > kept.max else low}, which {kept.dtype} can't: JAX would drop its "
            "high bits (jax.enable_x64 keeps them)."
        )


def check_static(rule: Rule, static: dict[str, Any]) -> tuple[tuple[str, Hashable], ...]:
    """The keyword arguments as pairs; numpy's numbers as Python's.

    Raises:
        TypeError: one isn't hashable.
    """
    for name, value in static.items():
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"{rule.name}: the keyword argument '{name}' is static configuration and "
                f"must be hashable, but got a {type(value).__name__}. Pass arrays by position."
            ) from None
    # A number of numpy's has a dtype of its own, which arrays would be promoted to.
    plain = lambda value: value.item() if isinstance(value, np.generic) else value
    return tuple((name, plain(value)) for name, value in static.items())


def kind(value: Hashable) -> Hashable:
    """What keeps apart static values that compare equal: 2, 2.0 and True, 0.0 and -0.0.

    It looks into tuples and frozensets, whose members may be such numbers.
    """
    if isinstance(value, tuple):
        return type(value), *map(kind, value)
    if isinstance(value, frozenset):
        return type(value), frozenset((member, kind(member)) for member in value)
    if isinstance(value, float):
        return type(value), math.copysign(1.0, value)
    if isinstance(value, complex):
        return type(value), kind(value.real), kind(value.imag)
    return type(value)


# ------------------------------------------------------------------------- the plain function


def out_tree(call: Call, in_avals: Sequence) -> Any:
    """The structure of what the plain function returns for arrays of these types."""
    return _out_tree(call, tuple((a.shape, a.dtype) for a in in_avals))


@remembered
def _out_tree(call: Call, shapes):
    args = jax.tree.unflatten(call.in_tree, [jax.ShapeDtypeStruct(s, d) for s, d in shapes])
    definition = functools.partial(call.rule.definition, **dict(call.static))
    closed, shape = jax.make_jaxpr(definition, return_shape=True)(*args)
    _must_be_closed(call.rule.name, closed)
    return jax.tree.structure(shape)


def _must_be_closed(name: str, closed_jaxpr) -> None:
    """A traced value from outside would get no gradient, and leak out of its trace."""
    for const in closed_jaxpr.consts:
        if isinstance(const, jax.core.Tracer):
            raise RuleError(
                f"{name} uses a traced value of shape {const.shape} and dtype {const.dtype} from "
                "the function around it. Pass it as a positional argument."
            )


# ------------------------------------------------------------------------------------ forward


def forward_types(call: Call, in_avals: Sequence) -> tuple[Any, Any]:
    """The types of the value and of the residuals, as trees.

    Raises:
        RuleError: `forward` doesn't return a pair, or another value than the plain function.
    """
    rule, static = call.rule, dict(call.static)
    args = jax.tree.unflatten(call.in_tree, list(in_avals))
    wanted = _types(functools.partial(rule.definition, **static), *args)
    if rule.forward is None:
        return wanted, args
    pair = _types(functools.partial(rule.forward, **static), *args)
    if not (isinstance(pair, tuple) and len(pair) == 2):
        raise RuleError(
            f"{rule.name}.forward must return a pair, (value, residuals), but it returned "
            f"{_describe(pair)}."
        )
    value, residuals = pair
    kinds = lambda tree: jax.tree.flatten(jax.tree.map(lambda a: (a.shape, a.dtype), tree))
    if kinds(value) != kinds(wanted):
        raise RuleError(
            f"{rule.name}.forward returned the value {_describe(value)}, but {rule.name} itself "
            f"returns {_describe(wanted)}."
        )
    return wanted, residuals


def _types(function, *args) -> Any:
    """The types of what a function returns. `jax.eval_shape` loses a mesh that is part manual."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return jax.tree.unflatten(jax.tree.structure(shapes), closed.out_avals)


# ----------------------------------------------------------------------------------- backward


def must_have_backward(rule: Rule) -> None:
    if rule.backward is None:
        raise RuleError(
            f"{rule.name} has no backward rule, so it can't be differentiated. Write one:\n\n"
            f"    @{rule.name}.backward\n    def _(residuals, g): return (...)"
        )


def flat_gradients(call: Call, in_avals: Sequence, grads: Any) -> list:
    """What `backward` returned, as one gradient or None for each array of the call.

    Raises:
        RuleError: it isn't a tuple with one gradient for each argument, or a gradient hasn't its
            argument's structure, shapes and dtypes.
    """
    rule = call.rule
    arg_trees = call.in_tree.children()
    names = rule.argument_names(len(arg_trees))
    if not isinstance(grads, (tuple, list)):
        raise RuleError(
            f"{rule.name}.backward must return a tuple with one gradient for each of its "
            f"{len(arg_trees)} arguments ({', '.join(names)}), but it returned "
            f"{_describe(grads)}. (A single gradient is written with a comma: `return (dx,)`.)"
        )
    if len(grads) != len(arg_trees):
        raise RuleError(
            f"{rule.name}.backward returned {len(grads)} gradients, but {rule.name} has "
            f"{len(arg_trees)} arguments: {', '.join(names)}. (None stands for no gradient.)"
        )
    flat: list[Any] = []
    start = 0
    for name, tree, grad in zip(names, arg_trees, grads, strict=True):
        avals = in_avals[start : start + tree.num_leaves]
        start += tree.num_leaves
        if grad is None:
            flat += [None] * tree.num_leaves
            continue
        where = f"{rule.name}.backward: the gradient of argument '{name}' has"
        try:
            leaves = tree.flatten_up_to(grad)
        except ValueError as error:
            raise RuleError(f"{where} the wrong structure: {error}.") from None
        flat += [_gradient(where, name, g, a) for g, a in zip(leaves, avals, strict=True)]
    return flat


def _gradient(where: str, name: str, g, aval):
    """One array of a gradient, of its argument's dtype; None for zero."""
    if g is None or not is_inexact(aval):
        return None
    if not jax.tree_util.all_leaves([g]):
        raise RuleError(
            f"{where} the wrong structure: {_describe(g)} for an array of shape {aval.shape}."
        )
    got = jax.typeof(g)
    if got.shape != aval.shape:
        raise RuleError(f"{where} shape {got.shape}, but '{name}' has shape {aval.shape}.")
    if got.dtype != aval.dtype and not got.weak_type:
        raise RuleError(
            f"{where} dtype {got.dtype}, but '{name}' of shape {aval.shape} has dtype {aval.dtype}."
        )
    keep = got.dtype == aval.dtype and got.weak_type == aval.weak_type
    return as_varying(g if keep else jnp.asarray(g, aval.dtype), aval)


def check_backward(
    call: Call, closed, num_residuals: int, in_avals: Sequence, has_gradient: Sequence[bool]
) -> None:
    """`backward` is linear in g: transposable by JAX, and without a constant term.

    Args:
        closed: the jaxpr of `backward`: of residuals and upstream gradients, to those gradients
            that aren't None.
        in_avals: the types of the call's arrays.
        has_gradient: which of the call's arrays those gradients belong to.

    Raises:
        RuleError: it isn't.
    """
    rule = call.rule
    _must_be_closed(f"{rule.name}.backward", closed)
    names = call.leaf_names()
    of = [(n, a.shape) for n, a in compress(zip(names, in_avals, strict=True), has_gradient)]
    residual_avals, g_avals = closed.in_avals[:num_residuals], closed.in_avals[num_residuals:]
    shapes = ", ".join(str(a.shape) for a in g_avals)
    # Without a tangent of the rule's own, JAX's transposition finds what isn't linear at all.
    found = _kinds(closed, num_residuals, strict=rule.tangent is not None)
    for kind, (name, shape) in zip(found, of, strict=True):
        _must_be_zero_or_linear(
            kind,
            "doesn't depend on g at all (a gradient of zero is written None)",
            f"{rule.name}.backward isn't linear in g: the gradient of argument '{name}' "
            f"(shape {shape}, g's shape {shapes})",
        )
    if rule.tangent is not None:
        return
    for i, (name, shape) in enumerate(of):

        def transposed(residuals, ct, i=i):
            one = lambda *gs: jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *residuals, *gs)[i]
            return jax.linear_transpose(one, *g_avals)(ct)

        try:
            jax.eval_shape(transposed, residual_avals, closed.out_avals[i])
        except Exception as error:
            raise RuleError(
                f"{rule.name}.backward can't be transposed: JAX finds that the gradient of "
                f"argument '{name}' (shape {shape}) isn't linear in g (shape {shapes}). If it "
                f"is linear, but in a form that JAX can't transpose (a while loop), write its "
                f"forward-mode rule under @{rule.name}.tangent."
            ) from error


# ------------------------------------------------------------------------------------ tangent


def flat_tangents(name: str, out_tree: Any, out_avals: Sequence, dy: Any) -> list:
    """What `tangent` returned, as one array for each inexact array of the value.

    Raises:
        RuleError: it hasn't the value's structure, shapes and dtypes.
    """
    try:
        leaves = out_tree.flatten_up_to(dy)
    except ValueError as error:
        raise RuleError(f"{name}.tangent returned the wrong structure: {error}.") from None
    flat = []
    for d, aval in zip(leaves, out_avals, strict=True):
        if not is_inexact(aval):
            continue
        d = zeros(aval) if d is None else d
        if not jax.tree_util.all_leaves([d]):
            raise RuleError(
                f"{name}.tangent returned the wrong structure: {_describe(d)} for an array of "
                f"shape {aval.shape}."
            )
        got = jax.typeof(d)
        if got.shape != aval.shape or (got.dtype != aval.dtype and not got.weak_type):
            raise RuleError(
                f"{name}.tangent returned a dy of shape {got.shape} and dtype {got.dtype}, but "
                f"the value of {name} has shape {aval.shape} and dtype {aval.dtype}."
            )
        flat.append(as_varying(jnp.asarray(d, aval.dtype), aval))
    return flat


def check_tangent(rule: Rule, closed, num_residuals: int) -> None:
    """`tangent` is linear in the tangents of the arguments.

    Args:
        closed: the jaxpr of `tangent`: of residuals and tangents of arguments, to those of the
            value.

    Raises:
        RuleError: it isn't.
    """
    _must_be_closed(f"{rule.name}.tangent", closed)
    found = _kinds(closed, num_residuals, strict=True)
    for kind, dy in zip(found, closed.out_avals, strict=True):
        _must_be_zero_or_linear(
            kind,
            "doesn't depend on them at all (a tangent of zero is written None)",
            f"{rule.name}.tangent isn't linear in the tangents of its arguments: dy of shape "
            f"{dy.shape}",
        )


# ---------------------------------------------------------------------------------- linearity


def _kinds(closed, num_residuals: int, *, strict: bool) -> list[str]:
    """How each output depends on the inputs after the residuals (see `linearity.kinds`)."""
    moving = len(closed.in_avals) - num_residuals
    ins = [linearity.CONSTANT] * num_residuals + [linearity.LINEAR] * moving
    return linearity.kinds(closed, ins, strict=strict)


def _must_be_zero_or_linear(kind: str, constant: str, what: str) -> None:
    """An error that says of `what` how it depends instead; `constant` says it of a constant."""
    if kind not in (linearity.ZERO, linearity.LINEAR):
        raise RuleError(f"{what} {constant if kind == linearity.CONSTANT else kind}.")


def _describe(tree) -> str:
    def leaf(x):
        return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else repr(x)

    return str(jax.tree.map(leaf, tree)).replace("'", "")

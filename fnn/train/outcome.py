"""What becomes of a step: it is applied, left out, or reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from fnn.train.loss_scaling import DynamicLossScale
from fnn.train.nonfinite import propose, report, square_norms, square_sums
from fnn.train.state import State

NonFinite = Literal["raise", "skip", "ignore", "roll_back"]
NONFINITE = get_args(NonFinite)


def settle(
    state: State,
    apply: Callable[[], State],
    gradient: Any,
    value: jax.Array,
    losses: jax.Array,
    *,
    nonfinite: NonFinite,
    look: bool,
    exact: bool,
    folded: bool = False,
    scaling: DynamicLossScale | None = None,
) -> tuple[State, dict[str, jax.Array], jax.Array | None]:
    """Apply a step, unless it is a bad one.

    Args:
        state: before the step.
        apply: the state after it.
        gradient, value, losses: of the batch.
        nonfinite: what to do about a bad step; see `train_step`.
        look: whether to look for inf and nan before the step is applied.
        exact: see `square_sums`.
        folded: see `square_norms`.
        scaling: how the scale of the loss changes, if it does. Then a step whose loss or gradient
            isn't finite is left out in any case, and not reported, as long as the scale can fall.

    Returns:
        `(state, metrics, report)`: the norm of the gradient, and what else there is to say; the
        report is None where nothing is raised.
    """
    metrics: dict[str, jax.Array] = {}
    if scaling is not None:
        metrics["loss_scale"] = state.loss_scale.scale
        applied, apply = apply, lambda: _with_scale(applied(), scaling, state, True)

    def finite(squares):
        return jnp.isfinite(value) & jnp.isfinite(jnp.sum(squares))

    if not look:
        squares = square_norms(gradient, folded)
        metrics["grad_norm"] = jnp.sqrt(jnp.sum(squares))
        if nonfinite == "roll_back":
            metrics["skipped"] = jnp.zeros((), jnp.float32)
        if scaling is None:
            return apply(), metrics, None
        good = finite(squares)
        taken = good | ~scaling.can_fall(state.loss_scale)
        kept = jax.lax.cond(taken, apply, lambda: state)
        metrics["skipped"] = (~taken).astype(jnp.float32)
        return _with_scale(kept, scaling, state, good), metrics, None

    new, again = propose(apply)
    sums = square_sums(gradient, new, state, exact=exact)
    total = jnp.sum(sums[: len(jax.tree.leaves(gradient))])
    good = jnp.isfinite(value) & jnp.all(jnp.isfinite(sums)) & jnp.isfinite(total)

    def bad():  # what explains a bad step is computed only if there is one
        squares = square_norms(gradient)
        norm = jnp.sqrt(jnp.sum(squares)).astype(total.dtype)
        told = report(state, losses, squares, sums)
        if scaling is None:
            return state, norm, told
        scale_is_right = finite(squares)  # then the update is to blame
        told = jnp.where(scale_is_right | ~scaling.can_fall(state.loss_scale), told, 0)
        old, fallen = state.loss_scale, scaling.after(state.loss_scale, jnp.zeros((), bool))
        scale = jax.tree.map(lambda a, b: jnp.where(scale_is_right, a, b), old, fallen)
        return state._replace(loss_scale=scale), norm, told

    quiet = jax.eval_shape(bad)[2]
    kept, norm, told = jax.lax.cond(
        good, lambda: (again(), jnp.sqrt(total), jnp.zeros(quiet.shape, quiet.dtype)), bad
    )
    metrics["grad_norm"] = norm
    if nonfinite in ("skip", "roll_back") or scaling is not None:
        metrics["skipped"] = (~good).astype(jnp.float32)
    return kept, metrics, told if nonfinite in ("raise", "roll_back") else None


def _with_scale(new: State, scaling: DynamicLossScale, old: State, finite: Any) -> State:
    return new._replace(loss_scale=scaling.after(old.loss_scale, jnp.asarray(finite)))

"""Non-finite numbers in a step: noticed on the device, named on the host, later.

The step packs what it noticed into one small integer array, the report. Reading it at once
would stop the host until the device is done, so reports wait in a queue and are read when
they are ready; at most `IN_FLIGHT` of them wait, which also keeps the host from running
ahead of the device without bound.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.train.state import State, path_name

IN_FLIGHT = 32


class NonFiniteError(FloatingPointError):
    """A loss or a gradient was inf or nan.

    Attributes:
        step: the number of the step, counted from 0, as `state.step` was before it.
        names: what wasn't finite: `("loss", "params['hidden']['W']")`.
        result: in `fit`, the FitResult up to the last good step; else None.
    """

    def __init__(self, message: str, step: int, names: tuple[str, ...]):
        super().__init__(message)
        self.step = step
        self.names = names
        self.result: Any = None


def square_norms(gradients: Any) -> jax.Array:
    """The squared length of each leaf of the gradient, in at least float32."""

    def square(g):
        g = g.astype(jnp.promote_types(g.dtype, jnp.float32)).ravel()
        return jnp.vdot(g, g).real

    return jnp.stack([square(g) for g in jax.tree.leaves(gradients)])


def report(state: State, losses: jax.Array, squares: jax.Array) -> jax.Array:
    """Which numbers of a bad step are inf or nan; what `explain` reads.

    Args:
        state: the state before the step.
        losses: of each example.
        squares: the squared norm of each leaf of the gradient.

    Returns:
        int32: `[1, step, first bad example, is the loss bad, is each gradient bad, is each
        parameter bad]`. (The report of a good step is zeros.)
    """
    fine = jnp.isfinite(losses)
    params = [~jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(state.params)]
    head = [jnp.ones((), jnp.int32), state.step, jnp.argmin(fine), ~jnp.all(fine)]
    head = [x.astype(jnp.int32) for x in head]
    flags = jnp.concatenate([~jnp.isfinite(squares), jnp.stack(params)])
    return jnp.concatenate([jnp.stack(head), flags.astype(jnp.int32)])


class Reports:
    """The reports of the steps that are under way, oldest first."""

    def __init__(self) -> None:
        self._waiting: collections.deque[tuple[Any, Callable[[np.ndarray], Exception]]]
        self._waiting = collections.deque()

    def add(self, report: jax.Array, explain: Callable[[np.ndarray], Exception]) -> None:
        """Queue a report, and what makes an error of it if it's bad."""
        self._waiting.append((report, explain))

    def read(self, *, wait: bool = False) -> None:
        """Read the reports that are ready, or all of them.

        Raises:
            NonFiniteError: one says that something wasn't finite.
        """
        while self._waiting:
            report, explain = self._waiting[0]
            if not (wait or len(self._waiting) > IN_FLIGHT or report.is_ready()):
                return
            self._waiting.popleft()
            found = np.asarray(report)
            if found[0]:
                raise explain(found)


def explain(found: np.ndarray, names: list[str], size: int, data: str) -> NonFiniteError:
    """The error that a report stands for.

    Args:
        found: the report.
        names: the parameters' names, in the order of their leaves.
        size: the number of examples in the batch.
        data: what is wrong with the batch, in words; may be empty.
    """
    step, first, loss = int(found[1]), int(found[2]), bool(found[3])
    bad, params_bad = found[4 : 4 + len(names)], found[4 + len(names) :]
    gradients = [n for n, is_bad in zip(names, bad, strict=True) if is_bad]
    lines = [f"step {step}: the {_what(loss, gradients)} not finite (inf or nan)."]
    if loss:
        lines.append(f"The first example with such a loss is number {first} of the batch's {size}.")
    params = [n for n, is_bad in zip(names, params_bad, strict=True) if is_bad]
    if data:
        lines.append(f"The data is to blame: {data}")
    if params:
        lines.append(
            f"The parameters themselves hold inf or nan: {_some(params)}. An earlier update made "
            "them so: look at the learning rate."
        )
    if not data and not params:
        lines.append("The batch and the parameters that went in are finite.")
    lines.append("The step wasn't applied: the state is as it was before it.")
    return NonFiniteError("\n".join(lines), step, (*(["loss"] if loss else []), *gradients))


def parameter_names(params: Any) -> list[str]:
    """`params['hidden']['W']` and so on, in the order of the leaves."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [path_name("params", path) for path, _ in paths]


def _what(loss: bool, gradients: list[str]) -> str:
    if gradients:
        of = f"gradient of {_some(gradients)}"
        return f"loss and the {of} are" if loss else f"{of} is"
    # Finite numbers, too large to be summed.
    return "loss is" if loss else "mean loss or the norm of the gradient is"


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

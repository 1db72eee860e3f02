"""Non-finite numbers in a step: noticed on the device, named on the host, later.

The step packs what it noticed into one small integer array, the report. Reading it at once
would stop the host until the device is done, so reports wait in a queue, the run's, and are
read when they are ready; at most `IN_FLIGHT` of them wait, which also keeps the host from
running ahead of the device without bound.
"""

from __future__ import annotations

import collections
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.train.state import State
from fnn.train.update import Group, groups, leaf_names, square

IN_FLIGHT = 32


class NonFiniteError(FloatingPointError):
    """A loss or a gradient was inf or nan, or an update would have made a parameter so.

    Attributes:
        step: the number of the step, counted from 0, as `state.step` was before it.
        names: what wasn't finite: `("loss", "params['hidden']['W']")` for the loss and a gradient;
            the names of parameters or of leaves like `opt_state[0].count` for an update.
        refused: how many steps this error tells of, all of them not applied. The others came
            after the first, before its report was read.
        result: in `fit`, the FitResult up to the last good step; else None.
    """

    def __init__(self, message: str, step: int, names: tuple[str, ...], refused: int = 1):
        super().__init__(message)
        self.step = step
        self.names = names
        self.refused = refused
        self.result: Any = None

    def __reduce__(self):
        return type(self), (str(self), self.step, self.names, self.refused), self.__dict__


def square_norms(gradients: Any) -> jax.Array:
    """The squared length of each leaf of the gradient, in at least float32."""
    sums = [jnp.sum(square(g)) for g in jax.tree.leaves(gradients)]
    dtype = jnp.result_type(*sums)
    return jnp.stack([s.astype(dtype) for s in sums])


def report(state: State, losses: jax.Array, squares: jax.Array, sums: jax.Array) -> jax.Array:
    """Which numbers of a bad step are inf or nan; what `explain` reads.

    Args:
        state: the state before the step.
        losses: of each example.
        squares: the squared norm of each leaf of the gradient.
        sums: `square_sums` of the new state.

    Returns:
        int32: `[1, step, first bad example, is the loss bad, is each gradient bad, is each
        parameter bad, is each group of the new state bad]`. (The report of a good step is
        zeros.)
    """
    fine = jnp.isfinite(losses)
    params = [~jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(state.params)]
    head = [jnp.ones((), jnp.int32), state.step, jnp.argmin(fine), ~jnp.all(fine)]
    head = [x.astype(jnp.int32) for x in head]
    flags = jnp.concatenate([~jnp.isfinite(squares), jnp.stack(params), ~jnp.isfinite(sums)])
    return jnp.concatenate([jnp.stack(head), flags.astype(jnp.int32)])


class Run:
    """A chain of states, each made from the one before by a step, and what the host knows of it.

    A step's report belongs to the run, not to the `TrainStep`: the same step may serve several
    runs, in turn or in threads.

    Attributes:
        thread: the thread that made the last step.
        exact: whether the state held inf or nan where the run began.
        careful: how many more steps wait for their own report.
    """

    def __init__(self, state: State, exact: bool):
        self.thread = threading.get_ident()
        self.exact = exact
        self.careful = 0
        # Names and types alone: the run must not keep a state alive.
        self._leaves, self._groups = leaf_names(state), groups(state)
        self.types = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), state.params)
        self._waiting: collections.deque[tuple[Any, Any]] = collections.deque()
        self._lock = threading.Lock()

    def add(self, report: jax.Array, data: tuple[int, Callable[[], str]]) -> None:
        """Queue a report; with it the batch's size, and what says what is wrong with the batch."""
        self._waiting.append((report, data))

    def read(self, *, wait: bool = False) -> None:
        """Read the reports that are ready, or all of them.

        If one is bad, the rest is waited for, and one error tells of all.

        Raises:
            NonFiniteError: one says that something wasn't finite.
        """
        first, more = None, 0
        with self._lock:
            while self._waiting:
                report, data = self._waiting[0]
                ready = len(self._waiting) > IN_FLIGHT or report.is_ready()
                if not (wait or first is not None or ready):
                    return
                found = np.asarray(report)  # Ctrl-C in here loses nothing: it is still queued
                self._waiting.popleft()
                if found[0] and first is None:
                    first = (found, data)
                elif found[0]:
                    more += 1
        if first is None:
            return
        self.careful = IN_FLIGHT
        found, (size, describe) = first
        raise explain(found, self._leaves, self._groups, size, describe(), more)


class Runs:
    """Which run a state belongs to, without keeping either alive."""

    def __init__(self) -> None:
        self._of_step: dict[int, tuple[weakref.ref, Run]] = {}
        self._latest = threading.local()

    def of(self, state: State) -> Run | None:
        """The run that the state came of; None if it isn't known."""
        step, run = self._of_step.get(id(state.step), (lambda: None, None))
        return run if step() is state.step else None

    def link(self, state: State, run: Run) -> None:
        """Note that the state came of the run, in this thread."""
        run.thread, self._latest.run = threading.get_ident(), run
        key, table = id(state.step), self._of_step
        if isinstance(state.step, jax.Array):  # numpy's numbers can't be told apart, nor donated
            table[key] = (weakref.ref(state.step, lambda _: table.pop(key, None)), run)

    def warn_of_abandoned(self) -> None:
        """Tell of the bad steps of this thread's latest run, if its states are gone."""
        run = getattr(self._latest, "run", None)
        if run is None or any(run is other for _, other in list(self._of_step.values())):
            return
        self._latest.run = None
        try:
            run.read(wait=True)
        except NonFiniteError as error:
            warnings.warn(f"In a run that was given up: {error}", RuntimeWarning, stacklevel=4)

    def of_this_thread(self) -> list[Run]:
        """The runs whose last step was in this thread: of states that are alive, and the latest."""
        mine = threading.get_ident()
        runs = [run for _, run in list(self._of_step.values()) if run.thread == mine]
        latest = getattr(self._latest, "run", None)
        return list(dict.fromkeys([*runs, *([latest] if latest is not None else [])]))


def explain(
    found: np.ndarray, leaves: list[str], parts: list[Group], size: int, data: str, more: int
) -> NonFiniteError:
    """The error that a report stands for.

    Args:
        found: the report.
        leaves: the names of the leaves of (params, opt_state).
        parts: their `groups`.
        size: the number of examples in the batch.
        data: what is wrong with the batch, in words; may be empty.
        more: how many later steps were bad, too.
    """
    names = leaves[: sum(part.parameter is not None for part in parts)]
    step, first, loss = int(found[1]), int(found[2]), bool(found[3])
    bad, params_bad, parts_bad = np.split(found[4:], [len(names), 2 * len(names)])
    gradients = [n for n, is_bad in zip(names, bad, strict=True) if is_bad]
    params = [n for n, is_bad in zip(names, params_bad, strict=True) if is_bad]
    updates = [part for part, is_bad in zip(parts, parts_bad, strict=True) if is_bad]
    end = "The step wasn't applied: the state is as it was before it."
    if more:
        end += f" Nor were {more} of the steps after it, for such a reason."
    if updates and not loss and not gradients:
        return NonFiniteError(
            f"step {step}: the update of {_some([_group(leaves, u) for u in updates])} is not "
            "finite (inf or nan), though the loss and the gradient are. Look at the learning "
            "rate and the optimiser's other numbers; in half precision, at the largest number of "
            f"the dtype.\n{end}",
            step,
            tuple(leaves[u.leaves[0]] for u in updates),
            1 + more,
        )
    lines = [f"step {step}: the {_what(loss, gradients)} not finite (inf or nan)."]
    if loss:
        lines.append(f"The first example with such a loss is number {first} of the batch's {size}.")
    if data:
        lines.append(f"The data is to blame: {data}")
    if params:
        lines.append(
            f"The parameters that went in hold inf or nan: {_some(params)}. Steps keep finite "
            "parameters finite: they were so when training began."
        )
    if not data and not params:
        lines.append("The batch and the parameters that went in are finite.")
    lines.append(end)
    blamed = (*(["loss"] if loss else []), *gradients)
    return NonFiniteError("\n".join(lines), step, blamed, 1 + more)


def _group(leaves: list[str], group: Group) -> str:
    first, *others = (leaves[i] for i in group.leaves)
    return f"{first} (or of {', '.join(others)}, which belong to it)" if others else first


def _what(loss: bool, gradients: list[str]) -> str:
    if gradients:
        of = f"gradient of {_some(gradients)}"
        return f"loss and the {of} are" if loss else f"{of} is"
    # Finite numbers, too large to be summed.
    return "loss is" if loss else "mean loss or the norm of the gradient is"


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

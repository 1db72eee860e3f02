"""Non-finite numbers in a step: noticed on the device before they are kept, named later."""

from __future__ import annotations

import collections
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn.birth import Birth
from fnn.eager import apply_all
from fnn.frames import warn
from fnn.jaxpr import Equation, Program, program, trace
from fnn.precision import total, widest
from fnn.train.precision import wide
from fnn.train.replay import in_words
from fnn.train.state import State, path_name

# ---------------------------------------------------------- the update, looked at before it is kept
# An optimiser's update that is looked at before it is kept, without a second set of memory.
#
# Whether a step is good is known only when every new number was looked at, and then the old
# state must still be there. So the new numbers are computed to be looked at and, if they are
# good, computed again in the place of the old. XLA folds arithmetic that goes entry by entry
# into the loop that uses it, so that this costs less than keeping them. What doesn't go entry by
# entry (sums, products, random numbers, line searches) is computed once.

# What XLA computes entry by entry, inside the loop that needs it.
_NAMES = """
    abs add add_any and broadcast_in_dim cbrt ceil clamp complex conj convert_element_type
    copy copy_p cos div eq exp exp2 expand_dims expm1 floor ge gt imag integer_pow is_finite
    le log log1p logistic lt max min mul ne neg nextafter not or pow real reduce_precision
    rem reshape round rsqrt select_n sign sin sqrt square squeeze stop_gradient sub tanh xor
"""
_ENTRYWISE = frozenset(_NAMES.split())


def propose(update: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
    """Run an update; return what it gives, and a function that gives it again.

    The second computes anew only what goes entry by entry. Called in a branch of `lax.cond`,
    it keeps XLA from holding the first's arrays until there.
    """
    trees = []

    def leaves():
        flat, tree = jax.tree.flatten(update())
        trees.append(tree)
        return flat

    flat = program(trace(leaves, ()))
    values = dict(enumerate(flat.values(())))
    apply_all(flat.equations, values)
    entrywise = _entrywise_end(flat)

    def again():
        anew = dict(values)
        apply_all(entrywise, anew)
        return jax.tree.unflatten(trees[0], [anew[i] for i in flat.outputs])

    return jax.tree.unflatten(trees[0], [values[i] for i in flat.outputs]), again


def _entrywise_end(flat: Program) -> list[Equation]:
    """The equations on arrays, entry by entry, that stand between the outputs and all others."""

    def is_entrywise(equation: Equation) -> bool:
        entrywise = equation.name in _ENTRYWISE and not equation.has_effects
        return entrywise and bool(flat.avals[equation.outs[0]].shape)

    return flat.needed_for(flat.outputs, through=is_entrywise)[0]


class Group(NamedTuple):
    """Leaves that are looked at in one loop: a parameter, and what the optimiser keeps for it.

    Fields:
        parameter: the number of the parameter's leaf, or None for other numbers of the state.
        leaves: places among the leaves of `numbers_of` the state.
    """

    parameter: int | None
    leaves: tuple[int, ...]


def numbers_of(state: State) -> tuple[Any, Any, Any, Any]:
    """What of a state a step must keep finite."""
    return state.params, state.opt_state, state.model_state, state.ema


def groups(state: State) -> list[Group]:
    """All inexact leaves of the parameters and the optimiser's state, the parameters' first.

    An optimiser keeps moments and the like in trees like the parameters: the end of the path
    to a leaf, and its type, say whose it is. They are computed from the same numbers.
    """
    paths = jax.tree_util.tree_leaves_with_path(numbers_of(state))
    number = len(jax.tree.leaves(state.params))
    found: dict[Any, list[int]] = {}
    for i, (path, leaf) in enumerate(paths):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        kind = (leaf.shape, getattr(jax.typeof(leaf), "sharding", None))
        key: Any = (path[1:], kind)
        if i >= number:
            ends = ((path[k:], kind) for k in range(1, len(path) + 1))
            key = next((end for end in ends if end in found), i)
        found.setdefault(key, []).append(i)
    return [
        Group(leaves[0] if leaves[0] < number else None, tuple(leaves)) for leaves in found.values()
    ]


def square_sums(gradient: Any, new: State, old: State, *, exact: bool) -> jax.Array:
    """For each group, Σ |g|² over the parameter's gradient, or nan if a new number is bad.

    A number is bad if it became inf or nan: some optimisers' states hold inf from the start,
    the best loss so far, for one. (A group without a gradient has the sum 0.)

    To the square of the gradient's entry, 0 times the new numbers is added, which is 0, or nan
    if one of them isn't finite: one sum tells both, in one loop.

    Args:
        gradient: a tree like the parameters.
        new, old: the states.
        exact: whether an array of the old state may hold inf or nan. XLA's CPU compiler makes
            more than one loop of a choice and a sum, so this costs more.
    """
    gradients = jax.tree.leaves(gradient)
    after = jax.tree.leaves(numbers_of(new))
    before = jax.tree.leaves(numbers_of(old))
    sums = []
    for group in groups(old):
        terms = [] if group.parameter is None else [square(gradients[group.parameter])]
        for i in group.leaves:
            look_back = exact or after[i].ndim == 0
            terms.append(_zero_if_fine(after[i], before[i] if look_back else None))
        sums.append(_sum_of_all(terms))
    dtype = widest(*[s.dtype for s in sums])
    return jnp.stack([s.astype(dtype) for s in sums])


def _sum_of_all(arrays: list[jax.Array]) -> jax.Array:
    """The sum of all entries of arrays of one shape, in one loop."""
    return jnp.sum(total(arrays))


def any_nonfinite(state: State) -> jax.Array:
    """Whether a number of the state is inf or nan: one sum for each group."""
    leaves = jax.tree.leaves(numbers_of(state))
    zeros = jnp.zeros((), jnp.float32)  # or nan
    for group in groups(state):
        found_in = _sum_of_all([_zero_if_fine(leaves[i], None) for i in group.leaves])
        zeros = zeros + found_in.astype(jnp.float32)
    return zeros != 0


@jax.jit
def became_nonfinite(new: State, old: State) -> jax.Array:
    """Whether a number that was finite in the old state is inf or nan in the new one."""
    after, before = (jax.tree.leaves(numbers_of(s)) for s in (new, old))
    bad = jnp.zeros((), bool)
    for i in itertools.chain(*(group.leaves for group in groups(old))):
        bad = bad | jnp.any(jnp.isfinite(before[i]) & ~jnp.isfinite(after[i]))
    return bad


def holds_nonfinite(state: State) -> bool:
    """Whether an array of the state holds inf or nan. (Scalars are always looked at exactly.)"""
    arrays = [
        x
        for x in jax.tree.leaves(numbers_of(state))
        if jnp.ndim(x) and jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return bool(_any_nonfinite(arrays))


@jax.jit
def _any_nonfinite(arrays: list) -> jax.Array:
    found = jnp.zeros((), bool)
    for x in arrays:
        found = found | ~jnp.all(jnp.isfinite(x))
    return found


def square(x: jax.Array) -> jax.Array:
    """|x|² of each entry, in at least float32."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return square(x.real) + square(x.imag)
    x = wide(x)
    return x * x


def _zero_if_fine(new: jax.Array, old: jax.Array | None) -> jax.Array:
    """0 where the new numbers are finite, else nan; where the old ones weren't finite, 0."""
    if jnp.issubdtype(new.dtype, jnp.complexfloating):
        olds = (None, None) if old is None else (old.real, old.imag)
        return _zero_if_fine(new.real, olds[0]) + _zero_if_fine(new.imag, olds[1])
    # Not 0 · new: of new = m · c, XLA makes m · 0, which is 0 though m · c overflows.
    zero = new - new
    if old is not None:
        zero = jnp.where(jnp.isfinite(old), zero, jnp.zeros_like(zero))
    return wide(zero)


def leaf_names(state: State) -> list[str]:
    """The names of all that: `params['W']`, `opt_state[0].mu['W']`, ..."""
    parts = ("params", "opt_state", "model_state", "ema")
    return [
        path_name(part, path)
        for part, tree in zip(parts, numbers_of(state), strict=True)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


# ------------------------------------------------------------------------------- reports and errors
# Non-finite numbers in a step: noticed on the device, named on the host, later.
#
# The step packs what it noticed into one small integer array, the report. Reading it at once
# would stop the host until the device is done, so reports wait in a queue, the run's, and are
# read when they are ready; at most `IN_FLIGHT` of them wait, which also keeps the host from
# running ahead of the device without bound.

IN_FLIGHT = 32

# Of how many entries on an array is folded for its sum, and of how many pieces.
FOLDED_SIZE, PIECES = 4096, 16


# From a state to where the inf or nan of a step from it was born.
Search = Callable[[State], Birth | None]


class NonFiniteError(FloatingPointError):
    """A loss or a gradient was inf or nan, or an update would have made a parameter so.

    Attributes:
        step: the number of the step, counted from 0, as `state.step` was before it.
        names: what wasn't finite: `("loss", "params['hidden']['W']")` for the loss and a gradient;
            the names of parameters or of leaves like `opt_state[0].count` for an update.
        refused: how many steps this error tells of, all of them not applied. The others came
            after the first, before its report was read.
        birth: where it was born, a `fnn.birth.Birth` with the operation, the part of the network,
            the source line, the loop's iteration and more; print it. None where the step couldn't
            be made again: by `finish` without a state, or where good steps came between; and where
            it was finite when computed operation by operation.
        result: in `fit`, the FitResult up to the last good step; else None.
    """

    def __init__(self, message: str, step: int, names: tuple[str, ...], refused: int = 1):
        super().__init__(message)
        self.step = step
        self.names = names
        self.refused = refused
        self.birth: Birth | None = None
        self.result: Any = None

    def __reduce__(self):
        return type(self), (str(self), self.step, self.names, self.refused), self.__dict__


def square_norms(gradients: Any, folded: bool = False) -> jax.Array:
    """The squared length of each leaf of the gradient, in at least float32.

    Args:
        folded: see `_folded_sum`, which is faster on a CPU. It cuts arrays anywhere, which those
            that are divided over devices would have to be sent for.
    """
    summed = _folded_sum if folded else jnp.sum
    sums = [summed(square(g)) for g in jax.tree.leaves(gradients)]
    dtype = widest(*[s.dtype for s in sums])
    return jnp.stack([s.astype(dtype) for s in sums])


def _folded_sum(x: jax.Array) -> jax.Array:
    """The sum of all entries: pieces of the array are added, entry by entry, until it is small.

    XLA's CPU backend writes the squares of an array down before it sums them. It adds pieces of
    them in one pass.
    """
    x, rests = x.reshape(-1), []
    while x.size >= FOLDED_SIZE:
        size = x.size // PIECES
        pieces = [x[i * size : (i + 1) * size] for i in range(PIECES)]
        rests.append(x[PIECES * size :])
        while len(pieces) > 1:
            pieces = [a + b for a, b in zip(pieces[::2], pieces[1::2], strict=True)]
        x = pieces[0]
    return sum((jnp.sum(rest) for rest in rests if rest.size), jnp.sum(x))


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

    Args:
        state: one of its states.
        trained: the part of it that is trained, whose numbers the reports are of.
        exact: whether that held inf or nan where the run began.

    Attributes:
        thread: the thread that made the last step.
        exact: as given.
        types: of the parameters and of the network's state.
        careful: how many more steps wait for their own report.
    """

    def __init__(self, state: State, trained: State, exact: bool):
        self.thread = threading.get_ident()
        self.exact = exact
        self.careful = 0
        # Names and types alone: the run must not keep a state alive.
        self._leaves, self._groups = leaf_names(trained), groups(trained)
        self.types = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state.params, state.model_state)
        )
        self._waiting: collections.deque[tuple[Any, Any]] = collections.deque()
        self._lock = threading.Lock()

    def add(self, report: jax.Array, data: tuple[int, Callable[[], str], Search]) -> None:
        """Queue a report, and with it what can be said of the batch.

        data: its size; what tells what is wrong with it; and what makes the step again from a
            state, and finds where its inf or nan was born.
        """
        self._waiting.append((report, data))

    def read(self, state: State | None = None, *, wait: bool = False) -> None:
        """Read the reports that are ready, or all of them.

        If one is bad, the rest is waited for, and one error tells of all.

        Args:
            state: the run's latest, if it is known.
            wait: whether to wait for all.

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
        found, (size, describe, search) = first
        error = explain(found, self._leaves, self._groups, size, describe(), more)
        # Good steps after a bad one change the state; without them it is the bad step's own.
        if state is not None and int(state.step) == error.step:
            _add_birth(error, search, state)
        raise error


def _add_birth(error: NonFiniteError, search: Search, state: State) -> None:
    try:
        error.birth = search(state)
    except Exception as reason:  # the search must not hide what it is for
        end = f"Where it was born couldn't be looked for: {type(reason).__name__}: {reason}"
    else:
        end = "Computed operation by operation, it is finite: the compiled step rounds otherwise."
        if error.birth is not None:
            end = in_words(error.birth)
    error.args = (f"{error}\n{end}",)


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
            warn(f"In a run that was given up: {error}")

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
        leaves: `leaf_names` of the state.
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

"""The networks of a sweep on their way: runs of members, trained to a step, regrouped, kept."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn.sweeps.axes import COLUMNS, Axes, Group, described
from fnn.sweeps.choice import plan_for
from fnn.sweeps.compiled import Programs
from fnn.sweeps.halving import Halving, chosen, rounds
from fnn.sweeps.layout import Layout, Plan, is_key, padded, plan_of, stacked
from fnn.sweeps.machine import cores
from fnn.sweeps.program import Program, Shared
from fnn.sweeps.result import SweepResult
from fnn.train.progress import Progress

# How long one call of a program is to take: between calls, Ctrl-C ends the training and the
# display moves.
SECONDS = 0.25


@dataclasses.dataclass
class Run:
    """Members that one call of a program trains.

    Fields:
        plan: how.
        members: their numbers in the sweep.
        places: of each, its place in the carry; the rest of the carry is padding.
        numeric: the hyperparameters of all places.
        carry: stacked over places, or of the one member alone; None before it begins.
        done: how many steps are over.
        latest: the members' values to choose by, in the last epoch that is over.
    """

    plan: Plan
    members: tuple[int, ...]
    places: tuple[int, ...]
    numeric: dict[str, Any]
    carry: Any = None
    done: int = 0
    latest: np.ndarray | None = None

    def of(self, member: int) -> Any:
        """A member's own carry."""
        if self.plan.layout == "threads":
            return self.carry
        place = self.places[self.members.index(member)]
        return jax.tree.map(lambda x: x[place], self.carry)


class Training:
    """The members of one group: their programs and how they lie on the machine."""

    def __init__(
        self,
        program: Program,
        shared: Shared,
        group: Group,
        layout: Layout | None,
        at_once: int | None,
    ):
        self.program = program
        self.group = group
        self.layout = layout
        self._at_once = at_once
        self.programs = Programs(program, shared, group.numeric)
        self.plan: Plan | None = None
        self._rate = 1  # steps in a call

    def decide(self) -> Plan:
        """Choose the plan, if that isn't done yet."""
        if self.plan is None:
            count = len(self.group.members)
            self.plan = plan_for(
                self.programs, count, self.layout, self._at_once, self.group.numeric
            )
        return self.plan

    def compile_ahead(self, pool: ThreadPoolExecutor) -> None:
        """Have the programs of the plan that it will most likely be compiled by a pool."""
        if self.layout is not None:
            plan = plan_of(self.layout, len(self.group.members), self._at_once)
            self.programs.compile_ahead([plan], pool)

    def runs(self) -> list[Run]:
        """All members in runs that haven't begun."""
        members, numeric = self.group.members, self.group.numeric
        self.programs.compile([self.decide()])
        return [
            Run(self.decide(), tuple(members[i] for i in some), tuple(range(len(some))), own)
            for some, own in self._cut(range(len(members)), numeric, self.decide())
        ]

    def _cut(self, places: Any, numeric: dict[str, Any], plan: Plan) -> Iterable[tuple]:
        places = list(places)
        for start in range(0, len(places), plan.width):
            some = places[start : start + plan.width]
            own = padded({n: x[some] for n, x in numeric.items()}, plan.width)
            if plan.layout == "threads":
                own = {n: x[0] for n, x in own.items()}
            yield some, own

    def advance(self, run: Run, end: int, stop: threading.Event, metric: str) -> None:
        """Train a run up to a step, or until it is to stop. Called in threads."""
        program = self.programs.get(run.plan)
        if run.carry is None:
            run.carry = self.programs.begin(run.plan, run.numeric)
        while run.done < end and not stop.is_set():
            most = self.programs.most_steps(run.plan, run.done)
            count = min(self._rate, end - run.done, most)
            began = time.perf_counter()
            carry = program(run.carry, run.numeric, run.done, run.done + count)
            jax.block_until_ready(carry)
            run.carry, run.done = carry, run.done + count
            seconds = time.perf_counter() - began
            if count == self._rate:
                self._rate = max(1, min(8 * count, int(count * SECONDS / seconds)))
            epochs = run.done // self.program.steps
            values = carry.history.get(metric)
            if epochs and values is not None:
                values = np.asarray(values).reshape(-1, self.program.epochs)
                run.latest = values[list(run.places), epochs - 1]
            for kind in self.programs.looks_for:
                self._look_for(kind, run)

    def _look_for(self, kind: str, run: Run) -> None:
        """Raise where a member's parameters or losses hold nan, say."""
        is_bad = {"nan": np.isnan, "inf": np.isinf}[kind]
        for place in range(run.plan.width):
            own = run.carry if run.plan.layout == "threads" else _at(run.carry, place)
            over = [x[: run.done // self.program.steps] for x in own.history.values()]
            leaves = [np.asarray(x) for x in jax.tree.leaves((own.state.params, own.sums, over))]
            if any(is_bad(x).any() for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)):
                numeric = {n: np.reshape(x, -1)[place].item() for n, x in run.numeric.items()}
                raise FloatingPointError(
                    f"sweep: {kind} in the network with "
                    f"{described({**self.group.static, **numeric})}, by step {run.done} "
                    f"(jax_debug_{kind}s is on)."
                )

    def regrouped(self, runs: list[Run], kept: set[int]) -> tuple[list[Run], list[Run]]:
        """The runs of the kept members, and those of the others, as they were left."""
        is_alone = runs[0].plan.layout == "threads"
        for run in runs:
            if not is_alone or run.members[0] not in kept:  # else it stays as it is
                run.carry = _to_host(run.carry)
        left = []
        for run in runs:
            rest = [(m, p) for m, p in zip(run.members, run.places, strict=True) if m not in kept]
            if rest:
                members, places = zip(*rest, strict=True)
                left.append(dataclasses.replace(run, members=members, places=places, latest=None))
        if is_alone:
            return [run for run in runs if run.members[0] in kept], left
        going_on = [
            (m, run, p)
            for run in runs
            for m, p in zip(run.members, run.places, strict=True)
            if m in kept
        ]
        if not going_on or len(going_on) == sum(len(run.members) for run in runs):
            return (runs if going_on else []), left
        plan = self._narrower(runs[0].plan, len(going_on), runs[0].done)
        self.programs.compile([plan])
        new = []
        for start in range(0, len(going_on), plan.width):
            some = going_on[start : start + plan.width]
            own = tuple(m for m, *_ in some)
            some += some[-1:] * (plan.width - len(some))
            carry = jax.tree.map(stacked, *[_at(run.carry, p) for _, run, p in some])
            names = runs[0].numeric
            numeric = {n: np.stack([run.numeric[n][p] for _, run, p in some]) for n in names}
            new.append(Run(plan, own, tuple(range(len(own))), numeric, carry, runs[0].done))
        return new, left

    def _narrower(self, plan: Plan, members: int, done: int) -> Plan:
        """A plan for fewer members: a new program only where it saves more than compiling costs."""
        new = plan_of(plan.layout, members, plan.at_once)
        left = self.program.steps * self.program.epochs - done
        runs = -(-members // plan.width)
        saved = (
            left * SECONDS / self._rate * (runs - new.width * -(-members // new.width) / plan.width)
        )
        return new if saved > self.programs.seconds else plan


class Book:
    """All runs of a sweep, and what there is to show for them, whenever it ends."""

    def __init__(self, axes: Axes, groups: list[Training], epochs: int, halving: Halving | None):
        self._axes = axes
        self._groups = groups
        self._epochs = epochs
        self._halving = halving
        has_validation = "validation_loss" in groups[0].programs.carry_types.history
        self._metric = "validation_loss" if has_validation else "loss"
        if halving is not None and halving.by is not None:
            for training in groups:
                known = training.programs.carry_types.history
                if halving.by not in known or known[halving.by].ndim != 1:
                    scalars = ", ".join(n for n, x in known.items() if x.ndim == 1)
                    static = training.group.static if len(groups) > 1 else {}
                    raise ValueError(
                        f"Halving: by={halving.by!r} is no quantity"
                        f"{f' with {described(static)}' if static else ''}; there are {scalars}."
                    )
            self._metric = halving.by
        self._check_names()
        self._check_shapes()
        self._runs: list[list[Run]] = [[] for _ in groups]  # that are trained
        self._left: list[list[Run]] = [[] for _ in groups]  # that aren't any more
        self._shown = 0  # epochs

    def _check_names(self) -> None:
        """Raise where a row of the result would have two columns of one name."""
        for training in self._groups:
            for name in training.programs.carry_types.history:
                if name in self._axes.names:
                    raise ValueError(
                        f"sweep: the metric {name!r} has the name of an axis: choose another for "
                        "one of them."
                    )
                if name in COLUMNS:
                    raise ValueError(
                        f"sweep: the loss returns a metric {name!r}, but a SweepResult calls the "
                        "epochs of a network so: choose another name."
                    )

    def _check_shapes(self) -> None:
        """Raise where a metric has another shape for other static hyperparameters."""
        first: dict[str, tuple[tuple, Group]] = {}
        for training in self._groups:
            for name, x in training.programs.carry_types.history.items():
                shape, other = first.setdefault(name, (x.shape[1:], training.group))
                if shape != x.shape[1:]:
                    raise ValueError(
                        f"sweep: the metric {name!r} has shape {shape} for "
                        f"{described(other.static)}, but {x.shape[1:]} for "
                        f"{described(training.group.static)}: one table holds it for all."
                    )

    @property
    def has_begun(self) -> bool:
        return any(run.done for runs in (*self._runs, *self._left) for run in runs)

    @property
    def mean_epochs(self) -> float:
        """How many epochs are over, the mean over all members."""
        done = sum(
            len(run.members) * run.done / group.program.steps
            for group, now, left in zip(self._groups, self._runs, self._left, strict=True)
            for run in (*now, *left)
        )
        return done / self._axes.size

    def train(self, display: Progress) -> None:
        """Train all members, and give up those that `halving` drops."""
        layout = self._groups[0].decide().layout
        for group in self._groups[1:]:  # measured once for all
            group.layout = group.layout or layout
        ahead, begun = ThreadPoolExecutor(cores()), False
        try:
            for group in self._groups[1:]:
                group.compile_ahead(ahead)
            for end in [*rounds(self._halving, self._epochs), self._epochs]:
                for i, group in enumerate(self._groups):
                    self._runs[i] = self._runs[i] if begun else group.runs()
                    self._advance(group, self._runs[i], end, display)
                begun = True
                if self._halving is not None and end < self._epochs:
                    self._choose(end)
        finally:
            ahead.shutdown(wait=False, cancel_futures=True)

    def _advance(self, group: Training, runs: list[Run], end: int, display: Progress) -> None:
        stop = threading.Event()
        if not runs:
            return

        def advance(run: Run) -> None:
            group.advance(run, end * group.program.steps, stop, self._metric)
            if len(runs) > runs[0].plan.lanes:  # it waits for others: not in the device's memory
                run.carry = _to_host(run.carry)

        with ThreadPoolExecutor(runs[0].plan.lanes) as pool:
            futures = [pool.submit(advance, run) for run in runs]
            try:
                self._watch(futures, display)
            finally:
                stop.set()
                for future in futures:
                    future.cancel()

    def _watch(self, futures: list[Future], display: Progress) -> None:
        """Show how far it is until all are done; raise what one of them raised."""
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            now = self._epochs_over()
            if now > self._shown:
                self._shown = now
                display.epoch(now, self._record())

    def _epochs_over(self) -> int:
        """How many epochs are over, the mean over those that are trained or wait for it."""
        runs = [(run, g) for g, now in zip(self._groups, self._runs, strict=True) for run in now]
        done = sum(len(run.members) * run.done / g.program.steps for run, g in runs)
        return int(done / max(1, self._count()) + 1e-9)

    def _count(self) -> int:
        """How many networks are trained, or wait for it."""
        count = 0
        for group, now, left in zip(self._groups, self._runs, self._left, strict=True):
            has_begun = now or left
            count += sum(len(r.members) for r in now) if has_begun else len(group.group.members)
        return count

    def _record(self) -> dict[str, Any]:
        """How many are trained, and the best so far."""
        latest = [run.latest for runs in self._runs for run in runs if run.latest is not None]
        values = np.concatenate(latest) if latest else np.zeros(0)
        finite = values[np.isfinite(values)]
        record: dict[str, Any] = {"networks": self._count()}
        if finite.size:
            largest = self._halving is not None and self._halving.largest
            record[f"best {self._metric}"] = float(finite.max() if largest else finite.min())
        if finite.size < values.size:
            record["diverged"] = int(values.size - finite.size)
        return record

    def _choose(self, epochs: int) -> None:
        assert self._halving is not None
        members = [m for runs in self._runs for run in runs for m in run.members]
        values = np.concatenate([r.latest for runs in self._runs for r in runs])
        kept = set(chosen(self._halving, self._axes, members, values))
        for i, group in enumerate(self._groups):
            if self._runs[i]:
                runs, left = group.regrouped(self._runs[i], kept)
                self._runs[i], self._left[i] = runs, [*self._left[i], *left]

    def result(self, interrupted: bool, seconds: float) -> SweepResult:
        """What there is."""
        count = self._axes.size
        epochs = np.zeros(count, int)
        finite = np.ones((count, self._epochs), bool)
        states: list[Callable | None] = [None] * count
        history: dict[str, np.ndarray] = {}
        for group, now, left in zip(self._groups, self._runs, self._left, strict=True):
            for run in (*left, *now):
                if run.carry is None or _is_lost(run.carry):
                    continue
                run.carry = _to_host(run.carry)
                over, steps = divmod(run.done, group.program.steps)
                for member in run.members:
                    own = run.of(member)
                    epochs[member] = over
                    finite[member] = own.finite
                    position = np.array([over, steps, run.done], np.int32)
                    states[member] = _Kept(own.state, position)
                    for name in sorted(own.history, key=_order):
                        values = own.history[name]
                        if name not in history:
                            history[name] = np.full((count, *values.shape), np.nan)
                        history[name][member] = values
        layouts = [
            (group.plan.layout, group.plan.at_once)
            for group in self._groups
            if group.plan is not None
        ]
        return SweepResult(
            self._axes, history, epochs, finite, states, interrupted, layouts, seconds
        )


class _Kept:
    """A member's state on the host, made arrays of JAX's when it is wanted."""

    def __init__(self, state: Any, position: np.ndarray):
        self._state = state._replace(position=position)

    def __call__(self) -> Any:
        return jax.tree.map(jnp.asarray, self._state)


def _at(carry: Any, place: int) -> Any:
    return jax.tree.map(lambda x: x[place], carry)


def _order(name: str) -> tuple:
    """As in the history of `fit`: the loss first, the gradient's norm last; then validation."""
    base = name.removeprefix("validation_")
    return base != name, {"loss": 0, "grad_norm": 2}.get(base, 1), name


def _is_lost(carry: Any) -> bool:
    return any(x.is_deleted() for x in jax.tree.leaves(carry) if isinstance(x, jax.Array))


def _to_host(tree: Any) -> Any:
    """Copies in the host's memory, that don't hold on to the arrays'; keys stay as they are."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not is_key(x)]
    for x in arrays:  # all on their way before the first is waited for
        x.copy_to_host_async()
    return jax.tree.map(lambda x: x if is_key(x) else np.array(x), tree)

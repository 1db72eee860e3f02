"""What a sweep returns: each member's history and parameters, by its hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments, text
from fnn.sweeps.axes import Axes, described, show
from fnn.sweeps.table import Table, best_of
from fnn.train.result import longest
from fnn.train.state import State, size_of_tree


class Member(NamedTuple):
    """One network of a sweep.

    Fields:
        hyperparameters: its own.
        params: its parameters, trained.
        history: for each quantity a list with its value in each epoch, as `fit` has it.
        state: its training state, for `fnn.fit` to go on from.
    """

    hyperparameters: dict[str, Any]
    params: Any
    history: dict[str, list]
    state: State

    def __repr__(self) -> str:
        """What there is, in a few lines; the arrays stay out of it."""
        epochs = longest(self.history)
        last = [f"{n} {show(v[-1])}" for n, v in self.history.items() if v and np.ndim(v[-1]) == 0]
        return "\n".join(
            [
                f"Member: {described(self.hyperparameters)}",
                f"  {epochs} epoch{'s' if epochs != 1 else ''}: {', '.join(last) or 'none over'}",
                f"  params: {size_of_tree(self.params)}",
            ]
        )


class SweepResult:
    """What `fnn.sweep` returns.

    `found["loss"]` is a `Table` of each network's last value; `found.best()` the best network.

    Attributes:
        axes: the name of each axis, and the values along it.
        history: for each quantity an array: the axes of the sweep, then the epochs. It is nan
            for epochs that a network wasn't trained in.
        grid: for each axis the names of its hyperparameters, and how many places it has.
        epochs: how many epochs each network was trained for, an array with the sweep's axes.
        metric: what `best`, `mean` and the pictures go by unless told otherwise:
            `validation_loss`, or `loss` where there is no validation.
        interrupted: whether Ctrl-C ended it early.
        layouts: for each group of equal static hyperparameters how its networks lay on the
            machine, and how many were trained at once: `("threads", 2)`.
        seconds: how long it took.
    """

    def __init__(
        self,
        axes: Axes,
        history: dict[str, np.ndarray],
        epochs: np.ndarray,
        finite: np.ndarray,
        states: Sequence[Any],
        interrupted: bool,
        layouts: Sequence[tuple[str, int]],
        seconds: float,
    ):
        """Arrays have an axis over the members; `states` a function for each, or None."""
        self._grid = axes
        self.grid = [(axis.names, axis.size) for axis in axes.all]
        self.axes = {name: axes.values(name) for name in axes.names}
        shape = axes.shape
        self.history = {n: x.reshape(*shape, *x.shape[1:]) for n, x in history.items()}
        self.epochs = epochs.reshape(shape)
        self._finite = finite
        self._states = states
        self.metric = "validation_loss" if "validation_loss" in history else "loss"
        self.interrupted = interrupted
        self.layouts = list(layouts)
        self.seconds = seconds

    # -------------------------------------------------------------------------- tables

    def __getitem__(self, metric: str) -> Table:
        """A quantity's last value for each network; nan for those that weren't trained.

        Raises:
            ValueError: there is no such quantity, or it is an array.
        """
        flat = self._last(metric)
        return Table(metric, self._grid.all, flat.reshape(self._grid.shape))

    def mean(self, over: str | Sequence[str], metric: str | None = None) -> Table:
        """The mean of a quantity's last values over an axis, such as "seed", or several.

        Raises:
            TypeError, ValueError: there is no such quantity or axis, or it is an array.
        """
        return self[metric or self.metric].mean(over)

    def rows(self) -> list[dict[str, Any]]:
        """A dict for each network: its hyperparameters, `epochs`, and the last value of all."""
        scalars = [name for name, x in self.history.items() if x.ndim == len(self._grid.all) + 1]
        last = {name: self._last(name) for name in scalars}
        return [
            {
                **self._grid.of(i),
                "epochs": int(self.epochs.flat[i]),
                **{name: float(x[i]) for name, x in last.items()},
            }
            for i in range(self._grid.size)
        ]

    def _last(self, metric: str) -> np.ndarray:
        if metric not in self.history:
            raise ValueError(
                f"SweepResult: there is no quantity {metric!r}; there are "
                f"{', '.join(self.history)}."
            )
        values = self.history[metric]
        if values.ndim != len(self._grid.all) + 1:
            raise ValueError(
                f"SweepResult: {metric} isn't a number but an array: read "
                f"history[{metric!r}], of shape {values.shape}."
            )
        values = values.reshape(self._grid.size, -1)
        ends = self.epochs.reshape(-1)
        last = values[np.arange(len(values)), np.maximum(ends - 1, 0)]
        return np.where(ends > 0, last, np.nan)

    # -------------------------------------------------------------------------- networks

    def best(self, metric: str | None = None, *, largest: bool = False) -> Member:
        """The network with the smallest (or largest) last value, of those trained longest.

        With `halving`, those are the networks that were never dropped. One that diverged is
        never best. To choose by the mean over seeds: `found.mean(over="seed").best()`.

        Raises:
            ValueError: there is no such quantity, or no network with a finite value of it.
        """
        arguments.flag("best", "largest", largest)
        metric = metric or self.metric
        last = self._last(metric)
        place = self._best_of(last, largest)
        if place is None:
            raise ValueError(f"best: no network has a finite {metric}.")
        return self._member(place)

    def _best_of(self, last: np.ndarray, largest: bool) -> int | None:
        longest = self.epochs.reshape(-1) == self.epochs.max()
        return best_of(np.where(longest & self._is_fine(), last, np.nan), largest)

    def member(self, **hyperparameters: Any) -> Member:
        """The network with these hyperparameters: `found.member(seed=3, learning_rate=1e-2)`.

        Raises:
            ValueError: there is none, or more than one.
        """
        found = self._grid.find("member", hyperparameters)
        if len(found) != 1:
            missing = [n for n in self._grid.names if n not in hyperparameters]
            raise ValueError(
                f"member: {len(found)} networks have these hyperparameters; give "
                f"{', '.join(missing)} too. (found.params(...) stacks several.)"
            )
        return self._member(found[0])

    def params(self, **hyperparameters: Any) -> Any:
        """The parameters of all networks with these hyperparameters, stacked.

        Returns:
            A tree of arrays, whose first axes are those axes of the sweep along which there is
            more than one of these networks: an ensemble over seeds for one learning rate, say.

        Raises:
            ValueError: there are no such networks, or their parameters differ in shape.
        """
        members = self._grid.find("params", hyperparameters)
        places = np.array([np.unravel_index(m, self._grid.shape) for m in members])
        lengths = [len(set(column)) for column in places.T]
        shape = [n for n in lengths if n > 1]
        trees = [self._state(m).params for m in members]
        kinds = {(jax.tree.structure(t), tuple(x.shape for x in jax.tree.leaves(t))) for t in trees}
        if len(kinds) > 1:
            raise ValueError(
                "params: these networks' parameters differ in shape: give "
                f"{' or '.join(self._grid.static) or 'more hyperparameters'} too."
            )
        return jax.tree.map(lambda *xs: jnp.stack(xs).reshape(*shape, *xs[0].shape), *trees)

    @property
    def diverged(self) -> list[dict[str, Any]]:
        """The networks that met inf or nan: their hyperparameters, and the first bad `epoch`."""
        found = []
        for i in np.flatnonzero(~self._is_fine()):
            good = self._good(int(i))
            bad = int(np.argmin(good))
            found.append({**self._grid.of(int(i)), "epoch": bad + 1})
        return found

    def _good(self, member: int) -> np.ndarray:
        end = int(self.epochs.flat[member])
        loss = self.history["loss"].reshape(self._grid.size, -1)[member, :end]
        return np.isfinite(loss) & self._finite[member, :end]

    def _is_fine(self) -> np.ndarray:
        return np.array([bool(self._good(i).all()) for i in range(self._grid.size)])

    def _state(self, member: int) -> State:
        state = self._states[member]
        if state is None:
            raise ValueError(f"the network {described(self._grid.of(member))} wasn't trained.")
        return state()

    def _member(self, member: int) -> Member:
        state = self._state(member)
        end = int(self.epochs.flat[member])
        history = {}
        for name, values in self.history.items():
            own = values.reshape(self._grid.size, *values.shape[len(self._grid.shape) :])
            history[name] = (
                list(own[member, :end])
                if values.ndim > len(self._grid.shape) + 1
                else own[member, :end].tolist()
            )
        return Member(self._grid.of(member), state.params, history, state)

    # ------------------------------------------------------------------------------ text

    def __repr__(self) -> str:
        return text.one_screen(str(self))

    def __str__(self) -> str:
        """The best network, the table, and which ones diverged."""
        grid = " × ".join(f"{axis.label} ({axis.size})" for axis in self._grid.all)
        several = f", {len(self.layouts)} programs" if len(self.layouts) > 1 else ""
        ways = " and ".join(dict.fromkeys(f"{name}, {n} at once" for name, n in self.layouts))
        lines = [
            f"SweepResult: {self._grid.size} networks, {grid}; {int(self.epochs.max())} epochs"
            + (", interrupted" if self.interrupted else ""),
            f"  {self.seconds:.1f} s; {ways}{several}",
        ]
        last = self._last(self.metric)
        best = self._best_of(last, False)
        if best is not None:
            value = show(float(last[best]))
            lines.append(f"  best {self.metric} {value}: {described(self._grid.of(best))}")
        if self.diverged:
            some = [f"{described(d)}" for d in self.diverged[:3]]
            more = len(self.diverged) - len(some)
            lines.append(
                f"  diverged: {'; '.join(some)}" + (f"; and {more} more" if more > 0 else "")
            )
        return "\n".join([*lines, str(self[self.metric])])

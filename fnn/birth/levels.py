"""A program run on numbers, and what is inside its loops, branches and calls.

Of a run only what may be asked for is kept: the inputs and outputs of equations that made inf or
nan. A loop is run compiled, as ever; to look at one of its steps, what it carried there is computed
again from its start. What is inside a shard_map is run on the numbers of all its devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fnn.birth.devices import Devices
from fnn.birth.entries import Index, is_bad
from fnn.birth.loops import Iteration, Loop
from fnn.eager import apply, called
from fnn.frames import user_frames
from fnn.jaxpr import Equation, Program, close, program
from fnn.operation import call_of
from fnn.text import is_concrete


class Place(NamedTuple):
    """An entry of a value in a level."""

    level: Level
    number: int
    entry: Index


class Level:
    """A program, run on arguments: the function itself, or what a loop, branch or call holds.

    Attributes:
        flat: the program.
        scope: the scopes around it.
        loops: the steps of loops that it is inside of, the outer first.
        time: tells which of two levels ran first.
        outside: the place outside that an entry of an input came from; None of the function's.
        around: the level outside and the equation there that holds this program; None likewise.
        enter: from that equation's inputs to this program's arguments.
        devices: those of the shard_map that it is inside of: then its values are arrays of all of
            them; see `Devices`.
    """

    def __init__(
        self,
        flat: Program,
        args: Sequence,
        scope: tuple[str, ...] = (),
        loops: tuple[Iteration, ...] = (),
        time: tuple[int, ...] = (),
        outside: Callable[[int, Index], Place] | None = None,
        around: tuple[Level, Equation] | None = None,
        enter: Callable[[Sequence], Sequence] = list,
        devices: Devices | None = None,
    ):
        self.flat, self.args = flat, list(args)
        self.scope, self.loops, self.time, self.outside = scope, loops, time, outside
        self.around, self.enter, self.devices = around, enter, devices
        self.makers = {i: n for n, e in enumerate(flat.equations) for i in e.outs}
        self._inner: dict[tuple[int, int], Any] = {}
        self.values = self._run()

    def _run(self) -> dict[int, Any]:
        """Every value that may be asked for; the others are forgotten after their last use."""
        flat, values = self.flat, self.start(self.args)
        kept = {*values, *flat.outputs}
        last = {i: n for n, e in enumerate(flat.equations) for i in e.ins}
        used = {*last, *flat.outputs}
        for n, equation in enumerate(flat.equations):
            if equation.has_effects and used.isdisjoint(equation.outs):
                continue  # it was printed when the function ran
            ins = [values[i] for i in equation.ins]
            outs = self.apply(equation, ins)
            values.update(zip(equation.outs, outs, strict=True))
            if any(map(is_bad, outs)):
                kept.update((*equation.ins, *equation.outs))
            for i in {*equation.ins, *equation.outs}:
                if last.get(i, n) == n and i not in kept:
                    values.pop(i, None)
        return values

    def start(self, args: Sequence) -> dict[int, Any]:
        """The program's constants and arguments, by number."""
        values = dict(self.flat.constants)
        if self.devices is not None:
            avals, of = self.flat.avals, self.devices.of_constant
            values = {number: of(x, avals[number]) for number, x in values.items()}
        return values | dict(zip(self.flat.inputs, args, strict=True))

    def apply(self, equation: Equation, ins: Sequence) -> Sequence:
        """The outputs of an equation of the program at these inputs."""
        if self.devices is None:
            return apply(equation, ins)
        avals = self.flat.avals
        of = lambda numbers: [avals[i] for i in numbers]
        return self.devices.apply(equation, of(equation.ins), of(equation.outs), ins)

    def at(self, number: int, index: Index) -> Place:
        """An entry of a value; of the level around this one it may be told for all devices."""
        if self.devices is not None:
            index = self.devices.fitted(index, self.flat.avals[number])
        return Place(self, number, index)

    @property
    def axes(self) -> int:
        """How many axes a value has before its own."""
        return 0 if self.devices is None else len(self.devices.axes)

    def split(self, index: Index) -> tuple[Index, Index]:
        """An entry as a device, empty where there is but one, and an entry there."""
        return index[: self.axes], index[self.axes :]

    def on_device(self, x: Any, index: Index) -> Any:
        """Of a value that the program holds, what the device of an entry has."""
        device, _ = self.split(index)
        if not device:
            return x
        lengths = np.shape(x)[: len(device)]
        x = np.asarray(x) if is_concrete(x) else x  # else a key
        return x[tuple(min(k, n - 1) for k, n in zip(device, lengths, strict=True))]

    def equation(self, number: int) -> Equation | None:
        """The equation that made a value; None of an input or a constant."""
        place = self.makers.get(number)
        return None if place is None else self.flat.equations[place]

    def ins(self, equation: Equation) -> list:
        return [self.values[i] for i in equation.ins]

    def when(self, equation: Equation) -> tuple[int, ...]:
        return (*self.time, self.makers[equation.outs[0]])

    def scope_of(self, equation: Equation) -> tuple[str, ...]:
        """The scopes around an equation."""
        return (*self.scope, *equation.scope)

    def frame_of(self, equation: Equation) -> Any:
        """The user's frame that made an equation; of a loop's body without one, the loop's."""
        frame = next(user_frames(equation.source_info), None)
        if frame is None and self.around is not None:
            outer, holder = self.around
            return outer.frame_of(holder)
        return frame

    def inside(self, equation: Equation, output: int, index: Index) -> Place | None:
        """Where in a loop, branch or call an entry of its output was made; None of all others."""
        if call_of(equation) is not None:
            return None
        ins = self.ins(equation)
        if equation.name in ("scan", "while"):
            loop = self._remembered(equation, -1, lambda: Loop(self, equation, ins))
            return loop.place(output, index)
        if equation.name == "shard_map":
            return None if self.devices is not None else self._on_devices(equation, output, index)
        if equation.name == "cond":
            if equation.params.get("branches_platforms") is not None:
                return None
            branches = equation.params["branches"]
            which = min(max(int(self.on_device(ins[0], index)), 0), len(branches) - 1)
            chosen = close(branches[which])
            return self._called(equation, chosen, ins[1:], 1, output, index, which)
        if equation.name == "custom_linear_solve":
            return None
        if equation.name == "call_hi_primitive" and self.devices is not None:
            return None
        found = called(equation, ins)
        return found and self._called(equation, found[0], found[1], 0, output, index)

    def _called(self, equation, closed, args, skipped, output, index, which=0) -> Place:
        def outside(position: int, index: Index) -> Place:
            return self.at(equation.ins[skipped + position], index)

        def make() -> Level:
            return Level(
                program(closed),
                args,
                self.scope_of(equation),
                self.loops,
                self.when(equation),
                outside,
                (self, equation),
                lambda ins: ins[skipped:],
                self.devices,
            )

        level = self._remembered(equation, which, make)
        return level.at(level.flat.outputs[output], index)

    def _on_devices(self, equation: Equation, output: int, index: Index) -> Place:
        """Where inside a shard_map an entry of its output was made."""
        devices, flat = Devices(equation), program(close(equation.params["jaxpr"]))
        avals = [flat.avals[i] for i in flat.inputs]

        def outside(position: int, index: Index) -> Place:
            number = equation.ins[position]
            return Place(self, number, devices.of_input(position, index, avals[position]))

        def make() -> Level:
            return Level(
                flat,
                devices.enter(self.ins(equation), avals),
                self.scope_of(equation),
                self.loops,
                self.when(equation),
                outside,
                (self, equation),
                lambda ins: devices.enter(ins, avals),
                devices,
            )

        level = self._remembered(equation, 0, make)
        number = level.flat.outputs[output]
        return Place(level, number, devices.of_output(output, index, level.flat.avals[number]))

    def _remembered(self, equation: Equation, which: int, make: Callable[[], Any]) -> Any:
        key = (id(equation), which)
        if key not in self._inner:
            self._inner[key] = make()
        return self._inner[key]

"""A program run on numbers, and what is inside its loops, branches and calls.

Of a run only what may be asked for is kept: the inputs and outputs of equations that made inf or
nan. A loop is run compiled, as ever; to look at one of its steps, what it carried there is computed
again from its start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn.birth.entries import Index, is_bad, on_host
from fnn.eager import apply, called, evaluate
from fnn.frames import line_of, user_frames
from fnn.jaxpr import Equation, Program, close, program, scan_layout
from fnn.operation import call_of


class Iteration(NamedTuple):
    """A step of a loop.

    Fields:
        kind: "scan" or "while".
        number: which step, from 0; of a scan the place along its inputs, also if it goes over them
            backwards.
        length: how many steps there are.
        source: the line of the loop, `file.py:12 (function)`.
    """

    kind: str
    number: int
    length: int
    source: str


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
    ):
        self.flat, self.args = flat, list(args)
        self.scope, self.loops, self.time, self.outside = scope, loops, time, outside
        self.around, self.enter = around, enter
        self.makers = {i: n for n, e in enumerate(flat.equations) for i in e.outs}
        self._inner: dict[tuple[int, int], Any] = {}
        self.values = self._run()

    def _run(self) -> dict[int, Any]:
        """Every value that may be asked for; the others are forgotten after their last use."""
        flat = self.flat
        values: dict[int, Any] = dict(flat.constants)
        values.update(zip(flat.inputs, self.args, strict=True))
        kept = {*values, *flat.outputs}
        last = {i: n for n, e in enumerate(flat.equations) for i in e.ins}
        used = {*last, *flat.outputs}
        for n, equation in enumerate(flat.equations):
            if equation.has_effects and used.isdisjoint(equation.outs):
                continue  # it was printed when the function ran
            ins = [values[i] for i in equation.ins]
            outs = apply(equation, ins)
            values.update(zip(equation.outs, outs, strict=True))
            if any(map(is_bad, outs)):
                kept.update((*equation.ins, *equation.outs))
            for i in {*equation.ins, *equation.outs}:
                if last.get(i, n) == n and i not in kept:
                    values.pop(i, None)
        return values

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
        if equation.name == "cond":
            if equation.params.get("branches_platforms") is not None:
                return None
            branches = equation.params["branches"]
            chosen = close(branches[min(max(int(ins[0]), 0), len(branches) - 1)])
            return self._called(equation, chosen, ins[1:], 1, output, index)
        if equation.name == "custom_linear_solve":
            return None
        found = called(equation, ins)
        return found and self._called(equation, found[0], found[1], 0, output, index)

    def _called(self, equation, closed, args, skipped, output, index) -> Place:
        def outside(position: int, index: Index) -> Place:
            return Place(self, equation.ins[skipped + position], index)

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
            )

        level = self._remembered(equation, 0, make)
        return Place(level, level.flat.outputs[output], index)

    def _remembered(self, equation: Equation, which: int, make: Callable[[], Any]) -> Any:
        key = (id(equation), which)
        if key not in self._inner:
            self._inner[key] = make()
        return self._inner[key]


class Loop:
    """A scan or a while loop at given inputs, so that each of its steps can be looked at."""

    def __init__(self, level: Level, equation: Equation, ins: Sequence):
        params = equation.params
        self.level, self.equation = level, equation
        self._levels: dict[int, Level] = {}
        if equation.name == "scan":
            consts, carry = scan_layout(params)
            self.body = program(close(params["jaxpr"]))
            self.first = 0  # the place of the body's first constant among the inputs
            self.consts, self.init = list(ins[:consts]), list(ins[consts:][:carry])
            self.xs = list(ins[consts + carry :])
            self.length, self.reverse = params["length"], params["reverse"]
        else:
            cond, consts = params["cond_nconsts"], params["body_nconsts"]
            self.body = program(close(params["body_jaxpr"]))
            self.first = cond
            self.consts, self.init = list(ins[cond:][:consts]), list(ins[cond + consts :])
            self.xs, self.reverse = [], False
            self.length = self._count(program(close(params["cond_jaxpr"])), list(ins[:cond]))
        self._carry_at = jax.jit(self._run_to)
        self._entries = jax.jit(self._follow, static_argnums=3)

    def place(self, output: int, index: Index) -> Place:
        """Where an entry of one of the loop's outputs was made."""
        if output < len(self.init):
            return self._carried(output, index, self.length)
        position, *rest = index
        step = self.length - 1 - position if self.reverse else position
        level = self.at(step)
        return Place(level, level.flat.outputs[output], tuple(rest))

    def at(self, step: int) -> Level:
        """The body at a step, counted in the order in which they run."""
        if step not in self._levels:
            position = self.length - 1 - step if self.reverse else step
            args = self.args_at(step)
            outer, equation = self.level, self.equation
            source = line_of(outer.frame_of(equation))
            here = Iteration(equation.name, position, self.length, source)
            self._levels[step] = Level(
                self.body,
                args,
                outer.scope_of(equation),
                (*outer.loops, here),
                (*outer.when(equation), step),
                functools.partial(self._outside, step, position),
                (outer, equation),
                lambda ins: Loop(outer, equation, ins).args_at(step),
            )
        return self._levels[step]

    def args_at(self, step: int) -> list:
        """What the body is given at a step."""
        position = self.length - 1 - step if self.reverse else step
        carry = self._carry_at(self.consts, self.init, self.xs, step)
        return [*self.consts, *carry, *(x[position] for x in self.xs)]

    def _outside(self, step: int, position: int, which: int, index: Index) -> Place:
        if which < len(self.consts):
            return Place(self.level, self.equation.ins[self.first + which], index)
        which -= len(self.consts)
        if which < len(self.init):
            return self._carried(which, index, step)
        number = self.equation.ins[self.first + len(self.consts) + which]
        return Place(self.level, number, (position, *index))

    def _carried(self, which: int, index: Index, steps: int) -> Place:
        """Where an entry of what is carried became inf or nan, and stayed so for so many steps."""
        history = self._history(which, index)  # of its start, and after each step
        is_alike = np.isnan if np.isnan(history[steps]) else np.isinf
        while steps and is_alike(history[steps - 1]):
            steps -= 1
        if steps == 0:
            number = self.equation.ins[self.first + len(self.consts) + which]
            return Place(self.level, number, index)
        level = self.at(steps - 1)
        return Place(level, level.flat.outputs[which], index)

    # ------------------------------------------------------------------------ the loop, run again

    def _history(self, which: int, index: Index) -> np.ndarray:
        start = on_host(self.init[which])[index]
        if not self.length:
            return np.array([start])
        place = tuple(np.int32(i) for i in index)
        later = self._entries(self.consts, self.init, self.xs, which, place)
        return np.array([start, *on_host(later)])

    def _run_to(self, consts, init, xs, steps):
        """What is carried after some steps."""
        return lax.fori_loop(0, steps, lambda t, carry: self._step(consts, carry, xs, t), init)

    def _follow(self, consts, init, xs, which, index):
        """An entry of what is carried, after each step."""

        def step(carry, t):
            carry = self._step(consts, carry, xs, t)
            return carry, carry[which][index]

        return lax.scan(step, init, jnp.arange(self.length))[1]

    def _step(self, consts, carry, xs, t):
        position = self.length - 1 - t if self.reverse else t
        x = [lax.dynamic_index_in_dim(x, position, keepdims=False) for x in xs]
        with self.equation.context.manager:
            after = evaluate(self.body, [*consts, *carry, *x])[: len(carry)]
        return self._held(carry, after)

    def _held(self, carry, after):
        return list(after)

    def _count(self, cond: Program, consts: list) -> int:
        """How many steps a while loop takes."""

        def goes_on(consts, carry):
            return evaluate(cond, [*consts, *carry])[0]

        def held(carry, after):
            going = goes_on(consts, carry)
            if not going.ndim:
                return list(after)
            # Under vmap, an example that has finished keeps its values.
            masks = [lax.broadcast_in_dim(going, x.shape, range(going.ndim)) for x in carry]
            return [lax.select(*three) for three in zip(masks, after, carry, strict=True)]

        self._held = held  # type: ignore[method-assign]

        def count(cond_consts, consts, init):
            def step(state):
                n, carry = state
                return n + 1, self._step(consts, carry, [], n)

            start = (jnp.zeros((), jnp.int32), list(init))
            return lax.while_loop(lambda s: goes_on(cond_consts, s[1]).any(), step, start)[0]

        return int(jax.jit(count)(consts, self.consts, self.init))

"""A loop, run compiled; to look at one of its steps, what it carried there is computed again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fnn.birth.entries import Index, on_host
from fnn.eager import evaluate
from fnn.frames import line_of
from fnn.jaxpr import Equation, Program, close, program, scan_layout
from fnn.meshes import as_varying


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


class Loop:
    """A scan or a while loop at given inputs, so that each of its steps can be looked at.

    Args:
        level: the `Level` that it stands in; its steps are levels, too.
        equation: the loop.
        ins: its inputs.
    """

    def __init__(self, level: Any, equation: Equation, ins: Sequence):
        params = equation.params
        self.level, self.equation = level, equation
        self._levels: dict[int, Any] = {}
        if equation.name == "scan":
            consts, carry = scan_layout(params)
            self.body = program(close(params["jaxpr"]))
            self.skipped = 0  # how many constants the condition has, before the body's
            self.consts, self.init = list(ins[:consts]), list(ins[consts:][:carry])
            self.xs = list(ins[consts + carry :])
            self.length, self.reverse = params["length"], params["reverse"]
        else:
            cond, consts = params["cond_nconsts"], params["body_nconsts"]
            self.body = program(close(params["body_jaxpr"]))
            self.skipped = cond
            self.consts, self.init = list(ins[: cond + consts]), list(ins[cond + consts :])
            self.xs, self.reverse = [], False
            self._counts = self._count(program(close(params["cond_jaxpr"])))
            self.length = int(self._counts.max())
        carried = [self.body.avals[i] for i in self.body.inputs[self._of_body :]]
        self._types = carried[: len(self.init)]
        self._carry_at = self._compiled(self._run_to, self._types)
        self._entries: dict[int, Callable] = {}

    def place(self, output: int, index: Index) -> Any:
        """Where an entry of one of the loop's outputs was made."""
        if output < len(self.init):
            return self._carried(output, index, self._length_at(index))
        device, (position, *rest) = self.level.split(index)
        step = self.length - 1 - position if self.reverse else position
        level = self.at(step)
        return level.at(level.flat.outputs[output], (*device, *rest))

    def at(self, step: int) -> Any:
        """The body at a step, counted in the order in which they run."""
        if step not in self._levels:
            position = self.length - 1 - step if self.reverse else step
            args = self.args_at(step)
            outer, equation = self.level, self.equation
            source = line_of(outer.frame_of(equation))
            here = Iteration(equation.name, position, self.length, source)
            self._levels[step] = type(outer)(
                self.body,
                args,
                outer.scope_of(equation),
                (*outer.loops, here),
                (*outer.when(equation), step),
                functools.partial(self._outside, step, position),
                (outer, equation),
                lambda ins: Loop(outer, equation, ins).args_at(step),
                outer.devices,
            )
        return self._levels[step]

    def args_at(self, step: int) -> list:
        """What the body is given at a step."""
        position = self.length - 1 - step if self.reverse else step
        carry = self._carry_at(self.consts, self.init, self.xs, np.int32(step))
        at = (*[slice(None)] * self.level.axes, position)
        return [*self.consts[self.skipped :], *carry, *(x[at] for x in self.xs)]

    def _outside(self, step: int, position: int, which: int, index: Index) -> Any:
        if which < self._of_body:
            return self.level.at(self.equation.ins[self.skipped + which], index)
        which -= self._of_body
        if which < len(self.init):
            return self._carried(which, index, step)
        number = self.equation.ins[len(self.consts) + which]
        device, own = self.level.split(index)
        return self.level.at(number, (*device, position, *own))

    def _carried(self, which: int, index: Index, steps: int) -> Any:
        """Where an entry of what is carried became inf or nan, and stayed so for so many steps."""
        history = self._history(which, index)  # of its start, and after each step
        is_alike = np.isnan if np.isnan(history[steps]) else np.isinf
        while steps and is_alike(history[steps - 1]):
            steps -= 1
        if steps == 0:
            number = self.equation.ins[len(self.consts) + which]
            return self.level.at(number, index)
        level = self.at(steps - 1)
        return level.at(level.flat.outputs[which], index)

    # ------------------------------------------------------------------------ the loop, run again

    def _history(self, which: int, index: Index) -> np.ndarray:
        _, own = self.level.split(index)
        start = on_host(self.level.on_device(self.init[which], index))[own]
        if not self.length:
            return np.array([start])
        if which not in self._entries:
            follow = functools.partial(self._follow, which)
            self._entries[which] = self._compiled(follow, [self._types[which]])
        place = [np.int32(i) for i in own]
        (later,) = self._entries[which](self.consts, self.init, self.xs, *place)
        return np.array([start, *on_host(self.level.on_device(later, index))])

    @property
    def _of_body(self) -> int:
        """How many constants the body has."""
        return len(self.consts) - self.skipped

    def _compiled(self, function: Callable, outs: Sequence) -> Callable:
        """A function of what the loop is given and of some integers, compiled.

        Args:
            function: of three lists of arrays and of integers; it returns a list of arrays.
            outs: the types of these, or of others that differ along the same devices.
        """
        devices = self.level.devices
        if devices is None:
            return jax.jit(function)
        avals = [self.level.flat.avals[i] for i in self.equation.ins]

        def run(consts, init, xs, *integers):
            types = [jax.typeof(i) for i in integers]
            ends = len(consts), len(consts) + len(init)

            def flat(*arrays):
                given = arrays[: len(avals)]
                parts = given[: ends[0]], given[ends[0] : ends[1]], given[ends[1] :]
                return function(*map(list, parts), *arrays[len(avals) :])

            spread = [devices.of_constant(i, t) for i, t in zip(integers, types, strict=True)]
            return devices.mapped(flat, [*avals, *types], outs)(*consts, *init, *xs, *spread)

        return run

    def _run_to(self, consts, init, xs, steps):
        """What is carried after some steps."""
        return lax.fori_loop(0, steps, lambda t, carry: self._step(consts, carry, xs, t), init)

    def _follow(self, which, consts, init, xs, *index):
        """An entry of what is carried, after each step."""

        def step(carry, t):
            carry = self._step(consts, carry, xs, t)
            return carry, carry[which][index]

        return [lax.scan(step, init, jnp.arange(self.length))[1]]

    def _step(self, consts, carry, xs, t):
        position = self.length - 1 - t if self.reverse else t
        x = [lax.dynamic_index_in_dim(x, position, keepdims=False) for x in xs]
        with self.equation.context.manager:
            args = [*consts[self.skipped :], *carry, *x]
            after = evaluate(self.body, args)[: len(carry)]
        return self._held(consts, carry, after)

    def _held(self, consts, carry, after):
        return list(after)

    def _length_at(self, index: Index) -> int:
        """How many steps the loop takes on the device of an entry."""
        if self.equation.name == "scan":
            return self.length
        return int(self.level.on_device(self._counts, index))

    def _count(self, cond: Program) -> np.ndarray:
        """How many steps a while loop takes, on each device."""
        goes = cond.avals[cond.outputs[0]]

        def goes_on(consts, carry):
            return evaluate(cond, [*consts[: self.skipped], *carry])[0]

        def held(consts, carry, after):
            going = goes_on(consts, carry)
            if not going.ndim:
                return list(after)
            # Under vmap, an example that has finished keeps its values.
            masks = [lax.broadcast_in_dim(going, x.shape, range(going.ndim)) for x in carry]
            return [lax.select(*three) for three in zip(masks, after, carry, strict=True)]

        self._held = held  # type: ignore[method-assign]

        def count(consts, init, _):
            def step(state):
                n, carry = state
                return n + 1, self._step(consts, carry, [], n)

            start = (as_varying(jnp.zeros((), jnp.int32), goes), list(init))
            return [lax.while_loop(lambda s: goes_on(consts, s[1]).any(), step, start)[0]]

        run = self._compiled(count, [goes])
        return np.asarray(run(self.consts, self.init, [])[0])

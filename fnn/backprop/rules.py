"""The form in which a primitive's backward rule is written down.

A rule answers one question, the only one that backpropagation asks of an operation
(CS231n, lecture 4): *given the upstream gradient g of my output, what is the gradient of
each of my inputs?* The files in `fnn/backprop/primitives/` are tables of such answers:

    "sin": each(lambda g, y, x: mul(g, cos(x)), local_gradient=("cos(x)",)),
    "sub": each(lambda g, y, a, b: g, lambda g, y, a, b: neg(g), local_gradient=("1", "−1")),

`g` is the upstream gradient, `y` the output, then come the inputs and, as keywords, the
equation's parameters. JAX's convention for complex numbers is kept: nothing is conjugated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from fnn.eager import apply, as_one_call, once
from fnn.jaxpr import Equation, is_inexact
from fnn.meshes import zeros


class LocalRule(NamedTuple):
    """How one primitive passes a gradient from its output to its inputs.

    pullback: `(needed, g, y, args, params) -> gradients`, one for each argument, None for zero.
        `needed` says which of them will be used.
    local_gradient: for each argument, the local gradient in words, e.g. ("b", "a") for `a * b`.
    elementwise: the output's entry i depends on the inputs' entries i alone, so that the
        local gradient is an array of the output's shape and not a matrix.
    """

    pullback: Callable[[Sequence[bool], Any, Any, Sequence[Any], dict], Sequence[Any]]
    local_gradient: tuple[str, ...] = ()
    elementwise: bool = False

    def forward(
        self, equation: Equation, needed: Sequence[bool], ins: Sequence, opaque: bool
    ) -> tuple[list, Any]:
        """The outputs; for the backward pass inputs and outputs are kept."""
        outs = apply(equation, ins)
        return outs, (ins, outs)

    def backward(
        self, equation: Equation, needed: Sequence[bool], saved: Any, g: Sequence, opaque: bool
    ) -> Sequence:
        """The gradients of the inputs, from that of the output; of several outputs, from all."""
        ins, outs = saved
        if not equation.primitive.multiple_results:
            return self.pullback(needed, g[0], outs[0], ins, equation.params)
        avals = [jax.typeof(y) for y in outs]
        filled = [
            zeros(a) if of_output is None and is_inexact(a) else of_output
            for of_output, a in zip(g, avals, strict=True)
        ]
        return self.pullback(needed, filled, outs, ins, equation.params)


class ControlRule(NamedTuple):
    """A rule with a forward of its own: to keep what the backward needs, or to run functions.

    forward: `(equation, needed, ins, opaque) -> (outs, saved)`.
    backward: `(equation, needed, saved, g, opaque) -> gradients`, one for each input. `g` holds the
        upstream gradient of each output. None stands for zero.
    local_gradient: for each argument, the local gradient in words; the last one for all further
        arguments. Empty where it is whatever the functions inside make of it.
    """

    forward: Callable[[Equation, Sequence[bool], Sequence, bool], tuple[list, Any]]
    backward: Callable[[Equation, Sequence[bool], Any, Sequence, bool], Sequence]
    local_gradient: tuple[str, ...] = ()


Rule = LocalRule | ControlRule


def each(
    *functions: Callable | None, local_gradient: tuple[str, ...] = (), elementwise: bool = False
):
    """A rule with one function `f(g, y, *args, **params)` for each argument.

    Only the functions of those arguments whose gradient is needed are called; None stands
    for a gradient of zero.
    """

    def pullback(needed, g, y, args, params):
        return [
            f(g, y, *args, **params) if wanted and f is not None else None
            for f, wanted in zip(functions, needed, strict=True)
        ]

    return LocalRule(pullback, local_gradient, elementwise)


def joint(function: Callable, local_gradient: tuple[str, ...] = (), elementwise: bool = False):
    """A rule that finds all gradients at once: `f(needed, g, y, *args, **params) -> tuple`."""

    def pullback(needed, g, y, args, params):
        return function(needed, g, y, *args, **params)

    return LocalRule(pullback, local_gradient, elementwise)


# The output is constant wherever it is differentiable at all: floor, sign, comparisons.
zero = LocalRule(lambda needed, g, y, args, params: [None] * len(args), ("0",))


def hidden(function: Callable, opaque: bool) -> Callable:
    """The function, as one call that isn't looked into if `opaque`."""
    return once(as_one_call(function) if opaque else function)

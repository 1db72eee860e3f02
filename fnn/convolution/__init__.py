"""Convolution that is fast in both directions, on CPUs and in loops too.

On a CPU, XLA runs a convolution's gradients, and any convolution inside a loop whose axes aren't
in the order that its library wants, many times slower than matrix products of as many operations.
So here is JAX's convolution a second time: a primitive of the same name and parameters, which on
CPUs is computed by other formulas. Its gradients are such convolutions again.

    cpu      which convolution is computed how on a CPU
    weights  the gradients of weights
    windows  how a window meets its input; some images at a time
    divided  what XLA gets wrong where it divides arrays among devices
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import lax

from fnn.convolution import cpu, divided
from fnn.jaxpr import Equation
from fnn.operation import twin

conv_general_dilated_p = twin(
    lax.conv_general_dilated_p, {"cpu": cpu.convolution}, divided.convolution
)


def slow_in_a_loop(equation: Equation, avals: Sequence[Any]) -> bool:
    """Whether an equation of a program is a convolution that XLA runs slowly in a loop on a CPU.

    Args:
        equation: any.
        avals: the types of the program's values.
    """
    if equation.name != conv_general_dilated_p.name:
        return False
    x, w = (avals[i] for i in equation.ins)
    if equation.primitive is conv_general_dilated_p and cpu.has_formula(x, w, **equation.params):
        return False
    last = x.ndim - 1
    wanted = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    return tuple(equation.params["dimension_numbers"]) != (*wanted, wanted[0])


__all__ = ["conv_general_dilated_p", "slow_in_a_loop"]

"""Convolution that is fast in both directions, on CPUs and in loops too.

On a CPU, XLA runs a convolution's gradients, and any convolution inside a loop whose axes aren't
in the order that its library wants, many times slower than matrix products of as many operations.
So here is JAX's convolution a second time: a primitive of the same name and parameters, which on
CPUs is computed by other formulas. Its gradients are such convolutions again.

    cpu      which convolution is computed how on a CPU
"""

from __future__ import annotations

from jax import lax

from fnn.convolution import cpu
from fnn.operation import twin

conv_general_dilated_p = twin(lax.conv_general_dilated_p, {"cpu": cpu.convolution})

__all__ = ["conv_general_dilated_p"]

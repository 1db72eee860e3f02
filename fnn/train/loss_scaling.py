"""The loss is scaled up, so that small cotangents don't become 0 in float16.

float16 has no numbers but 0 below 6 · 10⁻⁸. The gradient of S times the loss is S times the
gradient: its backward pass stays clear of 0, and the gradient is divided by S in float32. If S is
too large, something overflows (above 65504) and the gradient isn't finite. So S is found while
training: halved after such a step, which isn't applied, and doubled after many good ones.

Micikevicius, Narang, Alben, Diamos, Elsen, Garcia, Ginsburg, Houston, Kuchaiev, Venkatesh, Wu,
"Mixed precision training", ICLR 2018.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fnn import arguments
from fnn.train.precision import wide

# float32 has no normal numbers for a scale or its inverse beyond these.
SMALLEST, LARGEST = 2.0**-126, 2.0**126


@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """How the scale of the loss is found; for `train_step(..., loss_scale=)`.

    Fields:
        initial: the scale of the first step.
        least: its lower bound. A gradient that isn't finite at this scale is no matter of the
            scale: it is treated as `nonfinite` says.
        most: its upper bound.
        period: after so many good steps in a row it is multiplied by `factor`.
        factor: ... and after a step whose loss or gradient isn't finite divided by it.

    Raises:
        TypeError, ValueError: a field isn't of its kind or out of range; the bounds don't hold
            `initial` between them.

    With powers of two scaling rounds nothing. The rule is that of `jmp.DynamicLossScale`, with an
    upper bound, and an end: at its lower bound that one skips every step without a word.
    (`flax.training.dynamic_scale.DynamicScale` begins at 65536, and grows one good step later.)
    """

    initial: float = 2.0**15
    least: float = 1.0
    most: float = 2.0**24
    period: int = 2000
    factor: float = 2.0

    def __post_init__(self):
        where = "DynamicLossScale"
        least = arguments.fixed_number(where, "least", self.least, least=SMALLEST)
        most = arguments.fixed_number(where, "most", self.most, least=least, most=LARGEST)
        initial = arguments.fixed_number(where, "initial", self.initial, least=least, most=most)
        period = arguments.integer(where, "period", self.period, least=1, most=2**31 - 1)
        # The next number after 1 in float32 is 1 + 2⁻²³.
        factor = arguments.fixed_number(
            where, "factor", self.factor, least=1 + 2.0**-23, most=LARGEST
        )
        # Python's numbers: those of numpy have dtypes, which promote.
        numbers = {"initial": initial, "least": least, "most": most}
        for name, value in {**numbers, "period": period, "factor": factor}.items():
            object.__setattr__(self, name, value)

    def first(self) -> LossScale:
        """The scale before the first step."""
        return LossScale(jnp.asarray(self.initial, jnp.float32), jnp.zeros((), jnp.int32))

    def after(self, old: LossScale, finite: jax.Array) -> LossScale:
        """The scale after a step whose loss and gradient were finite, or weren't."""
        grows = finite & (old.good + 1 >= self.period)
        larger = jnp.minimum(old.scale * self.factor, jnp.float32(self.most))
        smaller = jnp.maximum(old.scale / self.factor, jnp.float32(self.least))
        scale = jnp.where(finite, jnp.where(grows, larger, old.scale), smaller)
        good = jnp.where(finite & ~grows, old.good + 1, 0)
        return LossScale(scale.astype(jnp.float32), good.astype(jnp.int32))

    def can_fall(self, old: LossScale) -> jax.Array:
        """Whether there is a smaller scale to try."""
        return old.scale > jnp.float32(self.least)


class LossScale(NamedTuple):
    """The scale of the loss, as training carries it along.

    Fields:
        scale: a float32 scalar.
        good: how many good steps there were since the scale last changed: int32.
    """

    scale: jax.Array
    good: jax.Array


def check_loss_scale(where: str, loss_scale: Any, compute: Any) -> float | DynamicLossScale | None:
    """What `loss_scale` stands for: "dynamic" is the default in float16.

    Raises:
        TypeError, ValueError: it is neither "dynamic", nor a DynamicLossScale, nor a positive
            number.
    """
    if loss_scale is None:
        return DynamicLossScale() if getattr(compute, "name", "") == "float16" else None
    if isinstance(loss_scale, DynamicLossScale):
        return loss_scale
    if isinstance(loss_scale, str) or not hasattr(loss_scale, "__float__"):
        if loss_scale == "dynamic":
            return DynamicLossScale()
        kind = ValueError if isinstance(loss_scale, str) else TypeError
        raise kind(
            f'{where}: loss_scale must be "dynamic", an fnn.DynamicLossScale or a positive number, '
            f"but got {arguments.show(loss_scale)}."
        )
    return float(arguments.number(where, "loss_scale", loss_scale, least=SMALLEST, most=LARGEST))


def unscaled(gradient: Any, scale: Any, like: Any) -> Any:
    """The gradient divided by the scale, in float32 at least; then in the dtypes of `like`."""

    def of(g, p):
        inverse = 1 / jnp.asarray(scale, g.real.dtype)
        return (g * inverse.astype(g.dtype)).astype(p.dtype)

    return jax.tree.map(of, wide(gradient), like)

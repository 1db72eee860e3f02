"""Where the entries of a product of two factors lie in a parameter's array.

A matrix product or convolution uses a weight as a stack of matrices (stack, out, in). The
parameter itself may be another arrangement of the same entries: its axes in another order, a
slice of it, a reshape. A `Layout` knows the way from one to the other, and back.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy
from jax import lax

# A view is a rearrangement of entries on the way from the gradient where the weight is used to
# the parameter's own. Each has three methods: itself; `adjoint(shape, w)`, back from the
# parameter's arrangement to the one before, which had the given shape; and `stacked(size)`, the
# same of arrays with one more axis of that size in front.


@dataclasses.dataclass(frozen=True)
class Transpose:
    """The axes in the given order."""

    order: tuple[int, ...]

    def __call__(self, x):
        return lax.transpose(x, self.order)

    def adjoint(self, shape: tuple[int, ...], w):
        return lax.transpose(w, tuple(numpy.argsort(self.order)))

    def stacked(self, size: int) -> Transpose:
        return Transpose((0, *(d + 1 for d in self.order)))


@dataclasses.dataclass(frozen=True)
class Reshape:
    """The entries in an array of the given shape."""

    shape: tuple[int, ...]

    def __call__(self, x):
        return lax.reshape(x, self.shape)

    def adjoint(self, shape: tuple[int, ...], w):
        return lax.reshape(w, shape)

    def stacked(self, size: int) -> Reshape:
        return Reshape((size, *self.shape))


@dataclasses.dataclass(frozen=True)
class Reverse:
    """The entries in reverse order along some axes."""

    axes: tuple[int, ...]

    def __call__(self, x):
        return lax.rev(x, self.axes)

    def adjoint(self, shape: tuple[int, ...], w):
        return lax.rev(w, self.axes)

    def stacked(self, size: int) -> Reverse:
        return Reverse(tuple(d + 1 for d in self.axes))


@dataclasses.dataclass(frozen=True)
class Pad:
    """Zeros around and between the entries, where a slice left entries out.

    padding: for each axis how many before, after, and between two.
    """

    padding: tuple[tuple[int, int, int], ...]

    def __call__(self, x):
        return lax.pad(x, jnp.zeros((), x.dtype), self.padding)

    def adjoint(self, shape: tuple[int, ...], w):
        start = [low for low, _, _ in self.padding]
        step = [interior + 1 for _, _, interior in self.padding]
        axes = zip(start, shape, step, strict=True)
        stop = [low + (n - 1) * s + 1 if n else low for low, n, s in axes]
        return lax.slice(w, start, stop, step)

    def stacked(self, size: int) -> Pad:
        return Pad(((0, 0, 0), *self.padding))


View = Transpose | Reshape | Reverse | Pad


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a product of factors (stack, out, in) becomes an array of the parameter's shape.

    The stack are axes that both factors and the parameter share (a batch of matrices), out the
    axes that come from g, ins those that come from a. The axes (*stack, *out, *ins) are put in
    the given order; then come the views.
    """

    stack: tuple[int, ...]
    out: tuple[int, ...]
    ins: tuple[int, ...]
    order: tuple[int, ...]
    views: tuple[View, ...] = ()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """How many entries the stack, out and ins have."""
        return math.prod(self.stack), math.prod(self.out), math.prod(self.ins)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes before, between and after the views."""
        dims = (*self.stack, *self.out, *self.ins)
        shapes = [tuple(dims[i] for i in self.order)]
        for view in self.views:
            before = jax.ShapeDtypeStruct(shapes[-1], jnp.float32)
            shapes.append(jax.eval_shape(view, before).shape)
        return shapes

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return self.shapes[-1]

    def to_parameter(self, x):
        """(stack, out, in) as an array of the parameter's shape."""
        x = lax.reshape(x, (*self.stack, *self.out, *self.ins))
        x = lax.transpose(x, self.order)
        for view in self.views:
            x = view(x)
        return x

    def from_parameter(self, w):
        """The adjoint: an array of the parameter's shape as (stack, out, in)."""
        for view, shape in zip(self.views[::-1], self.shapes[-2::-1], strict=True):
            w = view.adjoint(shape, w)
        return lax.reshape(lax.transpose(w, tuple(numpy.argsort(self.order))), self.sizes)

    def viewed(self, view: View) -> Layout:
        """The same, with one more rearrangement."""
        if isinstance(view, Transpose) and not self.views:
            return dataclasses.replace(self, order=tuple(self.order[i] for i in view.order))
        return dataclasses.replace(self, views=(*self.views, view))

    def owner(self, axis: int) -> tuple[str, int] | None:
        """Whose axis this axis of the parameter is: ("out", 0) for g's first; None after views."""
        if self.views:
            return None
        i = self.order[axis]
        for name in ("stack", "out", "ins"):
            dims = getattr(self, name)
            if i < len(dims):
                return name, i
            i -= len(dims)
        return None

    def without(self, axis: int) -> Layout:
        """The layout with one axis of the parameter, which has an owner, taken out."""
        name, i = self._owner(axis)
        dims = getattr(self, name)
        gone = self.order[axis]
        order = tuple(o - (o > gone) for k, o in enumerate(self.order) if k != axis)
        return dataclasses.replace(self, order=order, **{name: (*dims[:i], *dims[i + 1 :])})

    def resized(self, axis: int, size: int) -> Layout:
        """The layout with another size along one axis of the parameter, which has an owner."""
        name, i = self._owner(axis)
        dims = getattr(self, name)
        return dataclasses.replace(self, **{name: (*dims[:i], size, *dims[i + 1 :])})

    def stacked(self, size: int) -> Layout:
        """The layout of a parameter with one more axis in front, which both factors share."""
        order = (0, *(i + 1 for i in self.order))
        views = tuple(view.stacked(size) for view in self.views)
        return Layout((size, *self.stack), self.out, self.ins, order, views)

    def _owner(self, axis: int) -> tuple[str, int]:
        owner = self.owner(axis)
        assert owner is not None, "an axis of a view has no owner"
        return owner

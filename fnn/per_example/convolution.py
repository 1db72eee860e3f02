"""The gradient of a convolution's kernel: the input convolved with the upstream gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy
from jax import lax

from fnn.backprop.primitives.convolution import RULES
from fnn.per_example.layout import Layout, Reshape, Transpose
from fnn.per_example.measured import Measured
from fnn.per_example.precision import norm_of, unit, vdot
from fnn.per_example.product import Product
from fnn.precision import wide_together

# What is kept of the parameters of the equation, `lax.conv_general_dilated`'s.
_STATIC = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "feature_group_count",
    "batch_group_count",
    "precision",
    "preferred_element_type",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Convolution:
    """x convolved with g: Gᵀ A, where the rows of A are x's patches.

    convolution: the parameters of the convolution and the kernel's shape, as sorted pairs.
    """

    x: Any
    g: Any
    convolution: tuple = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})

    why = "gradient is x convolved with G"

    @staticmethod
    def of(x, g, kernel_shape: tuple[int, ...], params: dict) -> Convolution:
        """From the input, the upstream gradient, and the parameters of the equation."""
        static = {name: params[name] for name in _STATIC if name in params}
        static["dimension_numbers"] = tuple(tuple(s) for s in params["dimension_numbers"])
        static["kernel_shape"] = kernel_shape
        layout = kernel_layout(
            kernel_shape, static["dimension_numbers"], static["feature_group_count"]
        )
        return Convolution(x, g, tuple(sorted(static.items())), layout)

    @property
    def parameters(self) -> dict:
        """The parameters of the convolution, by name, and "kernel_shape"."""
        return dict(self.convolution)

    def form(self):
        """The gradient, (groups, out, in · kernel)."""
        (_, out, _) = self.layout.sizes
        if math.prod(self._space) > 2 * out:
            return self._by_offset()
        return self.as_product().form()

    @property
    def _space(self) -> tuple[int, ...]:
        _, _, y_spec = self.parameters["dimension_numbers"]
        return tuple(self.g.shape[d] for d in y_spec[2:])

    def _by_offset(self):
        """(groups, out, in): the entries of the kernel one after the other, each the product of
        a window of x with g. All patches at once would hold as many x as the kernel has entries.
        """
        p = self.parameters
        x_spec, w_spec, y_spec = p["dimension_numbers"]
        groups = p["feature_group_count"]
        x, g = wide_together(self.x, self.g)
        pads = [(0, 0, 0)] * x.ndim
        for d, (low, high), dilation in zip(
            x_spec[2:], p["padding"], p["lhs_dilation"], strict=True
        ):
            pads[d] = (low, high, dilation - 1)
        x = lax.pad(x, jnp.zeros((), x.dtype), pads)
        kernel = [p["kernel_shape"][d] for d in w_spec[2:]]
        offsets = numpy.array(list(numpy.ndindex(*kernel))) * numpy.array(p["rhs_dilation"])
        step = [1] * x.ndim
        for d, stride in zip(x_spec[2:], p["window_strides"], strict=True):
            step[d] = stride
        size = list(x.shape)
        for d, n in zip(x_spec[2:], self._space, strict=True):
            size[d] = (n - 1) * step[d] + 1
        in_groups = lambda a, d: a.reshape(*a.shape[:d], groups, -1, *a.shape[d + 1 :])
        summed = lambda spec: [d + (d > spec[1]) for d in (spec[0], *spec[2:])]
        numbers = (summed(x_spec), summed(y_spec)), ([x_spec[1]], [y_spec[1]])
        g = in_groups(g, y_spec[1])

        def at(offset):
            start = [jnp.zeros((), offset.dtype)] * x.ndim
            for d, o in zip(x_spec[2:], offset, strict=True):
                start[d] = o
            window = lax.slice(lax.dynamic_slice(x, start, size), [0] * x.ndim, size, step)
            window = in_groups(window, x_spec[1])
            return lax.dot_general(window, g, numbers, precision=p["precision"])

        found = lax.map(at, jnp.asarray(offsets, jnp.int32))  # (kernel, groups, in, out)
        return lax.reshape(lax.transpose(found, (1, 3, 2, 0)), self.layout.sizes)

    def as_product(self) -> Product:
        """The same with the patches made: as many numbers as kernel entries, at each pixel."""
        p = self.parameters
        x_spec, _, y_spec = p["dimension_numbers"]
        groups = p["feature_group_count"]
        x = lax.transpose(self.x, x_spec)  # (batch, features, space...)
        g = lax.transpose(self.g, y_spec)
        n, _, *space = g.shape
        patches = _patches(x, p, space)  # (batch, features, kernel..., space...)
        k = math.prod(patches.shape[2 : 2 + len(space)])
        pixels = math.prod(space)
        a = lax.reshape(patches, (n, groups, x.shape[1] // groups, k, pixels))
        a = lax.transpose(a, (1, 0, 4, 2, 3))  # (groups, batch, pixels, features, kernel)
        a = lax.reshape(a, (groups, n * pixels, x.shape[1] // groups * k))
        g = lax.reshape(g, (n, groups, g.shape[1] // groups, pixels))
        g = lax.reshape(lax.transpose(g, (1, 0, 3, 2)), (groups, n * pixels, g.shape[2]))
        return Product(a, g, self.layout)

    def materialize(self):
        """The gradient itself, of the parameter's shape."""
        return self.layout.to_parameter(self.form())

    @property
    def positions(self) -> int:
        _, _, y_spec = self.parameters["dimension_numbers"]
        return self.g.shape[y_spec[0]] * math.prod(self._space)

    @property
    def norm_by_gram(self) -> bool:
        """Are the positions' inner products cheaper than the product itself?"""
        (_, out, ins), p = self.layout.sizes, self.positions
        return p > 1 and p * (out + ins) < out * ins

    def normalised(self) -> tuple[Convolution, Any]:
        """(the same over c, c) with entries near one."""
        x, g = wide_together(self.x, self.g)
        (x, x_size), (g, g_size) = unit(x), unit(g)
        return dataclasses.replace(self, x=x, g=g), x_size * g_size

    def measured(self) -> Measured:
        """The norm, of the formed gradient or from the inner products of patches."""
        if self.norm_by_gram or self.positions == 1:
            return self.as_product().measured()
        form = self.form()
        # Each pixel of x is in at most as many patches as the kernel has entries.
        entries = math.prod(self.layout.ins[1:])
        length = norm_of(self.x) * norm_of(self.g) * (entries / self.positions) ** 0.5
        return Measured(norm_of(form), length)

    def dot(self, w):
        """⟨x ∗ g, w⟩ = ⟨g, x ∗ w⟩: one more forward convolution."""
        x, g = wide_together(self.x, self.g)
        kernel = self.layout.from_parameter(w)
        kernel = lax.reshape(kernel, (*self.layout.stack, *self.layout.out, *self.layout.ins))
        kernel = _kernel_from_layout(kernel, self)
        y = _convolve(x.conj(), kernel.astype(x.dtype), self.parameters)
        return vdot(g, y)

    def rows(self, index):
        """None: no rows of the gradient without forming it."""
        return None

    def as_one(self) -> Convolution:
        """A batch, or a loop's steps, as more positions of one example."""
        x_spec, _, y_spec = self.parameters["dimension_numbers"]
        # The first axis goes into the convolution's own axis of examples.
        merge = lambda x, d: jnp.moveaxis(x, 0, d).reshape(
            *x.shape[1 : d + 1], x.shape[0] * x.shape[d + 1], *x.shape[d + 2 :]
        )
        x, g = merge(self.x, x_spec[0]), merge(self.g, y_spec[0])
        return dataclasses.replace(self, x=x, g=g)

    def real_part(self) -> None:
        """None: of a real kernel in complex convolutions there are no such factors."""
        return None

    def joined(self, other) -> None:
        """None: two convolutions stay two terms."""
        return None

    def by_pullback(self):
        """The gradient itself by the convolution's own rule, the fastest way for many examples."""
        p = self.parameters
        x, g = wide_together(self.x, self.g)
        w = jnp.zeros(p["kernel_shape"], x.dtype)
        static = {k: v for k, v in p.items() if k != "kernel_shape"}
        static["dimension_numbers"] = lax.ConvDimensionNumbers(*p["dimension_numbers"])
        rule = RULES["conv_general_dilated"]
        _, gradient = rule.pullback((False, True), g, None, (x, w), static)
        if gradient is None:
            gradient = w
        # The kernel's own axes come after the layout's first views.
        done = len(
            kernel_layout(p["kernel_shape"], p["dimension_numbers"], p["feature_group_count"]).views
        )
        for view in self.layout.views[done:]:
            gradient = view(gradient)
        return gradient

    def kept(self) -> str:
        """What is kept of one example of a batch, in words."""
        return f"x {list(self.x.shape[1:])}, G {list(self.g.shape[1:])}"


def _convolve(x, w, p: dict):
    return lax.conv_general_dilated(
        x,
        w,
        p["window_strides"],
        p["padding"],
        p["lhs_dilation"],
        p["rhs_dilation"],
        lax.ConvDimensionNumbers(*p["dimension_numbers"]),
        p["feature_group_count"],
        precision=p["precision"],
    )


def _kernel_from_layout(kernel, term: Convolution):
    """(groups, out, in, space...) -> the kernel's own order of axes."""
    _, w_spec, _ = term.parameters["dimension_numbers"]
    groups, out, ins, *space = kernel.shape
    kernel = kernel.reshape(groups * out, ins, *space)
    return jnp.transpose(kernel, tuple(numpy.argsort(w_spec).tolist()))


def kernel_layout(kernel_shape, dimension_numbers, groups: int) -> Layout:
    """(groups, out, in, space...) -> the kernel's own order of axes, as a layout."""
    _, w_spec, _ = dimension_numbers
    out, ins, *space = (kernel_shape[d] for d in w_spec)
    layout = Layout(
        (groups,), (out // groups,), (ins, *space), tuple(range(3 + len(space)))
    ).viewed(Reshape((out, ins, *space)))
    back = tuple(int(d) for d in numpy.argsort(w_spec))
    return layout if back == tuple(range(len(back))) else layout.viewed(Transpose(back))


def _patches(x, p: dict, space: Sequence[int]):
    """For each entry of the kernel, what it met: (batch, features, kernel..., space...)."""
    _, w_spec, _ = p["dimension_numbers"]
    kernel = [p["kernel_shape"][d] for d in w_spec[2:]]
    pads = [(0, 0, 0), (0, 0, 0)]
    pads += [(lo, hi, d - 1) for (lo, hi), d in zip(p["padding"], p["lhs_dilation"], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), pads)
    found = []
    for offset in numpy.ndindex(*kernel):
        start = [o * d for o, d in zip(offset, p["rhs_dilation"], strict=True)]
        stop = [
            s + (n - 1) * t + 1 for s, n, t in zip(start, space, p["window_strides"], strict=True)
        ]
        found.append(
            lax.slice(x, [0, 0, *start], [*x.shape[:2], *stop], [1, 1, *p["window_strides"]])
        )
    return jnp.stack(found, axis=2).reshape(*x.shape[:2], *kernel, *space)

"""One example's gradient of one parameter, kept as the factors it is a product of.

Where a weight W meets an input in `y = W a`, its gradient is the outer product g aᵀ of the
upstream gradient g and the input a, and need not be formed: its norm is |g| |a| (Goodfellow,
"Efficient per-example gradient computations", 2015). A weight that is used at several
positions, pixels of an image or words of a text, has the sum Σₚ gₚ aₚᵀ = Gᵀ A. So a gradient is
a sum of terms, of four kinds:

    Product       Gᵀ A                    matrix products in all their forms
    Convolution   x convolved with g      convolutions: Gᵀ A too, where A has x's patches
    Rows          g added to rows         an embedding: Gᵀ A too, where A is one-hot
    Dense         itself                  all else

All here is written for one example; `jax.vmap` makes the batch. What concerns a batch as a
whole, its weighted sum for one, stands under "batches".

A norm from the positions' inner products, |Gᵀ A|² = ⟨A Aᵀ, G Gᵀ⟩, is a sum of numbers that may
be far larger than it is, where the positions' products cancel; so is that of several terms. What
they add up to without their signs bounds the rounding error: each norm comes with its *length*,
and where the length is more than LONGEST norms, the gradient itself is formed (`norms`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
import numpy
from jax import lax

# A norm found from products is wrong by about eps · (length / norm)², relatively: from here on
# it is found from the gradient itself.
LONGEST = 6.0

# ------------------------------------------------------------------------------------ layouts


@dataclasses.dataclass(frozen=True)
class View:
    """A rearrangement of entries on the way from a gradient where the weight is used to the
    parameter's own: the pullback of the same-named operation's inverse.

    kind: "transpose", "reshape", "rev" or "pad" (with zeros, from a slice's pullback).
    """

    kind: str
    argument: tuple

    def __call__(self, x):
        if self.kind == "transpose":
            return lax.transpose(x, self.argument)
        if self.kind == "reshape":
            return lax.reshape(x, self.argument)
        if self.kind == "rev":
            return lax.rev(x, self.argument)
        return lax.pad(x, jnp.zeros((), x.dtype), self.argument)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return jax.eval_shape(self, jax.ShapeDtypeStruct(shape, jnp.float32)).shape

    def adjoint(self, shape: tuple[int, ...], w):
        """Back: from the parameter's arrangement to the one before, of the given shape."""
        if self.kind == "transpose":
            return lax.transpose(w, tuple(numpy.argsort(self.argument)))
        if self.kind == "reshape":
            return lax.reshape(w, shape)
        if self.kind == "rev":
            return lax.rev(w, self.argument)
        start = [low for low, _, _ in self.argument]
        step = [interior + 1 for _, _, interior in self.argument]
        stop = [low + (n - 1) * s + 1 if n else low for low, n, s in zip(start, shape, step)]
        return lax.slice(w, start, stop, step)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a product of factors (stack, out, in) becomes an array of the parameter's shape.

    The stack are axes that both factors and the parameter share (a batch of matrices), out the
    axes that come from g, in those that come from a. The axes (*stack, *out, *ins) are put in
    the given order; then come the views.
    """

    stack: tuple[int, ...]
    out: tuple[int, ...]
    ins: tuple[int, ...]
    order: tuple[int, ...]
    views: tuple[View, ...] = ()

    @property
    def sizes(self) -> tuple[int, int, int]:
        return math.prod(self.stack), math.prod(self.out), math.prod(self.ins)

    def to_parameter(self, x):
        x = lax.reshape(x, (*self.stack, *self.out, *self.ins))
        x = lax.transpose(x, self.order)
        for view in self.views:
            x = view(x)
        return x

    def from_parameter(self, w):
        """The adjoint: an array of the parameter's shape as (stack, out, in)."""
        for view, shape in zip(self.views[::-1], self._shapes()[-2::-1]):
            w = view.adjoint(shape, w)
        return lax.reshape(lax.transpose(w, tuple(numpy.argsort(self.order))), self.sizes)

    def _shapes(self) -> list[tuple[int, ...]]:
        """The shapes before, between and after the views."""
        dims = (*self.stack, *self.out, *self.ins)
        shapes = [tuple(dims[i] for i in self.order)]
        for view in self.views:
            shapes.append(view.shape(shapes[-1]))
        return shapes

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shapes()[-1]

    def viewed(self, kind: str, argument: Sequence) -> Layout:
        """The same, with one more rearrangement."""
        argument = tuple(argument)
        if kind == "transpose" and not self.views:
            order = tuple(self.order[i] for i in argument)
            return dataclasses.replace(self, order=order)
        return dataclasses.replace(self, views=(*self.views, View(kind, argument)))

    def owner(self, axis: int) -> tuple[str, int] | None:
        """Whose axis this axis of the parameter is: ("out", 0) for g's first."""
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
        """The layout with one axis of the parameter taken out."""
        name, i = self.owner(axis)
        dims = getattr(self, name)
        gone = self.order[axis]
        order = tuple(o - (o > gone) for k, o in enumerate(self.order) if k != axis)
        return dataclasses.replace(self, order=order, **{name: (*dims[:i], *dims[i + 1 :])})

    def resized(self, axis: int, size: int) -> Layout:
        name, i = self.owner(axis)
        dims = getattr(self, name)
        return dataclasses.replace(self, **{name: (*dims[:i], size, *dims[i + 1 :])})


# -------------------------------------------------------------------------------------- terms


@dataclass_transform(frozen_default=True, eq_default=False)
def _term(*data: str, static: Sequence[str]):
    def register(cls):
        cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=static)

    return register


@_term("a", "g", static=("layout",))
class Product:
    """Gᵀ A: a is (stack, positions, in), g is (stack, positions, out)."""

    a: Any
    g: Any
    layout: Layout

    @property
    def positions(self) -> int:
        return self.a.shape[-2]

    def form(self):
        """(stack, out, in)."""
        a, g = _wide(self.a, self.g)
        if a.shape[-2] == 1:
            return g[:, 0, :, None] * a[:, 0, None, :]
        return jnp.einsum("spo,spi->soi", g, a)

    def materialize(self):
        return self.layout.to_parameter(self.form())

    def normalised(self) -> tuple[Product, Any]:
        a, g = _wide(self.a, self.g)
        a_sizes, g_sizes = (power_of_two(_largest(x, (-1,))) for x in (a, g))
        sizes = a_sizes * g_sizes
        scale = jnp.max(sizes, initial=0.0)
        g = _divided(g, g_sizes) * _divided(sizes, scale).astype(g.dtype)
        return Product(_divided(a, a_sizes), g, self.layout), scale

    def measured(self) -> Measured:
        a, g = _wide(self.a, self.g)
        a_norms, g_norms = norm_of(a, (-1,)), norm_of(g, (-1,))
        length = norm_of(a_norms * g_norms)
        if self.positions == 1:
            return Measured(length, length)
        if not self.norm_by_gram:
            return Measured(norm_of(self.form()), length)
        products = (_gram(a) * _gram(g)).real
        norm, length = _root(jnp.sum(products)), jnp.sqrt(jnp.sum(jnp.abs(products)))
        # A square that a row lost may count by what the other factor's row multiplied it with.
        info = jnp.finfo(norm.dtype)
        lost = math.sqrt(a.size) * norm_of(g_norms) + math.sqrt(g.size) * norm_of(a_norms)
        return Measured(norm, length, lost * (float(info.tiny) ** 0.5 / float(info.eps)))

    @property
    def norm_by_gram(self) -> bool:
        """Are the positions' inner products cheaper than the product itself?"""
        (_, out, ins), p = self.layout.sizes, self.positions
        return p > 1 and p * (out + ins) < out * ins

    def dot(self, w):
        """⟨gradient, w⟩ for an array of the parameter's shape."""
        a, g = _wide(self.a, self.g)
        w = self.layout.from_parameter(w)
        (_, out, ins) = self.layout.sizes
        if ins <= out:
            return _vdot(g, jnp.einsum("spi,soi->spo", a.conj(), w))
        return _vdot(a, jnp.einsum("spo,soi->spi", g.conj(), w))

    def rows(self, index):
        """The gradient's rows at `index`, (n, …): of the parameter's first axis; or None."""
        owner = self.layout.owner(0)
        if owner is None or owner[0] == "stack" or len(getattr(self.layout, owner[0])) != 1:
            return None
        a, g = _wide(self.a, self.g)
        if owner[0] == "out":
            picked = jnp.einsum("spn,spi->nsi", g[..., index], a)
        else:
            picked = jnp.einsum("spo,spn->nso", g, a[..., index])
        rest = self.layout.without(0)
        return jax.vmap(rest.to_parameter)(picked)


@_term("x", "g", static=("convolution", "layout"))
class Convolution:
    """A kernel's gradient: x convolved with g. Gᵀ A, where the rows of A are x's patches."""

    x: Any
    g: Any
    convolution: tuple
    layout: Layout

    @property
    def parameters(self) -> dict:
        return dict(self.convolution)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        return self.parameters["kernel_shape"]

    def form(self):
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
        x, g = _wide(self.x, self.g)
        pads = [(0, 0, 0)] * x.ndim
        for d, (low, high), dilation in zip(x_spec[2:], p["padding"], p["lhs_dilation"]):
            pads[d] = (low, high, dilation - 1)
        x = lax.pad(x, jnp.zeros((), x.dtype), pads)
        kernel = [p["kernel_shape"][d] for d in w_spec[2:]]
        offsets = numpy.array(list(numpy.ndindex(*kernel))) * numpy.array(p["rhs_dilation"])
        step = [1] * x.ndim
        for d, stride in zip(x_spec[2:], p["window_strides"]):
            step[d] = stride
        size = list(x.shape)
        for d, n in zip(x_spec[2:], self._space):
            size[d] = (n - 1) * step[d] + 1
        in_groups = lambda a, d: a.reshape(*a.shape[:d], groups, -1, *a.shape[d + 1 :])
        summed = lambda spec: [d + (d > spec[1]) for d in (spec[0], *spec[2:])]
        numbers = (summed(x_spec), summed(y_spec)), ([x_spec[1]], [y_spec[1]])
        g = in_groups(g, y_spec[1])

        def at(offset):
            start = [jnp.zeros((), offset.dtype)] * x.ndim
            for d, o in zip(x_spec[2:], offset):
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
        return self.layout.to_parameter(self.form())

    @property
    def positions(self) -> int:
        return math.prod(self._space)

    @property
    def norm_by_gram(self) -> bool:
        (_, out, ins), p = self.layout.sizes, self.positions
        return p > 1 and p * (out + ins) < out * ins

    def normalised(self) -> tuple[Convolution, Any]:
        x, g = _wide(self.x, self.g)
        (x, x_size), (g, g_size) = _unit(x), _unit(g)
        return dataclasses.replace(self, x=x, g=g), x_size * g_size

    def measured(self) -> Measured:
        if self.norm_by_gram or self.positions == 1:
            return self.as_product().measured()
        form = self.form()
        # Each pixel of x is in at most as many patches as the kernel has entries.
        entries = math.prod(self.layout.ins[1:])
        length = norm_of(self.x) * norm_of(self.g) * (entries / self.positions) ** 0.5
        return Measured(norm_of(form), length)

    def dot(self, w):
        """⟨x ∗ g, w⟩ = ⟨g, x ∗ w⟩: one more forward convolution."""
        x, g = _wide(self.x, self.g)
        kernel = self.layout.from_parameter(w)
        kernel = lax.reshape(kernel, (*self.layout.stack, *self.layout.out, *self.layout.ins))
        kernel = _kernel_from_layout(kernel, self)
        y = _convolve(x.conj(), kernel.astype(x.dtype), self.parameters)
        return _vdot(g, y)

    def rows(self, index):
        return None


@_term("index", "g", static=("layout",))
class Rows:
    """Rows of a table that were looked up: index (positions,), g (1, positions, row).

    Their gradient is g, added to the table's rows at `index`; an index out of bounds counts
    for nothing.
    """

    index: Any
    g: Any
    layout: Layout

    def form(self):
        (_, size, _) = self.layout.sizes
        _, g = _wide(self.g, self.g)
        return jnp.zeros((size, g.shape[-1]), g.dtype).at[self.index].add(g[0], mode="drop")[None]

    def materialize(self):
        return self.layout.to_parameter(self.form())

    def once(self) -> Rows:
        """The same with each row mentioned once: its sum stands where it came first."""
        _, g = _wide(self.g, self.g)
        (_, size, _) = self.layout.sizes
        (p,) = self.index.shape
        if p == 1:
            valid = self.index < size
            return dataclasses.replace(self, g=jnp.where(valid[None, :, None], g, 0))
        equal = self.index[:, None] == self.index[None, :]
        first = jnp.argmax(equal, axis=1)
        g = jnp.where((self.index < size)[None, :, None], g, 0)
        g = jax.ops.segment_sum(g[0], first, num_segments=p)[None]
        is_first = first == jnp.arange(p)
        return dataclasses.replace(self, index=jnp.where(is_first, self.index, size), g=g)

    @property
    def positions(self) -> int:
        return self.index.shape[-1]

    def normalised(self) -> tuple[Rows, Any]:
        g, scale = _unit(_wide(self.g)[0])
        return dataclasses.replace(self, g=g), scale

    def measured(self) -> Measured:
        once = self.once().g
        norm = norm_of(once)
        if self.positions == 1:
            return Measured(norm, norm)
        rows = norm_of(_wide(self.g)[0], (-1,))[..., None]
        return Measured(norm, norm_of(dataclasses.replace(self, g=rows).once().g))

    def dot(self, w):
        w = self.layout.from_parameter(w)[0]
        _, g = _wide(self.g, self.g)
        return _vdot(g[0], w.at[self.index].get(mode="fill", fill_value=0))

    def rows(self, index):
        return None


@_term("value", static=("why",))
class Dense:
    """The gradient itself. why: what kept it from being factored, in words."""

    value: Any
    why: str

    def materialize(self):
        return self.value

    positions = 1

    def normalised(self) -> tuple[Dense, Any]:
        value, scale = _unit(_wide(self.value)[0])
        return dataclasses.replace(self, value=value), scale

    def measured(self) -> Measured:
        norm = norm_of(self.value)
        return Measured(norm, norm)

    def dot(self, w):
        return _vdot(*_wide(self.value, w))

    def rows(self, index):
        return self.value.at[index].get(mode="fill", fill_value=0)


Term = Product | Convolution | Rows | Dense

# -------------------------------------------------------------- inner products of two terms


def materialized(terms: Sequence[Term]):
    """The gradient that the terms add up to."""
    return functools.reduce(jnp.add, [t.materialize() for t in terms])


class Measured(NamedTuple):
    """A norm, and what tells whether it can be relied on; real numbers of at least float32.

    length: √Σ |products|, where `norm` is the root of a sum of products; the norm of the
        positions' own norms, √Σₚ |gₚ|² |aₚ|², where it is that of the formed gradient. The
        rounding error of norm² is about eps length², that of a formed gradient eps length.
    least: of smaller norms, squares that were lost below the smallest number may count.
    """

    norm: Any
    length: Any
    least: Any = 0.0

    def times(self, factor) -> Measured:
        return Measured(*[x * factor for x in self])

    @property
    def is_in_range(self):
        """Not where squares over- or underflowed, nor for nan."""
        info = jnp.finfo(self.norm.dtype)
        smallest = (float(info.tiny) / float(info.eps)) ** 0.5
        largest = float(info.max) ** 0.5
        return (self.norm >= self.least) & (self.length > smallest) & (self.length < largest)

    @property
    def cancels(self):
        return self.length > LONGEST * self.norm

    def rounding(self, positions: int):
        """Where it cancels, a bound of the rounding errors of a sum of the formed products."""
        eps = float(jnp.finfo(self.norm.dtype).eps)
        bound = self.length * (4 * eps * math.sqrt(positions))
        return jnp.where(self.cancels, bound, jnp.zeros_like(bound))


def measured(terms: Sequence[Term], factors: Sequence | None = None) -> Measured:
    """|Σ factor · term|, from the terms' inner products among themselves."""
    found = [t.measured() for t in terms]
    if factors is None:
        factors = [1] * len(terms)
    else:
        found = [m.times(c) for m, c in zip(found, factors, strict=True)]
    if len(found) == 1:
        return found[0]
    square, bound = (functools.reduce(jnp.add, [lax.square(m[k]) for m in found]) for k in (0, 1))
    for i, k in itertools.combinations(range(len(terms)), 2):
        if not _apart(terms[i], terms[k]):
            product = inner(terms[i], terms[k]) * factors[i] * factors[k]
            square = square + 2 * product
            bound = bound + 2 * found[i].length * found[k].length
    least = functools.reduce(jnp.add, [m.least for m in found])
    return Measured(_root(square), jnp.sqrt(bound), least)


def measured_in_range(terms: Sequence[Term]) -> Measured:
    """The same of terms of any size: each is brought near one, and what it was added up."""
    own, scales = zip(*[t.normalised() for t in terms], strict=True)
    unit = functools.reduce(lax.max, scales)
    return measured(own, [_divided(x, unit) for x in scales]).times(unit)


def sums_products(terms: Sequence[Term]) -> bool:
    """Is the norm that of a sum of products, whose rounding error its length bounds?"""
    return len(terms) > 1 or getattr(terms[0], "norm_by_gram", False)


def dot(terms: Sequence[Term], w):
    """Re⟨gradient, w⟩ for an array of the parameter's shape; at least float32."""
    w, w_scale = _unit(_wide(w)[0])
    own = [t.normalised() for t in terms]
    return functools.reduce(jnp.add, [t.dot(w) * scale * w_scale for t, scale in own])


def _as_wide(terms: Sequence[Term]) -> list[Term]:
    """Terms whose materialised gradients have at least float32."""
    return [Dense(_wide(t.value)[0], t.why) if isinstance(t, Dense) else t for t in terms]


def norm_of(x, axes=None):
    """|x|, real, at least float32, over some axes or all; no square over- or underflows."""
    x = _wide(x)[0]
    largest = power_of_two(_largest(x, axes))
    root = jnp.sqrt(jnp.sum(_square(_divided(x, largest)), axes))
    return root * lax.reshape(largest, root.shape)


def inner(one: Term, other: Term):
    """Re⟨one, other⟩ of two terms of one parameter, forming one of them at most."""
    for rows, t in ((one, other), (other, one)):
        if isinstance(rows, Rows) and not rows.layout.views and rows.layout.owner(0)[0] == "out":
            picked = t.rows(rows.index)
            if picked is not None:
                _, g = _wide(rows.g, rows.g)
                (_, size, _) = rows.layout.sizes
                picked = jnp.where(
                    (rows.index < size).reshape(-1, *[1] * (picked.ndim - 1)), picked, 0
                )
                row = rows.layout.without(0).to_parameter
                return _vdot(jax.vmap(row)(g[0]), picked)
    if isinstance(other, Dense):
        return one.dot(other.value)
    return other.dot(one.materialize())


def _apart(one: Term, other: Term) -> bool:
    """Are both zero wherever the other isn't, as with two slices of one weight?"""
    if isinstance(one, Dense) or isinstance(other, Dense):
        return False
    views = one.layout.views[-1:], other.layout.views[-1:]
    if any(not v or v[0].kind != "pad" for v in views):
        return False
    return any(
        not set(one_range).intersection(other_range)
        for one_range, other_range in zip(*map(_filled, (one.layout, other.layout)))
    )


def _filled(layout: Layout) -> list[range]:
    """Along each axis, where the last view's padding left entries."""
    before = layout._shapes()[-2]
    return [
        range(low, low + n * (interior + 1), interior + 1)
        for n, (low, _, interior) in zip(before, layout.views[-1].argument)
    ]


def merged(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Terms of one form as one term with more positions; dense ones added up."""
    found: list[Term] = []
    for term in terms:
        for i, other in enumerate(found):
            both = _joined(other, term)
            if both is not None:
                found[i] = both
                break
        else:
            found.append(term)
    return tuple(found)


def _joined(one: Term, other: Term) -> Term | None:
    if type(one) is not type(other):
        return None
    if isinstance(one, Dense):
        why = one.why if one.why == other.why or not other.why else f"{one.why}; {other.why}"
        return Dense(one.value + other.value, why)
    if one.layout != other.layout or one.g.dtype != other.g.dtype:
        return None
    if isinstance(one, Product) and one.a.dtype == other.a.dtype:
        a = jnp.concatenate([one.a, other.a], axis=-2)
        return Product(a, jnp.concatenate([one.g, other.g], axis=-2), one.layout)
    if isinstance(one, Rows):
        index = jnp.concatenate([one.index, other.index], axis=-1)
        return Rows(index, jnp.concatenate([one.g, other.g], axis=-2), one.layout)
    return None


def economical(term: Term) -> Term:
    """The gradient itself in place of factors that hold more numbers than it does.

    The positions' products are summed in any case, once; and the norm of so many positions is
    cheapest by the sum.
    """
    if isinstance(term, Dense):
        return term
    kept = sum(x.size for x in jax.tree.leaves(term))
    size = math.prod(term.layout.shape)
    if kept < size or (isinstance(term, Product) and term.positions == 1):
        return term
    return Dense(term.materialize(), f"its factors hold {kept:,} numbers, the gradient {size:,}")


# ------------------------------------------------------------------------------------ batches
#
# Here terms have one more axis, the batch's, in front of all their arrays.


def weighted_sum(term: Term, weights):
    """Σₙ cₙ gradientₙ, for weights (batch,) or None for ones: one contraction."""
    if isinstance(term, Dense):
        if weights is None:
            return jnp.sum(term.value, axis=0)
        (value,) = _wide(term.value)
        return jnp.tensordot(weights.astype(value.dtype), value, axes=(0, 0))
    if weights is not None:
        term = scaled(term, weights)
    if isinstance(term, Convolution):
        return _summed_by_convolving(as_one(term))
    return as_one(term).materialize()


def scaled(term: Term, factors):
    """cₙ gradientₙ, for factors c (batch,). In half precision a rounded factor might let a clipped
    gradient grow beyond its limit: the result has at least float32."""
    name = "value" if isinstance(term, Dense) else "g"
    (g,) = _wide(getattr(term, name))
    c = lax.expand_dims(factors.astype(g.dtype), range(1, g.ndim))
    return dataclasses.replace(term, **{name: g * c})


def kept(term: Term, which):
    """The gradients of some examples, (batch,) True; zeros for the others, whatever they hold."""

    def zero_unless(x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return jnp.where(lax.expand_dims(which, range(1, x.ndim)), x, jnp.zeros((), x.dtype))

    return jax.tree.map(zero_unless, term)


def as_one(term: Product | Convolution | Rows) -> Product | Convolution | Rows:
    """A batch, or a loop's steps, as more positions of one example: their gradients' sum is its
    gradient."""
    if isinstance(term, Convolution):
        x_spec, _, y_spec = term.parameters["dimension_numbers"]
        # The first axis goes into the convolution's own axis of examples.
        merge = lambda x, d: jnp.moveaxis(x, 0, d).reshape(
            *x.shape[1 : d + 1], x.shape[0] * x.shape[d + 1], *x.shape[d + 2 :]
        )
        x, g = merge(term.x, x_spec[0]), merge(term.g, y_spec[0])
        return dataclasses.replace(term, x=x, g=g)
    if isinstance(term, Rows):
        n, _, p, row = term.g.shape
        return Rows(term.index.reshape(-1), term.g.reshape(1, n * p, row), term.layout)
    n, s, p, _ = term.g.shape
    if s == 1:
        flat = lambda x: x.reshape(1, n * p, x.shape[-1])
    else:
        flat = lambda x: jnp.moveaxis(x, 0, 1).reshape(s, n * p, x.shape[-1])
    return Product(flat(term.a), flat(term.g), term.layout)


def weighted_sums(terms: Sequence[Term], weights):
    """Σₙ cₙ gradientₙ of all terms together, in at least float32."""
    return functools.reduce(jnp.add, [_wide(weighted_sum(t, weights))[0] for t in terms])


def sum_of_squares(terms: Sequence[Term]):
    """Σₙ |gradientₙ|² entry by entry: (G²)ᵀ A² where there is one position."""
    if len(terms) == 1 and not _formed_for_squares(terms[0]):
        (term,) = terms
        if isinstance(term, Product):
            term = _balanced(term)
            squares = Product(_square(term.a), _square(term.g), term.layout)
        else:
            once = jax.vmap(Rows.once)(term)
            squares = dataclasses.replace(once, g=_square(once.g))
        return as_one(squares).materialize()
    return _sum_over_formed(_square, terms)


def sum_of_squared_deviations(terms: Sequence[Term]):
    """Σₙ |gradientₙ − mean|² entry by entry.

    The sum of the squares less n |mean|² where that cancels in no entry; else, and where the
    squares are found from the formed gradients anyway, from the deviations themselves.
    """
    terms = list(terms)
    n = jax.tree.leaves(terms)[0].shape[0]
    mean = weighted_sums(terms, None) / n
    if len(terms) > 1 or _formed_for_squares(terms[0]):
        return _deviations_formed(terms, mean, 2**24)
    squares = sum_of_squares(terms)
    found = squares - n * _square(mean)
    cancels = ~(found >= squares / LONGEST**2)
    return lax.cond(jnp.any(cancels), _deviations_formed, lambda terms, mean: found, terms, mean)


def _deviations_formed(terms, mean, at_once: int = 2**18):
    """Σ |d|² − |Σ d|² / n of the deviations d from a mean that was rounded (Chan et al. 1983)."""
    n = jax.tree.leaves(terms)[0].shape[0]
    both = lambda d: jnp.stack(
        [_square(d), lax.real(d), lax.imag(d)] if jnp.iscomplexobj(d) else [_square(d), d]
    )
    squares, *sums = _sum_over_formed(lambda g: both(g - mean), terms, at_once)
    return squares - functools.reduce(jnp.add, map(lax.square, sums)) / n


def _formed_for_squares(term: Term) -> bool:
    """Has it no sum of squares from its factors?"""
    return not isinstance(term, Rows) and not (isinstance(term, Product) and term.positions == 1)


def _sum_over_formed(function, terms: Sequence[Term], at_once: int = 2**24):
    """Σₙ function(gradientₙ), in at least float32; few gradients are formed at a time."""
    one = lambda ts: function(materialized(_as_wide(ts)))
    n = jax.tree.leaves(terms)[0].shape[0]
    size = math.prod(jax.eval_shape(one, [_one_of(t) for t in terms]).shape)
    return _accumulate(lambda ts: jnp.sum(jax.vmap(one)(ts), axis=0), list(terms), n, size, at_once)


def _balanced(term: Product) -> Product:
    """The same with factors of about equal size, whose squares are in range where that of their
    product is."""
    a, g = _wide(term.a, term.g)
    roots = [jnp.sqrt(power_of_two(_largest(x, (-1,)))) for x in (a, g)]
    factor = power_of_two(_divided(roots[1], roots[0]))
    return Product(a * _nonzero(factor).astype(a.dtype), _divided(g, factor), term.layout)


def _accumulate(function, batch, n: int, size: int, at_once: int = 2**24):
    """Σ function(part) over parts of a batch of which each holds about 2²⁴ numbers."""
    part = max(1, min(n, at_once // max(size, 1)))
    if part >= n:
        return function(batch)
    whole = n // part * part
    parts = jax.tree.map(lambda x: x[:whole].reshape(-1, part, *x.shape[1:]), batch)
    first = function(jax.tree.map(lambda x: x[0], parts))
    rest = jax.tree.map(lambda x: x[1:], parts)
    total, _ = lax.scan(lambda s, p: (s + function(p), None), first, rest)
    if whole < n:
        total = total + function(jax.tree.map(lambda x: x[whole:], batch))
    return total


def gram(terms: Sequence[Term], others: Sequence[Term]):
    """Re⟨gradientₙ, gradientₘ⟩ for all pairs of two batches: (batch, other batch)."""
    terms, others = list(terms), list(others)
    one, other = terms[0], others[0]
    single = len(terms) == len(others) == 1
    if not single or not isinstance(one, Product) or not isinstance(other, Product):
        return _gram_formed(terms, others)
    if one.layout != other.layout or not _pairs_by_positions(one, other):
        return _gram_formed(terms, others)
    products = _gram_by_positions(one, other)
    if one.positions == other.positions == 1:
        return products
    cancels = [jnp.any(m.cancels) for m in (norms(terms), norms(others))]
    return lax.cond(cancels[0] | cancels[1], _gram_formed, lambda *ts: products, terms, others)


def _gram_formed(terms, others):
    form = jax.vmap(lambda ts: materialized(_as_wide(ts)))
    if math.prod(jax.eval_shape(form, others).shape) <= 2**26:
        return _gram_of_dense(form(terms), form(others))

    # One row of the matrix at a time: one gradient formed, and its inner product with all.
    def row(t):
        formed, scale = _unit(materialized(_as_wide(t)))
        return scale * jax.vmap(lambda o: dot(o, formed))(others)

    return lax.map(row, terms)


def _gram_of_dense(x, y):
    (x, x_scales), (y, y_scales) = (
        jax.vmap(_unit)(_wide(z.reshape(z.shape[0], -1))[0]) for z in (x, y)
    )
    return jnp.dot(x, y.conj().T).real * x_scales[:, None] * y_scales[None]


def _pairs_by_positions(one: Product, other: Product) -> bool:
    """Is it cheaper to compare positions with positions than to form all gradients?"""
    n, m, p, q = one.g.shape[0], other.g.shape[0], one.positions, other.positions
    (_, out, ins) = one.layout.sizes
    if p == q == 1:
        return True
    by_positions = n * m * p * q * (out + ins)
    return by_positions < (n * p + m * q + n * m) * out * ins and n * m * p * q <= 2**26


def _gram_by_positions(one: Product, other: Product):
    (one, scales), (other, other_scales) = (jax.vmap(Product.normalised)(t) for t in (one, other))
    a = jnp.einsum("nspi,msqi->snpmq", one.a, other.a.conj())
    g = jnp.einsum("nspo,msqo->snpmq", one.g, other.g.conj())
    return jnp.sum((a * g).real, axis=(0, 2, 4)) * scales[:, None] * other_scales[None]


def norms(terms: Sequence[Term]) -> Measured:
    """|gradientₙ| of a batch, each within rounding of the formed gradient's.

    Those that can't be relied on are found with more care, one at a time; where there are none,
    nothing is.
    """
    terms = list(terms)
    found = jax.vmap(measured)(terms)
    if not sums_products([_one_of(t) for t in terms]):
        return found
    doubts = ~found.is_in_range | found.cancels
    as_found = lambda terms, found, doubts: found
    return Measured(*lax.cond(jnp.any(doubts), _with_care, as_found, terms, found[:2], doubts))


def _with_care(terms, found, doubts):
    one = lambda x: lax.cond(x[2], _measured_with_care, lambda terms, found: found, *x[:2])
    return lax.map(one, (terms, found, doubts))


def _measured_with_care(terms, found):
    """With what is multiplied brought near one; where that cancels, of the formed gradient."""
    m = measured_in_range(terms)
    again = ~(m.norm >= m.least) | m.cancels
    formed = lambda terms: norm_of(materialized(_as_wide(terms)))
    return lax.cond(again, formed, lambda terms: m.norm, terms), m.length


def _one_of(term: Term) -> Term:
    """The shapes of one example's term."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), term)


# -------------------------------------------------------------------------------- convolution


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
    return jnp.transpose(kernel, numpy.argsort(w_spec))


def kernel_layout(kernel_shape, dimension_numbers, groups: int) -> Layout:
    """(groups, out, in, space...) -> the kernel's own order of axes, as a layout."""
    _, w_spec, _ = dimension_numbers
    out, ins, *space = (kernel_shape[d] for d in w_spec)
    layout = Layout(
        (groups,), (out // groups,), (ins, *space), tuple(range(3 + len(space)))
    ).viewed("reshape", (out, ins, *space))
    back = tuple(int(d) for d in numpy.argsort(w_spec))
    return layout if back == tuple(range(len(back))) else layout.viewed("transpose", back)


def _patches(x, p: dict, space: Sequence[int]):
    """For each entry of the kernel, what it met: (batch, features, kernel..., space...)."""
    _, w_spec, _ = p["dimension_numbers"]
    kernel = [p["kernel_shape"][d] for d in w_spec[2:]]
    pads = [(0, 0, 0), (0, 0, 0)]
    pads += [(lo, hi, d - 1) for (lo, hi), d in zip(p["padding"], p["lhs_dilation"])]
    x = lax.pad(x, jnp.zeros((), x.dtype), pads)
    found = []
    for offset in numpy.ndindex(*kernel):
        start = [o * d for o, d in zip(offset, p["rhs_dilation"])]
        stop = [s + (n - 1) * t + 1 for s, n, t in zip(start, space, p["window_strides"])]
        found.append(
            lax.slice(x, [0, 0, *start], [*x.shape[:2], *stop], [1, 1, *p["window_strides"]])
        )
    return jnp.stack(found, axis=2).reshape(*x.shape[:2], *kernel, *space)


def _summed_by_convolving(term: Convolution):
    """The gradient by the convolution's own pullback, the fastest way for many examples."""
    from fnn.backprop.primitives import convolution

    p = term.parameters
    x, g = _wide(term.x, term.g)
    w = jnp.zeros(term.kernel_shape, x.dtype)
    static = {k: v for k, v in p.items() if k != "kernel_shape"}
    static["dimension_numbers"] = lax.ConvDimensionNumbers(*p["dimension_numbers"])
    rule = convolution.RULES["conv_general_dilated"]
    _, gradient = rule.pullback((False, True), g, None, (x, w), static)
    if gradient is None:
        gradient = w
    # The kernel's own axes come after the layout's first two views.
    done = len(
        kernel_layout(p["kernel_shape"], p["dimension_numbers"], p["feature_group_count"]).views
    )
    for view in term.layout.views[done:]:
        gradient = view(gradient)
    return gradient


# ---------------------------------------------------------------------------------- arithmetic


def _wide(*arrays):
    """In one dtype of at least float32, in which sums of many products are exact enough."""
    dtype = functools.reduce(jnp.promote_types, [x.dtype for x in arrays], jnp.float32)
    return tuple(x.astype(dtype) for x in arrays)


def power_of_two(m):
    """The largest power of two that is at most m, which is at least 0; 0 for 0 and nan.

    Dividing by it is exact. It is held fixed in derivatives: what it divides, it multiplies
    again.
    """
    m = lax.stop_gradient(m)
    bits = {4: jnp.int32, 8: jnp.int64}[m.dtype.itemsize]
    info = jnp.finfo(m.dtype)
    exponent = jnp.asarray(((1 << info.bits - 1 - info.nmant) - 1) << info.nmant, bits)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(m, bits) & exponent, m.dtype)
    tiny = float(info.tiny)
    power = lax.clamp(jnp.asarray(tiny, m.dtype), power, jnp.asarray(1 / tiny, m.dtype))
    return jnp.where(m > 0, power, jnp.zeros_like(m))


def _divided(x, power):
    """x / power, and x where the power is 0: as where x is."""
    return x / _nonzero(power).astype(x.dtype)


def _nonzero(power):
    return jnp.where(power > 0, power, jnp.ones_like(power))


def _largest(x, axes=None):
    """max |x|, or of a complex x of its parts; along some axes, which stay, or all."""
    parts = [lax.real(x), lax.imag(x)] if jnp.iscomplexobj(x) else [x]
    largest = lambda p: jnp.max(jnp.abs(p), axes, keepdims=axes is not None, initial=0.0)
    return functools.reduce(lax.max, map(largest, parts))


def _unit(x):
    """(x / s, s), with s a power of two about as large as x's largest entry."""
    scale = power_of_two(_largest(x))
    return _divided(x, scale), scale


def _root(square):
    """Of a sum that may round to a little less than zero."""
    return jnp.sqrt(lax.max(square, jnp.zeros_like(square)))


def _square(x):
    return lax.real(x) ** 2 + lax.imag(x) ** 2 if jnp.iscomplexobj(x) else lax.square(x)


def _gram(x):
    """(stack, positions, positions) inner products."""
    return jnp.einsum("spi,sqi->spq", x, x.conj())


def _vdot(x, y):
    return (
        jnp.sum((x.conj() * y).real)
        if jnp.iscomplexobj(x) or jnp.iscomplexobj(y)
        else jnp.sum(x * y)
    )

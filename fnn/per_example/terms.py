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
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy
from jax import lax

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

    def squared_norm(self):
        a, g = _wide(self.a, self.g)
        if self.positions == 1:
            return jnp.sum(_squares(a) * _squares(g))
        if self.norm_by_gram:
            return jnp.sum((_gram(a) * _gram(g)).real)
        return jnp.sum(_square(self.form()))

    @property
    def norm_by_gram(self) -> bool:
        """Are the positions' inner products cheaper than the product itself?"""
        (_, out, ins), p = self.layout.sizes, self.positions
        return p * (out + ins) < out * ins

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

    def squared_norm(self):
        (_, out, ins), p = self.layout.sizes, math.prod(self._space)
        if p * (out + ins) < out * ins:
            return self.as_product().squared_norm()
        return jnp.sum(_square(self.form()))

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

    def squared_norm(self):
        return jnp.sum(_square(self.once().g))

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

    def squared_norm(self):
        (x,) = _wide(self.value)
        return jnp.sum(_square(x))

    def dot(self, w):
        return _vdot(*_wide(self.value, w))

    def rows(self, index):
        return self.value.at[index].get(mode="fill", fill_value=0)


Term = Product | Convolution | Rows | Dense

# -------------------------------------------------------------- inner products of two terms


def materialized(terms: Sequence[Term]):
    """The gradient that the terms add up to."""
    return functools.reduce(jnp.add, [t.materialize() for t in terms])


def squared_norm(terms: Sequence[Term]):
    """|Σ terms|², with the terms' inner products among themselves; real, at least float32."""
    total = functools.reduce(jnp.add, [t.squared_norm() for t in terms])
    for i, one in enumerate(terms):
        for other in terms[:i]:
            if not _apart(one, other):
                total = total + 2 * inner(one, other)
    return total


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
        # In half precision a rounded weight may let a clipped gradient grow beyond its limit.
        (g,) = _wide(term.g)
        c = lax.expand_dims(weights.astype(g.dtype), range(1, g.ndim))
        term = dataclasses.replace(term, g=g * c)
    if isinstance(term, Convolution):
        return _summed_by_convolving(as_one(term))
    return as_one(term).materialize()


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


def sum_of_squares(term: Term):
    """Σₙ gradientₙ² entry by entry: (G²)ᵀ A² where there is one position."""
    if isinstance(term, Dense):
        return jnp.sum(_square(term.value), axis=0)
    if isinstance(term, Product) and term.positions == 1:
        a, g = _wide(term.a, term.g)
        squares = Product(_square(a), _square(g), term.layout)
        return as_one(squares).materialize()
    if isinstance(term, Rows):
        once = jax.vmap(Rows.once)(term)
        return as_one(dataclasses.replace(once, g=_square(once.g))).materialize()
    n = term.g.shape[0]
    formed = math.prod(term.layout.sizes)
    return _accumulate(
        lambda t: jnp.sum(_square(jax.vmap(lambda x: x.materialize())(t)), axis=0), term, n, formed
    )


def _accumulate(function, batch, n: int, size: int):
    """Σ function(part) over parts of a batch of which each holds about 2²⁴ numbers."""
    part = max(1, min(n, 2**24 // max(size, 1)))
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
    if len(terms) == 1 and len(others) == 1:
        one, other = terms[0], others[0]
        same = type(one) is type(other) and getattr(one, "layout", 0) == getattr(other, "layout", 0)
        if same and isinstance(one, Product) and one.positions == other.positions == 1:
            a = jnp.einsum("nsi,msi->snm", *_wide(one.a[:, :, 0], other.a[:, :, 0].conj()))
            g = jnp.einsum("nso,mso->snm", *_wide(one.g[:, :, 0], other.g[:, :, 0].conj()))
            return jnp.sum((a * g).real, axis=0)
        if isinstance(one, Dense) and isinstance(other, Dense):
            return _gram_of_dense(one.value, other.value)
        if same and isinstance(one, Product) and _pairs_by_positions(one, other):
            return _gram_by_positions(one, other)
    form = jax.vmap(materialized)
    size = math.prod(jax.eval_shape(form, list(others)).shape)
    if size <= 2**26:
        return _gram_of_dense(form(list(terms)), form(list(others)))

    # One row of the matrix at a time: one gradient formed, and its inner product with all.
    def row(t):
        formed = materialized(t)
        of_other = lambda o: functools.reduce(jnp.add, [x.dot(formed) for x in o])
        return jax.vmap(of_other)(list(others))

    return lax.map(row, list(terms))


def _gram_of_dense(x, y):
    x, y = _wide(x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1))
    return jnp.dot(x, y.conj().T).real


def _pairs_by_positions(one: Product, other: Product) -> bool:
    """Is it cheaper to compare positions with positions than to form all gradients?"""
    n, m, p, q = one.g.shape[0], other.g.shape[0], one.positions, other.positions
    (_, out, ins) = one.layout.sizes
    by_positions = n * m * p * q * (out + ins)
    return by_positions < (n * p + m * q + n * m) * out * ins and n * m * p * q <= 2**26


def _gram_by_positions(one: Product, other: Product):
    a = jnp.einsum("nspi,msqi->snpmq", *_wide(one.a, other.a.conj()))
    g = jnp.einsum("nspo,msqo->snpmq", *_wide(one.g, other.g.conj()))
    return jnp.sum((a * g).real, axis=(0, 2, 4))


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
    from fnn.backprop.primitives import contraction

    p = term.parameters
    x, g = _wide(term.x, term.g)
    w = jnp.zeros(term.kernel_shape, x.dtype)
    static = {k: v for k, v in p.items() if k != "kernel_shape"}
    static["dimension_numbers"] = lax.ConvDimensionNumbers(*p["dimension_numbers"])
    rule = contraction.RULES["conv_general_dilated"]
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


def _square(x):
    return lax.real(x) ** 2 + lax.imag(x) ** 2 if jnp.iscomplexobj(x) else lax.square(x)


def _squares(x):
    """Σ |x|² along the last axis; as a product, since XLA copies what it would sum the squares of
    when that lies transposed, as a batch's activations W x do."""
    if jnp.iscomplexobj(x):
        return jnp.sum(_square(x), axis=-1)
    return jnp.einsum("...i,...i->...", x, x, precision="highest")


def _gram(x):
    """(stack, positions, positions) inner products."""
    return jnp.einsum("spi,sqi->spq", x, x.conj())


def _vdot(x, y):
    return (
        jnp.sum((x.conj() * y).real)
        if jnp.iscomplexobj(x) or jnp.iscomplexobj(y)
        else jnp.sum(x * y)
    )

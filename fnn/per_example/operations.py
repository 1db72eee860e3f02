"""Operations of fnn's own in which parameters meet the example: their backward is looked into.

An operation's hand-written backward may find the gradient of a parameter as a matrix product, as
that of a recurrent network does of its weights, duᵀ h. It is traced, and where a parameter's
gradient is such a product of something with what comes of the upstream gradient, the two are kept
and the product isn't formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy
from jax import lax

from fnn.backprop.rules import Rule, hidden
from fnn.eager import apply_all
from fnn.jaxpr import Equation, Program, program
from fnn.per_example.layout import Layout, Reshape, Transpose, View
from fnn.per_example.terms import Product, Terms


def gradients(
    rule: Rule,
    equation: Equation,
    needed: Sequence[bool],
    is_parameter: Sequence[bool],
    saved: Any,
    g: Sequence,
    opaque: bool,
) -> list | None:
    """The gradients of an operation's needed inputs, a parameter's as terms where it is a product.

    None where no parameter's is.

    Args:
        rule: the operation's usual rule.
        equation: the call.
        needed: of which inputs a gradient is wanted.
        is_parameter: which inputs depend on parameters alone.
        saved: what the rule's forward kept.
        g: the upstream gradient of each output, None for zero.
        opaque: see `Tape`.
    """
    places: list[int] = []

    def backward(g):
        products = rule.backward(equation, needed, saved, g, False)
        places[:] = [k for k, product in enumerate(products) if product is not None]
        return [product for product in products if product is not None]

    flat = program(jax.make_jaxpr(backward)(list(g)))
    dots = {
        k: dot
        for k, i in zip(places, flat.outputs, strict=True)
        if is_parameter[k] and (dot := _product(i, flat)) is not None
    }
    if not dots:
        return None
    # What doesn't come of the upstream gradient is made outside of what is hidden: so it is known
    # to be the same for all of them, where there are several.
    once = dict(flat.constants)
    before, _ = flat.needed_for([dot.a for dot in dots.values()])
    apply_all(before, once)
    outs = dict(zip(places, flat.outputs, strict=True))
    targets = {k: dots[k].g if k in dots else i for k, i in outs.items()}
    equations, _ = flat.needed_for(list(targets.values()))

    def run(constants, g):
        values = constants | dict(zip(flat.inputs, jax.tree.leaves(g), strict=True))
        apply_all(equations, values)
        return {k: values[i] for k, i in targets.items()}

    found = hidden(run, opaque)(flat.constants, list(g))
    for k, dot in dots.items():
        found[k] = dot.term(once[dot.a], found[k])
    return [found.get(k) for k in range(len(needed))]


class _Dot(NamedTuple):
    """A gradient that is a matrix product of a with g, and then rearranged.

    a, g: the numbers of the two arrays; g comes of the upstream gradient, a doesn't.
    a_axes, g_axes: the axes of each that are stacked, that are contracted, and its own.
    g_first: whether the product has g's own axes before a's.
    """

    a: int
    g: int
    a_axes: tuple[list[int], list[int], list[int]]
    g_axes: tuple[list[int], list[int], list[int]]
    g_first: bool
    views: list[View]

    def term(self, a: Any, g: Any) -> Terms:
        a, stack, ins = _as_factor(a, self.a_axes)
        g, _, out = _as_factor(g, self.g_axes)
        places = list(range(len(stack) + len(out) + len(ins)))
        of_stack, of_out = places[: len(stack)], places[len(stack) : len(stack) + len(out)]
        of_in = places[len(stack) + len(out) :]
        own = [*of_out, *of_in] if self.g_first else [*of_in, *of_out]
        layout = Layout(stack, out, ins, (*of_stack, *own))
        for view in self.views:
            layout = layout.viewed(view)
        return Terms((Product(a, g, layout),))


def _as_factor(x, axes):
    """The array as (stack, positions, own), and the sizes of the stacked and of its own axes."""
    stack, contracted, own = ([x.shape[d] for d in of] for of in axes)
    x = lax.transpose(x, [d for of in axes for d in of])
    shape = math.prod(stack), math.prod(contracted), math.prod(own)
    return lax.reshape(x, shape), tuple(stack), tuple(own)


def _product(value: int, flat: Program) -> _Dot | None:
    """What a value is the product of, if it is one."""
    maker = {i: equation for equation in flat.equations for i in equation.outs}
    depends = flat.dependents(flat.inputs)
    views: list[View] = []
    while (made := maker.get(value)) is not None and made.name != "dot_general":
        if made.name == "transpose":
            views.insert(0, Transpose(tuple(made.params["permutation"])))
        elif made.name in ("reshape", "squeeze", "expand_dims"):
            views.insert(0, Reshape(tuple(flat.avals[value].shape)))
        elif made.name != "convert_element_type":
            return None
        value = made.ins[0]
    if made is None:
        return None
    of_g = [i in depends for i in made.ins]
    if sum(of_g) != 1 or numpy.iscomplexobj(numpy.zeros(0, flat.avals[value].dtype)):
        return None
    contract, batch = made.params["dimension_numbers"]
    axes = []
    for k, i in enumerate(made.ins):
        taken = [*batch[k], *contract[k]]
        own = [d for d in range(flat.avals[i].ndim) if d not in taken]
        axes.append((list(batch[k]), list(contract[k]), own))
    g = of_g.index(True)
    return _Dot(made.ins[1 - g], made.ins[g], axes[1 - g], axes[g], g == 0, views)

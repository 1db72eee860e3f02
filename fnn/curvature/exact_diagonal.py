"""The Hessian's diagonal, weight by weight through the layer that it makes.

A weight W that is used once, in y = W a, moves the loss through y alone. So the second derivatives
with respect to W follow from those with respect to y; with one position

    ∂²L/∂Wₒᵢ² = Σₙ ∂²Lₙ/∂yₒ² aᵢ².

So one Hessian product for each entry of y, of all examples at once, does what would otherwise take
one for each entry of W. If the network is linear in pieces there are no others than the loss's,
and the diagonal is that of the Gauss-Newton matrix: one sweep.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
from jax import lax

from fnn import arguments
from fnn.backprop import grad
from fnn.batch import example_types
from fnn.curvature import output_hessian
from fnn.curvature.checks import check_loss, check_model, checked
from fnn.curvature.ggn import ggn_diagonal
from fnn.curvature.linearize import second_derivative
from fnn.curvature.operators import mean_loss
from fnn.curvature.piecewise_linear import piecewise_linear
from fnn.curvature.sqrt_ggn import one_array
from fnn.eager import apply_all, once
from fnn.jaxpr import Program, program, trace
from fnn.meshes import specs_of, with_auto_axes
from fnn.per_example.inputs import parameters
from fnn.per_example.meetings import MEETINGS
from fnn.per_example.passages import PASSAGES
from fnn.per_example.terms import Convolution, Product, Term
from fnn.precision import wide_together


def hessian_diagonal(model: Callable, loss: Callable, *, chunk: int = 16) -> Callable:
    """The diagonal of the mean loss's Hessian, exactly.

    In a network of matrix products, convolutions and piecewise linear functions (ReLU, max),
    each weight used once, the outputs are piecewise linear in each weight while the others are
    fixed, and the Hessian's diagonal is the GGN's: one sweep. In any other network a weight that
    is used once, in a matrix product or convolution, takes one Hessian product for each of its
    layer's outputs; and any other parameter one for each of its entries.

    Args:
        model, loss: as for `ggn_diagonal`; here the loss needn't be convex.
        chunk: how many Hessian products are done at once.

    Returns:
        A function `(params, (inputs, targets))` to a tree like the parameters.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """
    check_model("hessian_diagonal", model)
    check_loss("hessian_diagonal", loss)
    chunk = arguments.integer("hessian_diagonal", "chunk", chunk, least=1)

    def of_batch(params: chex.ArrayTree, batch: chex.ArrayTree) -> chex.ArrayTree:
        params, inputs, targets, size = checked("hessian_diagonal", params, batch)
        batch = inputs, targets

        def diagonal(params, batch):
            inputs, targets = batch
            if piecewise_linear(model, params, inputs) and _is_convex(model, loss, params, batch):
                return ggn_diagonal(model, loss)(params, batch)
            _, leaves, tree = parameters(params)
            examples, example_tree = jax.tree.flatten((inputs, targets))

            def of_example(*args):
                here = jax.tree.unflatten(tree, args[: len(leaves)])
                x, t = jax.tree.unflatten(example_tree, args[len(leaves) :])
                return [loss(one_array(model(here, x)), t)]

            flat = program(trace(of_example, [*leaves, *example_types(examples)]))
            found: list = [None] * len(leaves)
            for layer in _layers(flat, len(leaves)):
                of_weight, of_bias = _through(layer, flat, leaves, examples, size, chunk)
                found[layer.weight] = of_weight
                if layer.bias is not None:
                    found[layer.bias] = of_bias

            mean = mean_loss(model, loss, inputs, targets)
            for k, leaf in enumerate(leaves):
                if found[k] is None:

                    def of_leaf(w, k=k):
                        return mean(jax.tree.unflatten(tree, [*leaves[:k], w, *leaves[k + 1 :]]))

                    found[k] = _entry_by_entry(of_leaf, leaf, chunk)
            found = [f.astype(w.dtype) for f, w in zip(found, leaves, strict=True)]
            return jax.tree.unflatten(tree, found)

        return with_auto_axes(diagonal, (params, batch), specs_of(params))

    return of_batch


def _is_convex(model, loss, params, batch) -> bool:
    """Is the loss convex for sure, so that the root of its Hessian is exact?"""
    x, target = example_types(batch)
    z = jax.eval_shape(lambda p, x: one_array(model(p, x)), params, x)
    return output_hessian.is_convex(loss, z, target)


def _entry_by_entry(mean: Callable, leaf, chunk: int) -> jax.Array:
    """The diagonal for a parameter, by one Hessian product for each of its entries."""
    if leaf.size == 0:
        return leaf

    def diagonal(leaf):
        push = second_derivative(grad(mean), leaf)

        def entry(i):
            one_hot = jnp.zeros(leaf.size, leaf.dtype).at[i].set(1).reshape(leaf.shape)
            return push(one_hot).reshape(-1)[i]

        return lax.map(entry, jnp.arange(leaf.size), batch_size=chunk).reshape(leaf.shape)

    return once(diagonal)(leaf)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Where a weight has its only use, y = W a, with what is added to y and nowhere else.

    weight, bias: numbers of the parameters; bias is None if there is none.
    at: the number of the equation that makes y.
    argument: which of its arguments comes from the weight.
    views: the numbers of the equations that rearrange the weight before.
    """

    weight: int
    bias: int | None
    at: int
    argument: int
    views: tuple[int, ...]


_VIEWS = ("transpose", "reshape", "squeeze", "expand_dims", "rev", "slice", "convert_element_type")


def _layers(flat: Program, count: int) -> list[_Layer]:
    """The layers of a program whose first `count` inputs are the parameters."""
    users: dict[int, list[int]] = {}
    for at, equation in enumerate(flat.equations):
        for i in equation.ins:
            users.setdefault(i, []).append(at)
    for i in flat.outputs:
        users.setdefault(i, []).append(-1)
    found = []
    for weight in range(count):
        value, views = flat.inputs[weight], []
        while len(users.get(value, ())) == 1 and users[value] != [-1]:
            (at,) = users[value]
            equation = flat.equations[at]
            if equation.name in _VIEWS:
                views.append(at)
                (value,) = equation.outs
                continue
            if equation.name in ("dot_general", "conv_general_dilated"):
                argument = equation.ins.index(value)
                (y,) = equation.outs
                of_examples = equation.params.get("batch_group_count", 1) == 1
                is_kernel = equation.name == "dot_general" or (argument == 1 and of_examples)
                real = jnp.issubdtype(flat.avals[y].dtype, jnp.floating)
                smaller = math.prod(flat.avals[y].shape) < math.prod(flat.avals[value].shape)
                if is_kernel and real and smaller:
                    bias = _bias(flat, y, users, count)
                    found.append(_Layer(weight, bias, at, argument, tuple(views)))
            break
    return found


def _bias(flat: Program, y: int, users, count: int) -> int | None:
    """The parameter that is added to y and has no other use."""
    if len(users.get(y, ())) != 1 or users[y] == [-1]:
        return None
    equation = flat.equations[users[y][0]]
    if equation.name not in ("add", "add_any") or y not in equation.ins:
        return None
    other = equation.ins[1 - equation.ins.index(y)]
    parameters_ = flat.inputs[:count]
    if other not in parameters_ or len(users[other]) != 1:
        return None
    return parameters_.index(other) if flat.avals[other].shape == flat.avals[y].shape else None


def _through(
    layer: _Layer, flat: Program, leaves: Sequence, examples: Sequence, size: int, chunk: int
) -> tuple[jax.Array, jax.Array | None]:
    """The diagonals for the layer's weight and bias, from the second derivatives in its y."""
    equation = flat.equations[layer.at]
    (y,) = equation.outs
    start = lambda example: dict(enumerate(flat.values([*leaves, *example])))

    def term(g, *example) -> Product:
        """What W's gradient would be for an upstream gradient g of y."""
        values = start(example)
        apply_all(flat.equations[: layer.at], values)
        ins = [values[i] for i in equation.ins]
        found: Term | None = MEETINGS[equation.name](layer.argument, g, ins, equation.params)
        for at in reversed(layer.views):
            view = flat.equations[at]
            found = PASSAGES[view.name](0, found, [values[i] for i in view.ins], view, flat)
        product = found.as_product() if isinstance(found, Convolution) else found
        assert isinstance(product, Product), "a layer's weight keeps its factors"
        return product

    def moved(eps, *example):
        values = start(example)
        apply_all(flat.equations[: layer.at + 1], values)
        values[y] = values[y] + eps
        apply_all(flat.equations[layer.at + 1 :], values)
        return values[flat.outputs[0]]

    zero = jnp.zeros((size, *flat.avals[y].shape), flat.avals[y].dtype)
    total = lambda eps: jnp.sum(jax.vmap(moved)(eps, *examples))
    push = second_derivative(grad(total), zero)

    terms = jax.vmap(term)(zero, *examples)
    # In float32 at least, and G's dtype: the square of an input is soon beyond float16.
    a, _ = wide_together(terms.a, terms.g)
    layout = terms.layout
    _, stack, positions, out = terms.g.shape
    # y in the order of the factor G, and back.
    arranged = lambda g: term(g, *(x[0] for x in examples)).g
    back = jax.linear_transpose(arranged, zero[0])

    def entry(i):
        s, p, o = jnp.unravel_index(i, (stack, positions, out))
        one = jnp.zeros((stack, positions, out), terms.g.dtype).at[s, p, o].set(1)
        (direction,) = back(one)
        pushed = push(jnp.broadcast_to(direction, zero.shape))
        row = jax.vmap(arranged)(pushed)[:, s, :, o].astype(a.dtype)  # (examples, positions)
        if positions == 1:
            return row[:, 0]
        seen = jnp.einsum("nq,nqi->ni", row, a[:, s])
        return row[:, p], jnp.sum(a[:, s, p] * seen, axis=0)

    found = lax.map(entry, jnp.arange(stack * positions * out), batch_size=chunk)
    if positions == 1:
        own = found.reshape(stack, out, size)
        by_weight = jnp.einsum("son,nsi->soi", own, a[:, :, 0] ** 2)
    else:
        own, by_position = found
        by_weight = by_position.reshape(stack, positions, out, -1).sum(1)
    by_bias = None
    if layer.bias is not None:
        of_bias = own.reshape(stack, positions, out, size).sum(-1) / size
        (by_bias,) = back(of_bias.astype(terms.g.dtype))
    return layout.to_parameter(by_weight) / size, by_bias

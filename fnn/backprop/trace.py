"""`fnn.graph`: a function, at given arguments, as a computational graph.

    g = graph(lambda x, y, z: (x + y) * z)(-2.0, 5.0, -4.0)
    g.backprop()
    print(g)                    every node with its value and its gradient
    g["x"].gradient             -4.0
    for step in g.steps():      ∂f/∂z = ∂f/∂f · ∂f/∂z = 1 · 3 = 3
        print(step)

The circuit diagrams of CS231n, lecture 4, for any JAX function: inputs on the left, then one
node for each operation. The forward pass fills in the values, backpropagation the gradients.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fnn import arguments
from fnn.backprop.computational_graph import Graph
from fnn.backprop.labels import argument_labels
from fnn.backprop.node import as_value, is_value
from fnn.backprop.source import call_user
from fnn.jaxpr import Program, program, trace


def graph(fun: Callable) -> Callable[..., Graph]:
    """The computational graph of a function: `graph(f)(*args, **kwargs)`.

    The function is traced and evaluated operation by operation, so that each node holds its
    value. Calls of jitted functions are taken apart; an fnn operation and a `custom_jvp` or
    `custom_vjp` function are one node each; `scan`, `cond`, `while_loop` and `checkpoint` are
    nodes that hold the graph of their body. Computations that the result doesn't depend on
    are left out.

    Args:
        fun: a function of pytrees that returns a pytree of arrays.

    Returns:
        A function of the same arguments that returns the `Graph`. Arrays and numbers in the
        arguments become inputs of the graph, named `x`, `params['hidden']['W']`, ...; all
        else (strings, functions, bools) is handed to `fun` as it is. Arguments that are
        `jax.ShapeDtypeStruct`s give the graph without values.

    Raises:
        TypeError: `fun` is no function, or returns something that is no array.

    >>> g = graph(lambda x, y, z: (x + y) * z)(-2.0, 5.0, -4.0).backprop()  # CS231n, lecture 4
    >>> [float(node.gradient) for node in g.inputs]
    [-4.0, -4.0, 3.0]
    """
    arguments.function("graph", "fun", fun, "a function to trace")

    @functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def of_arguments(*args, **kwargs) -> Graph:
        found = traced("graph", fun, args, kwargs)
        return Graph(
            found.program,
            found.name,
            found.input_labels,
            found.output_labels,
            None
            if any(isinstance(x, jax.ShapeDtypeStruct) for x in found.arrays)
            else found.arrays,
            found.out_tree,
        )

    return of_arguments


class Traced(NamedTuple):
    """A function, at given arguments, as a program of arrays.

    Fields:
        name: the function's, "f" if it has none.
        jaxpr: of the arrays and numbers among the arguments.
        program: the same as a flat list of equations.
        arrays: these, in order; or their types.
        input_labels, output_labels: what to call them: `params['hidden']['W']`, `loss[0]`.
        out_tree: the structure of what it returns.
    """

    name: str
    jaxpr: Any
    program: Program
    arrays: list
    input_labels: list[str]
    output_labels: list[str]
    out_tree: Any


def traced(where: str, fun: Callable, args: tuple, kwargs: dict) -> Traced:
    """Trace a function; `where` is the public function that does, for errors."""
    name = getattr(fun, "__name__", "f")
    name = name if name.isidentifier() else "f"
    for i, arg in enumerate(args):
        arguments.no_result(where, f"argument {i}", arg)
    args, kwargs = _in_order(fun, args, kwargs)
    given, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
    leaves = [leaf for _, leaf in given]
    is_input = [is_value(leaf) for leaf in leaves]
    labels = argument_labels(fun, [path for path, _ in given])
    out_paths: list = []
    out_tree = None

    def of_arrays(*arrays):
        nonlocal out_tree
        rest = iter(arrays)
        filled = [next(rest) if i else x for i, x in zip(is_input, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, filled)
        outs, out_tree = jax.tree_util.tree_flatten_with_path(call_user(fun, args, kwargs))
        out_paths[:] = [path for path, _ in outs]
        return [_checked_output(where, name + jax.tree_util.keystr(path), y) for path, y in outs]

    arrays = [as_value(x) for i, x in zip(is_input, leaves, strict=True) if i]
    closed = trace(of_arrays, arrays)
    return Traced(
        name,
        closed,
        program(closed),
        arrays,
        [label for i, label in zip(is_input, labels, strict=True) if i],
        [name + jax.tree_util.keystr(path) for path in out_paths],
        out_tree,
    )


def _in_order(fun, args, kwargs) -> tuple[tuple, dict]:
    """The arguments in the order of the signature, however they were given."""
    try:
        bound = inspect.signature(fun).bind(*args, **kwargs)
    except (TypeError, ValueError):  # no signature; or the call is wrong, as `fun` will say
        return args, kwargs
    return bound.args, bound.kwargs


def _checked_output(where, label, y):
    try:
        jax.typeof(y)
    except TypeError:
        raise TypeError(
            f"{where}: {label} is {y!r} of type {type(y).__name__}, which is no array; a program "
            "is of arrays, so return arrays."
        ) from None
    return y

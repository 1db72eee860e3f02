"""A JAX primitive a second time, computed by another program on some platforms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fnn.jaxpr import program
from fnn.meshes import same_varying_axes
from fnn.operation.experimental import register_experimental


def twin(
    original: Any, programs: Mapping[str, Callable], divided: Callable | None = None
) -> Primitive:
    """A primitive with the name, the parameters and the derivatives of one of JAX's.

    Its gradients, and what it does under vmap, are the original's with the twin in the place of
    the original. So all that is made from a twin by JAX's transforms is computed the new way. And
    as fnn knows primitives by their names, what it knows of the original it knows of the twin.

    Args:
        original: a primitive of two arrays with one result, linear in each of them.
        programs: by platform ("cpu", "cuda", ...), `(a, b, **params) -> result`. On platforms that
            aren't named, the original is what runs.
        divided: what runs on any platform where the compiler divides arrays among devices:
            `(a, b, **params) -> result`, or None where what runs elsewhere will do.
    """
    primitive = Primitive(original.name)

    def replaced(function: Callable) -> Callable:
        return with_primitive(function, original, primitive)

    def abstract(*avals, **params):
        return original.abstract_eval(*avals, **params)[0]

    @functools.partial(jax.jit, static_argnames="params")
    def compiled(a, b, params):
        return primitive.bind(a, b, **dict(params))

    def value(a, b, **params):
        return compiled(a, b, tuple(params.items()))

    def transpose_a(g, a, b, **params):
        product = functools.partial(original.bind, **params)
        pulled = lambda g, b: jax.linear_transpose(lambda a: product(a, b), a.aval)(g)[0]
        return replaced(pulled)(g, b)

    def transpose_b(g, a, b, **params):
        product = functools.partial(original.bind, **params)
        pulled = lambda g, a: jax.linear_transpose(lambda b: product(a, b), b.aval)(g)[0]
        return replaced(pulled)(g, a)

    def batch(axis, arrays, axes, **params):
        if all(a is None for a in axes):
            return primitive.bind(*arrays, **params), None
        product = functools.partial(original.bind, **params)
        vmapped = jax.vmap(product, axes, 0, axis_size=axis.size, spmd_axis_name=axis.spmd_name)
        return replaced(vmapped)(*arrays), 0

    def definition(a, b, **params):
        return original.bind(a, b, **params)

    primitive.def_impl(value)
    primitive.def_abstract_eval(abstract)
    ad.defbilinear(primitive, transpose_a, transpose_b)
    batching.fancy_primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, _lowering(definition, divided))
    for platform, run in programs.items():
        mlir.register_lowering(primitive, _lowering(run, divided), platform=platform)
    register_experimental(primitive, definition)
    return primitive


def _lowering(run: Callable, divided: Callable | None) -> Callable:
    """The rule by which JAX lowers a primitive of one result to what `run` does, or `divided`."""

    alone = mlir.lower_fun(run, multiple_results=False)
    if divided is None:
        return alone

    def either(a, b, **params):
        found = divided(a, b, **params)
        return run(a, b, **params) if found is None else found

    among = mlir.lower_fun(either, multiple_results=False)

    def lowered(context, *args, **params):
        return (among if _is_divided(context) else alone)(context, *args, **params)

    return lowered


def _is_divided(context: Any) -> bool:
    """Whether XLA divides the program that is being lowered; within `shard_map` JAX has done it."""
    axes = context.module_context.axis_context
    if hasattr(axes, "num_devices"):
        return axes.num_devices is not None and axes.num_devices > 1
    mesh = getattr(axes, "mesh", None)
    return mesh is not None and set(axes.manual_axes) != set(mesh.axis_names)


def bind_twin(primitive: Primitive, a, b, **params):
    """The primitive at two arrays, which under shard_map may vary over other devices."""
    a, b = same_varying_axes([a, b])
    return primitive.bind(a, b, **params)


def with_primitive(function: Callable, old: Any, new: Any) -> Callable:
    """The function, with one primitive in its program in the place of another."""

    def run(*args):
        closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
        flat = program(closed)
        values = flat.values(jax.tree.leaves(args))
        for equation in flat.equations:
            ins = [values[i] for i in equation.ins]
            if equation.primitive is old:
                with equation.context.manager:
                    outs = [new.bind(*ins, **equation.params)]
            else:
                outs = equation.bind(ins)
            for i, y in zip(equation.outs, outs, strict=True):
                values[i] = y
        return jax.tree.unflatten(jax.tree.structure(out), [values[i] for i in flat.outputs])

    return run

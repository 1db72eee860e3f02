"""A call of an operation: what is static in it, and what it computes; also under `vmap`.

`Call` is an operation at given static arguments, `MappedCall` the same under `vmap`. Both stand in
the parameters of an equation, and take and return flat lists of arrays.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax

from fnn.jaxpr import Equation, called_function
from fnn.operation.form import Rule


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation together with what is static in one use of it.

    handle: the operation's rule, held weakly (see `Rule.keeper`).
    in_tree: the structure of the positional arguments.
    static: the keyword arguments, by name.
    cache_key: what else keeps two uses apart that compare equal: the rule's version, and the kinds
        of the static values (2 == 2.0 == True, 0.0 == -0.0).
    """

    handle: weakref.ref[Rule]
    in_tree: Any
    static: tuple[tuple[str, Hashable], ...]
    cache_key: tuple[Hashable, ...] = ()

    def __repr__(self):
        return ", ".join(f"{k}={v}" for k, v in self.static) or "()"

    @property
    def rule(self) -> Rule:
        rule = self.handle()
        assert rule is not None, "kept by the `keeper` of the equation that this belongs to"
        return rule

    def look(self, leaves, types=None) -> None:
        """Let the operation's `look`, if it has one, see the values that are known.

        types: those of one example's arrays, where the leaves have further axes.
        """
        look = self.rule.look
        if look is None:
            return
        types = map(jax.typeof, leaves) if types is None else types
        known = [x if _is_known(x) else None for x in leaves]
        args = jax.tree.unflatten(self.in_tree, known)
        look(jax.tree.unflatten(self.in_tree, list(types)), *args, **dict(self.static))

    def primal(self, *leaves) -> list:
        """The value: the leaves of what the plain function returns."""
        args = jax.tree.unflatten(self.in_tree, leaves)
        return jax.tree.leaves(self.rule.definition(*args, **dict(self.static)))

    def vmapped(self, size: int, leaves, axes) -> list | None:
        """The leaves of all examples' values, if the operation says how they are one call."""
        function = self.rule.vmapped
        assert function is not None
        args, of_args = (jax.tree.unflatten(self.in_tree, x) for x in (leaves, axes))
        value = function(size, of_args, *args, **dict(self.static))
        return None if value is None else jax.tree.leaves(value)

    def leaf_names(self) -> list[str]:
        """For each array, the name of the argument that it belongs to."""
        trees = self.in_tree.children()
        names = self.rule.argument_names(len(trees))
        return [n for n, tree in zip(names, trees, strict=True) for _ in range(tree.num_leaves)]


@dataclasses.dataclass(frozen=True)
class Axis:
    """The axis that a `vmap` maps: how long it is and what it is called, if anything."""

    size: int
    name: Any
    spmd_name: Any

    @staticmethod
    def of(axis_data) -> Axis:
        return Axis(axis_data.size, axis_data.name, axis_data.spmd_name)

    def __repr__(self):
        return str(self.size)

    def vmap(self, function: Callable, in_axes, out_axes) -> Callable:
        return jax.vmap(
            function,
            in_axes,
            out_axes,
            axis_size=self.size,
            axis_name=self.name,
            spmd_axis_name=self.spmd_name,
        )


@dataclasses.dataclass(frozen=True)
class MappedCall:
    """A call under `vmap`: in_axes[i] is the mapped axis of the i-th array, None if shared."""

    call: Call | MappedCall
    in_axes: tuple[int | None, ...]
    axis: Axis

    def __repr__(self):
        return f"{self.call} vmapped over {self.axis}"

    @property
    def rule(self) -> Rule:
        return self.call.rule

    def look(self, leaves, types=None) -> None:
        types = map(jax.typeof, leaves) if types is None else types
        pairs = zip(types, self.in_axes, strict=True)
        self.call.look(leaves, [_without_axis(t, axis) for t, axis in pairs])

    def primal(self, *leaves) -> list:
        return self.axis.vmap(self.call.primal, self.in_axes, 0)(*leaves)


def call_of(equation: Equation) -> Call | MappedCall | None:
    """The call of an fnn operation that an equation is, if it is one."""
    call = equation.params.get("call")
    return call if isinstance(call, (Call, MappedCall)) else None


def operation_name(equation: Equation) -> str:
    """The fnn operation's name, a custom derivative's function's, or the primitive's."""
    call = call_of(equation)
    if call is not None:
        return call.rule.name
    return called_function(equation) or equation.name


def mapped_results(axis: Axis, function: Callable, in_axes, in_avals) -> Any:
    """For each result of a function under vmap, 0 if it depends on a mapped argument, else None.

    JAX itself is asked: the rule of a `custom_vmap` is told what is batched.
    """
    is_mapped: list[bool] = []

    @jax.custom_batching.custom_vmap
    def observe(*leaves):
        return leaves

    @observe.def_vmap
    def _(axis_size, in_batched, *leaves):
        is_mapped.extend(in_batched)
        return leaves, tuple(in_batched)

    structure: Any = None

    def observed(*args):
        nonlocal structure
        flat, structure = jax.tree.flatten(function(*args))
        return observe(*flat) if flat else ()

    jax.eval_shape(axis.vmap(observed, in_axes, 0), *in_avals)
    # JAX doesn't call the rule above where nothing is mapped.
    is_mapped = is_mapped or [False] * structure.num_leaves
    return jax.tree.unflatten(structure, [0 if m else None for m in is_mapped])


def _is_known(x) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def _without_axis(aval, axis):
    if axis is None:
        return aval
    shape = list(aval.shape)
    del shape[axis]
    return jax.ShapeDtypeStruct(tuple(shape), aval.dtype)

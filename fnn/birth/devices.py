"""The devices of a shard_map: what is inside it is run on the numbers of all of them.

A value inside is kept as one array, with an axis for each axis of the mesh before its own axes, of
length 1 where all devices along that one have the same (as the value's type says). So an entry of
it is a device and an entry there, and what goes between devices is an operation like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fnn.birth.entries import Index
from fnn.jaxpr import Equation
from fnn.meshes import varying_axes


class Devices:
    """Those of one shard_map.

    Attributes:
        axes: the names of the mesh's axes over which it runs.
    """

    def __init__(self, equation: Equation):
        params = equation.params
        self._mesh, self._checks = params["mesh"], params["check_vma"]
        manual = params["newly_manual_axes"]
        self.axes = tuple(name for name in self._mesh.axis_names if name in manual)
        self._in_specs, self._out_specs = params["in_specs"], params["out_specs"]
        self._applied: dict[int, Callable] = {}

    # ---------------------------------------------------------------------------------- running

    def mapped(
        self, function: Callable, ins: Sequence, outs: Sequence, in_specs: Any = None
    ) -> Callable:
        """A function of each device's arrays, as one of arrays of all devices.

        Args:
            function: of arrays; it returns a list of arrays.
            ins, outs: their types on a device.
            in_specs: how the arguments are divided, if they are arrays as outside.
        """
        axes = len(self.axes)

        def local(*xs):
            own = xs if in_specs is not None else [x.reshape(x.shape[axes:]) for x in xs]
            return [y.reshape((*[1] * axes, *y.shape)) for y in map(jnp.asarray, function(*own))]

        specs = tuple(map(self._spec, ins)) if in_specs is None else tuple(in_specs)
        return jax.jit(
            jax.shard_map(
                local,
                mesh=self._mesh,
                in_specs=specs,
                out_specs=list(map(self._spec, outs)),
                axis_names=set(self.axes),
                check_vma=self._checks,
            )
        )

    def enter(self, values: Sequence, avals: Sequence) -> list:
        """The arguments of what is inside, of those of the shard_map.

        Args:
            values: arrays as outside.
            avals: their types inside.
        """
        return self.mapped(lambda *xs: list(xs), avals, avals, self._in_specs)(*values)

    def apply(self, equation: Equation, ins: Sequence, outs: Sequence, values: Sequence) -> list:
        """The outputs of an equation inside.

        Args:
            equation: it.
            ins, outs: the types of its inputs and outputs.
            values: its inputs.
        """
        if id(equation) not in self._applied:
            # It is held on to, so that its id stays its own.
            run = self.mapped(lambda *xs, equation=equation: equation.bind(xs), ins, outs)
            self._applied[id(equation)] = run
        return self._applied[id(equation)](*values)

    def of_constant(self, x: Any, aval: Any) -> jax.Array:
        """What all devices have, as an array of all."""
        return jnp.broadcast_to(jnp.asarray(x), (*self._lengths(aval), *jnp.shape(x)))

    # ---------------------------------------------------------------------------------- entries

    def split(self, index: Index) -> tuple[Index, Index]:
        """An entry as a device and an entry there."""
        return index[: len(self.axes)], index[len(self.axes) :]

    def fitted(self, index: Index, aval: Any) -> Index:
        """The entry of a value of this type that stands for an entry of all devices."""
        device, own = self.split(index)
        pairs = zip(device, self._lengths(aval), strict=True)
        return (*(k if length > 1 else 0 for k, length in pairs), *own)

    def coordinates(self, index: Index, aval: Any) -> tuple[tuple[str, int], ...]:
        """The device of an entry: its place along each axis along which devices differ."""
        device, _ = self.split(index)
        varying = self._varying(aval)
        pairs = zip(self.axes, device, strict=True)
        return tuple((name, place) for name, place in pairs if name in varying)

    def of_output(self, output: int, index: Index, aval: Any) -> Index:
        """The entry inside of an entry of an output of the shard_map."""
        device, own = dict.fromkeys(self.axes, 0), list(index)
        for k, names in enumerate(map(_names, self._out_specs[output])):
            if names:
                block, own[k] = divmod(index[k], aval.shape[k])
                for name in reversed(names):
                    block, device[name] = divmod(block, self._mesh.shape[name])
        return self.fitted((*device.values(), *own), aval)

    def of_input(self, which: int, index: Index, aval: Any) -> Index:
        """The entry of an input of the shard_map of an entry inside."""
        device, own = self.split(index)
        places, outside = dict(zip(self.axes, device, strict=True)), list(own)
        for k, names in enumerate(map(_names, self._in_specs[which])):
            block = 0
            for name in names:
                block = block * self._mesh.shape[name] + places[name]
            outside[k] += block * aval.shape[k]
        return tuple(outside)

    # ----------------------------------------------------------------------------------- inside

    def _varying(self, aval: Any) -> frozenset[str]:
        """Along which axes devices may differ: without JAX's checks nobody knows."""
        return varying_axes(aval) if self._checks else frozenset(self.axes)

    def _lengths(self, aval: Any) -> tuple[int, ...]:
        varying = self._varying(aval)
        return tuple(self._mesh.shape[name] if name in varying else 1 for name in self.axes)

    def _spec(self, aval: Any) -> PartitionSpec:
        varying = self._varying(aval)
        return PartitionSpec(*(name if name in varying else None for name in self.axes))


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)

"""`Layout`: from a parameter's path and shape to how it is divided over a mesh of devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fnn import arguments
from fnn.readings import Kept
from fnn.sharding.placement import is_spread, put, put_own, put_rows
from fnn.sharding.shown import as_line, as_table
from fnn.sharding.specs import (
    checked_axes,
    checked_names,
    checked_rules,
    devices_along,
    fits,
    fits_any,
    is_spec,
    path_of,
    sharded,
    short,
    with_shapes,
)

P = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Layout:
    """How parameters, the optimiser's state and batches lie on a mesh of devices.

    It serves `fnn.fit`, `fnn.train_step` and `fnn.evaluate` as their argument `layout`, and says
    where the arrays lie for whatever else is computed: `layout.shardings(params)`. The numbers
    are those of one device, to rounding.

    Fields:
        mesh: of devices, `jax.make_mesh((4, 2), ("data", "model"))`. Its axes may be Explicit or
            Auto; what is placed by the layout lies on a mesh of the same devices whose axes are
            Auto (this field is that mesh), since the compiler divides the step's program.
        batch: the axes of the mesh over which a batch's examples are dealt.
        shard: the axes over which each parameter is divided, whatever the rules leave of it: along
            its longest axis that they divide evenly (of equal ones the last). A parameter that
            they divide nowhere lies whole on all devices.
        rules: pairs of a pattern and a `PartitionSpec`; the first whose pattern fits decides. A
            pattern fits the last keys of a parameter's path: "attend.q.W" and "q.*" fit
            "blocks.attend.q.W". The spec is of the array's last axes, as a layer's own: of the
            stacked weights of `repeat` the axis over the blocks comes before them.
        sequence: the axis over which the positions of a sequence are divided: the second axis of
            a batch's arrays, and those of `Attention`, whose keys and values go round.
        stages: the axis over whose devices the blocks of each `repeat` are divided.
        microbatches: how many parts of a batch go through the stages one after the other.
        blocks: the patterns of the parameters whose first axis is divided over the stages.

    Layouts combine by their fields: the examples over "data" with the parameters divided over it,
    and the heads over "model", is

        tensor_parallel(mesh, shard="data")

    Raises:
        TypeError, ValueError: (when it is made) a field isn't of its kind, or names an axis that
            the mesh doesn't have, or two uses of one axis contradict each other.
    """

    mesh: Mesh
    batch: tuple[str, ...] = ()
    shard: tuple[str, ...] = ()
    rules: tuple[tuple[str, PartitionSpec], ...] = ()
    sequence: str | None = None
    stages: str | None = None
    microbatches: int | None = None
    blocks: tuple[str, ...] = ("blocks.*",)

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise TypeError(
                "Layout: mesh must be a jax.sharding.Mesh, such as jax.make_mesh((8,), ('data',)), "
                f"but got {arguments.show(self.mesh)}."
            )
        kinds = (AxisType.Auto,) * len(self.mesh.axis_names)
        mesh = Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=kinds)
        object.__setattr__(self, "mesh", mesh)
        for name in ("batch", "shard"):
            object.__setattr__(self, name, checked_axes(mesh, name, getattr(self, name)))
        for name in ("sequence", "stages"):
            axis = getattr(self, name)
            if axis is not None and not isinstance(axis, str):
                raise TypeError(
                    f"Layout: {name} must be the name of an axis, but got {arguments.show(axis)}."
                )
            if axis is not None:
                checked_axes(mesh, name, axis)
        object.__setattr__(self, "blocks", checked_names("blocks", self.blocks))
        object.__setattr__(self, "rules", checked_rules(mesh, self.rules))
        if self.sequence and self.stages:
            raise ValueError("Layout: sequence and stages can't be used together.")
        if self.microbatches is not None:
            arguments.integer("Layout", "microbatches", self.microbatches, least=1)
            if self.stages is None:
                raise ValueError("Layout: microbatches is given, but stages isn't.")
        for axis in (self.sequence, self.stages):
            if axis is not None and axis in (*self.batch, *self.shard):
                what = "positions" if axis == self.sequence else "blocks"
                raise ValueError(
                    f"Layout: the axis {axis!r} divides the {what}, and can't divide "
                    "the examples or each parameter too."
                )

    # -------------------------------------------------------------------------- what lies where

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How a parameter is divided.

        Args:
            path: as `fnn.params.flatten` names it, "blocks.attend.q.W".
            shape: of the array.

        Raises:
            ValueError: a rule doesn't fit the shape: more axes than it has, or one that isn't
                divisible.
        """
        entries: list[Any] = [None] * len(shape)
        for pattern, given in self.rules:
            if fits(path, pattern):
                if len(given) > len(shape):
                    raise ValueError(
                        f"the layout's rule {pattern!r}: {given} is of {len(given)} axes, but "
                        f"{path} has shape {shape}."
                    )
                entries[len(shape) - len(given) :] = given
                break
        if self.stages and shape and fits_any(path, self.blocks):
            entries[0] = self.stages
        for i, entry in enumerate(entries):
            if entry is not None and shape[i] % self._count(entry):
                raise ValueError(
                    f"the layout divides axis {i} of {path}, of shape {shape}, over {entry!r}, "
                    f"which has {self._count(entry)} devices: {shape[i]} isn't divisible by that."
                )
        return sharded(entries, shape, self.shard, self.mesh)

    def specs(self, params: Any) -> Any:
        """The same of each array of a tree, a tree of `PartitionSpec`.

        Raises:
            ValueError: a rule doesn't fit the shape, or none of the rules fits a parameter.
        """
        params = with_shapes(params)
        paths = jax.tree_util.tree_leaves_with_path(params)
        names = [path_of(path) for path, _ in paths]
        given = [pattern for pattern, _ in self.rules]
        given += list(self.blocks) if self.stages else []
        if given and not any(fits_any(name, given) for name in names):
            raise ValueError(
                f"none of the layout's patterns {given} fits a parameter; the paths are {names}."
            )
        found = [self.spec(n, x.shape) for n, (_, x) in zip(names, paths, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(params), found)

    def shardings(self, tree: Any, params: Any = None) -> Any:
        """Where each array of a tree lies: a tree of `NamedSharding`.

        Args:
            tree: the parameters (arrays, or their types); or with `params` any tree that holds
                trees like them, as the optimiser's state does.
            params: the parameters.

        An array of such a tree lies as the parameter whose path its own path ends with, if it has
        the same shape. Others, such as Adafactor's rows, are divided over `shard` alone.
        """
        if params is None:
            return jax.tree.map(self._at, self.specs(tree), is_leaf=is_spec)
        params = with_shapes(params)
        specs = jax.tree.leaves(self.specs(params), is_leaf=is_spec)
        known = {}
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params), specs, strict=True
        ):
            known[path, leaf.shape] = spec

        def of(path, leaf):
            ends = ((path[i:], leaf.shape) for i in range(len(path) + 1))
            spec = next((known[end] for end in ends if end in known), None)
            if spec is None:
                spec = sharded([None] * leaf.ndim, leaf.shape, self.shard, self.mesh)
            return self._at(spec)

        return jax.tree_util.tree_map_with_path(of, with_shapes(tree))

    def of_state(self, state: Any) -> Any:
        """Where each array of a training state lies: its parameters, and all that is like them.

        The network's own state (running statistics) and what is a scalar lie whole on all devices.

        Args:
            state: a `fnn.State`, of arrays or of types. A checkpoint is restored onto these.
        """
        state = with_shapes(state)
        found = self.shardings(state, state.params)
        if hasattr(state, "model_state"):
            whole = jax.tree.map(lambda _: self.everywhere, state.model_state)
            found = found._replace(model_state=whole)
        return found

    def of_data(self, shape: tuple[int, ...]) -> NamedSharding:
        """How an array of examples lies of which batches are taken on the devices.

        Each device has all examples, so that whichever rows a batch has are there already; of a
        sequence's positions it has its own.
        """
        return self._at(short(self._of_positions(shape)))

    def of_batch(self, shape: tuple[int, ...]) -> NamedSharding:
        """How an array with the examples along its first axis is dealt out.

        An axis that can't be dealt out evenly isn't: a short last batch is on all devices whole.
        """
        entries = self._of_positions(shape)
        if shape and self.deals_out(shape[0]):
            entries[0] = self.batch
        return self._at(short(entries))

    def deals_out(self, size: int | None) -> bool:
        """Whether so many examples can be dealt out evenly."""
        return size is not None and bool(self.batch) and size % self._count(self.batch) == 0

    def ruled(self, params: Any, besides: tuple[str, ...] = ()) -> Any:
        """As `shardings`, but by the rules alone; parameters of the patterns `besides` by all."""
        by_rules = dataclasses.replace(self, shard=())

        def of(path, x):
            name = path_of(path)
            own = self if fits_any(name, besides) else by_rules
            return self._at(own.spec(name, x.shape))

        return jax.tree_util.tree_map_with_path(of, params)

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of what all devices have whole."""
        return self._at(P())

    # ------------------------------------------------------------------------------ arrays, placed

    def init(self, function: Callable, *args: Any) -> Any:
        """function(*args), compiled so that each device makes its own part of the parameters.

            params = layout.init(net.init, key, x)

        No array of the result is ever whole on one device (unless it isn't divided).

        Args:
            function: returns a tree of parameters.
            *args: what it takes.
        """
        arguments.function("Layout.init", "function", function, "a function that makes parameters")
        with _kept.found_or(_Made, function) as made:
            return made(self, args)

    def place(self, params: Any) -> Any:
        """Parameters that are there, or a training state, where the layout has them."""
        wanted = self.of_state(params) if hasattr(params, "opt_state") else self.shardings(params)
        return jax.tree.map(put, params, wanted)

    def place_batch(self, batch: Any) -> Any:
        """A batch dealt out to the devices.

        With several processes each gives its own part of the batch: the same number of examples
        each, in the order of the processes' devices in the mesh. (Of arrays that every process
        has whole: `take`.)
        """
        return jax.tree.map(lambda x: put_own(x, self._of_own(x)), batch)

    def place_data(self, data: Any) -> Any:
        """Arrays of examples, the same in every process, as `of_data` has them."""
        return jax.tree.map(lambda x: put(x, self.of_data(np.shape(x))), data)

    def take(self, data: Any, rows: np.ndarray) -> Any:
        """Some examples of arrays that every process has whole, as a batch dealt out.

        A process reads the rows of its own devices alone, from a memory-mapped file too.
        """
        return jax.tree.map(
            lambda x: put_rows(x, rows, self.of_batch((len(rows), *np.shape(x)[1:]))), data
        )

    def spread(self, tree: Any) -> Any:
        """Arrays copied whole to all devices; None and what is no array stays."""
        is_array = lambda x: hasattr(x, "dtype")
        return jax.tree.map(lambda x: put(x, self.everywhere) if is_array(x) else x, tree)

    # ------------------------------------------------------------------------------------ to read

    def bytes_per_device(self, tree: Any, params: Any = None) -> int:
        """How many bytes of a tree's arrays the fullest device holds; arguments as `shardings`."""
        shardings = self.of_state(tree) if hasattr(tree, "opt_state") else None
        if shardings is None:
            shardings = self.shardings(tree, params)
        sizes = [
            math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x, sharding in zip(
                jax.tree.leaves(with_shapes(tree)), jax.tree.leaves(shardings), strict=True
            )
        ]
        return sum(sizes)

    def show(self, params: Any) -> str:
        """A table: each parameter's path, shape, how it is divided, and its bytes on a device."""
        return as_table(with_shapes(params), self.shardings(params))

    def __repr__(self) -> str:
        return as_line(self)

    # ------------------------------------------------------------------------------------ helpers

    def _at(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def _of_positions(self, shape: tuple[int, ...]) -> list[Any]:
        """The entries of a spec that divides the second axis, if the layout divides positions."""
        entries: list[Any] = [None] * len(shape)
        if len(shape) > 1 and self.sequence and shape[1] % self._count(self.sequence) == 0:
            entries[1] = self.sequence
        return entries

    def _of_own(self, x: Any) -> NamedSharding:
        shape = np.shape(x)
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return self.of_batch(shape)
        if not is_spread(self.mesh) or not shape:
            return self.of_batch(shape)
        count, own = self._count(self.batch), self._own_count()
        if shape[0] % own:
            raise ValueError(
                f"this process gives {shape[0]} examples of a batch, which can't be dealt out "
                f"evenly to its {own} of the {count} parts of {self.batch}: give batches of "
                "another size, or leave the last one out."
            )
        return self.of_batch((shape[0] * count // own, *shape[1:]))

    def _own_count(self) -> int:
        """Of the parts of a batch, how many this process's devices have."""
        count = self._count(self.batch)
        at = self._at(P(self.batch or None))
        return len({str(index) for index in at.addressable_devices_indices_map((count,)).values()})

    def _count(self, axes: Any) -> int:
        return devices_along(self.mesh, axes)


class _Made:
    """The programs by which a function makes parameters on a layout.

    Args:
        function: returns it.
    """

    def __init__(self, function: Callable[[], Callable]):
        traces: list[None] = []
        self.traces = traces
        self._programs: dict[Any, Callable] = {}

        def run(*args):
            traces.append(None)
            return function()(*args)

        self._run = run

    def __call__(self, layout: Layout, args: tuple) -> Any:
        leaves, tree = jax.tree.flatten(args)
        kind = (layout, tree, *((np.shape(x), getattr(x, "dtype", type(x))) for x in leaves))
        if kind not in self._programs:
            wanted = layout.shardings(jax.eval_shape(self._run, *args))
            self._programs[kind] = jax.jit(self._run, out_shardings=wanted)
        return self._programs[kind](*args)


_kept: Kept[_Made] = Kept()

"""`Layout`: from a parameter's path and shape to how it is divided over a mesh of devices."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fnn import arguments
from fnn.sharding.placement import is_spread, put, put_own, put_rows

P = PartitionSpec

# A rule for each layer of a transformer, on the axis "model": what makes the hidden units or the
# heads is divided by its outputs, what reads them by its inputs, so that one sum over the devices
# ends each part (Shoeybi et al., arXiv:1909.08053).
TRANSFORMER: Mapping[str, PartitionSpec] = {
    **{f"{name}.W": P("model", None) for name in ("q", "k", "v", "gate", "up", "hidden")},
    **{f"{name}.b": P("model") for name in ("q", "k", "v", "gate", "up", "hidden")},
    **{f"{name}.W": P(None, "model") for name in ("out", "down", "mlp.output")},
}


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
            object.__setattr__(self, name, self._axes(name, getattr(self, name)))
        for name in ("sequence", "stages"):
            if getattr(self, name) is not None:
                self._axes(name, getattr(self, name))
        object.__setattr__(self, "blocks", _names(self.blocks))
        rules = self.rules.items() if isinstance(self.rules, Mapping) else self.rules
        object.__setattr__(self, "rules", tuple(self._rule(*rule) for rule in rules))
        if self.sequence and self.stages:
            raise ValueError("Layout: sequence and stages can't be used together.")
        if self.microbatches is not None:
            arguments.integer("Layout", "microbatches", self.microbatches, least=1)
            if self.stages is None:
                raise ValueError("Layout: microbatches is given, but stages isn't.")
        for axis in (self.sequence, self.stages):
            if axis is not None and axis in (*self.batch, *self.shard):
                raise ValueError(
                    f"Layout: the axis {axis!r} divides the {_what(self, axis)}, and can't divide "
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
            if _fits(path, pattern):
                if len(given) > len(shape):
                    raise ValueError(
                        f"the layout's rule {pattern!r}: {given} is of {len(given)} axes, but "
                        f"{path} has shape {shape}."
                    )
                entries[len(shape) - len(given) :] = given
                break
        if self.stages and shape and any(_fits(path, pattern) for pattern in self.blocks):
            entries[0] = self.stages
        for i, entry in enumerate(entries):
            if entry is not None and shape[i] % self._count(entry):
                raise ValueError(
                    f"the layout divides axis {i} of {path}, of shape {shape}, over {entry!r}, "
                    f"which has {self._count(entry)} devices: {shape[i]} isn't divisible by that."
                )
        return self._sharded(entries, shape)

    def specs(self, params: Any) -> Any:
        """The same of each array of a tree, a tree of `PartitionSpec`.

        Raises:
            ValueError: a rule doesn't fit the shape, or none of the rules fits a parameter.
        """
        paths = jax.tree_util.tree_leaves_with_path(params)
        names = [_path(path) for path, _ in paths]
        given = [pattern for pattern, _ in self.rules]
        given += list(self.blocks) if self.stages else []
        if given and not any(_fits(name, pattern) for name in names for pattern in given):
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
            return jax.tree.map(self._at, self.specs(tree), is_leaf=_is_spec)
        specs = jax.tree.leaves(self.specs(params), is_leaf=_is_spec)
        known = {}
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(params), specs, strict=True
        ):
            known[path, leaf.shape] = spec

        def of(path, leaf):
            ends = ((path[i:], leaf.shape) for i in range(len(path) + 1))
            spec = next((known[end] for end in ends if end in known), None)
            return self._at(
                spec if spec is not None else self._sharded([None] * leaf.ndim, leaf.shape)
            )

        return jax.tree_util.tree_map_with_path(of, _with_shapes(tree))

    def of_state(self, state: Any) -> Any:
        """Where each array of a training state lies: its parameters, and all that is like them.

        The network's own state (running statistics) and what is a scalar lie whole on all devices.

        Args:
            state: a `fnn.State`, of arrays or of types. A checkpoint is restored onto these.
        """
        state = _with_shapes(state)
        found = self.shardings(state, state.params)
        if hasattr(state, "model_state"):
            whole = jax.tree.map(lambda _: self.everywhere, state.model_state)
            found = found._replace(model_state=whole)
        return found

    def of_batch(self, shape: tuple[int, ...]) -> NamedSharding:
        """How an array with the examples along its first axis is dealt out.

        An axis that can't be dealt out evenly isn't: a short last batch is on all devices whole.
        """
        entries: list[Any] = [None] * len(shape)
        if shape and self.deals_out(shape[0]):
            entries[0] = self.batch
        if len(shape) > 1 and self.sequence and shape[1] % self._count(self.sequence) == 0:
            entries[1] = self.sequence
        return self._at(_short_spec(entries))

    def deals_out(self, size: int | None) -> bool:
        """Whether so many examples can be dealt out evenly."""
        return size is not None and bool(self.batch) and size % self._count(self.batch) == 0

    def ruled(self, params: Any, besides: tuple[str, ...] = ()) -> Any:
        """As `shardings`, but by the rules alone; parameters of the patterns `besides` by all."""
        by_rules = dataclasses.replace(self, shard=())

        def of(path, x):
            name = _path(path)
            own = self if any(_fits(name, pattern) for pattern in besides) else by_rules
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
        made = jax.jit(function, out_shardings=self.shardings(jax.eval_shape(function, *args)))
        return made(*args)

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
                jax.tree.leaves(_with_shapes(tree)), jax.tree.leaves(shardings), strict=True
            )
        ]
        return sum(sizes)

    def show(self, params: Any) -> str:
        """A table: each parameter's path, shape, how it is divided, and its bytes on a device."""
        rows = [("parameter", "shape", "divided", "bytes a device")]
        shardings = jax.tree.leaves(self.shardings(params))
        for (path, x), at in zip(
            jax.tree_util.tree_leaves_with_path(params), shardings, strict=True
        ):
            size = math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize
            rows.append((_path(path), str(tuple(x.shape)), _short(at.spec), str(size)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())
        shown = [f"mesh of {sizes}"]
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if value not in (None, ()) and value != field.default:
                shown.append(f"{field.name}={dict(value) if field.name == 'rules' else value!r}")
        return f"Layout({', '.join(shown)})"

    # ------------------------------------------------------------------------------------ helpers

    def _at(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

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

    def _sharded(self, entries: list[Any], shape: tuple[int, ...]) -> PartitionSpec:
        """With `shard` on the longest axis that is still whole and divisible."""
        used = {name for entry in entries if entry is not None for name in _names(entry)}
        axes = tuple(name for name in self.shard if name not in used)
        count = self._count(axes)
        if axes and count > 1:
            free = [
                (size, i)
                for i, (size, entry) in enumerate(zip(shape, entries, strict=True))
                if entry is None and size and size % count == 0
            ]
            if free:
                entries[max(free)[1]] = axes
        return _short_spec(entries)

    def _count(self, axes: Any) -> int:
        return math.prod(self.mesh.shape[name] for name in _names(axes))

    def _axes(self, field: str, value: Any) -> tuple[str, ...]:
        names = _names(value)
        for name in names:
            if name not in self.mesh.shape:
                raise ValueError(
                    f"Layout: {field} names the axis {name!r}, but the mesh's axes are "
                    f"{tuple(self.mesh.shape)}."
                )
        return names

    def _rule(self, pattern: Any, spec: Any) -> tuple[str, PartitionSpec]:
        if not isinstance(pattern, str) or not isinstance(spec, PartitionSpec):
            raise TypeError(
                "Layout: a rule is a pair of a pattern of paths and a jax.sharding.PartitionSpec, "
                f"but got {arguments.show(pattern)} and {arguments.show(spec)}."
            )
        for entry in spec:
            if entry is not None:
                self._axes(f"the rule {pattern!r}", entry)
        return pattern, spec


# ------------------------------------------------------------------------------ the usual layouts


def data_parallel(mesh: Mesh, *, batch: str | Iterable[str] | None = None) -> Layout:
    """Each device has all parameters, and its share of every batch.

    A step sums the gradients over the devices once (all-reduce): 2 (n − 1)/n of the parameters'
    bytes are sent by each of n devices.

    Args:
        mesh: of devices.
        batch: the axes over which the examples are dealt; all of the mesh's unless given.

    Raises:
        TypeError, ValueError: as `Layout`.
    """
    _check_mesh("data_parallel", mesh)
    return Layout(mesh, batch=_or_all(mesh, batch))


def fully_sharded(mesh: Mesh, *, batch: str | Iterable[str] | None = None) -> Layout:
    """Each device has its share of the parameters, of the optimiser's state and of every batch.

    A parameter is put together where it is used (all-gather), and its gradient summed to where it
    lies.

    Args:
        mesh: of devices.
        batch: the axes over which the examples are dealt and the parameters divided; all of the
            mesh's unless given.

    Raises:
        TypeError, ValueError: as `Layout`.

    Rajbhandari et al., "ZeRO", arXiv:1910.02054; Zhao et al., "PyTorch FSDP", arXiv:2304.11277.
    """
    _check_mesh("fully_sharded", mesh)
    axes = _or_all(mesh, batch)
    return Layout(mesh, batch=axes, shard=axes)


def tensor_parallel(
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    *,
    shard: str | Iterable[str] = (),
) -> Layout:
    """Weights are divided by rules; examples are dealt over the axes that no rule names.

        tensor_parallel(jax.make_mesh((4, 2), ("data", "model")))
        tensor_parallel(mesh, {"hidden.W": P("model", None), "output.W": P(None, "model")})

    Args:
        mesh: of devices.
        rules: from a pattern of paths to a spec, in order; see `Layout`. Unless given
            `TRANSFORMER`, which fits the layers Attention, MLP and GatedMLP, on the axis "model".
        shard: axes over which what the rules leave whole is divided too (see `fully_sharded`).

    Raises:
        TypeError, ValueError: as `Layout`.

    Shoeybi et al., "Megatron-LM", arXiv:1909.08053.
    """
    _check_mesh("tensor_parallel", mesh)
    given = TRANSFORMER if rules is None else rules
    if not isinstance(given, Mapping):
        raise TypeError(
            "tensor_parallel: rules must be a dict from patterns of paths to PartitionSpecs, but "
            f"got {arguments.show(given)}."
        )
    specs = [spec for spec in given.values() if isinstance(spec, PartitionSpec)]
    named = {name for spec in specs for entry in spec if entry for name in _names(entry)}
    rest = tuple(name for name in mesh.shape if name not in named)
    return Layout(mesh, batch=rest, shard=_names(shard), rules=tuple(given.items()))


def sequence_parallel(
    mesh: Mesh, *, axis: str = "sequence", shard: str | Iterable[str] = ()
) -> Layout:
    """The positions of each sequence are divided; examples are dealt over the mesh's other axes.

    Each device has some positions of each sequence. `Attention` passes keys and values round the
    devices of the axis, and computes with what it has (see `fnn.ops.ring_attention`). The loss
    must take a `mode`, by which layers are told; `fnn.supervised` writes such a loss.

    Args:
        mesh: of devices.
        axis: over which positions are divided; their number must be divisible by its size.
        shard: axes over which each parameter is divided (see `fully_sharded`).

    Raises:
        TypeError, ValueError: as `Layout`.

    Liu et al., "Ring attention with blockwise transformers", arXiv:2310.01889.
    """
    _check_mesh("sequence_parallel", mesh)
    rest = tuple(name for name in mesh.shape if name != axis)
    return Layout(mesh, batch=rest, shard=_names(shard), sequence=axis)


def pipeline_parallel(
    mesh: Mesh,
    *,
    microbatches: int,
    axis: str = "stage",
    blocks: str | Iterable[str] = "blocks.*",
    shard: str | Iterable[str] = (),
) -> Layout:
    """The blocks of `repeat` are divided into stages; examples are dealt over the other axes.

    A batch goes through the stages in microbatches: while one is in the second stage, the next is
    in the first. Of S stages and M microbatches, each device waits (S − 1)/(M + S − 1) of the
    time. The loss must take a `mode`, as for `sequence_parallel`.

    Args:
        mesh: of devices.
        microbatches: into how many parts a batch is cut, a divisor of its size.
        axis: over whose devices the blocks are divided.
        blocks: the patterns of the stacked parameters' paths.
        shard: axes over which each parameter is divided too (see `fully_sharded`).

    Raises:
        TypeError, ValueError: as `Layout`.

    Huang et al., "GPipe", arXiv:1811.06965.
    """
    _check_mesh("pipeline_parallel", mesh)
    rest = tuple(name for name in mesh.shape if name != axis)
    return Layout(
        mesh,
        batch=rest,
        shard=_names(shard),
        stages=axis,
        microbatches=microbatches,
        blocks=_names(blocks),
    )


# ------------------------------------------------------------------------------------------ helpers


def _check_mesh(where: str, mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"{where}: mesh must be a jax.sharding.Mesh, such as jax.make_mesh((8,), ('data',)), "
            f"but got {arguments.show(mesh)}."
        )


def _or_all(mesh: Mesh, axes: str | Iterable[str] | None) -> tuple[str, ...]:
    return tuple(mesh.shape) if axes is None else _names(axes)


def _names(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _fits(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def _path(keys: tuple) -> str:
    return ".".join(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _with_shapes(tree: Any) -> Any:
    """The types of a tree's arrays, and numbers as arrays of one."""
    of = lambda x: x if hasattr(x, "dtype") else np.asarray(x)
    return jax.tree.map(of, tree)


def _short_spec(entries: list[Any]) -> PartitionSpec:
    """Without the axes at the end that aren't divided."""
    entries = list(entries)
    while entries and entries[-1] is None:
        entries.pop()
    one = lambda entry: entry[0] if isinstance(entry, tuple) and len(entry) == 1 else entry
    return P(*map(one, entries))


def _short(spec: PartitionSpec) -> str:
    return f"P({', '.join(map(repr, spec))})"


def _what(layout: Layout, name: str) -> str:
    return "positions" if name == layout.sequence else "blocks"

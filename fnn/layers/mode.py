"""How a layer is told whether it trains: a `Mode`, handed to every call.

    y = net(params, x)                                      evaluation, `EVALUATE`
    y = net(params, x, mode=training(key))                  training
    y = net(params, x, mode=training(key, axis="batch"))    ... inside vmap(..., axis_name="batch")

It is an argument like any other: no flag is set on a layer, and nothing is global.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fnn import arguments, text
from fnn.meshes import mesh_here


class Across(NamedTuple):
    """Over which axes of a mesh of devices a network's insides are divided; see `fnn.sharding`.

    Fields:
        mesh: the mesh.
        sequence: the axis over which the positions of `Attention` are divided, or None.
        stages: the axis over which the blocks of `repeat` are divided, or None.
        microbatches: how many parts of a batch go through the stages one after the other.
        pinned: whether `repeat` holds what goes from block to block where the examples lie, so
            that the compiler brings a block's weights to the examples, and not the other way
            round. The axis over the batch must be mapped with `vmap(..., spmd_axis_name=...)`.
    """

    mesh: Mesh
    sequence: str | None = None
    stages: str | None = None
    microbatches: int = 1
    pinned: bool = False

    def pin(self, x: Any) -> Any:
        """An example's array, held where its example is."""
        if not self.pinned or not x.ndim:
            return x
        free = PartitionSpec.UNCONSTRAINED
        spec = PartitionSpec(*[free] * x.ndim)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh_here(self.mesh), spec))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["key"], meta_fields=["train", "axis", "across"]
)
@dataclasses.dataclass(frozen=True)
class Mode:
    """What a layer needs to know of the moment; a pytree whose one leaf is the key.

    Fields:
        train: whether this is training. Dropout and batch statistics depend on it.
        key: what a layer draws random numbers from; None where there is none.
        axis: the name of the mapped axis (or axes) that runs over the batch, as given to `vmap`
            as `axis_name`; None where one example is on its own.
        across: how the network's insides are divided over devices; None where they aren't.
    """

    train: bool = False
    key: Any = None
    axis: str | tuple[str, ...] | None = None
    across: Across | None = None

    def __repr__(self) -> str:
        fields = {"train": self.train, "key": self.key, "axis": self.axis}
        if self.across is not None:
            fields["across"] = self.across
        return text.of_fields("Mode", **fields)


EVALUATE = Mode()


def training(key: chex.PRNGKey | None, axis: str | tuple[str, ...] | None = None) -> Mode:
    """The mode of a training step.

    Args:
        key: for one example, to draw from. None for a network that draws nothing.
        axis: the name of the axis over the batch, for layers with batch statistics.

    Raises:
        TypeError, ValueError: key is no key, or axis no name of an axis.
    """
    if key is not None:
        key = arguments.key("training", "key", key)
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"training: axis must be the name of a mapped axis such as 'batch' (or a tuple of "
            f"names), but got {arguments.show(axis)}."
        )
    return Mode(True, key, axis)

"""The usual layouts: data-, fully sharded, tensor-, sequence- and pipeline-parallel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from fnn import arguments
from fnn.sharding.layout import Layout
from fnn.sharding.specs import checked_names, names_of

P = PartitionSpec

# A rule for each layer of a transformer, on the axis "model": what makes the hidden units or the
# heads is divided by its outputs, what reads them by its inputs, so that one sum over the devices
# ends each part (Shoeybi et al., arXiv:1909.08053).
TRANSFORMER: Mapping[str, PartitionSpec] = {
    **{f"{name}.W": P("model", None) for name in ("q", "k", "v", "gate", "up", "hidden")},
    **{f"{name}.b": P("model") for name in ("q", "k", "v", "gate", "up", "hidden")},
    **{f"{name}.W": P(None, "model") for name in ("out", "down", "mlp.output")},
}


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
    named = {name for spec in specs for entry in spec if entry for name in names_of(entry)}
    rest = tuple(name for name in mesh.shape if name not in named)
    return Layout(mesh, batch=rest, shard=checked_names("shard", shard), rules=tuple(given.items()))


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
    _check_axis("sequence_parallel", axis)
    rest = tuple(name for name in mesh.shape if name != axis)
    return Layout(mesh, batch=rest, shard=checked_names("shard", shard), sequence=axis)


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
    _check_axis("pipeline_parallel", axis)
    rest = tuple(name for name in mesh.shape if name != axis)
    return Layout(
        mesh,
        batch=rest,
        shard=checked_names("shard", shard),
        stages=axis,
        microbatches=microbatches,
        blocks=checked_names("blocks", blocks),
    )


def _check_mesh(where: str, mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"{where}: mesh must be a jax.sharding.Mesh, such as jax.make_mesh((8,), ('data',)), "
            f"but got {arguments.show(mesh)}."
        )


def _check_axis(where: str, axis: Any) -> None:
    if not isinstance(axis, str):
        raise TypeError(
            f"{where}: axis must be the name of an axis of the mesh, but got "
            f"{arguments.show(axis)}."
        )


def _or_all(mesh: Mesh, axes: str | Iterable[str] | None) -> tuple[str, ...]:
    return tuple(mesh.shape) if axes is None else checked_names("batch", axes)

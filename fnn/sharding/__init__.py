"""Layouts: how parameters, the optimiser's state and batches are divided over a mesh of devices.

    mesh = jax.make_mesh((8,), ("data",))
    layout = fnn.sharding.fully_sharded(mesh)
    params = layout.init(net.init, key, x)
    result = fnn.fit(loss, params, data, optimizer, epochs=5, key=key, layout=layout)

data_parallel       each device has all parameters, and its share of every batch
fully_sharded       and its share of the parameters and of the optimiser's state
tensor_parallel     a layer's weight is divided by rules, from a parameter's path
sequence_parallel   a sequence's positions are divided; attention passes keys and values round
pipeline_parallel   a network's repeated blocks are divided, and microbatches go through them
Layout              what each of them makes; to combine them
collectives         what a compiled program sends between devices

A layout says where arrays lie. The programs are JAX's: its compiler divides the operations, and
puts in what must be sent.

Each module imports only from those above it:

    traffic     the collectives of a compiled program
    placement   arrays onto a mesh, of one process or of many
    specs       paths of parameters, the patterns that fit them, and specs of divided arrays
    shown       layouts as text
    layout      `Layout`
    usual       the functions that make the usual ones
"""

from fnn.sharding.layout import Layout
from fnn.sharding.traffic import Collective, collectives
from fnn.sharding.usual import (
    TRANSFORMER,
    data_parallel,
    fully_sharded,
    pipeline_parallel,
    sequence_parallel,
    tensor_parallel,
)

__all__ = [
    "TRANSFORMER",
    "Collective",
    "Layout",
    "collectives",
    "data_parallel",
    "fully_sharded",
    "pipeline_parallel",
    "sequence_parallel",
    "tensor_parallel",
]

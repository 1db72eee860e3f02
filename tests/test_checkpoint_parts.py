"""Arrays in parts: read in another division than they were written in, and checked part by part."""

import zlib

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fnn.train import checkpoint_parts as parts
from fnn.train.result import _to_device, _to_host
from fnn.train.together import in_all, in_all_or_none

MESH = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
NUMBERS = np.arange(48.0).reshape(8, 6)
SPECS = [P(), P("a"), P("b", None), P("a", "b"), P(None, "b"), P(("b", "a"))]


def divided(spec, numbers=NUMBERS):
    return jax.device_put(numbers, NamedSharding(MESH, spec))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_checksum_of_each_part(spec):
    x = divided(spec)
    (found,) = parts.checksums([x])
    assert parts.are_intact(NUMBERS, found)
    pieces = [NUMBERS[tuple(slice(*b) for b in bounds)] for bounds, _ in found]
    assert sum(piece.size for piece in pieces) == NUMBERS.size  # each number in one part
    assert len(found) == len({str(shard.index) for shard in x.addressable_shards})
    assert [crc for _, crc in found] == [zlib.crc32(piece.tobytes()) for piece in pieces]
    other = NUMBERS.copy()
    other[5, 4] += 1
    assert not parts.are_intact(other, found)


@pytest.mark.parametrize("written", SPECS, ids=str)
def test_read_in_another_division(written):
    (found,) = parts.checksums([divided(written)])
    for spec in SPECS:
        at = NamedSharding(MESH, spec)
        read = []

        def read_part(slices):
            read.append(slices)  # noqa: B023
            return NUMBERS[slices]

        x = parts.read_onto(at, NUMBERS.shape, found, read_part)
        assert x.sharding == at and (np.asarray(x) == NUMBERS).all()
        assert len(read) == len(found)  # each part once
        other = NUMBERS.copy()
        other[5, 4] += 1
        with pytest.raises(parts.WrongNumbers):
            parts.read_onto(at, NUMBERS.shape, found, lambda slices: other[slices])  # noqa: B023
    unknown = [(parts.whole(NUMBERS.shape), None)]
    x = parts.read_onto(NamedSharding(MESH, P("a")), NUMBERS.shape, unknown, NUMBERS.__getitem__)
    assert (np.asarray(x) == NUMBERS).all()


def test_a_copy_on_the_host_comes_back_where_it_lay():
    tree = {"a": divided(P("a", "b")), "b": divided(P()), "new": jax.numpy.ones(3)}
    found = _to_device(jax.tree.map(_to_host, tree))
    for name, x in tree.items():
        assert (np.asarray(found[name]) == np.asarray(x)).all()
        assert found[name].sharding == x.sharding and found[name].committed == x.committed


def test_one_process_is_all():
    assert in_all(3).tolist() == [3]
    assert in_all_or_none(lambda: 5, ValueError) == 5
    with pytest.raises(ValueError, match="^no$"):
        in_all_or_none(lambda: _raise(ValueError("no")), ValueError)


def _raise(error):
    raise error

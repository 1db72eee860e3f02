"""What a compiled program sends between devices: its collectives, read off its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from fnn import arguments

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

# Of an asynchronous one the end is left out: the start tells all.
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TIMES = re.compile(r'"known_trip_count":\{"n":"?(\d+)"?\}')
_NUMBERS = re.compile(r"\b(?:replica_count|num_partitions)=(\d+)")
_LIST_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_SHAPE_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


class Collective(NamedTuple):
    """One collective of a program.

    Fields:
        kind: "all-gather", "all-reduce", "all-to-all", "collective-permute" or "reduce-scatter".
        size: the bytes of its result, on one device.
        devices: how many devices take part in it together.
        times: how often it runs: the product of the loops around it.
    """

    kind: str
    size: int
    devices: int
    times: int

    @property
    def sent(self) -> float:
        """The bytes that each device sends when it runs once, by the ring algorithms.

        With n devices: (n − 1)/n of what is gathered, of what is exchanged, or of what is
        scattered (n times the result); twice that of what is reduced by all.
        """
        n = self.devices
        if self.kind == "collective-permute":
            return self.size
        if self.kind == "reduce-scatter":
            return self.size * (n - 1)
        return (2 if self.kind == "all-reduce" else 1) * self.size * (n - 1) / n


def collectives(compiled: Any) -> list[Collective]:
    """The collectives of a compiled program, those inside loops with how often they run.

    Args:
        compiled: of `jax.jit(f).lower(*args).compile()`; or its text, `compiled.as_text()`.

    Returns:
        A list of `Collective`. Where several arrays are sent together it is one, of all bytes.
        A loop whose number of turns the compiler doesn't know counts as one turn; of branches
        all are listed.

    Raises:
        TypeError: it is neither.

    >>> mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    >>> x = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=at)
    >>> collectives(jax.jit(lambda x: jnp.sum(x, axis=0)).lower(x).compile())
    [Collective(kind='all-reduce', size=32, devices=2, times=1)]
    """
    if not isinstance(compiled, str) and not hasattr(compiled, "as_text"):
        raise TypeError(
            "collectives: compiled must be a compiled program, jax.jit(f).lower(*args).compile(), "
            f"or its text, but got {arguments.show(compiled)}."
        )
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    everyone = math.prod(int(n) for n in _NUMBERS.findall(text.split("\n", 1)[0]))
    found = []
    for line, times in instructions(text):
        match = _COLLECTIVE.search(line)
        if match:
            size = _size(match[2], match[1], bool(match[3]))
            found.append(Collective(match[2], size, _devices(line, everyone), times))
    return found


def instructions(text: str) -> Iterator[tuple[str, int]]:
    """The lines of a program's text that are run, and how often; those of fusions too."""
    own: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        begin = _COMPUTATION.match(line)
        if begin:
            name = begin[1]
            own[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            own[name].append(line)

    def walk(name: str, times: int) -> Iterator[tuple[str, int]]:
        for line in own.get(name, ()):
            yield line, times
            turns = _TIMES.search(line)
            count = int(turns[1]) if turns and " while(" in line else 1
            called = [] if _COLLECTIVE.search(line) else _CALLS.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"[\w.-]+", branches)
            for callee in called:
                yield from walk(callee, times * count)

    return walk(entry, 1)


def _size(kind: str, result: str, starts: bool) -> int:
    """The bytes of a collective's result, of its type as text."""
    arrays = _ARRAY.findall(result)
    if starts and kind in ("all-gather", "collective-permute"):
        # Operands and results; and of a permutation perhaps two numbers more, of the device's own.
        if kind == "collective-permute" and len(arrays) > 2 and arrays[-2:] == [("u32", "")] * 2:
            arrays = arrays[:-2]
        arrays = arrays[len(arrays) // 2 :]
    return sum(_bytes(dtype, dims) for dtype, dims in arrays)


def _devices(line: str, everyone: int) -> int:
    """How many devices a collective's line says that each group has."""
    if "replica_groups={}" in line:
        return everyone
    listed, shaped, named = (
        form.search(line) for form in (_LIST_GROUPS, _SHAPE_GROUPS, _MESH_GROUPS)
    )
    if listed:
        return len(listed[1].split(","))
    if shaped:
        return int(shaped[2])
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", named[2]))
    return 2  # of a permutation: who sends, and who gets


def _bytes(dtype: str, dims: str) -> int:
    count = math.prod(int(d) for d in dims.split(",") if d)
    if dtype == "pred":
        return count
    bits = re.search(r"\d+", dtype)
    return count * int(bits[0]) // 8 if bits else 0

"""`memory`: what a backward pass keeps, part by part, and what the compiled program takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnn import arguments, text
from fnn.backprop import sweep
from fnn.backprop.primitives import rule_of
from fnn.backprop.trace import Traced, traced
from fnn.footprint.compiled import Compiled, compiled_memory
from fnn.footprint.kept import Kept, Residuals, needed_of, residuals

_ROWS = 12


def memory(fun: Callable, *, compiled: bool = True) -> Callable[..., Memory]:
    """How much memory a function's gradient takes, and what for: `memory(f)(*args, **kwargs)`.

        print(fnn.memory(loss)(params, batch))

    Nothing is computed: the function is traced and its gradient compiled, but not run. So it also
    tells of what wouldn't fit.

    Args:
        fun: a function of pytrees of arrays that returns a pytree of arrays.
        compiled: whether to compile the program, which takes its time.

    Returns:
        A function of the same arguments, arrays or `jax.ShapeDtypeStruct`s, that returns a
        `Memory`. It is about the gradient of the sum of all real outputs with respect to all
        real and complex arguments, by fnn's rules (`fnn.vjp`); if there are none, about the
        function alone.

    What is kept for the backward pass is read off the traced program, before XLA: each value that
    crosses from the forward half to the backward half (`fnn.vjp`'s residuals), by what made it. XLA
    may keep less (it computes again what is cheap, as broadcasts are) or something else in its
    place; `temporaries` and `peak` are its own numbers for the whole program.

    Raises:
        TypeError: `fun` is no function or returns no arrays.
        ValueError: (when called) it can't be differentiated backwards, as a `while_loop` whose
            number of steps isn't known can't.
    """
    arguments.function("memory", "fun", fun, "a function to trace")
    arguments.flag("memory", "compiled", compiled)

    @functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def of_arguments(*args: Any, **kwargs: Any) -> Memory:
        found = traced("memory", fun, args, kwargs)
        needed = needed_of(found.program)
        kept = None
        if any(needed):
            kept = residuals(found.jaxpr, found.input_labels, needed)
        program = compiled_memory(_compiled(found, needed)) if compiled else None
        return Memory(found.name, kept or Residuals([], [], 0), program)

    return of_arguments


def _compiled(found: Traced, needed: list[bool]) -> Any:
    flat = found.program
    seeds = [jnp.issubdtype(a.dtype, jnp.floating) for a in (flat.avals[i] for i in flat.outputs)]

    def outputs_and_gradients(*arrays):
        outs = [
            jnp.ones(flat.avals[i].shape, flat.avals[i].dtype) if has else None
            for i, has in zip(flat.outputs, seeds, strict=True)
        ]
        return sweep.gradients_of(flat, arrays, needed, outs, rule_of)

    return jax.jit(outputs_and_gradients).lower(*found.arrays).compile()


@dataclasses.dataclass(frozen=True, repr=False)
class Memory:
    """What `memory` returns; `print` shows it.

    Attributes:
        name: the function's.
        residuals: what the backward pass keeps, a `Residuals`: `residuals.made` is a list of
            what the forward pass makes and keeps, each with its `part`, `operation`, `source`,
            `bytes` and `types`, the largest first; `residuals.arguments` are the arguments that
            are read again.
        compiled: a `Compiled`: `arguments`, `outputs`, `aliased`, `temporaries`, `peak` and `code`
            of the compiled program, in bytes on one device; None if it wasn't compiled, or where
            XLA doesn't tell.
    """

    name: str
    residuals: Residuals
    compiled: Compiled | None

    @property
    def kept(self) -> int:
        """The bytes that the forward pass makes and keeps for the backward pass."""
        return self.residuals.bytes

    def by_part(self) -> dict[str, int]:
        """The bytes that are kept of each part, the largest first."""
        sums: dict[str, int] = {}
        for entry in self.residuals.made:
            sums[entry.part] = sums.get(entry.part, 0) + entry.bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        lines = [f"{self.name}: {in_bytes(self.kept)} kept for the backward pass"]
        lines[0] += f", besides {in_bytes(self.residuals.argument_bytes)} of arguments"
        if self.residuals.made:
            lines.append(table(self.residuals.made, _ROWS))
        if self.compiled is not None:
            c = self.compiled
            lines.append(
                f"compiled, with the gradient: arguments {in_bytes(c.arguments)}, outputs "
                f"{in_bytes(c.outputs)}, temporaries {in_bytes(c.temporaries)}, peak "
                f"{in_bytes(c.peak)}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return text.one_screen(str(self))


def table(made: list[Kept], most: int) -> str:
    """The largest of what is kept, and the sum of the others."""
    shown = made if len(made) <= most + 1 else made[:most]
    rows = [(in_bytes(k.bytes), k.part, k.operation, _types(k), k.source) for k in shown]
    rest = made[len(shown) :]
    if rest:
        total = in_bytes(sum(k.bytes for k in rest))
        rows.append((total, f"{len(rest)} others", "", "", ""))
    return text.table(("bytes", "part", "operation", "type", "source"), rows, right=(0,))


def in_bytes(count: int) -> str:
    """812 B, 3.1 kB, 24 MB: powers of 1000."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.3g} {units[0]}"


def _types(kept: Kept) -> str:
    first, count = kept.types[0], len(kept.types)
    if count == 1:
        return first
    same = len(set(kept.types)) == 1
    return f"{count} × {first}" if same else f"{first} and {count - 1} more"

"""`find_nonfinite`: where the first inf or nan of a function was born."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fnn import arguments
from fnn.backprop import sweep
from fnn.backprop.primitives import rule_of
from fnn.backprop.trace import Traced, traced
from fnn.birth.entries import on_host, worst_entry
from fnn.birth.examples import example_of
from fnn.birth.levels import Level, Place
from fnn.birth.report import Birth
from fnn.birth.walk import described, first_birth
from fnn.jaxpr import Program, is_inexact, program, trace


def find_nonfinite(
    fun: Callable, *args: Any, gradient: bool | None = None, **kwargs: Any
) -> Birth | None:
    """Where the inf or nan in what a function returns, or in its gradient, was born.

        print(fnn.find_nonfinite(loss, params, batch))

        A nan was born as 0 · inf, in the backward pass of sqrt, and reached the gradient of x
          line      model.py:12 (loss): return jnp.where(x > 0, jnp.sqrt(x), 0.0).sum()
          entry     [1] of float32[3]
          value     mul(0, inf) = nan
          ...

    The function is run operation by operation, under `jit`, `scan`, `while_loop`, `cond`,
    `vmap`, `shard_map`, `checkpoint` and custom derivatives too. If an output isn't finite, the
    search goes from there backwards: at each operation the inf and nan among its inputs are
    replaced by ordinary numbers; if the output is then fine, the inputs are to blame and the search
    goes on from them, else the number was born here. So what is inf for a good reason, and goes no
    further (the −inf of a mask before a softmax, the start of a running maximum), is never blamed.
    A nan comes before an inf: reported is where it became a nan, and in `cause` the birth of the
    inf that it was made of, if it was. Of each output one entry is followed; of the births that are
    found so, the report is of the earliest.

    Args:
        fun: a function of pytrees of arrays that returns a pytree of arrays.
        *args, **kwargs: what to call it with.
        gradient: whether to look at the backward pass too, if the outputs are finite: the gradient
            of the sum of all real outputs with respect to all real and complex arguments, by
            fnn's rules (those of `fnn.grad` and `fnn.train_step`). By default where the function
            returns a single real scalar.

    Returns:
        A `Birth`: its attributes tell what, how and where; `print` shows them. None if all is
        finite. (Each operation is computed by itself. A compiled program, which computes
        several at once, may round otherwise: a number at the edge of overflow may be inf in one
        and not in the other.)

    Raises:
        TypeError: `fun` is no function or returns no arrays; an argument is traced, as inside
            `jit`: call `find_nonfinite(jax.jit(f), x)` and not the other way round.
        ValueError: gradient=True, and the function can't be differentiated backwards.
    """
    arguments.function("find_nonfinite", "fun", fun, "a function to run")
    if gradient is not None:
        arguments.flag("find_nonfinite", "gradient", gradient)
    for leaf in jax.tree.leaves((args, kwargs)):
        if isinstance(leaf, (jax.core.Tracer, jax.ShapeDtypeStruct)):
            raise TypeError(
                "find_nonfinite runs the function on numbers, but an argument is "
                f"{arguments.show(leaf)}. Call it outside jit, grad and vmap: "
                "find_nonfinite(jax.jit(f), x)."
            )
    with _plain_numbers():
        found = traced("find_nonfinite", fun, args, kwargs)
        needed = [is_inexact(found.program.avals[i]) for i in found.program.inputs]
        wanted = _is_scalar(found) if gradient is None else gradient
        return birth_of(found, needed if wanted else [], bool(gradient))


def birth_of(found: Traced, needed: Sequence[bool], must: bool = False) -> Birth | None:
    """The first birth in a traced function, or in its gradient.

    Args:
        found: the function.
        needed: of which inputs to look at the gradient; empty for none.
        must: whether it is an error if there is no backward pass.
    """
    with _plain_numbers():
        birth = birth_in(found.program, found.arrays, found.input_labels, found.output_labels)
        if birth is not None or not any(needed):
            return birth
        return _in_gradient(found, needed, must)


def birth_in(
    flat: Program, args: Sequence, input_labels: Sequence[str], output_labels: Sequence[str]
) -> Birth | None:
    """The first birth in a program, run on arguments."""
    level = Level(flat, args)
    starts = {}
    for number, label in zip(flat.outputs, output_labels, strict=True):
        index = worst_entry(level.values[number])
        if index is not None and number not in starts:
            is_nan = np.isnan(on_host(level.values[number])[index])
            starts[number] = (Place(level, number, index), label, is_nan)
    if not starts:
        return None
    nans = [start for start in starts.values() if start[2]]
    chosen = nans or list(starts.values())
    found = first_birth(place for place, *_ in chosen)
    label = next(label for place, label, _ in chosen if place == found.start)
    birth = dataclasses.replace(described(found, input_labels), output=label)
    if found.equation is None:
        return birth
    example, of = example_of(found.place, args, input_labels)
    return dataclasses.replace(birth, example=example, example_of=of)


def _in_gradient(found: Traced, needed: Sequence[bool], must: bool) -> Birth | None:
    flat, arrays = found.program, found.arrays
    seeds = [
        jnp.ones(a.shape, a.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else None
        for a in (flat.avals[i] for i in flat.outputs)
    ]

    def gradients(*arrays):
        return sweep.gradients_of(flat, arrays, needed, seeds, rule_of)[1]

    try:
        backward = program(trace(gradients, arrays))
    except Exception:
        if must:
            raise
        return None  # a loop of unknown length, say
    labels = [
        f"the gradient of {label}"
        for label, wanted in zip(found.input_labels, needed, strict=True)
        if wanted
    ]
    return birth_in(backward, arrays, found.input_labels, labels)


def _is_scalar(found: Traced) -> bool:
    """Is the result a single real scalar?"""
    avals = [found.program.avals[i] for i in found.program.outputs]
    return len(avals) == 1 and not avals[0].shape and jnp.issubdtype(avals[0].dtype, jnp.floating)


@contextlib.contextmanager
def _plain_numbers():
    """JAX's own checks would raise at the first nan that there is."""
    with jax.debug_nans(False), jax.debug_infs(False):
        yield

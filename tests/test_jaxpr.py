"""What depends on what in a program, compared with what JAX finds when it drops dead code."""

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from fnn.jaxpr import program


def several(x, y, n):
    a = jnp.sin(x) * y
    b = jnp.argmax(a)
    c = jax.nn.softplus(y) + n
    return a, a[b], c, b, jnp.sum(x) + b


def loops(x, y, n):
    carry, ys = jax.lax.scan(lambda c, v: (c + v, c * 2), n, x)
    return carry, ys, jax.lax.cond(carry > 0, jnp.sin, jnp.cos, y)


FUNCTIONS = [several, loops]
ARGS = jnp.arange(3.0), jnp.ones(3), jnp.asarray(2.0)


def needs(closed) -> list[set[int]]:
    """For each output, the places of the inputs that JAX keeps for it."""
    outs = range(len(closed.out_avals))
    used = [dce_jaxpr(closed.jaxpr, [k == out for k in outs])[1] for out in outs]
    return [{i for i, is_used in enumerate(of_out) if is_used} for of_out in used]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_both_directions(function):
    closed = jax.make_jaxpr(function)(*ARGS)
    flat = program(closed)
    for out, wanted in zip(flat.outputs, needs(closed), strict=True):
        equations, values = flat.needed_for([out])
        assert {i for i, number in enumerate(flat.inputs) if number in values} == wanted
        assert {i for i, n in enumerate(flat.inputs) if out in flat.dependents([n])} == wanted
        made = {i for equation in equations for i in equation.outs}
        assert values - made <= {*flat.inputs, *flat.constants}


def test_what_a_gradient_passes():
    flat = program(jax.make_jaxpr(several)(*ARGS))
    reached = flat.dependents(flat.inputs[:1], inexact=True)
    assert [out in reached for out in flat.outputs] == [True, True, False, False, True]
    no_sine = flat.dependents(flat.inputs[:1], through=lambda equation: equation.name != "sin")
    assert [out in no_sine for out in flat.outputs] == [False, False, False, False, True]
    without_x, _ = flat.needed_for(flat.outputs[:1], among=flat.dependents(flat.inputs[1:2]))
    assert [equation.name for equation in without_x] == ["mul"]


def test_effects():
    def printing(x):
        jax.debug.print("{}", x)
        return jnp.sin(x)

    flat = program(jax.make_jaxpr(printing)(1.0))
    for effects in (False, True):
        equations, _ = flat.needed_for(flat.outputs, effects=effects)
        assert len(equations) == 1 + effects

"""Hold the hand-written rules of JAX's primitives against `jax.vjp`.

The reverse sweep in this file is a second one, as small as can be, so that a mistake in the
library's sweep and a mistake in a rule can't hide each other.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from fnn.eager import apply
from fnn.jaxpr import Equation

# Most of a check's time is compilation, and these small programs need no optimisation.
hasty = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def check_primitive(
    fun,
    *args,
    primitive: str | None = None,
    rules: dict | None = None,
    tol: float = 1e-10,
    second_order: bool = False,
    seed: int = 0,
):
    """Compare the rules of all equations of `fun` with `jax.vjp` at `args`, for a random g.

    Args:
        fun: a function of arrays (no pytrees) that calls the primitive to be checked.
        args: its arguments; every float and complex one is differentiated.
        primitive: the name of a primitive that must be among the equations.
        rules: name -> LocalRule; the library's whole table unless given.
        tol: tolerance, relative to the larger of 1 and the entry's size.
        second_order: also compare the derivatives of the gradients.

    Raises:
        AssertionError: a primitive without a rule, a cotangent whose shape or dtype isn't its
            argument's, or numbers that differ.
    """
    args = [jnp.asarray(a) for a in args]
    closed = jax.make_jaxpr(fun)(*args)
    names = _names(closed.jaxpr)
    assert primitive is None or primitive in names, f"traced to {names}, without {primitive!r}"
    gs = random_like(closed.out_avals, seed)

    first = {"ours": lambda *a: our_vjp(fun, *a, rules), "jax": lambda *a: jax_vjp(fun, *a)}
    vjps = dict(first)
    if second_order:
        vjps |= {f"{name}, twice": _gradients_of(vjp, seed + 1) for name, vjp in first.items()}
    found = hasty(lambda *a: {name: vjp(*a) for name, vjp in vjps.items()})(args, gs)
    label = primitive or "/".join(names)
    for i, (x, g) in enumerate(zip(args, found["ours"], strict=True)):
        if g is not None:
            assert (g.shape, g.dtype) == (x.shape, x.dtype), (
                f"{label}: the gradient of argument {i}, {x.dtype}{x.shape}, is {g.dtype}{g.shape}"
            )
    compare(found["ours"], found["jax"], tol, label)
    if second_order:
        twice = found["ours, twice"], found["jax, twice"]
        compare(*twice, tol * 100, f"{label}, second order")


def _gradients_of(vjp, seed: int):
    """The gradients of the gradients `vjp(args, gs)`, by JAX, for random upstream ones."""

    def second(args, gs):
        chosen = [i for i, x in enumerate(args) if _is_inexact(x)]

        def f(points, few):
            full, given = list(args), iter(few)
            for i, x in zip(chosen, points, strict=True):
                full[i] = x
            found = vjp(full, [None if g is None else next(given) for g in gs])
            return [_filled(found[i], full[i]) for i in chosen]

        points = [args[i] for i in chosen]
        outs, pull = jax.vjp(f, points, [g for g in gs if g is not None])
        return jax.tree.leaves(pull(random_like(outs, seed)))

    return second


def check_cost(fun, *args, rules: dict | None = None, slack: float = 1.02, more_bytes: float = 512):
    """The compiled gradient takes no more FLOPs and temporary bytes than `jax.vjp`'s."""
    args = [jnp.asarray(a) for a in args]
    gs = random_like(jax.eval_shape(fun, *args), 0)

    def cost(vjp):
        compiled = jax.jit(vjp).lower(args, gs).compile()
        analysis = compiled.cost_analysis()
        memory = compiled.memory_analysis()
        return (
            analysis.get("flops", 0.0) + analysis.get("transcendentals", 0.0),
            memory.temp_size_in_bytes,
        )

    flops, temporary = cost(lambda args, gs: our_vjp(fun, args, gs, rules))
    flops_jax, temporary_jax = cost(lambda args, gs: jax_vjp(fun, args, gs))
    assert flops <= slack * flops_jax + 16, f"{flops} FLOPs, jax.vjp has {flops_jax}"
    assert temporary <= slack * temporary_jax + more_bytes, (
        f"{temporary} temporary bytes, jax.vjp has {temporary_jax}"
    )


def our_vjp(fun, args, gs, rules=None) -> list:
    """The cotangents of all arguments by the hand-written rules, None for zero."""
    if rules is None:
        from fnn.backprop.primitives import RULES as rules
    closed = jax.make_jaxpr(fun)(*args)
    return _pull_back(closed.jaxpr, closed.consts, args, gs, rules)[1]


def jax_vjp(fun, args, gs) -> list:
    """The cotangents of all arguments by JAX, None for integers."""
    chosen = [i for i, x in enumerate(args) if _is_inexact(x)]

    def of_chosen(*xs):
        full = list(args)
        for i, x in zip(chosen, xs, strict=True):
            full[i] = x
        outs = jax.tree.leaves(fun(*full))
        return [y for y in outs if _is_inexact(y)]

    _, pull = jax.vjp(of_chosen, *[args[i] for i in chosen])
    found = dict(zip(chosen, pull([g for g in gs if g is not None]), strict=True))
    return [found.get(i) for i in range(len(args))]


def compare(ours, theirs, tol, label=""):
    """Entries equal to `tol` (relative to the larger of 1 and the entry), None being zero."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if b is None or b.dtype == jax.dtypes.float0:
            continue
        b = np.asarray(b.astype(_wide(b.dtype)))
        a = np.zeros_like(b) if a is None else np.asarray(a.astype(_wide(a.dtype)))
        np.testing.assert_allclose(
            a, b, rtol=tol, atol=tol, equal_nan=True, err_msg=f"{label}: argument {i}"
        )


def random_like(avals, seed: int) -> list:
    """Standard normal numbers for each float or complex array, None for the others."""
    rng = np.random.default_rng(seed)
    found = []
    for aval in jax.tree.leaves(avals):
        if not _is_inexact(aval):
            found.append(None)
            continue
        g = rng.standard_normal(aval.shape)
        if jnp.issubdtype(aval.dtype, jnp.complexfloating):
            g = g + 1j * rng.standard_normal(aval.shape)
        found.append(jnp.asarray(g, aval.dtype))
    return found


def _pull_back(jaxpr, consts, args, gs, rules):
    values, gradients, needed, saved = {}, {}, {}, {}
    active = {v for v in jaxpr.invars if _is_inexact(v.aval)}
    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for i, eqn in enumerate(jaxpr.eqns):
        ins = [read(v) for v in eqn.invars]
        needed[i] = [not isinstance(v, Literal) and v in active for v in eqn.invars]
        if any(needed[i]):
            active |= {v for v in eqn.outvars if _is_inexact(v.aval)}
        if _has_own_forward(rules.get(eqn.primitive.name)) and any(needed[i]):
            rule = rules[eqn.primitive.name]
            with eqn.ctx.manager:
                outs, saved[i] = rule.forward(_equation(eqn), needed[i], ins, False)
        else:
            outs = apply(_equation(eqn), ins)
        values.update(zip(eqn.outvars, outs, strict=True))

    def accumulate(v, g):
        if g is not None and not isinstance(v, Literal):
            gradients[v] = g if v not in gradients else gradients[v] + g

    for v, g in zip(jaxpr.outvars, gs, strict=True):
        accumulate(v, g)
    for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
        upstream = [gradients.get(v) for v in eqn.outvars]
        if all(g is None for g in upstream) or not any(needed[i]):
            continue
        full = [
            _filled(g, v.aval) if _is_inexact(v.aval) else None
            for g, v in zip(upstream, eqn.outvars, strict=True)
        ]
        ins = [read(v) for v in eqn.invars]
        outs = [values[v] for v in eqn.outvars]
        inner = _call(eqn)
        if inner is not None:
            products = _pull_back(inner.jaxpr, inner.consts, ins, full, rules)[1]
        elif i in saved:
            rule = rules[eqn.primitive.name]
            with eqn.ctx.manager:
                products = rule.backward(_equation(eqn), needed[i], saved[i], upstream, False)
        else:
            assert eqn.primitive.name in rules, f"no rule for {eqn.primitive.name!r}: {eqn}"
            many = eqn.primitive.multiple_results
            with eqn.ctx.manager:
                products = rules[eqn.primitive.name].pullback(
                    needed[i], full if many else full[0], outs if many else outs[0], ins, eqn.params
                )
        assert len(products) == len(ins), f"{eqn.primitive.name}: {len(products)} cotangents"
        for v, wanted, g in zip(eqn.invars, needed[i], products, strict=True):
            if wanted and g is not None:
                assert (g.shape, g.dtype) == (v.aval.shape, v.aval.dtype), (
                    f"{eqn.primitive.name}: the gradient of {v.aval} is {g.dtype}{g.shape}"
                )
                accumulate(v, g)
    return [read(v) for v in jaxpr.outvars], [gradients.get(v) for v in jaxpr.invars]


def _has_own_forward(rule) -> bool:
    """Is it a `ControlRule`, which also takes part in the forward pass?"""
    return hasattr(rule, "forward")


def _equation(eqn) -> Equation:
    return Equation(
        eqn.primitive, eqn.params, (), (), (), eqn.ctx, eqn.source_info, bool(eqn.effects)
    )


def _call(eqn):
    if eqn.primitive.name in ("jit", "pjit"):
        return eqn.params["jaxpr"]
    return None


def _names(jaxpr) -> list[str]:
    names = []
    for eqn in jaxpr.eqns:
        inner = _call(eqn)
        names += [eqn.primitive.name] if inner is None else _names(inner.jaxpr)
    return names


def _filled(g, like):
    return jnp.zeros(like.shape, like.dtype) if g is None else g


def _is_inexact(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _wide(dtype):
    return jnp.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float64

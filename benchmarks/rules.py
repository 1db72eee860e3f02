"""Activations, norms and losses, forward and backward, against autodiff of their definitions.

    python benchmarks/rules.py [--only relu gelu] [--markdown]

Each number is a ratio, the hand-written rule's to autodiff's, of what the compiled program of
value and gradient takes: FLOPs, exp (calls of exp, tanh, log and the like), bytes (read and
written by the program's steps), and temporary bytes. Below 1 the rule does less. `one` is one
example of 512 numbers, `mapped` is `vmap` over 64 of them. All are the compiler's own counts.
A dash: neither takes any.

The last table is the trap in vmap: a network whose every product is one rule, with weights that
all examples share. Were the weights copied to each example, FLOPs would stay and bytes explode.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from measure import interleaved, machine, table

import fnn
from fnn.eager import apply
from fnn.jaxpr import program
from fnn.operation import call_of

SIZE, BATCH = 512, 64


def arrays(*shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Random numbers of these shapes."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape), "float32") for shape in shapes)


def cases() -> dict[str, tuple[Callable, tuple]]:
    """Each operation with its arguments for one example."""
    ops = fnn.ops
    (x,) = arrays((SIZE,))
    label = jnp.asarray(3)
    p = jax.nn.softmax(x)
    found = {
        name: (getattr(ops, name), (x,))
        for name in ops.__all__
        if name != "maxout" and _family(name) in ("activations", "probabilities")
    }
    found["gelu, exact"] = (functools.partial(ops.gelu, approximate=False), (x,))
    found["maxout"] = (ops.maxout, (x.reshape(4, -1),))
    for name in ("softmax_cross_entropy", "multiclass_hinge"):
        found[name] = (getattr(ops, name), (x, label))
    found["softmax_cross_entropy, smoothed"] = (
        functools.partial(ops.softmax_cross_entropy, label_smoothing=0.1),
        (x, label),
    )
    found["softmax_cross_entropy, distribution"] = (ops.softmax_cross_entropy, (x, p))
    found["sigmoid_binary_cross_entropy"] = (ops.sigmoid_binary_cross_entropy, (x, jnp.round(p)))
    for name in ("squared_error", "huber"):
        found[name] = (getattr(ops, name), (x, p))
    positions, scale, bias = arrays((32, 16), (16,), (16,))
    for name in ("layer_norm", "group_norm", "instance_norm"):
        op = functools.partial(ops.group_norm, groups=4) if name == "group_norm" else None
        found[name] = (op or getattr(ops, name), (positions, scale, bias))
    found["rms_norm"] = (ops.rms_norm, (positions, scale))
    found["batch_norm"] = (lambda *args: ops.batch_norm(*args)[0], (positions, scale, bias))
    found["dropout"] = (functools.partial(ops.dropout, rate=0.1), (x, jax.random.PRNGKey(0)))
    found["sigmoid_focal"] = (ops.sigmoid_focal, (x, jnp.round(p)))
    found["poisson_nll"] = (ops.poisson_nll, (x, jnp.arange(SIZE) % 5))
    for name in ("pinball", "cosine_similarity"):
        found[name] = (getattr(ops, name), (x, p))
    found["kl_divergence"] = (ops.kl_divergence, (jnp.log(p), p))
    found["triplet"] = (ops.triplet, (x, p, -x))
    found["l2"] = (ops.l2, ({"W": x.reshape(16, -1), "b": x},))
    return found


def _family(name: str) -> str:
    return getattr(fnn.ops, name).__module__.split(".")[2]


def without_rules(function: Callable) -> Callable:
    """The function with each fnn operation in it replaced by its plain definition."""

    def plain(*args):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outs = _run_without_rules(closed, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return plain


def _run_without_rules(closed, args):
    flat = program(closed)
    values = flat.values(args)
    for equation in flat.equations:
        ins = [values[i] for i in equation.ins]
        call = call_of(equation)
        if call is None:
            outs = apply(equation, ins)
        else:
            outs = _run_without_rules(jax.make_jaxpr(call.primal)(*ins), ins)
        for i, value in zip(equation.outs, outs, strict=True):
            values[i] = value
    return [values[i] for i in flat.outputs]


def cost(function: Callable, args: tuple) -> dict[str, float]:
    """What value and gradient take, with the upstream gradient as an argument."""
    ys = jax.eval_shape(function, *args)
    dys = jax.tree.map(lambda y: jnp.ones(y.shape, y.dtype), ys)
    wanted = tuple(
        i
        for i, a in enumerate(args)
        if all(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(a))
    )

    def value_and_gradient(args, dys):
        def f(*chosen):
            full = list(args)
            for i, a in zip(wanted, chosen, strict=True):
                full[i] = a
            return function(*full)

        y, pull = jax.vjp(f, *(args[i] for i in wanted))
        return y, pull(dys)

    compiled = jax.jit(value_and_gradient).lower(args, dys).compile()
    analysis = compiled.cost_analysis()
    return {
        "FLOPs": analysis.get("flops", 0),
        "exp": analysis.get("transcendentals", 0),
        "bytes": analysis.get("bytes accessed", 0),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


def compare(function: Callable, args: tuple) -> list[str]:
    """The ratios for one example, then for a batch."""
    found = []
    batched = jax.tree.map(lambda a: jnp.broadcast_to(a, (BATCH, *a.shape)), args)
    for f, given in ((function, args), (jax.vmap(function), batched)):
        ours, theirs = cost(f, given), cost(without_rules(f), given)
        found += [_ratio(ours[key], theirs[key]) for key in ours]
    return found


def _ratio(ours: float, theirs: float) -> str:
    if not theirs:
        return "-" if not ours else f"{ours:.0f} : 0"
    return f"{ours / theirs:.2f}"


# ------------------------------------------------------------------------------ the trap in vmap


@fnn.rule
def linear(W, b, x):
    """W x + b."""
    return W @ x + b


@linear.forward
def _(W, b, x):
    return W @ x + b, (W, x)


@linear.backward
def _(residuals, g):
    W, x = residuals
    return jnp.outer(g, x), g, W.T @ g


def shared_weights(rounds: int) -> list[list[str]]:
    """A 784-512-512-10 network, every product one rule, against the same in plain JAX."""
    sizes = 784, 512, 512, 10
    params = [arrays((m, n), (m,)) for n, m in itertools.pairwise(sizes)]
    x, y = arrays((256, 784), (256, 10))

    def loss_with(linear):
        def loss(params, x, y):
            for W, b in params[:-1]:
                x = fnn.ops.tanh(linear(W * 0.04, b, x))
            return jnp.sum((linear(*params[-1], x) - y) ** 2)

        return loss

    def once(loss, params):
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, x, y))

    def twice(loss, params):
        mapped = jax.vmap(jax.vmap(loss, (None, 0, 0)), (None, 0, 0))
        return jnp.mean(mapped(params, x.reshape(16, 16, -1), y.reshape(16, 16, -1)))

    def per_example(loss, params):
        return jax.vmap(jax.grad(loss), (None, 0, 0))(params, x[:16], y[:16])

    measured = {
        "gradient of vmap, 256 examples": (jax.grad, once),
        "gradient of vmap of vmap, 16 x 16 examples": (jax.grad, twice),
        "vmap of gradient, 16 examples": (None, per_example),
    }
    rows = []
    for label, (transform, function) in measured.items():
        compiled = {}
        for name, op in (("ours", linear), ("plain", without_rules(linear))):
            f = functools.partial(function, loss_with(op))
            f = transform(f) if transform else f
            compiled[name] = jax.jit(f).lower(params).compile()
        calls = {name: lambda c=c: jax.block_until_ready(c(params)) for name, c in compiled.items()}
        times = {k: statistics.median(t) for k, t in interleaved(calls, rounds).items()}
        flops = {k: c.cost_analysis()["flops"] for k, c in compiled.items()}
        memory = {k: c.memory_analysis().temp_size_in_bytes for k, c in compiled.items()}
        rows.append(
            [label]
            + [_ratio(of["ours"], of["plain"]) for of in (flops, memory, times)]
            + [f"{memory['ours'] / 1e6:.1f} MB", f"{1e3 * times['ours']:.1f} ms"]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", metavar="OPERATION")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    print(machine())
    chosen = {k: v for k, v in cases().items() if options.only is None or k in options.only}
    kinds = "FLOPs", "exp", "bytes", "temporary"
    heads = [
        "rule / autodiff",
        *(f"one: {kinds[0]}", *kinds[1:]),
        *(f"mapped: {kinds[0]}", *kinds[1:]),
    ]
    rows = [[name, *compare(*case)] for name, case in chosen.items()]
    print(f"\n{table(heads, rows, options.markdown)}")
    heads = ["shared weights, rule / plain JAX", "FLOPs", "temporary", "time", "temporary", "time"]
    print(f"\n{table(heads, shared_weights(options.rounds), options.markdown)}")


if __name__ == "__main__":
    main()

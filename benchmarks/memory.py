"""What the gradient of an operation holds and computes, ours against the plain formula's autodiff.

    python benchmarks/memory.py [--only attention] [--time] [--long] [--markdown]

Each row is value and gradient of the sum of an operation's results. Temporary bytes are the
compiler's; products are the floating-point operations of matrix products and convolutions in the
traced program, those in loops as often as they run (the compiler's own count takes a loop's body
once). With --time both also run, in turns. --long runs ours alone on 32,768 positions, of which the
plain formula's scores would take 17 GB for 4 heads.

A row for another operation is a line in `cases`.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import compiled, interleaved, machine, ratio, table

from fnn import ops


class Case(NamedTuple):
    """An operation and its plain formula, and what both take; integers get no gradient."""

    ours: Callable
    plain: Callable
    args: tuple


def arrays(*shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape), "float32") for shape in shapes)


def cases() -> dict[str, Case]:
    found = {}
    qkv = arrays(*[(2048, 4, 64)] * 3)
    jax_attention = jax.nn.dot_product_attention
    found["attention, 2048 × 4 × 64, causal"] = Case(
        functools.partial(ops.attention, causal=True),
        functools.partial(jax_attention, is_causal=True),
        qkv,
    )
    found["attention, the last 256 positions"] = Case(
        functools.partial(ops.attention, causal=True, window=256),
        functools.partial(jax_attention, is_causal=True, local_window_size=(255, 0)),
        qkv,
    )
    batch = arrays(*[(8, 512, 4, 64)] * 3)
    found["attention, 8 × 512 × 4 × 64, causal"] = Case(
        jax.vmap(functools.partial(ops.attention, causal=True)),
        functools.partial(jax_attention, is_causal=True),
        batch,
    )
    h, W = arrays((2048, 256), (32768, 256))
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 32768, 2048))
    plain_loss = lambda h, W, y: optax.softmax_cross_entropy_with_integer_labels(h @ W.T, y)
    found["linear + cross-entropy, 2048 × 32768 × 256"] = Case(
        ops.linear_softmax_cross_entropy, plain_loss, (h, W, labels)
    )
    found["linear + cross-entropy, a batch of 8 × 256"] = Case(
        jax.vmap(ops.linear_softmax_cross_entropy, (0, None, 0)),
        plain_loss,
        (h.reshape(8, 256, 256), W, labels.reshape(8, 256)),
    )
    x, scale, bias = arrays((4096, 1024), (1024,), (1024,))
    found["layer norm, 4096 × 1024"] = Case(ops.layer_norm, _layer_norm, (x, scale, bias))
    found["RMS norm, 4096 × 1024"] = Case(ops.rms_norm, _rms_norm, (x, scale))
    images, scale, bias = arrays((32, 16, 16, 128), (128,), (128,))
    found["group norm, 32 × 16 × 16 × 128"] = Case(
        jax.vmap(functools.partial(ops.group_norm, groups=8), (0, None, None)),
        _group_norm,
        (images, scale, bias),
    )
    found["batch norm, 32 × 16 × 16 × 128"] = Case(
        _over_batch,
        lambda x, scale, bias: _normal(x, (0, 1, 2)) * scale + bias,
        (images, scale, bias),
    )
    x, weights = arrays((1024, 256), (12, 256, 256))
    keys = jax.random.split(jax.random.key(0), 12)
    for name, run in (("one after the other", _in_turn), ("in a loop", _in_loop)):
        found[f"dropout in 12 blocks, {name}"] = Case(
            run(functools.partial(ops.dropout, rate=0.1)), run(_dropout), (x, weights, keys)
        )
    found["rotary positions, 2048 × 4 × 64"] = Case(ops.rotary, _rotary, qkv[:1])
    return found


def _normal(x, axes):
    return (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + 1e-5)


def _layer_norm(x, scale, bias):
    return _normal(x, -1) * scale + bias


def _group_norm(x, scale, bias):
    return _normal(x.reshape(*x.shape[:-1], 8, -1), (1, 2, 4)).reshape(x.shape) * scale + bias


def _over_batch(x, scale, bias):
    of_one = lambda x: ops.batch_norm(x, scale, bias, axis_name="batch")[0]
    return jax.vmap(of_one, axis_name="batch")(x)


def _dropout(x, key):
    return jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0)


def _block(drop, x, W, key):
    return x + drop(jnp.sin(x @ W / 16), key)


def _in_turn(drop):
    def run(x, weights, keys):
        for W, key in zip(weights, keys, strict=True):
            x = _block(drop, x, W, key)
        return x

    return run


def _in_loop(drop):
    step = lambda x, own: (_block(drop, x, *own), None)
    return lambda x, weights, keys: jax.lax.scan(step, x, (weights, keys))[0]


def _rms_norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def _rotary(x):
    half = x.shape[-1] // 2
    turn = jnp.exp(1j * jnp.arange(x.shape[0])[:, None] * 10000.0 ** (-jnp.arange(half) / half))
    z = (x[..., :half] + 1j * x[..., half:]) * turn[:, None]
    return jnp.concatenate([z.real, z.imag], -1)


def value_and_gradient(f: Callable, args: tuple) -> Callable:
    """Of a weighted sum: with equal weights some gradients would be 0, and left out."""
    floats = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(f(*args))), floats)


def products(jaxpr: Any) -> float:
    """Floating-point operations of the matrix products and convolutions of a jaxpr."""
    total = 0.0
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval if equation.outvars else None
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(out.shape) * math.prod(shape[d] for d in contract)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(out.shape) * math.prod(kernel) / features
        elif "call" in params and hasattr(params["call"], "primal"):  # an operation of fnn
            avals = [v.aval for v in equation.invars]
            total += products(jax.make_jaxpr(params["call"].primal)(*avals).jaxpr)
        else:
            times = params.get("length", 1) if name == "scan" else 1
            for value in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    total += times * products(inner)
    return total


def long(heads: int) -> list[str]:
    """Attention over 32,768 positions: what its gradient takes, and that it is finite."""
    args = arrays(*[(32_768, heads, 64)] * 3)
    program = compiled(
        value_and_gradient(functools.partial(ops.attention, causal=True), args), *args
    )
    began = time.perf_counter()
    value, gradients = jax.block_until_ready(program(*args))
    seconds = time.perf_counter() - began
    assert all(bool(jnp.isfinite(x).all()) for x in (value, *gradients))
    size = program.memory_analysis().temp_size_in_bytes
    return [f"32768 × {heads} × 64, causal", f"{size / 1e6:.1f}", f"{seconds:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows that hold one of these")
    parser.add_argument("--time", action="store_true", help="run them too, in turns")
    parser.add_argument("--long", action="store_true", help="attention over 32,768 positions")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    if options.long:
        rows = [long(heads) for heads in (1, 4)]
        print(
            machine(), table(["attention", "temporary MB", "s"], rows, options.markdown), sep="\n"
        )
        return
    heads = ["value and gradient", "temporary MB", "plain", "ratio", "products GFLOP", "plain"]
    rows = []
    for name, case in cases().items():
        if options.only and not any(word in name for word in options.only):
            continue
        functions = [value_and_gradient(f, case.args) for f in (case.ours, case.plain)]
        programs = [compiled(f, *case.args) for f in functions]
        bytes_ = [p.memory_analysis().temp_size_in_bytes for p in programs]
        flops = [products(jax.make_jaxpr(f)(*case.args).jaxpr) for f in functions]
        row = [
            name,
            *(f"{b / 1e6:.1f}" for b in bytes_),
            f"{bytes_[0] / bytes_[1]:.3f}",
            *(f"{f / 1e9:.1f}" for f in flops),
        ]
        if options.time:
            ours, plain = (
                lambda p=p, args=case.args: jax.block_until_ready(p(*args)) for p in programs
            )
            samples = interleaved({"ours": ours, "plain": plain}, rounds=10)
            row.append(ratio(samples["ours"], samples["plain"]))
        rows.append(row)
    if options.time:
        heads.append("time, ours ÷ plain")
    print(machine())
    print(table(heads, rows, options.markdown))


if __name__ == "__main__":
    main()

"""What the gradient of an operation holds and computes, ours against the plain formula's autodiff.

    python benchmarks/memory.py [--only attention] [--check] [--time] [--long] [--markdown]

Each row is value and gradient of the sum of an operation's results. Temporary bytes are the
compiler's; products are the floating-point operations of matrix products and convolutions in the
traced program, those in loops as often as they run (the compiler's own count takes a loop's body
once). --check runs both, and asserts that results and gradients agree (dropout's have other random
numbers). With --time both run in turns. --long runs ours alone on 32,768 positions, of which the
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
from jax import lax
from measure import compiled, interleaved, machine, ratio, table

from fnn import layers, ops


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
    return found | _of_images() | _of_sequences() | _of_mlps()


def _of_images() -> dict[str, Case]:
    """Convolutions and pooling."""
    found = {}
    x, w, narrow, deep = arrays(
        (32, 32, 32, 64), (64, 64, 3, 3), (32, 16, 16, 128), (128, 64, 4, 4)
    )
    found["convolution, 32 × 32² × 64 → 64, 3x3"] = Case(ops.convolution, _convolution, (x, w / 24))
    found["convolution, 16 × 28² × 96, 7x7 depthwise"] = Case(
        functools.partial(ops.convolution, groups=96),
        functools.partial(_convolution, feature_group_count=96),
        arrays((16, 28, 28, 96), (96, 1, 7, 7)),
    )
    found["conv_transpose, 32 × 16² × 128 → 64, 4x4 stride 2"] = Case(
        functools.partial(ops.conv_transpose, stride=2), _conv_transpose, (narrow, deep / 24)
    )
    found["max_pool, 32 × 32² × 64, 2x2"] = Case(
        functools.partial(ops.max_pool, window=2), _max_pool, (jax.nn.relu(x),)
    )
    found["max_pool, 32 × 32² × 64, 3x3 stride 2"] = Case(
        functools.partial(ops.max_pool, window=3, stride=2, padding="same"),
        functools.partial(_max_pool, window=3, padding="SAME"),
        (jax.nn.relu(x),),
    )
    found["average_pool, 32 × 32² × 64, 2x2"] = Case(
        functools.partial(ops.average_pool, window=2), _average_pool, (jax.nn.relu(x),)
    )
    return found


def _of_sequences() -> dict[str, Case]:
    """Recurrent networks of 256 units, over 128 steps of 16 sequences, and a state space."""
    found = {}
    z, U, h, c, b = arrays((16, 128, 1024), (1024, 256), (16, 256), (16, 256), (256,))
    found["LSTM, 16 × 128 steps × 256"] = Case(
        jax.vmap(lambda *args: ops.lstm(*args)[0], (0, None, 0, 0)),
        jax.vmap(_lstm, (0, None, 0, 0)),
        (z, U / 16, h, c),
    )
    found["GRU, 16 × 128 steps × 256"] = Case(
        jax.vmap(lambda *args: ops.gru(*args)[0], (0, None, None, 0)),
        jax.vmap(_gru, (0, None, None, 0)),
        (z[..., :768], U[:768] / 16, b, h),
    )
    a, b = arrays(*[(2048, 512)] * 2)
    for name, plain in (("associative_scan", _by_associative_scan), ("scan", _by_scan)):
        found[f"linear recurrence, 2048 steps × 512, and {name}"] = Case(
            ops.linear_recurrence, plain, (jax.nn.sigmoid(a), b)
        )
    return found


def _of_mlps() -> dict[str, Case]:
    """Gates, and mixtures of experts whose capacity is enough for all that are chosen."""
    found = {}
    x, up, down = arrays((4096, 256), (256, 2048), (1024, 256))
    (halves,) = arrays((4096, 2048))
    for ours, gate in ((ops.swiglu, jax.nn.silu), (ops.geglu, jax.nn.gelu)):
        plain = functools.partial(_gated, gate)
        found[f"{ours.__name__}, 4096 × 2048"] = Case(ours, plain, (halves,))
        found[f"MLP with {ours.__name__}, 4096 × 256 × 1024"] = Case(
            functools.partial(_mlp, ours), functools.partial(_mlp, plain), (x, up / 16, down / 32)
        )
    found["routing, 4096 tokens, 2 of 64 experts"] = Case(
        _routing, _plain_routing, arrays((4096, 64))
    )
    x, *weights = arrays((2048, 256), (8, 256), (8, 512, 256), (8, 512), (8, 256, 512), (8, 256))
    router, W, b, V, d = (w / 16 for w in weights)
    found["mixture, 2048 × 256, 2 of 8 experts"] = Case(
        functools.partial(_mixture, 2.0), _all_experts, (x, router, W, b, V, d)
    )
    found["mixture, a place for all at each expert"] = Case(
        functools.partial(_mixture, None), _all_experts, (x, router, W, b, V, d)
    )
    return found


def _convolution(x, w, **options):
    order = ("NHWC", "OIHW", "NHWC")
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=order, **options)


def _conv_transpose(x, w):
    order = ("NHWC", "OIHW", "NHWC")
    return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=order, transpose_kernel=True)


def _max_pool(x, window=2, padding="VALID"):
    sizes, strides = (1, window, window, 1), (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, sizes, strides, padding)


def _average_pool(x):
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4


def _lstm(z, U, h, c):
    def step(carry, z):
        h, c = carry
        i, f, g, o = jnp.split(z + U @ h, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return lax.scan(step, (h, c), z)[1]


def _gru(z, U, b, h):
    def step(h, z):
        (z_r, z_q, z_n), (u_r, u_q, u_n) = jnp.split(z, 3), jnp.split(U @ h, 3)
        r, q = jax.nn.sigmoid(z_r + u_r), jax.nn.sigmoid(z_q + u_q)
        h = (1 - q) * jnp.tanh(z_n + r * (u_n + b)) + q * h
        return h, h

    return lax.scan(step, h, z)[1]


def _by_associative_scan(a, b):
    join = lambda first, second: (first[0] * second[0], second[0] * first[1] + second[1])
    return lax.associative_scan(join, (a, b))[1]


def _by_scan(a, b):
    def step(x, own):
        x = own[0] * x + own[1]
        return x, x

    return lax.scan(step, jnp.zeros_like(b[0]), (a, b))[1]


def _gated(gate, x):
    a, b = jnp.split(x, 2, -1)
    return a * gate(b)


def _mlp(gate, x, up, down):
    return gate(x @ up) @ down


def _routing(logits):
    found = ops.top_k_routing(logits, 2)
    return found.weights + found.balance_loss + found.z_loss


def _plain_routing(logits):
    best, experts = lax.top_k(logits, 2)
    share = jax.nn.one_hot(experts, logits.shape[1]).mean((0, 1))
    balance = logits.shape[1] * jnp.sum(share * jax.nn.softmax(logits).mean(0))
    return jax.nn.softmax(best) + balance + jnp.mean(jax.nn.logsumexp(logits, -1) ** 2)


def _mixture(factor, x, router, W, b, V, d):
    layer = layers.MixtureOfExperts(layers.MLP(512), 8, 2, capacity_factor=factor)
    expert = {"hidden": {"W": W, "b": b}, "output": {"W": V, "b": d}}
    return layer({"router": {"W": router}, "experts": expert}, x)


def _all_experts(x, router, W, b, V, d):
    """Each computes all; the weights of those that aren't chosen are 0."""
    best, experts = lax.top_k(x @ router.T, 2)
    chosen = jax.nn.one_hot(experts, len(router))
    weights = jnp.einsum("pk,pke->pe", jax.nn.softmax(best), chosen)
    hidden = jax.nn.gelu(jnp.einsum("pi,ehi->eph", x, W) + b[:, None])
    return jnp.einsum("pe,epo->po", weights, jnp.einsum("eph,eoh->epo", hidden, V) + d[:, None])


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


def check(name: str, case: Case, programs: list) -> None:
    """Results and gradients agree, to 1e-4 of the largest."""
    results = (jax.jit(f)(*case.args) for f in (case.ours, case.plain))
    gradients = (program(*case.args)[1] for program in programs)
    for ours, plain in [tuple(results), *zip(*gradients, strict=True)]:
        away = float(jnp.max(jnp.abs(ours - plain)) / jnp.max(jnp.abs(plain)))
        assert away < 1e-4, f"{name}: ours and plain are {away:.1e} of the largest apart"


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
    parser.add_argument("--check", action="store_true", help="that ours and plain agree")
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
        if options.check and "dropout" not in name:
            check(name, case, programs)
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

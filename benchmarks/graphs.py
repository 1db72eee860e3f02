"""How long a graph takes: tracing with its values, backpropagation, table, picture.

    python benchmarks/graphs.py               1500 and 5000 nodes of each kind
    python benchmarks/graphs.py 500 1000

Seconds, of graphs without repeated structure, chains, trees, and a transformer of Flax Linen
(if flax is installed), whose size doesn't change. Tracing and backpropagation include what JAX
compiles: each operation once for its shapes, as whenever it runs outside jit. `picture` is with
16 boxes, `all` with a box for every operation.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

import fnn


def without_structure(count: int) -> tuple[Callable, tuple]:
    draw = random.Random(0)
    picks = [(draw.random(), draw.random() < 0.5) for _ in range(count)]

    def function(x, y, z):
        values = [x, y, z]
        for k, (other, adds) in enumerate(picks):
            a, b = values[k], values[int(other * len(values))]
            values.append((a + b) if adds else a * b)
        return values[-1] + values[-2] + values[-3]

    return function, (0.3, 0.5, 0.7)


def chain(count: int) -> tuple[Callable, tuple]:
    def function(x):
        for k in range(count):
            x = jnp.sin(x) if k % 2 else x * 1.01
        return x.sum()

    return function, (jnp.ones(3),)


def tree(count: int) -> tuple[Callable, tuple]:
    def function(xs):
        while len(xs) > 1:
            pairs = zip(xs[::2], xs[1::2], strict=False)
            xs = [a * b + a for a, b in pairs] + xs[len(xs) // 2 * 2 :]
        return xs[0]

    return function, ([0.001 * k for k in range(count // 3)],)


def transformer() -> tuple[Callable, tuple]:
    from flax import linen

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = x + linen.SelfAttention(num_heads=4)(linen.LayerNorm()(x))
            h = linen.gelu(linen.Dense(128)(linen.LayerNorm()(x)))
            return x + linen.Dense(32)(h)

    net, x = linen.Sequential([Block() for _ in range(4)]), jnp.ones((8, 32))
    params = jax.jit(net.init)(jax.random.key(0), x)
    return lambda params, x: (net.apply(params, x) ** 2).mean(), (params, x)


def measure(name: str, function: Callable, args: tuple) -> None:
    jax.clear_caches()
    times, began = [], time.perf_counter()

    def lap():
        nonlocal began
        times.append(time.perf_counter() - began)
        began = time.perf_counter()

    graph = fnn.graph(function)(*args)
    lap()
    jax.block_until_ready([node.gradient for node in graph.backprop() if node.differentiable])
    lap()
    str(graph)
    lap()
    graph.to_svg()
    lap()
    graph.to_svg(max_boxes=10**6)
    lap()
    print(f"{name:20} {len(graph):6}  " + "  ".join(f"{t:8.2f}" for t in times), flush=True)


def main() -> None:
    counts = [int(a) for a in sys.argv[1:]] or [1500, 5000]
    names = ("tracing", "backprop", "table", "picture", "all")
    print(f"{'graph':20} {'nodes':>6}  " + "  ".join(f"{n:>8}" for n in names))
    for make in (without_structure, chain, tree):
        for count in counts:
            measure(make.__name__.replace("_", " "), *make(count))
    try:
        measure("transformer", *transformer())
    except ImportError:
        print("transformer: pip install 'flax>=0.12'")


if __name__ == "__main__":
    main()

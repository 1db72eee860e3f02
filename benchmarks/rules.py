"""What a hand-written rule costs: FLOPs and bytes against JAX's autodiff of the definition.

    pip install -e '.[bench]' && python benchmarks/rules.py [--markdown]

For each operation in `fnn.ops`, the compiled program of its value and gradient at one example
and under `vmap`; then the trap in vmap: the gradient of an MLP whose every product is a rule,
mapped over the batch, and over a batch of batches. All numbers come from the compiled
program, so that they are the same on a busy machine.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from interleaved import machine, table

import fnn
from fnn import ops

rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), "float32")


def cost(function, *args) -> tuple[float, float, float]:
    """FLOPs, bytes accessed and temporary bytes of the compiled program."""
    compiled = jax.jit(function).lower(*args).compile()
    analysis = compiled.cost_analysis()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return analysis.get("flops", 0.0), analysis["bytes accessed"], temporary


def arguments(name: str) -> tuple:
    """Arguments for an operation at one example of 256 entries."""
    x = normal(256)
    if name == "maxout":
        return (normal(2, 256),)
    if name in ("softmax_cross_entropy", "multiclass_hinge"):
        return x, jnp.asarray(3)
    if name == "sigmoid_binary_cross_entropy":
        return x, jax.nn.sigmoid(normal(256))
    if name in ("squared_error", "huber"):
        return x, normal(256)
    return (x,)


def ratio(ours: float, theirs: float) -> str:
    if theirs:
        return f"{ours / theirs:.2f}"
    return "1.00" if ours == 0 else f"{ours:.0f} against 0"


def per_operation():
    """Rows: operation; FLOPs, bytes and temporaries of ours over autodiff's, plain and vmapped."""
    rows = []
    for name in ops.__all__:
        operation = getattr(ops, name)
        if not isinstance(operation, fnn.Operation):
            continue
        args = arguments(name)
        batch = jax.tree.map(lambda a: jnp.broadcast_to(a, (128, *a.shape)), args)
        row = [name]
        for mapped in (False, True):
            costs = []
            for f in (operation, operation.definition):

                def loss(*args, f=f, mapped=mapped):
                    return jnp.sum((jax.vmap(f) if mapped else f)(*args) ** 2)

                costs.append(cost(jax.value_and_grad(loss), *(batch if mapped else args)))
            ours, theirs = costs
            row += [
                f"{a / b:.2f}" if b else ("1.00" if a == b else "new") for a, b in zip(ours, theirs)
            ]
        rows.append(row)
    return rows


@fnn.rule
def product(W, x):
    """W x."""
    return W @ x


@product.backward
def _(residuals, dy):
    W, x = residuals
    return jnp.einsum("i,j->ij", dy, x), W.T @ dy


def trap():
    """The 784-512-512-10 MLP at batch 256, mapped once and twice, its products as rules."""
    sizes = (784, 512, 512, 10)
    weights = [normal(n, m) / m**0.5 for m, n in zip(sizes, sizes[1:])]
    batch = normal(256, 784)
    rows = []
    for levels in (1, 2):
        x = batch if levels == 1 else batch.reshape(4, 64, 784)
        costs = []
        for multiply in (product, jnp.matmul):

            def loss(weights, x, multiply=multiply, levels=levels):
                def one(x):
                    for W in weights[:-1]:
                        x = jax.nn.relu(multiply(W, x))
                    return jnp.sum(multiply(weights[-1], x) ** 2)

                for _ in range(levels):
                    one = jax.vmap(one)
                return jnp.mean(one(x))

            costs.append(cost(jax.grad(loss), weights, x))
        name = "vmap" if levels == 1 else "vmap of vmap"
        (flops, read, temporary), theirs = costs
        ratios = [f"{a / b:.3f}" for a, b in zip(costs[0], theirs)]
        rows.append([name, f"{flops:.4g}", f"{temporary / 1e6:.2f} MB", *ratios])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    print(machine(), "\n")
    head = ["operation", "FLOPs", "bytes", "temporaries"]
    head += ["vmapped: FLOPs", "bytes", "temporaries"]
    print("Value and gradient, ours ÷ autodiff of the same definition:\n")
    print(table(head, per_operation(), options.markdown))
    print("\nAn MLP whose products are rules, ours ÷ plain JAX:\n")
    head = ["mapped by", "FLOPs", "temporaries", "FLOPs ÷", "bytes ÷", "temporaries ÷"]
    print(table(head, trap(), options.markdown))


if __name__ == "__main__":
    main()

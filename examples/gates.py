"""Backpropagation through gates, as in CS231n, lecture 4: every number of the slides.

    python examples/gates.py

Three small circuits: f = (x + y) z, one step of gradient descent on it, and a sigmoid neuron,
drawn gate by gate and with the sigmoid as one gate. Each is printed as a table and as the steps
of the chain rule, and drawn into the folder out/ as an SVG.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

import fnn

OUT = Path("out")
LEARNING_RATE = 0.01


def circuit(x, y, z):
    q = x + y
    f = q * z
    return f


def neuron(w0, x0, w1, x1, w2):
    s = w0 * x0 + w1 * x1 + w2
    f = 1 / (1 + jnp.exp(-s))
    return f


@fnn.rule
def sigmoid(x):
    """σ(x) = 1 / (1 + e⁻ˣ)."""
    return 1 / (1 + jnp.exp(-x))


@sigmoid.forward
def _(x):
    y = 1 / (1 + jnp.exp(-x))
    return y, y


@sigmoid.backward
def _(y, g):
    return (g * y * (1 - y),)  # local gradient times upstream gradient


def neuron_of_one_gate(w0, x0, w1, x1, w2):
    s = w0 * x0 + w1 * x1 + w2
    f = sigmoid(s)
    return f


def show(title: str, graph: fnn.Graph, path: Path) -> None:
    """Print a graph's table and its backward pass; draw it."""
    print(f"\n{title}\n{'=' * len(title)}\n\n{graph}\n\nBackward, step by step:")
    for step in graph.steps():
        print(f"    {step}")
    try:
        graph.to_svg(path)
        print(f"\nDrawn in {path}")
    except ImportError as error:
        print(f"\nNot drawn: {error}")


def main() -> None:
    OUT.mkdir(exist_ok=True)

    start = {"x": -2.0, "y": 5.0, "z": -4.0}
    graph = fnn.graph(circuit)(**start).backprop()
    show("f = (x + y) z", graph, OUT / "circuit.svg")

    moved = {name: value - LEARNING_RATE * graph[name].gradient for name, value in start.items()}
    print("\nOne step of gradient descent, each input against its gradient:")
    for name, value in start.items():
        gradient = graph[name].gradient
        print(f"    {name}: {value:g} - {LEARNING_RATE:g} · {gradient:g} = {moved[name]:g}")
    print(f"    f: {graph.value:g} before, {circuit(**moved):.4f} after")

    point = {"w0": 2.0, "x0": -1.0, "w1": -3.0, "x1": -2.0, "w2": -3.0}
    graph = fnn.graph(neuron)(**point).backprop()
    show("A sigmoid neuron, gate by gate", graph, OUT / "neuron.svg")

    graph = fnn.graph(neuron_of_one_gate)(**point).backprop()
    show("The same neuron, with the sigmoid as one gate", graph, OUT / "neuron_of_one_gate.svg")


if __name__ == "__main__":
    main()

"""One gradient, or step, of a GPT: ours against Flax NNX and Equinox, with equal weights.

    python benchmarks/gpt.py [--depth 12] [--step] [--time] [--markdown]

Each is written as its library's users write it: blocks one after the other, the library's own
attention layer, optax's loss of all logits. With --step Adam changes the weights, and they and its
state are donated. Temporary bytes are the compiler's. That all losses and gradients agree, or
losses and weights after a step, is checked.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import installed, interleaved, machine, ratio, table

import fnn

VOCABULARY, FEATURES, HEADS = 8192, 256, 4
ADAM = optax.adam(1e-4)


def mean_loss(logits, targets):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def ours(depth: int, length: int, remat: bool) -> tuple[Any, Callable]:
    net = fnn.models.gpt2(VOCABULARY, length, FEATURES, depth, HEADS, dropout=0, remat=remat)
    params = net.init(jax.random.key(0), jnp.zeros(length, jnp.int32))
    losses = jax.vmap(net, (None, 0, 0))
    return params, lambda params, tokens, targets: jnp.mean(losses(params, tokens, targets))


def of_block(params: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], params["blocks"])


def in_equinox(params: Any, depth: int) -> tuple[Any, Callable]:
    import equinox as eqx

    def set_linear(layer, own):
        return eqx.tree_at(lambda m: (m.weight, m.bias), layer, (own["W"], own["b"]))

    def set_norm(layer, own):
        return eqx.tree_at(lambda m: (m.weight, m.bias), layer, (own["scale"], own["bias"]))

    key = jax.random.key(0)  # all that is drawn is replaced

    def block(own):
        biases = {f"use_{n}_bias": True for n in ("query", "key", "value", "output")}
        attend = eqx.nn.MultiheadAttention(HEADS, FEATURES, key=key, **biases)
        for theirs, name in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out")):
            attend = eqx.tree_at(
                lambda m, n=theirs: getattr(m, f"{n}_proj"),
                attend,
                set_linear(getattr(attend, f"{theirs}_proj"), own["attend"][name]),
            )
        return {
            "norm1": set_norm(eqx.nn.LayerNorm(FEATURES), own["norm1"]),
            "attend": attend,
            "norm2": set_norm(eqx.nn.LayerNorm(FEATURES), own["norm2"]),
            "up": set_linear(eqx.nn.Linear(FEATURES, 4 * FEATURES, key=key), own["mlp"]["hidden"]),
            "down": set_linear(
                eqx.nn.Linear(4 * FEATURES, FEATURES, key=key), own["mlp"]["output"]
            ),
        }

    model = {
        "embed": eqx.nn.Embedding(weight=params["embed"]["E"]),
        "position": params["position"]["P"],
        "blocks": [block(of_block(params, i)) for i in range(depth)],
        "norm": set_norm(eqx.nn.LayerNorm(FEATURES), params["norm"]),
    }
    arrays, static = eqx.partition(model, eqx.is_array)

    def logits(arrays, tokens):
        model = eqx.combine(arrays, static)
        x = jax.vmap(model["embed"])(tokens) + model["position"]
        mask = jnp.tri(len(tokens), dtype=bool)
        for b in model["blocks"]:
            h = jax.vmap(b["norm1"])(x)
            x = x + b["attend"](h, h, h, mask=mask)
            h = jax.nn.gelu(jax.vmap(b["up"])(jax.vmap(b["norm2"])(x)))
            x = x + jax.vmap(b["down"])(h)
        return jax.vmap(model["norm"])(x) @ model["embed"].weight.T

    def loss(arrays, tokens, targets):
        return mean_loss(jax.vmap(logits, (None, 0))(arrays, tokens), targets)

    return arrays, loss


def in_nnx(params: Any, depth: int) -> tuple[Any, Callable]:
    from flax import nnx

    def put(module, **own):
        for name, value in own.items():
            getattr(module, name)[...] = value

    class Block(nnx.Module):
        def __init__(self, own, rngs):
            self.norm1 = nnx.LayerNorm(FEATURES, epsilon=1e-5, rngs=rngs)
            self.attend = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs)
            self.norm2 = nnx.LayerNorm(FEATURES, epsilon=1e-5, rngs=rngs)
            self.up = nnx.Linear(FEATURES, 4 * FEATURES, rngs=rngs)
            self.down = nnx.Linear(4 * FEATURES, FEATURES, rngs=rngs)
            put(self.norm1, **own["norm1"])
            put(self.norm2, **own["norm2"])
            put(self.up, kernel=own["mlp"]["hidden"]["W"].T, bias=own["mlp"]["hidden"]["b"])
            put(self.down, kernel=own["mlp"]["output"]["W"].T, bias=own["mlp"]["output"]["b"])
            for theirs, name in (("query", "q"), ("key", "k"), ("value", "v")):
                W, b = own["attend"][name]["W"], own["attend"][name]["b"]
                kernel = W.T.reshape(FEATURES, HEADS, -1)
                put(getattr(self.attend, theirs), kernel=kernel, bias=b.reshape(HEADS, -1))
            out = own["attend"]["out"]
            put(self.attend.out, kernel=out["W"].T.reshape(HEADS, -1, FEATURES), bias=out["b"])

        def __call__(self, x, mask):
            x = x + self.attend(self.norm1(x), mask=mask)
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class GPT(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
            self.position = nnx.Param(params["position"]["P"])
            self.blocks = nnx.List([Block(of_block(params, i), rngs) for i in range(depth)])
            self.norm = nnx.LayerNorm(FEATURES, epsilon=1e-5, rngs=rngs)
            put(self.embed, embedding=params["embed"]["E"])
            put(self.norm, **params["norm"])

        def __call__(self, tokens):
            x = self.embed(tokens) + self.position[...]
            mask = nnx.make_causal_mask(tokens)
            for block in self.blocks:
                x = block(x, mask)
            return self.embed.attend(self.norm(x))

    graph, state = nnx.split(GPT(nnx.Rngs(0)))
    loss = lambda state, tokens, targets: mean_loss(nnx.merge(graph, state)(tokens), targets)
    return state, loss


def run(program: Any, holder: list, step: bool, *text: jax.Array) -> Any:
    """One call; a step leaves in `holder` what the next one starts from."""
    result = jax.block_until_ready(program(*holder, *text))
    if step:
        holder[:] = result[1:]
    return result


def stepping(loss: Callable) -> Callable:
    def step(weights, state, tokens, targets):
        value, gradient = jax.value_and_grad(loss)(weights, tokens, targets)
        updates, state = ADAM.update(gradient, state, weights)
        return value, optax.apply_updates(weights, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--step", action="store_true", help="a whole training step, with Adam")
    parser.add_argument("--time", action="store_true", help="run them too, in turns")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    options = parser.parse_args()
    text = np.random.default_rng(0).integers(0, VOCABULARY, (options.batch, options.length + 1))
    tokens, targets = jnp.asarray(text[:, :-1]), jnp.asarray(text[:, 1:])
    made = {"fnn": ours(options.depth, options.length, False)}
    made["fnn, remat"] = ours(options.depth, options.length, True)
    params = made["fnn"][0]
    if installed("flax", 'pip install "flax>=0.12"'):
        made["Flax NNX"] = in_nnx(params, options.depth)
    if installed("equinox", "pip install equinox"):
        made["Equinox"] = in_equinox(params, options.depth)
    runs, temporaries, sizes = {}, {}, {}
    for name, (weights, loss) in made.items():
        weights = jax.tree.map(jnp.copy, weights)  # each its own, to be donated
        held = [weights, ADAM.init(weights)] if options.step else [weights]
        function = stepping(loss) if options.step else jax.jit(jax.value_and_grad(loss))
        program = function.lower(*held, tokens, targets).compile()
        call = functools.partial(run, program, held, options.step, tokens, targets)
        value, tree = call()[:2]
        if options.step:  # the loss of the new weights, and the newer ones
            value, tree = call()[:2]
        squares = sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(tree))
        sizes[name] = float(value), squares**0.5
        temporaries[name] = program.memory_analysis().temp_size_in_bytes
        runs[name] = call
    for found in sizes.values():
        np.testing.assert_allclose(found, sizes["fnn"], rtol=1e-4)
    samples = interleaved(runs, rounds=5) if options.time else {}
    rows = []
    for name, size in temporaries.items():
        row = [name, f"{size / 1e6:.0f}", f"{size / temporaries['fnn']:.2f}"]
        if samples:
            row.append(ratio(samples[name], samples["fnn"]))
        rows.append(row)
    what = "training step" if options.step else "gradient"
    heads = [f"{what} of a GPT", "temporary MB", "÷ fnn's"] + ["time ÷ fnn's"] * options.time
    print(machine())
    print(table(heads, rows, options.markdown))


if __name__ == "__main__":
    main()

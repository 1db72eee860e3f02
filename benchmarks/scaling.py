"""What a training step holds, computes and sends on each device, from 1 to 64 devices.

    python benchmarks/scaling.py [--devices 1 2 4 8 16 32 64] [--only LAYOUT ...] [--markdown]
    python benchmarks/scaling.py --paper [--markdown]

The first compiles the step of a small GPT for so many virtual CPU devices, runs nothing, and reads
the compiled program: bytes of the state, FLOPs of its matrix products, bytes sent by each kind of
collective, per device; each beside the layout's closed form. The second prints, for a network of 7
billion parameters on 4,096 devices, how long the closed forms make a step compute and send.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
import os
import re
import sys

MOST = 64
FLAG = f"--xla_force_host_platform_device_count={MOST}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from measure import table  # noqa: E402

import fnn  # noqa: E402
from fnn import sharding  # noqa: E402
from fnn.layers import (  # noqa: E402
    MLP,
    Attention,
    Embedding,
    LayerNorm,
    Linear,
    network,
    repeat,
)
from fnn.sharding.traffic import instructions  # noqa: E402

# ---------------------------------------------------------------------------- the compiled program


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A GPT's, and its batch's."""

    batch: int = 64
    length: int = 64
    features: int = 128
    heads: int = 64
    depth: int = 64
    vocabulary: int = 128

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def gpt(sizes: Sizes):
    """A network that fills 64 devices by any of its axes."""

    @network(
        norm1=LayerNorm(),
        attend=Attention(sizes.heads, causal=True, use_bias=False),
        norm2=LayerNorm(),
        mlp=MLP(4 * sizes.features, activation=fnn.ops.relu),
    )
    def block(net, x):
        x = x + net.attend(net.norm1(x))
        return x + net.mlp(net.norm2(x))

    @network(
        embed=Embedding(sizes.vocabulary, sizes.features),
        blocks=repeat(block, sizes.depth),
        output=Linear(sizes.vocabulary, use_bias=False),
    )
    def net(net, tokens):
        return net.output(net.blocks(net.embed(tokens)))

    return net


def loss_of(net):
    def loss(params, tokens, mode):
        logits = net(params, tokens[:-1], mode=mode)
        return jnp.mean(fnn.ops.softmax_cross_entropy(logits, tokens[1:]))

    return loss


def layouts(n: int):
    """The layouts over n devices, all on one axis."""
    mesh = lambda name: jax.make_mesh((n,), (name,), devices=jax.devices()[:n])
    return {
        "data_parallel": lambda: sharding.data_parallel(mesh("data")),
        "fully_sharded": lambda: sharding.fully_sharded(mesh("data")),
        "tensor_parallel": lambda: sharding.tensor_parallel(mesh("model")),
        "sequence_parallel": lambda: sharding.sequence_parallel(mesh("sequence")),
        "pipeline_parallel": lambda: sharding.pipeline_parallel(
            mesh("stage"), microbatches=MICROBATCHES
        ),
    }


MICROBATCHES = 16


def compiled(layout, sizes: Sizes):
    """The step, compiled for types alone, and its state's types."""
    net = gpt(sizes)
    example = jax.ShapeDtypeStruct((sizes.length,), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), example)
    step = fnn.train_step(loss_of(net), optax.adam(1e-3), layout=layout, nonfinite="ignore")
    optimizer = step.optimizer
    state = fnn.State(
        params,
        jax.eval_shape(optimizer.init, params),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((3,), jnp.int32),
    )
    placed = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    state = jax.tree.map(placed, state, layout.of_state(state))
    tokens = (sizes.batch, sizes.length + 1)
    batch = jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=layout.of_batch(tokens))
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile(), params


# ------------------------------------------------------------------- FLOPs of a compiled program

_RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]")
_DOT = re.compile(r" dot\((?:[a-z]+\d*\[[\d,]*\](?:\{[\d,]*\})? )?%?([\w.-]+),")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def products(program) -> float:
    """FLOPs of the matrix products that one device computes, loops counted with their turns."""
    text = program.as_text()
    shapes = {}
    for line in text.splitlines():
        found = _RESULT.match(line)
        if found:
            shapes[found[1]] = [int(d) for d in found[2].split(",") if d]
    total = 0.0
    for line, times in instructions(text):
        dot = _DOT.search(line)
        if dot:
            name = _RESULT.match(line)[1]
            contracted = [int(i) for i in _CONTRACTED.search(line)[1].split(",") if i]
            depth = math.prod(shapes[dot[1]][i] for i in contracted)
            total += 2 * times * math.prod(shapes[name]) * depth
    return total


# ------------------------------------------------------------------------------- closed forms


@dataclasses.dataclass(frozen=True)
class Form:
    """What a device should hold, compute and send.

    Fields:
        state: bytes of parameters and of Adam's two moments, in float32.
        products: FLOPs of matrix products.
        sent: bytes, by kind of collective.
    """

    state: float
    products: float
    sent: dict[str, float]


def closed_form(name: str, n: int, sizes: Sizes, params) -> Form:
    """Of n devices; see `fnn.sharding` for the layouts' sources."""
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    P, B = count(params), count(params["blocks"])
    divided = sum(
        x.size
        for path, x in fnn.params.flatten(params["blocks"]).items()
        if path.endswith("W") or path == "mlp.hidden.b"
    )
    d, T, V, L = sizes.features, sizes.length, sizes.vocabulary, sizes.depth
    of_blocks = 6 * sizes.tokens * 12 * d * d * L + 14 * L * sizes.batch * T * T * d
    of_output = 6 * sizes.tokens * V * d
    activations = 4 * sizes.tokens * d
    ring = (n - 1) / n
    reduce, gather, permute = "all-reduce", "all-gather", "collective-permute"
    if name == "data_parallel":
        return Form(12 * P, (of_blocks + of_output) / n, {reduce: 2 * ring * 4 * P})
    if name == "fully_sharded":
        # Gathered forwards and, for the inputs' gradients, backwards; the gradients are summed to
        # where they lie. (XLA's CPU compiler has no reduce-scatter: it sends twice as much here.)
        sent = {gather: 2 * ring * 4 * P, "reduce-scatter": ring * 4 * P}
        return Form(12 * P / n, (of_blocks + of_output) / n, sent)
    if name == "tensor_parallel":
        # Two sums in forward and two in backward. (XLA's CPU compiler sums the input's gradients
        # by q, k and v one by one: six.)
        sent = {reduce: 4 * L * 2 * ring * activations}
        return Form(12 * (P - divided + divided / n), of_blocks / n + of_output, sent)
    if name == "sequence_parallel":
        keys = 2 * activations / n
        sent = {reduce: 2 * ring * 4 * P, permute: L * ((n - 1) * 3 + (n > 1)) * keys}
        return Form(12 * P, (of_blocks + of_output) / n, sent)
    turns = MICROBATCHES + n - 1
    sent = {
        reduce: 2 * ring * 2 * activations,
        permute: 2 * turns * activations / MICROBATCHES * (n > 1),
    }
    share = turns / MICROBATCHES / n
    return Form(12 * (P - B + B / n), of_blocks * share + of_output, sent)


def measured(program) -> Form:
    sent: dict[str, float] = collections.Counter()
    for c in sharding.collectives(program):
        sent[c.kind] += c.sent * c.times
    memory = program.memory_analysis()
    return Form(memory.alias_size_in_bytes, products(program), dict(sent))


# --------------------------------------------------------------------------------------- on paper


@dataclasses.dataclass(frozen=True)
class Machine:
    """An accelerator in a cluster, by its maker's numbers.

    Fields:
        flops: a second, of bfloat16 products.
        memory: bytes.
        near: bytes a second that it sends to those beside it, of which there are `group`.
        far: the same to all others.
    """

    name: str
    flops: float
    memory: float
    group: int
    near: float
    far: float


# NVIDIA's data sheet of the H100 SXM: 989.4 TFLOP/s dense, 80 GB, NVLink 900 GB/s both ways
# together; DGX H100: eight of them, a 400 Gb/s InfiniBand port each. Google Cloud's page on TPU
# v5p: 459 TFLOP/s, 95 GB, 1,200 GB/s both ways over the six links of a 3D torus: both links along
# one of its axes send 200 GB/s.
MACHINES = (
    Machine("H100 SXM", 989.4e12, 80e9, 8, 450e9, 50e9),
    Machine("TPU v5p", 459e12, 95e9, 4096, 200e9, 200e9),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """4,096 devices as a grid; the examples are dealt over data, which shards the parameters."""

    data: int
    model: int = 1
    sequence: int = 1
    stages: int = 1
    microbatches: int = 1
    sharded: bool = True

    def __str__(self) -> str:
        names = {"data": self.data, "model": self.model, "sequence": self.sequence}
        shown = " × ".join(
            f"{k} {v}" for k, v in (names | {"stages": self.stages}).items() if v > 1
        )
        return shown + ("" if self.sharded else ", whole copies")


PLANS = (
    Plan(4096, sharded=False),
    Plan(4096),
    Plan(512, model=8),
    Plan(128, model=8, sequence=4),
    Plan(128, model=8, stages=4, microbatches=16),
)

# Llama 2 7B, with Adam: float32 parameters and moments, 12 bytes a parameter; products in bfloat16.
SEVEN = {"params": 6_738_415_616, "depth": 32, "features": 4096, "hidden": 11008, "length": 4096}


def on_paper(plan: Plan, machine: Machine, texts: int) -> list[str]:
    """A row: memory and milliseconds of a step of so many texts, by the closed forms."""
    P, L, d, T = SEVEN["params"], SEVEN["depth"], SEVEN["features"], SEVEN["length"]
    texts = max(texts, plan.data)
    used = L * (4 * d * d + 3 * d * SEVEN["hidden"]) + 32000 * d
    flops = texts * T * (6 * used + 7 * L * T * d)  # causal attention, scores made again
    part = plan.model * plan.stages
    state = 12 * P / part / (plan.data * plan.sequence if plan.sharded else 1)
    bubble = (plan.stages - 1) / (plan.microbatches + plan.stages - 1)
    compute = flops / (plan.data * part * plan.sequence) / machine.flops / (1 - bubble)
    tokens = texts / plan.data * T / plan.sequence
    layers = L / plan.stages
    speed = lambda size: machine.near if size <= machine.group else machine.far
    ring = lambda n: (n - 1) / n
    seconds = {
        # Gathered twice in bfloat16 and the gradient scattered in float32, 2 + 2 + 4 bytes; or
        # whole copies, whose gradient is reduced by all, 2 · 4 bytes.
        "data": 8 * P / part * ring(plan.data * plan.sequence) / machine.far
        if plan.data > 1
        else 0,
        "model": 4 * layers * 2 * ring(plan.model) * tokens * d * 2 / speed(plan.model),
        "sequence": layers
        * (3 * (plan.sequence - 1) + (plan.sequence > 1))
        * 2
        * tokens
        * d
        * 2
        / plan.model
        / machine.far,
        "stages": 2 * (plan.stages > 1) * tokens * d * 2 / machine.far,
    }
    send = sum(seconds.values())
    fits = "" if state < machine.memory else " (too much)"
    ms = lambda x: f"{1e3 * x:.0f}"
    return [
        str(plan),
        f"{texts * T / 1e6:.1f}",
        f"{state / 1e9:.2f}{fits}",
        ms(compute),
        *(ms(seconds[k]) if seconds[k] else "-" for k in seconds),
        f"{compute * (1 - bubble) / (compute + send):.0%}",
        f"{compute * (1 - bubble) / max(compute, send):.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", nargs="*", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--only", nargs="*", choices=layouts(1), metavar="LAYOUT")
    parser.add_argument("--paper", action="store_true", help="7 billion parameters, 4,096 devices")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    if options.paper:
        heads = ["layout", "M tokens", "state GB", "compute ms", "data", "model", "sequence"]
        heads += ["stages", "of peak", "overlapped"]
        for machine in MACHINES:
            for texts in (1024, 4096):
                rows = [on_paper(plan, machine, texts) for plan in PLANS]
                print(f"\n{machine.name}, batches of {texts} texts\n")
                print(table(heads, rows, options.markdown))
        return
    sizes, rows = Sizes(), []
    for name in options.only or layouts(1):
        for n in options.devices:
            print(f"{name}, {n} devices", file=sys.stderr, flush=True)
            program, params = compiled(layouts(n)[name](), sizes)
            found, wanted = measured(program), closed_form(name, n, sizes, params)
            sent, form = sum(found.sent.values()), sum(wanted.sent.values())
            rows.append(
                [
                    name,
                    str(n),
                    f"{found.state / 1e6:.2f}",
                    f"{found.state / wanted.state:.3f}",
                    f"{found.products / 1e9:.3f}",
                    f"{found.products / wanted.products:.3f}",
                    f"{sent / 1e6:.2f}",
                    f"{sent / form:.3f}" if form else "-",
                    ", ".join(f"{k} {v / 1e6:.2f}" for k, v in sorted(found.sent.items())),
                ]
            )
    heads = ["layout", "devices", "state MB", "÷ form", "products GFLOP", "÷ form", "sent MB"]
    print(table([*heads, "÷ form", "of which"], rows, options.markdown))


if __name__ == "__main__":
    main()

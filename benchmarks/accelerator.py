"""What large work takes on a GPU or TPU, against the same in Flax NNX, plain JAX and PyTorch.

    python benchmarks/accelerator.py [--only gpt2 resnet50 norms attention]
        [--tiny] [--torch] [--markdown]

    gpt2         a step of AdamW of GPT-2, 124 million parameters, 8 texts of 1024 tokens, bfloat16
    resnet50     a step of SGD of ResNet-50, 64 images of 224 x 224, bfloat16
    norms        the norms of each of 8 texts' gradients of the same GPT-2, float32
    attention    value and gradient, causal, 8192 positions, 16 heads of 64, bfloat16

`a second` are tokens, images or positions; `of peak` is the share of the floating-point operations
that a product of two 8192 x 8192 matrices of bfloat16 reaches on this device, of those that the
work needs (recomputation doesn't count); `memory` is what the compiler asks for beside arguments
and results, of PyTorch the most that was in use. All programs are compiled at the same time, and
then run one after the other. --tiny makes all sizes small, to see that it runs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from measure import installed, machine, table

import fnn
from fnn import models, ops

HALF = jnp.bfloat16


class Program(NamedTuple):
    """One program to be run.

    Fields:
        function: jitted, `function(*arguments)`. If `carries`, its result is the next first
            argument, whose memory it may take.
        types: of its arguments.
        unit, count: what it works on, and how many of them.
        flops: that the work needs.
        carries: whether it goes on from its result.
    """

    function: Callable
    types: tuple
    unit: str
    count: int
    flops: float
    carries: bool = False


def half(tree: Any) -> Any:
    return jax.tree.map(lambda w: w.astype(HALF), tree)


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


KEY = jax.eval_shape(lambda: jax.random.key(0))


def _gpt2(tiny: bool) -> tuple[Any, Any, int, int]:
    """The network, the types of its parameters, and the batch: so many texts of so many tokens."""
    sizes = (50, 16, 16, 2, 2) if tiny else (50257, 1024, 768, 12, 12)
    net = models.gpt2(*sizes, dropout=0.0)
    texts, length = 2 if tiny else 8, sizes[1]
    return net, jax.eval_shape(net.init, KEY, integers(length)), texts, length


def _of_tokens(params: Any, features: int, depth: int, length: int) -> float:
    """Operations a token in a step: six a parameter, and those of causal attention's scores."""
    return 6 * size(params) + 6 * depth * features * length


def gpt2(tiny: bool = False) -> Program:
    net, params, texts, length = _gpt2(tiny)

    def loss(params, example):
        return jnp.mean(net(half(params), *example).astype(jnp.float32))

    step = fnn.train_step(loss, optax.adamw(3e-4), nonfinite="ignore")
    state = jax.eval_shape(step.init, params)

    @functools.partial(jax.jit, donate_argnums=0)
    def one(state, tokens, targets):
        return step(state, (tokens, targets))[0]

    text = integers(texts, length)
    depth = params["blocks"]["norm1"]["scale"].shape[0]
    each = _of_tokens(params, params["embed"]["E"].shape[1], depth, length)
    tokens = texts * length
    return Program(one, (state, text, text), "tokens", tokens, each * tokens, carries=True)


def norms(tiny: bool = False) -> Program:
    net, params, texts, length = _gpt2(tiny)

    def loss(params, example):
        return jnp.mean(net(params, *example))

    @jax.jit
    def of_batch(params, tokens, targets):
        _, gradients = fnn.per_example.grads(loss)(params, (tokens, targets))
        return fnn.per_example.norms(gradients)

    text = integers(texts, length)
    depth = params["blocks"]["norm1"]["scale"].shape[0]
    each = _of_tokens(params, params["embed"]["E"].shape[1], depth, length)
    tokens = texts * length
    return Program(of_batch, (params, text, text), "tokens", tokens, each * tokens)


def resnet50(tiny: bool = False) -> Program:
    side, images = (32, 2) if tiny else (224, 64)
    net = models.resnet((1, 1), 10, bottleneck=True, features=4) if tiny else models.resnet50()

    def loss(params, example, mode, state):
        x, label = example
        logits, state = net.apply(half(params), state, x.astype(HALF), mode=mode)
        return ops.softmax_cross_entropy(logits.astype(jnp.float32), label), state

    step = fnn.train_step(loss, optax.sgd(0.1, 0.9), nonfinite="ignore")
    x = jax.ShapeDtypeStruct((side, side, 3), jnp.float32)
    state = jax.eval_shape(lambda key: step.init(net.init(key, x), net.init_state(x)), KEY)

    @functools.partial(jax.jit, donate_argnums=0)
    def one(state, x, labels):
        return step(state, (x, labels))[0]

    batch = jax.ShapeDtypeStruct((images, *x.shape), x.dtype)
    # He et al. 2016, table 1: 3.8e9 multiplications with additions forwards (4.1e9 as here, where
    # the stride is the 3 x 3 convolution's), twice as many backwards.
    flops = 6 * 4.09e9 * images
    types = state, batch, integers(images)
    return Program(one, types, "images", images, 0.0 if tiny else flops, carries=True)


def _attention(function: Callable, tiny: bool) -> Program:
    length, heads, features = (64, 2, 8) if tiny else (8192, 16, 64)
    q = jax.ShapeDtypeStruct((length, heads, features), HALF)

    @jax.jit
    def gradients(q, k, v):
        total = lambda q, k, v: jnp.sum(function(q, k, v).astype(jnp.float32))
        return jax.grad(total, (0, 1, 2))(q, k, v)

    # Two products forwards and five backwards, over half of the scores.
    flops = 7 * 2 * length**2 * heads * features / 2
    return Program(gradients, (q, q, q), "positions", length, flops)


def attention(tiny: bool = False) -> Program:
    return _attention(functools.partial(ops.attention, causal=True), tiny)


def jax_attention(tiny: bool = False) -> Program:
    return _attention(functools.partial(jax.nn.dot_product_attention, is_causal=True), tiny)


OURS = {"gpt2": gpt2, "resnet50": resnet50, "norms": norms, "attention": attention}


# ----------------------------------------------------------------------------------------- peers


def nnx_gpt2(tiny: bool = False) -> Program:
    """Flax NNX's, with all logits and optax's loss."""
    ours = gpt2(tiny)
    _, params, _, length = _gpt2(tiny)
    vocabulary, width = params["embed"]["E"].shape
    depth = params["blocks"]["norm1"]["scale"].shape[0]
    peer = importlib.import_module("peers.of_nnx").training(
        "gpt",
        blocks=depth,
        width=width,
        heads=2 if tiny else 12,
        length=length,
        vocabulary=vocabulary,
        dtype=HALF,
    )
    return ours._replace(function=peer.step, types=(peer.state, *ours.types[1:]))


def nnx_resnet50(tiny: bool = False) -> Program:
    """Flax NNX's, by Adam instead of SGD."""
    ours = resnet50(tiny)
    peer = importlib.import_module("peers.of_nnx").training("resnet50", dtype=HALF)
    return ours._replace(function=peer.step, types=(peer.state, *ours.types[1:]))


def norms_one_by_one(tiny: bool = False) -> Program:
    """vmap of jax.grad: every example's gradient is formed."""
    net, *_ = _gpt2(tiny)

    @jax.jit
    def of_batch(params, tokens, targets):
        loss = lambda params, *example: jnp.mean(net(params, *example))
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(params, tokens, targets)
        return jax.vmap(optax.tree.norm)(gradients)

    return norms(tiny)._replace(function=of_batch)


PEERS: dict[str, dict[str, Callable[[bool], Program]]] = {
    "gpt2": {"Flax NNX": nnx_gpt2},
    "resnet50": {"Flax NNX": nnx_resnet50},
    "norms": {"vmap(jax.grad)": norms_one_by_one},
    "attention": {"jax.nn.dot_product_attention": jax_attention},
}


# --------------------------------------------------------------------------------------- running


def filled(types: Any) -> Any:
    """Arrays of these types: small numbers, and classes and tokens below ten."""

    def fill(number, t):
        if not isinstance(t, jax.ShapeDtypeStruct):
            return t
        key = jax.random.fold_in(jax.random.key(0), number)
        if jnp.issubdtype(t.dtype, jnp.integer):
            return jax.random.randint(key, t.shape, 0, 10, t.dtype)
        if jnp.issubdtype(t.dtype, jnp.floating):
            return 0.02 * jax.random.normal(key, t.shape, t.dtype)
        return jnp.zeros(t.shape, t.dtype)

    leaves, tree = jax.tree.flatten(types)
    return jax.tree.unflatten(tree, [fill(i, t) for i, t in enumerate(leaves)])


def compiled(build: Callable[[bool], Program], tiny: bool) -> tuple[Program, Any]:
    program = build(tiny)
    return program, program.function.lower(*program.types).compile()


def seconds(program: Program, run: Any, calls: int) -> tuple[float, float]:
    """The least time of a call, and the bytes that the compiler asks for."""
    arguments = list(filled(program.types))
    least = float("inf")
    for _ in range(calls + 1):
        began = time.perf_counter()
        result = jax.block_until_ready(run(*arguments))
        least = min(least, time.perf_counter() - began)
        if program.carries:
            arguments[0] = result
    return least, run.memory_analysis().temp_size_in_bytes


def peak(tiny: bool) -> float:
    """Operations a second of a product of matrices of bfloat16."""
    side = 256 if tiny else 8192
    a = jnp.ones((side, side), HALF)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    least = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(product(a))
        least = min(least, time.perf_counter() - began)
    return 2 * side**3 / least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", choices=OURS, default=list(OURS))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--torch", action="store_true", help="PyTorch too, on an NVIDIA GPU")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    print(machine())
    most = peak(options.tiny)
    print(f"a product of matrices: {most / 1e12:.2f} TFLOP a second")
    builds = {
        (name, library): build
        for name in options.only
        for library, build in {"fnn": OURS[name], **PEERS[name]}.items()
        if library != "Flax NNX" or installed("flax", "pip install flax")
    }
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {
            which: pool.submit(compiled, build, options.tiny) for which, build in builds.items()
        }
    rows = []

    def add(name: str, library: str, program: Program, least: float, memory: float) -> None:
        rate = f"{program.count / least:,.0f} {program.unit}"
        share = f"{program.flops / least / most:.0%}" if program.flops else "-"
        rows.append([name, library, rate, share, f"{memory / 1e6:,.0f} MB"])
        print(" | ".join(rows[-1]), flush=True)

    programs = {}
    for (name, library), future in futures.items():
        try:
            program, run = future.result()
            programs.setdefault(name, program)
            add(name, library, program, *seconds(program, run, options.calls))
        except Exception as error:  # of memory, for one: the others are still worth knowing
            print(f"{name} of {library}: {error!r:.300}", flush=True)
        futures[name, library] = None
    if options.torch:
        peer = importlib.import_module("peers.accelerated_torch")
        for name, program in programs.items():
            for library in ("PyTorch", "PyTorch compiled"):
                try:
                    found = peer.seconds(name, options.tiny, "comp" in library, options.calls)
                    add(name, library, program, *found)
                except Exception as error:
                    print(f"{name} of {library}: {error!r:.300}", flush=True)
    rows.sort(key=lambda row: options.only.index(row[0]))
    heads = ["work", "library", "a second", "of peak", "memory"]
    print(f"\n{table(heads, rows, options.markdown)}")


if __name__ == "__main__":
    main()

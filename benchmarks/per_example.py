"""Per-example norms and clipped gradients, as ratios to one mean gradient's time.

    python benchmarks/per_example.py [--workload mlp cnn gpt lstm] [--batch 16 256 1024]
                                     [--rounds 20] [--only ROW ...] [--sweep] [--markdown]

All run in one process and take turns. `ms` is the median time of a call; `/ gradient` the median,
round by round, of its ratio to `jax.grad` of the batch's mean loss; `FLOPs` and `memory` (temporary
bytes, and those with the results) are the compiled program's, as ratios to that gradient's.
`--sweep` goes through batches of 16 to 1024. The peers

    optax        differentially_private_aggregate, given vmap(grad)
    jax-privacy  clipped_grad, as it is by default, and one example at a time
    Opacus       hooks (GradSampleModule) and ghost clipping, on the MLP
    BackPACK     norms, second moment and variance, on the MLP

are left out, with the line that installs them, where they aren't installed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from measure import compiled, installed, interleaved, machine, milliseconds, ratio, table

import fnn.per_example as pe

CLIP = 1.0
SWEEP = (16, 64, 256, 1024)

# ------------------------------------------------------------------------------------ workloads
#
# Each gives (model(parameters, input), parameters, (inputs, targets)).


def _weights(**shapes):
    rng = np.random.default_rng(0)
    draw = lambda s: rng.standard_normal(s) * (math.prod(s[1:]) ** -0.5 if len(s) > 1 else 0.1)
    return {name: jnp.asarray(draw(s), jnp.float32) for name, s in shapes.items()}


def _inputs(*shape):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


def _labels(*shape):
    return jnp.asarray(np.random.default_rng(2).integers(0, 10, shape), jnp.int32)


def _cross_entropy(logits, labels):
    """In plain JAX; the mean over the words of a text."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], -1))


def loss_of(model, loss=_cross_entropy):
    """The loss of one example."""
    return lambda p, example: loss(model(p, example[0]), example[1])


def mlp(batch):
    """784 - 512 - 512 - 10, relu, with biases."""
    sizes = (784, 512, 512, 10)
    p = _weights(**{f"W{i}": (o, n) for i, (n, o) in enumerate(itertools.pairwise(sizes))})
    p |= _weights(**{f"b{i}": (o,) for i, o in enumerate(sizes[1:])})

    def model(p, x):
        h = x
        for i in range(3):
            h = p[f"W{i}"] @ (h if i == 0 else jax.nn.relu(h)) + p[f"b{i}"]
        return h

    return model, p, (_inputs(batch, 784), _labels(batch))


def cnn(batch):
    """ResNet-like: 32x32 images, blocks of 16 and 32 and 64 channels, group normalisation."""
    p, stages = _weights(stem=(3, 3, 3, 16)), [(16, 16), (16, 32), (32, 64)]
    for i, (n, o) in enumerate(stages):
        p |= _weights(**{f"A{i}": (3, 3, n, o), f"B{i}": (3, 3, o, o), f"S{i}": (1, 1, n, o)})
        p |= _weights(**{f"s{i}": (n,), f"t{i}": (o,)})
    # Kernels are (height, width, in, out): scaled by their fan in.
    p = {k: x * x.shape[-1] ** 0.5 / x.shape[-2] ** 0.5 if x.ndim == 4 else x for k, x in p.items()}
    p |= _weights(W=(64, 10))

    def conv(x, w, stride=1):
        return lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def norm(x, scale, groups=8):
        h = x.reshape(*x.shape[:3], groups, -1)
        h = h - h.mean((1, 2, 4), keepdims=True)
        h = h * lax.rsqrt(jnp.mean(h * h, (1, 2, 4), keepdims=True) + 1e-5)
        return h.reshape(x.shape) * (1 + scale)

    def model(p, x):
        x = conv(x[None], p["stem"])
        for i in range(3):
            stride = 1 if i == 0 else 2
            h = conv(jax.nn.relu(norm(x, p[f"s{i}"])), p[f"A{i}"], stride)
            h = conv(jax.nn.relu(norm(h, p[f"t{i}"])), p[f"B{i}"])
            x = h + (x if i == 0 else conv(x, p[f"S{i}"], stride))
        return jnp.mean(x[0], (0, 1)) @ p["W"]

    del p["S0"]
    return model, p, (_inputs(batch, 32, 32, 3), _labels(batch))


def gpt(batch):
    """Embedding of 512 words, one causal block (128 wide, 4 heads, 512 hidden), tied output; 64
    words."""
    width, heads, hidden, length, words = 128, 4, 512, 64, 512
    p = _weights(E=(words, width), place=(length, width), q=(width, width), k=(width, width))
    p |= _weights(v=(width, width), o=(width, width), up=(width, hidden), down=(hidden, width))
    p |= _weights(s1=(width,), s2=(width,), s3=(width,), b=(hidden,))

    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * (1 + scale)

    def model(p, words):
        x = p["E"][words] + p["place"]
        h = norm(x, p["s1"])
        q, k, v = ((h @ p[n]).reshape(length, heads, -1) for n in "qkv")
        scores = jnp.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
        out = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v)
        x = x + out.reshape(length, width) @ p["o"]
        x = x + jax.nn.gelu(norm(x, p["s2"]) @ p["up"] + p["b"]) @ p["down"]
        return norm(x, p["s3"]) @ p["E"].T

    tokens = np.random.default_rng(1).integers(0, words, (batch, length + 1))
    tokens = jnp.asarray(tokens, jnp.int32)
    return model, p, (tokens[:, :-1], tokens[:, 1:])


def lstm(batch):
    """128 cells, 32 steps of 32 inputs, under scan."""
    p = _weights(W=(512, 32), U=(512, 128), b=(512,), out=(10, 128))

    def model(p, xs):
        def step(state, x):
            h, c = state
            i, f, g, o = jnp.split(p["W"] @ x + p["U"] @ h + p["b"], 4)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        (h, _), _ = lax.scan(step, (jnp.zeros(128), jnp.zeros(128)), xs)
        return p["out"] @ h

    return model, p, (_inputs(batch, 32, 32), _labels(batch))


WORKLOADS = {"mlp": (mlp, 256), "cnn": (cnn, 32), "gpt": (gpt, 16), "lstm": (lstm, 64)}

# ----------------------------------------------------------------------------------------- rows
#
# Each takes (loss, parameters, batch) and returns a compiled function of (parameters, batch), or
# for PyTorch a function of nothing.


def _vmap_grad(loss):
    return jax.vmap(jax.grad(loss), (None, 0))


def _norms_of(grads):
    square = lambda x: jnp.sum(x.reshape(x.shape[0], -1) ** 2, axis=1)
    return jnp.sqrt(sum(map(square, jax.tree.leaves(grads))))


def mean_gradient(loss, p, batch):
    return compiled(
        jax.grad(lambda p, batch: jnp.mean(jax.vmap(loss, (None, 0))(p, batch))), p, batch
    )


def vmap_norms(loss, p, batch):
    return compiled(lambda p, batch: _norms_of(_vmap_grad(loss)(p, batch)), p, batch)


def vmap_clipped(loss, p, batch):
    def clipped(p, batch):
        g = _vmap_grad(loss)(p, batch)
        c = jnp.minimum(1, CLIP / _norms_of(g))
        return jax.tree.map(lambda x: jnp.tensordot(c, x, 1), g)

    return compiled(clipped, p, batch)


def fnn_norms(loss, p, batch):
    return compiled(lambda p, batch: pe.norms(pe.grads(loss)(p, batch)[1]), p, batch)


def fnn_clipped(loss, p, batch, **options):
    clipped = pe.clipped_grad(loss, CLIP, **options)
    return compiled(lambda p, batch: clipped(p, batch).gradient, p, batch)


def fnn_moments(loss, p, batch):
    return compiled(lambda p, batch: pe.second_moment(pe.grads(loss)(p, batch)[1]), p, batch)


def fnn_variance(loss, p, batch):
    return compiled(lambda p, batch: pe.variance(pe.grads(loss)(p, batch)[1]), p, batch)


def optax_clipped(loss, p, batch):
    import optax

    def clipped(p, batch):
        aggregate = optax.contrib.differentially_private_aggregate(CLIP, 0.0, 0)
        return aggregate.update(_vmap_grad(loss)(p, batch), aggregate.init(p))[0]

    return compiled(clipped, p, batch)


def jax_privacy(loss, p, batch, **options):
    import jax_privacy

    clipped = jax_privacy.clipped_grad(loss, l2_clip_norm=CLIP, keep_batch_dim=False, **options)
    return compiled(lambda p, batch: clipped(p, batch), p, batch)


def _torch_mlp(p, batch):
    import torch

    layers: list = []
    for i in range(3):
        linear = torch.nn.Linear(*p[f"W{i}"].shape[::-1])
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(np.asarray(p[f"W{i}"])))
            linear.bias.copy_(torch.tensor(np.asarray(p[f"b{i}"])))
        layers += [torch.nn.ReLU(), linear] if i else [linear]
    x, y = (torch.tensor(np.asarray(a)) for a in batch)
    return torch.nn.Sequential(*layers), x, y.long()


def torch_gradient(loss, p, batch):
    import torch

    net, x, y = _torch_mlp(p, batch)
    measure = torch.nn.CrossEntropyLoss()

    def run():
        net.zero_grad()
        measure(net(x), y).backward()

    return run


def opacus_hooks(loss, p, batch):
    import torch
    from opacus import GradSampleModule

    net, x, y = _torch_mlp(p, batch)
    net, measure = GradSampleModule(net), torch.nn.CrossEntropyLoss(reduction="sum")

    def run():
        net.zero_grad()
        measure(net(x), y).backward()
        weights = [w.grad_sample for w in net.parameters()]
        norms = torch.sqrt(sum((g.flatten(1) ** 2).sum(1) for g in weights))
        c = torch.clamp(CLIP / norms, max=1)
        return [torch.tensordot(c, g, 1) for g in weights]

    return run


def opacus_ghost(loss, p, batch):
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    net, x, y = _torch_mlp(p, batch)
    net = GradSampleModuleFastGradientClipping(
        net, max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="mean"
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(net.parameters(), lr=0.0),
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        expected_batch_size=len(x),
    )
    measure = DPLossFastGradientClipping(net, optimizer, torch.nn.CrossEntropyLoss())

    def run():
        optimizer.zero_grad()
        measure(net(x), y).backward()

    return run


def backpack_quantity(loss, p, batch, extension):
    import torch
    from backpack import backpack, extend, extensions

    net, x, y = _torch_mlp(p, batch)
    net, measure = extend(net), extend(torch.nn.CrossEntropyLoss(reduction="sum"))

    def run():
        net.zero_grad()
        with backpack(getattr(extensions, extension)()):
            measure(net(x), y).backward()
        if extension == "BatchL2Grad":
            return torch.sqrt(sum(w.batch_l2 for w in net.parameters()))

    return run


GRADIENT = "mean gradient (jax.grad)"
ROWS: dict[str, tuple[Callable, str, str, tuple[str, ...]]] = {
    # name: (maker, module it needs, pip's name for it, workloads; all unless said)
    GRADIENT: (mean_gradient, "jax", "jax", ()),
    "fnn norms": (fnn_norms, "jax", "jax", ()),
    "vmap(grad) norms": (vmap_norms, "jax", "jax", ()),
    "fnn clipped": (fnn_clipped, "jax", "jax", ()),
    "fnn clipped, 2 sweeps": (functools.partial(fnn_clipped, sweeps=2), "jax", "jax", ()),
    "vmap(grad) clipped": (vmap_clipped, "jax", "jax", ()),
    "fnn second moment": (fnn_moments, "jax", "jax", ()),
    "fnn variance": (fnn_variance, "jax", "jax", ("mlp",)),
    "optax clipped": (optax_clipped, "optax", "optax", ()),
    "jax-privacy clipped": (jax_privacy, "jax_privacy", "jax-privacy", ("mlp",)),
    "jax-privacy clipped, one at a time": (
        functools.partial(jax_privacy, microbatch_size=1),
        "jax_privacy",
        "jax-privacy",
        (),
    ),
    "PyTorch mean gradient": (torch_gradient, "torch", "torch==2.13.0", ("mlp",)),
    "Opacus hooks": (opacus_hooks, "opacus", "opacus", ("mlp",)),
    "Opacus ghost": (opacus_ghost, "opacus", "opacus", ("mlp",)),
}
BACKPACK = {"norms": "BatchL2Grad", "second moment": "SumGradSquared", "variance": "Variance"}
for _name, _extension in BACKPACK.items():
    ROWS[f"BackPACK {_name}"] = (
        functools.partial(backpack_quantity, extension=_extension),
        "backpack",
        "backpack-for-pytorch",
        ("mlp",),
    )

# --------------------------------------------------------------------------------------- tables


def compare(workload: str, batch: int, rounds: int, names: list[str]) -> list[list[str]]:
    """The rows of one workload's table."""
    make, _ = WORKLOADS[workload]
    model, p, data = make(batch)
    loss = loss_of(model)
    calls, programs = {}, {}
    for name in names:
        maker, module, package, only = ROWS[name]
        if only and workload not in only:
            continue
        if not installed(module, f"pip install {package}"):
            continue
        print(f"{workload}: preparing {name}", file=sys.stderr, flush=True)
        made = maker(loss, p, data)
        if hasattr(made, "cost_analysis"):
            programs[name] = made
            calls[name] = lambda made=made: jax.block_until_ready(made(p, data))
        else:
            calls[name] = made
    samples = interleaved(calls, rounds)
    numbers = {name: _costs(program) for name, program in programs.items()}
    rows = []
    for name, found in samples.items():
        costs = numbers.get(name)
        cost = (
            [f"{a / b:.2f}" for a, b in zip(costs, numbers[GRADIENT], strict=True)]
            if costs
            else [""] * 3
        )
        rows.append([name, milliseconds(found), ratio(found, samples[GRADIENT]), *cost])
    return rows


def _costs(program) -> tuple[float, float, float]:
    memory = program.memory_analysis()
    temporary = memory.temp_size_in_bytes
    return program.cost_analysis()["flops"], temporary, temporary + memory.output_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", nargs="*", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--batch", nargs="*", type=int, help="instead of each workload's own")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=ROWS, metavar="ROW")
    parser.add_argument("--sweep", action="store_true", help=f"batches of {SWEEP}; fnn and vmap")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    names = [GRADIENT, *(n for n in options.only or ROWS if n != GRADIENT)]
    if options.sweep and not options.only:
        names = [GRADIENT, "fnn norms", "fnn clipped", "vmap(grad) norms"]
    print(machine())
    for workload in options.workload:
        batches = options.batch or (SWEEP if options.sweep else [WORKLOADS[workload][1]])
        for batch in batches:
            rows = compare(workload, batch, options.rounds, names)
            heads = [f"{workload}, batch {batch}", "ms", "/ gradient", "FLOPs", "memory", "in all"]
            print(f"\n{table(heads, rows, options.markdown)}", flush=True)


if __name__ == "__main__":
    main()

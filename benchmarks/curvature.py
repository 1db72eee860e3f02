"""Curvature and KFAC's step: fnn against BackPACK and kfac-jax, quantity by quantity.

    python benchmarks/curvature.py [--batch 256] [--rounds 20] [--steps 50] [--markdown]

The network is the MLP 784 - 512 - 512 - 10 with relu and softmax cross-entropy. All run in one
process and take turns. `ms` is the median time of a call; `/ gradient` the median, round by round,
of its ratio to the same library's mean gradient (jax.grad, PyTorch); `fnn / BackPACK` that of the
two times. Then a whole run of KFAC steps, compilation included, against kfac-jax. What isn't
installed is left out, with the line that installs it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax
import per_example as workloads
from measure import interleaved, machine, ratios, table

import fnn
import fnn.per_example as pe
from fnn import curvature, ops

BACKPACK = "pip install --no-deps backpack-for-pytorch einops unfoldNd opt_einsum"
KFAC_JAX = "pip install kfac-jax"


def model(p, x):
    h = x
    for i in range(3):
        h = p[f"W{i}"] @ (h if i == 0 else jax.nn.relu(h)) + p[f"b{i}"]
    return h


def loss(p, example):
    return ops.softmax_cross_entropy(model(p, example[0]), example[1])


def mean_loss(p, batch):
    return jnp.mean(jax.vmap(lambda x, y: loss(p, (x, y)))(*batch))


KEY = jax.random.key(0)
CROSS_ENTROPY = ops.softmax_cross_entropy
DRAW = {"key": KEY, "samples": 1}

# BackPACK's extension: (its name, ours, our function of (parameters, batch)).
QUANTITIES = {
    "BatchGrad": (
        "per_example.materialize",
        lambda p, b: pe.materialize(pe.grads(loss)(p, b)[1]),
    ),
    "BatchL2Grad": ("per_example.norms", lambda p, b: pe.norms(pe.grads(loss)(p, b)[1])),
    "SumGradSquared": (
        "per_example.second_moment",
        lambda p, b: pe.second_moment(pe.grads(loss)(p, b)[1]),
    ),
    "Variance": ("per_example.variance", lambda p, b: pe.variance(pe.grads(loss)(p, b)[1])),
    "DiagGGNMC": ("ggn_diagonal, 1 sample", curvature.ggn_diagonal(model, CROSS_ENTROPY, **DRAW)),
    "DiagGGNExact": ("ggn_diagonal", curvature.ggn_diagonal(model, CROSS_ENTROPY)),
    "KFAC": (
        "kronecker_factors, 1 sample",
        curvature.kronecker_factors(model, CROSS_ENTROPY, **DRAW),
    ),
    "KFLR": ("kronecker_factors", curvature.kronecker_factors(model, CROSS_ENTROPY)),
    "DiagHessian": ("hessian_diagonal", curvature.hessian_diagonal(model, CROSS_ENTROPY)),
}


def installed(module: str, line: str) -> bool:
    if importlib.util.find_spec(module) is None:
        print(f"{module} is left out: {line}", file=sys.stderr)
        return False
    try:
        importlib.import_module(module)
    except Exception as error:  # installed, but not for this JAX
        print(f"{module} is left out: importing it raises {error!r}", file=sys.stderr)
        return False
    return True


def quantities(batch: int, rounds: int, only: list[str]) -> list[list[str]]:
    _, p, data = workloads.mlp(batch)
    compiled = jax.jit(jax.grad(mean_loss)).lower(p, data).compile()
    calls = {"gradient": lambda: jax.block_until_ready(compiled(p, data))}
    if peers := installed("backpack", BACKPACK):
        calls["PyTorch gradient"] = workloads.torch_gradient(None, p, data)
    for name in only:
        print(f"preparing {name}", file=sys.stderr, flush=True)
        ours = jax.jit(QUANTITIES[name][1]).lower(p, data).compile()
        calls[name] = lambda ours=ours: jax.block_until_ready(ours(p, data))
        if peers:
            calls[f"BackPACK {name}"] = workloads.backpack_quantity(None, p, data, name)
    samples = interleaved(calls, rounds)
    middle = lambda a, b: f"{statistics.median(ratios(samples[a], samples[b])):.2f}"
    ms = lambda a: f"{1e3 * statistics.median(samples[a]):.2f}"
    rows = [["gradient", "jax.grad", ms("gradient"), "1.00", *_peer_gradient(peers, ms)]]
    for name in only:
        row = [name, QUANTITIES[name][0], ms(name), middle(name, "gradient")]
        if peers:
            row += [
                ms(f"BackPACK {name}"),
                middle(f"BackPACK {name}", "PyTorch gradient"),
                middle(name, f"BackPACK {name}"),
            ]
        rows.append(row)
    return rows


def _peer_gradient(peers: bool, ms) -> list[str]:
    return [ms("PyTorch gradient"), "1.00", ""] if peers else []


# ------------------------------------------------------------------------------------ KFAC's step


def kfac_run(batch: int, steps: int) -> list[list[str]]:
    """Seconds until the compiled first step has run, and of each later one; the loss reached."""
    _, p, data = workloads.mlp(batch)
    runs = {"fnn.curvature.kfac": functools.partial(our_kfac, p, data)}
    if installed("kfac_jax", KFAC_JAX):
        runs["kfac-jax"] = functools.partial(their_kfac, p, data)
    rows = []
    for name, run in runs.items():
        begin = time.perf_counter()
        step = run()
        step()
        first = time.perf_counter() - begin
        begin = time.perf_counter()
        for _ in range(steps - 1):
            value = step()
        each = (time.perf_counter() - begin) / (steps - 1)
        total = first + each * (steps - 1)
        rows.append([name, f"{first:.2f}", f"{1e3 * each:.1f}", f"{total:.2f}", f"{value:.2e}"])
    return rows


def our_kfac(p, data):
    # The same schedule as kfac-jax's defaults: factors each step, inverses each fifth.
    optimizer = curvature.kfac(model, CROSS_ENTROPY, data, damping=1e-3)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, data):
        params, opt = state
        value, gradient = fnn.value_and_grad(mean_loss)(params, data)
        updates, opt = optimizer.update(gradient, opt, params, batch=data)
        return (optax.apply_updates(params, updates), opt), value

    now = [(jax.tree.map(jnp.copy, p), optimizer.init(p))]

    def run():
        now[0], value = step(now[0], data)
        return float(value)

    return run


def their_kfac(p, data):
    import kfac_jax

    # Its matcher recognises whole layers, in the batched form x @ W + b.
    p = {k: (v.T if k[0] == "W" else v) for k, v in p.items()}

    def batched_loss(p, batch):
        h, labels = batch
        for i in range(3):
            h = (h if i == 0 else jax.nn.relu(h)) @ p[f"W{i}"] + p[f"b{i}"]
        kfac_jax.register_softmax_cross_entropy_loss(h, labels)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(h, labels))

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(batched_loss),
        l2_reg=0.0,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=1e-3,
        num_burnin_steps=0,
        multi_device=False,
    )
    key = jax.random.PRNGKey(0)
    now = [p, optimizer.init(p, key, data)]

    def run():
        params, state, stats = optimizer.step(
            now[0], now[1], key, batch=data, global_step_int=int(now[1].step_counter)
        )
        now[:] = params, state
        return float(stats["loss"])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    parser.add_argument("--no-kfac", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    print(machine(), end="\n\n")
    rows = quantities(args.batch, args.rounds, args.only)
    heads = ["BackPACK's name", "fnn", "ms", "/ gradient"]
    heads += ["BackPACK ms", "/ gradient", "fnn / BackPACK"][: len(rows[0]) - 4]
    print(table(heads, rows, args.markdown), end="\n\n")
    if not args.no_kfac:
        heads = ["optimiser", "first step, s", "a step, ms", f"{args.steps} steps, s", "loss"]
        print(table(heads, kfac_run(args.batch, args.steps), args.markdown))


if __name__ == "__main__":
    main()

"""Curvature and KFAC's step: fnn against plain JAX, BackPACK and kfac-jax.

    python benchmarks/curvature.py [--part quantities backpack kfac] [--workload mlp cnn gpt lstm]
                                   [--batch 16 256 1024] [--sweep] [--rounds 20] [--steps 50]
                                   [--only ROW ...] [--markdown]

All run in one process and take turns; the networks are those of per_example.py, with softmax
cross-entropy. `ms` is the median time of a call; `/ gradient` the median, round by round, of its
ratio to the same library's mean gradient (jax.grad, PyTorch). Three tables:

    quantities  ours against what one writes in plain JAX; FLOPs and memory (temporary bytes) are
                the compiled programs', ours over a gradient's; `/ plain` is ours over plain JAX's
    backpack    each of BackPACK's extensions, on the MLP 784 - 512 - 512 - 10
    kfac        steps of KFAC, compilation included, against kfac-jax, on the MLP

`--sweep` goes through batches of 16 to 1024. What isn't installed is left out, with the line that
installs it.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import per_example as workloads
from measure import compiled, installed, interleaved, machine, milliseconds, ratio, table

import fnn
import fnn.per_example as pe
from fnn import curvature, ops

BACKPACK = "pip install --no-deps backpack-for-pytorch einops unfoldNd opt_einsum"
KFAC_JAX = "pip install --no-deps kfac-jax tfp-nightly distrax immutabledict"

KEY = jax.random.key(0)
DRAW = {"key": KEY, "samples": 1}


def cross_entropy(logits, labels):
    """Softmax cross-entropy, its mean over the words of a text."""
    return jnp.mean(ops.softmax_cross_entropy(logits, labels))


def loss_of(model):
    return workloads.loss_of(model, cross_entropy)


def mean_loss(model, p, batch):
    return jnp.mean(jax.vmap(loss_of(model), (None, 0))(p, batch))


def temporary(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


# ------------------------------------------------------------------------- ours, and plain JAX's
#
# Each takes (model, parameters, batch), and gives what is computed.


def product(make: Callable) -> Callable:
    """A product of an operator with the parameters themselves."""
    return lambda model, p, batch: make(model, cross_entropy)(p, batch)(p)


def drawn_gradients(model, p, batch):
    """vmap(grad) at labels drawn from the network's own outputs, scaled to give the GGN."""
    inputs, labels = batch

    def of_example(x, key):
        drawn = jax.random.categorical(key, model(p, x))
        scale = drawn.size**0.5
        return jax.grad(lambda p: scale * cross_entropy(model(p, x), drawn))(p)

    return jax.vmap(of_example)(inputs, jax.random.split(KEY, len(labels)))


def plain_ggn_product(model, p, batch):
    inputs, labels = batch
    z, jz = jax.jvp(lambda p: jax.vmap(lambda x: model(p, x))(inputs), (p,), (p,))
    slope = jax.grad(lambda z: jnp.mean(jax.vmap(cross_entropy)(z, labels)))
    _, bent = jax.jvp(slope, (z,), (jz,))
    return jax.vjp(lambda p: jax.vmap(lambda x: model(p, x))(inputs), p)[1](bent)[0]


def plain_hessian_product(model, p, batch):
    return jax.jvp(jax.grad(lambda p: mean_loss(model, p, batch)), (p,), (p,))[1]


def plain_empirical_fisher(model, p, batch):
    losses = lambda p: jax.vmap(loss_of(model), (None, 0))(p, batch)
    _, along = jax.jvp(losses, (p,), (p,))
    return jax.vjp(losses, p)[1](along / along.size)[0]


def plain_drawn_diagonal(model, p, batch):
    return jax.tree.map(lambda g: jnp.mean(g * g, 0), drawn_gradients(model, p, batch))


def plain_drawn_trace(model, p, batch):
    squares = jax.tree.map(lambda g: jnp.sum(g * g), drawn_gradients(model, p, batch))
    return sum(jax.tree.leaves(squares)) / len(batch[1])


def plain_diagonal(model, p, batch):
    """diag JᵀHJ of one example after another: all Jacobians at once don't fit in memory."""

    def add(total, example):
        x, y = example
        j = jax.jacrev(lambda p: model(p, x))(p)
        h = jax.hessian(cross_entropy)(model(p, x), y)
        own = jax.tree.map(lambda j: jnp.einsum("c...,cd,d...->...", j, h, j), j)
        return jax.tree.map(jnp.add, total, own), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, p), batch)
    return jax.tree.map(lambda x: x / len(batch[1]), total)


def plain_ntk(model, p, batch):
    jacobian = jax.vmap(jax.jacrev(model), (None, 0))(p, batch[0])
    flat = [j.reshape(*j.shape[:2], -1) for j in jax.tree.leaves(jacobian)]
    return sum(jnp.einsum("ncp,mdp->ncmd", j, j) for j in flat)


FEW = ("mlp", "cnn", "lstm")  # outputs; the GPT has 64 words of 512
GRAM = 32  # examples of the kernels: their Jacobians, in plain JAX, must fit in memory
first = lambda function: lambda m, p, b: function(m, p, jax.tree.map(lambda x: x[:GRAM], b))
curved = lambda name, **options: (
    lambda m, p, b: getattr(curvature, name)(m, cross_entropy, **options)(p, b)
)

# name: (ours, plain JAX's, workloads; all unless said).
ROWS: dict[str, tuple[Callable, Callable | None, tuple[str, ...]]] = {
    "GGN product": (product(curvature.ggn_vector_product), plain_ggn_product, ()),
    "Hessian product": (product(curvature.hessian_vector_product), plain_hessian_product, ()),
    "empirical Fisher product": (product(curvature.empirical_fisher), plain_empirical_fisher, ()),
    "GGN diagonal, 1 sample": (curved("ggn_diagonal", **DRAW), plain_drawn_diagonal, ()),
    "GGN diagonal": (curved("ggn_diagonal"), plain_diagonal, FEW),
    "GGN trace, 1 sample": (curved("ggn_trace", **DRAW), plain_drawn_trace, ()),
    "Kronecker factors, 1 sample": (curved("kronecker_factors", **DRAW), None, ()),
    "Kronecker factors, reduce": (
        curved("kronecker_factors", kind="reduce", **DRAW),
        None,
        ("cnn", "gpt", "lstm"),
    ),
    "Kronecker factors": (curved("kronecker_factors"), None, FEW),
    f"NTK, {GRAM} examples": (
        first(lambda m, p, b: curvature.ntk(m)(p, b[0])),
        first(plain_ntk),
        FEW,
    ),
}


def quantities(workload: str, batch: int, rounds: int, only: list[str]) -> list[list[str]]:
    """The rows of one workload's table."""
    model, p, data = workloads.WORKLOADS[workload][0](batch)
    names = [n for n in only if not ROWS[n][2] or workload in ROWS[n][2]]
    programs = {"gradient": workloads.mean_gradient(loss_of(model), p, data)}
    for name in names:
        print(f"{workload}: preparing {name}", file=sys.stderr, flush=True)
        ours, plain, _ = ROWS[name]
        programs[name] = compiled(functools.partial(ours, model), p, data)
        if plain is not None:
            programs[f"plain {name}"] = compiled(functools.partial(plain, model), p, data)
    samples = interleaved(
        {n: lambda f=f: jax.block_until_ready(f(p, data)) for n, f in programs.items()}, rounds
    )
    middle = lambda a, b: ratio(samples[a], samples[b])
    ms = lambda a: milliseconds(samples[a])
    flops = lambda name: programs[name].cost_analysis()["flops"]
    rows = [["gradient", ms("gradient"), "1.00", "1.00", "1.00", "", "", ""]]
    for name in names:
        row = [name, ms(name), middle(name, "gradient")]
        row += [f"{f(name) / f('gradient'):.2f}" for f in (flops, lambda n: temporary(programs[n]))]
        if (plain := f"plain {name}") in programs:
            memory = temporary(programs[name]) / temporary(programs[plain])
            row += [ms(plain), middle(name, plain), f"{memory:.2f}"]
        rows.append(row + [""] * (8 - len(row)))
    return rows


# --------------------------------------------------------------------------------------- BackPACK

MODEL = workloads.mlp(1)[0]
PER_EXAMPLE = pe.grads(loss_of(MODEL))


def of_gradients(name: str) -> Callable:
    return lambda p, b: getattr(pe, name)(PER_EXAMPLE(p, b)[1])


def of_mlp(name: str, **options) -> Callable:
    return getattr(curvature, name)(MODEL, cross_entropy, **options)


# BackPACK's extension: (its name, ours, our function of (parameters, batch)).
BACKPACK_ROWS = {
    "BatchGrad": ("per_example.materialize", of_gradients("materialize")),
    "BatchL2Grad": ("per_example.norms", of_gradients("norms")),
    "SumGradSquared": ("per_example.second_moment", of_gradients("second_moment")),
    "Variance": ("per_example.variance", of_gradients("variance")),
    "DiagGGNMC": ("ggn_diagonal, 1 sample", of_mlp("ggn_diagonal", **DRAW)),
    "DiagGGNExact": ("ggn_diagonal", of_mlp("ggn_diagonal")),
    "KFAC": ("kronecker_factors, 1 sample", of_mlp("kronecker_factors", **DRAW)),
    "KFLR": ("kronecker_factors", of_mlp("kronecker_factors")),
    "DiagHessian": ("hessian_diagonal", of_mlp("hessian_diagonal")),
}


def against_backpack(batch: int, rounds: int) -> list[list[str]]:
    _, p, data = workloads.mlp(batch)
    gradient = workloads.mean_gradient(loss_of(MODEL), p, data)
    calls = {"gradient": lambda: jax.block_until_ready(gradient(p, data))}
    if peers := installed("backpack", BACKPACK):
        calls["PyTorch gradient"] = workloads.torch_gradient(None, p, data)
    for name, (_, function) in BACKPACK_ROWS.items():
        print(f"preparing {name}", file=sys.stderr, flush=True)
        ours = compiled(function, p, data)
        calls[name] = lambda ours=ours: jax.block_until_ready(ours(p, data))
        if peers:
            calls[f"BackPACK {name}"] = workloads.backpack_quantity(None, p, data, name)
    samples = interleaved(calls, rounds)
    middle = lambda a, b: ratio(samples[a], samples[b])
    ms = lambda a: milliseconds(samples[a])
    rows = [["gradient", "jax.grad", ms("gradient"), "1.00"]]
    rows[0] += [ms("PyTorch gradient"), "1.00", ""] if peers else []
    for name, (ours, _) in BACKPACK_ROWS.items():
        row = [name, ours, ms(name), middle(name, "gradient")]
        if peers:
            row += [
                ms(f"BackPACK {name}"),
                middle(f"BackPACK {name}", "PyTorch gradient"),
                middle(name, f"BackPACK {name}"),
            ]
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------ KFAC's step


# Both take new factors at each step, invert them at each fifth, and adapt the damping there.
DAMPING, DECAY, LEAST = 1e-3, 0.95, 1e-8


def kfac_run(batch: int, steps: int) -> list[list[str]]:
    """Seconds until the compiled first step has run, and of each later one; the loss reached."""
    _, p, data = workloads.mlp(batch)
    runs = {"fnn.curvature.kfac": our_kfac}
    if installed("kfac_jax", KFAC_JAX):
        runs["kfac-jax"] = their_kfac
    taken: dict[str, list[float]] = {name: [] for name in runs}
    made, losses = {}, {}
    for i in range(steps):
        for name, run in runs.items():
            begin = time.perf_counter()
            if i == 0:
                made[name] = run(p, data)
            losses[name] = made[name]()
            taken[name].append(time.perf_counter() - begin)
    return [
        [
            name,
            f"{t[0]:.2f}",
            f"{1e3 * statistics.mean(t[1:]):.1f}",
            f"{sum(t):.2f}",
            f"{losses[name]:.1e}",
        ]
        for name, t in taken.items()
    ]


def our_kfac(p, data):
    optimizer = curvature.kfac(
        MODEL, cross_entropy, data, damping=DAMPING, damping_decay=DECAY, min_damping=LEAST
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, data):
        params, opt = state
        value, gradient = fnn.value_and_grad(functools.partial(mean_loss, MODEL))(params, data)
        updates, opt = optimizer.update(gradient, opt, params, batch=data)
        return (optax.apply_updates(params, updates), opt), value

    now = [(jax.tree.map(jnp.copy, p), optimizer.init(p))]

    def run():
        now[0], value = step(now[0], data)
        return float(value)

    return run


def their_kfac(p, data):
    import kfac_jax
    from kfac_jax._src import tag_graph_matcher

    # kfac-jax 0.0.8 takes two values from get_bind_params, which from JAX 0.10 on returns one.
    def eval_equation(equation, values):
        found = equation.primitive.get_bind_params(equation.params)
        functions, options = found if isinstance(found, tuple) else ((), found)
        with jax.extend.source_info_util.user_context(equation.source_info.traceback):
            out = equation.primitive.bind(*functions, *values, **options)
        return out if isinstance(out, list) else [out]

    tag_graph_matcher.eval_jaxpr_eqn = eval_equation

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
        initial_damping=DAMPING,
        damping_adaptation_decay=DECAY,
        min_damping=LEAST,
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


PARTS = ("quantities", "backpack", "kfac")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = list(workloads.WORKLOADS)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workload", nargs="*", choices=every, default=every)
    parser.add_argument("--batch", nargs="*", type=int, help="instead of each workload's own")
    parser.add_argument("--sweep", action="store_true", help=f"batches of {workloads.SWEEP}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50, help="of KFAC")
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    print(machine())

    def batches(workload):
        return args.batch or (workloads.SWEEP if args.sweep else [workloads.WORKLOADS[workload][1]])

    def show(heads, rows):
        print(f"\n{table(heads, rows, args.markdown)}", flush=True)

    for workload in args.workload if "quantities" in args.part else []:
        for batch in batches(workload):
            heads = [f"{workload}, batch {batch}", "ms", "/ gradient", "FLOPs", "memory"]
            heads += ["plain JAX ms", "/ plain", "memory / plain"]
            show(heads, quantities(workload, batch, args.rounds, args.only))
    for batch in batches("mlp") if "backpack" in args.part else []:
        rows = against_backpack(batch, args.rounds)
        heads = [f"batch {batch}", "fnn", "ms", "/ gradient"]
        heads += ["BackPACK ms", "/ gradient", "fnn / BackPACK"][: len(rows[0]) - 4]
        show(heads, rows)
    for batch in batches("mlp") if "kfac" in args.part else []:
        heads = [f"batch {batch}", "first step, s", "a step, ms", f"{args.steps} steps, s", "loss"]
        show(heads, kfac_run(batch, args.steps))


if __name__ == "__main__":
    main()

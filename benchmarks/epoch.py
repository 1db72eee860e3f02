"""Whole epochs: `fnn.fit`, everything on, against the loops that users of other libraries write.

    python benchmarks/epoch.py [--network ...] [--rounds 5] [--seconds 2] [--markdown]

All hold networks of the same sizes in float32, use Adam, shuffle the examples anew in each epoch,
and read the losses at its end. `fit` also checks the data, prints each epoch's line, looks out for
inf and nan, and keeps the norm of the gradient. The peers make one step after the other in a Python
loop, each by one jitted function whose state is donated (PyTorch: eagerly); "bare scan" is an epoch
in one `lax.scan`, and nothing else. They take turns in an order that changes, as many epochs at a
time as take about `--seconds`, with a rest before each; a call of `fit` is timed as a whole. Ratios
are medians, round by round.

    64-32-10       a network of two layers; 1437 examples in batches of 32
    64-100-10      1437 examples in batches of 128
    784-256-10     20000 examples in batches of 128
    cnn            two 3x3 convolutions, see networks.py; 1024 images of 28x28 in batches of 64
    lstm           64 hidden, 32 time steps of 16 numbers, 10 classes; 1024 in batches of 32
    transformer    one block, see networks.py; 256 sequences of 64 vectors in batches of 8
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
from jax import lax
from measure import installed, machine, ratios, table

import fnn
from fnn import ops
from fnn.layers import LSTM, Linear, chain

RATE = 1e-3
SIZES = {
    "64-32-10": (1437, 32),
    "64-100-10": (1437, 128),
    "784-256-10": (20000, 128),
    "cnn": (1024, 64),
    "lstm": (1024, 32),
    "transformer": (256, 8),
}
STEPS, FEATURES, HIDDEN, CLASSES = 32, 16, 64, 10


def data(network: str) -> tuple[np.ndarray, np.ndarray]:
    """All examples."""
    examples = SIZES[network][0]
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, examples).astype("int32")
    if network == "transformer":
        shape = examples, networks.LENGTH, networks.WIDTH
        return rng.standard_normal(shape, "float32"), rng.standard_normal(shape, "float32")
    if network == "cnn":
        return rng.standard_normal((examples, 28, 28, 1), "float32"), labels
    if network == "lstm":
        return rng.standard_normal((examples, STEPS, FEATURES), "float32"), labels
    return rng.standard_normal((examples, layers(network)[0]), "float32"), labels


def layers(network: str) -> list[int]:
    return [int(n) for n in network.split("-")]


# ----------------------------------------------------------------------------------------- fnn


@functools.cache
def ours(network: str):
    """`(loss of one example, params)`."""
    if network in networks.NETWORKS:
        return networks.our_loss(network), networks.initial(network)
    if network == "lstm":
        net = chain(lstm=LSTM(HIDDEN), last=lambda h: h[-1], out=Linear(CLASSES))
    else:
        _, hidden, classes = layers(network)
        net = chain(hidden=Linear(hidden), relu=ops.relu, out=Linear(classes))
    return (
        fnn.supervised(net, ops.softmax_cross_entropy),
        net.init(jax.random.key(0), data(network)[0][0]),
    )


def fit(network: str, x, y, batch: int):
    loss, params = ours(network)
    optimizer, key = optax.adam(RATE), jax.random.key(0)

    def run(epochs):
        with contextlib.redirect_stdout(io.StringIO()):
            options = {"epochs": epochs, "batch_size": batch, "key": key}
            fnn.fit(loss, params, (x, y), optimizer, **options)

    return run


def bare_scan(network: str, x, y, batch: int):
    loss, params = ours(network)
    optimizer = optax.adam(RATE)
    x, y = jnp.asarray(x), jnp.asarray(y)

    @jax.jit
    def epoch(state, order):
        def one(state, rows):
            params, opt_state = state
            mean = lambda p: jnp.mean(jax.vmap(loss, (None, 0))(p, (x[rows], y[rows])))
            # JAX's own gradient of JAX's own convolution is many times slower in a loop.
            differentiate = fnn.value_and_grad if network == "cnn" else jax.value_and_grad
            value, gradient = differentiate(mean)(params)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        return lax.scan(one, state, order)

    def run(epochs):
        state = params, optimizer.init(params)
        for i in range(epochs):
            order = np.random.default_rng(i).permutation(len(x))
            order = order[: len(x) // batch * batch].reshape(-1, batch)
            state, losses = epoch(state, order)
            np.asarray(losses)

    return run


# ----------------------------------------------------------------- the loops of other libraries


def stepwise(step, x, y, batch: int, read=np.asarray):
    """Epochs of `loss = step(x, y)`."""

    def run(epochs):
        for i in range(epochs):
            order = np.random.default_rng(i).permutation(len(x))
            losses = []
            for k in range(0, len(x), batch):
                rows = order[k : k + batch]
                losses.append(step(x[rows], y[rows]))
            for loss in losses:
                read(loss)

    return run


def jitted(loss, params, x, y, batch: int):
    """Of a mean loss `loss(params, x, y)`."""
    optimizer = optax.adam(RATE)
    state = jax.tree.map(jnp.copy, params), optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, y):
        params, opt_state = state
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    def advance(x, y):
        nonlocal state
        state, value = step(state, x, y)
        return value

    return stepwise(advance, x, y, batch)


def plain(network: str, x, y, batch: int):
    if network in networks.NETWORKS:
        return jitted(networks.plain_loss(network), networks.initial(network), x, y, batch)
    params = ours(network)[1]

    def lstm(p, x):
        def cell(carry, x):
            h, c = carry
            z = x @ p["lstm"]["W"].T + h @ p["lstm"]["U"].T + p["lstm"]["b"]
            i, f, g, o = jnp.split(z, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), None

        zeros = jnp.zeros((len(x), HIDDEN))
        (h, _), _ = lax.scan(cell, (zeros, zeros), jnp.swapaxes(x, 0, 1))
        return h @ p["out"]["W"].T + p["out"]["b"]

    def mlp(p, x):
        h = jax.nn.relu(x @ p["hidden"]["W"].T + p["hidden"]["b"])
        return h @ p["out"]["W"].T + p["out"]["b"]

    apply = lstm if network == "lstm" else mlp
    return jitted(lambda p, x, y: networks.cross_entropy(apply(p, x), y), params, x, y, batch)


def nnx(network: str, x, y, batch: int):
    from flax import nnx

    rngs = nnx.Rngs(0)
    if network in networks.NETWORKS:
        model = networks._nnx_network(network)
    elif network == "lstm":

        class Reader(nnx.Module):
            def __init__(self):
                self.rnn = nnx.RNN(nnx.LSTMCell(FEATURES, HIDDEN, rngs=rngs))
                self.out = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

            def __call__(self, x):
                # Its own first carry counts random keys, which a merged model may not.
                zeros = jnp.zeros((len(x), HIDDEN))
                return self.out(self.rnn(x, initial_carry=(zeros, zeros))[:, -1])

        model = Reader()
    else:
        ins, hidden, outs = layers(network)
        model = nnx.Sequential(
            nnx.Linear(ins, hidden, rngs=rngs), nnx.relu, nnx.Linear(hidden, outs, rngs=rngs)
        )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    measure = networks.squared if network == "transformer" else networks.cross_entropy
    loss = lambda params, x, y: measure(nnx.merge(graph, params, rest)(x), y)
    return jitted(loss, params, x, y, batch)


def equinox(network: str, x, y, batch: int):
    import equinox as eqx

    if network in networks.NETWORKS:
        body = networks.equinox(network, optax.adam(RATE), x[:batch], y[:batch])
        x = np.ascontiguousarray(np.moveaxis(x, -1, 1)) if network == "cnn" else x
        return stepwise(lambda x, y: body(x, y), x, y, batch, read=lambda _: body.wait())
    keys = jax.random.split(jax.random.key(0))
    if network == "lstm":

        class Reader(eqx.Module):
            cell: eqx.nn.LSTMCell
            out: eqx.nn.Linear

            def __call__(self, x):
                zeros = jnp.zeros(HIDDEN)
                step = lambda carry, x: (self.cell(x, carry), None)
                return self.out(lax.scan(step, (zeros, zeros), x)[0][0])

        model = Reader(
            eqx.nn.LSTMCell(FEATURES, HIDDEN, key=keys[0]),
            eqx.nn.Linear(HIDDEN, CLASSES, key=keys[1]),
        )
    else:
        ins, hidden, outs = layers(network)
        model = eqx.nn.MLP(ins, outs, hidden, 1, key=keys[0])
    optimizer = optax.adam(RATE)
    state = model, optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit(donate="all-except-first")
    def step(data, state):
        x, y = data
        model, opt_state = state
        loss = lambda model: networks.cross_entropy(jax.vmap(model)(x), y)
        value, gradient = eqx.filter_value_and_grad(loss)(model)
        updates, opt_state = optimizer.update(gradient, opt_state, model)
        return value, (eqx.apply_updates(model, updates), opt_state)

    def advance(x, y):
        nonlocal state
        value, state = step((x, y), state)
        return value

    return stepwise(advance, x, y, batch)


def torch(network: str, x, y, batch: int):
    import torch
    from torch import nn

    if network in networks.NETWORKS:
        body = networks.torch(network, ("adam", RATE), x[:batch], y[:batch])
        x = np.ascontiguousarray(np.moveaxis(x, -1, 1)) if network == "cnn" else x
        step = lambda x, y: body(x, y)
    else:

        class Reader(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
                self.out = nn.Linear(HIDDEN, CLASSES)

            def forward(self, x):
                return self.out(self.lstm(x)[0][:, -1])

        if network == "lstm":
            model = Reader()
        else:
            ins, hidden, outs = layers(network)
            model = nn.Sequential(nn.Linear(ins, hidden), nn.ReLU(), nn.Linear(hidden, outs))
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

        def step(x, y):
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

    x = torch.tensor(x)
    y = torch.tensor(y if network == "transformer" else y.astype("int64"))
    return stepwise(step, x, y, batch, read=lambda loss: None if loss is None else float(loss))


# ---------------------------------------------------------------------------------- the comparison

OURS, BARE = "fnn.fit", "bare scan"


def contenders() -> dict:
    found = {OURS: fit, BARE: bare_scan, "plain JAX": plain}
    if installed("flax", 'pip install "flax>=0.12"'):
        found["Flax NNX"] = nnx
    if installed("equinox", "pip install equinox"):
        found["Equinox"] = equinox
    if installed("torch", "pip install torch==2.13.0"):
        found["PyTorch"] = torch
    return found


def compare(network: str, made: dict, rounds: int, seconds: float) -> list[list[str]]:
    """The rows of one network's table."""
    examples, batch = SIZES[network]
    steps = dict.fromkeys(made, -(-examples // batch)) | {BARE: examples // batch}
    runs = {}
    for name, make in made.items():
        print(f"{network}: preparing {name}", file=sys.stderr, flush=True)
        runs[name] = make(network, *data(network), batch)
        runs[name](2)
    found: dict[str, list[float]] = {name: [] for name in made}
    one = min(_seconds(runs[BARE], 2) / 2 for _ in range(3))
    epochs = max(2, round(seconds / one))
    names = list(runs)
    for i in range(rounds):
        # Each round begins with another, and each waits for the threads of the one before to rest:
        # OpenMP's, PyTorch's that is, go on spinning for 0.2 s.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            time.sleep(0.3)
            run = runs[name]
            found[name].append(1e6 * _seconds(run, epochs) / epochs / steps[name])
    middle = statistics.median
    return [
        [
            name,
            f"{middle(samples):.0f}",
            f"{middle(ratios(samples, found[BARE])):.2f}",
            f"{middle(ratios(samples, found[OURS])):.2f}",
        ]
        for name, samples in found.items()
    ]


def _seconds(run, epochs: int) -> float:
    start = time.perf_counter()
    run(epochs)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--only", nargs="*", metavar="PEER", help="besides fnn.fit and the scan")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    made = contenders()
    if options.only is not None:
        unknown = [name for name in options.only if name not in made]
        if unknown:
            parser.error(f"--only {unknown[0]}: there are {', '.join(made)}.")
        made = {n: f for n, f in made.items() if n in (OURS, BARE, *options.only)}
    for network in options.network:
        rows = compare(network, made, options.rounds, options.seconds)
        heads = [network, "µs a step", "÷ bare scan", "÷ fnn.fit"]
        print(f"{machine()}\n{table(heads, rows, options.markdown)}\n", flush=True)


if __name__ == "__main__":
    main()

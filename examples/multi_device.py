"""One network on eight devices, laid out in five ways: what each holds and sends, the same losses.

    python examples/multi_device.py            (about a minute: five programs are compiled)
    python examples/multi_device.py --layouts data_parallel,fully_sharded

Without eight accelerators the CPU passes for eight devices. The layouts are the argument `layout`
of `fnn.train_step` (and of `fnn.fit`); nothing else changes. The step is compiled by hand here, for
its program to be read.
"""

import argparse
import os

# The second has the CPU's programs compiled in half the time.
FLAG = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import fnn  # noqa: E402
from fnn import sharding  # noqa: E402

LENGTH, BATCH = 32, 16
NET = fnn.models.gpt2(64, LENGTH, features=64, depth=4, heads=4, dropout=0.0)


def loss(params, tokens, mode):
    """The mean of −log of each next token's probability. The mode tells layers of the layout."""
    return jnp.mean(NET(params, tokens[:-1], tokens[1:], mode=mode))


def layouts():
    """Five ways to lay the network out on eight devices."""
    eight = jax.make_mesh((8,), ("data",))
    return {
        "data_parallel": sharding.data_parallel(eight),
        "fully_sharded": sharding.fully_sharded(eight),
        "tensor_parallel": sharding.tensor_parallel(
            jax.make_mesh((2, 4), ("data", "model")), shard="data"
        ),
        "sequence_parallel": sharding.sequence_parallel(
            jax.make_mesh((2, 4), ("data", "sequence"))
        ),
        "pipeline_parallel": sharding.pipeline_parallel(
            jax.make_mesh((2, 4), ("data", "stage")), microbatches=4
        ),
    }


def texts(count):
    """Sequences that count upwards by a step of their own: what comes next can be learned."""
    draw = np.random.default_rng(0)
    start, step = draw.integers(64, size=(count, 1)), draw.integers(1, 5, size=(count, 1))
    return ((start + step * np.arange(LENGTH + 1)) % 64).astype(np.int32)


def train(layout, steps):
    """The losses of some steps, the state at their end, and the compiled step."""
    key, example = jax.random.key(0), jnp.zeros(LENGTH, jnp.int32)
    # Made where they lie: no device ever holds all of them.
    params = layout.init(NET.init, key, example) if layout else NET.init(key, example)
    step = fnn.train_step(loss, optax.adam(1e-2), layout=layout)
    state, tokens = step.init(params), texts(BATCH * steps)
    batches = [tokens[i : i + BATCH] for i in range(0, len(tokens), BATCH)]
    if layout:
        batches = [layout.place_batch(batch) for batch in batches]
    program = jax.jit(step, donate_argnums=0).lower(state, batches[0]).compile()
    losses = []
    for batch in batches:
        state, metrics = program(state, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses), state, program


def sent(program):
    """What a device sends in a step, by kind: how often, and how many bytes."""
    kinds = {}
    for c in sharding.collectives(program):
        count, size = kinds.get(c.kind, (0, 0))
        kinds[c.kind] = count + c.times, size + c.sent * c.times
    return ", ".join(f"{n} {k} ({size / 1e3:.0f} kB)" for k, (n, size) in kinds.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layouts", default=",".join(layouts()), help="names, with commas between")
    options = parser.parse_args()

    alone, _, _ = train(None, options.steps)
    print(f"one device        losses {' '.join(f'{x:.4f}' for x in alone)}")
    for name in options.layouts.split(","):
        layout = layouts()[name]
        losses, state, program = train(layout, options.steps)
        whole = sum(x.nbytes for x in jax.tree.leaves(state))
        held = layout.bytes_per_device(state)
        difference = np.max(np.abs(losses - alone))
        print(f"\n{name:17} losses {' '.join(f'{x:.4f}' for x in losses)}")
        print(f"  at most {difference:.1e} from one device's")
        print(f"  a device holds {held / 1e3:.0f} of the state's {whole / 1e3:.0f} kB")
        print(f"  and sends in a step: {sent(program)}")
        blocks = {"blocks": {"attend": {"q": state.params["blocks"]["attend"]["q"]}}}
        if name == "tensor_parallel":
            print("  a weight that is divided:\n" + layout.show(blocks))


if __name__ == "__main__":
    main()

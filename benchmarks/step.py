"""One training step: fnn against plain JAX, Flax NNX, Flax Linen, Equinox, Haiku and PyTorch.

    pip install -e '.[bench]' && python benchmarks/step.py [--markdown] [--rounds N]

The same MLP (784-256-10, batch 128), CNN and transformer block, the same plain SGD, float32,
in one process and in turns. The MLP is also held against its five bare matrix products, the
work that no implementation can leave out.
"""

from __future__ import annotations

import argparse

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from interleaved import interleaved, machine, table
from jax import lax

import fnn
from fnn import ops

RATE = 0.01
rng = np.random.default_rng(0)


def normal(*shape):
    fan = shape[-1] if len(shape) == 2 else np.prod(shape[1:])
    return rng.normal(size=shape, scale=fan**-0.5).astype("float32")


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# ------------------------------------------------- how each library makes a step out of a model


def plain_jax(params, batch_loss, batch):
    optimizer = optax.sgd(RATE)

    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(batch_loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    step = jax.jit(step, donate_argnums=(0, 1))
    return _loop(step, jax.tree.map(jnp.array, params), optimizer.init(params), batch)


def _loop(step, params, state, batch):
    """A contender from a step `(params, state, batch) -> (params, state, loss)`."""
    held = [params, state]

    def run():
        held[0], held[1], loss = step(*held, batch)
        jax.block_until_ready((held, loss))

    return run


def with_fnn(params, loss, batch, **options):
    step = fnn.train_step(loss, optax.sgd(RATE), **options)
    held = [step.init(params)]

    def run():
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held, metrics))

    return run


def with_nnx(model, loss, batch):
    optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        value, gradient = nnx.value_and_grad(loss)(model, batch)
        optimizer.update(model, gradient)
        return value

    def run():
        value = step(model, optimizer, batch)
        jax.block_until_ready((value, nnx.state(model)))

    return run


def with_linen(model, loss, batch, example):
    params = model.init(jax.random.key(0), example)
    return plain_jax(params, lambda params, b: loss(model.apply(params, b[0]), b), batch)


def with_haiku(forward, loss, batch, example):
    net = hk.without_apply_rng(hk.transform(forward))
    params = net.init(jax.random.key(0), example)
    return plain_jax(params, lambda params, b: loss(net.apply(params, b[0]), b), batch)


def with_equinox(model, loss, batch):
    optimizer = optax.sgd(RATE)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, model, state):
        value, gradient = eqx.filter_value_and_grad(
            lambda model, b: loss(jax.vmap(model)(b[0]), b)
        )(model, batch)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(model, updates), state, value

    held = [model, state]

    def run():
        held[0], held[1], value = step(batch, *held)
        jax.block_until_ready((eqx.filter(held[0], eqx.is_array), value))

    return run


def with_torch(model, loss, batch):
    import torch

    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    batch = tuple(torch.as_tensor(np.asarray(b)) for b in batch)

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss(model(batch[0]), batch).backward()
        optimizer.step()

    return run


def of_classes(logits, batch):
    return cross_entropy(logits, batch[1])


def of_squares(y, batch):
    return jnp.mean((y - batch[1]) ** 2)


# ------------------------------------------------------------------------------------------- MLP


def mlp():
    params = {"W1": normal(256, 784), "b1": np.zeros(256, "float32")}
    params |= {"W2": normal(10, 256), "b2": np.zeros(10, "float32")}
    batch = (jnp.asarray(normal(128, 784)), jnp.asarray(rng.integers(0, 10, 128), "int32"))

    def one(p, x, relu):
        return p["W2"] @ relu(p["W1"] @ x + p["b1"]) + p["b2"]

    def loss(p, example):
        return ops.softmax_cross_entropy(one(p, example[0], ops.relu), example[1])

    def batch_loss(p, b):
        h = jax.nn.relu(b[0] @ p["W1"].T + p["b1"])
        return cross_entropy(h @ p["W2"].T + p["b2"], b[1])

    class NNX(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.out = nnx.Linear(784, 256, rngs=rngs), nnx.Linear(256, 10, rngs=rngs)

        def __call__(self, x):
            return self.out(jax.nn.relu(self.hidden(x)))

    linen = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(10)])
    equinox = eqx.nn.MLP(784, 10, 256, 1, key=jax.random.key(0))

    def haiku(x):
        return hk.Linear(10)(jax.nn.relu(hk.Linear(256)(x)))

    def torch_model():
        import torch

        return torch.nn.Sequential(
            torch.nn.Linear(784, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)
        )

    contenders = _all(params, loss, batch_loss, NNX, linen, equinox, haiku, of_classes, batch)
    contenders |= _torch(torch_model, _torch_classes, batch)

    @jax.jit
    def products(x, W1, W2, h, g):
        """Forward x W₁ᵀ, h W₂ᵀ; backward gᵀ h, g W₂, (g W₂)ᵀ x: what a step can't do without."""
        d = g @ W2
        return x @ W1.T, h @ W2.T, g.T @ h, d.T @ x

    args = [jnp.asarray(a) for a in (batch[0], params["W1"], params["W2"])]
    args += [jnp.asarray(normal(128, 256)), jnp.asarray(normal(128, 10))]
    contenders["bare matrix products"] = lambda: jax.block_until_ready(products(*args))
    return contenders


# ------------------------------------------------------------------------------------------- CNN


def cnn():
    """28×28 images, batch 64: conv 16, relu, pool, conv 32, relu, pool, linear 10."""
    params = {"c1": normal(16, 1, 3, 3), "c2": normal(32, 16, 3, 3), "W": normal(10, 32 * 7 * 7)}
    images = jnp.asarray(rng.normal(size=(64, 28, 28, 1)), "float32")
    batch = (images, jnp.asarray(rng.integers(0, 10, 64), "int32"))
    axes = ("NHWC", "OIHW", "NHWC")

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=axes)

    def pool(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def features(p, x, relu):
        return pool(relu(conv(pool(relu(conv(x, p["c1"]))), p["c2"])))

    def loss(p, example):
        z = features(p, example[0][None], ops.relu)
        return ops.softmax_cross_entropy(p["W"] @ z.reshape(-1), example[1])

    def batch_loss(p, b):
        return cross_entropy(features(p, b[0], jax.nn.relu).reshape(64, -1) @ p["W"].T, b[1])

    class NNX(nnx.Module):
        def __init__(self, rngs):
            self.c1 = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
            self.c2 = nnx.Conv(16, 32, (3, 3), use_bias=False, rngs=rngs)
            self.out = nnx.Linear(32 * 49, 10, use_bias=False, rngs=rngs)

        def __call__(self, x):
            x = nnx.max_pool(jax.nn.relu(self.c1(x)), (2, 2), (2, 2))
            x = nnx.max_pool(jax.nn.relu(self.c2(x)), (2, 2), (2, 2))
            return self.out(x.reshape(x.shape[0], -1))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features in (16, 32):
                x = nn.relu(nn.Conv(features, (3, 3), use_bias=False)(x))
                x = nn.max_pool(x, (2, 2), (2, 2))
            return nn.Dense(10, use_bias=False)(x.reshape(x.shape[0], -1))

    class Equinox(eqx.Module):
        c1: eqx.nn.Conv2d
        c2: eqx.nn.Conv2d
        pool: eqx.nn.MaxPool2d
        out: eqx.nn.Linear

        def __init__(self):
            keys = jax.random.split(jax.random.key(0), 3)
            self.c1 = eqx.nn.Conv2d(1, 16, 3, padding=1, use_bias=False, key=keys[0])
            self.c2 = eqx.nn.Conv2d(16, 32, 3, padding=1, use_bias=False, key=keys[1])
            self.pool = eqx.nn.MaxPool2d(2, 2)
            self.out = eqx.nn.Linear(32 * 49, 10, use_bias=False, key=keys[2])

        def __call__(self, x):
            x = self.pool(jax.nn.relu(self.c1(jnp.moveaxis(x, -1, 0))))
            return self.out(self.pool(jax.nn.relu(self.c2(x))).reshape(-1))

    def haiku(x):
        for features in (16, 32):
            x = jax.nn.relu(hk.Conv2D(features, 3, with_bias=False)(x))
            x = hk.max_pool(x, (2, 2, 1), (2, 2, 1), "VALID")
        return hk.Linear(10, with_bias=False)(x.reshape(x.shape[0], -1))

    def torch_model():
        import torch

        t = torch.nn
        return t.Sequential(
            *(t.Conv2d(1, 16, 3, padding=1, bias=False), t.ReLU(), t.MaxPool2d(2)),
            *(t.Conv2d(16, 32, 3, padding=1, bias=False), t.ReLU(), t.MaxPool2d(2)),
            *(t.Flatten(), t.Linear(32 * 49, 10, bias=False)),
        )

    contenders = _all(params, loss, batch_loss, NNX, Linen(), Equinox(), haiku, of_classes, batch)
    return contenders | _torch(torch_model, _torch_classes, (jnp.moveaxis(images, -1, 1), batch[1]))


# --------------------------------------------------------------------------- a transformer block


WIDTH, HEADS, LENGTH = 128, 4, 64


def transformer():
    """One pre-norm block: 4 heads, width 128, 64 positions, batch 16, tanh-gelu, squared error."""
    params = {name: normal(WIDTH, WIDTH) for name in ("q", "k", "v", "o")}
    params |= {"up": normal(4 * WIDTH, WIDTH), "down": normal(WIDTH, 4 * WIDTH)}
    params |= {name: np.ones(WIDTH, "float32") for name in ("s1", "s2")}
    params |= {name: np.zeros(WIDTH, "float32") for name in ("t1", "t2")}
    batch = tuple(jnp.asarray(rng.normal(size=(16, LENGTH, WIDTH)), "float32") for _ in range(2))

    def norm(x, scale, shift):
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        return (x - mean) * lax.rsqrt(variance + 1e-6) * scale + shift

    def block(p, x, softmax, gelu):
        """x: (positions, width)."""
        z = norm(x, p["s1"], p["t1"])
        q, k, v = ((z @ p[n].T).reshape(LENGTH, HEADS, -1) for n in "qkv")
        weights = softmax(jnp.einsum("qhd,khd->hqk", q, k) * (WIDTH // HEADS) ** -0.5)
        x = x + jnp.einsum("hqk,khd->qhd", weights, v).reshape(LENGTH, WIDTH) @ p["o"].T
        z = norm(x, p["s2"], p["t2"])
        return x + gelu(z @ p["up"].T) @ p["down"].T

    def loss(p, example):
        return jnp.mean((block(p, example[0], ops.softmax, ops.gelu) - example[1]) ** 2)

    def batch_loss(p, b):
        y = jax.vmap(lambda x: block(p, x, jax.nn.softmax, jax.nn.gelu))(b[0])
        return jnp.mean((y - b[1]) ** 2)

    class NNX(nnx.Module):
        def __init__(self, rngs):
            self.n1, self.n2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(
                HEADS, WIDTH, use_bias=False, decode=False, rngs=rngs
            )
            self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
            self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.n1(x))
            return x + self.down(jax.nn.gelu(self.up(self.n2(x))))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(HEADS, use_bias=False)(nn.LayerNorm()(x))
            z = nn.gelu(nn.Dense(4 * WIDTH, use_bias=False)(nn.LayerNorm()(x)))
            return x + nn.Dense(WIDTH, use_bias=False)(z)

    class Equinox(eqx.Module):
        n1: eqx.nn.LayerNorm
        n2: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self):
            keys = jax.random.split(jax.random.key(0), 3)
            self.n1, self.n2 = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
            self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
            self.up = eqx.nn.Linear(WIDTH, 4 * WIDTH, use_bias=False, key=keys[1])
            self.down = eqx.nn.Linear(4 * WIDTH, WIDTH, use_bias=False, key=keys[2])

        def __call__(self, x):
            z = jax.vmap(self.n1)(x)
            x = x + self.attention(z, z, z)
            z = jax.nn.gelu(jax.vmap(self.up)(jax.vmap(self.n2)(x)))
            return x + jax.vmap(self.down)(z)

    def haiku(x):
        def norm(x):
            return hk.LayerNorm(-1, True, True)(x)

        scale = hk.initializers.VarianceScaling(1.0)
        attention = hk.MultiHeadAttention(
            HEADS, WIDTH // HEADS, w_init=scale, with_bias=False, model_size=WIDTH
        )
        z = norm(x)
        x = x + attention(z, z, z)
        z = jax.nn.gelu(hk.Linear(4 * WIDTH, with_bias=False)(norm(x)))
        return x + hk.Linear(WIDTH, with_bias=False)(z)

    def torch_model():
        import torch

        class Block(torch.nn.Module):
            def __init__(self):
                super().__init__()
                t = torch.nn
                self.n1, self.n2 = t.LayerNorm(WIDTH), t.LayerNorm(WIDTH)
                self.attention = t.MultiheadAttention(WIDTH, HEADS, bias=False, batch_first=True)
                self.up = t.Linear(WIDTH, 4 * WIDTH, bias=False)
                self.down = t.Linear(4 * WIDTH, WIDTH, bias=False)

            def forward(self, x):
                z = self.n1(x)
                x = x + self.attention(z, z, z, need_weights=False)[0]
                z = torch.nn.functional.gelu(self.up(self.n2(x)), approximate="tanh")
                return x + self.down(z)

        return Block()

    contenders = _all(params, loss, batch_loss, NNX, Linen(), Equinox(), haiku, of_squares, batch)
    return contenders | _torch(torch_model, lambda y, b: ((y - b[1]) ** 2).mean(), batch)


# ------------------------------------------------------------------------------------------ main


def _all(params, loss, batch_loss, NNX, linen, equinox, haiku, measure, batch):
    example = batch[0]
    return {
        "fnn": with_fnn(params, loss, batch),
        'fnn, nonfinite="ignore"': with_fnn(params, loss, batch, nonfinite="ignore"),
        "plain JAX": plain_jax(params, batch_loss, batch),
        "Flax NNX": with_nnx(NNX(nnx.Rngs(0)), lambda m, b: measure(m(b[0]), b), batch),
        "Flax Linen": with_linen(linen, measure, batch, example),
        "Equinox": with_equinox(equinox, measure, batch),
        "Haiku": with_haiku(haiku, measure, batch, example),
    }


def _torch_classes(logits, batch):
    import torch

    return torch.nn.functional.cross_entropy(logits, batch[1].long())


def _torch(model, loss, batch):
    try:
        import torch
    except ImportError:
        print("PyTorch isn't installed (pip install torch==2.13.0): left out.")
        return {}
    torch.manual_seed(0)
    return {"PyTorch": with_torch(model(), loss, batch)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.15, help="a contender's turn")
    options = parser.parse_args()
    print(machine())
    for name, build in {"MLP": mlp, "CNN": cnn, "transformer block": transformer}.items():
        times = interleaved(build(), options.rounds, options.seconds)
        fastest = "bare matrix products" if "bare matrix products" in times else "plain JAX"
        head = [name, "ms (median)", "quartiles", "÷ plain JAX", f"÷ {fastest}"]
        rows = []
        for who, t in sorted(times.items(), key=lambda item: np.median(item[1])):
            low, high = np.percentile(t, [25, 75])
            # Ratios round by round: what slows the machine down slows both.
            ratios = [f"{np.median(t / times[other]):.2f}" for other in ("plain JAX", fastest)]
            rows.append([who, f"{np.median(t):.2f}", f"{low:.2f} – {high:.2f}", *ratios])
        print(
            "\n"
            + table(
                head[: 4 + (fastest != "plain JAX")],
                [row[: 4 + (fastest != "plain JAX")] for row in rows],
                options.markdown,
            )
        )


if __name__ == "__main__":
    main()

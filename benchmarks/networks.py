"""The same three networks in every library, each as one step of training to be timed.

`CONTENDERS[library][network](optimizer, x, y)` returns a function that makes one step from
where the last one ended; its `wait()` waits for the steps under way. All hold the same
parameters in float32, compute the same loss, use the same optimiser, and donate the old
state's memory to the new one where the library lets them.

    mlp           784 - 256 - 10, relu, softmax cross-entropy; 128 examples
    cnn           two 3x3 convolutions (16, 32), each with relu and 2x2 max-pooling, linear to 10
                  classes, softmax cross-entropy; 64 images of 28x28
    transformer   layernorm, causal attention (4 heads), layernorm, 128 - 512 - 128 with gelu,
                  squared error; 8 sequences of 64 vectors of width 128
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

HEADS, WIDTH, HIDDEN, LENGTH = 4, 128, 512, 64
NETWORKS = ("mlp", "cnn", "transformer")
PARAMETERS = {"mlp": 203_530, "cnn": 20_490, "transformer": 197_760}


def data(network: str) -> tuple[np.ndarray, np.ndarray]:
    """A batch of inputs and labels."""
    rng = np.random.default_rng(0)
    if network == "mlp":
        return rng.standard_normal((128, 784), "float32"), rng.integers(0, 10, 128, "int32")
    if network == "cnn":
        return rng.standard_normal((64, 28, 28, 1), "float32"), rng.integers(0, 10, 64, "int32")
    shape = 8, LENGTH, WIDTH
    return rng.standard_normal(shape, "float32"), rng.standard_normal(shape, "float32")


def loop(step, state, x, y):
    """The body of a training loop: `state = step(state, x, y)`, on this batch or on another."""
    now = [state]

    def body(x=x, y=y):
        now[0] = step(now[0], x, y)

    body.wait = lambda: jax.block_until_ready(now[0])
    return body


def gradient_step(value_and_grad, loss, optimizer):
    """`(params, opt_state) -> (params, opt_state, loss)` as one compiled function."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, y):
        params, opt_state, _ = state
        value, gradient = value_and_grad(loss)(params, x, y)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def start(params, optimizer):
    return params, optimizer.init(params), jnp.zeros(())


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared(out, target):
    return jnp.mean((out - target) ** 2)


def max_pool(x):
    window = (1,) * (x.ndim - 3) + (2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


# ---------------------------------------------------------------------------------- plain JAX


def initial(network: str):
    """The parameters, as a dict of arrays."""
    keys = iter(jax.random.split(jax.random.key(0), 16))

    def w(*shape, fan):
        return jax.random.normal(next(keys), shape) * fan**-0.5

    if network == "mlp":
        W1, W2 = w(256, 784, fan=784), w(10, 256, fan=256)
        return {"W1": W1, "b1": jnp.zeros(256), "W2": W2, "b2": jnp.zeros(10)}
    if network == "cnn":
        K1, K2 = w(3, 3, 1, 16, fan=9), w(3, 3, 16, 32, fan=144)
        W = w(10, 1568, fan=1568)
        return {"K1": K1, "b1": jnp.zeros(16), "K2": K2, "b2": jnp.zeros(32)} | {
            "W": W,
            "b": jnp.zeros(10),
        }
    size = WIDTH // HEADS
    return {
        **{f"scale{i}": jnp.ones(WIDTH) for i in (1, 2)},
        **{f"shift{i}": jnp.zeros(WIDTH) for i in (1, 2)},
        **{name: w(HEADS, size, WIDTH, fan=WIDTH) for name in "qkv"},
        "o": w(WIDTH, HEADS, size, fan=WIDTH),
        "up": w(HIDDEN, WIDTH, fan=WIDTH),
        "b1": jnp.zeros(HIDDEN),
        "down": w(WIDTH, HIDDEN, fan=HIDDEN),
        "b2": jnp.zeros(WIDTH),
    }


def convolve(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def layer_norm(x, scale, shift):
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale + shift


def plain_mlp(p, x):
    return jax.nn.relu(x @ p["W1"].T + p["b1"]) @ p["W2"].T + p["b2"]


def plain_cnn(p, x):
    for i in (1, 2):
        x = max_pool(jax.nn.relu(convolve(x, p[f"K{i}"]) + p[f"b{i}"]))
    return x.reshape(x.shape[0], -1) @ p["W"].T + p["b"]


def plain_transformer(p, x):
    h = layer_norm(x, p["scale1"], p["shift1"])
    q, k, v = (jnp.einsum("bld,hsd->blhs", h, p[name]) for name in "qkv")
    scores = jnp.einsum("bqhs,bkhs->bhqk", q, k) * (WIDTH // HEADS) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), scores, -jnp.inf)
    h = jnp.einsum("bhqk,bkhs->bqhs", jax.nn.softmax(scores), v)
    x = x + jnp.einsum("bqhs,dhs->bqd", h, p["o"])
    h = layer_norm(x, p["scale2"], p["shift2"])
    return x + jax.nn.gelu(h @ p["up"].T + p["b1"]) @ p["down"].T + p["b2"]


PLAIN = {
    "mlp": (plain_mlp, cross_entropy),
    "cnn": (plain_cnn, cross_entropy),
    "transformer": (plain_transformer, squared),
}


def plain_loss(network):
    apply, measure = PLAIN[network]
    return lambda params, x, y: measure(apply(params, x), y)


def plain(network, optimizer, x, y, value_and_grad=jax.value_and_grad):
    step = gradient_step(value_and_grad, plain_loss(network), optimizer)
    return loop(lambda s, x, y: step(s, x, y), start(initial(network), optimizer), x, y)


def our_gradient(network, optimizer, x, y):
    """The very same function, differentiated by our rules."""
    import fnn

    return plain(network, optimizer, x, y, fnn.value_and_grad)


# --------------------------------------------------------------------------- fnn, for one example


def fnn_mlp(p, x):
    import fnn

    return p["W2"] @ fnn.ops.relu(p["W1"] @ x + p["b1"]) + p["b2"]


def fnn_cnn(p, x):
    import fnn

    for i in (1, 2):
        x = max_pool(fnn.ops.relu(convolve(x[None], p[f"K{i}"])[0] + p[f"b{i}"]))
    return p["W"] @ x.ravel() + p["b"]


def fnn_transformer(p, x):
    import fnn

    h = layer_norm(x, p["scale1"], p["shift1"])
    q, k, v = (jnp.einsum("ld,hsd->lhs", h, p[name]) for name in "qkv")
    scores = jnp.einsum("qhs,khs->hqk", q, k) * (WIDTH // HEADS) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), scores, -jnp.inf)
    h = jnp.einsum("hqk,khs->qhs", fnn.ops.softmax(scores), v)
    x = x + jnp.einsum("qhs,dhs->qd", h, p["o"])
    h = layer_norm(x, p["scale2"], p["shift2"])
    return x + fnn.ops.gelu(h @ p["up"].T + p["b1"]) @ p["down"].T + p["b2"]


def our_loss(network):
    """The loss of one example."""
    import fnn

    apply = {"mlp": fnn_mlp, "cnn": fnn_cnn, "transformer": fnn_transformer}[network]

    def loss(params, example):
        x, y = example
        if network == "transformer":
            return squared(apply(params, x), y)
        return fnn.ops.softmax_cross_entropy(apply(params, x), y)

    return loss


def our_step(network, optimizer, x, y, nonfinite="raise"):
    """`fnn.train_step` as a user writes it; unlike the peers' it looks out for inf and nan."""
    import fnn

    train = fnn.train_step(our_loss(network), optimizer, nonfinite=nonfinite)
    return loop(lambda s, x, y: train(s, (x, y))[0], train.init(initial(network)), x, y)


def our_bare_step(network, optimizer, x, y):
    return our_step(network, optimizer, x, y, nonfinite="ignore")


# -------------------------------------------------------------------------------------- Flax NNX


def _nnx_network(network):
    from flax import nnx

    rngs = nnx.Rngs(0)
    if network == "mlp":
        return nnx.Sequential(
            nnx.Linear(784, 256, rngs=rngs), nnx.relu, nnx.Linear(256, 10, rngs=rngs)
        )
    if network == "cnn":
        pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
        return nnx.Sequential(
            *(nnx.Conv(1, 16, (3, 3), rngs=rngs), nnx.relu, pool),
            *(nnx.Conv(16, 32, (3, 3), rngs=rngs), nnx.relu, pool),
            lambda x: x.reshape(x.shape[0], -1),
            nnx.Linear(1568, 10, rngs=rngs),
        )

    class Block(nnx.Module):
        def __init__(self):
            self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                HEADS, WIDTH, use_bias=False, decode=False, rngs=rngs
            )
            self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
            self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

        def __call__(self, x):
            mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
            x = x + self.attention(self.norm1(x), mask=mask)
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    return Block()


def nnx_split(network, optimizer, x, y):
    """The functional way that Flax's guide to performance recommends."""
    from flax import nnx

    graph, params, rest = nnx.split(_nnx_network(network), nnx.Param, ...)
    _check_size(network, params)
    measure = PLAIN[network][1]

    def loss(params, x, y):
        return measure(nnx.merge(graph, params, rest)(x), y)

    step = gradient_step(jax.value_and_grad, loss, optimizer)
    return loop(step, start(params, optimizer), x, y)


def nnx_jit(network, optimizer, x, y):
    """The way of Flax's tutorial."""
    from flax import nnx

    model = _nnx_network(network)
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    measure = PLAIN[network][1]

    @functools.partial(nnx.jit, donate_argnums=(0, 1))
    def step(model, optimizer, x, y):
        value, gradient = nnx.value_and_grad(lambda model: measure(model(x), y))(model)
        optimizer.update(model, gradient)
        return value

    return loop(lambda _, x, y: step(model, optimizer, x, y), None, x, y)


# ------------------------------------------------------------------------------------ Flax Linen


def linen(network, optimizer, x, y):
    from flax import linen as nn
    from flax.training.train_state import TrainState

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
            attention = nn.MultiHeadDotProductAttention(HEADS, use_bias=False)
            x = x + attention(nn.LayerNorm()(x), mask=mask)
            return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(nn.LayerNorm()(x))))

    pool = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    flat = lambda x: x.reshape(x.shape[0], -1)
    conv = lambda features: (nn.Conv(features, (3, 3)), nn.relu, pool)
    model = {
        "mlp": lambda: nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(10)]),
        "cnn": lambda: nn.Sequential([*conv(16), *conv(32), flat, nn.Dense(10)]),
        "transformer": Block,
    }[network]()
    params = model.init(jax.random.key(0), jnp.asarray(x))["params"]
    _check_size(network, params)
    measure = PLAIN[network][1]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, y):
        loss = lambda params: measure(state.apply_fn({"params": params}, x), y)
        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    return loop(lambda s, x, y: step(s[0], x, y), (state, None), x, y)


# --------------------------------------------------------------------------------------- Equinox


def equinox(network, optimizer, x, y):
    import equinox as eqx

    keys = iter(jax.random.split(jax.random.key(0), 8))
    nn = eqx.nn

    class Block(eqx.Module):
        norm1: nn.LayerNorm
        attention: nn.MultiheadAttention
        norm2: nn.LayerNorm
        up: nn.Linear
        down: nn.Linear

        def __call__(self, x):
            h = jax.vmap(self.norm1)(x)
            x = x + self.attention(h, h, h, mask=jnp.tril(jnp.ones((LENGTH, LENGTH), bool)))
            h = jax.vmap(self.up)(jax.vmap(self.norm2)(x))
            return x + jax.vmap(self.down)(jax.nn.gelu(h))

    if network == "mlp":
        model = nn.MLP(784, 10, 256, 1, key=next(keys))
    elif network == "cnn":
        model = nn.Sequential(
            [
                nn.Conv2d(1, 16, 3, padding=1, key=next(keys)),
                nn.Lambda(jax.nn.relu),
                nn.MaxPool2d(2, 2),
                nn.Conv2d(16, 32, 3, padding=1, key=next(keys)),
                nn.Lambda(jax.nn.relu),
                nn.MaxPool2d(2, 2),
                nn.Lambda(jnp.ravel),
                nn.Linear(1568, 10, key=next(keys)),
            ]
        )
        x = np.moveaxis(x, -1, 1)  # its convolutions want the channels first
    else:
        model = Block(
            nn.LayerNorm(WIDTH),
            nn.MultiheadAttention(HEADS, WIDTH, key=next(keys)),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, HIDDEN, key=next(keys)),
            nn.Linear(HIDDEN, WIDTH, key=next(keys)),
        )
    _check_size(network, eqx.filter(model, eqx.is_array))
    measure = PLAIN[network][1]

    @eqx.filter_jit(donate="all-except-first")
    def step(data, state):
        x, y = data
        model, opt_state, _ = state
        loss = lambda model: measure(jax.vmap(model)(x), y)
        value, gradient = eqx.filter_value_and_grad(loss)(model)
        updates, opt_state = optimizer.update(gradient, opt_state, model)
        return eqx.apply_updates(model, updates), opt_state, value

    state = model, optimizer.init(eqx.filter(model, eqx.is_array)), jnp.zeros(())
    return loop(lambda s, x, y: step((x, y), s), state, jnp.asarray(x), jnp.asarray(y))


# ----------------------------------------------------------------------------------------- Haiku


def haiku(network, optimizer, x, y):
    import haiku as hk

    def forward(x):
        if network == "mlp":
            return hk.nets.MLP([256, 10])(x)
        if network == "cnn":
            for channels in (16, 32):
                h = jax.nn.relu(hk.Conv2D(channels, 3)(x))
                x = hk.max_pool(h, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            return hk.Linear(10)(hk.Flatten()(x))
        norm = lambda: hk.LayerNorm(-1, True, True)
        init = hk.initializers.VarianceScaling(1.0)
        attention = hk.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init, with_bias=False)
        h = norm()(x)
        x = x + attention(h, h, h, jnp.tril(jnp.ones((1, 1, LENGTH, LENGTH), bool)))
        return x + hk.Linear(WIDTH)(jax.nn.gelu(hk.Linear(HIDDEN)(norm()(x))))

    model = hk.without_apply_rng(hk.transform(forward))
    params = model.init(jax.random.key(0), jnp.asarray(x))
    _check_size(network, params)
    measure = PLAIN[network][1]
    loss = lambda params, x, y: measure(model.apply(params, x), y)
    step = gradient_step(jax.value_and_grad, loss, optimizer)
    return loop(step, start(params, optimizer), x, y)


# --------------------------------------------------------------------------------------- PyTorch


def torch(network, optimizer, x, y, compiled=False):
    """On the CPU with as many threads as there are cores. `optimizer` is (name, rate) here."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.o = nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x):
            heads = (*x.shape[:2], HEADS, WIDTH // HEADS)
            q, k, v = (a.view(heads).transpose(1, 2) for a in self.qkv(self.norm1(x)).chunk(3, -1))
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(h.transpose(1, 2).reshape(x.shape))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    torch.manual_seed(0)
    conv = lambda i, o: (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    model = {
        "mlp": lambda: nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)),
        "cnn": lambda: nn.Sequential(
            *conv(1, 16), *conv(16, 32), nn.Flatten(), nn.Linear(1568, 10)
        ),
        "transformer": Block,
    }[network]()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[network]
    if network == "cnn":
        x = np.moveaxis(x, -1, 1)
        model = model.to(memory_format=torch.channels_last)
    x = torch.tensor(np.ascontiguousarray(x))
    y = torch.tensor(y if network == "transformer" else y.astype("int64"))
    measure = F.mse_loss if network == "transformer" else F.cross_entropy
    name, rate = optimizer
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    optimizer = make(model.parameters(), lr=rate)

    def value_of(x, y):
        return measure(model(x), y)

    if compiled:
        value_of = torch.compile(value_of)

    def step(x=x, y=y):
        optimizer.zero_grad(set_to_none=True)
        value_of(x, y).backward()
        optimizer.step()

    step.wait = lambda: None
    return step


def torch_compiled(network, optimizer, x, y):
    return torch(network, optimizer, x, y, compiled=True)


def _check_size(network, params):
    size = sum(x.size for x in jax.tree.leaves(params))
    assert size == PARAMETERS[network], f"{size} parameters, wanted {PARAMETERS[network]}"


# ------------------------------------------------------------------------------- the physical limit

PRODUCTS = ("dot_general", "conv_general_dilated")
MOVES = ("transpose", "reshape", "squeeze", "expand_dims")


def bare_products(network, optimizer, x, y):
    """The matrix products and convolutions of one step, alone: forward, and twice as many back.

    It is plain JAX's jaxpr with everything between the products left out: what would change
    numbers hands on an input of its output's shape. The optimiser isn't there either.
    """
    params = initial(network)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(plain_loss(network)))(params, x, y)
    wanted = []

    def note(aval):
        wanted.append(aval)
        return jnp.zeros(aval.shape, aval.dtype)

    def run(supply, *leaves):
        made, used = [], set()
        found = _only_products(jaxpr.jaxpr, leaves, supply, made, used)
        used.update(map(id, found))
        unused = [value for value in made if id(value) not in used]
        return [value for value in found if value is not None] + unused

    leaves = [*jax.tree.leaves(params), x, y]
    jax.eval_shape(functools.partial(run, note), *leaves)
    rng = np.random.default_rng(0)
    fresh = [jnp.asarray(rng.standard_normal(a.shape), a.dtype) for a in wanted]

    def step(old, leaves, fresh):
        given = iter(fresh)
        return run(lambda _: next(given), *leaves)

    # The last call's results are donated, so that their memory serves again.
    first = jax.jit(lambda leaves, fresh: step(None, leaves, fresh))(leaves, fresh)
    again = jax.jit(step, donate_argnums=0, keep_unused=True)
    return loop(lambda old, x, y: again(old, leaves, fresh), first, x, y)


def _only_products(jaxpr, args, supply, made, used):
    """Evaluate a jaxpr's products; None stands for a value that is neither input nor product."""
    values = dict(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return None if hasattr(atom, "val") else values.get(atom)

    for eqn in jaxpr.eqns:
        ins = [read(v) for v in eqn.invars]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if inner is not None:
            outs = _only_products(getattr(inner, "jaxpr", inner), ins, supply, made, used)
        elif eqn.primitive.name in PRODUCTS or (eqn.primitive.name in MOVES and ins[0] is not None):
            used.update(map(id, ins))
            ins = [supply(v.aval) if x is None else x for v, x in zip(eqn.invars, ins, strict=True)]
            outs = [eqn.primitive.bind(*ins, **eqn.params)]
            made += outs
        else:
            alive = [x for x in ins if x is not None]
            outs = [
                next(
                    (x for x in alive if x.shape == v.aval.shape and x.dtype == v.aval.dtype), None
                )
                for v in eqn.outvars
            ]
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


# ----------------------------------------------------------------------------------- all of them

OURS = "fnn.train_step"

CONTENDERS = {
    "bare products": bare_products,
    OURS: our_step,
    "fnn.train_step, nonfinite=ignore": our_bare_step,
    "fnn.value_and_grad": our_gradient,
    "plain JAX": plain,
    "Flax NNX, split": nnx_split,
    "Flax NNX, nnx.jit": nnx_jit,
    "Flax Linen": linen,
    "Equinox": equinox,
    "Haiku": haiku,
    "PyTorch": torch,
    "PyTorch, torch.compile": torch_compiled,
}

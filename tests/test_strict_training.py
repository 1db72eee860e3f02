"""Training with each option under JAX's strict modes: the same numbers as without them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive, sweep

import fnn
from fnn import ops
from fnn.layers import Linear, chain

RNG = np.random.default_rng(0)
X = RNG.normal(size=(14, 5)).astype(np.float32)
Y = RNG.integers(3, size=14).astype(np.int32)
NET = chain(body=Linear(6), act=ops.tanh, head=Linear(3))
PARAMS = jax.tree.map(
    lambda x: x.astype(jnp.float32), NET.init(jax.random.key(0, impl="threefry2x32"), X[0])
)
BATCHES = [(X[:6], Y[:6]), (X[6:12], Y[6:12]), (X[12:], Y[12:])]


def metric(scores, label):
    return (jnp.argmax(scores).astype(label.dtype) == label).astype(scores.dtype)


LOSS = fnn.supervised(NET, ops.softmax_cross_entropy, accuracy=metric)


def noisy(params, example, key):
    """A loss that draws, from a new key at each step."""
    x, label = example
    kept = ops.dropout(x, key, rate=0.2)
    return LOSS(params, (kept, label))


# The modes: float32 parameters are trained with 64 bits allowed unless one says otherwise.
MODES = {
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug_nans": lambda: jax.debug_nans(True),
    "leaks": jax.checking_leaks,
    "key_reuse": lambda: jax.debug_key_reuse(True),
    "strict, 32 bits": lambda: _both(
        jax.enable_x64(False), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True)
    ),
}


@contextlib.contextmanager
def _both(*modes):
    with contextlib.ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


OPTIONS = {
    "none": {},
    "trainable": {"trainable": "head.*"},
    "accumulate": {"accumulate": 4},
    "bfloat16": {"compute": jnp.bfloat16},
    "float16": {"compute": jnp.float16},
    "loss_scale": {"loss_scale": 8.0},
    "ema": {"ema": 0.9},
    "clip": {"clip": 0.1},
    "skip": {"nonfinite": "skip", "loss_scale": "dynamic"},
    "trainable, accumulate, ema, clip": {
        "trainable": "head.*",
        "accumulate": 4,
        "ema": 0.9,
        "clip": 0.1,
    },
    "float16, accumulate, ema, roll_back": {
        "compute": jnp.float16,
        "accumulate": 3,
        "ema": 0.9,
        "nonfinite": "roll_back",
    },
}


def steps(options):
    """Three steps: the state, and the metrics of each."""
    step = fnn.train_step(noisy, optax.sgd(0.1, momentum=0.9), **options)
    state, key, found = step.init(PARAMS), jax.random.key(1), []
    for batch in BATCHES:
        key, own = jax.random.split(key)
        state, metrics = step(state, batch, own)
        found.append(metrics)
    step.finish(state)
    return numbers((state.params, state.opt_state, state.ema, found))


def fitted(options):
    """Two epochs, the last batch of which is smaller."""
    result = fnn.fit(
        noisy,
        PARAMS,
        (X, Y),
        optax.sgd(0.1, momentum=0.9),
        epochs=2,
        batch_size=6,
        key=jax.random.key(1),
        validation=(X, Y),
        validation_loss=LOSS,
        progress=False,
        **options,
    )
    history = {k: v for k, v in result.history.items() if k != "seconds"}
    state = result.state
    return numbers((state.params, state.opt_state, state.ema, history))


def numbers(tree):
    """On the host, as float64; with each dtype, so that none may change."""
    leaves, _ = jax.tree.flatten(tree)
    return [(str(getattr(x, "dtype", "")), np.asarray(x, np.float64)) for x in leaves]


@functools.cache
def without(run, name):
    return run(OPTIONS[name])


def same(found, wanted, *, dtypes=True):
    assert len(found) == len(wanted)
    for (own, x), (its, y) in zip(found, wanted, strict=True):
        assert own == its or not dtypes, (own, its)
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6)


@functools.cache
def types_without(name, dtype):
    return traced(OPTIONS[name], dtype)


def traced(options, dtype):
    """The types of what a step makes of a batch whose last examples don't count."""
    step = fnn.train_step(noisy, optax.sgd(0.1, momentum=0.9), **options)
    params, (x, y) = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, BATCHES[0]))
    state = jax.eval_shape(step.traced.first, params, {})
    args = state, (x, y.astype(jnp.int32)), jax.random.key(1), jnp.int32(3)
    return jax.eval_shape(lambda *args: step.traced(*args[:3], count=args[3]), *args)


# These look at what is traced alone, the others at numbers, too.
OF_TRACES = ("dtype_promotion", "rank_promotion", "leaks", "key_reuse")
SEVERAL = [name for name in OPTIONS if "," in name]


@pytest.mark.parametrize("name", sweep(OPTIONS, SEVERAL[:1]))
def test_traced(name):
    for mode in OF_TRACES:
        for dtype in (jnp.float32, jnp.bfloat16)[: 2 if mode == "dtype_promotion" else 1]:
            wanted = types_without(name, dtype)
            with MODES[mode]():
                found = traced(OPTIONS[name], dtype)
            assert jax.tree.structure(found) == jax.tree.structure(wanted)
            assert jax.tree.leaves(found) == jax.tree.leaves(wanted)


@exhaustive
@pytest.mark.parametrize("name", ["bfloat16", "skip", *SEVERAL])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in OF_TRACES])
def test_steps(mode, name):
    wanted = without(steps, name)
    with MODES[mode]():
        found = steps(OPTIONS[name])
    same(found, wanted, dtypes="32 bits" not in mode)


# Each mode with one of the two, in turn; the first, which found most, with both.
FITS = {f"{mode}-{i % 2}": (mode, SEVERAL[i % 2]) for i, mode in enumerate(MODES)}
FITS["dtype_promotion-1"] = "dtype_promotion", SEVERAL[1]


@exhaustive
@pytest.mark.parametrize("case", FITS)
def test_fit(case):
    mode, name = FITS[case]
    wanted = without(fitted, name)
    with MODES[mode]():
        found = fitted(OPTIONS[name])
    same(found, wanted, dtypes="32 bits" not in mode)


# Optimisers that promote: Adam raises a float to the power of an integer.
OPTIMIZERS = {
    "adam": optax.adam(0.01),
    "a schedule": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.01, 2, 9)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.01),
}


def learned(optimizer):
    options = {"epochs": 2, "batch_size": 6, "key": jax.random.key(1), "progress": False}
    loss = lambda params, example: LOSS(params, example)  # new, so that it is traced anew
    return numbers(fnn.fit(loss, PARAMS, (X, Y), optimizer, **options).params)


def test_an_optimiser_may_promote():
    step = fnn.train_step(LOSS, optax.adam(jnp.float32(0.01)))
    params, batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (PARAMS, BATCHES[0][0]))
    with jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(step.traced.first, params, {})
        args = state, (batch, BATCHES[0][1]), None
        new = jax.eval_shape(lambda *args: step.traced(*args)[0], *args)
    assert [x.dtype for x in jax.tree.leaves(new)] == [x.dtype for x in jax.tree.leaves(state)]


@exhaustive
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_optimisers_promote_to(name):
    wanted = learned(OPTIMIZERS[name])
    with jax.numpy_dtype_promotion("strict"):
        found = learned(OPTIMIZERS[name])
    same(found, wanted)

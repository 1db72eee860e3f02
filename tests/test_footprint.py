"""`memory`: what is kept is what a pullback holds; what a program takes is what XLA says."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled_programs

import fnn
from fnn import footprint, layers, ops
from fnn.footprint import compiled as of_compiled
from fnn.footprint import foresee

RNG = np.random.default_rng(0)


def held_by(pullback, args):
    """The bytes of the arrays that a pullback holds, but for the arguments."""
    mine = {id(x) for x in jax.tree.leaves(args)}
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(args)}
    found = {id(x): x for x in jax.tree.leaves(pullback) if isinstance(x, jax.Array)}
    return sum(
        x.nbytes
        for i, x in found.items()
        if i not in mine and x.unsafe_buffer_pointer() not in pointers and x.ndim
    )


def mlp(params, x):
    for W in params:
        x = ops.tanh(W @ x)
    return x.sum()


def test_what_is_kept_is_what_the_pullbacks_hold():
    params = [jnp.asarray(RNG.normal(size=(n, m))) for n, m in ((7, 5), (11, 7), (3, 11))]
    x = jnp.asarray(RNG.normal(size=5))
    found = fnn.memory(mlp)(params, x)
    # Of each layer its output: 7, 11 and 3 float64.
    (kept,) = found.residuals.made
    assert (kept.operation, kept.bytes) == ("tanh", 8 * (7 + 11 + 3))
    assert kept.types == ("float64[7]", "float64[11]", "float64[3]") and "(mlp)" in kept.source
    assert found.kept == held_by(fnn.vjp(mlp, params, x)[1], (params, x))
    assert set(found.residuals.arguments) == {"params[1]", "params[2]", "params[0]", "x"}
    assert found.residuals.argument_bytes == sum(W.nbytes for W in params) + x.nbytes


def test_parts_loops_and_what_remat_saves():
    block = layers.residual(layers.Linear(6), ops.tanh)
    x = jnp.asarray(RNG.normal(size=(4, 6)))
    sizes = {}
    for remat in (None, True):
        net = layers.chain(layers.repeat(block, 5, remat=remat), layers.Linear(2))
        params = net.init(jax.random.key(0), x)
        f = lambda params, x, net=net: net(params, x).sum()
        found = fnn.memory(f, compiled=False)(params, x)
        sizes[remat] = found.kept
        assert sum(found.by_part().values()) == found.kept
        assert all(part.startswith("repeat 0") for part in found.by_part())
        assert all(k.source.startswith("test_footprint.py:") for k in found.residuals.made)
        assert found.kept == held_by(fnn.vjp(f, params, x)[1], (params, x))
    # In each of 5 steps the block's input, and unless computed again its tanh; and the last output.
    # No weight is among it, transposed or not.
    assert sizes == {True: 6 * x.nbytes, None: 11 * x.nbytes}


def test_a_loop_over_layers_keeps_no_copy_of_their_weights():
    net = layers.repeat(layers.Linear(64), 12)
    x = jnp.ones((2, 64))
    params = net.init(jax.random.key(0), x)
    f = lambda params, x: (net(params, x) ** 2).sum()
    program = jax.jit(fnn.grad(f)).lower(params, x).compile()
    weights = sum(p.nbytes for p in jax.tree.leaves(params))
    assert of_compiled.compiled_memory(program).temporaries < weights / 2


def test_the_compiled_program_is_measured():
    params = {"W": jnp.ones((64, 32), jnp.float32)}
    X = jax.ShapeDtypeStruct((128, 32), jnp.float32)  # types will do

    def loss(params, X):
        return jnp.sum(ops.sigmoid(X @ params["W"].T) ** 2)

    found = fnn.memory(loss)(params, X)
    c = found.compiled
    both = jax.jit(lambda p, x: fnn.value_and_grad(loss, argnums=(0, 1))(p, x))
    wanted = both.lower(params, X).compile().memory_analysis()
    assert c.arguments == wanted.argument_size_in_bytes == 4 * (64 * 32 + 128 * 32)
    assert c.peak == c.arguments + c.outputs + c.temporaries - c.aliased
    assert c.temporaries == pytest.approx(wanted.temp_size_in_bytes, rel=0.5)
    assert found.kept >= 4 * 128 * 64
    assert fnn.memory(loss, compiled=False)(params, X).compiled is None
    shown = str(found)
    assert shown == repr(found) and len(shown.splitlines()) <= 20
    assert "kept for the backward pass" in shown and "peak" in shown and "float32[128, 64]" in shown


def test_functions_without_a_gradient_and_with_keys():
    found = fnn.memory(lambda n: n + 1)(jnp.arange(3))
    assert found.kept == 0 and found.compiled.arguments == 24
    noisy = lambda key, x: (x * jax.random.normal(key, x.shape)).sum()
    found = fnn.memory(noisy)(jax.random.key(0), jnp.ones(8))
    assert found.kept >= 64
    with pytest.raises(TypeError, match="fun must be a function to trace, but got 3"):
        fnn.memory(3)
    with pytest.raises(TypeError, match="compiled must be True or False"):
        fnn.memory(noisy, compiled=1)


# ------------------------------------------------------------------------------ does it fit?


def test_what_does_not_fit_is_told_before(monkeypatch):
    params = [jnp.ones((32, 32))]
    program = jax.jit(mlp).lower(params, jnp.ones(32)).compile()
    size = of_compiled.compiled_memory(program)
    kept = lambda: fnn.memory(mlp, compiled=False)(params, jnp.ones(32)).residuals
    advice = ["a smaller batch", "accumulate=4"]

    def fits(total, free):
        there = of_compiled.Room(total, free, "cuda:0")
        monkeypatch.setattr(foresee, "room", lambda device: there)
        footprint.check_fits("train_step", program, kept, advice)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits(size.peak, size.peak)
    with pytest.raises(MemoryError, match=r"takes .* but cuda:0 has .*\n.*keeps 256 B") as error:
        fits(size.peak - 1, size.peak - 1)
    assert "tanh" in str(error.value) and "a smaller batch; accumulate=4." in str(error.value)
    with pytest.warns(RuntimeWarning, match="cuda:0 has 0 B free") as caught:
        fits(10 * size.peak, 0)
    assert caught[0].filename == __file__


def test_the_room_that_there_is():
    there = of_compiled.room()
    assert there is None or 0 < there.free <= there.total
    stats = {"bytes_limit": 1000, "bytes_in_use": 300}

    class Device:
        platform = "gpu"

        def __init__(self, stats):
            self.stats = stats

        def memory_stats(self):
            return self.stats

        def __str__(self):
            return "cuda:0"

    assert of_compiled.room(Device(stats)) == (1000, 700, "cuda:0")
    assert of_compiled.room(Device(None)) is None


# ------------------------------------------------------------------------------- in training


def squares(params, example):
    x, y = example
    return jnp.sum((ops.sigmoid(params["W"] @ x) - y) ** 2)


def test_training_that_does_not_fit_is_told_before_it_runs(monkeypatch):
    params = {"W": jnp.ones((16, 8))}
    data = np.ones((64, 8)), np.ones((64, 16))
    step = fnn.train_step(squares, optax.sgd(0.1))
    options = {"epochs": 1, "batch_size": 32, "shuffle": False, "progress": False}
    there = of_compiled.Room(10**4, 10**4, "cuda:0")
    monkeypatch.setattr(foresee, "room", lambda device: there)
    with pytest.raises(MemoryError, match="train_step: the program takes .* cuda:0 has 10 kB") as e:
        step(step.init(params), data)
    # Of each of 64 examples the sigmoid's 16 float64.
    assert "8.19 kB  sigmoid" in str(e.value) and "float64[64, 16]" in str(e.value)
    assert "accumulate=2" in str(e.value) and "compute=" in str(e.value)
    with pytest.raises(MemoryError, match="fit: the program takes") as error:
        fnn.fit(squares, params, data, optax.sgd(0.1), **options)
    assert error.value.result.state.step == 0
    with pytest.raises(MemoryError, match="accumulate=8") as error:
        fnn.fit(squares, params, data, optax.sgd(0.1), accumulate=4, **options)
    assert "float64[8, 16]" in str(error.value)
    there = of_compiled.Room(10**9, 10, "cuda:0")
    with pytest.warns(RuntimeWarning, match="cuda:0 has 10 B free") as caught:
        result = fnn.fit(squares, params, data, optax.sgd(0.1), **options)
    assert result.state.step == 2 and caught[0].filename == __file__  # the line that called
    step = fnn.train_step(squares, optax.sgd(0.2))
    with pytest.warns(RuntimeWarning, match="train_step: .*cuda:0 has 10 B free") as caught:
        step(step.init(params), data)
    assert caught[0].filename == __file__


def test_looking_whether_it_fits_compiles_nothing_twice():
    step = fnn.train_step(squares, optax.sgd(0.1))
    state = step.init({"W": jnp.ones((16, 8))})
    batch = jnp.ones((4, 8)), jnp.ones((4, 16))
    with compiled_programs() as programs:
        for _ in range(3):
            state, _ = step(state, batch)
    assert programs.count("jit(step)") == 1

"""Steps that would make something inf or nan: updates, and whose notices are whose."""

import contextlib
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive, sweep

from fnn.train import NonFiniteError, fit, train_step
from fnn.train.nonfinite import any_nonfinite, became_nonfinite

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
A = RNG.normal(size=(24, 3))
Y = A @ np.array([1.0, -2.0, 0.5])
START = {"W": jnp.zeros(3), "b": jnp.zeros(())}


def squares(params, example):
    x, y = example
    return (params["W"] @ x + params["b"] - y) ** 2


def same(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), a, b)


# --------------------------------------------------------------------------------- the update


@pytest.mark.parametrize(
    ("optimizer", "good"),
    [
        (lambda: optax.sgd(np.inf), 0),
        (lambda: optax.sgd(np.nan), 0),
        (lambda: optax.sgd(lambda count: jnp.where(count >= 5, jnp.nan, 0.1)), 5),
        (lambda: optax.inject_hyperparams(optax.adam)(np.nan), 0),
        (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(np.inf)), 0),
    ],
    ids=["inf", "nan", "schedule", "injected", "clipped"],
)
def test_an_update_that_is_not_finite_is_refused(optimizer, good):
    options = {"epochs": 3, "batch_size": 8, "shuffle": False, "progress": False}
    with pytest.raises(
        NonFiniteError, match=f"step {good}: the update of params.*learning rate"
    ) as e:
        fit(squares, START, (A, Y), optimizer(), **options)
    result = e.value.result
    assert result.state.step == good and "params['W']" in e.value.names

    # By hand, up to there.
    transform = optimizer()
    params, opt_state = START, transform.init(START)
    for i in range(good):
        batch = A[8 * (i % 3) :][:8], Y[8 * (i % 3) :][:8]
        gradient = jax.grad(lambda p, batch=batch: jnp.mean(jax.vmap(squares, (None, 0))(p, batch)))
        updates, opt_state = transform.update(gradient(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    for wanted, found in ((params, result.params), (opt_state, result.state.opt_state)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=1e-6, atol=1e-9),
            wanted,
            found,
        )
    skipped = fit(squares, START, (A, Y), optimizer(), nonfinite="skip", **options)
    same(skipped.params, result.params)
    assert sum(skipped.history["skipped"]) == 9 - good


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_a_single_entry_that_overflows(dtype):
    largest = float(jnp.finfo(dtype).max)
    params = jnp.array([1.0, largest, 1.0], dtype)

    def loss(params, x):  # 0, with the gradient x
        moved = params - jax.lax.stop_gradient(params)
        return jnp.sum((moved * jnp.asarray(x, dtype)).real.astype(jnp.float32))

    step = train_step(loss, optax.sgd(-largest / 64))
    state = step.init(params)
    kept = jax.tree.map(np.array, state)
    state, metrics = step(state, jnp.array([[0.0, 32.0, 0.0]], jnp.float32))
    with pytest.raises(NonFiniteError, match="the update of params is not finite"):
        step.finish(state)
    same(state, kept)
    assert metrics["grad_norm"] == 32.0
    state, _ = step(state, jnp.array([[1.0, 0.0, 0.0]], jnp.float32))
    step.finish(state)
    assert state.step == 1 and np.isfinite(np.asarray(state.params)).all()


def test_a_moment_that_overflows_is_refused_whole():
    # In float16 the gradient's square overflows in Adam's second moment; parameters stay finite.
    def loss(params, x):
        return jnp.sum(params["w"] * x).astype(jnp.float32)

    step = train_step(loss, optax.adam(0.1, b2=0.5))
    state = step.init({"w": jnp.ones(3, jnp.float16)})
    state, _ = step(state, jnp.ones((1, 3), jnp.float16))
    kept = jax.tree.map(np.array, state)
    state, _ = step(state, jnp.array([[1.0, 1.0, 2000.0]], jnp.float16))
    with pytest.raises(NonFiniteError, match=r"opt_state\[0\].nu\['w'\]") as error:
        step.finish()
    assert error.value.step == 1
    same(state, kept)


@exhaustive
def test_what_was_inf_from_the_start_may_stay():
    params = {"mask": jnp.array([0.0, -jnp.inf]), "W": jnp.zeros(3)}

    def loss(params, example):
        weights = jax.nn.softmax(params["mask"])
        return squares({"W": params["W"], "b": weights[0]}, example)

    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    finite = optax.apply_if_finite(optax.adam(0.1), 5)
    for optimizer in (optax.adam(0.1), plateau, finite):
        step = train_step(loss, optimizer)
        state = step.init(params)
        for _ in range(3):
            state, _ = step(state, (A, Y))
        step.finish()
        assert state.step == 3 and np.isneginf(state.params["mask"][1])
    step = train_step(loss, optax.sgd(np.inf))
    state, _ = step(step.init(params), (A, Y))
    with pytest.raises(NonFiniteError, match="the update of"):
        step.finish()

    # In a compiled loop, nobody can look at the state beforehand.
    step = train_step(loss, optax.adam(0.1), nonfinite="skip")
    batches = jax.tree.map(lambda a: jnp.stack([a, a]), (A, Y))
    state, metrics = jax.lax.scan(step, step.init(params), batches)
    assert state.step == 2 and not metrics["skipped"].any()


DTYPES = [jnp.float16, jnp.float32, jnp.complex64]


@pytest.mark.parametrize("dtype", sweep(DTYPES, quick=DTYPES[:1]))
def test_whichever_number_of_a_state_became_nonfinite(dtype):
    """Wherever it stands, whether inf or nan; but not what was so before."""
    params = {
        "W": jnp.full((70, 61), 1e4, dtype),
        "b": jnp.ones((), dtype),
        "c": jnp.ones(5, dtype),
    }
    fine = train_step(squares, optax.inject_hyperparams(optax.adam)(0.1), ema=0.9).init(params)
    found = jax.jit(any_nonfinite)
    assert not became_nonfinite(fine, fine) and not found(fine)
    leaves, tree = jax.tree.flatten(fine)
    inexact = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]
    assert len(inexact) >= 12  # three parameters, two moments and an average of each
    for i in inexact:
        for value in (jnp.inf, -jnp.inf, jnp.nan):
            bad = leaves[i].ravel().at[-1].set(value).reshape(leaves[i].shape)
            spoilt = jax.tree.unflatten(tree, [*leaves[:i], bad, *leaves[i + 1 :]])
            assert became_nonfinite(spoilt, fine) and found(spoilt)
            assert not became_nonfinite(spoilt, spoilt)


def test_looking_at_the_update_costs_nothing():
    """Compiled, a step that looks does no more than one that doesn't, but for one reading."""
    size = 256
    params = {"W": jnp.zeros((size, size), jnp.float32)}

    def loss(params, x):
        return jnp.sum((params["W"] @ x - x) ** 2)

    batch = jnp.ones((64, size), jnp.float32)
    array = 4.0 * size * size
    for optimizer, read in ((optax.sgd(0.1), 1), (optax.adam(0.1), 3)):
        costs = []
        for nonfinite in ("raise", "ignore"):
            step = train_step(loss, optimizer, nonfinite=nonfinite)
            compiled = step._compiled.lower(step.init(params), batch, None).compile()
            costs.append((compiled.cost_analysis(), compiled.memory_analysis()))
        (ours, memory), (bare, bare_memory) = costs
        assert ours["bytes accessed"] <= bare["bytes accessed"] + (read + 0.6) * array
        assert ours["flops"] <= bare["flops"] + 20 * size * size  # the update, once more
        assert memory.temp_size_in_bytes <= bare_memory.temp_size_in_bytes + 0.5 * array
        assert memory.alias_size_in_bytes == bare_memory.alias_size_in_bytes


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("factor", sweep([1e30, 2.0**100], quick=[1e30]))
def test_a_number_that_overflows_by_a_constant_factor_is_noticed(factor, shape):
    """A compiler that may turn 0 · (m · c) into m · 0 sees no inf."""

    def update(gradient, m, params=None):
        return jax.tree.map(lambda g: -0.1 * g, gradient), m * jnp.float32(factor)

    grows = optax.GradientTransformation(lambda params: jnp.ones(shape, jnp.float32), update)
    loss = lambda params, example: jnp.sum((params * example) ** 2)
    batch = jnp.ones((4, 2))
    step = train_step(loss, grows)
    state = step.init(ONES)
    with pytest.raises(NonFiniteError, match="opt_state"):
        for _ in range(4):
            state, _ = step(state, batch)
        step.finish(state)
    with pytest.raises(NonFiniteError, match="opt_state"):
        fit(loss, ONES, batch, grows, epochs=4, batch_size=4, shuffle=False, progress=False)


# ------------------------------------------------------------------------------ whose notices


def fragile(params, example):
    """The gradient is nan where the example is negative."""
    return jnp.sqrt(jnp.where(example < 0, jnp.sum(params * 0.0), jnp.sum(params**2)))


ONES = jnp.ones(2)
GOOD, BAD = jnp.array([1.0, 2.0]), jnp.array([1.0, -2.0])


@pytest.fixture(scope="module")
def step():
    return train_step(fragile, optax.sgd(0.01))


def test_bad_batches_cost_no_good_ones(step):
    state, told = step.init(ONES), 0
    for batch in [BAD] * 20 + [GOOD] * 40:
        try:
            state, _ = step(state, batch)
        except NonFiniteError as error:
            told += error.refused
            jax.block_until_ready(state)  # the state in hand is whole
    step.finish(state)
    # Batches of calls that raised because of an earlier one were bad, too.
    assert state.step == 40 and 1 <= told <= 20


def test_a_call_that_raises_applies_nothing_and_may_be_repeated(step):
    state, applied = step.init(ONES), 0
    for batch in [GOOD, BAD, GOOD, GOOD, BAD, BAD, GOOD] * 4:
        for _ in range(2):
            try:
                state, _ = step(state, batch)
                break
            except NonFiniteError:
                continue
        applied += batch is GOOD
    with contextlib.suppress(NonFiniteError):
        step.finish(state)
    assert state.step == applied
    wanted = train_step(fragile, optax.sgd(0.01))
    expected = wanted.init(ONES)
    for _ in range(applied):
        expected, _ = wanted(expected, GOOD)
    same(state.params, expected.params)


def test_two_runs_of_one_step_in_turn(step):
    ours, theirs = step.init(ONES), step.init(2 * ONES)
    ours, _ = step(ours, BAD)
    jax.block_until_ready(ours)
    for _ in range(40):
        theirs, _ = step(theirs, GOOD)
    step.finish(theirs)
    assert theirs.step == 40
    with pytest.raises(NonFiniteError):
        step.finish(ours)
    step.finish()


def test_a_copy_has_a_run_of_its_own(step):
    state = step.init(ONES)
    kept = jax.tree.map(jnp.copy, state)
    state, _ = step(state, BAD)
    jax.block_until_ready(state)
    for _ in range(40):
        kept, _ = step(kept, GOOD)
    step.finish(kept)
    with pytest.raises(NonFiniteError):
        step(state, GOOD)


def test_a_run_that_is_given_up_warns():
    step = train_step(fragile, optax.sgd(0.01))
    state, _ = step(step.init(ONES), BAD)
    del state
    other = step.init(ONES)
    with pytest.warns(RuntimeWarning, match="run that was given up: step 0") as caught:
        other, _ = step(other, GOOD)
    assert caught[0].filename == __file__  # the line that called
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            other, _ = step(other, GOOD)
        step.finish()


def test_four_threads_on_one_step(step):
    results = {}

    def work(i):
        try:
            state = step.init(ONES)
            for k in range(60):
                state, _ = step(state, BAD if i == 0 and k == 30 else GOOD)
            step.finish()
            results[i] = int(state.step)
        except NonFiniteError as error:
            results[i] = error.step

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: 30, 1: 60, 2: 60, 3: 60}


def test_runs_are_not_kept(step):
    before = len(step._runs._of_step)
    for _ in range(3):
        state = step.init(ONES)
        for _ in range(5):
            state, _ = step(state, GOOD)
    del state
    step.finish()
    assert len(step._runs._of_step) <= before + 1

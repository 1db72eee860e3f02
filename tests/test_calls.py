"""Many steps in one call: the same numbers however epochs are cut, and nothing compiled twice."""

import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled_programs
from sweeps import sweep

import fnn
from fnn.footprint import compiled
from fnn.layers import BatchNorm, Linear, chain
from fnn.train import NonFiniteError, calls, chunks, programs, train_step
from fnn.train.data import batches_of
from fnn.train.prefetch import prefetched
from fnn.train.result import Work, _to_device, _to_host

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
A = RNG.normal(size=(26, 3))
Y = A @ np.array([1.0, -2.0, 0.5])
START = {"W": jnp.ones(3), "b": jnp.zeros(())}
ADAM = optax.adam(0.1)
# 26 = 3 · 8 + 2
BATCHES = [(A[i : i + 8], Y[i : i + 8]) for i in range(0, 26, 8)]


def noisy(params, example, key):
    x, y = example
    noise = jax.random.normal(key)
    error = params["W"] @ x + params["b"] + 0.1 * noise - y
    return error**2, {"noise": noise, "x": x}


def squares(params, example):
    x, y = example
    return (params["W"] @ x + params["b"] - y) ** 2


def fit(loss=noisy, params=START, data=(A, Y), optimizer=ADAM, **options):
    if isinstance(data, tuple):
        options = {"batch_size": 8} | options
    options = {"epochs": 3, "key": KEY, "progress": False} | options
    return fnn.fit(loss, params, data, optimizer, **options)


def equal(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), a, b)


def close(a, b, rtol=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), a, b)


# ------------------------------------------------------------------------------- however it is cut


@pytest.mark.parametrize(
    "kind", sweep(["arrays", "list", "too large"], quick=["arrays", "too large"])
)
def test_the_same_numbers_however_epochs_are_cut(kind, monkeypatch, tmp_path):
    data = (A, Y)
    if kind == "list":
        data = BATCHES
    if kind == "too large":
        monkeypatch.setattr(chunks, "PART_OF_MEMORY", 0.0)
        A.tofile(tmp_path / "A")
        data = (np.memmap(tmp_path / "A", A.dtype, "r", shape=A.shape), Y)
    whole = fit(data=data)
    for most in (1, 3, 100):
        other = fit(data=data, steps_per_call=most)
        equal(other.state, whole.state)
        equal(other.steps, whole.steps)

    class Stop(Exception):
        pass

    class Interrupted(calls.Calls):
        def __call__(self, work, chunk, at):
            if work.seen == 6:
                raise Stop
            return super().__call__(work, chunk, at)

    with monkeypatch.context() as patch, pytest.raises(Stop) as error:
        patch.setattr("fnn.train.loop.Calls", Interrupted)
        fit(data=data, steps_per_call=2)
    part = error.value.result
    assert list(part.state.position) == [1, 2, 6]
    equal(fit(params=part.state, data=data, epochs=2).state, whole.state)


@pytest.mark.parametrize(
    "ending",
    sweep(["none", "stop", "bad step", "roll back", "roll back, looking"], quick=["stop"]),
)
def test_a_call_made_ahead_changes_nothing(ending, monkeypatch):
    """The device has the next call before a call's result is read, and training may end there."""
    adopted = []
    follows = calls.Ahead.follows
    watch = lambda *args: adopted.append(follows(*args)) or adopted[-1]
    monkeypatch.setattr(calls.Ahead, "follows", watch)
    data, step = (A, Y), fnn.train_step(noisy, ADAM)
    options = {"epochs": 6, "steps_per_call": 1 if ending.endswith("looking") else 2}
    if ending == "stop":
        options["after_epoch"] = lambda epoch, state, record: epoch == 4
    if ending == "bad step":  # in the third epoch
        step = fnn.train_step(noisy, optax.sgd(lambda i: jnp.where(i == 11, jnp.inf, 0.1)))
    if ending.startswith("roll back"):
        loss = lambda params, example, key: noisy(params, example, key)[0] / (example[1] < 1e4)
        data, options["check"] = (A, np.where(np.arange(26) == 7, 1e5, Y)), False
        scale = fnn.train.DynamicLossScale(1, 1, 1) if ending.endswith("looking") else None
        step = fnn.train_step(loss, ADAM, nonfinite="roll_back", loss_scale=scale)
        save = Work.save  # at each epoch's end, not only where it takes no time
        monkeypatch.setattr(Work, "save", lambda w: save(setattr(w, "_keep_after", 0.0) or w))

    def train():
        try:
            return fit(step, data=data, optimizer=None, **options)
        except NonFiniteError as error:
            return error.result

    train()  # now it is known how long a step takes
    adopted.clear()
    found = train()
    assert sum(adopted) >= 4
    monkeypatch.setattr(calls.Calls, "_go_ahead", lambda *args: None)
    adopted.clear()
    other = train()
    assert not adopted
    equal(found.state, other.state)
    equal(found.steps, other.steps)
    assert len(found.history["loss"]) == {"stop": 4, "bad step": 2}.get(ending, 6)


def test_what_is_known_of_one_network_is_not_taken_for_a_larger_one(monkeypatch):
    """The same loss serves both, whose memory is foreseen and whose first call is one step."""
    loss = lambda params, example: (params["v"] @ (params["W"] @ example[0]) - example[1]) ** 2
    made, foreseen, counts = [], [], []
    arguments, foresee = calls.Calls._arguments, calls.foresee
    watch = lambda self, chunk, at, count, *rest: (
        made.append(count) or arguments(self, chunk, at, count, *rest)
    )
    monkeypatch.setattr(calls.Calls, "_arguments", watch)
    monkeypatch.setattr(calls, "foresee", lambda *args: foreseen.append(1) or foresee(*args))
    small, large = ({"v": jnp.ones(n), "W": jnp.ones((n, 3))} for n in (4, 20))
    for params in (small, small, large, large):
        made.clear()
        fit(loss, params)
        counts.append((made[0], len(foreseen)))
    assert counts == [(1, 1), (4, 1), (1, 2), (4, 2)]


def test_hardly_a_call_is_made_for_nothing(monkeypatch):
    """Where a program makes fewer steps than asked for, the call ahead knows it after one time."""
    monkeypatch.setattr(programs, "MOST_STEPS", 3)
    made, arguments = [], calls.Calls._arguments
    watch = lambda self, chunk, at, *rest: made.append(at) or arguments(self, chunk, at, *rest)
    monkeypatch.setattr(calls.Calls, "_arguments", watch)
    step = fnn.train_step(noisy, ADAM)
    run = lambda: fit(step, optimizer=None, batch_size=2, epochs=4)  # of 13 steps
    run()
    made.clear()
    run()
    assert 4 * 5 <= len(made) <= 4 * 5 + 2


@pytest.mark.parametrize("kind", sweep(["arrays", "list", "ignore"], quick=["arrays"]))
def test_where_the_host_ends_loops_a_program_of_known_length_follows(kind, monkeypatch):
    """As on a GPU: when the loops have lasted as long as it takes to compile, and once."""
    step = train_step(noisy, ADAM, nonfinite="ignore" if kind == "ignore" else "raise")
    data = BATCHES if kind == "list" else (A, Y)
    run = lambda: fit(step, data=data, optimizer=None)
    whole = run()
    monkeypatch.setattr(calls, "ASKING", frozenset({"cpu"}))
    monkeypatch.setattr(calls, "SHORT", np.inf)
    there = step.programs
    for compiled_in, count in ((np.inf, 1), (0.0, 2), (0.0, 2)):
        there.compiled = dict.fromkeys(there.compiled, compiled_in)
        found = run()
        none, *lengths = [how.length for how in there.traces]
        assert none is None and len(lengths) == count - 1
        # A list's chunk of four goes on its way with fewer if they come slowly.
        assert all(1 < n <= 4 if kind == "list" else n == 4 for n in lengths)
        equal(found.state, whole.state)
        equal(found.steps, whole.steps)
    other = fit(step, data=data, optimizer=None, steps_per_call=3)
    equal(other.state, whole.state)
    assert len(there.traces) == 2


def test_a_bad_step_in_a_program_of_known_length(monkeypatch):
    step = train_step(noisy, optax.sgd(lambda i: jnp.where(i == 21, jnp.inf, 0.1)))
    first = fit(step, optimizer=None)

    def train():
        with pytest.raises(NonFiniteError) as error:
            fit(step, params=first.state, optimizer=None)
        return error.value.result

    wanted = train()
    assert int(wanted.state.position[2]) == 22
    monkeypatch.setattr(calls, "ASKING", frozenset({"cpu"}))
    monkeypatch.setattr(calls, "SHORT", np.inf)
    step.programs.compiled = dict.fromkeys(step.programs.compiled, 0.0)
    found = train()
    assert [how.length for how in step.programs.traces] == [None, 4]
    equal(found.state, wanted.state)
    equal(found.steps, wanted.steps)


def test_what_may_not_go_on_gets_no_program_of_known_length(monkeypatch):
    """A loop that might run for ever at nan stops at a bad step: its length isn't known."""
    root = lambda x: jax.lax.while_loop(lambda y: jnp.abs(y * y - x) > 1e-9, lambda y: y / 2, x)

    def loss(params, example):
        return squares(params, example) + jax.lax.stop_gradient(root(jnp.zeros(())))

    monkeypatch.setattr(calls, "ASKING", frozenset({"cpu"}))
    monkeypatch.setattr(calls, "SHORT", np.inf)
    step = train_step(loss, ADAM)
    for _ in range(2):
        fit(step, optimizer=None)
        step.programs.compiled = dict.fromkeys(step.programs.compiled, 0.0)
    assert [how.length for how in step.programs.traces] == [None]


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_two_epochs_and_one_more_are_three_by_any_generator(impl):
    """By these, what is drawn from a key depends on the keys that are drawn from beside it."""
    options = {"loss": squares, "key": jax.random.key(1, impl=impl)}
    part = fit(epochs=2, **options)
    equal(fit(params=part.state, epochs=1, **options).state, fit(epochs=3, **options).state)


@pytest.mark.parametrize("size, drop_last", [(26, False), (26, True), (24, False), (5, False)])
def test_orders_drawn_on_an_accelerator_are_those_drawn_here(size, drop_last, monkeypatch):
    options = {"batch_size": 8, "shuffle": True, "epochs": 3, "drop_last": drop_last}
    source = batches_of("fit", (A[:size],), **options)
    wanted = source.rows_ahead(KEY, 1, 3)()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = [source.rows_ahead(KEY, epoch, 3)() for epoch in (1, 2, 3)]
    equal([rows for (rows,) in found], wanted)


def test_a_smaller_last_batch_is_a_mean_over_its_own_examples():
    """Against steps on the batches as they are, each compiled for itself."""
    step = train_step(squares, ADAM)
    state, losses = step.init(START), []
    for batch in BATCHES * 3:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    for data, options in (((A, Y), {"shuffle": False}), (BATCHES, {})):
        result = fit(squares, data=data, **options)
        close(result.params, state.params)
        close(result.steps["loss"], np.array(losses))


def test_the_last_batch_may_be_left_out():
    result = fit(squares, drop_last=True, shuffle=False)
    close(result.params, fit(squares, data=BATCHES[:3]).params)
    assert len(result.steps["loss"]) == 9 and result.state.position[2] == 9
    with pytest.raises(ValueError, match=r"drop_last is for arrays"):
        fit(data=BATCHES, drop_last=True)


def reading_the_batch():
    """Takes the mean of the batch for a gradient."""

    def update(updates, state, params=None, *, batch, **more):
        return {"W": -0.1 * jnp.mean(batch[0], 0), "b": 0.1 * updates["b"]}, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


NORMED = chain(norm=BatchNorm(), out=Linear(1))


@pytest.mark.parametrize("kind", sweep(["statistics", "optimiser"], quick=["optimiser"]))
def test_where_examples_are_coupled_the_last_batch_isnt_filled_up(kind):
    if kind == "statistics":
        loss = fnn.supervised(NORMED, lambda out, y: (out[0] - y) ** 2)
        optimizer, params = ADAM, NORMED.init(KEY, A[0])
        state = NORMED.init_state(A[0])
    else:
        loss, optimizer, params, state = squares, reading_the_batch(), START, {}
    step = train_step(loss, optimizer)
    now = step.init(params, state)
    for batch in BATCHES * 2:
        now, _ = step(now, batch)
    result = fit(loss, params, optimizer=optimizer, shuffle=False, epochs=2)
    close((result.params, result.state.model_state), (now.params, now.model_state))
    options = {"data": BATCHES, "optimizer": optimizer, "epochs": 2}
    options |= {"model_state": state} if state else {}
    close(fit(loss, params, **options).params, now.params)


# ------------------------------------------------------------------------------------ compilations


def compilations(run):
    with compiled_programs() as names:
        run()
    return names


@pytest.mark.parametrize("kind", ["loss", "step"])
def test_a_second_fit_compiles_nothing(kind):
    options = {"validation": (A, Y), "validation_loss": squares}
    made = (squares, ADAM) if kind == "loss" else (train_step(squares, ADAM), None)
    run = lambda **more: fit(made[0], optimizer=made[1], **options | more)
    assert compilations(run)
    equal(run().params, run().params)
    assert not compilations(run)
    assert not compilations(lambda: run(steps_per_call=2, epochs=5))


@pytest.mark.parametrize("data", [(A, Y), BATCHES], ids=["arrays", "batches"])
@pytest.mark.parametrize("kind", ["loss", "step"])
def test_a_second_fit_calls_neither_the_loss_nor_the_optimizer(kind, data):
    """Nothing is traced: not for labels, nor the network's state, nor whether examples couple."""

    class Calls:
        # No name in its code tells `fnn.readings` of the number, which would be something new.
        def add(self):
            vars(self)["number"] = vars(self).get("number", 0) + 1

    calls = Calls()
    net = chain(counted=lambda x: calls.add() or x, out=Linear(1))
    loss = fnn.supervised(net, lambda y, target: jnp.sum((y - target) ** 2))
    update = lambda *args, **more: calls.add() or ADAM.update(*args, **more)
    optimizer = optax.GradientTransformationExtraArgs(ADAM.init, update)
    made = (loss, optimizer) if kind == "loss" else (train_step(loss, optimizer), None)
    params = net.init(KEY, A[0])
    run = lambda: fit(made[0], params, data, made[1], shuffle=False).params
    first = run()
    assert vars(calls).pop("number")
    equal(run(), first)
    assert not vars(calls)


def test_a_loss_that_became_coupled_has_its_last_batch_to_itself():
    coupled = False

    def make():
        def loss(params, example, mode):
            error = squares(params, example)
            met = coupled and mode.axis is not None
            return error * jax.lax.pmean(error, mode.axis) if met else error

        return loss

    loss = make()
    apart = fit(loss).params
    coupled = True
    together = fit(loss).params
    equal(together, fit(make()).params)
    assert not np.array_equal(together["W"], apart["W"])


def test_a_changed_variable_is_read_anew():
    scale = 1.0

    def loss(params, example):
        return scale * squares(params, example)

    first = fit(loss).steps["loss"][0]
    scale = 3.0
    assert fit(loss).steps["loss"][0] == pytest.approx(3 * first)
    scale = 1.0
    assert fit(loss).steps["loss"][0] == first


def test_a_choice_that_changed_is_traced_anew():
    class Chosen:
        name = "W"

        def __call__(self, path, array):
            return path == self.name

    chosen, optimizer = Chosen(), optax.sgd(0.1)
    run = lambda: fit(squares, optimizer=optimizer, trainable=chosen).params
    assert run()["b"] == START["b"]
    chosen.name = "b"
    found = run()
    equal(found["W"], START["W"])
    assert found["b"] != START["b"]


def test_neither_the_loss_nor_what_it_holds_is_kept():
    held = jnp.ones(3)

    def make(held):
        return lambda params, example: squares(params, example) + jnp.sum(held * params["W"])

    loss, optimizer = make(held), optax.sgd(0.1)
    fit(loss, optimizer=optimizer)
    fit(loss, optimizer=optimizer)
    gone = weakref.ref(loss), weakref.ref(held), weakref.ref(optimizer.update)
    del loss, held, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_a_step_has_its_own_optimiser():
    step = train_step(squares, ADAM, nonfinite="skip")
    with pytest.raises(TypeError, match="optimizer is given beside a TrainStep"):
        fit(step)
    with pytest.raises(TypeError, match="nonfinite is given beside a TrainStep"):
        fit(step, optimizer=None, nonfinite="ignore")
    result = fit(step, optimizer=None)
    close(result.params, fit(squares).params)
    assert result.history["skipped"] == [0, 0, 0]


# ---------------------------------------------------------------------------- what loops are bad at


def test_steps_with_convolutions_that_are_slow_in_a_loop_run_one_by_one():
    images = RNG.normal(size=(12, 6, 6, 2))
    numbers = ("NHWC", "OIHW", "NHWC")

    def plain(w, x):
        return jnp.sum(
            jax.lax.conv_general_dilated(x[None], w, (1, 1), "SAME", None, None, numbers)
        )

    def inner(w, x):  # differentiated by JAX itself
        return jnp.sum(jax.grad(plain)(w, x) ** 2) + jnp.sum(w**2) + plain(w, x)

    start = 0.1 * jnp.asarray(RNG.normal(size=(3, 2, 3, 3)))
    found = {}
    for name, loss in {"plain": plain, "inner": inner}.items():
        step = train_step(loss, optax.sgd(1e-3))
        options = {"optimizer": None, "shuffle": False, "batch_size": 4}
        whole = fit(step, start, images, **options)
        equal(fit(step, start, images, steps_per_call=2, **options).params, whole.params)
        state = step.init(start)
        for i in [0, 4, 8] * 3:
            state, _ = step(state, images[i : i + 4])
        close(state.params, whole.params)
        (how,) = set(step.programs.traces)
        rows = np.zeros((3, 4), np.int32)
        args = whole.state, jnp.asarray(images), rows, np.full(3, 4, np.int32), None
        where = np.zeros(3, np.int32)
        found[name] = "while" in step.programs.run.lower(how, *args, where).as_text()
    assert found == {"plain": True, "inner": jax.default_backend() != "cpu"}


# ------------------------------------------------------------------------------------- inf and nan


@pytest.mark.parametrize("large", sweep([False, True], quick=[False]))
def test_the_bad_step_is_named_and_the_steps_before_it_are_kept(large, monkeypatch):
    if large:
        monkeypatch.setattr(calls, "LARGE", 0)
    data = A.copy()
    data[13] = np.inf  # in the second batch
    options = {"shuffle": False, "check": False}
    fit(squares, epochs=1, **options)  # a step's time is known
    with pytest.raises(
        NonFiniteError, match=r"step 1: the loss and the gradient.*\n.*number 5"
    ) as e:
        fit(squares, data=(data, Y), **options)
    result = e.value.result
    close(result.params, fit(squares, data=BATCHES[:1], epochs=1).params)
    assert list(result.state.position) == [0, 2, 2] and result.state.step == 1
    assert np.isfinite(result.steps["loss"]).tolist() == [True, False]
    with pytest.raises(NonFiniteError, match="step 4: "):  # behind it, until it comes again
        fit(squares, result.state, (data, Y), **options)


def test_an_update_that_overflows_is_found_within_a_call():
    schedule = lambda step: jnp.where(step == 6, jnp.inf, 0.1)
    optimizer = optax.sgd(schedule)
    with pytest.raises(NonFiniteError, match="step 6: the update of params") as error:
        fit(squares, optimizer=optimizer, shuffle=False)
    good = fit(squares, optimizer=optax.sgd(0.1), data=[*BATCHES, *BATCHES[:2]], epochs=1)
    close(error.value.result.params, good.params)


def test_a_loss_that_was_inf_once_is_found_behind_the_call():
    """Its gradient was finite, and so is all that came after."""
    marked = np.arange(26) == 13  # in the second batch

    def loss(params, example):
        (x, y), is_marked = example
        return squares(params, (x, y)) + jnp.where(is_marked, jnp.inf, 0.0)

    options = {"shuffle": False, "check": False}
    fit(squares, **options)  # a step's time is known
    with pytest.raises(NonFiniteError, match=r"step 1: the loss\b(?! and)") as error:
        fit(loss, data=((A, Y), marked), **options)
    close(error.value.result.params, fit(squares, data=BATCHES[:1], epochs=1).params)
    assert np.isfinite(error.value.result.steps["loss"]).tolist() == [True, False]


def test_what_prints_and_what_may_not_end_stops_at_a_bad_step():
    """No step is run from a state that a bad one made: a loop might wait for nan to be small."""
    started = []

    def until_small(x):
        return jax.lax.while_loop(lambda x: ~(jnp.abs(x) < 1), lambda x: x / 2, x)

    def endless(params, example):
        x, y = example
        scale = 1 + 0 * until_small(jax.lax.stop_gradient(params["b"]))  # for ever at nan
        return scale * squares(params, (x, y))

    def telling(params, example):
        jax.debug.callback(lambda b: started.append(float(b)), params["b"])
        return squares(params, example)

    data = A.copy()
    data[9] = np.inf  # in the second batch; the parameters are nan from then on
    for loss in (endless, telling):
        step = fnn.train_step(loss, ADAM)
        for _ in range(2):  # from the second on, a step's time is known
            fit(step, data=(A, Y), optimizer=None, epochs=1, shuffle=False)
        started.clear()
        with pytest.raises(NonFiniteError, match="step 1: the loss"):
            fit(step, data=(data, Y), optimizer=None, shuffle=False)
    assert started and np.isfinite(started).all()


# ----------------------------------------------------------------------------------- reading ahead


def test_what_is_read_ahead_comes_in_order_and_ends():
    seen = []

    def source():
        for i in range(5):
            seen.append((i, threading.current_thread() is threading.main_thread()))
            yield i
        raise RuntimeError("the end")

    found = []
    with pytest.raises(RuntimeError, match="the end"):
        for x in prefetched(source, 2):
            found.append(x)
    assert found == list(range(5)) and not any(main for _, main in seen)
    assert list(prefetched(lambda: iter(range(3)), 0)) == [0, 1, 2]


def test_the_thread_ends_with_its_reader():
    ended = threading.Event()

    def source():
        try:
            yield from range(10**9)
        finally:
            ended.set()

    entries = prefetched(source, 1)
    assert next(entries) == 0
    entries.close()
    assert ended.is_set()


def test_the_thread_computes_as_its_maker():
    with jax.enable_x64(False):
        (found,) = prefetched(lambda: (jnp.ones(()) for _ in range(1)), 1)
    assert found.dtype == jnp.float32
    draw = lambda: (jax.random.normal(jax.random.key(0), (3,)) for _ in range(1))
    for setting in (jax.threefry_partitionable(False), jax.default_prng_impl("rbg")):
        with setting:
            (found,), (wanted,) = prefetched(draw, 1), draw()
        assert found.tolist() == wanted.tolist()
    zeros = lambda: (jnp.zeros(3) / jnp.zeros(3) for _ in range(1))
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        list(prefetched(zeros, 1))


def test_arrays_must_fit_into_the_container(monkeypatch):
    """Whose limit may be far below the machine's memory."""
    limit = {"memory.max": 2**20, "memory.current": 2**18}
    monkeypatch.setattr(compiled, "_container", limit.get)
    assert chunks.fits(np.zeros(2**17, np.uint8)) and not chunks.fits(np.zeros(2**19, np.uint8))


def test_an_iterator_is_read_no_further_than_it_is_trained_on():
    data = iter(BATCHES * 9)
    fit(squares, data=data, steps_per_epoch=4, epochs=2)
    assert len(list(data)) == 9 * 4 - 8


# --------------------------------------------------------------------------- what a step tells


@pytest.mark.parametrize("dtype", sweep(["float32", "float16", "complex64"], quick=["float32"]))
def test_the_norm_of_a_gradient_of_any_size(dtype):
    """Its sums are folded: pieces, and what is left over, against numpy's in float64."""
    sizes = {"large": (70_015,), "two": (81, 64), "small": (7,), "exact": (4096,)}
    rng = np.random.default_rng(0)
    data = {k: 200 * rng.normal(size=(2, *shape)) for k, shape in sizes.items()}
    data = {k: x.astype(dtype) * (1j if dtype == "complex64" else 1) for k, x in data.items()}
    params = {k: jnp.zeros(shape, dtype) for k, shape in sizes.items()}

    def loss(params, x):
        return sum(jnp.vdot(x[k], params[k]).real.astype(jnp.float32) for k in params)

    result = fit(loss, params, data, optax.sgd(0.0), batch_size=1, epochs=1, shuffle=False)
    squares = sum(
        np.sum(np.abs(x.astype(complex)) ** 2, axis=tuple(range(1, x.ndim))) for x in data.values()
    )
    np.testing.assert_allclose(result.steps["grad_norm"], np.sqrt(squares), rtol=1e-5)
    data["large"][1, 70_014] = np.inf
    with pytest.raises(NonFiniteError, match=r"params\['large'\]"):
        fit(loss, params, data, optax.sgd(0.0), batch_size=1, epochs=1, shuffle=False)


def test_what_is_kept_of_a_state_is_its_own():
    """Though no program of the device copies it: the buffers may be given away."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.bool):
        x = jnp.arange(5000).astype(dtype)
        wanted, kept = np.array(x.astype(jnp.float32)), _to_host(x)
        gone = jax.jit(lambda x: ~x if x.dtype == bool else x + 1, donate_argnums=0)(x)
        assert x.is_deleted()
        gone.block_until_ready()
        equal(_to_device(kept).astype(jnp.float32), wanted)
        assert _to_device(kept).dtype == dtype


@pytest.mark.parametrize("dtype", [bool, np.int8, jnp.bfloat16, np.float64, np.complex64])
@pytest.mark.parametrize("large", [False, True])
def test_arrays_are_put_on_the_device_in_memory_of_their_own(dtype, large, monkeypatch):
    """Also those that JAX's CPU backend could read where they lie: they are the caller's."""
    if large:
        monkeypatch.setattr(chunks, "STACKED_BYTES", 0)
    memory = np.zeros(16 * 7 * 16 + 64, np.uint8)
    start = -memory.ctypes.data % 64
    x = memory[start : start + 7 * 16 * np.dtype(dtype).itemsize].view(dtype).reshape(7, 16)
    x[...] = RNG.integers(0, 2, size=x.shape).astype(dtype)
    for given in (x, x.T[::3], x[:0]):
        wanted = given.copy()
        resident = chunks._put(given)
        stack = chunks._stacked((given, given), 3)
        given[...] = (wanted == 0).astype(dtype)
        assert resident.dtype == stack.dtype == wanted.dtype
        equal(resident, wanted)
        equal(stack, np.stack([wanted, wanted, np.zeros_like(wanted)]))
        given[...] = wanted


def test_what_becomes_of_the_arrays_later_does_not_matter():
    x, y = (chunks._memory(v.shape, v.dtype) for v in (A, Y))

    def spoil(epoch, state, record):
        x[...] = y[...] = np.nan

    x[...], y[...] = A, Y
    equal(fit(data=(x, y), after_epoch=spoil).params, fit().params)

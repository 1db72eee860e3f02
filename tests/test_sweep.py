"""`sweep`: each network is what `fit` makes of it, however the networks lie on the machine."""

import functools
import gc
import os
import signal
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled_programs
from sweeps import exhaustive
from sweeps import sweep as some

import fnn
from fnn import ops
from fnn.footprint import free_memory
from fnn.layers import Linear, chain
from fnn.sweeps import choice, machine
from fnn.sweeps.compiled import Programs
from fnn.sweeps.training import Training
from fnn.train import progress
from fnn.train.orders import sort_bits, sort_bits_of_epochs, sorted_orders

RNG = np.random.default_rng(0)
X = RNG.normal(size=(26, 3))
Y = X @ np.array([1.0, -2.0, 0.5]) + 0.3 + 0.1 * RNG.normal(size=26)
DATA, VALIDATION = (X[:22], Y[:22]), (X[22:], Y[22:])
RATES = (0.02, 0.05, 0.1)
GRID = {"seed": range(2), "learning_rate": RATES}


def squares(params, example):
    x, y = example
    error = params["W"] @ x + params["b"] - y
    return error**2, {"error": jnp.abs(error)}


def start(seed):
    return {"W": jax.random.normal(jax.random.key(seed), (3,)), "b": jnp.zeros(())}


def sgd(learning_rate):
    return optax.sgd(learning_rate, momentum=0.9)


def sweep(loss=squares, axes=GRID, data=DATA, **options):
    given = {"optimizer": sgd, "init": start, "epochs": 3, "batch_size": 4, "progress": False}
    if "layout" not in options:
        given["layout"] = "threads"  # which compiles fastest
    return fnn.sweep(loss, axes, data, **{**given, **options})


@functools.cache
def orders(seed):
    """The order of the examples in each epoch, as `fit` draws it."""
    key = jax.random.split(jax.random.key(seed), 3)[0]
    order = jax.jit(lambda epoch: jax.random.permutation(jax.random.fold_in(key, epoch), 22))
    return [np.asarray(order(epoch)) for epoch in (1, 2, 3)]


@functools.cache
def alone(seed, rate, batch_size=4, decay=0.0):
    """One network trained in numpy: its parameters and its history."""
    params = jax.tree.map(np.asarray, start(seed))
    trace = jax.tree.map(np.zeros_like, params)
    history = {}
    for order in orders(seed):
        records, sizes = [], []
        for i in range(0, 22, batch_size):
            x, y = (a[order[i : i + batch_size]] for a in DATA)
            error = x @ params["W"] + params["b"] - y
            gradient = {"W": 2 * error @ x / len(x), "b": 2 * error.mean()}
            gradient["W"] = gradient["W"] + 2 * decay * params["W"]
            norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
            loss = np.mean(error**2) + decay * np.sum(params["W"] ** 2)
            records.append([loss, np.mean(np.abs(error)), norm])
            sizes.append(len(x))
            trace = {name: gradient[name] + 0.9 * trace[name] for name in trace}
            params = {name: params[name] - rate * trace[name] for name in trace}
        error = VALIDATION[0] @ params["W"] + params["b"] - VALIDATION[1]
        record = dict(
            zip(("loss", "error", "grad_norm"), np.average(records, 0, sizes), strict=True)
        )
        record |= {
            "validation_loss": np.mean(error**2),
            "validation_error": np.mean(np.abs(error)),
        }
        for name, value in record.items():
            history.setdefault(name, []).append(value)
    return params, history


def close(a, b, rtol=1e-6, atol=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), a, b)


def as_alone(member, seed, rate, **options):
    params, history = alone(seed, rate, **options)
    close(member.params, params)
    for name, values in member.history.items():
        close(values, history[name][: len(values)])


@pytest.fixture(scope="module")
def trained():
    return sweep(validation=VALIDATION)


EVERY = [(seed, rate) for seed in range(2) for rate in RATES]


# ------------------------------------------------------------------------- as if trained alone


@exhaustive
@pytest.mark.parametrize(
    "layout_and_number",
    some(
        [(way, n) for way in ("vmap", "scan", "threads", "devices") for n in (None, 1, 4)],
        [("vmap", 4), ("threads", None), ("devices", None)],
    ),
)
def test_each_network_is_trained_as_if_alone(layout_and_number):
    layout, at_once = layout_and_number
    found = sweep(validation=VALIDATION, layout=layout, at_once=at_once)
    for seed, rate in EVERY:
        as_alone(found.member(seed=seed, learning_rate=rate), seed, rate)
    assert found.layouts[0][0] == layout
    assert found.epochs.tolist() == [[3] * 3] * 2 and not found.diverged


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Sweeps choose their programs as on a GPU."""
    for module in ("choice", "compiled", "layout", "loop"):
        monkeypatch.setattr(f"fnn.sweeps.{module}.platform", lambda: "gpu")


@pytest.mark.parametrize("layout, most", [("vmap", 64), ("scan", 4), ("devices", 64), ("vmap", 4)])
def test_loops_of_known_length_train_the_same(layout, most, on_a_gpu, monkeypatch):
    """Of an epoch's six steps, the last of two examples. Calls begin and end in its middle."""
    monkeypatch.setattr("fnn.sweeps.program.MOST_KNOWN", most)
    own = lambda params, example: squares(params, example)
    found = sweep(own, validation=VALIDATION, layout=layout)
    for seed, rate in EVERY:
        as_alone(found.member(seed=seed, learning_rate=rate), seed, rate)


def test_on_a_gpu_no_step_is_asked_for(on_a_gpu, monkeypatch):
    """A loop whose length isn't known is left for the epochs alone; unless steps are long."""

    def whiles():
        programs, lower = [], Programs._lowered
        note = lambda *args: programs.append(lower(*args)) or programs[-1]
        monkeypatch.setattr(Programs, "_lowered", note)
        sweep(lambda params, example: squares(params, example), layout="vmap")
        text = next(p.compile().as_text() for p in programs if "advance" in p.as_text()[:200])
        loops = [line for line in text.splitlines() if " while(" in line]
        return sum("known_trip_count" not in line for line in loops)

    assert whiles() == 1
    monkeypatch.setattr("fnn.sweeps.program.FEW", 10)
    assert whiles() == 2


def test_on_a_gpu_what_a_step_does_besides_is_done_once_a_step(on_a_gpu):
    told = []

    def loss(params, example):
        jax.debug.callback(lambda x: told.append(float(x)), params["b"])
        return squares(params, example)

    sweep(loss, axes={"seed": range(2)}, optimizer=optax.sgd(0.1), layout="vmap", epochs=2)
    jax.effects_barrier()
    assert len(told) == 2 * 2 * 6


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_on_a_gpu_each_begins_as_alone(impl, on_a_gpu):
    def init(seed):
        return {"W": jax.random.normal(jax.random.key(seed, impl=impl), (3,)), "b": jnp.zeros(())}

    axes = {"seed": range(3), "learning_rate": [0.0]}
    found = sweep(lambda params, example: squares(params, example), axes, init=init, layout="vmap")
    for seed in range(3):
        close(found.member(seed=seed).params, init(seed))


@pytest.mark.parametrize("size", [3, 6])
def test_on_a_gpu_a_batch_that_is_no_other_size(size, on_a_gpu):
    """Examples that know of each other: a smaller batch is a step of its own, or the only one."""

    def centred(params, example, mode):
        error = squares(params, example)[0]
        return error if mode.axis is None else error * jax.lax.pmean(error, mode.axis)

    data = X[:size], Y[:size]
    axes = {"seed": range(2), "learning_rate": [0.01]}
    found = sweep(centred, data=data, axes=axes, layout="vmap")
    for seed in range(2):
        own = {"epochs": 3, "batch_size": 4, "progress": False, "key": jax.random.key(seed)}
        wanted = fnn.fit(centred, start(seed), data, sgd(0.01), **own)
        close(found.member(seed=seed).params, wanted.params)


def test_on_a_gpu_static_hyperparameters_alone(on_a_gpu):
    axes = {"power": [1, 2]}
    loss = lambda params, example, power: squares(params, example)[0] ** power
    given = {"init": start(0), "shuffle": False, "optimizer": optax.sgd(0.01)}
    found = sweep(loss, axes, static="power", layout="vmap", **given)
    given["layout"] = "threads"
    close(found["loss"].values, sweep(loss, axes, static="power", **given)["loss"].values)


def test_fit_gives_the_same_and_goes_on_from_a_member():
    given = {"epochs": 2, "batch_size": 4, "progress": False, "key": jax.random.key(1)}
    result = fnn.fit(squares, start(1), DATA, sgd(0.05), validation=VALIDATION, **given)
    found = sweep(epochs=2, axes={"seed": [1], "learning_rate": [0.05]}, validation=VALIDATION)
    member = found.best()
    close(member.params, result.params)
    for name in member.history:
        close(member.history[name], result.history[name])
    more = fnn.fit(squares, member.state, DATA, sgd(0.05), **{**given, "epochs": 1})
    close(more.params, alone(1, 0.05)[0])


def test_the_fastest_layout_is_measured_once(monkeypatch):
    measured = []
    real = choice._seconds_a_step
    count = lambda *args: measured.append(args) or real(*args)
    monkeypatch.setattr(choice, "_seconds_a_step", count)
    monkeypatch.setattr(choice, "WORTH", 0)
    axes = {"seed": range(2), "learning_rate": [0.03, 0.04]}
    first = sweep(axes=axes, layout=None)
    assert len(measured) == 2  # one batch, and threads
    again = sweep(axes=axes, layout=None)
    assert len(measured) == 2
    assert first.layouts == again.layouts
    close(first["loss"].values, again["loss"].values)


def test_again_with_functions_that_read_the_same_compiles_nothing():
    loss = lambda params, example: squares(params, example)[0]
    make = lambda sign: lambda learning_rate: optax.sgd(sign * learning_rate)
    first = sweep(loss, optimizer=make(1))
    with compiled_programs() as programs:
        again = sweep(loss, optimizer=make(1))
        assert not programs
        other = sweep(loss, optimizer=make(-1))
        assert programs
    close(first["loss"].values, again["loss"].values)
    assert (other["loss"].values > first["loss"].values).all()


def test_static_hyperparameters_of_one_value_and_other_names_are_told_apart():
    data = np.zeros((4, 1)), np.zeros(4)
    init = lambda a=0.0, b=0.0: {"W": jnp.full(1, a + 100.0 * b)}
    loss = lambda params, example: jnp.sum(params["W"] * example[0])  # its gradient is 0
    for name, wanted in (("a", [1.0, 2.0]), ("b", [100.0, 200.0])):
        axes = {name: [1.0, 2.0], "learning_rate": [0.1]}
        found = sweep(loss, axes, data, init=init, static=name, shuffle=False)
        close(found.params()["W"].ravel(), wanted)


@exhaustive
def test_unshuffled_without_a_key_and_with_whole_batches():
    found = sweep(axes={"learning_rate": [0.05]}, init=start(0), shuffle=False, batch_size=11)
    result = fnn.fit(
        squares, start(0), DATA, sgd(0.05), epochs=3, batch_size=11, shuffle=False, progress=False
    )
    close(found.best().params, result.params)


@exhaustive
def test_a_loss_that_draws_and_one_with_state():
    net = chain(hidden=Linear(4), norm=fnn.layers.BatchNorm(), f=ops.relu, output=Linear(1))
    inputs = X[:22].astype(np.float32), Y[:22].astype(np.float32)

    def squared(out, y):
        return (out[0] - y) ** 2

    plain = fnn.supervised(net, squared)
    begin = lambda seed: net.init(jax.random.key(seed), inputs[0][0])

    def noisy(params, example, mode, state, key):
        x, y = example
        x = x + 0.1 * jax.random.normal(key, x.shape)
        return plain(params, (x, y), mode=mode, state=state)

    state = net.init_state(inputs[0][0])
    for loss, options in ((plain, {}), (noisy, {"model_state": state})):
        found = sweep(
            loss, {"seed": [1, 5]}, inputs, init=begin, optimizer=optax.sgd(0.05), **options
        )
        key = jax.random.key(5)
        result = fnn.fit(
            loss, begin(5), inputs, optax.sgd(0.05), epochs=3, batch_size=4, key=key,
            progress=False, **options,
        )  # fmt: skip
        member = found.member(seed=5)
        close(member.params, result.params, rtol=1e-4)
        close(member.state.model_state, result.state.model_state, rtol=1e-4)


# ----------------------------------------------------------------------------- hyperparameters


def test_injected_hyperparameters():
    made = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0, momentum=0.9)
    step = fnn.train_step(squares, made)
    found = sweep(step, optimizer=None)
    for seed, rate in EVERY:
        as_alone(found.member(seed=seed, learning_rate=rate), seed, rate)


def decayed(params, example, decay):
    return squares(params, example)[0] + decay * jnp.sum(params["W"] ** 2)


def makes_loss(decay):
    return lambda params, example: decayed(params, example, decay)


def makes_step(decay):
    return fnn.train_step(makes_loss(decay), sgd(0.05))


LOSSES = {"named": decayed, "made": makes_loss, "step": makes_step}


@pytest.mark.parametrize("kind", some(LOSSES, ["named"]))
def test_hyperparameters_of_the_loss(kind):
    loss, optimizer = LOSSES[kind], None if kind == "step" else sgd(0.05)
    found = sweep(loss, {"decay": [0.0, 0.3], "seed": [1]}, optimizer=optimizer)
    as_alone(found.member(decay=0.3), 1, 0.05, decay=0.3)


@exhaustive
def test_static_hyperparameters_have_programs_of_their_own():
    def net(width, activation):
        return chain(hidden=Linear(width), f=activation, output=Linear(1))

    def loss(width, activation):
        return fnn.supervised(net(width, activation), lambda out, y: (out[0] - y) ** 2)

    def init(seed, width, activation):
        return net(width, activation).init(jax.random.key(seed), X[0])

    found = sweep(
        loss,
        {"width": [2, 5], "activation": [ops.tanh], "seed": [0, 1]},
        init=init,
        optimizer=optax.sgd(0.05),
        static="width",
    )
    assert len(found.layouts) == 2
    result = fnn.fit(
        loss(5, ops.tanh), init(1, 5, ops.tanh), DATA, optax.sgd(0.05), epochs=3, batch_size=4,
        key=jax.random.key(1), progress=False,
    )  # fmt: skip
    close(found.member(width=5, activation=ops.tanh, seed=1).params, result.params)
    stacked = found.params(width=5)
    assert stacked["hidden"]["W"].shape == (2, 5, 3)
    with pytest.raises(ValueError, match="differ in shape: give width"):
        found.params(activation=ops.tanh)
    text = repr(found)
    assert "activation" in text and "tanh" in text and len(text.splitlines()) <= 24


@exhaustive
def test_the_batch_size_is_an_axis():
    found = sweep(axes={"batch_size": [4, 11], "seed": [0]}, optimizer=sgd(0.02), batch_size=None)
    for size in (4, 11):
        as_alone(found.member(batch_size=size), 0, 0.02, batch_size=size)


# ------------------------------------------------------------------------- halving, divergence


@pytest.mark.parametrize("layout", some(["vmap", "threads"], ["vmap"]))
def test_halving_keeps_the_best_and_changes_nothing(layout):
    halving = fnn.Halving(after=1, eta=2)
    found = sweep(validation=VALIDATION, layout=layout, halving=halving)
    after = lambda which, epoch: alone(*which)[1]["validation_loss"][epoch - 1]
    first = sorted(EVERY, key=lambda which: after(which, 1))[:3]
    second = sorted(first, key=lambda which: after(which, 2))[:1]
    for seed, rate in EVERY:
        wanted = 1 + ((seed, rate) in first) + ((seed, rate) in second)
        member = found.member(seed=seed, learning_rate=rate)
        assert len(member.history["loss"]) == wanted
        close(member.history["loss"], alone(seed, rate)[1]["loss"][:wanted])
    ((seed, rate),) = second
    as_alone(found.best(), seed, rate)
    assert found.best().hyperparameters == {"seed": seed, "learning_rate": rate}
    assert sorted(found.epochs.ravel().tolist()) == [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("layout", some(["vmap", "threads"], ["vmap"]))
def test_what_halving_gives_up_leaves_the_device(layout, monkeypatch):
    given_up = []
    regrouped = Training.regrouped

    def watched(self, runs, kept):
        going_on, left = regrouped(self, runs, kept)
        given_up.extend((run.members, jax.tree.leaves(run.carry)) for run in left)
        return going_on, left

    monkeypatch.setattr(Training, "regrouped", watched)
    sweep(layout=layout, at_once=6, halving=fnn.Halving(after=1, eta=2))
    assert sum(len(members) for members, _ in given_up) == 5
    assert all(isinstance(x, np.ndarray) for _, leaves in given_up for x in leaves)


def test_halving_over_seeds_keeps_all_seeds_of_a_setting():
    halving = fnn.Halving(after=1, eta=3, over="seed")
    found = sweep(validation=VALIDATION, halving=halving)
    mean = lambda rate: np.mean([alone(s, rate)[1]["validation_loss"][0] for s in range(2)])
    best = min(RATES, key=mean)
    assert [found.axes["learning_rate"][i] for i in np.flatnonzero(found.epochs[0] == 3)] == [best]
    assert (found.epochs[0] == found.epochs[1]).all()


@pytest.mark.parametrize("layout", some(["vmap", "threads"], ["vmap"]))
def test_one_that_diverges_harms_no_other_and_is_named(layout):
    found = sweep(axes={"seed": [1], "learning_rate": [0.05, 1e200, 0.1]}, layout=layout)
    assert found.diverged == [{"seed": 1, "learning_rate": 1e200, "epoch": 1}]
    for rate in (0.05, 0.1):
        as_alone(found.member(learning_rate=rate), 1, rate)
    assert found.best().hyperparameters["learning_rate"] in (0.05, 0.1)
    assert "diverged: seed 1, learning_rate 1e+200, epoch 1" in repr(found)


# --------------------------------------------------------------------------- memory, the machine


def test_the_data_are_shared_and_memory_bounds_how_many_are_trained_at_once(monkeypatch):
    data = RNG.normal(size=(4096, 3)), RNG.normal(size=4096)
    size = sum(x.nbytes for x in data)
    taken = []
    real = Programs.bytes
    note = lambda *args: taken.append(real(*args)) or taken[-1]
    monkeypatch.setattr(Programs, "bytes", note)
    axes = {"seed": range(16), "learning_rate": [0.01]}
    whole = sweep(axes=axes, data=data, layout="vmap", epochs=1, shuffle=False)
    assert whole.layouts == [("vmap", 16)]
    assert taken[-1] < 4 * size  # sixteen copies would take sixteen times as much
    monkeypatch.setattr(
        choice, "free_memory", lambda: taken[-1] if len(taken) > 1 else taken[0] / 3
    )
    del taken[1:]
    cut = sweep(axes=axes, data=data, layout="vmap", epochs=1, shuffle=False)
    ((_, at_once),) = cut.layouts
    assert 1 <= at_once <= 6
    close(whole["loss"].values, cut["loss"].values)


@pytest.mark.parametrize("size", [1, 5, 1437, 1700])
def test_orders_are_those_of_jax(size):
    key = jax.random.key(size)
    order = sorted_orders(sort_bits(key, size))
    assert (order == np.asarray(jax.random.permutation(key, size))).all()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_an_epochs_order_does_not_depend_on_those_drawn_with_it(impl):
    key = jax.random.key(3, impl=impl)
    drawn = sorted_orders(sort_bits_of_epochs(key, 2, 3, 50))
    for i, order in enumerate(drawn):
        own = jax.random.permutation(jax.random.fold_in(key, 2 + i), 50)
        np.testing.assert_array_equal(order, own)


def test_free_memory_is_known_here():
    assert 2**20 < free_memory() < 2**50 and machine.cores() >= 1


@pytest.mark.parametrize("layout", some(["vmap", "threads"], ["threads"]))
def test_ctrl_c_returns_what_there_is(layout, monkeypatch):
    class Display(progress.Nothing):
        def epoch(self, epoch, record):
            if epoch >= 3:  # on a busy machine the first call is of one epoch
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("fnn.sweeps.loop.progress_for", lambda *args: Display())
    monkeypatch.setattr("fnn.sweeps.training.SECONDS", 0.02)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found = sweep(epochs=10**5, layout=layout)
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.interrupted and "interrupted" in repr(found)
    assert found.epochs.max() >= 3 and found.epochs.min() < 10**5
    seed, rate = EVERY[int(found.epochs.argmax())]
    member = found.member(seed=seed, learning_rate=rate)
    close(member.history["loss"][:3], alone(seed, rate)[1]["loss"])


def test_an_error_on_the_way_brings_the_result():
    class Stop(Exception):
        pass

    calls = []

    def probe(x):
        calls.append(x)
        if len(calls) > 20:
            raise Stop("enough")
        return np.asarray(x)

    def loss(params, example):
        value = squares(params, example)[0]
        shape = jax.ShapeDtypeStruct((), value.dtype)
        told = jax.pure_callback(
            probe, shape, jax.lax.stop_gradient(value), vmap_method="sequential"
        )
        return value + 0 * told

    with pytest.raises(Exception, match="enough") as caught:
        sweep(loss, epochs=40, layout="threads", at_once=1, check=False)
    assert isinstance(caught.value.result, fnn.SweepResult)


def test_nothing_holds_on_to_the_loss_and_the_data():
    class Loss:
        def __call__(self, params, example):
            return squares(params, example)[0]

    loss, data = Loss(), (jnp.asarray(X), jnp.asarray(Y))
    found = sweep(loss, data=data, epochs=1)
    refs = [weakref.ref(loss), weakref.ref(data[0])]
    del loss, data
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert found.epochs.all()


# ------------------------------------------------------------------------------- the table


def test_tables_are_numpys_numbers_under_names(trained):
    found = trained
    losses = np.array([[alone(s, r)[1]["validation_loss"][-1] for r in RATES] for s in range(2)])
    table = found["validation_loss"]
    close(np.asarray(table), losses)
    assert table.axes == {"seed": (0, 1), "learning_rate": RATES}
    for name in ("mean", "std", "min", "max", "median"):
        close(getattr(table, name)(over="seed").values, getattr(np, name)(losses, axis=0))
    assert table.mean(over=("seed", "learning_rate")).values.shape == ()
    mean = found.mean(over="seed").best()
    assert mean["learning_rate"] == RATES[int(losses.mean(axis=0).argmin())]
    worst = table.best(largest=True)
    assert worst["validation_loss"] == pytest.approx(losses.max())
    rows = found.rows()
    assert len(rows) == 6 and rows[4]["learning_rate"] == 0.05 and rows[4]["epochs"] == 3
    assert rows[4]["validation_loss"] == pytest.approx(losses[1, 1])
    assert "SweepResult: 6 networks, seed (2) × learning_rate (3); 3 epochs" in repr(found)
    assert found.history["loss"].shape == (2, 3, 3)
    stacked = found.params(learning_rate=0.05)
    close(stacked["W"], np.stack([alone(s, 0.05)[0]["W"] for s in range(2)]))
    assert repr(found.best()).startswith("Member: seed")


def test_what_is_printed_where_no_network_is_the_best():
    found = sweep(validation=(X[:2], Y[:2] + np.inf), check=False, epochs=1)
    with pytest.raises(ValueError, match="no network has a finite validation_loss"):
        found.best()
    text = repr(found)
    assert "best" not in text and "validation_loss: seed (2) × learning_rate (3)" in text


@exhaustive
def test_what_is_printed_stays_on_one_screen():
    axes = {"seed": range(30), "learning_rate": np.geomspace(1e-3, 0.1, 20)}
    found = sweep(axes=axes, epochs=1)
    assert len(repr(found).splitlines()) <= 24
    assert max(map(len, repr(found).splitlines())) <= 100


def test_hyperparameters_that_change_together(capsys):
    axes = {("seed", "learning_rate"): ([0, 1], [0.02, 0.1])}
    found = sweep(axes=axes, progress=True)
    assert found["loss"].values.shape == (2,)
    as_alone(found.member(seed=1), 1, 0.1)
    assert found.best().hyperparameters.keys() == {"seed", "learning_rate"}
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("epoch 3/3  networks 2  best loss")


def test_progress_is_that_of_all_networks(monkeypatch):
    """Of two programs, one after the other: the second is shown as the first was."""
    shown = []

    class Display(progress.Nothing):
        def epoch(self, epoch, record):
            shown.append((epoch, record["networks"], record["best loss"]))

    monkeypatch.setattr("fnn.sweeps.loop.progress_for", lambda *args: Display())
    monkeypatch.setattr("fnn.sweeps.training.SECONDS", 1e-9)  # a step a call
    axes = {"seed": [0, 1], "batch_size": [12, 4]}
    found = sweep(axes=axes, optimizer=optax.sgd(0.05), epochs=40, batch_size=None)
    epochs, counts, best = zip(*shown, strict=True)
    assert list(epochs) == sorted(set(epochs)) and epochs[-1] == 40 and set(counts) == {4}
    assert best[-1] == pytest.approx(found["loss"].values.min(), rel=1e-6)
    assert found.mean("seed").best()["batch_size"] == 4  # which comes last


# --------------------------------------------------------------------------------- refused

BAD = [
    ([], TypeError, "axes must be a dict"),
    ({}, ValueError, "axes is empty"),
    ({"seed": [], "learning_rate": RATES}, ValueError, "the axis 'seed' is empty"),
    ({"seed": 3}, TypeError, "'seed' must be a sequence of values, but got 3"),
    ({"seed": "012"}, TypeError, "'seed' must be a sequence of values, such as a list"),
    ({"seed": np.zeros((2, 2))}, ValueError, "must be a sequence of values, but got an array"),
    ({"seed": [0, 1, 0]}, ValueError, "'seed' holds 0 twice"),
    ({"seed": [0.5], "learning_rate": RATES}, TypeError, "it must hold integers"),
    ({"seed": ["a"], "learning_rate": RATES}, TypeError, "it must hold integers"),
    ({"seed": [0], "learning_rate": [0.1, np.nan]}, ValueError, "'learning_rate' holds nan"),
    ({"seed": [0], "learning_rate": [2**70]}, ValueError, "can't hold"),
    ({"seed": [0], "rate": [0.1]}, TypeError, "optimizer.*wants learning_rate, and the axes are"),
    ({**GRID, "lr": [1]}, ValueError, "axis lr is used by nothing: .* validation_loss takes"),
    ({"seed": [0], "key": [1]}, ValueError, "can't be named 'key'"),
    ({"seed": [0], "epochs": [1, 2]}, ValueError, "can't be named 'epochs'"),
    ({"seed": [0], 3: [1]}, TypeError, "named by a hyperparameter"),
    ({("seed", "learning_rate"): ([0, 1], [0.1])}, ValueError, "seed has 2, learning_rate has 1"),
    ({("seed", "learning_rate"): [0, 1, 2]}, ValueError, "for each of its 2"),
    ({"learning_rate": RATES}, TypeError, "init must be.*wants seed"),
]  # fmt: skip


@pytest.mark.parametrize("axes, kind, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_axes(axes, kind, message):
    with pytest.raises(kind, match=message):
        sweep(axes=axes, validation_loss=squares, validation=VALIDATION)


OF_TWO_LOSSES = {"plain": [False, True], "seed": [0], "learning_rate": RATES}
LAYOUT = fnn.sharding.data_parallel(jax.make_mesh((1,), ("data",)))


def make_loss(plain):
    return lambda p, e: squares(p, e)[0] if plain else squares(p, e)


def squares_of_error(params, example, error):
    return squares(params, example)


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"optimizer": None}, TypeError, "optimizer is missing"),
        (
            {"optimizer": 0.1},
            TypeError,
            "optimizer must be an optax transformation, or a function of",
        ),
        ({"layout": "pmap"}, ValueError, "layout must be 'vmap', 'scan', 'threads' or 'devices'"),
        ({"at_once": 0}, ValueError, "at_once must be"),
        ({"epochs": 0}, ValueError, "epochs must be an integer of at least 1"),
        ({"static": "width"}, ValueError, "static names 'width', which is no axis"),
        ({"halving": 2}, TypeError, "halving must be an fnn.Halving"),
        (
            {"halving": fnn.Halving(after=1, eta=1)},
            ValueError,
            "eta must be a finite number above 1",
        ),
        ({"halving": fnn.Halving(after=1, by="speed")}, ValueError, "by='speed' is no quantity"),
        (
            {"halving": fnn.Halving(after=1, by="error"), "axes": OF_TWO_LOSSES, "loss": make_loss},
            ValueError,
            "by='error' is no quantity with plain True; there are grad_norm, loss",
        ),
        (
            {"loss": fnn.train_step(squares, sgd(0.1), layout=LAYOUT), "optimizer": None},
            TypeError,
            "the TrainStep has a layout",
        ),
        (
            {"loss": squares_of_error, "axes": GRID | {"error": [1.0]}},
            ValueError,
            "the metric 'error' has the name of an axis",
        ),
        ({"halving": fnn.Halving(after=1, over="width")}, ValueError, "no axis 'width'"),
        ({"data": [DATA]}, TypeError, "data must be arrays"),
        ({"validation_loss": squares}, ValueError, "but no data for it"),
        ({"init": lambda seed: {}}, ValueError, "holds no arrays to train"),
        ({"loss": lambda params: 0.0}, TypeError, "takes 1 of these arguments"),
        ({"data": (np.full((4, 3), np.nan), np.zeros(4))}, ValueError, "holds nan"),
    ],
    ids=lambda value: None,
)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        sweep(**options)


def test_a_number_that_must_be_static_is_named():
    def init(seed, width):
        return {"W": np.random.default_rng(width).normal(size=3) * jnp.ones(3), "b": jnp.zeros(())}

    axes = {"seed": [0], "width": [3, 4], "learning_rate": [0.1]}
    with pytest.raises(Exception) as caught:
        sweep(axes=axes, init=init)
    assert "static='width'" in "".join(caught.value.__notes__)
    assert sweep(axes=axes, init=init, static="width", epochs=1).epochs.all()


def test_unknown_members_and_axes_of_a_result(trained):
    found = trained
    pairs = sweep(axes={("seed", "learning_rate"): ([0, 1], [0.02, 0.1])}, epochs=1)
    for call, message in (
        (lambda: found.member(seed=7), "no member has seed = 7; there are 0, 1"),
        (lambda: found.member(width=7), "no axis 'width'"),
        (lambda: found.member(seed=1), "3 networks have these hyperparameters; give learning_rate"),
        (
            lambda: pairs.member(learning_rate=0.1, seed=0),
            "member: no network has learning_rate 0.1, seed 0 together",
        ),
        (lambda: pairs.params(learning_rate=0.1, seed=0), "params: no network has learning_rate"),
        (lambda: found["accuracy"], "no quantity 'accuracy'; there are loss, error"),
        (lambda: found.mean(over="width"), "no axis 'width' to go over"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@exhaustive
def test_32_bits_and_16():
    with jax.enable_x64(False):
        for dtype in (jnp.float32, jnp.bfloat16):
            data = jnp.asarray(X[:22], dtype), jnp.asarray(Y[:22], dtype)
            init = lambda seed, dtype=dtype: jax.tree.map(lambda x: x.astype(dtype), start(seed))
            for way in ("vmap", "threads"):
                found = sweep(
                    axes={"seed": [1], "learning_rate": [0.05]}, data=data, init=init, layout=way
                )
                result = fnn.fit(
                    squares, init(1), data, sgd(0.05), epochs=3, batch_size=4,
                    key=jax.random.key(1), progress=False,
                )  # fmt: skip
                tolerance = {"rtol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.05, "atol": 0.02}
                assert found.best().params["W"].dtype == dtype
                as_floats = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
                close(as_floats(found.best().params), as_floats(result.params), **tolerance)

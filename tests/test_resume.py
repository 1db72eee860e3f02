"""`fit` with checkpoints: killed at any moment, it ends with the same parameters, to the bit."""

import contextlib
import errno
import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import resumed
from compiling import compiled_programs
from jax.sharding import NamedSharding, PartitionSpec
from resumed import X, Y, checkpoints, digest, train
from sweeps import exhaustive, sweep

import fnn
from fnn.train import CheckpointError, calls, checkpoint_files

EPOCHS = 4
BATCHES = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 80, 16)]


class Stop(Exception):
    pass


@functools.cache
def uninterrupted(epochs=EPOCHS):
    return digest(train(None, epochs))


@functools.cache
def of_batches():
    return digest(train(None, EPOCHS, data=BATCHES))


# ---------------------------------------------------------------------------------- the same call


def test_the_same_call_goes_on_and_then_returns_the_result(tmp_path):
    two = train(tmp_path, 2)
    four = train(tmp_path, EPOCHS)  # an uninterrupted run of four, as far as its checkpoints know
    assert digest(four) == uninterrupted()
    assert two.history["loss"] == four.history["loss"][:2]
    assert not four.interrupted
    again = train(tmp_path, EPOCHS, after_epoch=lambda *_: pytest.fail("it trains"))
    assert digest(again) == digest(four) and again.history["seconds"] == four.history["seconds"]
    assert digest(checkpoints(tmp_path).load(four.state)) == digest(four)
    assert checkpoints(tmp_path).best_step() == 6 * (1 + np.argmin(four.history["validation_loss"]))
    fewer = train(tmp_path, 3)
    assert digest(fewer) == digest(four)


def test_it_compiles_no_more_than_a_run_from_the_beginning(tmp_path):
    train(None, 1)
    train(tmp_path, 1)
    with compiled_programs() as programs:
        train(tmp_path, 2)
    assert not [name for name in programs if "run" in name or "step" in name], programs


def stopping_at(count, then):
    """Batches, with a call of `then` before batch number `count`."""
    calls = itertools.count(1)

    def data():
        for batch in BATCHES:
            if next(calls) == count:
                then()
            yield batch

    return data


def raising():
    raise Stop


def test_an_error_of_the_data_loses_no_step(tmp_path):
    with pytest.raises(Stop) as error:
        train(tmp_path, EPOCHS, data=stopping_at(8, raising))
    assert "saved as the checkpoint of step 7" in "".join(error.value.__notes__)
    assert checkpoints(tmp_path).steps()[-1] == 7 == len(error.value.result.steps["loss"])
    rest = train(tmp_path, EPOCHS, data=stopping_at(0, raising))
    assert digest(rest) == of_batches()


@pytest.mark.parametrize("where", ["after_epoch", "validation"])
def test_an_error_of_a_callback_loses_no_step(tmp_path, where):
    """That of a validation comes before its epoch's end, which the next call repeats."""
    options = {"after_epoch": lambda epoch, *_: raising() if epoch == 3 else None}
    whole = {}
    if where == "validation":
        options, whole = ({"validation": stopping_validation(n)} for n in (3, 0))
    with pytest.raises(Stop) as error:
        train(tmp_path, EPOCHS, **options)
    assert error.value.result.state.step == 18
    assert checkpoints(tmp_path).steps()[-1] == 18
    assert digest(train(tmp_path, EPOCHS, **whole)) == digest(train(None, EPOCHS, **whole))


def test_a_signal_beside_an_error_does_not_take_its_place(tmp_path, monkeypatch):
    """Nor does it strike the saving: the error has the result, and says what was saved."""

    def fail(self, work, chunk, at):
        signal.raise_signal(signal.SIGINT)
        raise Stop

    monkeypatch.setattr(calls.Calls, "__call__", fail)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Stop) as error:
            train(tmp_path, EPOCHS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert error.value.result.state.step == 0 and checkpoints(tmp_path).steps() == [0]


def test_the_best_epoch_stays_the_best_where_training_ended_with_it(tmp_path):
    """Its checkpoint is written again, to say that training is over."""
    options = {"validation": None, "validation_loss": None}
    options["checkpoints"] = kept = checkpoints(tmp_path, best="loss", keep=None)
    whole = train(tmp_path, EPOCHS, **options, after_epoch=lambda epoch, *_: epoch == 3)
    assert kept.best_step() == kept.steps()[-1] == 18
    assert kept.load(whole.state, "best").state.step == 18
    train(tmp_path, EPOCHS, **options)  # it is over
    assert kept.best_step() == 18


def test_a_key_in_the_optimisers_state(tmp_path):
    noisy = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.01))
    whole = train(None, 2, optimizer=noisy)
    train(tmp_path, 1, optimizer=noisy)
    again = train(tmp_path, 2, optimizer=noisy)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    keys = [jax.random.key_data(result.state.opt_state[0].rng_key) for result in (again, whole)]
    assert (keys[0] == keys[1]).all()


def stopping_validation(count):
    calls = itertools.count(1)

    def data():
        if next(calls) == count:
            raise Stop
        yield X[:20], Y[:20]

    return data


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end(tmp_path, number, capsys):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    tell = lambda: (signal.raise_signal(number), signal.raise_signal(number))
    part = train(tmp_path, EPOCHS, data=stopping_at(13, tell), progress=True)
    steps = int(part.state.step)  # the data are read ahead
    assert part.interrupted and 8 <= steps <= 12 and checkpoints(tmp_path).steps()[-1] == steps
    assert "saved" in capsys.readouterr().out
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert checkpoints(tmp_path).load(part.state).interrupted
    rest = train(tmp_path, EPOCHS, data=stopping_at(0, tell))
    assert digest(rest) == of_batches() and not rest.interrupted


def test_a_handler_of_ones_own_is_left_alone(tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        tell = lambda: signal.raise_signal(signal.SIGTERM)
        assert not train(tmp_path, 2, data=stopping_at(3, tell)).interrupted
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [1]


def test_an_iterator_is_read_up_to_where_it_stood(tmp_path):
    options = {"steps_per_epoch": 5}
    make = lambda: itertools.cycle(BATCHES)
    with pytest.raises(Stop):
        train(tmp_path, EPOCHS, data=make(), after_epoch=lambda *_: raising(), **options)
    assert digest(train(tmp_path, EPOCHS, data=make(), **options)) == of_batches()


def test_a_run_that_a_callback_ended_stays_ended(tmp_path):
    stop = {"after_epoch": lambda epoch, *_: epoch == 2}
    part = train(tmp_path, EPOCHS, **stop)
    again = train(tmp_path, EPOCHS)
    assert digest(again) == digest(part) and len(again.history["loss"]) == 2
    assert digest(train(tmp_path, 5)) == uninterrupted(5)


def test_early_stopping_remembers_the_best(tmp_path):
    """The loss falls, and higher counts as better: the first epoch is the best."""
    values = {"validation": (X[:20], Y[:20])}
    stop = fnn.EarlyStopping(patience=2, monitor="validation_loss", higher=True, least=0.01)
    options = values | {"early_stopping": stop, "checkpoints": checkpoints(tmp_path, higher=True)}
    whole = train(None, 6, **options | {"checkpoints": None})
    assert 2 <= len(whole.history["loss"]) < 6
    for epochs in range(1, len(whole.history["loss"])):
        train(tmp_path, epochs, **options)
    result = train(tmp_path, 6, **options)
    assert digest(result) == digest(whole)
    assert digest(result._replace(state=result.best)) == digest(whole._replace(state=whole.best))


@pytest.mark.parametrize("before", [None, {"higher": True}, {"monitor": "loss"}, {"least": 9.0}])
def test_another_early_stopping_begins_anew(tmp_path, before):
    """The best is that of the epochs since, in this call and in those that go on from it."""
    earlier = before and fnn.EarlyStopping(None, **before)
    train(tmp_path, 2, early_stopping=earlier)
    patient = fnn.EarlyStopping(patience=2)
    for epochs in (4, 6):
        found = train(tmp_path, epochs, early_stopping=patient)
        losses = found.history["validation_loss"]
        assert len(losses) == epochs  # they fall
        assert found.best.position[0] == 3 + np.argmin(losses[2:])
    assert train(tmp_path, 6, early_stopping=earlier).best is None
    again = train(tmp_path, 6, early_stopping=patient)  # what trained nothing changed nothing
    assert digest(again._replace(state=again.best)) == digest(found._replace(state=found.best))


def test_a_call_after_early_stopping_ended_a_run_changes_nothing(tmp_path):
    stop = fnn.EarlyStopping(patience=1, higher=True)
    ended = train(tmp_path, 6, early_stopping=stop)
    assert len(ended.history["loss"]) == 2
    assert train(tmp_path, 6).best is None
    assert train(tmp_path, 6, early_stopping=stop).best.position[0] == ended.best.position[0] == 1


def test_all_of_a_step_is_saved(tmp_path):
    """The average of the parameters, a changing scale of the loss, the state of a network."""

    def counting(params, example, key, state):
        value = resumed.loss(params, example, key)
        return value, {"seen": state["seen"] + 1}

    options = {
        "loss": counting,
        "model_state": {"seen": jnp.zeros(())},
        "ema": 0.9,
        "compute": jnp.float16,
        "loss_scale": "dynamic",
        "accumulate": 2,
        "validation": None,
        "validation_loss": None,
        "checkpoints": checkpoints(tmp_path, best="loss"),
    }
    whole = train(None, 3, **options | {"checkpoints": None})
    assert whole.state.ema is not None and whole.state.loss_scale is not None
    assert whole.state.model_state["seen"] > 0
    train(tmp_path, 1, **options)
    assert digest(train(tmp_path, 3, **options)) == digest(whole)
    with pytest.raises(CheckpointError, match=r"step\['ema'\]: 0.9 in the checkpoint, 0.8 here"):
        train(tmp_path, 3, **options | {"ema": 0.8})


def test_from_a_state_in_the_midst_of_an_epoch(tmp_path):
    """Epochs count from the state that the call is given, also when it is called again."""
    with pytest.raises(Stop) as error:
        train(None, EPOCHS, data=stopping_at(8, raising))
    start = error.value.result.state
    with pytest.raises(Stop):
        train(tmp_path, 3, data=stopping_at(5, raising), params=start)
    rest = train(tmp_path, 3, data=BATCHES, params=start, checkpoints=allowing(tmp_path, "data"))
    whole = train(None, EPOCHS, data=BATCHES)
    assert rest.state.position.tolist() == whole.state.position.tolist()
    chexed = zip(jax.tree.leaves(rest.params), jax.tree.leaves(whole.params), strict=True)
    assert all(np.array_equal(a, b) for a, b in chexed)


def allowing(folder, *names):
    return checkpoints(folder, allow_changed=names)


def test_short_epochs_are_saved_as_often_as_that_is_cheap(tmp_path, monkeypatch):
    """Unless told, no more than a twentieth of the time: an epoch here takes a millisecond."""
    written, write = [], checkpoint_files.Files.write

    def counted(self, step, *args):
        written.append(step)
        write(self, step, *args)

    monkeypatch.setattr(checkpoint_files.Files, "write", counted)
    options = {"validation": None, "validation_loss": None}
    train(tmp_path, 100, checkpoints=fnn.Checkpoints(tmp_path), **options)
    assert written[0] == 6 and written[-1] == 600 and len(written) <= 20
    written.clear()
    train(None, 5, checkpoints=fnn.Checkpoints(tmp_path / "best", best="loss"), **options)
    assert written == [6, 12, 18, 24, 30]  # the loss falls: each epoch is the best


# ----------------------------------------------------------------------------------- other calls


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(folder, 1)
    return folder


CHANGES = {
    "data": ({"data": (X * 2, Y)}, r"data\[0\] \(float32\[90,6\]\) holds other numbers"),
    "more data": ({"data": (X[:80], Y[:80])}, r"data\[0\]: float32\[90,6\].*float32\[80,6\]"),
    "batch size": ({"batch_size": 8}, "batch_size: 16 in the checkpoint, 8 here"),
    "key": ({"key": jax.random.key(2)}, r"key: threefry2x32 \[0, 1\] in the checkpoint"),
    "order": ({"shuffle": False}, "shuffle: True in the checkpoint, False here"),
    "rate": ({"optimizer": optax.adam(0.1)}, "step_size: -0.01 in the checkpoint, -0.1 here"),
    "first parameters": (
        {"params": {"W": jnp.ones((8, 6)), "w": jnp.ones(8)}},
        r"state.params\['W'\] \(float64\[8,6\]\) holds other numbers",
    ),
    "optimiser": ({"optimizer": optax.sgd(0.1)}, r"state.opt_state\[0\]\.mu\['W'\] is only in"),
    "network": (
        {"params": {"W": jnp.eye(9, 6), "w": jnp.ones(9)}},
        r"state.params\['W'\] is float64\[8,6\] in the checkpoint, float64\[9,6\] here",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_call_is_refused(trained, change):
    options, said = CHANGES[change]
    before = sorted(trained.iterdir())
    with pytest.raises(CheckpointError, match=said):
        train(trained, 2, **options)
    assert sorted(trained.iterdir()) == before


def test_a_change_that_is_meant(tmp_path):
    train(tmp_path, 1)
    other = {"optimizer": optax.adam(0.1)}
    with pytest.raises(CheckpointError, match=r"allow_changed=\('optimizer',\)\)"):
        train(tmp_path, 2, **other)
    result = train(tmp_path, 2, checkpoints=allowing(tmp_path, "optimizer"), **other)
    assert result.state.step == 12
    assert digest(train(tmp_path, 2, **other)) == digest(result)


def test_other_versions_are_told_of(tmp_path, monkeypatch):
    train(tmp_path, 1)
    monkeypatch.setattr(jax, "__version__", "0.0.1")
    with pytest.warns(
        RuntimeWarning, match=r"written with jax .* \(now 0.0.1\): what follows may"
    ) as told:
        result = train(tmp_path, 2)
    assert told[0].filename == resumed.__file__
    monkeypatch.undo()
    assert digest(result) == uninterrupted(2)


def test_what_fit_refuses(tmp_path):
    with pytest.raises(TypeError, match=r"checkpoints must be an fnn.Checkpoints such as"):
        train(None, checkpoints=str(tmp_path))
    with pytest.raises(ValueError, match="that of 'validation_loss', but there are no data for it"):
        train(tmp_path, validation=None, validation_loss=None)
    with pytest.raises(
        ValueError, match="best='accuracy' is no number of the epoch's record, which"
    ):
        train(None, checkpoints=checkpoints(tmp_path, best="accuracy"))


def test_a_full_disk_ends_training_and_loses_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def after_epoch(epoch, *_):
        if epoch == 2:
            monkeypatch.setattr(os, "rename", full)
            monkeypatch.setattr(os, "replace", full)

    with pytest.raises(CheckpointError, match="can't be written .*: No space left") as error:
        train(tmp_path, EPOCHS, after_epoch=after_epoch)
    monkeypatch.undo()
    assert len(error.value.result.steps["loss"]) >= 12
    assert checkpoints(tmp_path).steps()[-1] in (6, 12)  # the second was on its way
    assert digest(train(tmp_path, EPOCHS)) == uninterrupted()


def test_a_damaged_checkpoint_and_the_one_before(tmp_path):
    train(tmp_path, 2, checkpoints=checkpoints(tmp_path, every_steps=None))
    (tmp_path / "0000000012/about/metadata").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"step 12 .* is damaged(.|\n)*The one of step 6 is whole"
    ):
        train(tmp_path, EPOCHS)
    checkpoints(tmp_path).discard(12)
    assert digest(train(tmp_path, EPOCHS)) == uninterrupted()


# -------------------------------------------------------------------------------------- devices


@exhaustive
@pytest.mark.parametrize("devices", sweep([(4, 1), (1, 4), (4, 2)], [(4, 1)]), ids=str)
def test_another_number_of_devices(tmp_path, devices):
    """Data parallel; equal to rounding."""
    before, after = devices
    data = (np.tile(X, (2, 1))[:160], np.tile(Y, 2)[:160])

    def of(devices, folder, epochs):
        mesh = jax.make_mesh((devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        rows, all_ = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
        params = jax.device_put({"W": jnp.eye(8, 6), "w": jnp.ones(8)}, all_)
        return train(folder, epochs, data=jax.device_put(data, rows), params=params)

    of(before, tmp_path, 1)
    result = of(after, tmp_path, 2)
    assert len(result.params["W"].devices()) == after
    whole = of(1, None, 2)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert digest_of_position(result) == digest_of_position(whole)


@exhaustive
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_layout_on_another_mesh(tmp_path, after):
    """Parameters and optimiser's state in parts on four devices; read by fewer, in other parts."""
    params = {"W": jnp.eye(8, 6), "w": jnp.ones(8)}

    def of(devices, folder, epochs):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("d",))
        layout = fnn.sharding.fully_sharded(mesh)
        return train(folder, epochs, params=params, data=(X[:80], Y[:80]), layout=layout)

    of(4, tmp_path, 1)
    result, whole = of(after, tmp_path, 2), of(1, None, 2)
    assert len(result.params["W"].devices()) == after
    for a, b in zip(jax.tree.leaves(result.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def digest_of_position(result):
    return [int(result.state.step), np.asarray(result.state.position).tolist()]


# ----------------------------------------------------------------------------------------- SIGKILL


class Runner:
    """The process that forks a child for each run."""

    def __init__(self, log, cache):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "JAX_COMPILATION_CACHE_DIR": str(cache),  # each child would compile for seconds
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, resumed.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        assert self.line() == "ready"

    def line(self):
        return self.process.stdout.readline().strip()

    def start(self, folder):
        """Begin a run; the child's number."""
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        return int(self.line())

    def end(self):
        """How it ended: an exit status, or minus a signal's number."""
        return int(self.line())

    def run(self, folder):
        self.start(folder)
        assert self.end() == 0
        return result_in(folder)


def result_in(folder):
    return json.loads(Path(f"{folder}.done").read_text())


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runner")
    with open(folder / "log", "w") as log:
        runner = Runner(log, folder / "programs")
        try:
            yield runner
        finally:
            runner.process.stdin.close()
            runner.process.wait(60)
            runner.process.stdout.close()


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory):
    """An uninterrupted run: what it ends with, and how long it takes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    found = runner.run(folder)
    return found["digest"], time.monotonic() - began


def is_saving(folder):
    return any(folder.glob("*.orbax-checkpoint-tmp"))


@exhaustive  # minutes; the quick tests end training by signals that can be heard
@pytest.mark.parametrize("count", [50])
def test_killed_at_random_moments(runner, whole, tmp_path, count):
    """Every other one is killed in the midst of a save."""
    wanted, seconds = whole
    draw = random.Random(count)
    killed = saving = 0
    while killed < count:
        folder = tmp_path / f"run{killed}"
        child = runner.start(folder)
        time.sleep(draw.uniform(0, 0.95 * seconds))
        if killed % 2:
            until = time.monotonic() + seconds
            while not is_saving(folder) and time.monotonic() < until:
                time.sleep(0.0005)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        if runner.end() == 0:  # it was faster
            Path(f"{folder}.done").unlink()
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            continue
        killed += 1
        saving += is_saving(folder)
        assert runner.run(folder)["digest"] == wanted
        assert not is_saving(folder)
    assert saving >= count // 4

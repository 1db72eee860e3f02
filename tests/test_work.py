"""The work done is never lost: errors carry it, and going on continues it to the last bit."""

import dataclasses
import errno
import io
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive, sweep

from fnn.train import FitResult, NonFiniteError, fit, sources
from fnn.train.calls import Calls
from fnn.train.result import Log

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
A = RNG.normal(size=(24, 3))
Y = A @ np.array([1.0, -2.0, 0.5])
START = {"W": jnp.zeros(3), "b": jnp.zeros(())}
ADAM = optax.adam(0.1)


def noisy(params, example, key):
    x, y = example
    return (params["W"] @ x + params["b"] + 0.1 * jax.random.normal(key) - y) ** 2


def equal(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), a, b)


def train(params=START, data=(A, Y), **options):
    if not isinstance(data, tuple):
        options.setdefault("batch_size", None)
    options = {"batch_size": 8, "key": KEY, "progress": False, "epochs": 4} | options
    return fit(noisy, params, data, ADAM, **options)


BATCHES = [(A[i : i + 8], Y[i : i + 8]) for i in range(0, 24, 8)]


def drawn(key):
    rows = np.asarray(jax.random.permutation(key, 24))
    return ((A[rows[i : i + 8]], Y[rows[i : i + 8]]) for i in range(0, 24, 8))


@pytest.fixture(scope="module")
def whole():
    return train(validation=(A, Y), validation_loss=noisy)


# ------------------------------------------------------------------------------------ going on


def test_two_and_two_epochs_are_four(whole):
    seen = []
    options = {"validation": (A, Y), "validation_loss": noisy, "epochs": 2}
    two = train(**options)
    more = train(two.state, after_epoch=lambda epoch, s, r: seen.append(epoch), **options)
    equal(more.state, whole.state)
    for name in ("loss", "grad_norm"):
        equal(np.concatenate([two.steps[name], more.steps[name]]), whole.steps[name])
        assert two.history[name] + more.history[name] == whole.history[name]
    assert (
        two.history["validation_loss"] + more.history["validation_loss"]
        == (whole.history["validation_loss"])
    )
    assert seen == [3, 4]
    # Whole, or saved and read again as numpy's arrays.
    equal(train(jax.tree.map(np.asarray, two.state), epochs=2).state, whole.state)


@exhaustive
@pytest.mark.parametrize("data", [BATCHES, drawn], ids=["list", "key"])
def test_streams_go_on_too(data):
    three = train(data=data, epochs=3)
    more = train(train(data=data, epochs=1).state, data=data, epochs=2)
    equal(more.state, three.state)


@exhaustive
def test_an_iterator_goes_on_where_it_stands():
    data = iter(BATCHES * 4)
    stop = lambda epoch, state, record: epoch == 2
    two = train(data=data, steps_per_epoch=3, after_epoch=stop)
    equal(train(two.state, data=data, steps_per_epoch=3, epochs=2).state, train(data=BATCHES).state)


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("data", "after"),
    [
        pytest.param((A, Y), 1, marks=exhaustive),
        pytest.param((A, Y), 6, marks=exhaustive),
        (drawn, 5),
    ],
    ids=["first", "whole", "key"],
)
def test_going_on_in_the_midst_of_an_epoch(monkeypatch, data, after):
    whole, call, calls = train(data=data), Calls.__call__, []

    def failing(self, *args, **kwargs):
        if len(calls) == after:
            raise Stop
        calls.append(1)
        return call(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stop) as error:
        patch.setattr(Calls, "__call__", failing)
        train(data=data, steps_per_call=1)
    part = error.value.result
    assert part.state.step == after and list(part.state.position) == [after // 3, after % 3, after]
    rest = train(part.state, data=data, epochs=4 - after // 3)
    equal(rest.state, whole.state)
    equal(np.concatenate([part.steps["loss"], rest.steps["loss"]]), whole.steps["loss"])


def test_skipped_steps_keep_their_place():
    bad = (np.full((8, 3), np.inf), Y[:8])
    data = [BATCHES[0], bad, BATCHES[2]]
    options = {"data": data, "nonfinite": "skip", "check": False}
    two = train(epochs=2, **options)
    equal(train(two.state, epochs=2, **options).state, train(**options).state)


# -------------------------------------------------------------------------- errors carry the work


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    number: int = 1


ERRORS = [Stop(), Frozen(), SystemExit(3), GeneratorExit()]


@pytest.mark.parametrize("error", sweep(ERRORS, ERRORS[1:3]), ids=lambda e: type(e).__name__)
def test_an_error_in_a_callback(error, whole):
    def after_epoch(epoch, state, record):
        if epoch == 3:
            raise error

    with pytest.raises(type(error)) as caught:
        train(after_epoch=after_epoch)
    result = caught.value.result
    assert isinstance(result, FitResult) and not result.interrupted
    assert len(result.history["loss"]) == 3
    assert "9 steps" in caught.value.__notes__[0]
    equal(train(result.state, epochs=1).state, whole.state)


def in_second_epoch(then):
    epochs = []

    def data():
        epochs.append(1)
        yield from BATCHES[:2]
        if len(epochs) == 2:
            yield from then()
        yield from BATCHES[2:]

    return lambda: data()


def raising():
    raise Stop
    yield


@pytest.mark.parametrize(
    ("then", "error"),
    [
        (raising, Stop),
        (lambda: [(A[:8, :2], Y[:8])], (TypeError, ValueError)),
        (lambda: [A[:8]], ValueError),
        (lambda: [(A[:7] * np.nan, Y[:7])], ValueError),
        (lambda: [(A[:8] * np.inf, Y[:8])], NonFiniteError),
    ],
    ids=["raises", "shape", "tree", "nan", "inf"],
)
def test_an_error_of_the_data(then, error):
    with pytest.raises(error) as caught:
        train(data=in_second_epoch(then), epochs=3)
    result = caught.value.result
    steps = int(result.state.step)
    assert steps >= 5 and len(result.history["loss"]) == 1
    assert len(result.steps["loss"]) >= steps


def test_an_error_of_the_validation(whole):
    with pytest.raises(Stop) as caught:
        train(validation=in_second_epoch(raising), validation_loss=noisy)
    result = caught.value.result
    assert result.state.step == 6 and len(result.history["validation_loss"]) == 1
    equal(train(result.state, epochs=2).params, whole.params)


def test_a_step_that_fails_after_it_took_the_state(monkeypatch, whole):
    call, calls = Calls.__call__, []

    def failing(self, *args, **kwargs):
        out = call(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError
        return out

    with monkeypatch.context() as patch, pytest.raises(MemoryError) as caught:
        patch.setattr(Calls, "__call__", failing)
        train(steps_per_call=1)
    result = caught.value.result
    assert result.state.step == 5 and len(result.steps["loss"]) == 5
    equal(train(result.state, epochs=3).state, whole.state)


def test_a_device_that_fails():
    count = []

    def host(x):
        count.append(1)
        if len(count) == 5:
            raise RuntimeError("out of order")
        return x

    def loss(params, example):
        y = jax.pure_callback(
            host, jax.ShapeDtypeStruct((), example[1].dtype), example[1], vmap_method="expand_dims"
        )
        return (params["W"] @ example[0] - y) ** 2

    with pytest.raises(Exception, match="out of order") as caught:
        fit(loss, START, BATCHES, ADAM, epochs=3, progress=False, check=False)
    result = caught.value.result
    assert isinstance(result, FitResult)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(result.state))
    assert int(result.state.step) == len(result.steps.get("loss", ()))
    assert result.state.step in (0, 3)


def test_a_fit_inside_a_fit():
    def after_epoch(epoch, state, record):
        train(epochs=1, after_epoch=lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError) as caught:
        train(epochs=2, batch_size=12, after_epoch=after_epoch)
    assert len(caught.value.result.steps["loss"]) == 2
    assert len(caught.value.inner_result.steps["loss"]) == 3


# ------------------------------------------------------------------------------------------ Ctrl-C


@pytest.mark.parametrize("where", ["data", "step", "callback", "validation", "display"])
def test_two_interrupts_within_a_millisecond(monkeypatch, where):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    call, calls = Calls.__call__, []

    def step(self, *args, **kwargs):
        out = call(self, *args, **kwargs)
        calls.append(1)
        if where == "step" and len(calls) == 4:
            twice()
        return out

    monkeypatch.setattr(Calls, "__call__", step)
    monkeypatch.setattr(sources, "AHEAD", 0)
    steps_of = Log.steps

    def steps(self):  # what builds the result is struck, too
        signal.raise_signal(signal.SIGINT)
        return steps_of(self)

    def data():
        yield from BATCHES[:2]
        if where == "data" and len(calls) > 3:
            twice()
        yield from BATCHES[2:]

    options: dict = {}
    if where == "callback":
        options["after_epoch"] = lambda epoch, *_: twice() if epoch == 2 else None
    if where == "validation":
        options["validation"] = lambda: twice() if len(calls) > 3 else iter(BATCHES)
        options["validation_loss"] = noisy
    if where == "display":
        options["progress"] = True

        class Display(io.StringIO):
            def write(self, text):
                if "epoch 2/" in text:
                    twice()
                return len(text)

        monkeypatch.setattr(sys, "stdout", Display())
    monkeypatch.setattr(Log, "steps", steps)
    result = train(data=lambda: data(), steps_per_call=1, **options)
    monkeypatch.undo()
    assert result.interrupted
    steps = {"data": 8, "step": 4}.get(where, 6)  # all batches that were read are trained on
    assert result.state.step == len(result.steps["loss"]) == steps
    assert list(result.state.position) == [steps // 3, steps % 3, steps]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---------------------------------------------------------------------------------- dead displays


class Full(io.StringIO):
    def __init__(self, error, terminal):
        super().__init__()
        self.error, self.terminal, self.writes = error, terminal, 0

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.writes += 1
        if self.writes > 1:
            raise self.error
        return len(text)


@pytest.mark.parametrize(
    ("error", "terminal"),
    [(BrokenPipeError(), False), (OSError(errno.ENOSPC, "full"), False), (BrokenPipeError(), True)],
    ids=["pipe", "full", "bar"],
)
def test_a_dead_display(monkeypatch, error, terminal, whole):
    monkeypatch.setattr(sys, "stdout", Full(error, terminal))
    with pytest.warns(RuntimeWarning, match="shows no more progress") as caught:
        result = train(progress=True)
    assert caught[0].filename == __file__
    monkeypatch.undo()
    equal(result.params, whole.params)


def test_a_stdout_that_is_closed_or_none(monkeypatch, whole):
    closed = io.StringIO()
    closed.close()
    for stdout in (closed, None):
        monkeypatch.setattr(sys, "stdout", stdout)
        if stdout is None:
            result = train(progress=True)
        else:
            with pytest.warns(RuntimeWarning, match="closed file"):
                result = train(progress=True)
        monkeypatch.undo()
        equal(result.params, whole.params)


def test_a_stdout_of_few_letters(monkeypatch):
    def loss(params, example):
        return (params["W"] @ example[0] - example[1]) ** 2, {"Größe": params["b"]}

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    fit(loss, START, (A, Y), ADAM, epochs=2, key=KEY)
    monkeypatch.undo()
    assert out.buffer.getvalue().count(b"Gr\\xf6\\xdfe 0") == 2


@exhaustive
def test_a_script_whose_reader_leaves(tmp_path):
    script = """
        import sys, jax, jax.numpy as jnp, numpy as np, optax, fnn
        X = np.ones((8, 3), np.float32)
        loss = lambda p, x: jnp.sum((p - x) ** 2)
        result = fnn.fit(loss, jnp.zeros(3), X, optax.sgd(0.1), epochs=200, key=jax.random.key(0))
        open(sys.argv[1], "w").write(str(result.state.step))
    """
    path = tmp_path / "done"
    code = f"{sys.executable} -W ignore -c '{textwrap.dedent(script)}' {path} | head -n 2"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    out = subprocess.run(code, shell=True, capture_output=True, text=True, env=environment)
    assert path.read_text() == "200", out.stderr
    assert out.stdout.count("\n") == 2

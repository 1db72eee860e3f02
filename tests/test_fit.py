"""`fit`: epochs over every kind of data, validation, Ctrl-C, what is printed, what is refused."""

import io
import itertools
import re
import signal
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweeps import exhaustive, sweep

from fnn import ops
from fnn.layers import Linear
from fnn.train import FitResult, NonFiniteError, evaluate, train_step
from fnn.train import fit as fit_with_progress
from fnn.train.calls import Calls
from fnn.train.data import batches_of
from fnn.train.progress import Bar, format_record

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
A = RNG.normal(size=(26, 3))
Y = A @ np.array([1.0, -2.0, 0.5]) + 0.3 + 0.1 * RNG.normal(size=26)
START = {"W": jnp.zeros(3), "b": jnp.zeros(())}
SGD = optax.sgd(0.1)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Python's own handler: a shell has its background jobs ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def squares(params, example):
    x, y = example
    error = params["W"] @ x + params["b"] - y
    return error**2, {"error": jnp.abs(error)}


def fit(*args, **kwargs):
    return fit_with_progress(*args, **{"progress": False, **kwargs})


def close(a, b, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-9), a, b)


def by_hand(batches, epochs, params=START):
    params, losses = jax.tree.map(np.asarray, params), []
    for x, y in batches * epochs:
        error = x @ params["W"] + params["b"] - y
        gradient = {"W": 2 * error @ x / len(x), "b": 2 * error.mean()}
        params = {name: params[name] - 0.1 * gradient[name] for name in params}
        losses.append(np.mean(error**2))
    return params, losses


def cut(size):
    return [(A[i : i + size], Y[i : i + size]) for i in range(0, len(A), size)]


# ------------------------------------------------------------------------------------ training


def test_converges_to_the_closed_form():
    result = fit(squares, START, (A, Y), SGD, epochs=300, key=KEY)
    columns = np.column_stack([A, np.ones(len(A))])
    w = np.linalg.lstsq(columns, Y, rcond=None)[0]
    close(result.params, {"W": w[:3], "b": w[3]}, rtol=1e-5)
    assert isinstance(result, FitResult) and not result.interrupted
    assert result.state.step == 300  # 26 examples are one batch
    assert not START["W"].any()


@exhaustive
def test_what_fit_returns_is_printed_within_a_screen():
    """Whatever the number of parameters, of epochs and of metrics."""

    def loss(params, example):
        metrics = {f"metric {i}": params[f"W{i}"].sum() for i in range(100)}
        return sum(metrics.values()) * example, metrics | {"vector": params["W0"][0]}

    params = {f"W{i}": jnp.ones((30, 30)) for i in range(100)}
    result = fit(loss, params, np.ones(4), SGD, epochs=3, key=KEY)
    for text in (
        repr(result),
        str(result),
        repr(result.state),
        repr(jax.eval_shape(lambda: result.state)),
    ):
        assert len(text.splitlines()) <= 5 and len(text) < 800
    assert "3 epochs, 3 steps" in repr(result) and "100 arrays, 90000 numbers" in repr(result)
    assert f"loss {result.history['loss'][-1]:.4g}" in repr(result)
    assert "step: 3)" in repr(result.state)
    none = fit(loss, params, np.ones(4), SGD, epochs=0, key=KEY)
    assert "0 epochs" in repr(none)
    jax.jit(lambda state: repr(state) and state.step)(result.state)


def test_equals_a_loop_written_by_hand_the_last_batch_being_smaller():
    result = fit(squares, START, (A, Y), SGD, epochs=3, batch_size=8, shuffle=False)
    params, losses = by_hand(cut(8), 3)
    close(result.params, params)
    close(result.steps["loss"], np.array(losses))
    sizes = np.array([8, 8, 8, 2])
    close(result.history["loss"], list(np.reshape(losses, (3, 4)) @ sizes / 26))
    assert list(result.history) == ["loss", "error", "grad_norm", "seconds"]
    assert all(len(values) == 3 for values in result.history.values())
    assert {len(values) for values in result.steps.values()} == {12}


def test_an_epoch_has_every_example_once_in_an_order_from_the_key():
    def order(key, **options):
        data = {"i": np.arange(26), "x": jnp.arange(26) * 2}
        source = batches_of("fit", data, batch_size=8, shuffle=True, epochs=1, **options)
        batches = list(source.epoch(key))
        assert [len(b["i"]) for b in batches] == [8, 8, 8, 2]
        for b in batches:
            np.testing.assert_array_equal(b["x"], 2 * b["i"])
        return np.concatenate([b["i"] for b in batches])

    first, other = order(KEY), order(jax.random.key(1))
    np.testing.assert_array_equal(np.sort(first), np.arange(26))
    np.testing.assert_array_equal(first, order(KEY))
    assert (first != other).any() and (first != np.arange(26)).any()


def test_the_same_key_gives_the_same_result():
    def run(key):
        return fit(squares, START, (A, Y), SGD, epochs=2, batch_size=8, key=key)

    first, again, other = run(KEY), run(KEY), run(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    np.testing.assert_array_equal(first.steps["loss"], again.steps["loss"])
    assert (first.steps["loss"] != other.steps["loss"]).any()
    # Each epoch is shuffled anew.
    frozen = fit(squares, START, (A, Y), optax.sgd(0.0), epochs=2, batch_size=8, key=KEY)
    epochs = frozen.steps["loss"].reshape(2, 4)
    assert (epochs[0] != epochs[1]).any()
    close(frozen.history["loss"][0], frozen.history["loss"][1])


def test_compiled_once_though_the_last_batch_is_smaller():
    traces = 0

    def loss(params, example):
        nonlocal traces
        traces += 1
        return squares(params, example)

    fit(loss, START, (A, Y), SGD, epochs=3, batch_size=13, key=KEY, check=False)
    once, traces = traces, 0
    fit(loss, START, (A, Y), SGD, epochs=3, batch_size=8, key=KEY, check=False)
    assert traces == once


def test_a_loss_with_a_key_draws_anew_at_each_step():
    def noisy(params, example, key):
        return squares(params, example)[0], {"noise": jax.random.normal(key)}

    result = fit(noisy, START, (A, Y), SGD, epochs=2, batch_size=13, key=KEY, validation=(A, Y))
    assert len(set(result.steps["noise"].tolist())) == 4
    assert abs(result.history["validation_noise"][0]) < 1
    again = fit(noisy, START, (A, Y), SGD, epochs=2, batch_size=13, key=KEY)
    np.testing.assert_array_equal(result.steps["noise"], again.steps["noise"])


def test_going_on_from_a_state():
    adam = optax.adam(0.1)
    whole = fit(squares, START, (A, Y), adam, epochs=4, shuffle=False)
    half = fit(squares, START, (A, Y), adam, epochs=2, shuffle=False)
    rest = fit(squares, half.state, (A, Y), adam, epochs=2, shuffle=False)
    close(rest.state, whole.state)
    assert not half.params["W"].is_deleted()
    nothing = fit(squares, START, (A, Y), SGD, epochs=0, shuffle=False)
    close(nothing.params, START)
    assert nothing.history == {} and nothing.steps == {}


# ---------------------------------------------------------------------------------- kinds of data


@pytest.mark.parametrize(
    "kind",
    sweep(
        ["list", "function", "function of a key", "iterable", "endless"],
        quick=["list", "function of a key"],
    ),
)
def test_batches_from_outside(kind):
    keys = []

    def with_key(key):
        keys.append(key)
        return iter(cut(8))

    class Loader:
        def __iter__(self):
            yield from cut(8)

    data = {
        "list": cut(8),
        "function": lambda: (b for b in cut(8)),
        "function of a key": with_key,
        "iterable": Loader(),
        "endless": itertools.cycle(cut(8)),
    }[kind]
    steps = 4 if kind == "endless" else None
    result = fit(squares, START, data, SGD, epochs=2, key=KEY, steps_per_epoch=steps)
    close(result.params, by_hand(cut(8), 2)[0])
    assert len(keys) == (2 if kind == "function of a key" else 0)
    assert len({str(jax.random.key_data(k)) for k in keys}) == len(keys)


def test_arrays_of_other_kinds():
    wanted, _ = by_hand([(A, Y)], 1)
    for data in [(jnp.asarray(A), Y), (A, Y.tolist())]:
        close(fit(squares, START, data, SGD, epochs=1, shuffle=False).params, wanted)

    def of_dict(params, example):
        return squares(params, (example["x"], example["y"]))

    close(fit(of_dict, START, {"x": A, "y": Y}, SGD, epochs=1, shuffle=False).params, wanted)

    def norm(params, x):
        return jnp.sum((params["W"] - x) ** 2)

    result = fit(norm, START, A, optax.sgd(0.5), epochs=1, shuffle=False)
    close(result.params["W"], A.mean(0))


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    tensors = torch.as_tensor(A), torch.as_tensor(Y)
    wanted, _ = by_hand(cut(8), 1)
    close(fit(squares, START, tensors, SGD, epochs=1, batch_size=8, shuffle=False).params, wanted)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=8)
    close(fit(squares, START, loader, SGD, epochs=1).params, wanted)


# -------------------------------------------------------------------------------------- validation


def test_validation_and_evaluate():
    held_out = (A[:10] + 1, Y[:10])
    result = fit(squares, START, (A, Y), SGD, epochs=2, batch_size=8, key=KEY, validation=held_out)
    error = held_out[0] @ result.params["W"] + result.params["b"] - held_out[1]
    assert result.history["validation_loss"][1] == pytest.approx(np.mean(error**2))
    assert result.history["validation_error"][1] == pytest.approx(np.mean(np.abs(error)))
    wanted = {"loss": float(np.mean(error**2)), "error": float(np.mean(np.abs(error)))}
    for data, size in [(held_out, None), (held_out, 3), ([held_out], None)]:
        found = evaluate(squares, result.params, data, batch_size=size)
        assert found == pytest.approx(wanted) and isinstance(found["loss"], float)
    result = fit(
        squares,
        START,
        cut(8),
        SGD,
        epochs=1,
        validation=[held_out],
        validation_loss=lambda p, e: jnp.abs(p["b"]),
    )
    assert result.history["validation_loss"] == [pytest.approx(abs(float(result.params["b"])))]


def test_metrics_that_are_arrays():
    def loss(params, example):
        return squares(params, example)[0], {"x": example[0]}

    result = fit(loss, START, (A, Y), SGD, epochs=2, batch_size=8, shuffle=False)
    close(result.history["x"][0], A.mean(0))
    assert result.steps["x"].shape == (8, 3)


def test_after_epoch_sees_each_epoch_and_stops():
    seen = []

    def after(epoch, state, record):
        seen.append((epoch, int(state.step), record["loss"]))
        return epoch == 2

    result = fit(squares, START, (A, Y), SGD, epochs=5, batch_size=13, key=KEY, after_epoch=after)
    assert [s[:2] for s in seen] == [(1, 2), (2, 4)]
    assert [s[2] for s in seen] == result.history["loss"]
    assert not result.interrupted


def test_what_after_epoch_and_metrics_may_not_be():
    options = {"epochs": 2, "batch_size": 8, "shuffle": False}
    with pytest.raises(TypeError, match="after_epoch must return whether .* of dtype .*shape"):
        fit(squares, START, (A, Y), SGD, after_epoch=lambda *_: np.ones(2), **options)
    complex_metric = lambda params, example: (squares(params, example)[0], {"phase": 1j})
    with pytest.raises(TypeError, match="metric 'phase' of dtype complex.* real"):
        fit(complex_metric, START, (A, Y), SGD, **options)


# ------------------------------------------------------------------------------------------ Ctrl-C


def test_an_interrupt_in_the_data_returns_what_was_trained(capsys):
    def data():
        yield from cut(8)[:3]
        if epochs:
            raise KeyboardInterrupt
        epochs.append(1)

    epochs = []
    result = fit(squares, START, lambda: data(), SGD, epochs=5, progress=True)
    assert result.interrupted
    close(result.params, by_hand(cut(8)[:3], 2)[0])
    assert len(result.history["loss"]) == 1 and len(result.steps["loss"]) == 6
    assert "Interrupted in epoch 2, after 6 steps" in capsys.readouterr().out


def test_a_signal_inside_a_step_waits_for_its_end(monkeypatch):
    call, calls = Calls.__call__, []

    def call_and_interrupt(self, *args, **kwargs):
        out = call(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)  # the step has run; its result has no name yet
        return out

    monkeypatch.setattr(Calls, "__call__", call_and_interrupt)
    options = {"batch_size": 8, "shuffle": False, "steps_per_call": 1}
    result = fit(squares, START, (A, Y), SGD, epochs=5, **options)
    assert result.interrupted and result.state.step == 3
    close(result.params, by_hand(cut(8)[:3], 1)[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_does_not_wait(monkeypatch):
    def hang(self, work, chunk, at):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(Calls, "__call__", hang)
    result = fit(squares, START, (A, Y), SGD, epochs=5, shuffle=False)
    assert result.interrupted and result.state.step == 0


def test_outside_the_main_thread_and_with_a_handler_of_ones_own():
    results = []
    thread = threading.Thread(
        target=lambda: results.append(fit(squares, START, (A, Y), SGD, epochs=1, shuffle=False))
    )
    thread.start()
    thread.join()
    assert results[0].state.step == 1

    def own(signum, frame):
        raise AssertionError

    before = signal.signal(signal.SIGINT, own)
    try:
        fit(squares, START, (A, Y), SGD, epochs=1, shuffle=False)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_is_set_on_the_way_stays():
    own = lambda signum, frame: None
    take = lambda *_: signal.signal(signal.SIGINT, own) and None
    fit(squares, START, (A, Y), SGD, epochs=1, shuffle=False, after_epoch=take)
    assert signal.getsignal(signal.SIGINT) is own  # the fixture puts back what was there


# ----------------------------------------------------------------------------------- what it shows


def test_plain_lines_where_there_is_no_terminal(capsys):
    fit(squares, START, (A, Y), SGD, epochs=2, key=KEY, validation=(A, Y), progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    number = r"[\d.e+-]+"
    assert re.fullmatch(
        rf"epoch 1/2  loss {number}  error {number}  grad_norm {number}  "
        rf"validation_loss {number}  validation_error {number}  {number} s",
        lines[0],
    )
    assert "\x1b" not in "".join(lines)
    fit(squares, START, (A, Y), SGD, epochs=2, key=KEY)
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "stdout", Terminal())
    fit(squares, START, (A, Y), SGD, epochs=2, batch_size=8, key=KEY, progress=True)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sys.stdout.getvalue())
    assert "epoch 2/2" in shown and "8/8" in shown and re.search(r"loss [\d.]+", shown)
    monkeypatch.setattr(sys, "stdout", Terminal())
    fit(squares, START, lambda: iter(cut(8)), SGD, epochs=2, progress=True)
    assert "2/2" in sys.stdout.getvalue()


def test_the_bar_is_drawn_ten_times_a_second_at_most(monkeypatch):
    """An epoch of a small network takes less time than that; names are no markup."""
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "stdout", Terminal())
    now = [0.0]
    monkeypatch.setattr("fnn.train.progress.time.monotonic", lambda: now[0])
    bar = Bar(100, steps=2)
    for epoch in range(1, 21):
        now[0] = 1 + 0.01 * epoch
        bar.epoch(epoch, {"loss": 0.5, "a[/b]": float(epoch)})
    bar.close()
    shown = sys.stdout.getvalue()
    drawn = [n for n in range(1, 21) if f"epoch {n}/100" in shown]
    assert drawn == [1, 11, 20] and "a[/b] 20" in shown


def test_a_terminal_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    monkeypatch.setattr(sys, "stdout", Terminal())
    fit(squares, START, (A, Y), SGD, epochs=1, key=KEY, progress=True)
    assert sys.stdout.getvalue().startswith("epoch 1/1  loss ")


def test_records_show_scalars_only():
    record = {"loss": 0.123456, "matrix": np.ones((2, 2)), "seconds": 1.26}
    assert format_record(record) == "loss 0.1235  1.3 s"


# ----------------------------------------------------------------------------------- inf, nan


def test_nonfinite_keeps_the_last_good_state():
    def data():
        yield from cut(8)[:2]
        yield (np.full((8, 3), np.inf), Y[:8])
        yield from cut(8)[:2]

    with pytest.raises(NonFiniteError, match="step 2: the loss and the gradient of") as error:
        fit(squares, START, lambda: data(), SGD, epochs=1)
    result = error.value.result
    steps = int(result.state.step)
    assert steps >= 2
    close(result.params, by_hand((cut(8)[:2] * 2)[:steps], 1)[0])

    result = fit(squares, START, lambda: data(), SGD, epochs=1, nonfinite="skip")
    close(result.params, by_hand(cut(8)[:2] * 2, 1)[0])
    assert result.history["skipped"] == [1] and np.isfinite(result.history["loss"][0])
    assert np.isnan(result.steps["loss"][2])


# ------------------------------------------------------------------------------- bad arguments


LAYER = Linear(3)
PARAMS = LAYER.init(KEY, jnp.zeros(3))


def classify(params, example):
    return ops.softmax_cross_entropy(LAYER(params, example[0]), example[1])


NAN = A.copy()
NAN[20, 1] = np.nan
LABELS = np.arange(26) % 3


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        ((A, Y), {}, ValueError, r"shuffling needs a key"),
        ((A, Y[:5]), {}, ValueError, r"data\[0\] has 26, data\[1\] has 5"),
        ((A[:0], Y[:0]), {}, ValueError, r"data is empty"),
        ((NAN, Y), {"key": KEY}, ValueError, r"data\[0\].*nan.*\(20, 1\)"),
        ((jnp.asarray(NAN), Y), {"key": KEY}, ValueError, r"data\[0\].*nan.*\(20, 1\)"),
        ((A, Y), {"batch_size": 0}, ValueError, "batch_size must be .* of at least 1, but got 0"),
        ((A, Y), {"epochs": -1}, ValueError, "epochs must be an integer of at least 0, but got -1"),
        ((A, Y), {"epochs": 1.5}, TypeError, "epochs must be an integer.*got 1.5"),
        ((A, Y), {"steps_per_epoch": 3}, ValueError, "steps_per_epoch is for iterables"),
        ([(A, Y)], {"batch_size": 3}, ValueError, r"batch_size is for arrays.*\(X, y\)"),
        ([A, Y], {}, ValueError, r"a list is an iterable of batches.*pass a tuple: \(X, y\)"),
        ([], {}, ValueError, "empty list"),
        (list, {}, ValueError, "no batches in epoch 1"),
        (
            (b for b in [(A, Y)]),
            {},
            ValueError,
            r"iterator \(generator\).*used up after the first of 2",
        ),
        (3, {}, TypeError, "must be arrays, like.*got 3"),
        ("text", {}, TypeError, "must be arrays, like.*got 'text'"),
        (
            (A, ["a"] * 26),
            {"key": KEY},
            TypeError,
            "must be an array of numbers.*strings",
        ),
        ([(A, Y[:5])], {}, ValueError, r"data\[0\]\[0\] has 26, data\[0\]\[1\] has 5"),
        ([(A, Y), (A, Y[:5])], {}, ValueError, r"batch\[0\] has 26, batch\[1\] has 5"),
        ([(NAN, Y)], {}, ValueError, r"batch\[0\].*nan"),
        ((A, Y), {"key": KEY, "validation": (NAN, Y)}, ValueError, r"validation\[0\].*nan"),
        ((A, Y), {"key": KEY, "validation": (A, Y[:3])}, ValueError, r"validation\[1\] has 3"),
    ],
)
def test_bad_data(data, options, error, message):
    with pytest.raises(error, match=message):
        fit(squares, START, data, SGD, **{"epochs": 2, **options})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([1], r"^validation\[0\] is 1 of type int, not an array"),
        ([None], r"^validation\[0\] holds no arrays"),
        ([(NAN, Y)], r"^validation's batch\[0\] .*holds nan"),
        (lambda: [(A, Y[:5])], r"^the arrays of validation's batch differ"),
        (lambda: 3, "^validation is a function, .*, which must return an iterable.*returned 3"),
        (
            lambda a, b: [(A, Y)],
            r"^validation is a function, .*\(a, b\): it is called for each epoch",
        ),
    ],
)
def test_bad_batches_of_validation(wrong, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fit(squares, START, [(A, Y)], SGD, epochs=1, validation=wrong)


def test_bad_labels_are_found_before_compiling():
    bad = LABELS.copy()
    bad[25] = 3  # in the last batch of the epoch
    for y in (bad, jnp.asarray(bad)):
        with pytest.raises(ValueError, match=r"data\[1\] holds the label 3 at index 25.*3 classes"):
            fit(classify, PARAMS, (A, y), SGD, epochs=1, batch_size=8, key=KEY)
    with pytest.raises(ValueError, match=r"validation\[1\] holds the label 3"):
        fit(classify, PARAMS, (A, LABELS), SGD, epochs=1, key=KEY, validation=(A, bad))
    with pytest.raises(NonFiniteError, match="holds the label 3"):
        fit(classify, PARAMS, (A, bad), SGD, epochs=1, key=KEY, check=False)
    with pytest.raises((TypeError, ValueError), match="softmax_cross_entropy.*labels"):
        fit(classify, PARAMS, (A, LABELS * 1.0), SGD, epochs=1, key=KEY)
    fit(classify, PARAMS, (A, LABELS), SGD, epochs=1, key=KEY)


def test_a_key_for_the_loss():
    def noisy(params, example, key):
        return squares(params, example)[0]

    with pytest.raises(TypeError, match="the loss takes a key"):
        fit(noisy, START, cut(8), SGD, epochs=1)
    with pytest.raises(TypeError, match="the loss takes a key"):
        evaluate(noisy, START, (A, Y))
    with pytest.raises(TypeError, match="the validation loss takes a key"):
        fit(squares, START, cut(8), SGD, epochs=1, validation=(A, Y), validation_loss=noisy)
    fit(squares, START, cut(8), SGD, epochs=1, key=KEY)  # a key that is only for shuffling


def test_a_state_of_another_optimiser():
    state = train_step(squares, optax.adam(0.1)).init(START)
    with pytest.raises(ValueError, match="isn't this optimiser's state"):
        fit(squares, state, (A, Y), SGD, epochs=1, key=KEY)

"""Logs of training: read back by others than wrote them, whole whatever happens."""

import csv
import errno
import json
import os
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn.bins import bins_of
from fnn.logs import CSV, JSONL, Logs, TensorBoard, Writer

KEY = jax.random.key(0)
X = np.arange(24, dtype=np.float32).reshape(8, 3) / 24
SGD = optax.sgd(0.1)


def loss(p, x):
    return jnp.sum(jnp.square(p - x)), {"error": jnp.abs(p - x)}


def train(params=None, loss=loss, **options):
    start = jnp.zeros(3) if params is None else params
    options = {"epochs": 3, "batch_size": 4, "key": KEY, "progress": False} | options
    return fnn.fit(loss, start, X, SGD, **options)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def objects_of(path):
    with open(path) as file:
        return [json.loads(line, parse_constant=pytest.fail) for line in file]


# ---------------------------------------------------------------------------------- what is in it


def test_csv(tmp_path):
    path = tmp_path / "run" / "log.csv"
    result = train(logs=[CSV(path)])
    rows = rows_of(path)
    assert list(rows[0])[:2] == ["epoch", "step"] and [row["epoch"] for row in rows] == list("123")
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    for name, values in result.history.items():
        read = [json.loads(row[name]) for row in rows]
        np.testing.assert_array_equal(read, values)  # to the last bit
    assert path.read_bytes().endswith(b"\n") and os.listdir(path.parent) == ["log.csv"]


def test_jsonl(tmp_path):
    result = train(logs=[JSONL(str(tmp_path / "log.jsonl"))])
    objects = objects_of(tmp_path / "log.jsonl")
    assert [o.pop("epoch") for o in objects] == [1, 2, 3]
    assert [o.pop("step") for o in objects] == [2, 4, 6]
    for name, values in result.history.items():
        np.testing.assert_array_equal([o.pop(name) for o in objects], values)
    assert objects == [{}] * 3


def test_inf_nan_and_names_that_need_quotes(tmp_path):
    record = {"loss": float("nan"), 'a,"b"': -np.inf, "größe": np.float32(0.1), "n": np.arange(2)}
    for writer, read in ((CSV(tmp_path / "a"), rows_of), (JSONL(tmp_path / "b"), objects_of)):
        writer.begin(1)
        writer.write(1, 5, record)
        (row,) = read(writer.path)
        assert np.isnan(float(row["loss"])) and float(row['a,"b"']) == -np.inf
        assert np.float32(row["größe"]) == np.float32(0.1)
        assert row["n"] in ("[0, 1]", [0, 1])


def test_a_name_with_another_end_of_a_line_in_it(tmp_path):
    """JSON writes U+2028 as it is; the log must be read again all the same."""
    log = JSONL(tmp_path / "log")
    for epoch in (1, 2):
        log.begin(epoch)
        log.write(epoch, 5, {"a\u2028b": 1.0})
    lines = log.path.read_text().split("\n")
    assert [json.loads(line)["epoch"] for line in lines[:-1]] == [1, 2]


def test_each_epoch_is_there_when_the_next_begins(tmp_path):
    paths, seen = [tmp_path / "a.csv", tmp_path / "b.jsonl"], []

    def data():
        seen.append([p.read_bytes().count(b"\n") if p.exists() else 0 for p in paths])
        return iter([X])

    train_on = {"data": data, "logs": [CSV(paths[0]), JSONL(paths[1])], "epochs": 3}
    fnn.fit(loss, jnp.zeros(3), optimizer=SGD, progress=False, **train_on)
    assert seen == [[1, 0], [2, 1], [3, 2]]  # the CSV's header is there from the beginning


def test_columns_that_come_later(tmp_path):
    log = CSV(tmp_path / "log.csv")
    log.begin(1)
    log.write(1, 1, {"loss": 3.0})
    log.write(2, 2, {"loss": 2.0, "validation_loss": 2.5})
    log.write(3, 3, {"validation_loss": 1.5})
    rows = rows_of(log.path)
    assert [row["loss"] for row in rows] == ["3.0", "2.0", ""]
    assert [row["validation_loss"] for row in rows] == ["", "2.5", "1.5"]


# ------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("make", [CSV, JSONL])
def test_going_on_repeats_no_epoch(tmp_path, make):
    read = rows_of if make is CSV else objects_of
    log = make(tmp_path / "log")
    state = train(epochs=2, logs=[log]).state
    saved = jax.tree.map(jnp.copy, state)
    train(state, epochs=3, logs=[log])  # 3, 4, 5; and then killed, to go on from the saved one
    result = train(saved, epochs=2, logs=[make(tmp_path / "log")])
    assert [int(row["epoch"]) for row in read(log.path)] == [1, 2, 3, 4]
    assert float(read(log.path)[-1]["loss"]) == result.history["loss"][-1]
    assert os.listdir(tmp_path) == ["log"]


@pytest.mark.parametrize("make", [CSV, JSONL])
def test_the_same_call_again_goes_on_from_its_checkpoint(tmp_path, make):
    pytest.importorskip("orbax.checkpoint")
    log, died = make(tmp_path / "log"), []

    def die_once(epoch, state, record):
        if epoch == 3 and not died:
            died.append(epoch)
            raise RuntimeError

    def call():
        kept = fnn.Checkpoints(tmp_path / "kept", every=2)
        return train(epochs=4, logs=[log], checkpoints=kept, after_epoch=die_once)

    with pytest.raises(RuntimeError):
        call()
    result = call()
    read = rows_of if make is CSV else objects_of
    assert [int(row["epoch"]) for row in read(log.path)] == [1, 2, 3, 4]
    assert [float(row["loss"]) for row in read(log.path)] == result.history["loss"]
    call()  # there is nothing left to do
    assert len(read(log.path)) == 4


@pytest.mark.parametrize("make", [CSV, JSONL])
def test_another_training_puts_the_log_aside(tmp_path, make):
    suffix = ".csv" if make is CSV else ".jsonl"
    path = tmp_path / f"log{suffix}"
    for epochs in (1, 2, 3):
        train(epochs=epochs, logs=[make(path)])
    read = rows_of if make is CSV else objects_of
    names = (f"log.1{suffix}", f"log.2{suffix}", f"log{suffix}")
    assert [len(read(tmp_path / name)) for name in names] == [1, 2, 3]
    train(epochs=0, logs=[make(path)])
    assert len(read(path)) == 3


@pytest.mark.parametrize("make", [CSV, JSONL])
def test_a_line_that_was_cut_short_is_taken_out(tmp_path, make):
    log = make(tmp_path / "log")
    result = train(epochs=2, logs=[log])
    whole = log.path.read_bytes()
    for cut in (1, 5, len(whole.splitlines()[-1])):
        log.path.write_bytes(whole[:-cut])
        train(jax.tree.map(jnp.copy, result.state), epochs=1, logs=[log])
        read = rows_of if make is CSV else objects_of
        assert [int(row["epoch"]) for row in read(log.path)] == [1, 3]


@pytest.mark.parametrize(
    ("make", "content", "message"),
    [
        (CSV, b"a,b\n1,2\n", "begins with 'a,b'"),
        (CSV, b"epoch,step\nx,2\n", "rows without an epoch"),
        (CSV, b"\xff\xfe\n", "isn't text"),
        (CSV, b"a note of one line", "has no whole line"),
        (JSONL, b'{"notes": 1}', "has no whole line"),
        (JSONL, b"epoch 1\n", "lines that aren't JSON"),
        (JSONL, b"[1]\n", "lines that aren't JSON"),
    ],
)
def test_something_else_is_not_touched(tmp_path, make, content, message):
    path = tmp_path / "log"
    path.write_bytes(content)
    state = train(epochs=1).state
    with pytest.raises(ValueError, match=message):
        train(state, logs=[make(path)])
    assert path.read_bytes() == content


@pytest.mark.parametrize("make", [CSV, JSONL])
def test_a_note_of_one_line_is_not_overwritten(tmp_path, make):
    path = tmp_path / "log"
    path.write_bytes(b"my notes")
    with pytest.raises(ValueError, match="has no whole line"):
        train(epochs=1, logs=[make(path)])
    assert path.read_bytes() == b"my notes"


@pytest.mark.parametrize("make", [CSV, JSONL])
def test_a_first_line_that_was_cut_off_is_ours(tmp_path, make):
    log = make(tmp_path / "log")
    train(epochs=1, logs=[log])
    first = log.path.read_bytes().splitlines()[0]
    for cut in (first[:-1], first[:3], b""):
        log.path.write_bytes(cut)
        train(epochs=1, logs=[log])
        read = rows_of if make is CSV else objects_of
        assert [int(row["epoch"]) for row in read(log.path)] == [1]


# ---------------------------------------------------------------------------------- what can fail


class Fails:
    """A log that fails from one epoch to another."""

    def __init__(self, first, last):
        self.first, self.last, self.epochs, self.closed = first, last, [], 0

    def __repr__(self):
        return "Fails()"

    def begin(self, first):
        self.begun = first

    def write(self, epoch, step, record):
        self.tried = getattr(self, "tried", 0) + 1
        if self.first <= self.tried <= self.last:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.epochs.append(epoch)

    def close(self):
        self.closed += 1


def test_a_failing_log_is_tried_again_and_warned_of_once():
    log, other = Fails(2, 3), Fails(0, 0)
    with pytest.warns(RuntimeWarning) as caught:
        result = train(epochs=5, logs=[log, other])
    (warning,) = caught
    assert "Fails() could not be written, training goes on" in str(warning.message)
    assert "No space left" in str(warning.message) and warning.filename == __file__
    assert log.epochs == other.epochs == [1, 2, 3, 4, 5] and log.closed == 1
    assert len(result.history["loss"]) == 5


def test_a_log_that_never_recovers():
    log = Fails(2, 99)
    with pytest.warns(RuntimeWarning) as caught:
        result = train(epochs=4, logs=[log])
    first, last = (str(w.message) for w in caught)
    assert "could not be written" in first
    assert "has no record of 3 epochs (they are in result.history)" in last
    assert len(result.history["loss"]) == 4 and log.epochs == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning that is an error ends nothing either
        assert len(train(epochs=4, logs=[Fails(2, 99)]).history["loss"]) == 4


@pytest.mark.parametrize("make", [CSV, JSONL])
def test_a_folder_that_goes_away_and_comes_back(tmp_path, make):
    folder = tmp_path / "run"
    log = make(folder / "log")

    def after_epoch(epoch, state, record):
        if epoch == 2:
            (folder / "log").unlink()
            folder.rmdir()
        if epoch == 3:
            folder.mkdir()

    with pytest.warns(RuntimeWarning, match="could not be written"):
        train(epochs=4, logs=[log], after_epoch=after_epoch)
    read = rows_of if make is CSV else objects_of
    assert [int(row["epoch"]) for row in read(log.path)] == [3, 4]


@pytest.fixture
def half_written(monkeypatch):
    """A function that fills the disk: of what is written from then on, a third is."""
    real = open

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def seek(self, *place):
            return self.file.seek(*place)

        def truncate(self, size):
            return self.file.truncate(size)

        def write(self, content):
            self.file.write(content[: len(content) // 3])
            raise OSError(errno.ENOSPC, "No space left on device")

    def fill():
        monkeypatch.setattr(
            "fnn.logs.whole_file.open", lambda *args, **kw: Half(real(*args, **kw)), raising=False
        )

    return fill


@pytest.mark.parametrize("make", [CSV, JSONL])
def test_a_full_disk(tmp_path, make, half_written, monkeypatch):
    """A line of which a part was written is taken out before the next."""
    log = make(tmp_path / "log")
    log.begin(1)
    log.write(1, 1, {"loss": 1.0})
    before = log.path.read_bytes()
    half_written()
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            log.write(2, 2, {"loss": 0.5})
        assert before < log.path.read_bytes() and len(log.path.read_bytes()) < len(before) + 20
    monkeypatch.undo()
    log.write(2, 2, {"loss": 0.5})
    log.write(3, 3, {"loss": 0.25})
    read = rows_of if make is CSV else objects_of
    assert [float(row["loss"]) for row in read(log.path)] == [1.0, 0.5, 0.25]


def test_an_error_and_an_interrupt_close_the_logs(tmp_path):
    log = Fails(0, 0)

    def stop(epoch, state, record):
        raise KeyboardInterrupt if epoch == 2 else None

    def interrupt(epoch, state, record):
        if epoch == 2:
            raise KeyboardInterrupt

    assert train(logs=[log], after_epoch=interrupt).interrupted
    assert log.epochs == [1, 2] and log.closed == 1 and log.begun == 1
    with pytest.raises(TypeError):
        train(logs=[log], after_epoch=stop)
    assert log.closed == 2
    assert isinstance(log, Writer)


def test_a_folder_that_cannot_be_made_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    calls = []
    for make in (CSV, JSONL):
        with pytest.raises((FileExistsError, NotADirectoryError)):
            train(logs=[make(tmp_path / "file" / "log")], after_epoch=lambda *_: calls.append(1))
    assert not calls


@pytest.mark.parametrize("bad", ["log.csv", CSV, 3, [3], ["log.csv"], [CSV], {"a": 1}])
def test_logs_that_are_none(bad):
    with pytest.raises(TypeError, match="fit: logs must be a list of logs"):
        train(logs=bad)


@pytest.mark.parametrize("make", [CSV, JSONL])
def test_bad_paths(tmp_path, make):
    for bad in (3, None, ""):
        with pytest.raises(TypeError, match=f"{make.__name__}: path must be that of a file"):
            make(bad)
    with pytest.raises(TypeError, match="folder must be that of the events, but got 3"):
        TensorBoard(3)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        make(tmp_path)
    assert repr(make("a/b")) == f"{make.__name__}('a/b')"


def test_only_the_first_process_writes(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = Fails(0, 0)
    logs = Logs("fit", [log])
    logs.begin(1)
    logs.write(1, 1, {})
    logs.close()
    assert not log.epochs and not log.closed


# -------------------------------------------------------------------------------- TensorBoard


def reader_of(folder):
    """TensorBoard's own."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    return event_accumulator.EventAccumulator(str(folder), {"histograms": 0, "scalars": 0}).Reload()


def scalars_of(folder):
    read = reader_of(folder)
    tags = read.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in tags}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    result = train(logs=[TensorBoard(tmp_path / "run")])
    scalars = scalars_of(tmp_path / "run")
    history = {k: v for k, v in result.history.items() if k != "error"}
    history |= {f"error/{i}": [error[i] for error in result.history["error"]] for i in range(3)}
    assert set(scalars) == set(history)
    for name, entries in scalars.items():
        assert [step for step, _ in entries] == [1, 2, 3]
        np.testing.assert_allclose([v for _, v in entries], history[name], rtol=1e-6)


def test_tensorboard_of_arrays(tmp_path):
    """Small ones number by number, large ones as histograms, whatever is in them."""
    pytest.importorskip("tensorboardX")
    large = np.random.default_rng(0).normal(size=(5, 20))
    log = TensorBoard(tmp_path)
    log.begin(1)
    log.write(1, 7, {"matrix": np.arange(6.0).reshape(2, 3), "large": large, "none": np.ones(0)})
    odd = large.copy()
    odd[0] = np.nan, *[np.inf] * 19
    log.write(2, 14, {"large": odd})
    log.write(3, 21, {"large": np.full(50, np.nan)})  # there is nothing to show
    log.write(4, 28, {"large": np.full(50, 2.5), "matrix": np.full((2, 3), np.nan)})
    close, huge = 1 + np.arange(50) % 3 * np.spacing(1.0), np.full(50, -3e17)
    log.write(5, 35, {"large": close})
    log.write(6, 42, {"large": huge})
    log.close()
    scalars = scalars_of(tmp_path)
    assert scalars["matrix/1/2"][0] == (1, 5.0) and np.isnan(scalars["matrix/1/2"][1][1])
    assert set(scalars) == {f"matrix/{i}/{j}" for i in range(2) for j in range(3)}
    read = reader_of(tmp_path)
    assert read.Tags()["histograms"] == ["large"]
    events = read.Histograms("large")
    assert [e.step for e in events] == [1, 2, 4, 5, 6]
    logged = large, large[1:], np.full(50, 2.5), close, huge
    for event, numbers in zip(events, logged, strict=True):
        found = event.histogram_value
        assert found.num == numbers.size == sum(found.bucket)
        np.testing.assert_allclose([found.min, found.max], [numbers.min(), numbers.max()])
        np.testing.assert_allclose(found.sum, numbers.sum(), rtol=1e-6)
        # Each bucket counts what lies above the limit before, up to its own.
        below = [np.sum(numbers.ravel() < limit) for limit in found.bucket_limit[1:-1]]
        np.testing.assert_array_equal(np.cumsum(found.bucket)[1:-1], below)


@pytest.mark.parametrize("numbers", [[-1.7e308, 0.0, 1.7e308], [-1e300, 1e300], [2.0, 2.0]])
def test_bins_of_any_range_hold_all(numbers):
    counts, edges = np.histogram(numbers, bins_of(np.asarray(numbers), 30))
    assert counts.sum() == len(numbers) and np.isfinite(edges).all()


def test_tensorboard_goes_on_and_begins_anew(tmp_path):
    pytest.importorskip("tensorboardX")
    log = TensorBoard(tmp_path)
    state = train(epochs=2, logs=[log]).state
    saved = jax.tree.map(jnp.copy, state)
    train(state, epochs=3, logs=[log])
    result = train(saved, epochs=2, logs=[TensorBoard(tmp_path)])
    entries = scalars_of(tmp_path)["loss"]
    assert [step for step, _ in entries] == [1, 2, 3, 4]
    np.testing.assert_allclose(entries[-1][1], result.history["loss"][-1], rtol=1e-6)
    train(epochs=1, logs=[log])
    assert [step for step, _ in scalars_of(tmp_path)["loss"]] == [1]
    assert len(os.listdir(tmp_path)) == 4


def test_tensorboard_whose_folder_goes_away(tmp_path):
    pytest.importorskip("tensorboardX")
    folder = tmp_path / "run"

    def after_epoch(epoch, state, record):
        if epoch == 2:
            for name in os.listdir(folder):
                (folder / name).unlink()
            folder.rmdir()

    train(epochs=4, logs=[TensorBoard(folder)], after_epoch=after_epoch)
    assert [step for step, _ in scalars_of(folder)["loss"]] == [3, 4]


def test_tensorboard_on_a_full_disk(tmp_path, half_written, monkeypatch):
    """An error, and not a thread that died and is waited for."""
    pytest.importorskip("tensorboardX")

    def after_epoch(epoch, state, record):
        if epoch == 1:
            half_written()
        if epoch == 3:
            monkeypatch.undo()

    with pytest.warns(RuntimeWarning, match="could not be written.*No space left"):
        train(epochs=4, logs=[TensorBoard(tmp_path)], after_epoch=after_epoch)
    assert [step for step, _ in scalars_of(tmp_path)["loss"]] == [1, 2, 3, 4]


def test_tensorboard_is_not_installed_or_no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file, and not a folder"):
        TensorBoard(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError) as error:
        TensorBoard(tmp_path)
    wanted = 'fnn.logs.TensorBoard needs tensorboardX: pip install "tensorboardX>=2.6"'
    assert str(error.value) == wanted

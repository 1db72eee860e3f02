"""What `fit` shows: in a notebook a bar that is updated, in a log file a line for each epoch."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fnn
from fnn.train.progress import Lines, Notebook, in_notebook, progress_for

X = np.ones((8, 3), np.float32)


def train(**options):
    options = {"epochs": 3, "batch_size": 4, "key": jax.random.key(0)} | options
    loss = lambda p, x: jnp.sum(jnp.square(p - x))
    return fnn.fit(loss, jnp.zeros(3), X, optax.sgd(0.1), **options)


@pytest.mark.parametrize("epochs", [1, 2, 20, 21, 100, 1234])
def test_a_line_for_every_epoch(epochs, capsys):
    lines = Lines(epochs, steps=10)
    for epoch in range(1, epochs + 1):
        lines.epoch(epoch, {"loss": 1.0})
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"epoch {n}/{epochs}  loss 1" for n in range(1, epochs + 1)]


def test_a_line_within_a_long_epoch(capsys):
    slow = Lines(1, steps=10, seconds=0.0)
    slow.step(1, 3, lambda: {"loss": 0.5})
    Lines(1, steps=None, seconds=0.0).step(1, 3, lambda: {"loss": 0.5})
    Lines(1, steps=10).step(1, 3, lambda: pytest.fail("half a minute isn't over"))
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["epoch 1/1  step 3/10  loss 0.5", "epoch 1/1  step 3  loss 0.5"]


# ------------------------------------------------------------------------------------- notebook


class ZMQInteractiveShell:
    """Stands for ipykernel's."""


class Shell(ZMQInteractiveShell):
    """Stands for Colab's."""


class TerminalInteractiveShell:
    """Stands for that of `ipython` on a terminal."""


class Handle:
    def __init__(self, outputs):
        self.outputs = outputs

    def update(self, data, raw):
        assert raw
        self.outputs.append(data)


@pytest.fixture
def ipython(monkeypatch):
    """A function that lets a shell of some class run, and returns the outputs displayed."""

    def run(shell):
        outputs: list = []

        def display(data, raw, display_id):
            assert raw and display_id
            outputs.append(data)
            return Handle(outputs)

        package = types.ModuleType("IPython")
        package.get_ipython = lambda: shell
        package.display = types.ModuleType("IPython.display")
        package.display.display = display
        monkeypatch.setitem(sys.modules, "IPython", package)
        monkeypatch.setitem(sys.modules, "IPython.display", package.display)
        return outputs

    return run


@pytest.mark.parametrize("kind", [ZMQInteractiveShell, Shell])
def test_a_notebook(ipython, capsys, kind):
    outputs = ipython(kind())
    result = train()
    assert capsys.readouterr().out == ""
    first, last = outputs[0], outputs[-1]
    assert set(first) == {"text/plain", "text/html"} and "epoch 1/3" in first["text/plain"]
    loss = f"loss {result.history['loss'][-1]:.4g}"
    for text in last.values():
        assert "epoch 3/3" in text and loss in text
    assert '<progress value="3" max="3">' in last["text/html"]


def test_where_there_is_no_notebook(ipython, capsys, monkeypatch):
    for shell in (TerminalInteractiveShell(), None):
        outputs = ipython(shell)
        assert not in_notebook()
        train(epochs=1)
        assert not outputs and capsys.readouterr().out.startswith("epoch 1/1  loss ")
    monkeypatch.setitem(sys.modules, "IPython", None)
    assert not in_notebook()


def test_the_bar_moves_within_an_epoch_and_not_too_often(ipython, monkeypatch):
    outputs = ipython(ZMQInteractiveShell())
    now = [0.0]
    monkeypatch.setattr("fnn.train.progress.time.monotonic", lambda: now[0])
    bar = Notebook(4, steps=10, first=3)
    assert '<progress value="2" max="4">' in outputs[0]["text/html"]
    for step in range(1, 6):
        now[0] += 0.1
        bar.step(3, step, lambda: {"loss": 0.5, "<b>": 1.0})
    assert len(outputs) == 1 + 2  # at 0.2 and 0.4 s
    assert '<progress value="2.4" max="4">' in outputs[-1]["text/html"]
    assert "&lt;b&gt; 1" in outputs[-1]["text/html"] and "<b> 1" in outputs[-1]["text/plain"]
    bar.epoch(3, {"loss": 0.25, "seconds": 1.0})
    bar.close()
    assert "loss 0.25" in outputs[-1]["text/plain"] and "seconds" not in outputs[-1]["text/plain"]
    assert outputs[-1]["text/plain"].startswith("epoch 3/4  0:00")


def test_a_broken_front_end_ends_the_display_alone(ipython):
    ipython(ZMQInteractiveShell())
    sys.modules["IPython.display"].display = lambda *_, **__: 1 / 0
    with pytest.warns(RuntimeWarning, match="shows no more progress: ZeroDivisionError"):
        assert len(train().history["loss"]) == 3


def test_nothing_wanted(ipython, capsys):
    outputs = ipython(ZMQInteractiveShell())
    progress_for(False, 3, None)
    train(progress=False)
    assert not outputs and not capsys.readouterr().out

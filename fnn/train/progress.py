"""What `fit` shows while it runs: a bar on a terminal or in a notebook, lines elsewhere."""

from __future__ import annotations

import contextlib
import html
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from fnn.frames import warn

Metrics = Callable[[], Mapping[str, Any]]


class Progress(Protocol):
    """A display. `metrics` is called only when there is something to show."""

    def step(self, epoch: int, step: int, metrics: Metrics) -> None:
        """A step of an epoch is on its way (both counted from 1)."""

    def epoch(self, epoch: int, record: Mapping[str, Any]) -> None:
        """An epoch is over; here is its line of the history."""

    def say(self, text: str) -> None:
        """Something to say."""

    def close(self) -> None:
        """The end, good or bad."""


def progress_for(wanted: bool, epochs: int, steps: int | None, first: int = 1) -> Progress:
    """A bar in a notebook, or if stdout is a terminal and `rich` is there; else lines.

    Args:
        wanted: whether to show anything at all.
        epochs: the number of the last epoch.
        steps: the number of steps in an epoch, if it is known.
        first: the number of the first epoch.
    """
    if not wanted or sys.stdout is None:
        return Nothing()
    return Shielded(lambda: _display(epochs, steps, first))


def _display(epochs: int, steps: int | None, first: int) -> Progress:
    if in_notebook():
        return Notebook(epochs, steps, first)
    if sys.stdout.isatty():
        # Without rich, or inside another bar of rich's, which allows but one.
        with contextlib.suppress(Exception):
            return Bar(epochs, steps, first)
    return Lines(epochs, steps)


def in_notebook() -> bool:
    """Does IPython run in the kernel of a notebook (Jupyter, VS Code, Colab)?

    Told by the class of its shell, or one that it derives from: ipykernel's.
    """
    ipython = sys.modules.get("IPython")  # who runs in it has imported it
    get = getattr(ipython, "get_ipython", None)
    shell = get() if callable(get) else None
    return any(base.__name__ == "ZMQInteractiveShell" for base in type(shell).__mro__)


class Shielded:
    """A display whose end isn't the training's: stdout may be closed, full, or a broken pipe."""

    def __init__(self, make: Callable[[], Progress]):
        self._display: Progress = Nothing()
        self._do(lambda: setattr(self, "_display", make()))

    def step(self, epoch: int, step: int, metrics: Metrics) -> None:
        self._do(lambda: self._display.step(epoch, step, metrics))

    def epoch(self, epoch: int, record: Mapping[str, Any]) -> None:
        self._do(lambda: self._display.epoch(epoch, record))

    def say(self, text: str) -> None:
        self._do(lambda: self._display.say(text))

    def close(self) -> None:
        self._do(lambda: self._display.close())

    def _do(self, show: Callable[[], None]) -> None:
        try:
            show()
        except Exception as error:  # whatever it is: nothing is shown from here on
            self._display = Nothing()
            with contextlib.suppress(Exception):  # warnings may be errors, stderr dead as well
                warn(f"fit shows no more progress: {type(error).__name__}: {error}")


class Nothing:
    """No display."""

    def step(self, epoch: int, step: int, metrics: Metrics) -> None:
        """Nothing."""

    def epoch(self, epoch: int, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """A line for each epoch, and one every half minute within a long one: for a log file."""

    def __init__(self, epochs: int, steps: int | None, *, seconds: float = 30.0):
        self._epochs = epochs
        self._steps = steps
        self._seconds = seconds
        self._last = time.monotonic()

    def step(self, epoch: int, step: int, metrics: Metrics) -> None:
        if time.monotonic() - self._last >= self._seconds:
            of = f"/{self._steps}" if self._steps else ""
            self.say(f"epoch {epoch}/{self._epochs}  step {step}{of}  {format_record(metrics())}")

    def epoch(self, epoch: int, record: Mapping[str, Any]) -> None:
        self.say(f"epoch {epoch}/{self._epochs}  {format_record(record)}")

    def say(self, text: str) -> None:
        try:
            print(text, flush=True)
        except UnicodeEncodeError:  # a terminal of few letters, a metric of many
            print(text.encode("ascii", "backslashreplace").decode(), flush=True)
        self._last = time.monotonic()

    def close(self) -> None:
        """Nothing to put in order."""


class Notebook:
    """A bar and the last numbers in a cell's output, drawn anew five times a second at most.

    One output that is updated, HTML with the same as text: no widgets, so that it shows everywhere
    and stays in the notebook's file.
    """

    def __init__(self, epochs: int, steps: int | None, first: int = 1):
        from IPython.display import display

        self._display = display
        self._epochs = epochs
        self._steps = steps
        self._record: Mapping[str, Any] = {}
        self._last = 0.0
        self._began = time.monotonic()
        self._now = (first, first - 1.0, "")
        self._handle = display(self._shown(), raw=True, display_id=True)

    def step(self, epoch: int, step: int, metrics: Metrics) -> None:
        now = time.monotonic()
        if now - self._last >= 0.2:
            self._last = now
            done = epoch - 1 + (step / self._steps if self._steps else 0)
            self._show(epoch, done, {**self._record, **metrics()})

    def epoch(self, epoch: int, record: Mapping[str, Any]) -> None:
        self._record = record
        now = time.monotonic()
        if now - self._last >= 0.2 or epoch == self._epochs:
            self._last = now
            self._show(epoch, epoch, record)
        else:
            self._now = (epoch, epoch, format_record(record, hide=("seconds",)))

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        self._handle.update(self._shown(), raw=True)

    def _show(self, epoch: int, done: float, record: Mapping[str, Any]) -> None:
        self._now = (epoch, done, format_record(record, hide=("seconds",)))
        self._handle.update(self._shown(), raw=True)

    def _shown(self) -> dict[str, str]:
        epoch, done, record = self._now
        title = f"epoch {epoch}/{self._epochs}"
        seconds = int(time.monotonic() - self._began)
        words = f"{seconds // 60}:{seconds % 60:02}  {record}"
        bar = f'<progress value="{done:g}" max="{self._epochs}"></progress>'
        return {
            "text/plain": f"{title}  {words}",
            "text/html": f"<pre>{title}  {bar}  {html.escape(words)}</pre>",
        }


class Bar:
    """rich's progress bar, drawn anew at most ten times a second.

    Raises:
        ImportError: rich isn't installed.
    """

    def __init__(self, epochs: int, steps: int | None, first: int = 1):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._epochs = epochs
        self._steps = steps
        self._record: Mapping[str, Any] = {}
        self._last = 0.0
        # Unknown steps: count epochs.
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            auto_refresh=False,
        )
        self._task = self._bar.add_task(
            f"epoch {first}/{epochs}",
            total=epochs * (steps or 1),
            completed=(first - 1) * (steps or 1),
            text="",
        )
        self._bar.start()

    def step(self, epoch: int, step: int, metrics: Metrics) -> None:
        now = time.monotonic()
        if now - self._last >= 0.1:
            self._last = now
            record = {**self._record, **metrics()}
            done = (epoch - 1) * (self._steps or 1) + (step if self._steps else 0)
            self._show(epoch, done, record)

    def epoch(self, epoch: int, record: Mapping[str, Any]) -> None:
        self._record = record
        now = time.monotonic()
        is_due = now - self._last >= 0.1 or epoch == self._epochs
        if is_due:
            self._last = now
        self._show(epoch, epoch * (self._steps or 1), record, is_due)

    def say(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._bar.stop()

    def _show(
        self, epoch: int, completed: int, record: Mapping[str, Any], is_due: bool = True
    ) -> None:
        self._bar.update(
            self._task,
            description=f"epoch {epoch}/{self._epochs}",
            completed=completed,
            text=format_record(record, hide=("seconds",)),
            refresh=is_due,
        )


def format_record(record: Mapping[str, Any], hide: tuple[str, ...] = ()) -> str:
    """`loss 0.312  accuracy 0.94`: the scalars of a record, four digits each."""
    words = []
    for name, value in record.items():
        if name in hide or getattr(value, "shape", ()) != ():
            continue
        words.append(f"{value:.1f} s" if name == "seconds" else f"{name} {value:.4g}")
    return "  ".join(words)

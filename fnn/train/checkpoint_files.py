"""A folder of checkpoints: written by orbax, each whole or not at all, and checked when read.

    runs/a/0000000480/arrays/     the numbers, by orbax
    runs/a/0000000480/about/      what they are, and how they were made: JSON, with its checksum

A checkpoint is called by the number of batches that training had seen. A second one of the same
number (an epoch's last batch, and then its end) is `0000000480.1`; the first goes when it is there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from fnn import arguments
from fnn.train.together import in_all_or_none

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAME = re.compile(r"(\d{10})(?:\.(\d+))?")
_DISCARDED = ".discarded"
_DELETED = ".deleted"
_LOCK = ".lock"


class CheckpointError(Exception):
    """A checkpoint can't be written, can't be read, or isn't one of this call.

    Attributes:
        folder: where the checkpoints are.
        step: which one it is; None if it is about the folder.
        previous: the newest whole one before it, to go on from; None if there is none.
    """

    def __init__(
        self, message: str, folder: str = "", step: int | None = None, previous: int | None = None
    ):
        super().__init__(message)
        self.folder, self.step, self.previous = folder, step, previous

    def __reduce__(self):
        return type(self), (self.args[0], self.folder, self.step, self.previous)


class Damaged(Exception):
    """What is wrong with a checkpoint, in words."""


class Files:
    """A folder of checkpoints."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._orbax = _orbax()
        self._writer: Any = None
        self._lock: Any = None
        self._written: Path | None = None  # not known to be whole yet
        self._times = [0.0, 0.0]  # when the last one was begun, and when it was whole

    # ------------------------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """The numbers of the checkpoints that are there, in order."""
        return sorted(self._paths())

    def about(self, step: int) -> dict[str, Any]:
        """What a checkpoint tells of itself.

        Raises:
            Damaged: it can't be read.
        """
        path = self._paths()[step] / "about" / "metadata"
        try:
            sealed = json.loads(path.read_text())
            text, checksum = sealed["about"], sealed["checksum"]
        except FileNotFoundError:
            raise Damaged(
                "it has no about/metadata: another program wrote it, or files are missing"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"about/metadata can't be read: {_line(error)}") from error
        if zlib.crc32(text.encode()) != checksum:
            raise Damaged("about/metadata isn't what was written: its checksum is another")
        return json.loads(text)

    def arrays(
        self, step: int, names: Sequence[str], read_in_parts: dict[str, Callable] | None = None
    ) -> dict[str, Any]:
        """A checkpoint's arrays by name.

        Args:
            step: which checkpoint.
            names: those to read whole, as numpy arrays.
            read_in_parts: for each of the others, what makes it of a function that reads a part of
                it, given slices.

        Raises:
            Damaged: they can't be read.
        """
        path = self._paths()[step] / "arrays"
        try:
            return self._read(path, names, read_in_parts or {})
        except Damaged:
            raise
        except Exception as error:  # of tensorstore, json, the file system
            raise Damaged(f"its arrays can't be read: {_line(error)}") from error

    def _read(
        self, path: Path, names: Sequence[str], read_in_parts: dict[str, Callable]
    ) -> dict[str, Any]:
        """Read by tensorstore itself: where one array is damaged, orbax abandons the reading of
        the others, which tell of that later, on stderr."""
        import tensorstore

        kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
        spec = lambda name: {"driver": "zarr", "kvstore": kvstore | {"path": f"{name}/"}}
        context = tensorstore.Context()
        begin = lambda name: tensorstore.open(spec(name), context=context, open=True)
        opened = {name: begin(name) for name in (*names, *read_in_parts)}
        reads = {name: opened[name].result().read() for name in names}
        found: dict[str, Any] = {name: read.result() for name, read in reads.items()}
        for name, make in read_in_parts.items():
            store = opened[name].result()
            found[name] = make(lambda slices, store=store: store[slices].read().result())
        return found

    # ------------------------------------------------------------------------------- writing

    @contextlib.contextmanager
    def open(self):
        """Write while entered; what is under way at its end is waited for.

        Raises:
            CheckpointError: the folder can't be written to, or another process writes to it.
        """
        log = logging.getLogger("absl")
        log.addFilter(_not_orbax)
        try:
            in_all_or_none(self._take, CheckpointError)
            in_all_or_none(self._is_there, CheckpointError)
            ocp = self._orbax
            self._writer = ocp.AsyncCheckpointer(
                ocp.CompositeCheckpointHandler(
                    arrays=ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False),
                    about=ocp.JsonCheckpointHandler(),
                ),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._note),
            )
            yield self
            self.wait()
        finally:
            writer, self._writer = self._writer, None
            if writer is not None:
                with contextlib.suppress(Exception):  # told of by `wait`
                    writer.close()
            log.removeFilter(_not_orbax)
            self._release()

    def write(self, step: int, about: dict[str, Any], arrays: dict[str, Any]) -> None:
        """Begin to write a checkpoint; the one before is waited for.

        Args:
            step: its number.
            about: what it is; goes through JSON.
            arrays: what `taken_apart` makes.

        Raises:
            CheckpointError: this one or the one before can't be written.
        """
        self.wait()
        path = self._next_path(step)
        text = json.dumps(about, sort_keys=True)
        sealed = {"checksum": zlib.crc32(text.encode()), "about": text}
        args = self._orbax.args
        self._written, self._times[0] = path, time.monotonic()
        with self._explained():
            self._writer.save(
                path,
                args=args.Composite(arrays=args.PyTreeSave(arrays), about=args.JsonSave(sealed)),
            )

    def is_cheap(self, part: float) -> bool:
        """Would writing take less than this part of the time, if it takes as long as last time?

        While one is being written: no.
        """
        began, ended = self._times
        return ended >= began and time.monotonic() - began >= (ended - began) / part

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: it can't be written.
        """
        if self._written is None:
            return
        with self._explained():
            self._writer.wait_until_finished()
        self._written = None

    def remove(self, keep: Callable[[int], bool]) -> None:
        """Delete checkpoints: those not to be kept, and of one number all but the last."""
        if jax.process_index() != 0:
            return
        kept = self._paths()
        for path in self._entries():
            step, _ = _parsed(path)
            if kept[step] != path or not keep(step):
                # In one go: a checkpoint of which half is deleted would look like a whole one.
                path = path.rename(path.with_name(path.name + _DELETED))
                shutil.rmtree(path, ignore_errors=True)

    def discard(self, step: int) -> Path:
        """Set a checkpoint aside: rename it, so that it doesn't count."""
        path = self._paths()[step]
        count = 0
        while (aside := path.with_name(f"{path.name}{_DISCARDED}{count or ''}")).exists():
            count += 1
        return path.rename(aside)

    # -------------------------------------------------------------------------------- inside

    def _note(self) -> None:
        self._times[1] = time.monotonic()

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except Exception as error:
            path, self._written = self._written, None
            self._clean()
            step, _ = _parsed(path)
            whole = self.steps()
            last = (
                f"The newest one that is there is of step {whole[-1]}."
                if whole
                else "There is none yet."
            )
            raise CheckpointError(
                f"the checkpoint of step {step} can't be written to {self.folder}: "
                f"{_line(error)}\nThose written before are as they were. {last} Make room, or "
                "whatever is needed, and call again: training goes on from there.",
                str(self.folder),
                step,
                whole[-1] if whole else None,
            ) from error

    def _take(self) -> None:
        """The folder for this process alone, until it ends, however it ends."""
        if jax.process_index() != 0:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / _LOCK, "a+")  # noqa: SIM115 (held on to)
        except OSError as error:
            raise CheckpointError(
                f"checkpoints can't be written to {self.folder}: {_line(error)}. What is there is "
                "as it was, and can be read: Checkpoints(folder).load(...).",
                str(self.folder),
            ) from error
        try:
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise CheckpointError(
                f"another run writes checkpoints to {self.folder} just now. Give each run a "
                "folder of its own.",
                str(self.folder),
            ) from None
        except OSError:  # a file system without locks
            pass
        self._clean()

    def _is_there(self) -> None:
        if jax.process_index() != 0 and not (self.folder / _LOCK).exists():
            raise CheckpointError(
                f"{self.folder} isn't the folder that process 0 opened for the checkpoints: it "
                "must be on a file system that all processes share.",
                str(self.folder),
            )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _clean(self) -> None:
        """Delete what a process that was killed has left half written, or half deleted."""
        if jax.process_index() != 0:
            return
        for path in self.folder.iterdir():
            left = path.name.endswith(_DELETED) or ".orbax-checkpoint-tmp" in path.name
            if left and _NAME.match(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _entries(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]

    def _paths(self) -> dict[int, Path]:
        """The last checkpoint of each number."""
        return {_parsed(path)[0]: path for path in sorted(self._entries(), key=_parsed)}

    def _next_path(self, step: int) -> Path:
        path = self._paths().get(step)
        if path is None:
            return self.folder / f"{step:010d}"
        return self.folder / f"{step:010d}.{_parsed(path)[1] + 1}"


def _parsed(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1]), int(found[2] or 0)


def _not_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs an error's traceback in its thread; the error itself comes to us, and is told."""
    return not (record.exc_info and "orbax" in record.pathname)


def _line(error: BaseException) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    if "No space left" in text:  # tensorstore's message is as long as its paths
        return "No space left on device"
    kind = type(error).__name__
    return f"{kind}: {text[:300]}" if text else kind


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise arguments.missing("fnn.Checkpoints", "orbax-checkpoint>=0.12") from error
    return orbax.checkpoint


def as_folder(where: str, folder: Any) -> Path:
    """The folder as an absolute path.

    Raises:
        TypeError, ValueError: it isn't a path on a file system.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"{where}: folder must be a path, but got {arguments.show(folder)}.")
    if "://" in os.fspath(folder):
        raise ValueError(
            f"{where}: folder must be on a (mounted) file system, but got {os.fspath(folder)!r}."
        )
    path = Path(folder).absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{where}: {path} is a file, and checkpoints need a folder.")
    return path

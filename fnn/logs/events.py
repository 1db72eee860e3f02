"""`TensorBoard`: a log for TensorBoard."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fnn import arguments
from fnn.bins import bins_of
from fnn.logs.whole_file import WholeFile
from fnn.logs.writer import checked_path

REQUIREMENT = "tensorboardX>=2.6"

# An array of at most so many numbers is logged number by number, a larger one as a histogram.
MOST_SCALARS = 32

# The bins of a histogram, equally wide; what TensorBoard shows has 30, too.
BINS = 30


class TensorBoard:
    """Scalars for TensorBoard, one for each quantity and epoch: `tensorboard --logdir FOLDER`.

    The step that TensorBoard shows is the epoch. A metric that is an array of up to 32 numbers is
    a scalar for each, `error/0`, `error/1`, of a matrix `error/0/1`, which TensorBoard shows
    together; a larger one is a histogram of its finite numbers, in 30 bins, or in one
    where rounding hardly tells them apart. Training that goes on from a state, or begins anew in
    the same folder, tells TensorBoard that the epochs logged before from its first on don't count:
    they are in the files, but not shown.

    Args:
        folder: where the events' files go, one for each call of `fit`; it is made if it isn't
            there.

    Raises:
        ImportError: tensorboardX isn't installed.
        TypeError, NotADirectoryError: folder isn't the path of a folder.
        OSError: (when training begins) the folder can't be made or written.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = checked_path("TensorBoard", folder, "folder must be that of the events")
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"TensorBoard: {self.folder} is a file, and not a folder.")
        try:
            from tensorboardX import record_writer, summary
            from tensorboardX.proto import event_pb2
        except ImportError as error:
            raise arguments.missing("fnn.logs.TensorBoard", REQUIREMENT) from error
        # Not its SummaryWriter, which writes in a thread: that dies of a full disk without a word,
        # and all that comes later waits for it for ever.
        self._checksum, self._summary = record_writer.masked_crc32c, summary
        self._events = event_pb2
        self._file: WholeFile | None = None

    def __repr__(self) -> str:
        return f"TensorBoard({str(self.folder)!r})"

    def begin(self, first: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names; the number tells apart those of
        # one second.
        number = sum(".tfevents." in name for name in os.listdir(self.folder))
        place = f"{int(time.time()):010}.{socket.gethostname()}.{number:05}"
        self._file = WholeFile(self.folder / f"events.out.tfevents.{place}")
        log = self._events.SessionLog(status=self._events.SessionLog.START)
        self._file.append(
            self._record(file_version="brain.Event:2") + self._record(step=first, session_log=log)
        )

    def write(self, epoch: int, step: int, record: Mapping[str, Any]) -> None:
        if self._file is None or not self._file.path.exists():
            self.begin(epoch)
        assert self._file is not None
        made = [x for name, value in record.items() for x in self._summaries(name, value)]
        self._file.append(b"".join(self._record(step=epoch, summary=x) for x in made))

    def close(self) -> None:
        """Nothing is open between two epochs."""

    def _summaries(self, name: str, value: Any) -> Iterator[Any]:
        """What is logged of a quantity."""
        value = np.asarray(value, float)
        if value.size <= MOST_SCALARS:
            for place, x in np.ndenumerate(value):
                yield self._summary.scalar("/".join([name, *map(str, place)]), float(x))
            return
        finite = value[np.isfinite(value)]
        if finite.size:
            yield self._summary.histogram(name, finite, bins_of(finite, BINS))

    def _record(self, **fields: Any) -> bytes:
        """An event as TensorFlow's record: its length and itself, each with a checksum."""
        event = self._events.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(event))
        sums = (struct.pack("<I", self._checksum(part)) for part in (length, event))
        return b"".join([length, next(sums), event, next(sums)])

"""Logs of training: a line of numbers for each epoch, in files that other programs read.

    fnn.fit(..., logs=[fnn.logs.CSV("run/log.csv"), fnn.logs.TensorBoard("run/events")])

CSV             a table, a row an epoch
JSONL           a JSON object a line, an epoch each
TensorBoard     events for TensorBoard
Writer          what a log of your own must have

Each epoch is on its way to the disk when the next begins. Training that goes on from a saved state
goes on in the same log: what was logged of later epochs, which come again, is taken out. A log that
fails while training runs (a full disk, a folder that is gone) ends nothing: there is one warning,
and what isn't written yet is tried again after each epoch, and at the end.

Each module imports only from those above it:

    writer      `Writer`, and `Logs`: several of them as `fit` uses them
    whole_file  a file to which pieces are added whole
    line_files  `CSV` and `JSONL`
    events      `TensorBoard`
"""

from fnn.logs.events import TensorBoard
from fnn.logs.line_files import CSV, JSONL
from fnn.logs.writer import Logs, Writer

__all__ = ["CSV", "JSONL", "Logs", "TensorBoard", "Writer"]

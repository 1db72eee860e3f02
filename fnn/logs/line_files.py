"""`CSV` and `JSONL`: logs that are files of lines."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from fnn.logs.whole_file import WholeFile
from fnn.logs.writer import checked_path


class _Lines:
    """A file of whole lines, an epoch each; `begins` is what the first of them begins with."""

    begins: str

    def __init__(self, path: str | os.PathLike):
        self.path = checked_path(type(self).__name__, path)
        if self.path.is_dir():
            raise IsADirectoryError(
                f"{type(self).__name__}: {self.path} is a folder, and not a file to write to."
            )
        self._file = WholeFile(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def close(self) -> None:
        """Nothing is open between two lines."""

    def _read(self) -> str:
        """The whole lines of the file, "" if there is none.

        Raises:
            ValueError: it isn't text, or is less than a line of something else.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return ""
        end, begins = content.rfind(b"\n") + 1, self.begins.encode()
        if not end and content[: len(begins)] != begins[: len(content)]:
            raise self._foreign("has no whole line, and doesn't begin as one")
        try:
            return content[:end].decode()
        except UnicodeDecodeError:
            raise self._foreign("isn't text") from None

    def _foreign(self, why: str) -> ValueError:
        return ValueError(
            f"{type(self).__name__}: {self.path} is there already and is no such log of fnn: it "
            f"{why}. Choose another path."
        )

    def _put_aside(self) -> None:
        """Give the log of another training another name: `log.1.csv`."""
        number = 1
        while (name := self.path.with_suffix(f".{number}{self.path.suffix}")).exists():
            number += 1
        self.path.rename(name)

    def _replace(self, text: str) -> None:
        self._file.replace(text.encode())

    def _append(self, text: str) -> None:
        self._file.append(text.encode())


class CSV(_Lines):
    """A table as comma-separated values: a row for each epoch, a column for each quantity.

    The first columns are `epoch` and `step` (how many batches there were in all). Numbers have all
    their digits; inf and nan are `inf` and `nan`; a metric that is an array is a JSON list. A
    quantity that comes later (another metric, after a change of the loss) gets a column of its
    own, empty in the rows before; the file is then written anew.

    Training that begins at epoch 1 where there is a log already puts that aside, as `log.1.csv`;
    training that goes on from a state goes on in it.

    Args:
        path: the file; its folder is made if it isn't there.

    Raises:
        TypeError, IsADirectoryError: path isn't that of a file.
        ValueError: (when training begins) the file is something else.
        OSError: (when training begins) the folder or the file can't be made.
    """

    begins = "epoch,step"

    def begin(self, first: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = list(csv.reader(io.StringIO(self._read())))
        self._columns = rows[0] if rows else ["epoch", "step"]
        if self._columns[:2] != ["epoch", "step"]:
            raise self._foreign(f"begins with {','.join(self._columns)[:60]!r}")
        if first == 1 and len(rows) > 1:
            self._put_aside()
            rows, self._columns = [], ["epoch", "step"]
        try:
            kept = [row for row in rows[1:] if int(row[0]) < first]
        except (ValueError, IndexError):
            raise self._foreign("has rows without an epoch") from None
        self._replace(_as_csv([self._columns, *kept]))

    def write(self, epoch: int, step: int, record: Mapping[str, Any]) -> None:
        new = [name for name in record if name not in self._columns]
        if new or not self.path.exists():
            rows = list(csv.reader(io.StringIO(self._read())))[1:]
            columns = [*self._columns, *new]
            self._replace(
                _as_csv([columns, *[row + [""] * (len(columns) - len(row)) for row in rows]])
            )
            self._columns = columns
        values = {"epoch": epoch, "step": step} | {k: _cell(v) for k, v in record.items()}
        self._append(_as_csv([[values.get(name, "") for name in self._columns]]))


class JSONL(_Lines):
    """JSON lines: an object for each epoch, `{"epoch": 1, "step": 12, "loss": 0.31, ...}`.

    A metric that is an array is a list. JSON has no inf and nan: they are the strings "inf",
    "-inf" and "nan", which Python's `float` reads. For the rest see `CSV`.

    Args:
        path: the file; its folder is made if it isn't there.

    Raises:
        TypeError, IsADirectoryError: path isn't that of a file.
        ValueError: (when training begins) the file is something else.
        OSError: (when training begins) the folder or the file can't be made.
    """

    begins = '{"epoch": '

    def begin(self, first: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = list(io.StringIO(self._read()))  # `splitlines` knows more ends of a line than JSON
        try:
            epochs = [int(json.loads(line)["epoch"]) for line in lines]
        except (ValueError, TypeError, KeyError):
            raise self._foreign("has lines that aren't JSON objects with an epoch") from None
        if first == 1 and lines:
            self._put_aside()
            lines, epochs = [], []
        kept = [line for line, epoch in zip(lines, epochs, strict=True) if epoch < first]
        self._replace("".join(kept))

    def write(self, epoch: int, step: int, record: Mapping[str, Any]) -> None:
        values = {"epoch": epoch, "step": step} | {k: _plain(v) for k, v in record.items()}
        self._append(json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n")


def _as_csv(rows: list[list]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    plain = _plain(value)
    return json.dumps(plain) if isinstance(plain, list) else plain


def _plain(value: Any) -> Any:
    """A number, a string in the place of inf and nan, or nested lists of them."""
    if isinstance(value, (str, bool)) or value is None:
        return value
    array = np.asarray(value)
    if array.ndim:
        return [_plain(v) for v in array]
    x = array[()].item()
    return str(x) if isinstance(x, complex) or not math.isfinite(x) else x

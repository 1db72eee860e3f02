"""A file that is whole after every write, also after one that failed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class WholeFile:
    """A file to which pieces are added whole. What a failure left of one is cut off later.

    It is open only while it is written, and what is written has left Python's buffers.
    """

    def __init__(self, path: Path):
        self.path = path
        self._size = 0  # up to where the file is whole, if the last piece isn't
        self._is_whole = True

    def append(self, content: bytes) -> None:
        # Unbuffered: an error comes from here, and not from closing the file.
        with open(self.path, "ab", buffering=0) as file:
            if not self._is_whole:
                file.truncate(min(self._size, file.seek(0, os.SEEK_END)))
            self._size, self._is_whole = file.seek(0, os.SEEK_END), False
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            self._is_whole = True

    def replace(self, content: bytes) -> None:
        """Give the file another content: the old or the new is there, whatever happens."""
        part = self.path.with_name(f"{self.path.name}.part")
        try:
            part.write_bytes(content)
            os.replace(part, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        self._is_whole = True

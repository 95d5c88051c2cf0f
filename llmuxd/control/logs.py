"""Reading an engine's log from near its end, and following it as it grows, across restarts of the engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 65536
POLL_SECS = 0.2


async def read_log(path: Path, lines: int, follow: bool) -> AsyncGenerator[bytes, None]:
    """The last `lines` lines of a log; then, if it is followed, all that is added.

    The reading is done in threads: a log may be long, and the loop has requests to relay. A file that is not there
    is empty. Raises OSError if it cannot be read.
    """
    log = _Log(path)
    await asyncio.to_thread(log.begin, lines)
    while True:
        chunk = await asyncio.to_thread(log.more)
        if chunk:
            yield chunk
        if len(chunk) == CHUNK_BYTES:
            continue
        if not follow:
            return
        await asyncio.sleep(POLL_SECS)


class _Log:
    """A place in a log file, which may not be there yet, be truncated, or be replaced by another one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._position = 0

    def begin(self, lines: int) -> None:
        file = self._open()
        if file is not None:
            with file:
                self._position = start_of_last(file, lines)

    def more(self) -> bytes:
        """What comes next, at most a chunk."""
        file = self._open()
        if file is None:
            return b""
        with file:
            if file.seek(0, 2) < self._position:
                self._position = 0
            file.seek(self._position)
            chunk = file.read(CHUNK_BYTES)
            self._position += len(chunk)
            return chunk

    def _open(self) -> BinaryIO | None:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return None
        found = os.fstat(file.fileno())
        identity = (found.st_dev, found.st_ino)
        if self._file not in (None, identity):
            self._position = 0
        self._file = identity
        return file


def start_of_last(file: BinaryIO, lines: int) -> int:
    """The offset at which the last `lines` lines of a file begin, read backwards in chunks."""
    at = file.seek(0, 2)
    wanted = lines
    first = True
    while at > 0 and lines > 0:
        begin = max(0, at - CHUNK_BYTES)
        file.seek(begin)
        chunk = file.read(at - begin)
        # The newline that ends the last line begins no other.
        end = len(chunk) - 1 if first and chunk.endswith(b"\n") else len(chunk)
        first = False
        while (newline := chunk.rfind(b"\n", 0, end)) >= 0:
            wanted -= 1
            if wanted == 0:
                return begin + newline + 1
            end = newline
        at = begin
    return at

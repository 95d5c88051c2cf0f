"""The end of an engine's log file. Following a log as it grows is the control plane's."""

from __future__ import annotations

import os
from pathlib import Path

_CHUNK = 64 * 1024
_MAX_BYTES = 4 * 1024 * 1024


def tail_lines(path: Path, n: int, start: int = 0) -> list[str]:
    """The last `n` lines of a file, without line ends, read from its end backwards.

    Nothing before byte offset `start` is looked at, nor more than 4 MiB. A file that is not there has no lines;
    other errors of reading raise OSError.
    """
    if n <= 0:
        return []
    try:
        with open(path, "rb") as file:
            position = end = file.seek(0, os.SEEK_END)
            # A file shorter than `start` was truncated since: all of it is new.
            floor = max(start if start <= end else 0, end - _MAX_BYTES)
            data = b""
            while position > floor and data.count(b"\n") <= n:
                size = min(_CHUNK, position - floor)
                position -= size
                file.seek(position)
                data = file.read(size) + data
    except FileNotFoundError:
        return []
    lines = data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [line.decode("utf-8", "replace").rstrip("\r") for line in lines[-n:]]

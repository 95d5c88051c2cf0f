"""Where the daemon's own log goes: to standard error, or to the journal with fields.

A record that is about a model or a switch has `MODEL` and `SWITCH_ID` among its extras: `journalctl MODEL=qwen` finds
it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmuxd.proxy.access import Call, Writer

STDERR = 2
FORMAT = "%(asctime)s %(levelname)s %(message)s"


def set_up(level: str, environ: Mapping[str, str] = os.environ) -> None:
    """Log from now on, what is of this level or above."""
    journal = _journal_handler(environ)
    if journal is None:
        logging.basicConfig(level=level.upper(), format=FORMAT)
    else:
        logging.basicConfig(level=level.upper(), handlers=[journal], format="%(message)s")


def _journal_handler(environ: Mapping[str, str], descriptor: int = STDERR) -> logging.Handler | None:
    journal = _journal(environ, descriptor)
    if journal is None:
        return None
    handler: logging.Handler = journal.JournalHandler(SYSLOG_IDENTIFIER="llmuxd")
    return handler


def _journal(environ: Mapping[str, str], descriptor: int) -> Any:
    """The module that writes to it, if standard error is the journal and python3-systemd is there; else None."""
    if not is_journal(environ.get("JOURNAL_STREAM", ""), descriptor):
        return None
    try:
        from systemd import journal
    except ImportError:
        return None
    return journal


def access_writer(environ: Mapping[str, str] = os.environ, descriptor: int = STDERR) -> Writer:
    """What writes the access log where the rest of the log goes: lines, many at once, or entries of the journal."""
    if (journal := _journal(environ, descriptor)) is not None:

        def to_journal(calls: Sequence[Call]) -> None:
            for call in calls:
                journal.send(call.line(), SYSLOG_IDENTIFIER="llmuxd", PRIORITY="6", **call.journal_fields())

        return to_journal

    def to_descriptor(calls: Sequence[Call]) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = memoryview("".join(f"{now} {call.line()}\n" for call in calls).encode())
        while lines:
            lines = lines[os.write(descriptor, lines) :]

    return to_descriptor


def is_journal(stream: str, descriptor: int = STDERR) -> bool:
    """Whether the descriptor is the stream that systemd names (DEVICE:INODE, see systemd.exec(5))."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return stream == f"{found.st_dev}:{found.st_ino}"


def about(model: str | None = None, switch: int | None = None) -> dict[str, object]:
    """The extras of a record."""
    fields = {"MODEL": model, "SWITCH_ID": switch}
    return {name: value for name, value in fields.items() if value is not None}

"""Where the daemon's own log goes: to standard error, or to the journal with fields.

A record that is about a model or a switch has `MODEL` and `SWITCH_ID` among its extras: `journalctl MODEL=qwen` finds
it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

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
    """If standard error is the journal, and python3-systemd is there."""
    if not is_journal(environ.get("JOURNAL_STREAM", ""), descriptor):
        return None
    try:
        from systemd.journal import JournalHandler
    except ImportError:
        return None
    handler: logging.Handler = JournalHandler(SYSLOG_IDENTIFIER="llmuxd")
    return handler


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

"""`llmuxctl top`: the status on a screen of its own, refreshed until q or Ctrl-C."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from llmuxctl.client import Client, Failed
from llmuxctl.output import clean, console, first_line, fitting_table, headlines, model_row


def watch(client: Client, interval: float) -> None:
    """Show the status until somebody has seen enough. A daemon that is gone is waited for."""
    screen = console()
    try:
        with _keys() as keys, Live(console=screen, screen=True, auto_refresh=False) as live:
            while True:
                live.update(_look(client, screen.width), refresh=True)
                if _asked_to_end(keys, interval):
                    return
    except KeyboardInterrupt:
        return


def _look(client: Client, width: int) -> RenderableType:
    try:
        return picture(client.get("status"), width)
    except Failed as failed:
        first = clean(failed.message.splitlines()[0])
        return Group(Text(first, style="red"), Text("Trying again. q ends this.", style="dim"))


def picture(status: dict[str, Any], width: int) -> RenderableType:
    """What is on the screen: the headlines, the models, their errors."""
    parts: list[RenderableType] = [Text(line) for line in headlines(status)]
    rows = [model_row(name, model) for name, model in status["models"].items()]
    table = fitting_table(rows, width)
    parts.append(Text(""))
    # Too narrow even for that: the states, which is what one looks for.
    parts += [table] if table is not None else [Text(f"{row[0]}: {row[1]}") for row in rows]
    for name, model in status["models"].items():
        error = first_line(model["last_error"])
        if error:
            parts.append(Text.assemble("last error of ", (clean(name), "bold"), ": ", (error, "red")))
    parts.append(Text(f"\n{time.strftime('%H:%M:%S')}  q ends this", style="dim"))
    return Group(*parts)


@contextmanager
def _keys() -> Iterator[int | None]:
    """The terminal as one that gives each key at once; None if there is no keyboard."""
    if not sys.stdin.isatty():
        yield None
        return
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    try:
        tty.setcbreak(handle)
        yield handle
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)


def _asked_to_end(keys: int | None, seconds: float) -> bool:
    """Wait for so long, or until q is pressed."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if keys is None:
            time.sleep(left)
        elif select.select([keys], [], [], left)[0] and os.read(keys, 1) in (b"q", b"Q", b""):
            return True
    return False

"""`llmuxctl events` and `llmuxctl top`: lines as things happen, and a screen that q or Ctrl-C ends."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from llmuxctl.output import event_line
from llmuxctl.top import picture
from tests.unit.ctl_daemon import STATUS, Daemon, daemon, run

DEADLINE_SECS = 20.0
EVENTS = [
    {"event": "engine", "model": "qwen", "text": "qwen: awake"},
    {"event": "switched", "id": 7, "text": "switch 7 \x1b[31mis done"},
    {"event": "odd", "model": "a"},
]


@pytest.fixture(name="served")
def _served() -> Iterator[Daemon]:
    with daemon() as served:
        served.answers["GET events"] = (200, EVENTS)
        yield served


def test_events_are_lines(served: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = run(capsys, monkeypatch, served.socket, "events", "-n", "3")
    assert (said.code, said.err) == (0, "")
    assert [line[8:] for line in said.out.splitlines()] == [
        "  qwen: awake",
        "  switch 7 \\x1b[31mis done",
        "  event=odd model=a",
    ]
    said = run(capsys, monkeypatch, served.socket, "events", "-f", "--json", "-n", "2")
    assert [json.loads(line) for line in said.out.splitlines()] == EVENTS[:2]


def test_a_daemon_that_ends_ends_the_events(
    served: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run(capsys, monkeypatch, served.socket, "events")
    assert (said.code, len(said.out.splitlines())) == (1, 3)
    assert "broke off" in said.err


def test_an_event_has_the_time_of_day() -> None:
    now = time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1))
    assert event_line(EVENTS[0], now) == "03:04:05  qwen: awake"


def _shown(status: dict[str, Any], width: int) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(picture(status, width))
        return console.export_text()


@pytest.mark.parametrize("width", [30, 80, 200])
def test_the_picture_has_every_model_and_error(width: int) -> None:
    failed = {**STATUS["models"]["qwen"], "engine": "failed", "last_error": "out of\x07 memory\nmore"}
    shown = _shown({**STATUS, "models": {**STATUS["models"], "phi": failed}}, width)
    for word in ("qwen", "mistral", "a:b c", "phi", "awake", "not_started", "failed"):
        assert word in shown
    assert "out of\\x07" in shown
    assert "\x07" not in shown


def test_top_needs_a_terminal(
    served: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run(capsys, monkeypatch, served.socket, "top")
    assert (said.code, "needs a terminal" in said.err) == (2, True)


class Top:
    """`llmuxctl top` on a terminal. It is gone at the end of the block."""

    def __init__(self, served: Daemon) -> None:
        self.terminal, its = pty.openpty()
        self.written = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmuxctl", "--socket", str(served.socket), "top", "-i", "0.1"],
            stdin=its,
            stdout=its,
            stderr=its,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"},
            start_new_session=True,
        )
        os.close(its)

    def __enter__(self) -> Top:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)

    def until(self, word: bytes) -> None:
        deadline = time.monotonic() + DEADLINE_SECS
        while word not in self.written:
            assert time.monotonic() < deadline, self.written
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.written += os.read(self.terminal, 65536)

    def end(self) -> int:
        """Read on, so that it can write its last, until it is gone."""
        deadline = time.monotonic() + DEADLINE_SECS
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self.terminal], [], [], 0.02)[0]:
                try:
                    self.written += os.read(self.terminal, 65536)
                except OSError:
                    break
        return self.process.wait(DEADLINE_SECS)


def test_top_refreshes_and_q_ends_it(served: Daemon) -> None:
    with Top(served) as top:
        top.until(b"mistral")
        served.answers["GET status"] = (200, {**STATUS, "state": "switching"})
        top.until(b"switching")
        served.answers["GET status"] = (500, {"error": "it is stuck"})
        top.until(b"it is stuck")
        served.answers["GET status"] = (200, {**STATUS, "state": "back"})
        top.until(b": back")
        os.write(top.terminal, b"xq")
        assert top.end() == 0
        assert b"Traceback" not in top.written


def test_ctrl_c_ends_top_and_leaves_the_terminal_as_it_was(served: Daemon) -> None:
    with Top(served) as top:
        top.until(b"mistral")
        top.process.send_signal(signal.SIGINT)
        assert top.end() == 0
        assert b"Traceback" not in top.written
        top.until(b"\x1b[?1049l")

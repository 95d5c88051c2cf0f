"""A daemon in name only: answers on a Unix socket what a test gave it, for tests of what `llmuxctl` makes of it."""

from __future__ import annotations

import contextlib
import json
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from llmuxctl.cli import main
from llmuxd.version import __version__

STATUS: dict[str, Any] = {
    "version": __version__,
    "state": "idle",
    "mode": "auto",
    "pinned": None,
    "policy": "tenure",
    "health": {"ok": True, "reason": "ok"},
    "active": ["qwen"],
    "queued": 0,
    "in_flight": 0,
    "uptime_secs": 60.0,
    "switch": None,
    "models": {
        name: {
            "engine": engine,
            "in_flight": 0,
            "queued": 0,
            "eviction": "offload+keep_running",
            "asleep_by": None,
            "pid": None,
            "since": 0.0,
            "last_error": None,
            "retry_in_secs": None,
            "aliases": aliases,
        }
        for name, engine, aliases in (
            ("qwen", "awake", ["gpt-4o"]),
            ("mistral", "asleep", []),
            ("a:b c", "not_started", []),
        )
    },
    "devices": [],
}

Answer = tuple[int, Any]
"""A status, and an object; or a list of objects, which are sent as lines."""


class Daemon:
    """Answers by `METHOD path`, without the prefix. `asked` is what came, `bodies` what came with it."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.answers: dict[str, Answer] = {"GET status": (200, STATUS)}
        self.asked: list[str] = []
        self.bodies: list[Any] = []


@contextlib.contextmanager
def daemon() -> Iterator[Daemon]:
    """One that is serving. In a short folder, since a socket's path may have no more than 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="llmux-d-") as folder:
        served = Daemon(Path(folder) / "control.sock")
        with socketserver.ThreadingUnixStreamServer(str(served.socket), _handler(served)) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield served
            finally:
                server.shutdown()
                thread.join()


def _handler(served: Daemon) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            call = f"{self.command} {self.path.removeprefix('/control/')}"
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            served.asked.append(call)
            served.bodies.append(json.loads(body or b"null"))
            status, body = served.answers.get(call, (404, {"error": "no such call"}))
            lines = body if isinstance(body, list) else [body]
            self.send_response(status)
            self.send_header("x-llmux-version", __version__)
            self.end_headers()
            self.wfile.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))

        do_GET = do_POST = _answer

        def address_string(self) -> str:
            return "unix"

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


class Said:
    """What a command printed, and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"{self.code}\n{self.out}\n{self.err}"


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, socket: Path | str, *arguments: str
) -> Said:
    """Run `llmuxctl` in this process."""
    monkeypatch.setattr("sys.argv", ["llmuxctl", "--socket", str(socket), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return Said(code or 0, said.out, said.err)

"""A real `llmuxd` process over simulated engines, which are real processes too.

Everything lives under one folder; every process is ended by its pid, and that none is left is asserted.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from llmuxd.sim.ledger import GIB, Ledger
from tests.ports import free_port

DEADLINE_SECS = 20.0
DEVICE = 24 * GIB

AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Executes its arguments with a listening socket, whose number comes first, as descriptor 3: what systemd does."""


def until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE_SECS) -> Any:
    """Poll until `condition` gives something true; fails with `what` if it does not in time."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"not in {deadline:g} s: {what}")


@dataclass
class Answer:
    """An HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        """The text of a completion."""
        return str(self.json["choices"][0]["text"])


@dataclass
class Daemon:
    """One llmuxd and its folder."""

    home: Path
    models: dict[str, dict[str, Any]]
    top: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] = field(init=False)
    port: int = 0

    def __post_init__(self) -> None:
        self.ledger = Ledger.create(self.home / "device", DEVICE)
        self.socket = self.home / "run" / "control.sock"
        self.log = self.home / "llmuxd.log"
        (self.home / "faults").mkdir()

    def fault(self, model: str, text: str) -> None:
        """Set the faults of a model's engine, now and for its next starts."""
        # At once: an engine that reads a file while it is written finds nothing in it, and goes on.
        new = self.home / "faults" / f"{model}.new"
        new.write_text(text)
        new.replace(new.with_suffix(""))

    def config(self) -> dict[str, Any]:
        models = {}
        for name, extra in self.models.items():
            env = {
                "LLMUX_SIM_SCALE": "0",
                "LLMUX_SIM_LEDGER": str(self.home / "device"),
                "LLMUX_SIM_FAULT_FILE": str(self.home / "faults" / name),
                "LLMUX_SIM_ORPHAN_SECS": "30",
                **extra.get("env", {}),
            }
            models[name] = {"model_path": f"sim/{name}", **extra, "env": env}
        return {
            "port": self.port,
            "metrics_port": 0,
            "vllm_command": [sys.executable, "-m", "llmuxd.sim.vllm"],
            "stop_timeout_secs": 5,
            "shutdown_timeout_secs": 5,
            **self.top,
            "policy": {"min_active_secs": 0, "request_timeout_secs": 30, **self.policy},
            "models": models,
        }

    @property
    def config_file(self) -> Path:
        return self.home / "config.json"

    def write_config(self) -> None:
        """What the fields say, where the daemon reads it."""
        self.config_file.write_text(json.dumps(self.config()))

    @property
    def _env(self) -> dict[str, str]:
        folders = {"LLMUX_RUNTIME_DIR": str(self.home / "run"), "LLMUX_STATE_DIR": str(self.home / "state")}
        return {**os.environ, **folders}

    def start(self, wait: bool = True, held: socket.socket | None = None) -> Daemon:
        """Start it on a free port, or on a socket that listens already, and wait until it serves."""
        self.port = free_port() if held is None else held.getsockname()[1]
        self.write_config()
        argv = [sys.executable, "-m", "llmuxd", "--config", str(self.config_file), "--log-level", "debug"]
        if held is not None:
            argv = [sys.executable, "-c", AS_SYSTEMD, str(held.fileno()), *argv]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=() if held is None else (held.fileno(),),
            )
        if wait:
            until(self.serves, "llmuxd serves")
        return self

    def llmuxd(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Another llmuxd with the same folders, to its end."""
        argv = [sys.executable, "-m", "llmuxd", *words]
        return subprocess.run(argv, env=self._env, capture_output=True, text=True, timeout=DEADLINE_SECS * 2)

    def serves(self) -> bool:
        """Whether it answers that all is well; it has not ended."""
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return self.get("/health").status == 200
        return False

    # Clients

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_SECS * 2)
        try:
            payload = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, payload, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def ask(self, model: str, prompt: str = "hello", tokens: int = 3, **more: Any) -> Answer:
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, **more}
        return self.request("POST", "/v1/completions", body)

    def stream(self, model: str, tokens: int) -> Stream:
        return Stream(self.port, {"model": model, "prompt": "x", "max_tokens": tokens, "stream": True})

    # Operators

    def ctl(self, *words: str, timeout: float = DEADLINE_SECS * 2) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "llmuxctl", "--socket", str(self.socket), *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=timeout)

    def status(self) -> dict[str, Any]:
        done = self.ctl("--json", "status")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def model(self, name: str) -> dict[str, Any]:
        return self.status()["models"][name]

    def engine_metric(self, model: str, name: str) -> float:
        """A figure of the engine itself, asked for past the daemon."""
        path = self.model(model)["endpoint"].removeprefix("unix:")
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(path)
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    # Processes

    def tree(self) -> list[psutil.Process]:
        """The daemon's descendants."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine_pids(self, model: str) -> tuple[int, int]:
        """The API server, its EngineCore."""
        server = psutil.Process(self.model(model)["pid"])
        return server.pid, server.children()[0].pid

    def kill(self) -> None:
        """SIGKILL to the daemon alone."""
        self.process.kill()
        self.process.wait(DEADLINE_SECS)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_SECS)

    def sweep(self) -> list[str]:
        """End what is left of it; what that was. Engines are found by the folder that their environment names."""
        left = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.home) in " ".join(process.cmdline()) or self._holds(process.pid):
                    left.append(" ".join(process.cmdline()))
                    process.kill()
        return left

    def _holds(self, pid: int) -> bool:
        return pid in self.ledger.held()


class Stream:
    """A stream of completions being read."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_SECS)
        self._connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        self._answer = self._connection.getresponse()
        self.status = self._answer.status

    def events(self) -> Iterator[Any]:
        """Each event, as JSON or as `[DONE]`."""
        for line in self._answer:
            if line.startswith(b"data: "):
                text = line[6:].strip()
                yield "[DONE]" if text == b"[DONE]" else json.loads(text)

    def close(self) -> None:
        """Leave, in the middle of it."""
        self._answer.close()
        self._connection.close()


class Caller(threading.Thread):
    """One request in the background."""

    def __init__(self, call: Callable[[], Answer]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.answer = self._call()
        except BaseException as error:
            self.error = error

    def result(self) -> Answer:
        self.join(DEADLINE_SECS * 2)
        assert self.error is None, self.error
        assert self.answer is not None, "still waiting"
        return self.answer

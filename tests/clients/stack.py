"""A daemon over simulated engines, and the clients that its users have, as their packages make them.

Nothing of a client is changed or replaced: it is given an address and a key, and what it makes of the answers is
what a user gets. What reached an engine is read from the engine itself.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import openai

from llmuxd.sim.development import IN_MODE
from tests.integration.stack import Daemon, until

MODELS = ("cedar", "birch")
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": SCHEMA}}]

TIMEOUT_SECS = 30.0

OWN_CALLS = frozenset({"/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/is_paused", "/collective_rpc"})
"""Development endpoints that the daemon itself asks."""


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Stack(Daemon):
    """One daemon with two models, of which one is awake at a time."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**self._options(options, f"{self.address}/v1"))

    def async_openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._options(options, f"{self.address}/v1"))

    def anthropic(self, **options: Any) -> anthropic.Anthropic:
        return anthropic.Anthropic(**self._options(options, self.address))

    def async_anthropic(self, **options: Any) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(**self._options(options, self.address))

    @staticmethod
    def _options(options: dict[str, Any], base_url: str) -> dict[str, Any]:
        return {"base_url": base_url, "api_key": "none", "max_retries": 0, "timeout": TIMEOUT_SECS, **options}

    # Operators

    def status(self) -> dict[str, Any]:
        """What `llmuxctl --json status` prints, without the time that a process takes."""
        found: dict[str, Any] = self._control("GET", "/control/status")
        return found

    def pin(self, model: str) -> None:
        assert self.ctl("pin", model).returncode == 0

    def unpin(self) -> None:
        """Every model on demand again."""
        assert self.ctl("mode", "auto").returncode == 0

    def _control(self, method: str, path: str) -> Any:
        connection = _Unix(str(self.socket))
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            return json.loads(answer.read())
        finally:
            connection.close()

    # Engines

    def engine(self, model: str) -> dict[str, float]:
        """All figures of a model's engine that runs, by their names with the labels."""
        endpoint = self.model(model)["endpoint"]
        connection = _Unix(endpoint.removeprefix("unix:"))
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        finally:
            connection.close()
        pairs = (line.rsplit(" ", 1) for line in text.splitlines())
        return {name: float(value) for name, value in pairs}

    def asked(self, model: str, path: str) -> float:
        """How often a path was asked of the engine."""
        return self.engine(model)[f'llmux_sim_requests_total{{path="{path}"}}']

    def running(self, model: str) -> float:
        """Requests that are in the engine."""
        found = self.engine(model)
        return found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"]

    def intruded(self) -> list[str]:
        """Development endpoints that anything has reached in an engine that runs."""
        found = []
        for model in self.models:
            if self.model(model)["pid"] is None:
                continue
            figures = self.engine(model)
            for _, path in IN_MODE:
                if path not in OWN_CALLS and figures[f'llmux_sim_development_calls_total{{path="{path}"}}']:
                    found.append(f"{model}: {path}")
        return found

    def idle(self) -> bool:
        found = self.status()
        return not (found["queued"] or found["in_flight"])

    def recover(self) -> None:
        """As it was: no faults, nothing in flight, every model served."""
        for model in self.models:
            self.fault(model, "")
        until(self.idle, "no request is left")
        if self.status()["mode"] != "auto":
            self.unpin()
        for model in self.models:
            until(lambda model=model: self.ask(model).status == 200, f"{model} is served")


@contextmanager
def running(home: Path, top: dict[str, Any] | None = None, models: dict[str, Any] | None = None) -> Iterator[Stack]:
    """A stack that serves, and is gone afterwards with all that it started."""
    home.mkdir(parents=True, exist_ok=True)
    env = {"VLLM_ENABLE_RESPONSES_API_STORE": "1", "LLMUX_SIM_LINGER_SECS": "1"}
    configured: dict[str, dict[str, Any]] = {name: {"env": env} for name in MODELS}
    for name, more in (models or {}).items():
        configured[name] |= {**more, "env": {**env, **more.get("env", {})}}
    stack = Stack(home, configured, top or {})
    try:
        yield stack.start()
        assert stack.stop() == 0
    finally:
        if hasattr(stack, "process") and stack.process.poll() is None:
            stack.kill()
        left = stack.sweep()
    assert left == [], "processes were left behind"

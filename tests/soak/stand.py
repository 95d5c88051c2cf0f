"""The daemon under the soak: one real llmuxd over simulated engines, what can be asked of it, and what it uses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from llmuxd.sim.ledger import GIB, Ledger
from tests.ports import free_port
from tests.soak.keys import KEYS
from tests.soak.menu import Served

DEVICE = 24 * GIB
START_SECS = 30.0
STOP_SECS = 60.0
CONTROL_SECS = 60.0
"""An operator's word is answered within this."""

REQUEST_TIMEOUT_SECS = 20.0
MAX_BODY_BYTES = 9 * 2**20
SLOWEST_SECS = 10
"""For a head and for a body. A client that means to send it, on a machine that stands still now and then, is faster."""
ENGINE = "llmuxd.sim.vllm"
CREDENTIALS = "llmux_sim_credentials_total"

MODELS: dict[str, dict[str, Any]] = {
    "amber": {"aliases": ["amber-lora"]},
    "birch": {"eviction": "discard+keep_running"},
    "cedar": {"max_in_flight": 6, "max_queue": 10, "eviction": "offload+stop"},
    "delta": {"with_port": True},
}

_SAMPLE = re.compile(r"^(?P<name>[a-z_]+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$")
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Usage:
    """What the daemon has at a moment."""

    fds: int
    threads: int
    rss_mib: float


Samples = dict[str, list[tuple[dict[str, str], float]]]
"""Name of a metric -> its samples: labels and value."""


class Stand:
    """One llmuxd and its folder. Control and metrics are asked within one event loop."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port, self.metrics_port = free_port(), free_port()
        self.log = home / "llmuxd.log"
        self.changes: dict[str, Any] = {}
        """Keys of the config that differ from how it began, as `a.b`."""
        self.ledger = Ledger.create(home / "device", DEVICE)
        self._ports = {name: free_port() for name, model in MODELS.items() if "with_port" in model}
        self._config = home / "config.json"
        self._process: subprocess.Popen[bytes] | None = None
        self._control: aiohttp.ClientSession | None = None
        self._metrics: aiohttp.ClientSession | None = None

    @property
    def served(self) -> tuple[Served, ...]:
        """The models, as clients know them."""
        return tuple(Served(name, tuple(m.get("aliases", ()))) for name, m in MODELS.items())

    # The config

    def config(self) -> dict[str, Any]:
        """As it began, with the changes."""
        found = {
            "port": self.port,
            "metrics_port": self.metrics_port,
            "vllm_command": [sys.executable, "-m", ENGINE],
            "max_body_bytes": MAX_BODY_BYTES,
            "head_timeout_secs": SLOWEST_SECS,
            "body_timeout_secs": SLOWEST_SECS,
            "heartbeat_secs": 1,
            "start_timeout_secs": 20,
            "sleep_timeout_secs": 10,
            "wake_timeout_secs": 10,
            "stop_timeout_secs": 5,
            "shutdown_timeout_secs": 5,
            "policy": {"min_active_secs": 0, "request_timeout_secs": REQUEST_TIMEOUT_SECS},
            "models": {name: self._model(name) for name in MODELS},
            "keys": [key.config() for key in KEYS],
        }
        for path, value in self.changes.items():
            table: dict[str, Any] = found
            *tables, key = path.split(".")
            for one in tables:
                table = table[one]
            table[key] = value
        return found

    def _model(self, name: str) -> dict[str, Any]:
        more = {key: value for key, value in MODELS[name].items() if key != "with_port"}
        if name in self._ports:
            more["port"] = self._ports[name]
        env = {
            "LLMUX_SIM_SCALE": "0.05",
            "LLMUX_SIM_START_SECS": "4",
            "LLMUX_SIM_TOKENS_PER_S": "16",
            "LLMUX_SIM_ORPHAN_SECS": "60",
            "VLLM_ENABLE_RESPONSES_API_STORE": "1",
            "LLMUX_SIM_LEDGER": str(self.home / "device"),
        }
        return {"model_path": f"sim/{name}", "env": env, **more}

    def write_config(self, text: str | None = None) -> None:
        """What the daemon reads next; other `text` for what it cannot read."""
        self._config.write_text(json.dumps(self.config()) if text is None else text)

    # Its life

    async def start(self) -> None:
        """Start it, and wait until it serves."""
        self._spawn()
        timeout = aiohttp.ClientTimeout(total=CONTROL_SECS)
        connector = aiohttp.UnixConnector(str(self.home / "run" / "control.sock"), limit=0)
        self._control = aiohttp.ClientSession("http://localhost", connector=connector, timeout=timeout)
        self._metrics = aiohttp.ClientSession(f"http://127.0.0.1:{self.metrics_port}", timeout=timeout)
        deadline = asyncio.get_running_loop().time() + START_SECS
        while True:
            if self.code() is not None:
                raise RuntimeError(f"llmuxd ended:\n{self.log.read_text()}")
            with contextlib.suppress(OSError, aiohttp.ClientError):
                await self.metrics()
                return
            if asyncio.get_running_loop().time() > deadline:
                raise RuntimeError(f"llmuxd does not serve after {START_SECS:g} s:\n{self.log.read_text()}")
            await asyncio.sleep(0.05)

    def _spawn(self) -> None:
        self.write_config()
        folders = {"LLMUX_RUNTIME_DIR": str(self.home / "run"), "LLMUX_STATE_DIR": str(self.home / "state")}
        argv = [sys.executable, "-m", "llmuxd", "--config", str(self._config)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                argv, env={**os.environ, **folders}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def stop(self) -> int | None:
        """SIGTERM, and the exit code; None if it does not end."""
        await self.close()
        if self.code() is None:
            self.signal(signal.SIGTERM)
        assert self._process is not None
        try:
            return await asyncio.to_thread(self._process.wait, STOP_SECS)
        except subprocess.TimeoutExpired:
            return None

    async def close(self) -> None:
        """Ask it nothing more."""
        for session in (self._control, self._metrics):
            if session is not None:
                await session.close()

    def sweep(self) -> list[str]:
        """End what is left of it, and say what that was."""
        left = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if self.owns(process) and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(f"process {process.pid}: {' '.join(process.cmdline())[:120]}")
                    process.kill()
        left += [f"socket {path.relative_to(self.home)}" for path in self.home.rglob("*") if path.is_socket()]
        return left

    def owns(self, process: psutil.Process) -> bool:
        """Whether it is of this stand: all its processes have the folder in their environment. Raises psutil.Error."""
        return any(value.startswith(f"{self.home}/") for value in process.environ().values())

    def engines(self) -> list[psutil.Process]:
        """Every process of an engine, whether the daemon knows of it or not."""
        assert self._process is not None
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.pid != self._process.pid and self.owns(process):
                    found.append(process)
        return found

    # What can be asked

    async def status(self) -> dict[str, Any]:
        assert self._control is not None
        async with self._control.get("/control/status") as answer:
            found: dict[str, Any] = await answer.json()
            return found

    async def steer(self, call: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """An operator's word, and what came of it."""
        assert self._control is not None
        async with self._control.post(f"/control/{call}", json=body) as answer:
            return answer.status, await answer.json()

    async def metrics(self) -> Samples:
        assert self._metrics is not None
        async with self._metrics.get("/metrics") as answer:
            text = await answer.text()
        found: Samples = defaultdict(list)
        for line in text.splitlines():
            match = _SAMPLE.match(line)
            if match is not None:
                found[match["name"]].append((dict(_LABEL.findall(match["labels"] or "")), float(match["value"])))
        return found

    async def credentials_seen(self, endpoint: str) -> float:
        """How many requests with a key an engine has seen, as it says itself."""
        if endpoint.startswith("unix:"):
            reader, writer = await asyncio.open_unix_connection(endpoint.removeprefix("unix:"))
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(endpoint.rpartition(":")[2]))
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(CREDENTIALS))

    def usage(self) -> Usage:
        """Read where the kernel says it."""
        assert self._process is not None
        proc = Path(f"/proc/{self._process.pid}")
        fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
        rss = int(fields["VmRSS"].split()[0]) / 1024
        return Usage(len(list((proc / "fd").iterdir())), int(fields["Threads"]), rss)

    def descriptors(self) -> str:
        """What its descriptors are, for who wants to know why there are more of them."""
        assert self._process is not None
        found: Counter[str] = Counter()
        for link in Path(f"/proc/{self._process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found[str(link.readlink()).partition(":[")[0]] += 1
        return ", ".join(f"{count} {what}" for what, count in found.most_common())


def total(samples: Samples, name: str) -> float:
    """Over all labels."""
    return sum(value for _, value in samples.get(name, ()))


def by_status(samples: Samples) -> dict[int, float]:
    """Requests that were counted, by their status."""
    found: dict[int, float] = defaultdict(float)
    for labels, value in samples.get("llmux_requests_total", ()):
        found[int(labels["status"])] += value
    return dict(found)

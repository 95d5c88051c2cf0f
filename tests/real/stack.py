"""A real llmuxd over real vLLM engines, as a user has them: started from the command line, driven from outside.

Which test wants what of it is in the tests; here is how it is started, asked, watched and ended.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import openai
import psutil

from tests.ports import free_port

START_SECS = 400.0
"""Until the daemon serves, several engines warmed one after the other on a slow machine included."""

STOP_SECS = 90.0
ANSWER_SECS = 240.0
"""Until an answer is complete, a cold start on a slow machine included."""

EXTRA_ARGS = [
    "--enforce-eager",
    # In bfloat16, on a CPU with AMX, a short first request to a tiny model kills vLLM's worker (SIGILL).
    "--dtype=float32",
    "--max-model-len=2048",
    "--max-num-seqs=4",
    # Less to profile: a start takes two thirds of the time.
    "--max-num-batched-tokens=512",
    "--enable-auto-tool-choice",
    "--tool-call-parser=hermes",
]
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_RESPONSES_API_STORE": "1",
}

GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
"""Options of a request: the same answer every time, exactly as long as was asked for."""

T = TypeVar("T")

_SHOWN_LINES = 60


def until(look: Callable[[], T], seconds: float, what: str) -> T:
    """The first true value that `look` gives; fails the test if there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        if found := look():
            return found
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=ANSWER_SECS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _call(
    connection: http.client.HTTPConnection, method: str, target: str, body: Any, headers: Mapping[str, str]
) -> tuple[int, bytes]:
    with closing(connection):
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, target, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read()


class Engine:
    """One engine, asked directly on its own socket, past llmuxd."""

    def __init__(self, endpoint: str) -> None:
        assert endpoint.startswith("unix:"), endpoint
        self.socket = Path(endpoint[len("unix:") :])

    def call(self, method: str, target: str, body: Any = None) -> tuple[int, bytes]:
        return _call(_UnixConnection(self.socket), method, target, body, {})

    def json(self, method: str, target: str, body: Any = None) -> Any:
        status, answer = self.call(method, target, body)
        assert status == 200, (target, status, answer)
        return json.loads(answer)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name that have these labels."""
        status, text = self.call("GET", "/metrics")
        assert status == 200
        return metric(text.decode(), name, **labels)


def metric(text: str, name: str, **labels: str) -> float:
    """From Prometheus' text format: the sum of the samples of that name that have these labels."""
    found = []
    for line in text.splitlines():
        sample = re.fullmatch(re.escape(name) + r"(?:\{(.*)\})? (\S+)", line)
        if sample and all(f'{key}="{value}"' in (sample[1] or "") for key, value in labels.items()):
            found.append(float(sample[2]))
    assert found, f"no {name} {labels}"
    return sum(found)


class Stack:
    """`llmuxd --config FILE` with its files in `folder`. Ended, whatever happens, by `kill`."""

    made: ClassVar[list[Stack]] = []
    """All that there were in this run, for a report of what they did."""

    def __init__(
        self,
        folder: Path,
        vllm: Path,
        models: Mapping[str, Path],
        warmup: bool,
        policy: Mapping[str, Any] | None = None,
    ) -> None:
        self.port = free_port()
        self.metrics_port = free_port()
        self.runtime_dir = folder / "run"
        self.state_dir = folder / "state"
        self.temp_dir = folder / "tmp"
        self.temp_dir.mkdir(parents=True)
        self.log = folder / "llmuxd.log"
        self.control_socket = self.runtime_dir / "control.sock"
        self._config = folder / "llmux.toml"
        self._policy = {"policy_type": "fifo", "min_active_secs": 0, **(policy or {})}
        self._config.write_text(self._toml(vllm, models, warmup))
        self._folder = folder
        self._daemon: subprocess.Popen[bytes] | None = None
        self.at_opening: dict[str, Any] = {}
        """The status when the port answered for the first time."""
        self.made.append(self)

    def _toml(self, vllm: Path, models: Mapping[str, Path], warmup: bool) -> str:
        lines = [
            f"port = {self.port}",
            f"metrics_port = {self.metrics_port}",
            f"vllm_command = {json.dumps([str(vllm)])}",
            f"warmup = {json.dumps(warmup)}",
            "[policy]",
            *(f"{key} = {json.dumps(value)}" for key, value in self._policy.items()),
        ]
        for name, path in models.items():
            lines += [
                f"[models.{name}]",
                f"model_path = {json.dumps(str(path))}",
                f"extra_args = {json.dumps(EXTRA_ARGS)}",
                f"env = {{ {', '.join(f'{key} = {json.dumps(value)}' for key, value in ENV.items())} }}",
            ]
        return "\n".join(lines) + "\n"

    # The daemon

    def start(self) -> None:
        """Start the daemon; returns when the control socket answers. Use `wait_for_port` to wait for the API."""
        environ = {
            **os.environ,
            "LLMUX_RUNTIME_DIR": str(self.runtime_dir),
            "LLMUX_STATE_DIR": str(self.state_dir),
            "TMPDIR": str(self.temp_dir),
        }
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(
                [sys.executable, "-m", "llmuxd", "--config", str(self._config)],
                cwd=self._folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(lambda: self._alive() and self._answers(self.status), 20, "the control socket answers")

    def wait_for_port(self) -> None:
        """Wait until the API is served."""
        until(lambda: self._alive() and self.serves(), START_SECS, "the port answers")
        self.at_opening = self.status()

    def serves(self) -> bool:
        """Whether the port answers that all is well."""
        return self._answers(lambda: self.call("GET", "/health")[0] == 200)

    @staticmethod
    def _answers(ask: Callable[[], Any]) -> bool:
        try:
            return bool(ask())
        except (ConnectionError, FileNotFoundError):
            return False

    def _alive(self) -> bool:
        assert self._daemon is not None
        assert self._daemon.poll() is None, self.log.read_text()
        return True

    @property
    def running(self) -> bool:
        return self._daemon is not None and self._daemon.poll() is None

    def terminate(self) -> None:
        """Ask the daemon to stop."""
        assert self._daemon is not None
        self._daemon.terminate()

    def send(self, number: signal.Signals) -> None:
        """Send the daemon, and no engine, a signal."""
        assert self._daemon is not None
        self._daemon.send_signal(number)

    def wait(self, seconds: float = STOP_SECS) -> int:
        """The exit code of the daemon that was asked to stop."""
        assert self._daemon is not None
        return self._daemon.wait(seconds)

    def kill(self) -> None:
        """End everything of this stack that is still there."""
        if self.running:
            self.terminate()
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                pass
        for process in self.processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass
        if self._daemon is not None:
            self._daemon.wait(STOP_SECS)
        until(lambda: not self.processes(), STOP_SECS, "every process of the stack is gone")

    def said_since(self, when: float) -> str:
        """The last lines of the daemon's log, if there are new ones since that time, in seconds since the epoch."""
        if not self.log.exists() or self.log.stat().st_mtime < when:
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:])

    # Its clients

    def client(self, **options: Any) -> openai.OpenAI:
        """Without retries of its own: what the proxy answers is what the test sees."""
        base_url = f"http://127.0.0.1:{self.port}/v1"
        return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=ANSWER_SECS, **options)

    def call(
        self, method: str, target: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """A request to the port with its target spelled exactly so."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECS)
        return _call(connection, method, target, body, headers or {})

    def metric(self, name: str, **labels: str) -> float:
        connection = http.client.HTTPConnection("127.0.0.1", self.metrics_port, timeout=10)
        status, text = _call(connection, "GET", "/metrics", None, {})
        assert status == 200
        return metric(text.decode(), name, **labels)

    def status(self) -> dict[str, Any]:
        """What `llmuxctl --json status` prints, without the time that a process takes."""
        status, answer = _call(_UnixConnection(self.control_socket), "GET", "/control/status", None, {})
        assert status == 200, answer
        found: dict[str, Any] = json.loads(answer)
        return found

    def ctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `llmuxctl`."""
        command = [sys.executable, "-m", "llmuxctl", "--socket", str(self.control_socket), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECS)
        assert done.returncode == 0 or not check, (arguments, done)
        return done

    def model(self, name: str) -> dict[str, Any]:
        """A model's part of `llmuxctl --json status`."""
        found: dict[str, Any] = json.loads(self.ctl("--json", "status").stdout)["models"][name]
        return found

    def engine(self, name: str) -> Engine:
        return Engine(self.model(name)["endpoint"])

    # Its processes and files

    def processes(self) -> list[psutil.Process]:
        """All that descend from the daemon, itself included, orphans too: they have its working folder.

        Their environment would not tell: vLLM writes its titles over it. Zombies are gone.
        """
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self._folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def tree(self, name: str) -> EngineTree:
        """The processes of a model's running engine."""
        leader = psutil.Process(self.model(name)["pid"])
        return EngineTree(leader, [leader, *leader.children(recursive=True)])

    def folders(self) -> list[Path]:
        """Sockets and ZMQ folders of engines that are there now."""
        return sorted((self.runtime_dir / "engines").glob("*"))


class EngineTree:
    """The processes of one engine, and the shared memory that they use, as they are when this is made."""

    def __init__(self, leader: psutil.Process, processes: list[psutil.Process]) -> None:
        self.leader = leader
        self.processes = processes
        self._shared_memory = {inode for process in processes for inode in _shared_memory(process)}

    def named(self, title: str) -> psutil.Process:
        """The one process that shows this name."""
        (found,) = [process for process in self.processes if process.name() == title]
        return found

    def left(self) -> list[Any]:
        """What of it is still there."""
        processes = [p for p in self.processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        return processes + [entry.path for entry in os.scandir("/dev/shm") if entry.inode() in self._shared_memory]


def _shared_memory(process: psutil.Process) -> set[int]:
    """The inodes of the files in /dev/shm that it has mapped. A semaphore is mapped under a name that it lost."""
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    return {int(line.split()[4]) for line in maps.splitlines() if " /dev/shm/" in line}


@contextmanager
def stack(folder: Path, vllm: Path, models: Mapping[str, Path], warmup: bool = False) -> Iterator[Stack]:
    """A stack that has been started, and is gone afterwards."""
    made = Stack(folder, vllm, models, warmup)
    try:
        made.start()
        yield made
    finally:
        made.kill()


def complete(client: openai.OpenAI, model: str, prompt: str = "Once upon a time", tokens: int = 16) -> str:
    """The text that the model goes on with, through llmuxd."""
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=tokens, **GREEDY)
    assert answer.model == model
    assert answer.choices[0].finish_reason == "length"
    return answer.choices[0].text

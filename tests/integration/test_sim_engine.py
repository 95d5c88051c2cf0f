"""The simulated engine as a process of its own, asked as llmuxd and its clients ask."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmuxd.sim.ledger import GIB, Ledger
from tests.integration.stack import Caller, until


class _Unix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(self._path))


class Sim:
    """One simulated engine on a Unix socket."""

    def __init__(self, folder: Path, name: str, env: dict[str, str], args: tuple[str, ...] = ()) -> None:
        self.uds = folder / f"{name}.sock"
        self.log = folder / f"{name}.log"
        self.faults = folder / f"{name}.faults"
        argv = [sys.executable, "-m", "llmuxd.sim.vllm", "serve", f"sim/{name}", "--served-model-name", name]
        base = {"LLMUX_SIM_SCALE": "0", "VLLM_SERVER_DEV_MODE": "1", "LLMUX_SIM_FAULT_FILE": str(self.faults)}
        base |= {"LLMUX_SIM_ORPHAN_SECS": "30", "LLMUX_SIM_LINGER_SECS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*argv, "--uds", str(self.uds), *args], env={**os.environ, **base, **env}, stdout=log, stderr=log
            )
        self.pids = [self.process.pid]

    def ready(self) -> Sim:
        until(self._answers, "the engine is ready")
        self.pids += [child.pid for child in psutil.Process(self.process.pid).children()]
        return self

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return self.call("GET", "/health")[0] == 200
        return False

    def call(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> tuple[int, Any]:
        connection = _Unix(self.uds)
        try:
            payload = json.dumps(body) if isinstance(body, dict) else body
            connection.request(method, path, payload, {"Content-Type": content_type})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        with contextlib.suppress(ValueError):
            return answer.status, json.loads(text)
        return answer.status, text.decode()

    def ask(self, tokens: int = 5, **more: Any) -> Any:
        return self.call("POST", "/v1/completions", {"prompt": "x", "max_tokens": tokens, **more})[1]

    def say(self, tokens: int = 5) -> Any:
        return self.ask(tokens)["choices"][0]["text"]

    def stream(self, tokens: int) -> tuple[_Unix, Iterator[dict[str, Any]]]:
        connection = _Unix(self.uds)
        body = {"prompt": "x", "max_tokens": tokens, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        lines = (line[6:] for line in answer if line.startswith(b"data: ") and b"[DONE]" not in line)
        return connection, (json.loads(line) for line in lines)

    def metric(self, name: str) -> float:
        text = self.call("GET", "/metrics")[1]
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def end(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def sim(tmp_path: Path) -> Iterator[Callable[..., Sim]]:
    made: list[Sim] = []

    def make(name: str = "m", *args: str, **env: str) -> Sim:
        made.append(Sim(tmp_path, name, {f"LLMUX_SIM_{k.upper()}": v for k, v in env.items()}, args))
        return made[-1]

    yield make
    for engine in made:
        engine.end()


SLOW = {"scale": "0.01", "start_secs": "0", "load_gib_s": "1000", "tokens_per_s": "1"}


def test_it_is_one_version_and_lists_its_models(sim):
    engine = sim("m", "--lora-modules", "rank=/loras/rank").ready()
    assert engine.call("GET", "/version") == (200, {"version": "0.32.0"})
    base, lora = engine.call("GET", "/v1/models")[1]["data"]
    assert (base["id"], base["root"], base["parent"]) == ("m", "sim/m", None)
    assert (lora["id"], lora["root"], lora["parent"]) == ("rank", "/loras/rank", "m")
    assert "/sleep" in engine.call("GET", "/openapi.json")[1]["paths"]
    text = engine.say(tokens=6)
    assert text.split()[0] == "m"
    assert len(text.split()) == 6


def test_streams_say_the_same_as_whole_answers(sim):
    engine = sim().ready()
    _, events = engine.stream(tokens=9)
    got = list(events)
    assert "".join(e["choices"][0]["text"] for e in got) == engine.ask(tokens=9)["choices"][0]["text"]
    assert got[-1]["choices"][0]["finish_reason"] == "length"


def test_development_endpoints_need_their_mode(sim, tmp_path):
    engine = Sim(tmp_path, "n", {"VLLM_SERVER_DEV_MODE": "0"}).ready()
    try:
        assert engine.call("POST", "/sleep?level=1")[0] == 404
        assert engine.call("GET", "/is_sleeping")[0] == 404
    finally:
        engine.end()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_request_to_a_sleeping_engine_hangs_until_it_wakes(sim, level):
    engine = sim().ready()
    before = engine.say()
    assert engine.call("POST", f"/sleep?level={level}&mode=wait")[1] == {"status": "sleeping", "level": level}
    assert engine.call("GET", "/is_sleeping")[1] == {"is_sleeping": True}
    assert engine.call("GET", "/health")[0] == 200
    waiting = Caller(lambda: engine.say())
    until(lambda: engine.metric("vllm:num_requests_waiting") == 1, "it hangs")
    if level == 2:
        assert engine.call("POST", "/wake_up?tags=weights")[1]["status"] == "sleeping"
        assert engine.call("POST", "/collective_rpc", {"method": "reload_weights"})[0] == 200
        assert engine.metric("vllm:num_requests_waiting") == 1, "a partial wake stays paused"
        assert engine.call("POST", "/wake_up?tags=kv_cache")[1]["status"] == "awake"
    else:
        assert engine.call("POST", "/wake_up")[1]["status"] == "awake"
    assert waiting.result() == before


def test_weights_that_were_not_read_again_answer_garbage(sim):
    engine = sim().ready()
    engine.call("POST", "/sleep?level=2&mode=wait")
    engine.call("POST", "/wake_up")
    assert "\ufffd" in engine.ask()["choices"][0]["text"]


def test_sleep_takes_its_parameters_from_the_query_alone(sim):
    engine = sim().ready()
    engine.call("POST", "/sleep", {"level": 2, "mode": "keep"})
    assert engine.metric('vllm:engine_sleep_state{sleep_state="weights_offloaded"}') == 1


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_what_a_sleep_does_with_requests_in_flight(sim, mode):
    engine = sim(**SLOW).ready()
    connection, events = engine.stream(tokens=40)
    got = [next(events)]
    assert engine.call("POST", f"/sleep?level=1&mode={mode}")[0] == 200
    if mode == "keep":
        assert engine.metric("vllm:num_requests_running") == 1
        engine.call("POST", "/wake_up")
    got += events
    connection.close()
    assert got[-1]["choices"][0]["finish_reason"] == ("abort" if mode == "abort" else "length")
    assert (len(got) == 41) == (mode != "abort")


@pytest.mark.parametrize("parked", [False, True])
def test_a_client_that_leaves_is_aborted(sim, parked):
    engine = sim(**SLOW).ready()
    connection, events = engine.stream(tokens=10_000)
    next(events)
    if parked:
        engine.call("POST", "/sleep?level=1&mode=keep")
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    until(lambda: engine.metric("vllm:num_requests_running") == 0, "aborted")
    assert engine.metric("vllm:request_aborted_total") == 1


class TestDevice:
    def test_what_does_not_fit_does_not_start_and_does_not_wake(self, sim, tmp_path):
        ledger = Ledger.create(tmp_path / "device", 24 * GIB)
        device = {"ledger": str(tmp_path / "device")}
        first = sim("a", **device).ready()
        assert ledger.held() == {first.pids[1]: int(0.9 * 24 * GIB)}
        second = sim("b", **device)
        assert second.process.wait(20) == 1
        assert "Free memory on device (2.40/24.00 GiB) on startup is less than desired" in second.log.read_text()
        first.call("POST", "/sleep?level=1&mode=wait")
        assert ledger.held() == {first.pids[1]: GIB // 2}
        second.uds.unlink()
        third = sim("b", **device).ready()
        status, error = first.call("POST", "/wake_up")
        assert status == 500
        assert "CUDA Error: out of memory" in error["error"]["message"]
        assert first.call("GET", "/is_sleeping")[1] == {"is_sleeping": True}
        third.call("POST", "/sleep?level=2&mode=wait")
        assert first.call("POST", "/wake_up")[0] == 200
        assert ledger.peak() <= 24 * GIB

    def test_an_orphan_holds_its_memory(self, sim, tmp_path):
        ledger = Ledger.create(tmp_path / "device", 24 * GIB)
        engine = sim("a", ledger=str(tmp_path / "device")).ready()
        engine.process.kill()
        engine.process.wait()
        assert ledger.held().keys() == {engine.pids[1]}
        os.kill(engine.pids[1], signal.SIGKILL)
        until(lambda: ledger.held() == {}, "given back")


class TestDying:
    def test_without_its_core_it_is_unhealthy_and_ends(self, sim):
        engine = sim().ready()
        os.kill(engine.pids[1], signal.SIGKILL)
        until(lambda: engine.call("GET", "/health")[0] == 503, "unhealthy")
        assert engine.call("POST", "/v1/completions", {"prompt": "x"})[0] == 500
        assert engine.process.wait(20) == 0

    def test_sigterm_ends_all_but_the_sockets_file(self, sim):
        engine = sim().ready()
        engine.process.terminate()
        assert engine.process.wait(20) == 0
        assert engine.uds.is_socket()
        until(lambda: not psutil.pid_exists(engine.pids[1]), "EngineCore is gone")
        again = sim()
        assert again.process.wait(20) == 1
        assert "Address already in use" in again.log.read_text()


@pytest.mark.parametrize(
    ("fault", "path", "status", "said"),
    [
        ("refuse_sleep*1", "/sleep?level=1", 500, "Memory usage increased"),
        ("fail_wake*1", "/wake_up", 500, "wake up failed"),
        ("oom_wake*1", "/wake_up", 500, "CUDA Error: out of memory"),
        ("die_in_sleep*1", "/sleep", 500, "EngineCore encountered an issue"),
        ("die_in_wake*1", "/wake_up", 500, "EngineCore encountered an issue"),
        ("lie_sleep*1", "/sleep", 200, "sleeping"),
    ],
)
def test_faults(sim, fault, path, status, said):
    engine = sim().ready()
    engine.faults.write_text(fault)
    found, answer = engine.call("POST", path)
    assert found == status
    assert said in json.dumps(answer)
    if fault.startswith("lie"):
        assert engine.call("GET", "/is_sleeping")[1] == {"is_sleeping": False}

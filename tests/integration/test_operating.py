"""The daemon as its operator meets it: starting, llmuxctl, warm-up, metrics, stopping."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import urllib.request

import pytest

from tests.integration.stack import Caller, until
from tests.ports import free_port

SLOW_TOKENS = {"env": {"LLMUX_SIM_SCALE": "0.01", "LLMUX_SIM_START_SECS": "1", "LLMUX_SIM_TOKENS_PER_S": "1"}}


def llmuxd(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "llmuxd", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=20, env={**os.environ, **env})


class TestCommandLine:
    def test_check_says_what_is_wrong_and_starts_nothing(self, tmp_path):
        file = tmp_path / "llmux.toml"
        file.write_text('prot = 1\n[models.a]\nmodel_path = ""\n')
        for words in (["--check"], []):
            done = llmuxd("--config", str(file), *words)
            assert done.returncode == 2
            assert "prot" in done.stderr
            assert "'port'" in done.stderr
            assert "models.a.model_path" in done.stderr
        file.write_text("")
        done = llmuxd("--config", str(file), "--check")
        assert (done.returncode, done.stdout) == (0, f"{file}: 0 models, no errors\n")

    def test_no_config(self, tmp_path):
        done = llmuxd("--config", str(tmp_path / "none.toml"))
        assert done.returncode == 2
        assert "none.toml: cannot be read: No such file" in done.stderr

    def test_version_and_usage(self):
        assert llmuxd("--version").stdout.startswith("llmuxd, version ")
        assert llmuxd("--nonsense").returncode == 2
        assert llmuxd("--demo", "--check").returncode == 2

    def test_a_second_daemon_is_kept_out(self, daemon):
        stack = daemon("a").start()
        file = stack.home / "config.json"
        env = {"LLMUX_RUNTIME_DIR": str(stack.home / "run"), "LLMUX_STATE_DIR": str(stack.home / "state")}
        done = llmuxd("--config", str(file), **env)
        assert done.returncode == 1
        assert "another llmuxd runs" in done.stderr
        assert stack.ask("a").status == 200

    def test_a_second_daemon_is_kept_out_of_the_same_state(self, daemon, tmp_path):
        """Or it would take the engines of the first one for what an earlier one has left."""
        stack = daemon("a").start()
        assert stack.ask("a").status == 200
        pid = stack.model("a")["pid"]
        other = tmp_path / "other.json"
        other.write_text(json.dumps({"port": free_port(), "metrics_port": 0, "models": {}}))
        env = {"LLMUX_RUNTIME_DIR": str(tmp_path / "other"), "LLMUX_STATE_DIR": str(stack.home / "state")}
        done = llmuxd("--config", str(other), **env)
        assert done.returncode == 1
        assert f"another llmuxd runs with {stack.home / 'state'}" in done.stderr
        assert stack.ask("a").status == 200
        assert stack.model("a")["pid"] == pid

    def test_one_folder_may_be_both(self, daemon, tmp_path):
        (tmp_path / "state").symlink_to("run")
        (tmp_path / "run").mkdir()
        assert daemon("a").start().ask("a").status == 200

    def test_a_port_that_is_taken_during_the_warm_up(self, daemon):
        stack = daemon(top={"warmup": True}, a={"env": {"LLMUX_SIM_SCALE": "0.1"}}).start(wait=False)
        until(stack.socket.exists, "it warms up")
        with socket.create_server(("127.0.0.1", stack.port)):
            assert stack.process.wait(20) == 1
        assert f"cannot listen on http://127.0.0.1:{stack.port}: " in stack.log.read_text()
        assert "Traceback" not in stack.log.read_text()

    def test_a_port_that_is_taken(self, daemon):
        stack = daemon("a").start()
        file = stack.home / "config.json"
        other = stack.home / "other"
        env = {"LLMUX_RUNTIME_DIR": str(other / "run"), "LLMUX_STATE_DIR": str(other / "state")}
        done = llmuxd("--config", str(file), **env)
        assert done.returncode == 1
        assert f"cannot listen on 127.0.0.1:{stack.port}" in done.stderr
        assert not (other / "run" / "control.sock").exists()


class TestLlmuxctl:
    def test_the_words_of_an_operator(self, daemon):
        stack = daemon("a", "b").start()
        done = stack.ctl("switch", "a")
        assert (done.returncode, done.stdout) == (0, "a is awake\n")
        assert "starting" in done.stderr
        assert stack.ctl("sleep", "a", "--eviction", "discard+keep_running").returncode == 0
        assert stack.model("a")["asleep_by"] == "discard+keep_running"
        done = stack.ctl("sleep", "a", "--eviction", "offload+keep_running")
        assert done.returncode == 1
        assert "asleep (discard+keep_running) already" in done.stderr
        assert stack.ctl("wake", "a").returncode == 0
        assert stack.ctl("stop", "a").stdout == "a is stopped\n"
        assert stack.ctl("eviction", "a", "retain+stop").returncode == 0
        assert stack.model("a")["eviction"] == "retain+stop"
        assert "retain+stop" in stack.ctl("eviction", "a").stdout
        table = stack.ctl("status").stdout
        assert table.splitlines()[-2].split()[:2] == ["a", "not_started"]
        lines = [json.loads(line) for line in stack.ctl("--json", "wake", "b").stdout.splitlines()]
        assert lines[-1]["result"] == "ok"
        assert "startup complete" in stack.ctl("logs", "b").stdout
        assert json.loads(stack.ctl("config", "show").stdout)["models"]["a"]["model_path"] == "sim/a"
        assert stack.ctl("version").returncode == 0

    def test_pin_and_modes(self, daemon):
        stack = daemon("a", "b").start()
        assert stack.ctl("pin", "a").returncode == 0
        refused = stack.ask("b")
        assert (refused.status, refused.json["error"]["code"]) == (503, "model_not_pinned")
        assert "a is pinned" in refused.json["error"]["message"]
        assert "retry-after" in refused.headers
        assert stack.ctl("wake", "b").returncode == 5
        assert stack.ctl("unpin").returncode == 0
        assert stack.ask("b").status == 200
        assert stack.ctl("mode", "manual").returncode == 0
        assert stack.status()["mode"] == "manual"
        assert stack.ask("a").status == 503
        assert stack.ctl("mode", "auto").returncode == 0
        assert stack.ask("a").status == 200

    def test_names_and_failures(self, daemon):
        stack = daemon("qwen").start()
        done = stack.ctl("wake", "qwne")
        assert done.returncode == 4
        assert "qwen" in done.stderr
        stack.fault("qwen", "die_at_start")
        done = stack.ctl("wake", "qwen")
        assert done.returncode == 1
        assert "initialization failed" in done.stderr

    def test_without_a_daemon(self, tmp_path):
        argv = [sys.executable, "-m", "llmuxctl", "--socket", str(tmp_path / "none.sock"), "status"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
        assert done.returncode == 3
        assert "systemctl start llmuxd" in done.stderr

    def test_curl_can_use_the_socket_and_others_cannot(self, daemon):
        stack = daemon("a").start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(stack.socket))
            # What `curl --unix-socket PATH http://localhost/control/status` sends.
            client.sendall(
                b"GET /control/status HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n"
                b"Connection: close\r\n\r\n"
            )
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        status = json.loads(body)
        assert {"version", "state", "mode", "active", "models", "devices"} <= status.keys()
        assert stat.S_IMODE(stack.socket.stat().st_mode) == 0o660


class TestWarmup:
    def test_warmup_starts_tries_and_puts_to_sleep_each_model(self, daemon):
        stack = daemon("a", "b", "c").start()
        done = stack.ctl("warmup", "a", "c")
        assert done.returncode == 0, done.stderr
        states = {name: model["engine"] for name, model in stack.status()["models"].items()}
        assert states == {"a": "asleep", "b": "not_started", "c": "asleep"}
        assert stack.engine_metric("a", "vllm:iteration_tokens_total_count") == 1
        assert "a: one inference" in done.stderr or "inference" in done.stderr

    def test_before_the_port_opens(self, daemon):
        stack = daemon("a", "b", top={"warmup": True})
        stack.fault("a", "hang_start")
        stack.start(wait=False)
        until(stack.socket.exists, "the control socket is there first")
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", stack.port))
        # Nobody else gets the port meanwhile.
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", stack.port))
        stack.fault("a", "")
        until(stack.serves, "it serves")
        assert {model["engine"] for model in stack.status()["models"].values()} == {"asleep"}

    def test_a_model_that_fails_does_not_keep_the_others_from_serving(self, daemon):
        stack = daemon("a", "b", top={"warmup": True})
        stack.fault("a", "die_at_start*1")
        stack.start()
        assert stack.model("b")["engine"] == "asleep"
        assert "warm-up failed for a" in stack.log.read_text()


def test_a_stream_that_waits_is_told_its_place_and_how_long_it_will_take(daemon):
    stack = daemon("b", top={"heartbeat_secs": 0.1}, a=SLOW_TOKENS).start()
    assert stack.ask("b").status == 200
    assert stack.ask("a").status == 200
    busy = stack.stream("a", tokens=60).events()
    next(busy)
    stack.fault("a", "hang_generation")
    first = Caller(lambda: stack.ask("b"))
    until(lambda: stack.model("b")["queued"] == 1, "one waits")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", stack.port, timeout=20)) as connection:
        asked = {"model": "b", "prompt": "x", "max_tokens": 3, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
        waiting = connection.getresponse()
        comment = waiting.readline().decode()
        stack.fault("a", "")
        assert list(busy)[-1] == "[DONE]"
        assert first.result().status == 200
        assert waiting.read().rstrip().endswith(b"data: [DONE]")
    assert re.fullmatch(r": llmux waiting for b, place 2 in its queue, about \d+ s\n", comment)


def test_a_client_says_how_long_it_will_wait(daemon):
    stack = daemon("a", "b").start()
    refused = stack.request("POST", "/v1/completions", {"model": "a"}, {"x-llmux-wait": "0"})
    assert (refused.status, refused.json["error"]["code"]) == (504, "queue_timeout")
    assert int(refused.headers["retry-after"]) > 1
    assert stack.model("a")["engine"] == "not_started", "it wanted nothing to be loaded"
    asked = {"model": "a", "prompt": "x", "max_tokens": 1}
    assert stack.request("POST", "/v1/completions", asked, {"x-llmux-wait": "20"}).status == 200
    assert stack.request("POST", "/v1/completions", asked, {"x-llmux-wait": "0"}).status == 200
    wrong = stack.request("POST", "/v1/completions", asked, {"x-llmux-wait": "soon"})
    assert (wrong.status, wrong.json["error"]["code"]) == (400, "invalid_wait")


def metrics_page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        return answer.read().decode()


def test_metrics(daemon):
    port = free_port()
    stack = daemon("b", top={"metrics_port": port}, a=SLOW_TOKENS).start()
    stream = stack.stream("a", tokens=50)
    events = stream.events()
    next(events)
    waiting = Caller(lambda: stack.ask("b"))
    until(lambda: 'llmux_queued{model="b"} 1.0' in metrics_page(port), "b's request is counted")
    assert 'llmux_in_flight{model="a"} 1.0' in metrics_page(port)
    assert list(events)[-1] == "[DONE]"
    assert waiting.result().status == 200
    page = metrics_page(port)
    for line in (
        'llmux_requests_total{model="a",status="200"} 1.0',
        'llmux_request_queue_wait_seconds_count{model="b"} 1.0',
        'llmux_in_flight{model="a"} 0.0',
        'llmux_queued{model="b"} 0.0',
        'llmux_switch_phase_seconds_count{phase="sleep",to="b"} 1.0',
        'llmux_switch_total_seconds_count{to="b"} 1.0',
        'llmux_switches_total{to="b"} 1.0',
        'llmux_active_model_info{model="b"} 1.0',
        'llmux_active_model_info{model="a"} 0.0',
        'llmux_engine_state{model="a",state="asleep"} 1.0',
    ):
        assert line in page
    assert "# TYPE llmux_switch_failures_total counter" in page


class TestShutdown:
    def test_what_is_in_flight_finishes_and_nothing_is_left(self, daemon):
        stack = daemon("b", a=SLOW_TOKENS).start()
        stack.ask("b")
        stream = stack.stream("a", tokens=100)
        events = stream.events()
        next(events)
        tree = stack.tree()
        assert len(tree) == 4
        stack.process.send_signal(signal.SIGTERM)
        until(lambda: stack.get("/health").status == 503, "it refuses new work")
        refused = stack.ask("a")
        assert (refused.status, refused.json["error"]["code"]) == (503, "shutting_down")
        assert list(events)[-1] == "[DONE]"
        assert stack.process.wait(20) == 0
        assert not any(process.is_running() and process.status() != "zombie" for process in tree)
        assert list((stack.home / "run").rglob("*.sock")) == []
        assert stack.ledger.held() == {}

    def test_it_has_a_bound(self, daemon):
        stack = daemon(top={"shutdown_timeout_secs": 0.5}, a=SLOW_TOKENS).start()
        stream = stack.stream("a", tokens=100_000)
        next(stream.events())
        assert stack.stop() == 0

    def test_a_second_sigterm_hurries(self, daemon):
        stack = daemon(top={"shutdown_timeout_secs": 600}, a=SLOW_TOKENS).start()
        stream = stack.stream("a", tokens=100_000)
        next(stream.events())
        stack.process.send_signal(signal.SIGTERM)
        until(lambda: stack.get("/health").status == 503, "it is stopping")
        assert stack.stop() == 0

    def test_in_the_middle_of_a_start(self, daemon):
        stack = daemon("a").start()
        stack.fault("a", "hang_start")
        waiting = Caller(lambda: stack.ask("a"))
        until(lambda: stack.model("a")["pid"], "it starts")
        assert stack.stop() == 0
        assert waiting.result().status == 503

    def test_in_the_middle_of_a_warmup(self, daemon):
        stack = daemon("a", top={"warmup": True})
        stack.fault("a", "hang_start")
        stack.start(wait=False)
        until(lambda: stack.socket.exists() and stack.model("a")["pid"], "it warms up")
        assert stack.stop() == 0


def test_a_folder_that_is_too_long_for_sockets_is_said(tmp_path):
    file = tmp_path / "llmux.toml"
    file.write_text('metrics_port = 0\n[models.a]\nmodel_path = "p"\n')
    folder = str(tmp_path / ("long" * 20))
    done = llmuxd("--config", str(file), LLMUX_RUNTIME_DIR=folder, LLMUX_STATE_DIR=folder)
    assert done.returncode == 2
    assert "for engines' sockets" in done.stderr


def test_the_demo_serves_and_leaves_nothing(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("d")
    port = free_port()
    argv = [sys.executable, "-m", "llmuxd", "--demo", "--port", str(port)]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    try:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(12)]
        assert any(f"curl http://127.0.0.1:{port}/v1/chat/completions" in line for line in told)
        body = b'{"model": "phi", "messages": [{"role": "user", "content": "Hello"}]}'
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["model"] == "phi"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert list(tmp_path.iterdir()) == []

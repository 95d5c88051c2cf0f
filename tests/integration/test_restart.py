"""Engines outlive the daemon: kill -9, a handover, and what the next daemon finds and makes of it."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

from tests.integration.stack import Caller, Daemon, until
from tests.ports import free_port

SLOW_TOKENS = {"env": {"LLMUX_SIM_SCALE": "1", "LLMUX_SIM_TOKENS_PER_S": "50", "LLMUX_SIM_START_SECS": "0"}}
SLOW_SLEEP = {
    "env": {
        "LLMUX_SIM_SCALE": "1",
        "LLMUX_SIM_START_SECS": "0",
        "LLMUX_SIM_LOAD_GIB_S": "1000",
        "LLMUX_SIM_OFFLOAD_GIB_S": "4",
    }
}


def identities(stack: Daemon) -> dict[str, tuple[int, float]]:
    """Model -> pid and start of its API server."""
    pids = {name: model["pid"] for name, model in stack.status()["models"].items() if model["pid"]}
    return {name: (pid, psutil.Process(pid).create_time()) for name, pid in pids.items()}


def states(stack: Daemon) -> dict[str, str]:
    return {name: model["engine"] for name, model in stack.status()["models"].items()}


def is_cut(events: Iterator[Any]) -> bool:
    """Whether a stream ends before its end, as far as its client can tell."""
    try:
        return "[DONE]" not in list(events)
    except (OSError, http.client.HTTPException):
        return True


def a_awake_b_asleep(daemon: Any, **more: Any) -> Daemon:
    stack = daemon("a", "b", **more).start()
    assert stack.ask("b").status == 200
    assert stack.ask("a").status == 200
    assert states(stack) == {"a": "awake", "b": "asleep"}
    return stack


class TestKilled:
    def test_engines_are_adopted_as_they_are_and_serve_on(self, daemon):
        stack = a_awake_b_asleep(daemon)
        before = identities(stack)
        stack.kill()
        stack.start()
        assert states(stack) == {"a": "awake", "b": "asleep"}
        assert identities(stack) == before
        assert stack.ask("a").status == 200
        assert stack.ask("b").status == 200
        assert states(stack) == {"a": "asleep", "b": "awake"}
        assert identities(stack) == before

    def test_several_times_over(self, daemon):
        stack = a_awake_b_asleep(daemon)
        before = identities(stack)
        for model in "abab":
            stack.kill()
            stack.start()
            assert stack.ask(model).status == 200
            assert identities(stack) == before
        assert stack.stop() == 0

    def test_an_adopted_engine_is_stopped_like_any_other(self, daemon):
        stack = a_awake_b_asleep(daemon)
        processes = stack.tree()
        stack.kill()
        stack.start()
        assert stack.stop() == 0
        assert not any(_runs(process.pid) for process in processes)
        assert json.loads((stack.home / "state" / "engines.json").read_text())["engines"] == {}

    def test_an_adopted_engine_that_dies_is_noticed_and_started_again(self, daemon):
        stack = a_awake_b_asleep(daemon)
        stack.kill()
        stack.start()
        pid, core = stack.engine_pids("a")
        psutil.Process(core).kill()
        until(lambda: stack.model("a")["pid"] != pid, "its death is noticed")
        assert stack.ask("a").status == 200
        assert not _runs(pid)

    def test_engines_that_died_meanwhile_are_cleaned_up(self, daemon):
        stack = a_awake_b_asleep(daemon)
        server, core = stack.engine_pids("a")
        stack.kill()
        psutil.Process(server).kill()
        assert psutil.Process(core).is_running(), "it holds the memory"
        stack.start()
        assert states(stack) == {"a": "not_started", "b": "asleep"}
        assert not _runs(core)
        assert stack.ask("a").status == 200

    def test_one_that_was_falling_asleep_is_waited_for(self, daemon):
        stack = a_awake_b_asleep(daemon, a=SLOW_SLEEP)
        before = identities(stack)
        waiting = Caller(lambda: stack.ask("b"))
        until(lambda: states(stack)["a"] == "falling_asleep", "it falls asleep")
        stack.kill()
        waiting.join()
        stack.start()
        assert states(stack) == {"a": "asleep", "b": "asleep"}
        assert identities(stack) == before

    def test_one_that_was_to_fall_asleep_and_was_not_told_is_told(self, daemon):
        stack = a_awake_b_asleep(daemon)
        before = identities(stack)
        stack.kill()
        # As it is where the kill comes between the note and the call.
        _note_of_a(stack, {"state": "falling_asleep", "asleep_by": "discard+keep_running"})
        stack.start()
        assert states(stack) == {"a": "asleep", "b": "asleep"}
        assert stack.ask("a").status == 200
        assert identities(stack) == before

    def test_with_paused_requests_it_sleeps_on_without_them(self, daemon):
        stack = daemon("b", policy={"in_flight": "park", "policy_type": "fifo"}, a=SLOW_TOKENS).start()
        assert stack.ask("b").status == 200
        assert stack.ask("a").status == 200
        before = identities(stack)
        stream = stack.stream("a", tokens=5000)
        events = stream.events()
        next(events)
        assert stack.ctl("pin", "b").returncode == 0
        assert (states(stack), stack.model("a")["in_flight"]) == ({"a": "asleep", "b": "awake"}, 1)
        stack.kill()
        assert is_cut(events)
        stack.start()
        assert (states(stack), stack.model("a")["in_flight"]) == ({"a": "asleep", "b": "awake"}, 0)
        assert stack.ctl("unpin").returncode == 0
        assert stack.ask("a").status == 200
        assert stack.engine_metric("a", "vllm:num_requests_running") == 0
        assert identities(stack) == before

    def test_one_that_dies_while_another_is_waited_for_is_started_again(self, daemon):
        stack = a_awake_b_asleep(daemon, a=SLOW_SLEEP)
        server, _ = stack.engine_pids("b")
        waiting = Caller(lambda: stack.ask("b"))
        until(lambda: states(stack)["a"] == "falling_asleep", "it falls asleep")
        stack.kill()
        waiting.join()
        stack.start(wait=False)
        until(lambda: "b: found its engine" in stack.log.read_text(), "it has looked at b")
        psutil.Process(server).kill()
        until(stack.serves, "it serves")
        assert stack.ask("b").status == 200
        assert "a: adopted" in stack.log.read_text()

    def test_one_that_was_starting_goes_on(self, daemon):
        stack = daemon("a").start()
        stack.fault("a", "hang_start")
        waiting = Caller(lambda: stack.ask("a"))
        until(lambda: stack.model("a")["pid"], "it starts")
        before = identities(stack)
        stack.kill()
        waiting.join()
        stack.start()
        assert states(stack) == {"a": "starting"}
        stack.fault("a", "")
        assert stack.ask("a").status == 200
        assert identities(stack) == before

    def test_one_that_nobody_came_to_note_is_ended(self, daemon):
        stack = daemon("a").start()
        assert stack.ask("a").status == 200
        processes = stack.tree()
        stack.kill()
        (stack.home / "state" / "engines.json").unlink()
        stack.start()
        assert not any(_runs(process.pid) for process in processes)
        assert stack.ask("a").status == 200

    def test_a_state_file_that_is_damaged_is_put_aside(self, daemon):
        stack = daemon("a").start()
        assert stack.ask("a").status == 200
        pid = stack.model("a")["pid"]
        stack.kill()
        file = stack.home / "state" / "engines.json"
        file.write_text(file.read_text()[:-20])
        stack.start()
        assert states(stack) == {"a": "not_started"}
        assert not _runs(pid)
        assert "cannot be understood" in stack.log.read_text()
        assert (stack.home / "state" / "engines.unreadable").exists()
        assert stack.ask("a").status == 200, "with the folder and the socket that the other one had"

    def test_a_state_file_that_could_not_be_written_does_not_make_a_sleeper_awake(self, daemon):
        stack = daemon("a").start()
        assert stack.ask("a").status == 200
        assert stack.ctl("sleep", "a").returncode == 0
        stack.kill()
        unknown = {"can_park": False, "can_sleep": False, "version": None}
        _note_of_a(stack, {"state": "starting", "asleep_by": None}, unknown)
        stack.start()
        assert states(stack) == {"a": "not_started"}
        assert stack.ask("a").status == 200

    def test_one_whose_config_has_changed_is_stopped_when_it_is_idle(self, daemon):
        stack = a_awake_b_asleep(daemon)
        before = identities(stack)
        stack.kill()
        stack.models["b"]["extra_args"] = ["--max-model-len", "256"]
        stack.start()
        until(lambda: states(stack) == {"a": "awake", "b": "not_started"}, "b is idle, and stopped")
        assert stack.ask("b").status == 200
        after = identities(stack)
        assert after["a"] == before["a"]
        assert after["b"] != before["b"]

    def test_one_that_is_not_in_the_config_any_more_is_ended(self, daemon):
        stack = a_awake_b_asleep(daemon)
        pid = stack.model("b")["pid"]
        stack.kill()
        del stack.models["b"]
        stack.start()
        assert states(stack) == {"a": "awake"}
        assert not _runs(pid)

    def test_the_mode_is_kept(self, daemon):
        stack = a_awake_b_asleep(daemon)
        assert stack.ctl("pin", "a").returncode == 0
        stack.kill()
        stack.start()
        assert stack.ask("b").status == 503
        assert stack.status()["pinned"] == "a"

    def test_without_a_daemon_the_engines_can_be_ended(self, daemon):
        stack = a_awake_b_asleep(daemon)
        processes = stack.tree()
        stack.kill()
        done = stack.llmuxd("--stop-engines")
        assert (done.returncode, done.stdout) == (0, "2 engines ended\n")
        assert not any(_runs(process.pid) for process in processes)
        assert stack.llmuxd("--stop-engines").stdout == "no engines are there\n"
        assert list((stack.home / "run" / "engines").iterdir()) == []


class TestHandOver:
    def test_streams_that_end_in_time_end_well_and_the_next_daemon_goes_on(self, daemon):
        stack = daemon("b", a=SLOW_TOKENS).start()
        assert stack.ask("a").status == 200
        before = identities(stack)
        events = stack.stream("a", tokens=60).events()
        next(events)
        stack.process.send_signal(signal.SIGUSR2)
        waiting = Caller(lambda: list(events))
        assert stack.process.wait(20) == 75
        waiting.join()
        assert waiting.error is None
        stack.start()
        assert identities(stack) == before
        assert stack.ask("a").status == 200

    def test_what_waits_for_another_model_is_served_before_it_ends(self, daemon):
        stack = daemon("b", a=SLOW_TOKENS).start()
        assert stack.ask("a").status == 200
        events = stack.stream("a", tokens=60).events()
        next(events)
        stack.fault("a", "hang_generation")
        waiting = Caller(lambda: stack.ask("b"))
        until(lambda: stack.model("b")["queued"] == 1, "b waits")
        stack.process.send_signal(signal.SIGUSR2)
        stack.fault("a", "")
        assert list(events)[-1] == "[DONE]"
        assert waiting.result().status == 200
        assert stack.process.wait(20) == 75
        stack.start()
        assert states(stack)["b"] == "awake"

    def test_what_does_not_end_in_time_is_cut(self, daemon):
        stack = daemon("b", top={"shutdown_timeout_secs": 0.3}, a=SLOW_TOKENS).start()
        assert stack.ask("a").status == 200
        stream = stack.stream("a", tokens=5000)
        events = stream.events()
        next(events)
        began = time.monotonic()
        stack.process.send_signal(signal.SIGUSR2)
        assert is_cut(events)
        assert stack.process.wait(20) == 75
        assert time.monotonic() - began < 10
        stack.start()
        assert states(stack)["a"] == "awake"
        assert stack.ask("a").status == 200

    def test_an_engine_that_starts_goes_on_starting(self, daemon):
        stack = daemon("a", top={"shutdown_timeout_secs": 0.2}).start()
        stack.fault("a", "hang_start")
        waiting = Caller(lambda: stack.ask("a"))
        until(lambda: stack.model("a")["pid"], "it starts")
        before = identities(stack)
        stack.process.send_signal(signal.SIGUSR2)
        assert waiting.result().status == 503, "its time is over before that of the start is"
        assert stack.process.wait(20) == 75
        stack.start()
        stack.fault("a", "")
        assert stack.ask("a").status == 200
        assert identities(stack) == before

    def test_one_that_starts_goes_on_while_connections_are_ended(self, daemon):
        stack = daemon(top={"shutdown_timeout_secs": 0.3}, a={"port": free_port()}).start()
        stack.fault("a", "hang_start")
        waiting = Caller(lambda: stack.ask("a"))
        until(lambda: stack.model("a")["pid"], "it starts")
        before = identities(stack)
        with socket.create_connection(("127.0.0.1", stack.port)) as half_sent:
            half_sent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
            assert stack.get("/health").status == 200
            stack.process.send_signal(signal.SIGUSR2)
            assert stack.process.wait(20) == 75
        waiting.join()
        stack.start()
        stack.fault("a", "")
        assert stack.ask("a").status == 200
        assert identities(stack) == before

    def test_sigterm_stops_the_engines_after_all(self, daemon):
        stack = daemon("b", a=SLOW_TOKENS).start()
        assert stack.ask("a").status == 200
        processes = stack.tree()
        stream = stack.stream("a", tokens=5000)
        next(stream.events())
        stack.process.send_signal(signal.SIGUSR2)
        until(lambda: stack.status()["state"] == "handing over", "it hands over")
        assert stack.stop() == 0
        assert not any(_runs(process.pid) for process in processes)


def _note_of_a(stack: Daemon, entry: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> None:
    """Have the state file say something else of a's engine."""
    file = stack.home / "state" / "engines.json"
    data = json.loads(file.read_text())
    data["engines"]["a"].update(entry)
    data["engines"]["a"]["record"].update(record or {})
    file.write_text(json.dumps(data))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class TestConnections:
    """With the port held by somebody else, as systemd does, nobody is refused and no answer is lost."""

    def test_a_new_connection_waits_for_the_next_daemon(self, daemon):
        with socket.create_server(("127.0.0.1", 0)) as held:
            stack = daemon("a").start(held=held)
            assert stack.ask("a").status == 200
            for _ in range(3):
                stack.process.send_signal(signal.SIGUSR2)
                asking = [Caller(lambda: stack.ask("a")) for _ in range(5)]
                assert stack.process.wait(20) == 75
                asking += [Caller(lambda: stack.ask("a")) for _ in range(5)]
                stack.start(held=held)
                assert [one.result().status for one in asking] == [200] * 10

    def test_under_load_no_request_fails_at_a_handover(self, daemon):
        with socket.create_server(("127.0.0.1", 0)) as held:
            stack = daemon("b", a=SLOW_TOKENS).start(held=held)
            assert stack.ask("b").status == 200
            assert stack.ask("a").status == 200
            before = identities(stack)
            over = threading.Event()

            def ask_on(model: str) -> list[int]:
                seen = []
                while not over.is_set():
                    seen.append(stack.ask(model, tokens=10).status)
                return seen

            with ThreadPoolExecutor(6) as pool:
                asking = [pool.submit(ask_on, "ab"[number == 0]) for number in range(6)]
                for _ in range(3):
                    time.sleep(0.3)
                    stack.process.send_signal(signal.SIGUSR2)
                    assert stack.process.wait(20) == 75
                    stack.start(held=held)
                over.set()
                assert {status for one in asking for status in one.result()} == {200}
            assert identities(stack) == before

    def test_a_connection_that_is_kept_alive_is_ended_with_its_answer(self, daemon):
        with socket.create_server(("127.0.0.1", 0)) as held:
            stack = daemon(a=SLOW_TOKENS).start(held=held)
            assert stack.ask("a").status == 200
            connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=20)
            connection.request("GET", "/v1/models")
            assert connection.getresponse().read()
            body = json.dumps({"model": "a", "prompt": "x", "max_tokens": 60})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            until(lambda: stack.model("a")["in_flight"] == 1, "it is in flight")
            idle = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=20)
            idle.request("GET", "/v1/models")
            assert idle.getresponse().read()
            stack.process.send_signal(signal.SIGUSR2)
            assert idle.sock.recv(65536) == b"", "one that is idle is closed"
            idle.close()
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Connection"]) == (200, "close")
            assert answer.read()
            connection.close()
            assert stack.process.wait(20) == 75
            stack.start(held=held)

    def test_the_config_may_name_another_port_beside_the_one_that_is_held(self, daemon):
        with socket.create_server(("127.0.0.1", 0)) as held, socket.create_server(("127.0.0.1", 0)) as probe:
            own = probe.getsockname()[1]
            probe.close()
            stack = daemon("a", top={"port": own}).start(held=held)
            assert stack.ask("a").status == 200
            assert "both are served" in stack.log.read_text()
            stack.port = own
            assert stack.ask("a").status == 200

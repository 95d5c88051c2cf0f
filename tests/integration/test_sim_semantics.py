"""What the simulated engine must not forgive: calls that a real vLLM would not survive, or would leave without effect."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from llmuxd.sim.ledger import GIB, Ledger, OutOfMemory
from tests.integration.stack import Caller, until
from tests.integration.test_sim_engine import SLOW, sim

__all__ = ["sim"]

DEAD = "EngineCore encountered an issue"


def test_what_runs_on_memory_that_is_asleep_kills_the_engine(sim):
    engine = sim().ready()
    engine.call("POST", "/sleep?level=1&mode=keep")
    assert engine.call("POST", "/resume")[0] == 200
    assert engine.call("GET", "/is_sleeping")[1] == {"is_sleeping": True}, "its memory is"
    assert DEAD in engine.ask()["error"]["message"]
    assert engine.process.wait(20) == 0
    assert "illegal memory access" in engine.log.read_text()


def test_weights_cannot_be_read_into_no_memory(sim):
    engine = sim().ready()
    engine.call("POST", "/sleep?level=2&mode=keep")
    assert engine.call("POST", "/collective_rpc", {"method": "reload_weights"})[0] == 500
    assert engine.call("GET", "/health")[0] == 503


def test_a_sleeper_that_is_put_to_sleep_stays_as_it_is(sim):
    engine = sim().ready()
    before = engine.say()
    engine.call("POST", "/sleep?level=1&mode=wait")
    assert engine.call("POST", "/sleep?level=2&mode=wait")[0] == 200
    engine.call("POST", "/wake_up")
    assert engine.say() == before


def test_a_pause_leaves_the_sleep_alone(sim):
    engine = sim().ready()
    engine.call("POST", "/sleep?level=1&mode=wait")
    assert engine.call("POST", "/pause?mode=keep")[0] == 200
    assert engine.metric('vllm:engine_sleep_state{sleep_state="weights_offloaded"}') == 1
    assert engine.call("POST", "/wake_up")[1]["status"] == "awake"
    assert engine.call("GET", "/is_paused")[1] == {"is_paused": False}


def test_a_wake_while_a_sleep_waits_undoes_its_pause(sim):
    engine = sim(**SLOW).ready()
    connection, events = engine.stream(tokens=60)
    next(events)
    sleeping = Caller(lambda: engine.call("POST", "/sleep?level=1&mode=wait"))
    until(lambda: engine.call("GET", "/is_paused")[1] == {"is_paused": True}, "it waits")
    engine.call("POST", "/wake_up")
    assert len(list(events)) == 60
    connection.close()
    assert sleeping.result()[0] == 200
    assert DEAD in engine.ask()["error"]["message"], "the late sleep has unmapped a live engine"


def test_the_kv_cache_goes_only_from_a_paused_and_whole_engine(sim, tmp_path):
    ledger = Ledger.create(tmp_path / "device", 24 * GIB)
    engine = sim(ledger=str(tmp_path / "device"), weights_gib="4", kv_gib="2", residual_gib="1").ready()
    before = engine.say()
    assert engine.call("POST", "/release_kv_cache_memory")[0] == 500
    engine.call("POST", "/pause?mode=keep")
    assert engine.call("POST", "/release_kv_cache_memory")[0] == 200
    assert ledger.held() == {engine.pids[1]: 5 * GIB}
    assert engine.call("POST", "/release_kv_cache_memory")[0] == 500
    engine.call("POST", "/wake_up")
    assert ledger.held() == {engine.pids[1]: 7 * GIB}
    assert engine.say() == before


def test_a_tag_that_is_not_asleep_wakes_nothing(sim):
    engine = sim().ready()
    engine.call("POST", "/sleep?level=1&mode=wait")
    assert engine.call("POST", "/wake_up?tags=weights")[1]["status"] == "sleeping"
    assert engine.call("POST", "/wake_up?tags=weights&tags=kv_cache")[1]["status"] == "sleeping"
    assert engine.call("POST", "/wake_up?tags=kv_cache")[1]["status"] == "awake"


def test_the_head_of_a_stream_says_nothing_about_its_tokens(sim):
    engine = sim().ready()
    engine.call("POST", "/sleep?level=1&mode=keep")
    connection, events = engine.stream(tokens=3)
    assert engine.metric("vllm:num_requests_running") == 0
    engine.call("POST", "/wake_up")
    assert len(list(events)) == 4
    connection.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/sleep?level=3", None, 400),
        ("POST", "/sleep?level=x", None, 400),
        ("POST", "/sleep?mode=x", None, 400),
        ("POST", "/pause?mode=x", None, 400),
        ("POST", "/collective_rpc", "{", 400),
        ("POST", "/collective_rpc", {}, 400),
    ],
)
def test_every_refusal_has_vllms_form(sim, method, path, body, status):
    engine = sim().ready()
    found, answer = engine.call(method, path, body)
    assert (found, answer["error"]["code"]) == (status, status)
    assert engine.call("GET", "/is_sleeping")[1] == {"is_sleeping": False}


def test_the_device_remembers_what_did_not_fit(tmp_path):
    ledger = Ledger.create(tmp_path / "d", 10)
    ledger.hold(os.getpid(), 6)
    assert (ledger.refused(), ledger.overcommit()) == (0, 0)
    for size in (13, 11):
        with pytest.raises(OutOfMemory):
            ledger.hold(os.getpid(), size)
    assert (ledger.refused(), ledger.overcommit(), ledger.peak()) == (2, 3, 6)


def test_a_writer_that_is_killed_leaves_the_device_whole(tmp_path, monkeypatch):
    ledger = Ledger.create(tmp_path / "d", 10)
    ledger.hold(os.getpid(), 6)
    child = os.fork()
    if child == 0:
        # It dies at the last instant at which its content is not in place.
        monkeypatch.setattr("pathlib.Path.replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        ledger.hold(os.getpid(), 1)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert ledger.held() == {os.getpid(): 6}


@pytest.mark.parametrize(
    ("version", "down", "up", "unknown"),
    [
        ("0.32.0", "checkpoint_prepare", "checkpoint_restore", "suspend_nccl"),
        ("0.31.2", "suspend_nccl", "resume_nccl", "checkpoint_prepare"),
    ],
)
def test_without_its_communicators_an_engine_makes_no_token(sim, version, down, up, unknown):
    def call(method: str) -> Any:
        return engine.call("POST", "/collective_rpc", {"method": method})

    engine = sim("m", "-tp", "2", version=version).ready()
    assert engine.call("GET", "/version")[1] == {"version": version}
    before = engine.say()
    assert call(down) == (200, {"results": [None, None]})
    assert call(up)[0] == 200
    assert engine.say() == before
    status, refused = call(unknown)
    assert status == 500
    assert f"Method '{unknown}' is not implemented" in refused["error"]["message"]
    assert engine.metric(f'llmux_sim_rpc_total{{method="{unknown}"}}') == 1
    call(down)
    assert DEAD in engine.ask()["error"]["message"]
    assert engine.process.wait(20) == 0
    said = [line.partition(" collective_rpc ")[2] for line in engine.log.read_text().splitlines()]
    assert [method for method in said if method] == [down, up, unknown, down]


@pytest.mark.parametrize("level", [0, 1, 2])
def test_what_comes_up_asleep_is_what_was_saved(sim, tmp_path, level):
    """At once, and where there would be no room for a start."""
    saved = sim().ready()
    before = saved.say()
    saved.end()
    saved.uds.unlink()
    ledger = Ledger.create(tmp_path / "device", 24 * GIB)
    ledger.hold(os.getpid(), 14 * GIB)
    slow = {"scale": "1", "start_secs": "3600", "load_gib_s": "1000", "tokens_per_s": "1000"}
    device = {"ledger": str(tmp_path / "device"), "weights_gib": "4", "kv_gib": "4", "residual_gib": "1"}
    engine = sim("m", "-tp", "2", level=str(level), **slow, **device).ready()
    assert engine.call("GET", "/is_sleeping")[1] == {"is_sleeping": True}
    assert ledger.free() == (9 if level else 1) * GIB
    assert engine.call("POST", "/collective_rpc", {"method": "checkpoint_restore"})[0] == 200
    if level == 2:
        engine.call("POST", "/wake_up?tags=weights")
        engine.call("POST", "/collective_rpc", {"method": "reload_weights"})
        engine.call("POST", "/wake_up?tags=kv_cache")
    else:
        engine.call("POST", "/wake_up")
    assert ledger.free() == GIB
    assert engine.say() == before

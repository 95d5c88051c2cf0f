"""A reload: what differs is applied, what does not runs on, a bad config changes nothing."""

from __future__ import annotations

import json
import signal
from typing import Any

from tests.integration.stack import Caller, Daemon, until

SLOW_TOKENS = {"env": {"LLMUX_SIM_SCALE": "1", "LLMUX_SIM_TOKENS_PER_S": "50", "LLMUX_SIM_START_SECS": "0"}}


def reload(stack: Daemon) -> list[str]:
    """Reload by the CLI; the paths of the changes."""
    stack.write_config()
    done = stack.ctl("--json", "reload")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    return [change["path"] for change in last["changes"]]


def models(stack: Daemon) -> list[str]:
    return [card["id"] for card in stack.get("/v1/models").json["data"]]


def engines(stack: Daemon) -> dict[str, Any]:
    return {name: (model["engine"], model["pid"]) for name, model in stack.status()["models"].items()}


def test_without_a_difference_nothing_happens(daemon):
    stack = daemon("a", "b").start()
    assert stack.ask("a").status == 200
    before = engines(stack)
    assert reload(stack) == []
    assert engines(stack) == before


def test_a_new_model_appears_and_a_removed_one_goes_when_it_has_finished(daemon):
    stack = daemon("b", a=SLOW_TOKENS).start()
    assert stack.ask("b").status == 200
    assert stack.ask("a").status == 200
    events = stack.stream("a", tokens=100).events()
    next(events)
    stack.fault("a", "hang_generation")
    slow = stack.models.pop("a")
    stack.models["c"] = {"aliases": ["sea"]}
    assert reload(stack) == ["models.a", "models.c"]
    assert models(stack) == ["b", "c", "sea"]
    assert stack.ask("a").status == 404
    assert engines(stack)["a"][0] == "awake", "it finishes its stream"
    stack.fault("a", "")
    assert list(events)[-1] == "[DONE]"
    until(lambda: "a" not in engines(stack), "it is gone")
    assert stack.ask("sea").status == 200
    assert stack.ask("b").status == 200
    stack.models["a"] = slow
    assert reload(stack) == ["models.a"]
    assert stack.ask("a").status == 200


def test_what_an_engine_is_started_from_counts_when_it_is_idle(daemon):
    stack = daemon("b", a=SLOW_TOKENS).start()
    assert stack.ask("b").status == 200
    assert stack.ask("a").status == 200
    before = engines(stack)
    events = stack.stream("a", tokens=100).events()
    next(events)
    stack.fault("a", "hang_generation")
    stack.models["a"] = {**SLOW_TOKENS, "extra_args": ["--max-model-len", "128"]}
    assert reload(stack) == ["models.a.extra_args"]
    assert stack.model("a")["outdated"]
    assert engines(stack)["a"] == before["a"], "its stream runs on"
    stack.fault("a", "")
    assert list(events)[-1] == "[DONE]"
    until(lambda: engines(stack)["a"][0] == "not_started", "it is idle, and stopped")
    assert stack.ask("a").status == 200
    assert engines(stack)["a"][1] != before["a"][1]
    assert engines(stack)["b"][1] == before["b"][1]


def test_a_change_that_is_taken_back_stops_nothing(daemon):
    stack = daemon(a=SLOW_TOKENS).start()
    assert stack.ask("a").status == 200
    before = engines(stack)
    events = stack.stream("a", tokens=100).events()
    next(events)
    stack.fault("a", "hang_generation")
    stack.models["a"] = {**SLOW_TOKENS, "extra_args": ["--max-model-len", "128"]}
    reload(stack)
    stack.models["a"] = SLOW_TOKENS
    reload(stack)
    stack.fault("a", "")
    assert list(events)[-1] == "[DONE]"
    assert stack.ask("a").status == 200
    assert engines(stack) == before


def test_a_model_that_failed_is_tried_at_once_when_its_config_is_mended(daemon):
    stack = daemon(a={"env": {"LLMUX_SIM_FAULTS": "die_at_start"}}).start()
    for _ in range(5):
        assert stack.ctl("wake", "a").returncode == 1
    assert stack.ask("a").headers["retry-after"] != "1", "it waits for long by now"
    stack.models["a"] = {}
    assert reload(stack) == ["models.a.env.LLMUX_SIM_FAULTS"]
    assert stack.ask("a").status == 200


def test_what_is_no_engines_business_counts_at_once(daemon):
    stack = daemon("a", "b").start()
    assert stack.ask("a").status == 200
    before = engines(stack)
    stack.models["a"] = {"eviction": "discard+keep_running", "max_in_flight": 1}
    stack.top["max_body_bytes"] = 200
    stack.policy["policy_type"] = "fifo"
    assert sorted(reload(stack)) == [
        "max_body_bytes",
        "models.a.eviction",
        "models.a.max_in_flight",
        "policy.policy_type",
    ]
    assert engines(stack) == before
    assert stack.model("a")["eviction"] == "discard+keep_running"
    assert stack.status()["policy"] == "fifo"
    assert stack.ask("a", "x" * 300).status == 413


def test_a_bad_config_changes_nothing_and_says_why(daemon):
    stack = daemon("a").start()
    assert stack.ask("a").status == 200
    before = engines(stack)
    good = stack.config_file.read_text()
    stack.config_file.write_text(good.replace('"max_tokens"', "").replace('"port"', '"prot"'))
    done = stack.ctl("reload")
    assert done.returncode == 2
    assert "unknown key" in done.stderr
    assert "prot" in done.stderr
    assert stack.ctl("config", "diff").returncode == 2
    assert (engines(stack), models(stack)) == (before, ["a"])
    stack.process.send_signal(signal.SIGHUP)
    until(lambda: "the config is not reloaded" in stack.log.read_text(), "the log says why")
    assert stack.ask("a").status == 200


def test_sighup_reloads(daemon):
    stack = daemon("a").start()
    stack.models["b"] = {}
    stack.write_config()
    stack.process.send_signal(signal.SIGHUP)
    until(lambda: models(stack) == ["a", "b"], "the new model is there")
    assert "the config is reloaded: 1 changes\n  models.b is added" in stack.log.read_text()


def test_a_sighup_during_the_warm_up_reloads_after_it(daemon):
    stack = daemon(top={"warmup": True}, a={"env": {"LLMUX_SIM_SCALE": "0.1"}}).start(wait=False)
    until(stack.socket.exists, "it warms up")
    stack.models["b"] = {}
    stack.write_config()
    stack.process.send_signal(signal.SIGHUP)
    until(lambda: "SIGHUP while starting" in stack.log.read_text(), "it is heard")
    until(stack.serves, "it serves")
    until(lambda: models(stack) == ["a", "b"], "the new model is there")


def test_what_a_reload_would_do_is_shown_and_not_done(daemon):
    stack = daemon("a", a={"env": {"HF_TOKEN": "secret-1"}}).start()
    stack.models["a"] = {"env": {"HF_TOKEN": "secret-2"}}
    stack.port += 1
    stack.write_config()
    done = stack.ctl("--json", "config", "diff")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["problems"] == []
    assert shown["file"] == str(stack.config_file)
    changes = {change["path"]: change for change in shown["changes"]}
    assert changes["port"] == {
        "path": "port",
        "change": "changed",
        "old": stack.port - 1,
        "new": stack.port,
        "effect": "restart",
    }
    assert changes["models.a.env.HF_TOKEN"]["effect"] == "when idle"
    assert "secret" not in done.stdout
    stack.port -= 1
    assert stack.get("/health").status == 200


def test_a_queue_for_a_removed_model_is_served(daemon):
    stack = daemon("b", a=SLOW_TOKENS).start()
    assert stack.ask("a").status == 200
    events = stack.stream("a", tokens=60).events()
    next(events)
    stack.fault("a", "hang_generation")
    waiting = Caller(lambda: stack.ask("b"))
    until(lambda: stack.model("b")["queued"] == 1, "b's request waits")
    del stack.models["b"]
    reload(stack)
    stack.fault("a", "")
    assert list(events)[-1] == "[DONE]"
    assert waiting.result().status == 200

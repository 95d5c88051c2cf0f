"""What differs between two configs, and when it counts."""

from __future__ import annotations

from typing import Any

import pytest

from llmuxd.config import Change, Effect, changes, parse_config
from llmuxd.config.schema import KEYS

BASE: dict[str, Any] = {"models": {"a": {"model_path": "p"}, "my.model": {"model_path": "q"}}}


def differ(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    return changes(parse_config(old, environ={}), parse_config(new, environ={}))


def test_the_same_config_has_none():
    assert differ(BASE, BASE) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"port": 3001}, Change("port", "changed", Effect.RESTART, 3000, 3001)),
        ({"metrics_port": 0}, Change("metrics_port", "changed", Effect.RESTART, 9090, 0)),
        ({"max_queue": 5}, Change("max_queue", "changed", Effect.NOW, 1024, 5)),
        ({"max_connections": 5}, Change("max_connections", "changed", Effect.NOW, 4096, 5)),
        ({"max_head_bytes": 5}, Change("max_head_bytes", "changed", Effect.NOW, 65536, 5)),
        ({"head_timeout_secs": 5}, Change("head_timeout_secs", "changed", Effect.NOW, 30.0, 5.0)),
        ({"body_timeout_secs": 5}, Change("body_timeout_secs", "changed", Effect.NOW, 30.0, 5.0)),
        ({"send_timeout_secs": 5}, Change("send_timeout_secs", "changed", Effect.NOW, 120.0, 5.0)),
        ({"cors_origins": ["*"]}, Change("cors_origins", "changed", Effect.NOW, [], ["*"])),
        ({"access_log": False}, Change("access_log", "changed", Effect.NOW, True, False)),
        ({"vllm_command": "v"}, Change("vllm_command", "changed", Effect.WHEN_IDLE, ["vllm"], ["v"])),
        (
            {"policy": {"policy_type": "fifo", "min_active_secs": 0}},
            Change("policy.policy_type", "changed", Effect.NOW, "tenure", "fifo"),
        ),
    ],
)
def test_a_key_at_the_top(change, expected):
    assert differ(BASE, {**BASE, **change}) == [expected]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_path": "other"}, Change("models.a.model_path", "changed", Effect.WHEN_IDLE, "p", "other")),
        ({"env": {"X": "1"}}, Change("models.a.env.X", "added", Effect.WHEN_IDLE, None, "1")),
        ({"env": {"HF_TOKEN": "s"}}, Change("models.a.env.HF_TOKEN", "added", Effect.WHEN_IDLE, None, "***")),
        ({"aliases": ["b"]}, Change("models.a.aliases", "changed", Effect.WHEN_IDLE, [], ["b"])),
        ({"priority": 2}, Change("models.a.priority", "changed", Effect.NOW, 1.0, 2.0)),
        (
            {"eviction": "offload+stop"},
            Change("models.a.eviction", "changed", Effect.NOW, "offload+keep_running", "offload+stop"),
        ),
    ],
)
def test_a_key_of_a_model(change, expected):
    models = {**BASE["models"], "a": {"model_path": "p", **change}}
    assert differ(BASE, {"models": models}) == [expected]


def test_a_secret_that_differs_is_seen_and_not_shown():
    def config(token: str) -> dict[str, Any]:
        return {"models": {"a": {"model_path": "p", "env": {"HF_TOKEN": token}}}}

    assert differ(config("one"), config("two")) == [
        Change("models.a.env.HF_TOKEN", "changed", Effect.WHEN_IDLE, "***", "***")
    ]


def test_keys_of_clients_go_by_their_names():
    alice, bob = ({"name": name, "sha256": name[0] * 64} for name in ("alice", "bob"))
    assert differ({"keys": [alice, bob]}, {"keys": [bob, alice]}) == []
    assert differ({"keys": [alice, bob]}, {"keys": [{**alice, "sha256": "0" * 64}, {**bob, "max_parallel": 3}]}) == [
        Change("keys.alice.sha256", "changed", Effect.NOW, "***", "***"),
        Change("keys.bob.max_parallel", "changed", Effect.NOW, None, 3),
    ]
    assert differ({"keys": [alice]}, {"keys": [bob]}) == [
        Change("keys.alice", "removed", Effect.NOW),
        Change("keys.bob", "added", Effect.NOW),
    ]


def test_a_model_that_comes_or_goes_is_one_difference():
    assert differ(BASE, {"models": {"a": {"model_path": "p"}, "new": {"model_path": "r"}}}) == [
        Change('models."my.model"', "removed", Effect.WHEN_IDLE),
        Change("models.new", "added", Effect.NOW),
    ]


def test_one_is_said_in_a_sentence():
    assert str(Change("models.a", "added", Effect.NOW)) == "models.a is added"
    assert str(Change("port", "changed", Effect.RESTART)) == "port is changed, with the next restart of llmuxd"
    assert str(Change("models.a.env", "changed", Effect.WHEN_IDLE)).endswith(", when its engine is next idle")


def test_the_keys_that_are_told_to_wait_are_keys():
    """A key that is renamed must not lose its effect."""
    from llmuxd.config import diff

    names = {key.path.replace("*", "a") for key in KEYS}
    for pattern in ("port", "listen", "metrics_port", "control_socket", "control_read_group"):
        assert diff._RESTART.fullmatch(pattern)
        assert pattern in names
    idle = {name for name in names if diff._WHEN_IDLE.fullmatch(name)}
    assert idle == {
        "vllm_command",
        "models.a.model_path",
        "models.a.port",
        "models.a.extra_args",
        "models.a.aliases",
        "models.a.env",
        "models.a.checkpoint_path",
    }

"""The words that a shell may complete to, by click's own protocol: no shell, and a daemon in name only."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmuxctl import words
from llmuxd.core.eviction import ProcessStrategy, WeightStrategy
from tests.unit.ctl_daemon import Daemon, daemon

MODELS = ["qwen", "mistral", "a:b c", "gpt-4o"]


@pytest.fixture(name="served", scope="module")
def _served() -> Iterator[Daemon]:
    with daemon() as served:
        yield served


def _complete(line: list[str], incomplete: str, shell: str = "bash", socket: Path | str = "/nonexistent") -> list[str]:
    """What `llmuxctl` answers to a shell's question; nothing else may be printed."""
    given = {
        "_LLMUXCTL_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": " ".join(["llmuxctl", *line, incomplete]),
        "COMP_CWORD": incomplete if shell == "fish" else str(len(line) + 1),
        "LLMUX_CONTROL_SOCKET": str(socket),
    }
    done = subprocess.run(
        [sys.executable, "-m", "llmuxctl"],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1] if done.stdout.strip() else []


def _plain(answer: list[str]) -> list[str]:
    return [line.removeprefix("plain,") for line in answer]


@pytest.mark.parametrize("command", ["switch", "wake", "sleep", "stop", "pin", "logs", "eviction", "warmup"])
def test_every_model_argument_is_completed(served: Daemon, command: str) -> None:
    assert _plain(_complete([command], "", socket=served.socket)) == MODELS
    assert _plain(_complete([command], "mi", socket=served.socket)) == ["mistral"]


def test_of_several_models_each_is_named_once(served: Daemon) -> None:
    assert "qwen" not in _plain(_complete(["warmup", "qwen"], "", socket=served.socket))


def test_the_socket_on_the_line_counts(served: Daemon) -> None:
    line = ["--socket", str(served.socket), "switch"]
    assert _plain(_complete(line, "q")) == ["qwen"]
    assert _plain(_complete(["switch", "--json"], "q", socket=served.socket)) == ["qwen"]


def test_evictions_modes_options_and_files(served: Daemon) -> None:
    assert _plain(_complete(["eviction", "qwen"], "", socket=served.socket)) == ["auto", *words.EVICTIONS]
    assert _plain(_complete(["validate", "qwen", "--policies"], "retain+stop,discard+s")) == [
        "retain+stop,discard+stop"
    ]
    assert "retain+stop,retain+stop" not in _plain(_complete(["validate", "qwen", "--policies"], "retain+stop,"))
    assert _plain(_complete(["sleep", "qwen", "--eviction"], "discard+s")) == ["discard+stop"]
    assert _plain(_complete(["mode"], "")) == ["auto", "manual"]
    assert "--eviction" in _plain(_complete(["sleep"], "--"))
    assert _complete(["config", "check"], "/etc/ll") == ["file,/etc/ll"]
    assert {"status", "switch", "reload"} <= set(_plain(_complete([], "")))


def test_zsh_and_fish_get_what_they_show_beside_the_names(served: Daemon) -> None:
    zsh = _complete(["switch"], "", "zsh", served.socket)
    assert zsh[:6] == ["plain", "qwen", "awake", "plain", "mistral", "asleep"]
    assert zsh[-3:] == ["plain", "gpt-4o", "alias of qwen"]
    fish = _complete(["switch"], "", "fish", served.socket)
    assert fish[0] == "plain,qwen\tawake"


def test_a_daemon_that_does_not_run_or_answer_costs_no_time(
    tmp_path: Path, served: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _complete(["switch"], "", socket=tmp_path / "none") == []
    for answer in ((200, {}), (500, {"error": "no"}), (200, {"models": [1]}), (200, {"models": {"q": None}})):
        monkeypatch.setitem(served.answers, "GET status", answer)
        assert words._names(str(served.socket)) == {}
    import socket

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(served.socket) + "2")
        silent.listen()
        began = time.monotonic()
        assert words._names(str(served.socket) + "2") == {}
        assert time.monotonic() - began < 1.0


def test_names_that_would_break_a_line_are_left_out(served: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(served.answers, "GET status", (200, {"models": {"a\nb": {"engine": "awake"}}}))
    assert words._names(str(served.socket)) == {}


def test_the_words_of_evictions_are_the_daemons() -> None:
    assert tuple(each.value for each in WeightStrategy) == words.WEIGHTS
    assert tuple(each.value for each in ProcessStrategy) == words.PROCESSES

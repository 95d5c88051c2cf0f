"""How `llmuxctl` shows things: what it escapes, how it says a duration, and layouts that lose no name."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
from rich.console import Console

from llmuxctl import output
from llmuxctl.output import clean, duration, plain_table, show_status

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
NAME = "a-model-with-quite-a-long-name"
NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def _at_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: NOW)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("qwen", "qwen"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\r", "a\\nb\\r"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202ecba", "\\u202ecba"),
        ("naïve 模型", "naïve 模型"),
        ("\udc80", "\\udc80"),
        (17, "17"),
    ],
)
def test_what_could_steer_a_terminal_is_escaped(text: object, shown: str) -> None:
    assert clean(text) == shown


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-1, "0 s"),
        (0.9, "0 s"),
        (59.9, "59 s"),
        (60, "1 m 0 s"),
        (200, "3 m 20 s"),
        (7500, "2 h 5 m"),
        (3 * 86400 + 4 * 3600 + 59, "3 d 4 h"),
    ],
)
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_plain_columns_are_aligned_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    plain_table(("A", "LONG NAME", "C"), [["x" * 40, "1", ""], ["y", "2", "3"]])
    assert capsys.readouterr().out.splitlines() == [
        "A".ljust(40) + "  LONG NAME  C",
        "x" * 40 + "  1",
        "y".ljust(40) + "  2          3",
    ]


def _model(**known: Any) -> dict[str, Any]:
    model = {
        "engine": "awake",
        "in_flight": 3,
        "queued": 12,
        "eviction": "offload+keep_running",
        "asleep_by": None,
        "pid": 4194304,
        "since": NOW - 200,
        "last_error": None,
        "retry_in_secs": None,
    }
    return {**model, **known}


def _status(**models: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "state": "switching:qwen->other",
        "mode": "manual",
        "pinned": "qwen",
        "policy": "fifo",
        "active": ["qwen"],
        "queued": 12,
        "in_flight": 3,
        "uptime_secs": 7500.0,
        "switch": {"id": 5, "to": "other", "from": ["qwen"], "phase": "drain", "seconds": 61.2},
        "models": models,
        "devices": [
            {"name": "gpu0", "capacity": 1, "used": 1, "awake": ["qwen"]},
            {"name": "gpu1", "capacity": 1, "used": 0, "awake": []},
        ],
    }


_ALL = {
    NAME: _model(),
    "other": _model(engine="asleep", asleep_by="discard+keep_running"),
    "bad\x1b[31m": _model(
        engine="failed", pid=None, retry_in_secs=11.2, last_error="[red]it ran out of memory\nthe second line"
    ),
}


def test_the_status_for_a_pipe_has_everything_in_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_status(_status(**_ALL))
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "llmuxd 0.1.0: switching:qwen->other (mode manual, qwen pinned, policy fifo, up 2 h 5 m)",
        "awake: qwen; queued: 12; in flight: 3",
        "switch 5: qwen -> other, drain, 1 m 1 s so far",
        "gpu0: 1 of 1 used (qwen)",
        "gpu1: 0 of 1 used",
        "",
        *shown[6:],
    ]
    rows = [re.split(r"  +", line) for line in shown[6:]]
    assert rows == [
        ["MODEL", "STATE", "IN FLIGHT", "QUEUED", "EVICTION", "PID", "SINCE", "LAST ERROR"],
        [NAME, "awake", "3", "12", "offload+keep_running", "4194304", "3 m 20 s", "-"],
        ["other", "asleep (discard+keep_running)", "3", "12", "offload+keep_running", "4194304", "3 m 20 s", "-"],
        [
            "bad\\x1b[31m",
            "failed (retry in 12 s)",
            "3",
            "12",
            "offload+keep_running",
            "-",
            "3 m 20 s",
            "[red]it ran out of memory",
        ],
    ]


def test_without_a_model_the_status_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    show_status(_status())
    assert capsys.readouterr().out.endswith("No models are configured.\n")


def _on_terminal(width: int, monkeypatch: pytest.MonkeyPatch, models: dict[str, Any] = _ALL) -> str:
    """What a terminal of that width is sent for the models."""
    written = io.StringIO()

    def console(stderr: bool = False) -> Console:
        return Console(file=written, force_terminal=True, width=width, color_system="standard", highlight=False)

    monkeypatch.setattr(output, "console", console)
    rows = [output.model_row(name, model) for name, model in models.items()]
    errors = {clean(name): output.first_line(model["last_error"]) for name, model in models.items()}
    output._show_on_terminal(rows, errors)
    return written.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 90, 100, 115, 140, 250])
def test_no_width_of_a_terminal_loses_anything(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = ESCAPE.sub("", _on_terminal(width, monkeypatch))
    assert "\x1b" not in shown
    assert "…" not in shown
    for name in (NAME, "other", "bad\\x1b[31m"):
        assert sum(line.startswith(name) for line in shown.splitlines()) == 1
    for word in ("awake", "asleep", "failed", "retry in 12 s", "4194304", "3 m 20 s", "keep_running", "discard+"):
        assert word in shown
    assert "last error of bad\\x1b[31m: [red]it ran out of memory\n" in shown


def test_a_table_is_never_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the width of the broken cells and that of the whole lines: broken, aligned, and it fits."""
    models = {"qwen": _ALL[NAME], "other": _ALL["other"]}
    lines = ESCAPE.sub("", _on_terminal(80, monkeypatch, models)).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[:3]] == ["IN", "MODEL", "qwen"]
    assert "discard+" in "".join(lines)


def test_states_have_their_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _on_terminal(140, monkeypatch)
    assert "\x1b[32mawake\x1b[0m" in shown
    assert "\x1b[34masleep (discard+keep_running)\x1b[0m" in shown
    assert "\x1b[31mfailed (retry in 12 s)\x1b[0m" in shown


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.console().no_color
    monkeypatch.setenv("NO_COLOR", "")
    assert not output.console().no_color

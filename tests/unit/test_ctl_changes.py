"""`llmuxctl reload` and `llmuxctl config diff`: how changes, none, and a bad config are told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llmuxctl.changes import one_line, show_changes
from tests.unit.ctl_daemon import Daemon, Said, daemon, run

CHANGES = [
    {"path": "models.new", "change": "added", "old": None, "new": {"model_path": "/m"}, "effect": "now"},
    {"path": "models.old", "change": "removed", "old": {"model_path": "/o"}, "new": None, "effect": "now"},
    {"path": "models.qwen.extra_args", "change": "changed", "old": ["-a"], "new": ["-b"], "effect": "when idle"},
    {"path": "models.whole", "change": "removed", "old": None, "new": None, "effect": "when idle"},
    {"path": "port", "change": "changed", "old": 3000, "new": 3001, "effect": "restart"},
]
LINES = [
    'models.new: added, {"model_path": "/m"} (at once)',
    'models.old: removed, was {"model_path": "/o"} (at once)',
    'models.qwen.extra_args: ["-a"] -> ["-b"] (when its engine is idle)',
    "models.whole: removed (when its engine is idle)",
    "port: 3000 -> 3001 (only with a restart of llmuxd)",
]
PROBLEMS = ["/etc/llmux/llmux.toml: prt: unknown key", "/etc/llmux/llmux.toml: port: found \x1b[31m"]


@pytest.fixture(name="served")
def _served() -> Iterator[Daemon]:
    with daemon() as served:
        yield served


@pytest.fixture(name="ctl")
def _ctl(served: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    return lambda *arguments: run(capsys, monkeypatch, served.socket, *arguments)


def _diff(changes: list[Any], problems: list[str]) -> tuple[int, Any]:
    return 200, {"file": "/etc/llmux/llmux.toml", "changes": changes, "problems": problems}


def test_a_reload_tells_each_change(served: Daemon, ctl: Callable[..., Said]) -> None:
    told = {"event": "change", "text": "port is changed"}
    steps = [{"event": "reload", "text": "reading"}, told, {"result": "ok", "message": "reloaded", "changes": CHANGES}]
    served.answers["POST reload"] = (200, steps)
    said = ctl("reload")
    assert (said.code, said.out.splitlines(), said.err) == (0, [*LINES, "reloaded"], "reading\n")
    said = ctl("reload", "--json")
    assert (said.code, [json.loads(line) for line in said.out.splitlines()]) == (0, steps)


def test_a_reload_of_a_bad_config_tells_every_problem(served: Daemon, ctl: Callable[..., Said]) -> None:
    failed = {"result": "failed", "status": 400, "error": "\n".join(PROBLEMS)}
    served.answers["POST reload"] = (200, [failed])
    said = ctl("reload")
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines() == [PROBLEMS[0], PROBLEMS[1].replace("\x1b", "\\x1b")]
    said = ctl("--json", "reload")
    assert (said.code, json.loads(said.out), said.err) == (2, failed, "")


def test_a_diff_reads_like_one(served: Daemon, ctl: Callable[..., Said]) -> None:
    served.answers["GET config/diff"] = _diff(CHANGES, [])
    said = ctl("config", "diff")
    assert (said.code, said.err) == (0, "")
    assert said.out == (
        "/etc/llmux/llmux.toml: a reload would make 5 changes\n"
        '\nmodels.new  (at once)\n  + {"model_path": "/m"}\n'
        '\nmodels.old  (at once)\n  - {"model_path": "/o"}\n'
        '\nmodels.qwen.extra_args  (when its engine is idle)\n  - ["-a"]\n  + ["-b"]\n'
        "\nmodels.whole  (when its engine is idle)\n  - removed\n"
        "\nport  (only with a restart of llmuxd)\n  - 3000\n  + 3001\n"
    )
    assert json.loads(ctl("config", "diff", "--json").out) == served.answers["GET config/diff"][1]
    assert served.asked == ["GET config/diff"] * 2


def test_no_changes(served: Daemon, ctl: Callable[..., Said]) -> None:
    served.answers["GET config/diff"] = _diff([], [])
    said = ctl("config", "diff")
    assert (said.code, said.out) == (0, "/etc/llmux/llmux.toml: no changes\n")


def test_a_diff_of_a_bad_config(served: Daemon, ctl: Callable[..., Said]) -> None:
    served.answers["GET config/diff"] = _diff([], PROBLEMS)
    said = ctl("config", "diff")
    assert (said.code, said.out, "\x1b" in said.err) == (2, "", False)
    assert said.err.splitlines()[0] == PROBLEMS[0]
    said = ctl("config", "diff", "--json")
    assert (said.code, json.loads(said.out)["problems"], said.err) == (2, PROBLEMS, "")


def test_colours_only_on_a_terminal_that_wants_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show_changes("f", CHANGES[-1:])
    assert "\x1b[31m  - 3000\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    show_changes("f", CHANGES[-1:])
    assert "\x1b" not in capsys.readouterr().out


def test_what_the_daemon_says_cannot_steer_the_terminal() -> None:
    hostile = {"path": "models.\x1b[1m", "change": "changed", "old": "\x1b]0;\x07", "new": None, "effect": "\x9b"}
    assert one_line(hostile) == 'models.\\x1b[1m: "\\u001b]0;\\u0007" -> unset (\\x9b)'
    assert one_line("a line\x07") == "a line\\x07"

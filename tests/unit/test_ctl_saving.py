"""What `llmuxctl checkpoint`, `restore` and `validate` send to a daemon, and what they make of its answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llmuxctl.commands.saving import COLUMNS
from llmuxd.protocol import Exit
from llmuxd.validation import Row
from tests.unit.ctl_daemon import Daemon, Said, daemon, run

SAVED = {"result": "ok", "message": "qwen is checkpointed: 2.3 GB in 7.1 s, in /images/qwen/1", "size": 2_300_000_000}
GOOD = Row("offload+keep_running", 1.25, 2.0, 9000, 500, 9000, True)
BAD = Row("discard+cuda_suspend", None, None, 9000, None, None, None, "it was \x1b[31mstopped\nand more")

Ctl = Callable[..., Said]


@pytest.fixture(name="served")
def _served() -> Iterator[Daemon]:
    with daemon() as served:
        yield served


@pytest.fixture(name="ctl")
def _ctl(served: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ctl:
    return lambda *arguments: run(capsys, monkeypatch, served.socket, *arguments)


def _sent(served: Daemon) -> dict[str, Any]:
    body: dict[str, Any] = served.bodies[-1]
    return body


def _validated(*rows: Row) -> list[dict[str, Any]]:
    """A daemon's answer."""
    steps = [{"event": "validated", **row.as_json(), "text": f"{row.eviction}: tried"} for row in rows]
    shown = {"rows": [row.as_json() for row in rows]}
    failed = [row for row in rows if not row.passed]
    message = f"{len(rows) - len(failed)} of {len(rows)} policies passed"
    if failed:
        return [*steps, {"result": "failed", "status": 500, "error": f"qwen: {message}", **shown}]
    return [*steps, {"result": "ok", "message": message, **shown}]


@pytest.mark.parametrize(
    ("arguments", "call", "body"),
    [
        (["checkpoint", "qwen"], "checkpoint", {"model": "qwen"}),
        (
            ["checkpoint", "qwen", "--eviction", "retain+checkpoint", "--no-warmup"],
            "checkpoint",
            {"model": "qwen", "eviction": "retain+checkpoint", "warmup": False},
        ),
        (["restore", "qwen"], "restore", {"model": "qwen"}),
        (["restore", "qwen", "--detached"], "restore", {"model": "qwen", "detached": True}),
        (["validate", "qwen"], "validate", {"model": "qwen"}),
        (
            ["validate", "qwen", "--policies", "retain+stop, discard+stop,"],
            "validate",
            {"model": "qwen", "policies": ["retain+stop", "discard+stop"]},
        ),
        (["validate", "qwen", "--policies", ""], "validate", {"model": "qwen", "policies": []}),
    ],
)
def test_what_is_sent(served: Daemon, ctl: Ctl, arguments: list[str], call: str, body: dict[str, Any]) -> None:
    served.answers[f"POST {call}"] = (200, [{"result": "ok", "message": "done"}])
    assert ctl(*arguments).code == Exit.DONE
    assert _sent(served) == body


def test_steps_are_told_beside_the_result(served: Daemon, ctl: Ctl) -> None:
    steps = [{"event": "image", "text": "qwen: saved 2.3 GB in 7.1 s to /images/qwen/1"}, SAVED]
    served.answers["POST checkpoint"] = (200, steps)
    said = ctl("checkpoint", "qwen")
    assert (said.code, said.out, said.err) == (0, f"{SAVED['message']}\n", f"{steps[0]['text']}\n")
    as_json = ctl("checkpoint", "qwen", "--json")
    assert [json.loads(line) for line in as_json.out.splitlines()] == steps
    assert as_json.err == ""


@pytest.mark.parametrize("command", ["checkpoint", "restore", "validate"])
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ((404, {"error": "no model 'qwen'", "known": []}), Exit.NO_SUCH_MODEL),
        ((400, {"error": "use discard+checkpoint"}), Exit.USAGE),
        ((403, {"error": "mistral is pinned"}), Exit.NOT_ALLOWED),
        ((200, [{"result": "failed", "status": 500, "error": "the disk is full"}]), Exit.FAILED),
        ((200, [{"result": "failed", "status": 403, "error": "mistral is pinned"}]), Exit.NOT_ALLOWED),
        ((200, [{"event": "image", "text": "saving"}]), Exit.FAILED),
    ],
)
def test_how_they_fail(served: Daemon, ctl: Ctl, command: str, answer: Any, code: Exit) -> None:
    served.answers[f"POST {command}"] = answer
    said = ctl(command, "qwen")
    body = answer[1][-1] if isinstance(answer[1], list) else answer[1]
    assert (said.code, said.out) == (code, "")
    assert body.get("error", "broke off") in said.err
    assert ctl(command, "qwen", "--json").code == code


def test_a_table_with_a_row_for_each_policy(served: Daemon, ctl: Ctl) -> None:
    served.answers["POST validate"] = (200, _validated(GOOD))
    said = ctl("validate", "qwen")
    assert (said.code, said.err) == (0, "offload+keep_running: tried\n")
    head, row, summary = said.out.splitlines()
    assert tuple(word.strip() for word in head.split("  ") if word.strip()) == COLUMNS
    assert row.split() == ["offload+keep_running", "1.25", "2.00", "9000", "500", "9000", "yes", "yes"]
    assert summary == "1 of 1 policies passed"


def test_what_did_not_pass_is_explained_below_the_table_and_is_1(served: Daemon, ctl: Ctl) -> None:
    served.answers["POST validate"] = (200, _validated(GOOD, BAD))
    said = ctl("validate", "qwen")
    lines = said.out.splitlines()
    assert said.code == Exit.FAILED
    assert lines[2].split() == ["discard+cuda_suspend", "-", "-", "9000", "-", "-", "-", "NO"]
    assert lines[3:] == ["discard+cuda_suspend: it was \\x1b[31mstopped\\nand more"]
    assert said.err.splitlines()[-1] == "qwen: 1 of 2 policies passed"


def test_as_json_the_rows_are_in_the_last_line(served: Daemon, ctl: Ctl) -> None:
    for rows, code in (([GOOD], Exit.DONE), ([GOOD, BAD], Exit.FAILED)):
        served.answers["POST validate"] = (200, _validated(*rows))
        said = ctl("validate", "qwen", "--json")
        assert (said.code, said.err) == (code, "")
        assert json.loads(said.out.splitlines()[-1])["rows"] == [row.as_json() for row in rows]


@pytest.mark.parametrize("command", ["checkpoint", "restore", "validate"])
def test_help_has_examples_that_begin_with_the_command(ctl: Ctl, command: str) -> None:
    said = ctl(command, "--help")
    assert said.code == 0
    assert said.out.count(f"  llmuxctl {command} qwen") == 2

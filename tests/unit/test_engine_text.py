"""What is read out of an engine's log and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmuxd.engine import tail_lines
from llmuxd.engine.api import _message, can_park
from llmuxd.engine.errors import log_says_out_of_memory


def test_tail_of_a_missing_and_of_an_empty_file(tmp_path: Path) -> None:
    assert tail_lines(tmp_path / "none", 5) == []
    (tmp_path / "empty").touch()
    assert tail_lines(tmp_path / "empty", 5) == []


@pytest.mark.parametrize("end", ["", "\n"])
def test_tail_lines(tmp_path: Path, end: str) -> None:
    path = tmp_path / "log"
    path.write_text("one\ntwo\r\nthree" + end)
    assert tail_lines(path, 0) == []
    assert tail_lines(path, 2) == ["two", "three"]
    assert tail_lines(path, 9) == ["one", "two", "three"]


def test_tail_goes_back_over_many_blocks(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [f"{number} " + "x" * 997 for number in range(500)]
    path.write_text("\n".join(lines) + "\n")
    assert tail_lines(path, 200) == lines[-200:]


def test_tail_begins_at_the_start_of_an_incarnation(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    start = path.stat().st_size
    assert tail_lines(path, 9, start) == []
    with path.open("a") as file:
        file.write("after\n")
    assert tail_lines(path, 9, start) == ["after"]
    path.write_text("new\n")
    assert tail_lines(path, 9, start) == ["new"]


def test_tail_survives_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\xff\xfe\nok\n")
    assert tail_lines(path, 1) == ["ok"]
    assert len(tail_lines(path, 2)) == 2


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", True),
        ("CUDA Error: out of memory at csrc/cumem_allocator.cpp:62", True),
        ("ValueError: Free memory on device cuda:0 (1.0/24.0 GiB) on startup is less than desired", True),
        ("WARNING this setting may lead to running out of memory", False),
        ("ERROR unknown architecture", False),
    ],
)
def test_out_of_memory_in_a_log(line: str, verdict: bool) -> None:
    assert log_says_out_of_memory(["INFO starting", line]) is verdict


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("0.32.0+cpu", True), ("0.17.0", True), ("0.16.1", False), ("1.0", True), ("dev", False), (None, False)],
)
def test_parking_came_with_0_17(version: str | None, verdict: bool) -> None:
    assert can_park(version) is verdict


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"error": {"message": "no such\\nmodel", "code": 404}}', "no such model"),
        ('{"error": "Invalid"}', "Invalid"),
        ('{"detail": "Not Found"}', "Not Found"),
        ("Internal Server Error", "Internal Server Error"),
        ("[1]", "[1]"),
        ("", "nothing"),
        ("x" * 1000, "x" * 300),
    ],
)
def test_message_of_an_error_answer(text: str, shown: str) -> None:
    assert _message(text) == shown

"""What nvidia-smi's answers are taken for."""

from __future__ import annotations

import asyncio

import pytest

from llmuxd.config.ranks import parallel_size
from llmuxd.engine.device_memory import held_by, left_by, used_mib


def test_the_sum_over_devices_of_these_processes() -> None:
    assert held_by([7, 8], "7, 100\n7, 20\n8, 3\n9, 5000\n") == 123
    assert held_by([7], "") == 0
    assert held_by([7], "8, [N/A]\n7, 100\n") == 100


@pytest.mark.parametrize("said", ["7, [N/A]\n", "7, 5\n7, [Insufficient Permissions]\n", "No devices were found\n"])
def test_what_cannot_be_measured(said: str) -> None:
    assert held_by([7], said) is None


@pytest.mark.parametrize("program", ["/nowhere/nvidia-smi", "false"])
def test_no_driver(program: str) -> None:
    assert asyncio.run(used_mib([7], program)) is None


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        ([], 1),
        (["-tp", "2"], 2),
        (["--tensor-parallel-size=4", "--pipeline-parallel-size", "2"], 8),
        (["--tensor_parallel_size", "2", "-pp=3"], 6),
        (["-tp"], 1),
    ],
)
def test_how_many_ranks(arguments: list[str], ranks: int) -> None:
    assert parallel_size(arguments) == ranks


def test_what_is_left_by_processes_that_are_gone_is_waited_for(tmp_path, monkeypatch):
    said = tmp_path / "said"
    said.write_text("77, 300\n")
    program = tmp_path / "nvidia-smi"
    # The driver frees it while it is asked for the third time.
    program.write_text(
        f'#!/bin/sh\ncat {said}\necho x >> {said}.asked\n[ "$(wc -l < {said}.asked)" -lt 2 ] || echo "77, 0" > {said}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert asyncio.run(left_by({77}, 10.0)) == 0
    said.write_text("77, 300\n")
    (tmp_path / "said.asked").unlink()
    assert asyncio.run(left_by({77}, 0.0)) == 300
    assert asyncio.run(left_by({78}, 0.0)) == 0

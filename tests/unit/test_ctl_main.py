"""The entry point of `llmuxctl`: what becomes of failures that no command expects."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.unit.ctl_daemon import daemon


@pytest.mark.parametrize("arguments", [["status"], ["status", "--json"], ["doctor", "--json"], ["events"]])
def test_an_output_that_cannot_be_written_is_told_in_a_sentence(arguments: list[str]) -> None:
    with daemon() as served, open("/dev/full", "w") as full:
        served.answers["GET events"] = (200, [{"event": "engine", "text": "qwen: awake"}])
        done = subprocess.run(
            [sys.executable, "-m", "llmuxctl", "--socket", str(served.socket), *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=20,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "llmuxctl: No space left on device\n")

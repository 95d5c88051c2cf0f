"""The completion files in packaging/completion: bash's in a real bash; zsh's and fish's ask as click's protocol says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmuxctl.words import EVICTIONS
from tests.unit.ctl_daemon import Daemon, daemon

FILES = Path(__file__).parents[2] / "packaging" / "completion"
NAMES = ("{}.bash", "_{}", "{}.fish")

ASK = """
. "$1"
COMP_LINE=$3 COMP_POINT=${#3}
_"$2"_completion "$2"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(name="served", scope="module")
def _served() -> Iterator[Daemon]:
    with daemon() as served:
        yield served


@pytest.fixture(name="bash")
def _bash(served: Daemon, tmp_path: Path) -> Callable[[str], list[str]]:
    for name in ("llmuxctl", "llmuxd"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\nexec {sys.executable} -c \'import sys; sys.argv[0] = "{name}"; '
            f'from {name}.cli import main; main()\' "$@"\n'
        )
        program.chmod(0o755)

    def ask(line: str) -> list[str]:
        program = line.split()[0]
        done = subprocess.run(
            ["bash", "--norc", "-c", ASK, "bash", str(FILES / f"{program}.bash"), program, line],
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LLMUX_CONTROL_SOCKET": str(served.socket)},
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout.split("\n")[:-1]

    return ask


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("llmuxctl switch ", ["qwen", "mistral", "a:b\\ c", "gpt-4o"]),
        ("llmuxctl switch g", ["gpt-4o"]),
        ("llmuxctl switch a:", ["b\\ c"]),
        ("llmuxctl warmup a:b\\ c q", ["qwen"]),
        ('llmuxctl warmup "a:b c" qwen ', ["mistral", "gpt-4o"]),
        ("llmuxctl sleep qwen --eviction discard+s", ["discard+stop"]),
        ("llmuxctl eviction qwen ", ["auto", *EVICTIONS]),
        ("llmuxctl checkpoint qwen --eviction discard+c", ["discard+cuda_suspend", "discard+checkpoint"]),
        ("llmuxctl mode ", ["auto", "manual"]),
        ("llmuxctl config ", ["check", "diff", "show"]),
        ("llmuxctl key ", ["new"]),
        ("llmuxctl key new alice --models mistral --models g", ["gpt-4o"]),
        ("llmuxctl key new alice --max", ["--max-parallel"]),
        ("llmuxctl rel", ["reload"]),
        ("llmuxd --log-level ", ["debug", "info", "warning", "error"]),
        ("llmuxd --con", ["--config"]),
    ],
)
def test_bash(bash: Callable[[str], list[str]], line: str, words: list[str]) -> None:
    assert [word.replace("\\+", "+") for word in bash(line)] == words


def test_a_shell_that_starts_runs_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "--norc", "-c", '. "$0"; complete -p llmuxctl', str(FILES / "llmuxctl.bash")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
        executable="/bin/bash",
    )
    assert (done.stdout, done.stderr) == ("complete -o nosort -F _llmuxctl_completion llmuxctl\n", "")


@pytest.mark.parametrize("name", NAMES)
def test_the_files_of_the_daemon_are_those_of_the_client_under_its_name(name: str) -> None:
    client = (FILES / name.format("llmuxctl")).read_text()
    daemons = (FILES / name.format("llmuxd")).read_text()
    assert daemons == client.replace("llmuxctl", "llmuxd").replace("LLMUXCTL", "LLMUXD")


@pytest.mark.parametrize("name", NAMES)
def test_each_asks_in_a_protocol_that_click_speaks(name: str) -> None:
    from click.shell_completion import get_completion_class

    text = (FILES / name.format("llmuxctl")).read_text()
    asked = re.findall(r"_LLMUXCTL_COMPLETE=(\w+)_complete", text)
    assert len(asked) == 1
    assert get_completion_class(asked[0]) is not None
    assert {"COMP_WORDS=", "COMP_CWORD="} <= set(re.findall(r"COMP_C?WORDS?=", text))

"""The program CRIU as it is called: what it is given, what is made of what it says, and that it never outlives a call."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmuxd.engine import without_io_uring
from llmuxd.engine.criu import Criu, CriuError
from llmuxd.engine.process import kill_marked
from tests.integration.engine_bench import until

SECS = 20.0
IO_URING = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
parameters = ctypes.create_string_buffer(256)
print(libc.syscall(425, 1, parameters), ctypes.get_errno(), sys.argv[1:])
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    made = tmp_path / "criu"
    made.mkdir()
    return made


def program(folder: Path, script: str) -> str:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_dump_names_the_tree_and_the_images_and_its_log(tmp_path: Path, images: Path) -> None:
    criu = Criu(program(tmp_path, 'echo "$@" >"$3/argv"'))
    asyncio.run(criu.dump(42, images, SECS))
    argv = (images / "argv").read_text().split()
    assert argv[:5] == ["dump", "--images-dir", str(images), "--log-file", "dump.log"]
    assert argv[-2:] == ["--tree", "42"]
    assert "--leave-running" not in argv
    assert "--libdir" not in argv


@pytest.mark.parametrize(("uid", "said"), [(0, False), (1000, True)])
def test_who_is_not_root_says_so(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, uid: int, said: bool
) -> None:
    """The real one refuses everything else; tests/deb has it under a user of its own."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    criu = Criu(program(tmp_path, 'echo "$@" >"$3/argv"'))
    asyncio.run(criu.dump(42, images, SECS))
    assert ("--unprivileged" in (images / "argv").read_text()) is said


def test_cudas_plugin_is_named_where_it_is(tmp_path: Path, images: Path) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    (plugins / "cuda_plugin.so").touch()
    criu = Criu(program(tmp_path, 'echo "$@" >"$3/argv"'), str(plugins))
    asyncio.run(criu.dump(42, images, SECS))
    assert f"--libdir {plugins}" in (images / "argv").read_text()


def test_a_restore_is_marked_entered_and_gives_the_pid(tmp_path: Path, images: Path) -> None:
    script = 'for last; do :; done; echo 77 >"$last"; echo "$MARK, $OWNER" >"$3/mark"'
    entered: list[int] = []
    criu = Criu(program(tmp_path, script), mark={"OWNER": "us"})
    assert asyncio.run(criu.restore(images, SECS, {"MARK": "it"}, entered.append)) == 77
    assert (images / "mark").read_text() == "it, us\n"
    assert len(entered) == 1


def test_a_failure_says_the_last_errors_of_its_log(tmp_path: Path, images: Path) -> None:
    script = "\n".join(
        [
            "{",
            'echo "(00.1) Error (criu/util.c:1534): rlimit: Can\'t setup RLIMIT_NOFILE for self: Operation not permitted"',
            'echo "(00.2) Error (criu/sk-unix.c:881): unix: Can\'t dump half of stream unix connection."',
            'echo "(00.3) Unlock network"',
            '} >"$3/dump.log"; exit 1',
        ]
    )
    with pytest.raises(CriuError) as raised:
        asyncio.run(Criu(program(tmp_path, script)).dump(42, images, SECS))
    assert raised.value.reason.startswith("criu dump failed (1): (00.2) Error (criu/sk-unix.c:881)")
    assert "RLIMIT" not in raised.value.reason
    assert not raised.value.interrupted


def test_a_failure_without_a_log_says_what_was_printed(tmp_path: Path, images: Path) -> None:
    with pytest.raises(CriuError, match=r"failed \(2\): no such option"):
        asyncio.run(Criu(program(tmp_path, "echo no such option >&2; exit 2")).dump(42, images, SECS))


def test_a_program_that_is_not_there_is_named_with_the_key(images: Path) -> None:
    with pytest.raises(CriuError, match=r"'/nonexistent/criu' cannot be executed: .*; see checkpoint\.criu_path"):
        asyncio.run(Criu("/nonexistent/criu").dump(42, images, SECS))
    with pytest.raises(CriuError, match=r"see checkpoint\.criu_path"):
        asyncio.run(Criu("/nonexistent/criu").version())


def test_one_that_was_killed_was_interrupted(tmp_path: Path, images: Path) -> None:
    with pytest.raises(CriuError, match="was killed by signal 9") as raised:
        asyncio.run(Criu(program(tmp_path, "kill -9 $$")).dump(42, images, SECS))
    assert raised.value.interrupted


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_call_that_is_cancelled_or_out_of_time_ends_the_program_and_its_helpers(
    tmp_path: Path, images: Path, cancelled: bool
) -> None:
    criu = Criu(program(tmp_path, 'sleep 300 & echo $! >"$3/helper.new"; mv "$3/helper.new" "$3/helper"; wait'))
    helper = images / "helper"

    async def cancel() -> None:
        task = asyncio.ensure_future(criu.dump(42, images, SECS))
        assert await until(helper.exists, SECS)
        task.cancel()
        await task

    if cancelled:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancel())
    else:
        with pytest.raises(CriuError, match="not done within 1 s") as raised:
            asyncio.run(criu.dump(42, images, 1.0))
        assert raised.value.interrupted
    assert ends(int(helper.read_text()))


def ends(pid: int) -> bool:
    """Whether the process is gone, or soon will be; an orphan is process 1's to reap."""
    deadline = time.monotonic() + SECS
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, with a child, and without a mark: as one whose environment is unreadable."""
    script = "sleep 300 & sleep 300"
    with subprocess.Popen(["sh", "-c", script], start_new_session=True) as process:
        yield process
        process.kill()


def test_what_has_no_mark_is_ended_by_its_old_number_alone(stranger: subprocess.Popen[bytes]) -> None:
    assert kill_marked(b"NOBODY_HAS_THIS=1\0", (), ()) == []
    assert stranger.poll() is None
    assert stranger.pid in kill_marked(b"NOBODY_HAS_THIS=1\0", (), (), stranger.pid)
    assert stranger.wait(SECS) == -9


def test_a_command_runs_without_io_uring_under_the_same_pid() -> None:
    argv = [sys.executable, "-I", without_io_uring.__file__, sys.executable, "-c", IO_URING, "an argument"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        said, _ = process.communicate(timeout=SECS)
    assert said == "-1 38 ['an argument']\n"  # ENOSYS
    assert process.returncode == 0


def test_the_filter_is_inherited_and_leaves_everything_else_alone() -> None:
    script = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {IO_URING!r}], check=True)"
    argv = [sys.executable, "-I", without_io_uring.__file__, sys.executable, "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SECS, check=True, env=dict(os.environ))
    assert done.stdout.startswith("-1 38 ")
    assert done.stderr == ""

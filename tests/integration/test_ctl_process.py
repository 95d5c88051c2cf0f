"""`llmuxctl` as a process: terminals, Ctl-C, readers that leave, and how little it imports."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.integration.ctl_stack import DEADLINE_SECS, Served, served, until

COLOUR = re.compile(r"\x1b\[3[0-9]m")


@pytest.fixture(name="stack")
def _stack() -> Iterator[Served]:
    with served() as stack:
        yield stack


class Running:
    """A process of `llmuxctl`, by default with pipes. It is gone at the end of the block."""

    def __init__(self, stack: Served, *arguments: str) -> None:
        self.process = subprocess.Popen(
            stack.command(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def line(self, stream: str = "stdout") -> bytes:
        pipe = getattr(self.process, stream)
        assert select.select([pipe], [], [], DEADLINE_SECS)[0], "no line came"
        line = pipe.readline()
        assert isinstance(line, bytes)
        return line

    def interrupt(self) -> tuple[int, bytes, bytes]:
        self.process.send_signal(signal.SIGINT)
        return self.end()

    def end(self) -> tuple[int, bytes, bytes]:
        out, err = self.process.communicate(timeout=DEADLINE_SECS)
        return self.process.returncode, out, err


def _on_terminal(stack: Served, *arguments: str, interrupt_at: str = "", environ: dict[str, str] | None = None) -> str:
    """What `llmuxctl` writes to a terminal, standard error included; its exit code is the last line."""
    ours, its = pty.openpty()
    os.set_blocking(ours, False)
    environment = {"TERM": "xterm-256color", "COLUMNS": "120", **(environ or {})}
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    process = subprocess.Popen(
        stack.command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=its,
        stderr=its,
        env={**kept, **environment},
        start_new_session=True,
    )
    os.close(its)
    written = b""
    deadline = time.monotonic() + DEADLINE_SECS
    try:
        while True:
            assert time.monotonic() < deadline, f"it does not end: {written!r}"
            select.select([ours], [], [], 0.1)
            try:
                read = os.read(ours, 65536)
            except BlockingIOError:
                continue
            except OSError:  # The terminal has no other end any more.
                break
            written += read
            if interrupt_at and interrupt_at.encode() in written:
                process.send_signal(signal.SIGINT)
                interrupt_at = ""
        code = process.wait(DEADLINE_SECS)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return written.decode().replace("\r\n", "\n") + f"\n{code}"


def test_status_imports_nothing_heavy(stack: Served) -> None:
    command = [sys.executable, "-X", "importtime", *stack.command("status")[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECS, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"llmuxctl.cli", "llmuxd.protocol", "http.client"} <= imported
    roots = {name.partition(".")[0] for name in imported}
    assert not roots & {"aiohttp", "asyncio", "rich", "psutil", "prometheus_client", "difflib", "tomllib", "tomli"}
    assert {name for name in imported if name.startswith("llmuxd")} <= {
        "llmuxd",
        "llmuxd.core",
        "llmuxd.core.engine_state",
        "llmuxd.protocol",
        "llmuxd.version",
    }


def test_a_terminal_gets_a_table_in_colours(stack: Served) -> None:
    assert stack.run("switch", "qwen").returncode == 0
    shown = _on_terminal(stack, "status")
    assert "\x1b[32mawake" in shown
    assert shown.endswith("\n0")
    assert "\x1b[31mout of memory" not in shown


@pytest.mark.parametrize(("environ"), [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_a_terminal_that_wants_no_colours_gets_none(stack: Served, environ: dict[str, str]) -> None:
    shown = _on_terminal(stack, "status", environ=environ)
    assert not COLOUR.search(shown)
    assert "mistral" in shown


def test_a_pipe_gets_no_colours_whatever_the_environment(stack: Served) -> None:
    done = stack.run("status", FORCE_COLOR="1", TERM="xterm-256color", COLUMNS="20")
    assert (done.returncode, "\x1b" in done.stdout) == (0, False)
    assert len({line.index("not_started") for line in done.stdout.splitlines() if "not_started" in line}) == 1


def test_names_that_the_output_cannot_encode_are_escaped(stack: Served) -> None:
    stack.desk.models["模型"] = stack.desk.models.pop("mistral")
    done = stack.run("status", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, "\\u6a21\\u578b" in done.stdout) == (0, True)


def test_an_operation_on_a_terminal_shows_its_steps_and_the_time(stack: Served) -> None:
    shown = _on_terminal(stack, "wake", "qwen")
    # The step stays as a line; the time is in the line below it, which is written over and gone at the end.
    assert re.search(r"\x1b\[2Kwake qwen begins\n.*0:00:00", shown), shown
    assert shown.endswith("qwen is awake\n\n0")


def test_steps_come_as_they_happen(stack: Served) -> None:
    stack.hold()
    with Running(stack, "switch", "qwen") as running:
        assert running.line("stderr") == b"switch qwen begins\n"
        assert running.process.poll() is None
        stack.release()
        assert running.end() == (0, b"qwen is awake\n", b"")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ctrl_c_leaves_the_operation_to_the_daemon(stack: Served, options: list[str]) -> None:
    stack.hold()
    with Running(stack, "switch", "qwen", *options) as running:
        running.line("stdout" if options else "stderr")
        code, out, err = running.interrupt()
    assert (code, out) == (130, b"")
    assert b"What the daemon has begun goes on" in err
    assert b"Traceback" not in err
    stack.release()
    until(lambda: stack.desk.ended == ["switch qwen"], "the operation ends")


def test_ctrl_c_on_a_terminal(stack: Served) -> None:
    stack.hold()
    shown = _on_terminal(stack, "switch", "qwen", interrupt_at="switch qwen begins")
    assert "What the daemon has begun goes on" in shown
    assert "Traceback" not in shown
    assert "\x1b[?25h" in shown  # The cursor is shown again.
    assert shown.endswith("\n130")


def test_a_log_is_followed_over_a_restart_until_ctrl_c(stack: Served) -> None:
    log = stack.desk.models["qwen"].log
    log.write_text("old\nrunning\n")
    with Running(stack, "logs", "qwen", "-f", "-n", "1") as running:
        assert running.line() == b"running\n"
        with log.open("a") as file:
            file.write("started again\n")
        assert running.line() == b"started again\n"
        assert running.interrupt() == (0, b"", b"")


def test_the_end_of_the_daemon_ends_the_following(stack: Served) -> None:
    stack.desk.models["qwen"].log.write_text("line\n")
    with Running(stack, "logs", "qwen", "-f") as running:
        assert running.line() == b"line\n"
        stack.close()
        assert running.end() == (1, b"", b"llmuxd broke off its answer: it has stopped, or was killed.\n")


def test_a_reader_that_leaves_is_no_error_to_speak_of(stack: Served) -> None:
    log = stack.desk.models["qwen"].log
    log.write_text("line\n" * 100_000)
    for arguments in (("logs", "qwen", "-n", "100000"), ("logs", "qwen", "-f", "-n", "100000")):
        with Running(stack, *arguments) as running:
            running.line()
            assert running.process.stdout is not None
            running.process.stdout.close()
            assert running.process.wait(DEADLINE_SECS) == 141
            assert running.process.stderr is not None
            assert running.process.stderr.read() == b""


def test_a_reader_that_was_never_there(stack: Served) -> None:
    """The whole output waits in a buffer when the command is done, and meets the broken pipe only then."""
    ours, its = os.pipe()
    os.close(ours)
    try:
        done = subprocess.run(
            stack.command("status"), stdout=its, stderr=subprocess.PIPE, timeout=DEADLINE_SECS, check=False
        )
    finally:
        os.close(its)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_default_socket_is_in_the_runtime_folder(stack: Served) -> None:
    command = [sys.executable, "-m", "llmuxctl", "version"]
    for variables in (
        {"LLMUX_RUNTIME_DIR": str(stack.socket.parent)},
        {"LLMUX_CONTROL_SOCKET": str(stack.socket), "LLMUX_RUNTIME_DIR": "/nonexistent"},
        {"LLMUX_CONTROL_SOCKET": "", "LLMUX_RUNTIME_DIR": str(stack.socket.parent)},
    ):
        done = subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=DEADLINE_SECS, check=True
        )
        assert "not running" not in done.stdout

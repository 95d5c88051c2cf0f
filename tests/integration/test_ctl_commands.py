"""Every command of `llmuxctl` against a served desk: what it prints where, and its exit code."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmuxctl import client
from llmuxctl.cli import main
from llmuxd.control import handlers
from llmuxd.version import __version__
from tests.integration.ctl_stack import Served, served


@pytest.fixture(name="stack", scope="module")
def _shared() -> Iterator[Served]:
    with served() as stack:
        yield stack


@pytest.fixture(autouse=True)
def _anew(stack: Served) -> None:
    """The desk as it was at first."""
    stack.desk.__init__(stack.folder)  # type: ignore[misc]


@dataclass
class Said:
    code: int
    out: str
    err: str


Ctl = Callable[..., Said]


@pytest.fixture(name="ctl")
def _ctl(stack: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ctl:
    monkeypatch.setenv("LLMUX_CONTROL_SOCKET", str(stack.socket))

    def run(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["llmuxctl", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Said(code or 0, said.out, said.err)

    return run


# Seeing


def test_status_for_a_human(ctl: Ctl, stack: Served) -> None:
    ctl("switch", "qwen")
    said = ctl("status")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    assert lines[0] == f"llmuxd {__version__}: active:qwen (mode auto, policy tenure, up 1 h 2 m)"
    assert [line.split()[:2] for line in lines[5:]] == [
        ["qwen", "awake"],
        ["mistral", "not_started"],
        ["broken", "not_started"],
    ]
    assert lines[-1].endswith("it died: \\x1b[31mout of memory\\x1b[0m")


@pytest.mark.parametrize("arguments", [("--json", "status"), ("status", "--json")])
def test_status_json_is_what_the_daemon_says(ctl: Ctl, stack: Served, arguments: tuple[str, ...]) -> None:
    assert json.loads(ctl(*arguments).out) == stack.desk.status()


def test_version(ctl: Ctl, tmp_path: Path) -> None:
    assert ctl("version").out == f"llmuxctl {__version__}\nllmuxd   {__version__}\n"
    assert json.loads(ctl("version", "--json").out) == {"llmuxctl": __version__, "llmuxd": __version__}
    alone = ctl("--socket", str(tmp_path / "none"), "version")
    assert (alone.code, alone.out) == (0, f"llmuxctl {__version__}\nllmuxd   is not running\n")
    assert __version__ in ctl("--version").out


def test_another_version_of_the_daemon_is_warned_of(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "__version__", "9.9")
    said = ctl("status", "--json")
    assert (said.code, said.err) == (0, f"warning: llmuxd is 9.9, llmuxctl is {__version__}\n")
    assert json.loads(said.out)["version"] == __version__


def test_logs(ctl: Ctl, stack: Served) -> None:
    stack.desk.models["qwen"].log.write_bytes(b"1\n\xff\n3\n")
    sys.stdout.buffer.flush()
    assert ctl("logs", "qwen-lora", "-n", "1").out == "3\n"
    assert ctl("logs", "mistral").out == ""
    assert ctl("logs", "qwn").code == 4
    assert ctl("logs", "qwen", "-n", "-1").code == 2
    assert ctl("logs", "qwen", "-n", "1000001").code == 2


# Doing


def test_an_operation_tells_its_steps_and_its_result(ctl: Ctl, stack: Served) -> None:
    assert ctl("switch", "qwen") == Said(0, "qwen is awake\n", "switch qwen begins\n")
    assert ctl("wake", "mistral") == Said(0, "mistral is awake\n", "wake mistral begins\n")
    assert ctl("stop", "mistral") == Said(0, "mistral is stopped\n", "stop mistral begins\n")
    assert stack.desk.ended == ["switch qwen", "wake mistral", "stop mistral"]


def test_sleep_takes_an_eviction(ctl: Ctl, stack: Served) -> None:
    assert ctl("sleep", "qwen", "--eviction", "discard+keep_running").code == 0
    assert str(stack.desk.models["qwen"].asleep_by) == "discard+keep_running"
    assert ctl("sleep", "qwen").code == 0
    assert str(stack.desk.models["qwen"].asleep_by) == "offload+keep_running"
    bad = ctl("sleep", "qwen", "--eviction", "melt+stop")
    assert (bad.code, "retain, offload, discard" in bad.err) == (2, True)


def test_warmup_of_some_and_of_all(ctl: Ctl, stack: Served) -> None:
    assert ctl("warmup", "qwen", "mistral") == Said(
        0,
        "2 models are warm\n",
        "warmup qwen begins\nsleep qwen begins\nwarmup mistral begins\nsleep mistral begins\n",
    )
    every = ctl("warmup")
    assert (every.code, every.out) == (1, "")
    assert every.err.splitlines()[-1] == "broken: it died: \\x1b[31mout of memory\\x1b[0m"


def test_pin_unpin_and_mode(ctl: Ctl, stack: Served) -> None:
    assert ctl("pin", "qwen").out == "qwen is pinned\n"
    refused = ctl("switch", "mistral")
    assert (refused.code, refused.out, refused.err) == (5, "", "qwen is pinned\n")
    assert ctl("unpin") == Said(0, "auto mode\n", "")
    assert ctl("mode", "manual", "--json") == Said(0, '{\n  "message": "manual mode"\n}\n', "")
    assert stack.desk.mode == "manual"
    assert ctl("mode", "off").code == 2


def test_eviction_is_shown_and_changed(ctl: Ctl) -> None:
    assert ctl("eviction", "qwen-lora", "discard+stop").out == "qwen is evicted by discard+stop\n"
    table = [line.split() for line in ctl("eviction").out.splitlines()]
    assert table[:3] == [
        ["MODEL", "EVICTION", "STATE"],
        ["qwen", "discard+stop", "not_started"],
        ["mistral", "offload+keep_running", "not_started"],
    ]
    assert len(ctl("eviction", "qwen-lora").out.splitlines()) == 2
    assert list(json.loads(ctl("eviction", "qwen", "--json").out)["models"]) == ["qwen"]
    assert ctl("eviction", "qwn").code == 4
    assert ctl("eviction", "qwen", "melt").code == 2


def test_json_passes_the_steps_on(ctl: Ctl) -> None:
    done = ctl("wake", "qwen", "--json")
    assert [json.loads(line) for line in done.out.splitlines()] == [
        {"event": "wake", "model": "qwen", "text": "wake qwen begins"},
        {"result": "ok", "message": "qwen is awake"},
    ]
    assert (done.code, done.err) == (0, "")
    failed = ctl("--json", "wake", "broken")
    assert (failed.code, failed.err) == (1, "")
    assert json.loads(failed.out.splitlines()[-1])["result"] == "failed"
    assert ctl("--json", "wake", "none").code == 4


# Failing


@pytest.mark.parametrize("command", ["switch", "wake", "sleep", "stop", "pin", "warmup"])
def test_a_model_that_is_not_there(ctl: Ctl, command: str) -> None:
    assert ctl(command, "mistal") == Said(
        4, "", "no model 'mistal'; did you mean 'mistral'? Configured: qwen, mistral, broken\n"
    )


def test_a_failure_is_told_without_what_could_steer_the_terminal(ctl: Ctl) -> None:
    said = ctl("wake", "broken")
    assert (said.code, said.out) == (1, "")
    assert said.err.splitlines()[-1] == "broken: it died: \\x1b[31mout of memory\\x1b[0m"
    said = ctl("wake", "a\x1b]0;title\x07")
    assert (said.code, "\x1b" in said.err, "\x07" in said.err) == (4, False, False)


@pytest.mark.parametrize("arguments", [["status"], ["switch", "qwen"], ["logs", "qwen"], ["mode", "auto"]])
def test_no_daemon(ctl: Ctl, tmp_path: Path, arguments: list[str]) -> None:
    gone = tmp_path / "control.sock"
    said = ctl("--socket", str(gone), *arguments)
    assert (said.code, said.out) == (3, "")
    assert f"there is no {gone}" in said.err
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(gone))
    said = ctl("--socket", str(gone), *arguments)
    assert (said.code, f"nobody answers on {gone}" in said.err) == (3, True)
    for hint in ("systemctl start llmuxd", "llmuxd --config FILE", "llmuxd --demo", "LLMUX_CONTROL_SOCKET"):
        assert hint in said.err


def test_a_socket_that_may_not_be_used(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may use any, so the kernel's answer is given by the socket here."""

    class Refused(socket.socket):
        def connect(self, _address: Any) -> None:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "socket", Refused)
    said = ctl("status")
    assert (said.code, said.out) == (5, "")
    assert "a member of its group (usually llmux)" in said.err


class Answering:
    """A server that answers every connection with the same bytes, and hangs up; or with none, and does not."""

    def __init__(self, path: Path, answer: bytes) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._answer = answer
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while True:
                connection, _ = self._listener.accept()
                if self._answer:
                    _read_request(connection)
                    connection.sendall(self._answer)
                    connection.close()
                else:
                    self._open.append(connection)
        except OSError:
            return

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in (*self._open, self._listener):
            each.close()


def _read_request(connection: socket.socket) -> None:
    with connection.makefile("rb") as lines:
        head = b"".join(iter(lines.readline, b"\r\n"))
        length = re.search(rb"(?i)content-length: (\d+)", head)
        lines.read(int(length[1]) if length else 0)


@pytest.fixture(name="answering")
def _answering(tmp_path: Path) -> Iterator[Callable[[bytes], Path]]:
    servers: list[Answering] = []

    def start(answer: bytes) -> Path:
        path = tmp_path / f"{len(servers)}.sock"
        servers.append(Answering(path, answer))
        return path

    yield start
    for server in servers:
        server.close()


HEAD = f"HTTP/1.1 200 OK\r\nx-llmux-version: {__version__}\r\n".encode()
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
STEP = b'{"event": "wake", "text": "it begins"}\n'


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["status"], HEAD + b"Content-Length: 100\r\n\r\n{"),
        (["status"], HEAD + b"Content-Length: 1\r\n\r\n{"),
        (["wake", "qwen"], CHUNKED + b"%x\r\n%s\r\n" % (len(STEP), STEP)),
        (["wake", "qwen"], CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(STEP), STEP)),
        (["wake", "qwen"], CHUNKED + b"%x\r\n%s\r\n" % (len(STEP), STEP[:-5] + b"\n    ")),
        (["logs", "qwen"], CHUNKED + b"5\r\nline\n\r\n"),
    ],
)
def test_a_daemon_that_dies_in_the_middle(
    ctl: Ctl, answering: Callable[[bytes], Path], arguments: list[str], answer: bytes
) -> None:
    said = ctl("--socket", str(answering(answer)), *arguments)
    assert said.code == 1
    assert said.err.splitlines()[-1] == "llmuxd broke off its answer: it has stopped, or was killed."


def test_a_daemon_that_does_not_answer(
    ctl: Ctl, answering: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ANSWER_SECS", 0.05)
    said = ctl("--socket", str(answering(b"")), "status")
    assert (said.code, "has not answered" in said.err) == (3, True)


@pytest.mark.parametrize(
    ("answer", "code", "says"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 25\r\n\r\n" + b'{"error": "no such call"}', 1, "no such call"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 5\r\n\r\n<\x1b[m>", 1, "llmuxd answered 502: <\\x1b[m>"),
        (b"HTTP/1.1 500 Bad\r\nContent-Length: 4\r\n\r\nnull", 1, "llmuxd answered 500: null"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", 3, "cannot be reached"),
    ],
)
def test_who_answers_is_another_daemon_or_none_at_all(
    ctl: Ctl, answering: Callable[[bytes], Path], answer: bytes, code: int, says: str
) -> None:
    said = ctl("--socket", str(answering(answer)), "status")
    assert (said.code, says in said.err) == (code, True), said.err


def test_usage(ctl: Ctl) -> None:
    assert ctl("swich", "qwen").code == 2
    assert ctl("switch").code == 2
    assert ctl("switch", "qwen", "--no-such-option").code == 2
    assert "Usage: " in ctl("switch").err


WITH_EXAMPLES = [
    "status",
    "switch",
    "wake",
    "sleep",
    "stop",
    "warmup",
    "checkpoint",
    "restore",
    "validate",
    "pin",
    "mode",
    "eviction",
    "logs",
    "reload",
    "doctor",
    "events",
    "top",
]


def test_help_names_every_command_and_gives_examples(ctl: Ctl) -> None:
    said = ctl("--help")
    listed = re.findall(r"^  (\w+)  ", said.out.partition("Commands:")[2], re.MULTILINE)
    assert (said.code, sorted(listed)) == (0, sorted([*WITH_EXAMPLES, "unpin", "config", "key", "version"]))
    for command in ([name] for name in WITH_EXAMPLES):
        shown = ctl(*command, "-h")
        assert (shown.code, f"\n  llmuxctl {command[0]}" in shown.out) == (0, True), shown.out
    assert "\n  llmuxctl config check" in ctl("config", "check", "--help").out


# The configuration


GOOD = '[models.qwen]\nmodel_path = "/models/qwen"\n'
BAD = 'prt = 3000\nport = "x"\n' + GOOD


def test_config_check_needs_no_daemon(ctl: Ctl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMUX_CONTROL_SOCKET", str(tmp_path / "none"))
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(GOOD)
    bad.write_text(BAD)
    assert ctl("config", "check", str(good)) == Said(0, f"{good}: 1 model, no errors\n", "")
    said = ctl("config", "check", str(bad))
    assert (said.code, said.out) == (2, "")
    assert ["prt" in said.err, "port: " in said.err, len(said.err.splitlines())] == [True, True, 2]
    missing = ctl("config", "check", str(tmp_path / "missing.toml"))
    assert (missing.code, "missing.toml" in missing.err) == (2, True)


def test_config_check_as_json(ctl: Ctl, tmp_path: Path) -> None:
    old, bad = tmp_path / "old.json", tmp_path / "bad.toml"
    old.write_text(json.dumps({"models": {"qwen": {"model_path": "/m", "port": 8001}}, "admin_port": 3001}))
    bad.write_text(BAD)
    said = ctl("config", "check", str(old), "--json")
    found = json.loads(said.out)
    assert (said.code, found["models"], found["problems"], said.err) == (0, ["qwen"], [], "")
    assert "admin_port" in found["warnings"][0]
    assert "admin_port" in ctl("config", "check", str(old)).err
    said = ctl("--json", "config", "check", str(bad))
    found = json.loads(said.out)
    assert (said.code, found["models"], len(found["problems"])) == (2, [], 2)


def test_config_show(ctl: Ctl, stack: Served) -> None:
    assert json.loads(ctl("config", "show").out) == stack.desk.config_json()
    assert json.loads(ctl("config", "show", "--json").out) == stack.desk.config_json()

"""The control API over its socket: calls, refusals, steps, clients that leave, and the socket file itself."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmuxd.control import build_control, peer, serve_control
from llmuxd.control.peer import Peer, may_steer
from llmuxd.protocol import NDJSON, VERSION_HEADER
from llmuxd.version import __version__
from tests.integration.ctl_stack import DEADLINE_SECS, Desk, Served, served, until

NOBODY = 65534


@pytest.fixture(name="stack")
def _stack() -> Iterator[Served]:
    with served() as stack:
        yield stack


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE_SECS)
        self.sock.connect(str(self.path))


@contextmanager
def _asked(
    stack: Served, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> Iterator[http.client.HTTPResponse]:
    connection = _Connection(stack.socket)
    try:
        payload = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, payload, headers or {})
        yield connection.getresponse()
    finally:
        connection.close()


def _ask(
    stack: Served, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    with _asked(stack, method, path, body, headers) as answer:
        assert answer.headers.get_all(VERSION_HEADER) == [__version__]
        return answer.status, json.loads(answer.read())


# Calls


def test_the_answers_of_the_short_calls(stack: Served) -> None:
    status, answer = _ask(stack, "GET", "/control/status")
    assert (status, answer["state"], list(answer["models"])) == (200, "idle", ["qwen", "mistral", "broken"])
    assert _ask(stack, "POST", "/control/mode", {"mode": "manual"}) == (200, {"message": "manual mode"})
    assert stack.desk.mode == "manual"
    assert _ask(stack, "POST", "/control/unpin") == (200, {"message": "auto mode"})
    assert _ask(stack, "GET", "/control/config")[1]["port"] == 3000


def test_evictions_are_shown_and_changed_by_name_or_alias(stack: Served) -> None:
    body = {"model": "qwen-lora", "eviction": "discard+stop"}
    assert _ask(stack, "POST", "/control/eviction", body)[0] == 200
    discard = {"eviction": {"weights": "discard", "process": "stop"}, "process_state": "not_started"}
    assert _ask(stack, "GET", "/control/eviction?model=qwen-lora") == (200, {"models": {"qwen": discard}})
    assert len(_ask(stack, "GET", "/control/eviction")[1]["models"]) == 3


def test_an_eviction_as_llmux_0_7_sends_it(stack: Served) -> None:
    body = {"model": "qwen", "eviction": {"weights": "discard", "process": "keep_running"}}
    assert _ask(stack, "POST", "/control/eviction", body)[0] == 200
    assert str(stack.desk.models["qwen"].eviction) == "discard+keep_running"


def test_a_long_operation_is_one_object_for_who_does_not_ask_for_steps(stack: Served) -> None:
    assert _ask(stack, "POST", "/control/wake", {"model": "qwen-lora"}) == (200, {"message": "qwen is awake"})
    assert _ask(stack, "POST", "/control/sleep", {"model": "qwen", "eviction": "discard+keep_running"})[0] == 200
    assert str(stack.desk.models["qwen"].asleep_by) == "discard+keep_running"
    assert _ask(stack, "POST", "/control/stop", {"model": "qwen"})[1] == {"message": "qwen is stopped"}


def test_steps_come_while_the_operation_runs(stack: Served) -> None:
    stack.hold()
    with _asked(stack, "POST", "/control/switch", {"model": "qwen"}, {"Accept": NDJSON}) as answer:
        assert json.loads(answer.readline()) == {
            "event": "switch",
            "model": "qwen",
            "text": "switch qwen begins",
        }
        assert stack.desk.ended == []
        stack.release()
        assert json.loads(answer.readline()) == {"result": "ok", "message": "qwen is awake"}
        assert answer.read() == b""


def test_a_failure_is_the_last_step(stack: Served) -> None:
    with _asked(stack, "POST", "/control/wake", {"model": "broken"}, {"Accept": NDJSON}) as answer:
        last = json.loads(answer.read().splitlines()[-1])
    assert (answer.status, last["result"], last["status"]) == (200, "failed", 500)
    assert "out of memory" in last["error"]


def test_a_client_that_leaves_does_not_stop_the_operation(stack: Served) -> None:
    stack.hold()
    with _asked(stack, "POST", "/control/switch", {"model": "qwen"}, {"Accept": NDJSON}) as answer:
        answer.readline()
    connection = _Connection(stack.socket)
    connection.request("POST", "/control/wake", json.dumps({"model": "mistral"}))
    until(lambda: "wake mistral" in stack.desk.began, "the operation begins")
    connection.close()
    stack.release()
    until(lambda: sorted(stack.desk.ended) == ["switch qwen", "wake mistral"], "both end")


def test_steps_that_nobody_reads_are_bounded_and_the_result_still_comes(
    stack: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wake(model: str, progress: Any) -> dict[str, Any]:
        for number in range(5000):
            progress({"event": "step", "text": str(number)})
        return {"message": "done"}

    monkeypatch.setattr(stack.desk, "wake", wake)
    with _asked(stack, "POST", "/control/wake", {"model": "qwen"}, {"Accept": NDJSON}) as answer:
        lines = [json.loads(line) for line in answer.read().splitlines()]
    assert [line["text"] for line in lines[:-1]] == [str(number) for number in range(4001, 5000)]
    assert lines[-1] == {"result": "ok", "message": "done"}


def test_events_are_passed_on_and_given_up_when_the_client_leaves(stack: Served) -> None:
    with _asked(stack, "GET", "/control/events") as answer:
        until(lambda: stack.desk.subscribers, "subscribed")
        stack.publish({"event": "engine", "model": "qwen"})
        assert json.loads(answer.readline()) == {"event": "engine", "model": "qwen"}
    until(lambda: not stack.desk.subscribers, "the subscription ends")


def test_a_log_is_followed(stack: Served) -> None:
    log = stack.desk.models["qwen"].log
    log.write_text("1\n2\n3\n")
    with _asked(stack, "GET", "/control/logs?model=qwen-lora&lines=2") as answer:
        assert answer.read() == b"2\n3\n"
    with _asked(stack, "GET", "/control/logs?model=qwen&lines=1&follow=1") as answer:
        assert answer.readline() == b"3\n"
        with log.open("a") as file:
            file.write("a new engine\n")
        assert answer.readline() == b"a new engine\n"


def test_a_log_that_cannot_be_read_breaks_the_answer_off(stack: Served) -> None:
    stack.desk.models["qwen"].log.mkdir()
    with _asked(stack, "GET", "/control/logs?model=qwen") as answer, pytest.raises(http.client.HTTPException):
        answer.read()
    assert _ask(stack, "GET", "/control/status")[0] == 200


# Refusals


@pytest.mark.parametrize("path", ["switch", "wake", "sleep", "stop", "pin"])
def test_a_model_that_is_not_there(stack: Served, path: str) -> None:
    status, answer = _ask(stack, "POST", f"/control/{path}", {"model": "mistal"})
    assert status == 404
    assert answer["known"] == ["qwen", "mistral", "broken"]
    assert answer["error"] == "no model 'mistal'; did you mean 'mistral'? Configured: qwen, mistral, broken"


def test_a_model_that_is_not_there_elsewhere(stack: Served) -> None:
    assert _ask(stack, "POST", "/control/warmup", {"models": ["qwen", "x"]})[0] == 404
    assert _ask(stack, "GET", "/control/logs?model=x")[0] == 404
    assert _ask(stack, "GET", "/control/eviction?model=x")[0] == 404
    assert _ask(stack, "POST", "/control/eviction", {"model": "x", "eviction": "offload+stop"})[0] == 404


def test_what_is_not_allowed_and_what_fails(stack: Served) -> None:
    assert _ask(stack, "POST", "/control/pin", {"model": "qwen"}) == (200, {"message": "qwen is pinned"})
    assert _ask(stack, "POST", "/control/wake", {"model": "mistral"}) == (403, {"error": "qwen is pinned"})
    _ask(stack, "POST", "/control/unpin")
    status, answer = _ask(stack, "POST", "/control/wake", {"model": "broken"})
    assert (status, "out of memory" in answer["error"]) == (500, True)


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("switch", b"{", "not JSON"),
        ("switch", [], "an object with model"),
        ("switch", None, "an object with model"),
        ("switch", {"model": 1}, "an object with model"),
        ("switch", {"model": "qwen", "now": True}, "unknown key 'now'"),
        ("sleep", {"model": "qwen", "eviction": "melt+stop"}, "WEIGHTS+PROCESS"),
        ("sleep", {"model": "qwen", "eviction": {"weights": "melt"}}, "WEIGHTS+PROCESS"),
        ("eviction", {"model": "qwen"}, 'needs "eviction"'),
        ("eviction", {"model": "qwen", "eviction": 1}, "WEIGHTS+PROCESS"),
        ("mode", {"mode": "off"}, "use auto or manual"),
        ("warmup", {"models": "qwen"}, "a list of names"),
        ("checkpoint", {"model": "qwen", "eviction": "discard+stop"}, "use discard+checkpoint"),
        ("checkpoint", {"model": "qwen", "warmup": "no"}, '"warmup" has to be true or false'),
        ("restore", {"model": "qwen", "detached": 1}, '"detached" has to be true or false'),
        ("validate", {"model": "qwen", "policies": "discard+stop"}, "a list of eviction policies"),
        ("validate", {"model": "qwen", "policies": []}, "a list of eviction policies"),
        ("validate", {"model": "qwen", "policies": ["melt+stop"]}, "WEIGHTS+PROCESS"),
        ("unpin", {"model": "qwen"}, "unknown key 'model'; the body takes nothing"),
    ],
)
def test_a_body_that_is_not_what_the_call_takes(stack: Served, path: str, body: Any, says: str) -> None:
    status, answer = _ask(stack, "POST", f"/control/{path}", body)
    assert (status, says in answer["error"]) == (400, True), answer
    assert stack.desk.began == []


@pytest.mark.parametrize(
    "query", ["", "model=", "model=qwen&lines=-1", "model=qwen&lines=x", "model=qwen&lines=" + "9" * 5000]
)
def test_a_query_that_is_not_what_logs_takes(stack: Served, query: str) -> None:
    assert _ask(stack, "GET", f"/control/logs?{query}")[0] == 400
    assert _ask(stack, "GET", "/control/logs?model=qwen&follow=yes")[0] == 400


def test_calls_that_there_are_not(stack: Served) -> None:
    assert _ask(stack, "GET", "/control/nothing") == (404, {"error": "no such call: GET /control/nothing"})
    assert _ask(stack, "POST", "/control/status") == (405, {"error": "/control/status takes GET"})
    assert _ask(stack, "POST", "/control/switch", b" " * 2**21)[0] == 413


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://localhost"}, {"Origin": "null"}, {"Host": "evil.example"}, {"Host": "evil:80"}]
)
@pytest.mark.parametrize("path", ["status", "nothing"])
def test_a_page_in_a_browser_is_refused(stack: Served, headers: dict[str, str], path: str) -> None:
    status, answer = _ask(stack, "GET", f"/control/{path}", headers=headers)
    assert (status, "not for browsers" in answer["error"]) == (403, True)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "", "unix", "127.0.0.1"])
def test_hosts_that_curl_and_other_clients_send(stack: Served, host: str) -> None:
    assert _ask(stack, "GET", "/control/status", headers={"Host": host})[0] == 200


def test_an_error_of_the_daemon_itself_is_told_and_logged(
    stack: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken: dict[str, Any] = {}
    monkeypatch.setattr(stack.desk, "status", lambda: broken["x"])
    assert _ask(stack, "GET", "/control/status") == (500, {"error": "internal error: KeyError('x')"})
    assert "KeyError" in caplog.text


def test_who_did_what_is_logged(stack: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "llmuxd.control")
    _ask(stack, "POST", "/control/wake", {"model": "qwen"})
    _ask(stack, "GET", "/control/status")
    assert [record.getMessage() for record in caplog.records] == [
        f"/control/wake by user {os.geteuid()} (pid {os.getpid()})"
    ]


# Who may


def test_only_root_the_own_user_and_the_group_may_steer(stack: Served) -> None:
    path, group = str(stack.socket), stack.socket.stat().st_gid
    assert may_steer(Peer(1, 0, frozenset()), path)
    assert may_steer(Peer(1, os.geteuid(), frozenset()), path)
    assert may_steer(Peer(1, 12345, frozenset((group, 7))), path)
    assert not may_steer(Peer(1, 12345, frozenset((group + 1,))), path)
    assert not may_steer(Peer(1, 12345, frozenset((group,))), path + ".gone")


@contextmanager
def _as_user(user: int, group: int, more: list[int]) -> Iterator[None]:
    """What the kernel notes of who connects is what the process is at that moment."""
    groups = os.getgroups()
    os.setgroups(more)
    os.setegid(group)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a moment")
@pytest.mark.parametrize(("more", "status"), [([], 403), ([12345], 200), ([4, 12345, 9], 200)])
def test_credentials_are_checked_even_if_the_mode_of_the_socket_was_loosened(
    stack: Served, more: list[int], status: int
) -> None:
    os.chown(stack.socket, -1, 12345)
    for path in (stack.folder, stack.socket.parent, stack.socket):
        path.chmod(0o777)
    connection = _Connection(stack.socket)
    with _as_user(NOBODY, NOBODY, more):
        connection.connect()
    connection.request("GET", "/control/status")
    answer = connection.getresponse()
    assert answer.status == status
    if status == 403:
        assert f"user {NOBODY}" in json.loads(answer.read())["error"]
    connection.close()


def test_a_connection_over_tcp_has_no_peer() -> None:
    async def ask() -> None:
        server = await asyncio.start_server(lambda _, accepted: accepted.close(), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        assert peer.peer_of(writer.transport) is None
        assert peer.peer_of(None) is None
        assert await reader.read() == b""
        writer.close()
        server.close()

    asyncio.run(ask())


# The socket


@pytest.fixture(name="folder")
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="llmux-ctl-") as folder:
        yield Path(folder)


def test_the_socket_is_for_its_user_and_group(folder: Path) -> None:
    async def check() -> None:
        path = folder / "deeper" / "still" / "control.sock"
        before = os.umask(0)
        close = await serve_control(build_control(Desk(folder)), path)
        assert os.umask(before) == 0
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        await close()
        assert not path.exists()

    asyncio.run(check())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_root_gives_the_socket_to_the_group_if_there_is_one(folder: Path) -> None:
    import grp

    some = next(entry for entry in grp.getgrall() if entry.gr_gid != 0)

    async def check() -> None:
        for group, owner in ((some.gr_name, some.gr_gid), ("no-such-group", 0)):
            close = await serve_control(build_control(Desk(folder)), folder / "s", group)
            assert (folder / "s").stat().st_gid == owner
            await close()

    asyncio.run(check())


def test_a_socket_left_behind_is_replaced(folder: Path) -> None:
    path = folder / "control.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    async def check() -> None:
        close = await serve_control(build_control(Desk(folder)), path)
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"GET /control/status HTTP/1.0\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"200"
        await reader.read()
        writer.close()
        await close()

    asyncio.run(check())


@pytest.mark.parametrize("full", [False, True])
def test_a_socket_that_somebody_has_is_not_touched(folder: Path, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmuxd.control import server

    monkeypatch.setattr(server, "PROBE_SECS", 0.05)
    path = folder / "control.sock"
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.bind(str(path))
        other.listen(0)
        if full:
            waiting.connect(str(path))
        inode = path.stat().st_ino
        with pytest.raises(OSError, match="another daemon"):
            asyncio.run(serve_control(build_control(Desk(folder)), path))
        assert path.stat().st_ino == inode


def test_a_file_that_is_no_socket_is_not_touched(folder: Path) -> None:
    path = folder / "control.sock"
    path.write_text("mine")
    with pytest.raises(OSError, match="in use"):
        asyncio.run(serve_control(build_control(Desk(folder)), path))
    assert path.read_text() == "mine"


def test_the_socket_of_another_daemon_is_not_removed_at_the_end(folder: Path) -> None:
    async def check() -> None:
        path = folder / "control.sock"
        close = await serve_control(build_control(Desk(folder)), path)
        path.unlink()
        other = await serve_control(build_control(Desk(folder)), path)
        await close()
        assert path.is_socket()
        await other()
        assert not path.exists()

    asyncio.run(check())


def test_the_end_of_serving_does_not_wait_for_those_who_follow(stack: Served) -> None:
    stack.desk.models["qwen"].log.write_text("1\n")
    with (
        _asked(stack, "GET", "/control/logs?model=qwen&follow=1") as log,
        _asked(stack, "GET", "/control/events") as events,
    ):
        assert log.readline() == b"1\n"
        until(lambda: stack.desk.subscribers, "subscribed")
        began = time.monotonic()
        stack.close()
        assert time.monotonic() - began < DEADLINE_SECS / 2
        assert (log.readline(), events.readline()) == (b"", b"")
    assert stack.desk.subscribers == []


def test_the_end_of_serving_lets_an_operation_tell_its_result(stack: Served) -> None:
    stack.hold()
    with _asked(stack, "POST", "/control/stop", {"model": "qwen"}, {"Accept": NDJSON}) as answer:
        answer.readline()
        stack.close()
        assert json.loads(answer.readline()) == {"result": "ok", "message": "qwen is stopped"}

"""The daemon's sockets: its own, and those that systemd holds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from llmuxd.listening import CannotListen, bind, inherited, is_for, port_of


@pytest.fixture
def close():
    made: list[socket.socket] = []
    yield made.extend
    for one in made:
        one.close()


def test_a_port_is_held_before_it_is_listened_on(close):
    sockets = bind("127.0.0.1", 0)
    close(sockets)
    port = port_of(sockets)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))


def test_every_address_of_a_name_gets_the_same_port(close, monkeypatch):
    v4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
    other = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [v4, other, v4])
    sockets = bind("box", 0)
    close(sockets)
    assert [one.getsockname()[0] for one in sockets] == ["127.0.0.1", "127.0.0.2"]
    assert len({one.getsockname()[1] for one in sockets}) == 1


def test_one_that_is_taken_is_said(close):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(CannotListen, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind("127.0.0.1", port)


def test_a_host_that_is_none_is_said():
    with pytest.raises(CannotListen, match=r"cannot listen on no\.such\.host\.invalid:1"):
        bind("no.such.host.invalid", 1)


def test_without_systemd_none_are_inherited():
    assert inherited({}) == []
    assert inherited({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == [], "they are another process's"
    assert inherited({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}) == []


CHILD = """
import os, sys
for number, given in enumerate(sys.argv[2:], 3):
    # Past what is given, so that none is overwritten before its turn.
    os.dup2(int(given), 50 + number)
for number in range(3, 1 + len(sys.argv)):
    os.dup2(50 + number, number)
from llmuxd.listening import inherited, is_for
found = inherited({"LISTEN_FDS": "2", "LISTEN_PID": str(os.getpid())})
port = int(sys.argv[1])
print([one.getsockname()[1] == port for one in found], [os.get_inheritable(one.fileno()) for one in found])
print(is_for(found[0], "127.0.0.1", port), is_for(found[0], "127.0.0.1", 1), is_for(found[0], "127.0.0.9", port))
"""


def test_those_of_systemd_are_taken_but_for_other_kinds(tmp_path):
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind(str(tmp_path / "s"))
        port = tcp.getsockname()[1]
        given = (tcp.fileno(), unix.fileno())
        argv = [sys.executable, "-c", CHILD, str(port), *map(str, given)]
        done = subprocess.run(argv, pass_fds=given, capture_output=True, text=True)
        assert done.stderr == ""
        assert done.stdout == "[True] [False]\nTrue False False\n"


def test_one_that_listens_everywhere_is_for_every_address_of_its_port(close):
    sockets = bind("0.0.0.0", 0)
    close(sockets)
    port = port_of(sockets)
    assert is_for(sockets[0], "127.0.0.1", port)
    assert is_for(sockets[0], "0.0.0.0", port)
    assert not is_for(sockets[0], "127.0.0.1", 1)


def test_a_name_that_cannot_be_resolved_is_not_that_of_a_socket(close):
    sockets = bind("127.0.0.1", 0)
    close(sockets)
    assert not is_for(sockets[0], "no.such.host.invalid", port_of(sockets))

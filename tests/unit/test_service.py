"""What systemd is told: the status line, the journal's fields."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import types
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from llmuxd import logs
from llmuxd.core import events as e
from llmuxd.notices import log_notice
from llmuxd.proxy.access import Call
from llmuxd.service import Service, status_line
from llmuxd.tasks import poll
from tests.core.playbook import DISCARD, OFFLOAD, Play, spec

WELL = (True, "ok")


def line(play: Play, health: tuple[bool, str] = WELL) -> str:
    return status_line(play.state, health)


class TestStatusLine:
    def test_nothing_is_awake(self):
        assert line(Play()) == "awake: none"

    def test_who_is_awake_how_many_sleep_how_many_wait(self):
        play = Play()
        play.at(0, e.EngineAdopted("a", 1))
        play.at(0, e.EngineAdopted("b", 2, OFFLOAD))
        play.at(0, e.EngineAdopted("c", 3, DISCARD))
        assert line(play) == "awake: a; asleep: 2"
        play.ask(1, 1, "b")
        assert line(play) == "awake: none; falling_asleep: a; asleep: 2; queued: 1"

    def test_who_has_failed(self):
        play = Play()
        play.ask(0, 1, "a")
        play.fails(1, "a")
        play.done(1, "a")
        assert line(play) == "awake: none; failed: a"

    def test_the_mode(self):
        play = Play()
        play.at(0, e.SetMode(True))
        assert line(play) == "awake: none; manual mode"
        play.at(0, e.Pin(1, "a"))
        assert line(play) == "awake: none; starting: a; pinned: a"

    def test_without_models(self):
        play = Play(spec("a"))
        play.at(0, e.Reload((), play.state.settings, play.switcher.policy))
        assert line(play) == "no models are configured: add some to the config and reload"

    def test_an_end(self):
        play = Play()
        play.awake("a")
        play.ask(1, 1, "a")
        play.at(2, e.HandOver(30))
        assert line(play) == "llmuxd is being restarted: 1 requests to finish"

    def test_what_is_wrong(self):
        assert line(Play(), (False, "a has waited 9 s")) == "awake: none; NOT WELL: a has waited 9 s"


class FakeJournal(logging.Handler):
    sent: ClassVar[list[tuple[str, dict[str, str]]]] = []

    def __init__(self, **fields: str) -> None:
        super().__init__()
        self.fields = fields

    @classmethod
    def send(cls, message: str, **fields: str) -> None:
        cls.sent.append((message, fields))


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """python3-systemd, as far as it is used."""
    journal: Any = types.ModuleType("systemd.journal")
    journal.JournalHandler = FakeJournal
    journal.send = FakeJournal.send
    FakeJournal.sent.clear()
    monkeypatch.setitem(sys.modules, "systemd", types.ModuleType("systemd"))
    monkeypatch.setitem(sys.modules, "systemd.journal", journal)


@pytest.fixture
def stderr(tmp_path: Any) -> Iterator[int]:
    """A descriptor of a file, for standard error."""
    descriptor = os.open(tmp_path / "err", os.O_WRONLY | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def as_systemd_names_it(descriptor: int) -> dict[str, str]:
    found = os.fstat(descriptor)
    return {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}


class TestAccessLog:
    @pytest.fixture
    def call(self) -> Call:
        call = Call("mine", "POST", "/v1/completions")
        call.key_name, call.model, call.status = "alice", "qwen", 200
        call.sent(b'{"usage": {"prompt_tokens": 7, "completion_tokens": 3}}')
        return call

    def test_a_request_is_an_entry_of_the_journal_with_fields(self, systemd, stderr, call):
        logs.access_writer(as_systemd_names_it(stderr), stderr)([call, call])
        assert len(FakeJournal.sent) == 2
        line, fields = FakeJournal.sent[0]
        assert line == call.line()
        assert (
            fields.items()
            >= {
                "SYSLOG_IDENTIFIER": "llmuxd",
                "REQUEST_ID": "mine",
                "KEY_NAME": "alice",
                "MODEL": "qwen",
                "STATUS": "200",
                "PROMPT_TOKENS": "7",
                "COMPLETION_TOKENS": "3",
            }.items()
        )

    def test_elsewhere_it_is_a_line_each(self, stderr, call, tmp_path):
        logs.access_writer({}, stderr)([call, call])
        lines = (tmp_path / "err").read_text().splitlines()
        assert [line.partition(" id=")[2] for line in lines] == [call.line().removeprefix("id=")] * 2


class TestJournal:
    def test_it_is_used_where_standard_error_is_the_journal(self, systemd, stderr):
        handler = logs._journal_handler(as_systemd_names_it(stderr), stderr)
        assert isinstance(handler, FakeJournal)
        assert handler.fields == {"SYSLOG_IDENTIFIER": "llmuxd"}

    @pytest.mark.parametrize("environ", [{}, {"JOURNAL_STREAM": "1:2"}])
    def test_it_is_not_where_standard_error_is_something_else(self, systemd, stderr, environ):
        assert logs._journal_handler(environ, stderr) is None

    def test_it_is_not_without_the_library(self, stderr, monkeypatch):
        monkeypatch.setitem(sys.modules, "systemd.journal", None)
        assert logs._journal_handler(as_systemd_names_it(stderr), stderr) is None

    def test_it_is_not_where_standard_error_is_closed(self, systemd):
        assert logs._journal_handler({"JOURNAL_STREAM": "1:2"}, 987654) is None


def test_a_line_about_a_model_has_its_name_and_the_switch_as_fields(caplog):
    caplog.set_level(logging.INFO, "llmuxd")
    play = Play()
    play.ask(0, 1, "a")
    for notice in play.notices():
        log_notice(notice)  # type: ignore[arg-type]
    found = [
        (record.getMessage().split(" ")[0], vars(record).get("MODEL"), vars(record).get("SWITCH_ID"))
        for record in caplog.records
    ]
    assert ("switch", "a", 1) in found
    assert ("a:", "a", None) in found


class Notifier:
    """Keeps what systemd would be told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def notify(self, text: str) -> None:
        self.told.append(text)


async def _true(value: bool) -> bool:
    return value


def test_more_time_is_asked_for_while_something_lasts_and_no_longer_than_is_due(monkeypatch):
    monkeypatch.setattr("llmuxd.service.EXTEND_EVERY_SECS", 0.001)

    async def run() -> tuple[int, int]:
        notifier: Any = Notifier()
        service = Service({}, notifier)
        async with service.patience():
            await poll(lambda: _true(len(notifier.told) >= 3), 0.001)
        after = len(notifier.told)
        async with service.patience(most=0.0):
            await asyncio.sleep(0.02)
        return after, len(notifier.told)

    asked, then = asyncio.run(run())
    assert (asked >= 3, then) == (True, asked)

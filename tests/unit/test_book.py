"""The state file: written whole or not at all, read with suspicion."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from llmuxd import book as book_module
from llmuxd.book import Book, Entry
from llmuxd.core.engine_state import EngineState
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.core.state import SwitchMode
from llmuxd.engine.proctable import boot_id
from llmuxd.engine.record import EngineRecord, fingerprint
from llmuxd.engine.spec import EngineSpec

RECORD = EngineRecord(
    model="a",
    incarnation=3,
    pid=4711,
    start_ticks=123456,
    create_time=1700000000.5,
    argv=("python3", "vllm", "serve", "größe"),
    token="00ff",
    log_start=10,
    fingerprint="f",
    socket_dir="/run/llmux/engines",
    port=None,
    log_path="/var/lib/llmux/logs/a.log",
    members=((4711, 123456), (4712, 123460)),
    shm=(("/dev/shm/psm_1", 77),),
    can_park=True,
    can_sleep=True,
    version="0.32.0",
)
ASLEEP = Entry(RECORD, EngineState.ASLEEP, EvictionPolicy.parse("discard+keep_running"))
AWAKE = Entry(replace(RECORD, model="b", port=9000, cgroup="/sys/fs/cgroup/x"), EngineState.AWAKE)


def written(folder: Path, *entries: Entry, mode: SwitchMode | None = None) -> Path:
    async def write() -> None:
        book = Book(folder)
        for entry in entries:
            book.set(entry.record.model, entry)
        book.set_mode(mode or SwitchMode())
        book.set_costs("a", {"wake": 1.23456, "start": 30.0})
        await book.flush()

    asyncio.run(write())
    return folder / "engines.json"


def test_what_was_noted_is_read_again(tmp_path):
    written(tmp_path, ASLEEP, AWAKE, mode=SwitchMode(True, "a"))
    book = Book(tmp_path)
    assert book.load() == {"a": ASLEEP, "b": AWAKE}
    assert book.mode == SwitchMode(True, "a")
    assert book.costs == {"a": {"wake": 1.235, "start": 30.0}}


def test_without_a_file_there_are_none(tmp_path):
    book = Book(tmp_path)
    assert (book.load(), book.mode) == ({}, SwitchMode())


def test_only_the_daemon_reads_it(tmp_path):
    file = written(tmp_path, ASLEEP)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["engines.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes for others")
def test_written_by_root_it_is_the_daemons_all_the_same(tmp_path):
    os.chown(tmp_path, 1234, 1235)
    found = written(tmp_path, ASLEEP).stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 1235, 0o600)


def test_another_boots_engines_and_mode_are_gone(tmp_path):
    file = written(tmp_path, ASLEEP, mode=SwitchMode(True))
    file.write_text(file.read_text().replace(boot_id(), "another"))
    book = Book(tmp_path)
    assert (book.load(), book.mode) == ({}, SwitchMode())
    assert book.costs["a"]["start"] == 30.0, "what a start takes is the same"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "version": 2}),
        lambda text: json.dumps({**json.loads(text), "engines": {"a": {}}}),
        lambda text: text.replace('"asleep"', '"dreaming"'),
        lambda text: text.replace('"members"', '"numbers"'),
        lambda text: text.replace("30.0", '"long"'),
    ],
)
def test_one_that_cannot_be_understood_is_put_aside(tmp_path, caplog, damage):
    file = written(tmp_path, ASLEEP)
    damaged = damage(file.read_text())
    file.write_text(damaged)
    assert Book(tmp_path).load() == {}
    assert (tmp_path / "engines.unreadable").read_text() == damaged
    assert "cannot be understood" in caplog.text


def test_what_is_dropped_is_gone_and_what_was_loaded_stays(tmp_path):
    written(tmp_path, ASLEEP, AWAKE)

    async def drop() -> None:
        book = Book(tmp_path)
        book.load()
        book.drop("a")
        book.drop("never there")
        await book.flush()

    asyncio.run(drop())
    assert Book(tmp_path).load() == {"b": AWAKE}


def test_a_change_during_a_write_is_written_too(tmp_path, monkeypatch):
    """Many changes at once are few writes, and `flush` waits for the last of them."""
    writes = []
    right = book_module.write_atomically

    def write(path: Path, text: str) -> None:
        writes.append(text)
        right(path, text)

    monkeypatch.setattr(book_module, "write_atomically", write)

    async def note() -> None:
        book = Book(tmp_path)
        book.set("a", ASLEEP)
        await asyncio.sleep(0)
        for number in range(50):
            book.set("b", replace(AWAKE, record=replace(AWAKE.record, pid=number + 1)))
        await book.flush()

    asyncio.run(note())
    assert len(writes) <= 2
    assert Book(tmp_path).load()["b"].record.pid == 50


def test_nothing_new_is_no_write(tmp_path):
    async def note() -> None:
        book = Book(tmp_path)
        book.set("a", ASLEEP)
        await book.flush()
        os.unlink(book.path)
        book.set("a", ASLEEP)
        book.set_mode(SwitchMode())
        await book.flush()
        assert not book.path.exists()

    asyncio.run(note())


def test_a_disk_that_takes_nothing_is_said_and_stops_nothing(tmp_path, caplog):
    async def note() -> None:
        book = Book(tmp_path / "missing")
        book.set("a", ASLEEP)
        await asyncio.wait_for(book.flush(), 5)

    asyncio.run(note())
    assert "a restart would not find the engines" in caplog.text


class TestFingerprint:
    SPEC = EngineSpec("a", "p", ("vllm",), Path("/run/e"), Path("/var/l/a.log"), env={"TOKEN": "x"})

    @pytest.mark.parametrize(
        "change",
        [
            {"model_path": "q"},
            {"vllm_command": ("vllm2",)},
            {"aliases": ("b",)},
            {"extra_args": ("--x",)},
            {"env": {"TOKEN": "y"}},
            {"port": 9000},
            {"socket_dir": Path("/run/f")},
            {"log_path": Path("/var/l/b.log")},
        ],
    )
    def test_it_differs_with_whatever_an_engine_is_started_from(self, change):
        assert fingerprint(replace(self.SPEC, **change)) != fingerprint(self.SPEC)

    def test_it_is_the_same_for_the_same(self):
        assert fingerprint(replace(self.SPEC, env={"TOKEN": "x"}, owner="/other")) == fingerprint(self.SPEC)

    def test_it_shows_no_secret(self):
        assert "x" not in fingerprint(self.SPEC)

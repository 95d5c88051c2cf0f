"""Reading logs: where the last lines begin, and following a file through all that may happen to it."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import pytest

from llmuxd.control import logs
from llmuxd.control.logs import read_log, start_of_last

DEADLINE_SECS = 10.0


@pytest.mark.parametrize(
    ("text", "lines", "last"),
    [
        (b"", 3, b""),
        (b"a\nb\nc\n", 0, b""),
        (b"a\nb\nc\n", 1, b"c\n"),
        (b"a\nb\nc\n", 2, b"b\nc\n"),
        (b"a\nb\nc\n", 3, b"a\nb\nc\n"),
        (b"a\nb\nc\n", 9, b"a\nb\nc\n"),
        (b"a\nb\nc", 1, b"c"),
        (b"a\nb\nc", 2, b"b\nc"),
        (b"\n\n\n", 2, b"\n\n"),
        (b"no end", 1, b"no end"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 65536])
def test_where_the_last_lines_begin(
    text: bytes, lines: int, last: bytes, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "CHUNK_BYTES", chunk)
    assert text[start_of_last(io.BytesIO(text), lines) :] == last


async def _all(path: Path, lines: int) -> bytes:
    return b"".join([chunk async for chunk in read_log(path, lines, follow=False)])


def test_a_log_is_read_to_its_end_in_chunks(tmp_path: Path) -> None:
    path = tmp_path / "log"
    line = b"x" * 99 + b"\n"
    path.write_bytes(line * 5000)
    assert asyncio.run(_all(path, 4000)) == line * 4000


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert asyncio.run(_all(tmp_path / "none", 10)) == b""


def test_a_log_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        asyncio.run(_all(tmp_path, 10))


async def _reads(following: AsyncGenerator[bytes, None], wanted: bytes) -> None:
    """Take what comes until it is what is wanted."""

    async def read() -> None:
        got = b""
        while got != wanted:
            got += await anext(following)
            assert wanted.startswith(got)

    await asyncio.wait_for(read(), DEADLINE_SECS)


@contextmanager
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(logs, "POLL_SECS", 0.002)
        yield


def test_following_sees_what_is_added_and_a_file_that_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"

    async def follow() -> None:
        async with aclosing(read_log(path, 10, follow=True)) as following:
            reading = asyncio.create_task(_reads(following, b"first\n"))
            await asyncio.sleep(0)
            path.write_bytes(b"first\n")
            await reading
            with path.open("ab") as file:
                file.write(b"engine started again\n")
            await _reads(following, b"engine started again\n")

    with _quick(monkeypatch):
        asyncio.run(follow())


def test_following_begins_with_the_last_lines_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"1\n2\n3\n")

    async def follow() -> None:
        async with aclosing(read_log(path, 1, follow=True)) as following:
            await _reads(following, b"3\n")

    with _quick(monkeypatch):
        asyncio.run(follow())


@pytest.mark.parametrize("new", [b"new\n", b"longer than what was there before\n"])
def test_following_goes_on_with_a_log_that_took_the_place_of_another(
    new: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "log", tmp_path / "other"
    path.write_bytes(b"old line\n")

    async def follow() -> None:
        async with aclosing(read_log(path, 10, follow=True)) as following:
            await _reads(following, b"old line\n")
            other.write_bytes(new)
            os.replace(other, path)
            await _reads(following, new)

    with _quick(monkeypatch):
        asyncio.run(follow())


def test_following_begins_again_with_a_log_that_was_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"a long line of old\n")

    async def follow() -> None:
        async with aclosing(read_log(path, 10, follow=True)) as following:
            await _reads(following, b"a long line of old\n")
            path.write_bytes(b"new\n")
            await _reads(following, b"new\n")

    with _quick(monkeypatch):
        asyncio.run(follow())

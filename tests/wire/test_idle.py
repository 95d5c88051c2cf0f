"""Connections to engines between two requests: used again for a moment, and closed after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wire.client import post
from tests.wire.engine import plain
from tests.wire.stack import Wire, play, until


def test_idle_connections_to_an_engine_are_closed_after_a_moment(tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        clients = [await wire.connect() for _ in range(5)]
        for client in clients:
            await client.send(post(b'{"model": "a"}'))
        for asked in [await wire.engine.next() for _ in clients]:
            await asked.answer(plain(b"ok"), keep=True)
        for client in clients:
            answer = await client.answer()
            assert answer is not None
            assert answer.body == b"ok"
        await wire.after(0.9)
        assert len(wire.engine._open) == wire.engine.connections == 5
        await wire.after(0.5)
        await until(lambda: not wire.engine._open, "they are closed")

    play(tmp_path, scenario)


@pytest.mark.parametrize("pause", [0.0, 2.0])
def test_a_client_that_asks_again_later_is_served_all_the_same(pause: float, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        for _ in range(3):
            await client.send(post(b'{"model": "a"}'))
            await (await wire.engine.next()).answer(plain(b"ok"), keep=True)
            answer = await client.answer()
            assert answer is not None
            assert answer.body == b"ok"
            await wire.after(pause)
        assert wire.engine.connections == (3 if pause else 1)
        assert wire.bounced() == 0

    play(tmp_path, scenario)

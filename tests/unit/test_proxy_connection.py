"""A client's connection tells the task that serves it when the client has gone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import pytest
from aiohttp import web

from llmuxd.proxy.connection import ClientConnection

DEADLINE_SECS = 10.0


async def unused(_request: web.BaseRequest) -> web.StreamResponse:
    raise AssertionError("no request was sent")


async def connected() -> tuple[ClientConnection, socket.socket]:
    loop = asyncio.get_running_loop()
    ours, clients = socket.socketpair()
    server = web.Server(unused)
    _, connection = await loop.create_connection(lambda: ClientConnection(server, loop=loop), sock=ours)
    return connection, clients


def close(client: socket.socket) -> None:
    client.close()


def half_close(client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [close, half_close])
@pytest.mark.parametrize("first", ["served", "left"])
def test_a_task_is_cancelled_whether_the_client_goes_before_or_after_it_begins(
    leave: Callable[[socket.socket], None], first: str
) -> None:
    async def run() -> None:
        connection, client = await connected()
        with client:
            task = asyncio.create_task(asyncio.sleep(3600))
            if first == "served":
                connection.serves(task)
                leave(client)
            else:
                leave(client)
                deadline = asyncio.get_running_loop().time() + DEADLINE_SECS
                while connection.transport is not None:
                    assert asyncio.get_running_loop().time() < deadline
                    await asyncio.sleep(0.001)
                connection.serves(task)
            await asyncio.wait([task], timeout=DEADLINE_SECS)
            assert task.cancelled()

    asyncio.run(run())


def test_a_task_that_has_been_served_is_left_alone() -> None:
    async def run() -> None:
        connection, client = await connected()
        task = asyncio.create_task(asyncio.sleep(0.05))
        connection.serves(task)
        connection.serves(None)
        client.close()
        await task

    asyncio.run(run())

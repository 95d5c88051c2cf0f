"""A case on the wire: what one client sends, what it is answered, and what of it reaches the engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.wire.client import Answer, get, request
from tests.wire.engine import ok
from tests.wire.stack import Wire, play

BODY = b'{"model": "a"}'
"""14 bytes: 0xe."""

SMUGGLED = request("POST /v1/smuggled?model=a HTTP/1.1", "Host: h", "Content-Length: 8", body=b"smuggled")
"""Stands where only a proxy that has miscounted finds a request."""

Said = str | tuple[str, ...]
"""Status and code, such as "200" or "400 bad_request"; several where more than one answer is right."""

BAD = "400 bad_request"
BAD_BODY = ("400 bad_request", "400 invalid_body")


@dataclass(frozen=True)
class Case:
    """What is sent at once on one connection, and what has to come of it."""

    name: str
    sent: bytes
    answers: tuple[Said, ...]
    """In their order."""
    reached: tuple[bytes, ...] = ()
    """The bodies that the engine gets."""
    open: bool | None = False
    """The connection can be used afterwards; else it is closed. None: either, but nothing in between."""


def refused(name: str, sent: bytes, said: Said = BAD) -> Case:
    """One answer, and it is the last: nothing of it or of what follows reaches the engine."""
    return Case(name, sent + SMUGGLED, (said,))


def served(name: str, sent: bytes, reached: bytes = BODY) -> Case:
    """It goes to the engine with this body, and the connection stays."""
    return Case(name, sent, ("200",), (reached,), open=True)


def declined(name: str, sent: bytes, said: Said) -> Case:
    """It is refused, but there is nothing wrong with its framing: the connection stays."""
    return Case(name, sent, (said,), open=True)


def rejected(name: str, sent: bytes, said: Said) -> Case:
    """It is refused early: its body is read over, and then the next request counts, or the connection is closed."""
    return Case(name, sent + SMUGGLED, (said,), open=None)


def table(cases: list[Case]) -> Any:
    """The mark that makes a test of each."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "two cases have one name"
    return pytest.mark.parametrize("case", cases, ids=names)


def said(answer: Answer) -> str:
    """As in a table."""
    return f"{answer.status} {answer.code}" if answer.status >= 400 else str(answer.status)


def check(case: Case, folder: Path, **how: Any) -> None:
    """Send it, and compare."""

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(case.sent)
        for number, allowed in enumerate(case.answers):
            answer = await client.answer()
            assert answer is not None, f"no answer {number}"
            assert answer.complete
            assert said(answer) in ((allowed,) if isinstance(allowed, str) else allowed)
        reached = case.reached
        if case.open:
            await client.send(get("/health"))
            answer = await client.answer()
            assert answer is not None
            assert answer.status == 200
        elif case.open is None and (answer := await client.answer()) is not None:
            assert answer.status in (200, 401)
            reached += (b"smuggled",) if answer.status == 200 else ()
        else:
            assert await client.rest() == b""
        assert tuple(wire.engine.bodies) == reached

    play(folder, scenario, ok, **how)

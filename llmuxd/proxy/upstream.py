"""The way to the engines: one connection per request, nothing added, nothing taken apart, no time limit."""

from __future__ import annotations

import io

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from llmuxd.engine import Endpoint
from llmuxd.proxy.events import is_event_stream

ENGINE_FAILED = (aiohttp.ClientError, OSError)
"""What is raised when an engine cannot be reached, goes away, says that it is dead, or does not speak HTTP."""

SAYS_DEAD = b"EngineCore encountered an issue"
"""vLLM's words for its EngineCore being dead. They come in an answer that is otherwise complete."""

_NOT_TO_BE_ADDED = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")

_COPIED_AT_ONCE_BYTES = 1024 * 1024
_ERROR_BYTES = 64 * 1024
"""No error that an engine means for a human is longer."""


class EngineDead(aiohttp.ClientError):
    """The engine answers that it is dead."""


class Engines:
    """Sends requests to engines. `close` it in the loop in which it was used."""

    def __init__(self) -> None:
        self._sessions: dict[Endpoint, aiohttp.ClientSession] = {}

    async def ask(
        self, endpoint: Endpoint, method: str, target: str, headers: CIMultiDict[str], body: bytes
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """Send a request and wait for its answer and the first bytes of its body, none if there is no body.

        The head alone is no answer: vLLM sends that of a stream before it has looked at the request. The caller
        closes the answer, which closes the connection. Raises one of ENGINE_FAILED if none comes.
        """
        answer = await self._send(endpoint, method, target, headers, body)
        try:
            first = await _first_bytes(answer)
            if _says_dead(answer, first):
                raise EngineDead("it answers that its EngineCore is dead")
        except BaseException:
            answer.close()
            raise
        return answer, first

    async def _send(
        self, endpoint: Endpoint, method: str, target: str, headers: CIMultiDict[str], body: bytes
    ) -> aiohttp.ClientResponse:
        # A large body is sent piece by piece, so that it does not hold up the loop.
        data = body if len(body) <= _COPIED_AT_ONCE_BYTES else io.BytesIO(body)
        return await self._session(endpoint).request(
            method,
            URL(endpoint.base_url + target, encoded=True),
            headers=headers,
            data=data or None,
            allow_redirects=False,
        )

    async def close(self) -> None:
        """Close what is still open."""
        for session in self._sessions.values():
            await session.close()

    def _session(self, endpoint: Endpoint) -> aiohttp.ClientSession:
        session = self._sessions.get(endpoint)
        if session is None:
            session = self._sessions[endpoint] = aiohttp.ClientSession(
                connector=endpoint.connector(),
                timeout=aiohttp.ClientTimeout(total=None),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=_NOT_TO_BE_ADDED,
            )
            # Newer versions send a GET a second time by themselves, and there is no public word against it.
            if hasattr(session, "_retry_connection"):
                session._retry_connection = False
        return session


async def whole_error(answer: aiohttp.ClientResponse, first: bytes) -> bytes:
    """The body of an answer that is worth telling in other words, as far as that. Raises one of ENGINE_FAILED."""
    body = first
    while len(body) < _ERROR_BYTES and (piece := await answer.content.readany()):
        body += piece
    return body[:_ERROR_BYTES]


async def _first_bytes(answer: aiohttp.ClientResponse) -> bytes:
    length = answer.content_length
    if answer.status == 500 and length is not None and length <= _ERROR_BYTES:
        return await answer.content.read()
    return await answer.content.readany()


def _says_dead(answer: aiohttp.ClientResponse, first: bytes) -> bool:
    """Whether it is an error with vLLM's words, be it the whole answer or the first event of a stream."""
    if answer.status != 500 and not is_event_stream(answer.headers.get("Content-Type", "")):
        return False
    return SAYS_DEAD in first and b'"error"' in first

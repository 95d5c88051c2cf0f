"""One exchange with an engine: the request's bytes go out as they came in, the answer's come back as they are."""

from __future__ import annotations

import io

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from llmuxd.engine import Endpoint
from llmuxd.proxy.errors import error_body, refusal

LARGE_BODY_BYTES = 2**20
"""From this size on aiohttp wants a stream, so that sending it does not hold up the loop."""

_AUTOMATIC = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


class EngineGone(Exception):
    """The engine did not answer: no connection, or it broke before the answer's head."""


class AnswerBroken(Exception):
    """The answer broke off after its head was passed on."""


class Engines:
    """Connections to engines. One per request: closing it is what makes vLLM abort the generation."""

    def __init__(self) -> None:
        self._sessions: dict[Endpoint, aiohttp.ClientSession] = {}

    async def ask(
        self, endpoint: Endpoint, method: str, target: str, headers: CIMultiDict[str], body: bytes
    ) -> aiohttp.ClientResponse:
        """Send a request and wait for the answer's head, for as long as the engine takes. Raises EngineGone."""
        data = io.BytesIO(body) if len(body) > LARGE_BODY_BYTES else body or None
        try:
            return await self._session(endpoint).request(
                method,
                URL(endpoint.base_url + target, encoded=True),
                data=data,
                headers=headers,
                skip_auto_headers=_AUTOMATIC,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:
            raise EngineGone(str(error) or type(error).__name__) from error

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()

    def _session(self, endpoint: Endpoint) -> aiohttp.ClientSession:
        if endpoint not in self._sessions:
            self._sessions[endpoint] = aiohttp.ClientSession(
                connector=endpoint.connector(),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._sessions[endpoint]


async def pass_on(answer: aiohttp.ClientResponse, response: web.StreamResponse) -> None:
    """Pass an answer's body to the client, each piece as it comes, no faster than the client reads.

    Raises AnswerBroken if the engine breaks off, and ConnectionError if the client does.
    """
    pieces = answer.content.iter_any()
    while True:
        try:
            piece = await pieces.__anext__()
        except StopAsyncIteration:
            return
        except (aiohttp.ClientError, OSError) as error:
            raise AnswerBroken(str(error) or type(error).__name__) from error
        await response.write(piece)


async def break_off(request: web.BaseRequest, response: web.StreamResponse, message: str) -> None:
    """End an answer that has begun and cannot be finished: never so that it looks finished.

    A stream of events gets an error event first. Then the connection is closed without the end of the body.
    """
    if response.content_type == "text/event-stream":
        error = error_body(refusal(502, "engine_died", message, "server_error"))
        try:
            await response.write(b"data: " + error + b"\n\n")
        except ConnectionError:
            return
    if request.transport is not None:
        request.transport.close()

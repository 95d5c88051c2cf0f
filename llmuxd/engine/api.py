"""vLLM's HTTP as far as the daemon itself calls it. The clients' requests go through `llmuxd.proxy`.

Every parameter of the development endpoints goes into the query string: vLLM ignores a body there and would take
the defaults, level 1 and abort. A call that is given up is not taken back: vLLM carries it out all the same.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from enum import Enum
from types import TracebackType
from typing import Any

import aiohttp

from llmuxd.core.events import FailureKind
from llmuxd.engine.errors import EngineError, says_out_of_memory
from llmuxd.engine.spec import Endpoint

VERIFY_SECS = 2.0
_VERIFY_POLL_SECS = 0.05
_QUERY_TIMEOUT_SECS = 10.0
_PARK_SINCE = (0, 17)
_NOT_OFFERED = (400, 404, 405, 422, 501)
_SHOWN_CHARS = 300
_SAYS_DEAD = re.compile(r"EngineDeadError|EngineCore encountered an issue")

WARMUPS: Mapping[str, Mapping[str, Any]] = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1},
    "/v1/embeddings": {"input": "Hello"},
    "/pooling": {"input": "Hello"},
    "/classify": {"input": "Hello"},
}
"""The smallest inference of each kind of model, in the order in which they are tried."""


CERTAIN: Mapping[str, Any] = {"max_tokens": 16, "temperature": 0, "seed": 0}
"""Of a generation: the likeliest token each time."""


class Health(Enum):
    """What GET /health says."""

    OK = "ok"
    DEAD = "dead"
    """503: the API server has lost its EngineCore."""
    REFUSED = "refused"
    """Nothing listens."""
    UNKNOWN = "unknown"
    """No answer in time, or none that says anything: a busy engine may do that."""


class Suspect(EngineError):
    """The engine may be dead: its connection broke before the answer was complete, or it says so itself."""


class VllmApi:
    """The calls to one engine. Raises EngineError; made and closed in a running loop."""

    def __init__(self, endpoint: Endpoint, model: str, api_key: str | None = None) -> None:
        self._base = endpoint.base_url
        self._model = model
        self._auth = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session = aiohttp.ClientSession(connector=endpoint.connector(), timeout=aiohttp.ClientTimeout(total=None))

    async def __aenter__(self) -> VllmApi:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def health(self, timeout: float) -> Health:
        """Ask /health, for at most `timeout` seconds. Raises nothing."""
        try:
            status, _ = await self._call("GET", "/health", timeout=timeout)
        except Suspect as error:
            cause = getattr(error.__cause__, "os_error", None)
            refused = isinstance(cause, (ConnectionRefusedError, FileNotFoundError))
            return Health.REFUSED if refused else Health.UNKNOWN
        except EngineError:
            return Health.UNKNOWN
        return {200: Health.OK, 503: Health.DEAD}.get(status, Health.UNKNOWN)

    async def version(self) -> str | None:
        """vLLM's version, None if it does not tell."""
        try:
            version = (await self._query("/version")).get("version")
        except EngineError:
            return None
        return version if isinstance(version, str) else None

    async def has_sleep(self) -> bool:
        """Whether the development endpoints are there. An engine that is too busy to say so has them."""
        try:
            status, _ = await self._call("GET", "/is_sleeping", timeout=_QUERY_TIMEOUT_SECS)
        except EngineError as error:
            return error.kind is FailureKind.TIMEOUT
        return status not in (404, 405)

    async def is_sleeping(self) -> bool:
        """Whether scheduling is paused, at any level. Goes through EngineCore."""
        answer = (await self._query("/is_sleeping")).get("is_sleeping")
        if not isinstance(answer, bool):
            raise EngineError(FailureKind.REFUSED, "/is_sleeping answered no boolean")
        return answer

    async def sleep(self, level: int, mode: str | None) -> None:
        """POST /sleep; `mode` is None for a vLLM that knows none. Returns when vLLM has answered."""
        params = {"level": str(level)}
        if mode is not None:
            params["mode"] = mode
        await self._post("/sleep", params)

    async def wake(self, tags: str | None = None) -> None:
        """POST /wake_up, of everything or of one tag."""
        await self._post("/wake_up", {"tags": tags} if tags else {})

    async def reload_weights(self) -> None:
        """Read the weights again, which a sleep at level 2 has discarded."""
        await self.collective_rpc("reload_weights")

    async def collective_rpc(self, method: str) -> None:
        """Have every rank call a method of its worker. Raises EngineError if there is none of that name."""
        await self._post("/collective_rpc", {}, {"method": method})

    async def verify_sleeping(self, expected: bool) -> None:
        """See that /is_sleeping says so and /health is well. Raises EngineError of kind LIED if not."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + VERIFY_SECS
        while await self.is_sleeping() is not expected:
            if loop.time() >= deadline:
                done, state = ("sleep", "awake") if expected else ("wake_up", "asleep")
                raise EngineError(FailureKind.LIED, f"/{done} answered success, but the engine is {state}")
            await asyncio.sleep(_VERIFY_POLL_SECS)
        status, _ = await self._call("GET", "/health", timeout=_QUERY_TIMEOUT_SECS)
        if status != 200:
            what = "sleep" if expected else "wake_up"
            raise EngineError(FailureKind.LIED, f"/{what} answered success, but /health answers {status}")

    async def infer(self) -> None:
        """One inference of the kind that the model can do; the answer is thrown away."""
        await self._ask({})

    async def answer(self) -> str:
        """What it answers to always the same question, as certainly as it can: two that differ tell that the model is
        not what it was."""
        text = await self._ask(CERTAIN)
        try:
            return said(text)
        except (ValueError, AttributeError, TypeError):
            raise EngineError(FailureKind.REFUSED, f"it answers what no inference answers: {text[:80]!r}") from None

    async def _ask(self, further: Mapping[str, Any]) -> str:
        offered = await self._paths()
        answers = []
        for path, body in WARMUPS.items():
            if offered is not None and path not in offered:
                continue
            more = further if "max_tokens" in body else {}
            status, text = await self._call("POST", path, body={"model": self._model, **body, **more})
            if status == 200:
                return text
            if status not in _NOT_OFFERED:
                raise _refusal(path, status, text)
            answers.append(f"{path} answered {status}: {_message(text)}")
        raise EngineError(
            FailureKind.REFUSED, "; ".join(answers) or "it offers no kind of inference to warm it up with"
        )

    async def _paths(self) -> set[str] | None:
        """The paths that the engine says it has; None if it does not say."""
        try:
            paths = (await self._query("/openapi.json")).get("paths")
        except EngineError:
            return None
        return set(paths) if isinstance(paths, dict) else None

    async def _query(self, path: str) -> dict[str, Any]:
        status, text = await self._call("GET", path, timeout=_QUERY_TIMEOUT_SECS)
        if status != 200:
            raise _refusal(path, status, text)
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EngineError(FailureKind.REFUSED, f"{path} answered no JSON object")
        return answer

    async def _post(self, path: str, params: Mapping[str, str], body: Mapping[str, Any] | None = None) -> None:
        status, text = await self._call("POST", path, params=params, body=body)
        if status != 200:
            query = "&".join(f"{key}={value}" for key, value in params.items())
            raise _refusal(f"{path}?{query}" if query else path, status, text)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> tuple[int, str]:
        try:
            async with self._session.request(
                method,
                self._base + path,
                params=params,
                json=body,
                headers=self._auth,
                timeout=aiohttp.ClientTimeout(total=timeout),
            ) as response:
                return response.status, await response.text(errors="replace")
        except asyncio.TimeoutError as error:
            raise EngineError(FailureKind.TIMEOUT, f"{path} was not answered within {timeout} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Suspect(FailureKind.REFUSED, f"{path}: {error or type(error).__name__}") from error
        except RuntimeError as error:
            # aiohttp's word for a session that was closed under its user.
            if not self._session.closed:
                raise
            raise EngineError(FailureKind.REFUSED, f"{path}: the engine was let go") from error


def said(text: str) -> str:
    """What an answer says, without what differs between two that say the same: ids, times, counts."""
    answer = json.loads(text)
    for key in ("choices", "data"):
        if isinstance(answer, dict) and isinstance(answer.get(key), list):
            return json.dumps([_content(part) for part in answer[key]])
    return text


def _content(part: Mapping[str, Any]) -> Any:
    """A choice's text or message, or an entry's data."""
    for key in ("text", "embedding", "data", "probs"):
        if key in part:
            return part[key]
    message = part.get("message")
    return message.get("content") if isinstance(message, dict) else part


def can_park(version: str | None) -> bool:
    """Whether this vLLM takes `mode` on /sleep. One whose version says nothing is taken not to."""
    return is_at_least(version, _PARK_SINCE)


def is_at_least(version: str | None, since: tuple[int, int]) -> bool:
    """Whether a version is this one, or newer. One that says nothing is taken to be older."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return match is not None and (int(match[1]), int(match[2])) >= since


def _refusal(call: str, status: int, text: str) -> EngineError:
    if _SAYS_DEAD.search(text):
        return Suspect(FailureKind.REFUSED, f"{call} answered {status}: {_message(text)}")
    kind = FailureKind.OUT_OF_MEMORY if says_out_of_memory(text) else FailureKind.REFUSED
    return EngineError(kind, f"{call} answered {status}: {_message(text)}")


def _message(text: str) -> str:
    """What an error answer says, OpenAI's form or any other, in a line of bounded length."""
    try:
        answer = json.loads(text)
        error = answer.get("error", answer)
        text = str(error.get("message") or error.get("detail") or error if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:_SHOWN_CHARS] or "nothing"

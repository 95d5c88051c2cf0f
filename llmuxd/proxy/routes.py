"""Which requests are answered here, which are forwarded, and which can never pass. Pure: text in, a route out.

An engine runs with vLLM's development endpoints on (/sleep, /wake_up, /collective_rpc and more), and whoever reaches
them owns it. So a target is forwarded only if it is spelled in the one way that has no second reading, and only
if it is on the list; what is not understood is refused, never repaired. The lists are of vLLM 0.32.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass
from enum import Enum
from urllib.parse import unquote

from llmuxd.proxy.errors import Rejected
from llmuxd.proxy.memo import remember

_TREES = ("/v1/", "/v2/", "/inference/v1/")
_PATHS = frozenset({"/tokenize", "/detokenize", "/pooling", "/classify", "/score", "/rerank"})
_OPERATORS_OWN = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/inference/v1/abort_requests"})
"""In those trees, but they change the engine, or end requests, for everybody."""

_UPSTREAM = "/upstream/"
_UPSTREAM_PATHS = frozenset(
    {
        "/cohere/v2/chat",
        "/cohere/v2/chat/render",
        "/docs",
        "/generative_scoring",
        "/health",
        "/invocations",
        "/load",
        "/metrics",
        "/openapi.json",
        "/ping",
        "/redoc",
        "/tokenizer_info",
        "/version",
    }
)
"""What else an engine serves for its users: only there where the path says which engine is meant."""

RESPONSES = "/v1/responses"
REALTIME = "/v1/realtime"
_ANTHROPIC = "/v1/messages"

STREAMED = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        RESPONSES,
        _ANTHROPIC,
        "/inference/v1/generate",
        "/cohere/v2/chat",
        "/invocations",
    }
)
"""Where `"stream": true` is answered by server-sent events. Elsewhere vLLM ignores it."""

_MODELS = "/v1/models"
_READING = ("GET", "HEAD")
_METHODS = frozenset({*_READING, "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# What RFC 3986 allows in a path, less the escapes and the parameters, which servers take apart in different ways.
_SEGMENT = r"[A-Za-z0-9._~!$&'()*+,=:@-]+"
_PATH = re.compile(rf"/(?:{_SEGMENT}(?:/{_SEGMENT})*/?)?")
_QUERY = re.compile(r"[\x21\x22\x24-\x7e]*")
_MODEL_ID = re.compile(r"[\x21\x22\x24-\x7e]+")
_STORED = re.compile(rf"{RESPONSES}/(?!render\Z)([A-Za-z0-9_-]{{1,128}})(?:/[a-z_]+)?")
_SHOWN_CHARS = 200
_NAME_CHARS = 512
"""No model that a path says is looked for under a longer name."""
_MAX_KNOWN_CHARS = 64


class Action(Enum):
    FORWARD = "forward"
    LIST_MODELS = "list models"
    SHOW_MODEL = "show model"
    HEALTH = "health"
    OPTIONS = "options"


@dataclass(frozen=True, slots=True)
class Route:
    """What to do with a request. `path` and `query` are as its engine gets them, and as they were received."""

    action: Action
    path: str
    query: str
    model: str = ""
    """The name of a model that the path says; of SHOW_MODEL, decoded."""
    response: str = ""
    """The id of a stored response that it is about."""

    @property
    def target(self) -> str:
        """What its engine is asked for."""
        return f"{self.path}?{self.query}" if self.query else self.path


_known: dict[tuple[str, str], Route] = {}
"""Method and target -> where it goes, of those that were decided before."""


def is_anthropic(path: str) -> bool:
    """Whether Anthropic's clients ask there; all other APIs are OpenAI's or vLLM's."""
    return path.startswith(_ANTHROPIC)


def route(method: str, target: str, models: Container[str] = ()) -> Route:
    """Decide by the method and the raw request target; `models` are the names that there are.

    Raises Rejected for what is not served.
    """
    if method not in _METHODS:
        raise Rejected(400, "unsupported_method", f"{method[:_SHOWN_CHARS]} is not served")
    path, question, query = target.partition("?")
    if not question:
        known = _known.get((method, path))
        if known is not None:
            return known
    elif not query or not _QUERY.fullmatch(query):
        raise _malformed(target)
    if path.startswith(_MODELS + "/") and method in _READING and _MODEL_ID.fullmatch(path):
        # Never forwarded, so an id may be escaped, as clients do with its slashes.
        return Route(Action.SHOW_MODEL, path, query, unquote(path[len(_MODELS) + 1 :]))
    if not _PATH.fullmatch(path) or any(part in (".", "..") for part in path.split("/")):
        raise _malformed(target)
    if path.startswith(_UPSTREAM):
        return _upstream(method, path, query, models)
    if path in (_MODELS, "/health"):
        if method == "OPTIONS":
            return Route(Action.OPTIONS, path, query)
        if method not in _READING:
            raise Rejected(405, "method_not_allowed", f"{path} is read with GET")
        return Route(Action.HEALTH if path == "/health" else Action.LIST_MODELS, path, query)
    if not _is_listed(path):
        raise _unknown(method, path)
    way = _forwarded(method, path, query)
    if not question and not way.response and len(path) <= _MAX_KNOWN_CHARS:
        remember(_known, (method, path), way)
    return way


def _upstream(method: str, path: str, query: str, models: Container[str]) -> Route:
    """`/upstream/MODEL/PATH`. A model's name may have slashes; the longest that there is counts."""
    said = path[len(_UPSTREAM) :]
    end = said.rfind("/", 0, _NAME_CHARS + 1)
    while end > 0:
        name, rest = said[:end], said[end:]
        if name in models:
            if not (_is_listed(rest) or rest in _UPSTREAM_PATHS):
                raise _unknown(method, path)
            return _forwarded(method, rest, query, name)
        end = said.rfind("/", 0, end)
    name = said.partition("/")[0][:_SHOWN_CHARS]
    raise Rejected(404, "model_not_found", f"no model is named {name}: /upstream/MODEL/PATH needs one that is", "model")


def _forwarded(method: str, path: str, query: str, model: str = "") -> Route:
    stored = _STORED.fullmatch(path)
    action = Action.OPTIONS if method == "OPTIONS" else Action.FORWARD
    return Route(action, path, query, model, stored[1] if stored else "")


def _is_listed(path: str) -> bool:
    # vLLM answers a slash at the end with a redirect to its own address, which no client can reach.
    listed = path in _PATHS or (path.startswith(_TREES) and not path.endswith("/"))
    return listed and path not in _OPERATORS_OWN


def _unknown(method: str, path: str) -> Rejected:
    return Rejected(404, "unknown_url", f"there is no {method} {path[:_SHOWN_CHARS]} here")


def _malformed(target: str) -> Rejected:
    shown = target[:_SHOWN_CHARS].encode("ascii", "backslashreplace").decode()
    return Rejected(400, "invalid_url", f"not a plain path: {shown}")

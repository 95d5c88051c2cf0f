"""Which requests are answered here, which are forwarded, and which can never pass. Pure: text in, a route out.

An engine runs with vLLM's development endpoints on (/sleep, /wake_up, /collective_rpc and more), and whoever reaches
them owns it. So a target is forwarded only if it is spelled in the one way that has no second reading, and only
if it is on the list; what is not understood is refused, never repaired.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from urllib.parse import unquote

from llmuxd.proxy.errors import Rejected

_TREES = ("/v1/", "/v2/", "/inference/v1/")
_PATHS = frozenset({"/tokenize", "/detokenize", "/pooling", "/classify", "/score", "/rerank"})
_OPERATORS_OWN = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/inference/v1/abort_requests"})
"""In those trees, but they change the engine, or end requests, for everybody."""

MESSAGES = "/v1/messages"
"""Anthropic's API; all others are OpenAI's or vLLM's."""

STREAMED = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", MESSAGES, "/inference/v1/generate"})
"""Where `"stream": true` is answered by server-sent events. Elsewhere vLLM ignores it."""

_MODELS = "/v1/models"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# What RFC 3986 allows in a path, less the escapes and the parameters, which servers take apart in different ways.
_SEGMENT = r"[A-Za-z0-9._~!$&'()*+,=:@-]+"
_PATH = re.compile(rf"/(?:{_SEGMENT}(?:/{_SEGMENT})*/?)?")
_QUERY = re.compile(r"[\x21\x22\x24-\x7e]*")
_MODEL_ID = re.compile(r"[\x21\x22\x24-\x7e]+")
_SHOWN_CHARS = 200


class Action(Enum):
    FORWARD = "forward"
    LIST_MODELS = "list models"
    SHOW_MODEL = "show model"
    HEALTH = "health"


@dataclass(frozen=True)
class Route:
    """What to do with a request. `path` and `query` are as they were received."""

    action: Action
    path: str
    query: str
    model_id: str = ""
    """Of SHOW_MODEL, decoded."""


def route(method: str, target: str) -> Route:
    """Decide by the method and the raw request target. Raises Rejected for what is not served."""
    if method not in _METHODS:
        raise Rejected(400, "unsupported_method", f"{method[:_SHOWN_CHARS]} is not served")
    path, question, query = target.partition("?")
    if (question and not query) or not _QUERY.fullmatch(query):
        raise _malformed(target)
    if path.startswith(_MODELS + "/") and method in ("GET", "HEAD") and _MODEL_ID.fullmatch(path):
        # Never forwarded, so an id may be escaped, as clients do with its slashes.
        return Route(Action.SHOW_MODEL, path, query, unquote(path[len(_MODELS) + 1 :]))
    if not _PATH.fullmatch(path) or any(part in (".", "..") for part in path.split("/")):
        raise _malformed(target)
    if path in (_MODELS, "/health"):
        if method not in ("GET", "HEAD"):
            raise Rejected(405, "method_not_allowed", f"{path} is read with GET")
        return Route(Action.HEALTH if path == "/health" else Action.LIST_MODELS, path, query)
    # vLLM answers a slash at the end with a redirect to its own address, which no client can reach.
    listed = path in _PATHS or (path.startswith(_TREES) and not path.endswith("/"))
    if not listed or path in _OPERATORS_OWN:
        raise Rejected(404, "unknown_url", f"there is no {method} {path[:_SHOWN_CHARS]} here")
    return Route(Action.FORWARD, path, query)


def _malformed(target: str) -> Rejected:
    shown = target[:_SHOWN_CHARS].encode("ascii", "backslashreplace").decode()
    return Rejected(400, "invalid_url", f"not a plain path: {shown}")

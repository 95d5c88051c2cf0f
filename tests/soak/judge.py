"""Is this an answer that a client may get? Pure: what was asked and what came in, an outcome out.

Right is a complete answer with the content that was asked for, a refusal that has a cause, an error event, or a stream
that is visibly cut because its engine died. What looks complete and is not, is the worst that a proxy can do.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tests.soak.apis import error_of, read_stream
from tests.soak.causes import Causes
from tests.soak.menu import Order
from tests.soak.wire import Answer, End

STATUS_OF = {
    "invalid_json": 400,
    "invalid_api_key": 401,
    "model_not_allowed": 403,
    "priority_not_allowed": 403,
    "unknown_url": 404,
    "model_not_found": 404,
    "body_timeout": 408,
    "body_too_large": 413,
    "queue_full": 429,
    "rate_limit_exceeded": 429,
    "too_many_parallel_requests": 429,
    "engine_died": 502,
    "model_unavailable": 503,
    "model_not_pinned": 503,
    "queue_timeout": 504,
}
"""Code of an error -> its status. What is not here is not to be expected of a soak."""

LIMITS = frozenset({"rate_limit_exceeded", "too_many_parallel_requests"})
SERVING = LIMITS | {"queue_full", "engine_died", "model_unavailable", "model_not_pinned", "queue_timeout"}
"""What may become of a request that is in order, if there is a cause."""

CLIENT_LEFT = 499
"""What the daemon counts for a client that did not stay for its answer."""

EARLY_SECS = 0.2
"""A timeout may come so much too soon: the clocks of a client and of the daemon begin at different moments."""


class How(Enum):
    """How a request ended, for its client."""

    COMPLETE = "complete"
    REFUSED = "refused"
    ERROR_EVENT = "error event"
    CUT = "cut"
    LEFT = "left"
    UNSERVED = "unserved"
    """It stood behind another one on a connection that was closed after that."""
    FAULT = "FAULT"


@dataclass(slots=True)
class Asked:
    """One request under way. `wait` is the least time after which it may be told that it waited too long."""

    order: Order
    kind: str
    wait: float = 0.0
    began: float = 0.0

    @property
    def id(self) -> str:
        return self.order.id


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client has to tell of its request."""

    how: How
    detail: str = ""
    """The code of an error, or what is wrong."""
    status: int = 0
    """As the client saw it; 0 if it saw none."""
    counts: frozenset[int] = frozenset()
    """The statuses under which the daemon may have it."""
    unseen: bool = False
    """The daemon need not have seen it at all."""


def fault(detail: str, status: int = 0) -> Outcome:
    """What may not be."""
    return Outcome(How.FAULT, detail, status, frozenset({status}) if status else frozenset(), unseen=True)


def left(order: Order, unseen: bool) -> Outcome:
    """The client went away as it meant to: whatever the daemon made of it up to then is right."""
    return Outcome(How.LEFT, counts=_possible(order) | {CLIENT_LEFT}, unseen=unseen)


def unserved(order: Order) -> Outcome:
    """The connection was closed before its turn came."""
    return Outcome(How.UNSERVED, counts=_possible(order) | {CLIENT_LEFT}, unseen=True)


def talked(asked: Asked, complete: bool | None, causes: Causes, now: float) -> Outcome:
    """A WebSocket that was opened, and came to its end or not; `complete` is None if the client left it."""
    if asked.order.code:
        return fault(f"101 instead of {asked.order.code}", 101)
    died = _may_be_cut(asked, now, causes)
    if complete is False and not died:
        return fault("a WebSocket that was cut off without a cause", 101)
    # An engine may die when all is said, and a client may leave one that has told of its death.
    how = How.LEFT if complete is None else How.COMPLETE if complete else How.CUT
    counts = {101} if complete else {101, CLIENT_LEFT}
    return Outcome(how, "", 101, frozenset(counts | {STATUS_OF["engine_died"]} if died else counts))


def _possible(order: Order) -> frozenset[int]:
    if order.code:
        return frozenset({STATUS_OF[order.code]})
    return frozenset({200, *(STATUS_OF[code] for code in SERVING if order.model)})


def judge(asked: Asked, answer: Answer, causes: Causes) -> Outcome:
    """What to make of an answer."""
    order, status = asked.order, answer.status
    wrong = wrong_head(order, answer)
    if wrong:
        return fault(wrong, status)
    if status != 200:
        return _refusal(asked, answer, causes)
    if order.code:
        return fault(f"200 instead of {order.code}", 200)
    kind = answer.headers.get("content-type", "")
    is_stream = kind.startswith("text/event-stream")
    if order.stream != is_stream:
        return fault(f"the Content-Type is {kind}", 200)
    try:
        return _stream(asked, answer, causes) if is_stream else _whole(asked, answer, causes)
    except (ValueError, LookupError, TypeError) as error:
        return fault(f"{error!r} in {answer.body[:300]!r}", 200)


def wrong_head(order: Order, answer: Answer) -> str:
    """What every answer has, and this one has not."""
    found = answer.headers.get("x-request-id")
    if found != order.id:
        return f"the answer to another request: x-request-id is {found}"
    return "" if "server-timing" in answer.headers else "no Server-Timing"


def _whole(asked: Asked, answer: Answer, causes: Causes) -> Outcome:
    if answer.end in (End.CUT, End.RESET):
        return _cut(asked, answer, causes)
    wrong = "" if asked.order.check is None else asked.order.check(answer.body)
    return fault(wrong, 200) if wrong else Outcome(How.COMPLETE, "", 200, frozenset({200}))


def _stream(asked: Asked, answer: Answer, causes: Causes) -> Outcome:
    order = asked.order
    told = read_stream(order.path, answer.body)
    if told.wrong:
        return fault(told.wrong, 200)
    cut = answer.end in (End.CUT, End.RESET)
    if told.error is not None:
        code = told.error["code"]
        wrong = _implausible(asked, code, answer.ended, causes, told.begun)
        if told.begun and not cut:
            wrong = wrong or "an error event in mid-stream, and then a clean end"
        if wrong:
            return fault(wrong, 200)
        return Outcome(How.ERROR_EVENT, code, 200, frozenset({STATUS_OF[code]}))
    if cut:
        return _cut(asked, answer, causes)
    if not told.ended:
        return fault(f"it looks complete and is not: {answer.end.value}, after {answer.body[-100:]!r}", 200)
    wrong = "" if order.check_stream is None else order.check_stream(told)
    return fault(wrong, 200) if wrong else Outcome(How.COMPLETE, "", 200, frozenset({200}))


def _cut(asked: Asked, answer: Answer, causes: Causes) -> Outcome:
    if not _may_be_cut(asked, answer.ended, causes):
        return fault(f"ended {answer.end.value}, without a cause, after {len(answer.body)} bytes", answer.status)
    return Outcome(How.CUT, "", answer.status, frozenset({STATUS_OF["engine_died"]}))


def _may_be_cut(asked: Asked, ended: float, causes: Causes) -> bool:
    model, began = asked.order.model, asked.began
    return model is not None and (causes.deaths(model, began, ended) > 0 or causes.stopped(model, began, ended))


def _refusal(asked: Asked, answer: Answer, causes: Causes) -> Outcome:
    status = answer.status
    if answer.end is not End.CLEAN:
        return fault(f"a refusal that ended {answer.end.value}", status)
    error = error_of(asked.order.path, answer.body)
    if error is None:
        return fault(f"{status} with a body that is no error object of its API: {answer.body[:200]!r}", status)
    code = error["code"]
    if status == 404 and asked.order.may_be_gone:
        return Outcome(How.REFUSED, "gone", status, frozenset({status}))
    if STATUS_OF.get(code) != status:
        return fault(f"{status} with the code {code}: {error['message'][:200]}", status)
    if status == 429 and int(answer.headers.get("retry-after", "0")) < 1:
        return fault("429 without a Retry-After", status)
    wrong = _implausible(asked, code, answer.ended, causes, begun=False)
    if wrong:
        return fault(f"{wrong}; it says: {error['message'][:200]}", status)
    return Outcome(How.REFUSED, code, status, frozenset({status}))


def _implausible(asked: Asked, code: str, ended: float, causes: Causes, begun: bool) -> str:
    """Why this error cannot be the answer; empty if it can."""
    order, began = asked.order, asked.began
    if order.code:
        return "" if code == order.code else f"{code} instead of {order.code}"
    model = order.model
    if model is None or code not in SERVING:
        return f"{code}, for a request that is in order"
    if code in LIMITS and not order.key.limited:
        return f"{code}, and its key has no limits"
    if code == "queue_timeout" and ended - began < asked.wait - EARLY_SECS:
        return f"{code} after {ended - began:.2f} s, it may wait {asked.wait:g} s"
    # The first death before an answer begins is not seen by clients.
    enough = causes.deaths(model, began, ended) >= (1 if begun else 2)
    if code == "engine_died" and not enough and not causes.stopped(model, began, ended):
        return f"{code}, and nobody has killed an engine of {model} {'' if begun else 'twice '}in that time"
    if code == "model_unavailable" and not causes.failing(model, began, ended):
        return f"{code}, and nobody has touched an engine of {model}"
    if code == "model_not_pinned" and not causes.pinned(began, ended):
        return f"{code}, and nothing was pinned"
    return ""

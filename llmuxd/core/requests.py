"""Requests from arrival to end: admission, the queues, forwarding, retries, timeouts.

A request is in exactly one place: the queue of its model, its in-flight set, or gone. Each command `Refuse` or
`Abort`, and each event `RequestFinished` or `ClientLeft`, ends exactly one request, and nothing else does.
"""

from __future__ import annotations

import heapq

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.engines import Engines
from llmuxd.core.outlook import expected_wait
from llmuxd.core.queue import Request
from llmuxd.core.state import IllegalEvent, Model, State

DEATH_NOTICE_SECS = 1.5
"""A dead engine is noticed within a second; requests that bounced off it wait this long for the news."""

LEAST_RETRY_SECS = 1.0
"""No client is told to come back sooner."""


class Requests:
    """Moves requests between their places. Writes `State.requests`, `queued`, `timeouts` and the queues."""

    def __init__(self, state: State, engines: Engines) -> None:
        self._state = state
        self._engines = engines

    # Events

    def take(self, event: e.RequestEvent, now: float) -> Model:
        """Take one event. Returns the model that the request is for; nothing of another one is changed."""
        if isinstance(event, e.RequestArrived):
            model = self._arrived(event, now)
        elif isinstance(event, e.RequestFinished):
            model = self._finished(event, now)
        elif isinstance(event, e.RequestBounced):
            model = self._bounced(event, now)
        else:
            model = self._left(event, now)
        # Not only what there is room for now: what waits may wait for a moment that has come, and whose Tick is late.
        self.pump(model, now)
        return model

    def _arrived(self, event: e.RequestArrived, now: float) -> Model:
        state = self._state
        if event.model not in state.models or event.request in state.requests:
            raise IllegalEvent(f"request {event.request} for {event.model!r}")
        model = state.models[event.model]
        state.arrived = model.name
        timeout = self._timeout_of(event)
        deadline = None if timeout is None else now + timeout
        request = Request(event.request, model.name, now, deadline, timeout, event.priority)
        refusal = self._objection(model, now)
        if refusal is None and model.retired:
            refusal = c.Refusal.CANNOT_LOAD, f"{model.name} was taken out of the config", None
        if refusal is not None:
            state.out.append(c.Refuse(request.id, *refusal))
            return model
        state.requests[request.id] = request
        model.rate.count(now)
        model.last_arrival = now
        if not model.queue and self.may_forward(model, now):
            self._forward(model, request, now)
            return model
        full = self._queue_full(model)
        if full:
            del state.requests[request.id]
            state.out.append(c.Refuse(request.id, c.Refusal.QUEUE_FULL, full, self.retry_after(model, now)))
            return model
        if timeout == 0:
            del state.requests[request.id]
            message = f"{model.name} is {model.state.value}, and the request does not want to wait"
            state.out.append(c.Refuse(request.id, c.Refusal.TIMED_OUT, message, self.retry_after(model, now)))
            return model
        self._enqueue(model, request)
        return model

    def _finished(self, event: e.RequestFinished, now: float) -> Model:
        model, request = self._take_in_flight(event.request, now)
        if event.ok:
            self._engines.succeeded(model)
            model.answered = True
            model.barren_turns = 0
            if request.forwarded >= model.since:
                model.costs.answer.add(now - request.forwarded)
        return model

    def _bounced(self, event: e.RequestBounced, now: float) -> Model:
        """Queue it again, in its old place, unless that was done before."""
        state = self._state
        model, request = self._take_in_flight(event.request, now)
        if model.state is S.AWAKE:
            model.suspect_until = now + DEATH_NOTICE_SECS
        if request.retried or state.shutdown_deadline is not None:
            message = f"the engine of {model.name} died before it answered"
            state.out.append(c.Refuse(request.id, c.Refusal.ENGINE_DIED, message, self.retry_after(model, now)))
            return model
        request.retried = True
        if request.timeout is not None:
            request.deadline = now + request.timeout
        refusal = self._objection(model, now)
        if refusal is not None:
            state.out.append(c.Refuse(request.id, *refusal))
            return model
        state.requests[request.id] = request
        self._enqueue(model, request)
        return model

    def _left(self, event: e.ClientLeft, now: float) -> Model:
        request = self._state.requests.get(event.request)
        if request is not None and self._is_queued(request):
            self._take_queued(request)
            return self._state.models[request.model]
        return self._take_in_flight(event.request, now)[0]

    # What the others may do with requests

    def may_forward(self, model: Model, now: float) -> bool:
        """Whether the next request of `model` may go to its engine now."""
        switch = self._state.switch
        return (
            model.state is S.AWAKE
            and model.suspect_until <= now
            and (switch is None or not switch.gates(model.name))
            and (model.spec.max_in_flight is None or len(model.in_flight) < model.spec.max_in_flight)
        )

    def pump(self, model: Model, now: float) -> None:
        """Forward what is queued, as far as it may be."""
        while (request := model.queue.first) is not None and self.may_forward(model, now):
            self._unqueue(request)
            self._forward(model, request, now)

    def refuse_queue(self, model: Model, refusal: c.Refusal, message: str, retry_after: float | None = None) -> None:
        """End everything that waits for `model`."""
        for request in list(model.queue):
            self._take_queued(request)
            self._state.out.append(c.Refuse(request.id, refusal, message, retry_after))

    def refuse_objectionable(self, now: float) -> None:
        """End what waits for models that, since it came, have become unable or forbidden to be loaded."""
        for model in self._state.models.values():
            refusal = self._objection(model, now) if model.queue else None
            if refusal is not None:
                self.refuse_queue(model, *refusal)

    def abort_in_flight(self, model: Model, refusal: c.Refusal, message: str) -> None:
        """End everything that is in flight at `model`."""
        for request in list(model.in_flight):
            del model.in_flight[request], self._state.requests[request]
            self._state.out.append(c.Abort(request, refusal, message))

    def expire(self, now: float) -> None:
        """End what has waited longer than the request timeout."""
        while (due := self.next_timeout()) is not None and due <= now:
            request = self._state.requests[self._state.timeouts[0][1]]
            self._take_queued(request)
            model = self._state.models[request.model]
            whose = "the request timeout" if request.timeout == self._state.settings.request_timeout else "it wanted to"
            waited = f"waited {now - request.arrived:.0f} s for {model.name} (now {model.state.value})"
            message = f"{waited}, longer than {whose}"
            refusal = c.Refuse(request.id, c.Refusal.TIMED_OUT, message, self.retry_after(model, now))
            self._state.out.append(refusal)

    def next_timeout(self) -> float | None:
        """The earliest deadline of a queued request."""
        heap = self._state.timeouts
        while heap:
            deadline, id_ = heap[0]
            request = self._state.requests.get(id_)
            if request is not None and request.deadline == deadline and self._is_queued(request):
                return deadline
            heapq.heappop(heap)
        return None

    def retry_after(self, model: Model, now: float) -> float:
        """When a refused client may come back with hope, in seconds from now."""
        return max(LEAST_RETRY_SECS, expected_wait(self._state, model, now))

    # Helpers

    def _timeout_of(self, event: e.RequestArrived) -> float | None:
        if event.patient:
            return None
        most = self._state.settings.request_timeout
        return most if event.most_wait is None else min(most, event.most_wait)

    def _objection(self, model: Model, now: float) -> tuple[c.Refusal, str, float | None] | None:
        """Why no request for `model` is accepted now, and after how many seconds one may be; else None."""
        state = self._state
        if state.shutdown_deadline is not None or state.closed:
            return c.Refusal.SHUTTING_DOWN, state.ending, LEAST_RETRY_SECS
        if model.blocked(now):
            message = f"{model.name} cannot be loaded: {model.last_error}"
            return c.Refusal.CANNOT_LOAD, message, max(model.retry_at - now, LEAST_RETRY_SECS)
        if state.mode.manual and not state.is_held(model):
            if state.mode.pinned is not None:
                message = f"{state.mode.pinned} is pinned; {model.name} is not loaded until it is unpinned"
            else:
                message = f"manual mode: {model.name} is not awake, and only an operator may switch"
            return c.Refusal.PINNED, message, LEAST_RETRY_SECS
        return None

    def _queue_full(self, model: Model) -> str:
        limit = model.spec.max_queue
        if limit is not None and len(model.queue) >= limit:
            return f"the queue of {model.name} is full ({limit} requests waiting)"
        if self._state.queued >= self._state.settings.max_queue:
            return f"the queue is full ({self._state.queued} requests waiting)"
        return ""

    def _forward(self, model: Model, request: Request, now: float) -> None:
        model.in_flight[request.id] = request
        request.forwarded = now
        began, ended = model.last_switch
        switching = max(0.0, min(now, ended) - max(request.arrived, began))
        self._state.out.append(c.Forward(request.id, model.name, now - request.arrived, switching))

    def _enqueue(self, model: Model, request: Request) -> None:
        model.queue.add(request)
        self._state.queued += 1
        if request.deadline is not None:
            heapq.heappush(self._state.timeouts, (request.deadline, request.id))

    def _is_queued(self, request: Request) -> bool:
        return request in self._state.models[request.model].queue

    def _unqueue(self, request: Request) -> None:
        self._state.models[request.model].queue.remove(request)
        self._state.queued -= 1

    def _take_queued(self, request: Request) -> None:
        self._unqueue(request)
        del self._state.requests[request.id]

    def _take_in_flight(self, id_: int, now: float) -> tuple[Model, Request]:
        request = self._state.requests.get(id_)
        if request is None or id_ not in self._state.models[request.model].in_flight:
            raise IllegalEvent(f"request {id_} is not in flight")
        model = self._state.models[request.model]
        del model.in_flight[id_], self._state.requests[id_]
        model.idle_since = now
        return model, request

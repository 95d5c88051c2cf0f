"""The gate between the proxy and the core: a ticket for each request, from its submission to its one end.

The proxy asks a ticket and reports what becomes of it; the runtime tells the gate what the core commands. No
decision is made here: submitting, retrying, finishing and leaving are events, and the core's answer to each of them
comes back before the call returns.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.outlook import Outlook
from llmuxd.engine import Endpoint

STATUS_OF: Mapping[c.Refusal, tuple[int, str]] = {
    c.Refusal.QUEUE_FULL: (429, "rate_limit_error"),
    c.Refusal.SHUTTING_DOWN: (503, "service_unavailable_error"),
    c.Refusal.CANNOT_LOAD: (503, "service_unavailable_error"),
    c.Refusal.PINNED: (503, "service_unavailable_error"),
    c.Refusal.TIMED_OUT: (504, "timeout_error"),
    c.Refusal.ENGINE_DIED: (502, "server_error"),
}
"""Refusal -> HTTP status and the `type` of OpenAI's error object; its `code` is the refusal's name."""


class Refused(Exception):
    """A request is not served. `retry_after` is in seconds, None where waiting would not help."""

    def __init__(self, status: int, code: str, type: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.type = type
        self.message = message
        self.retry_after = retry_after
        self.param = "model" if status in (400, 404) else None

    @classmethod
    def by(cls, refusal: c.Refusal, message: str, retry_after: float | None = None) -> Refused:
        """From the core's words."""
        status, kind = STATUS_OF[refusal]
        return cls(status, refusal.value, kind, message, retry_after)


@dataclass(frozen=True)
class Grant:
    """Permission to forward a request now. Durations in seconds."""

    endpoint: Endpoint
    model: str
    queue_secs: float
    switch_secs: float


@dataclass(frozen=True)
class ServedModel:
    """A name that clients may use."""

    id: str
    model: str
    root: str


Decision = Grant | Refused
"""What becomes of a request that was submitted."""


class Ticket:
    """One request's place. It ends by `finish`, `left`, a Refused for its decision, or `on_abort`."""

    __slots__ = ("_decision", "_gate", "_tell", "id", "model", "on_abort")

    def __init__(self, gate: Gate, id_: int, model: str) -> None:
        self._gate = gate
        self.id = id_
        self.model = model
        self.on_abort: Callable[[Refused], None] | None = None
        """Called a moment after a request that was forwarded has been ended by the core."""
        self._decision: Decision | None = None
        self._tell: Callable[[Decision], None] | None = None

    def when_decided(self, tell: Callable[[Decision], None]) -> None:
        """Call this, at once if it is known already, with the permission to forward the request or the refusal.

        After a refusal the ticket has ended.
        """
        if self._decision is not None:
            tell(self._decision)
        else:
            self._tell = tell

    async def admitted(self) -> Grant:
        """Wait until the request may be forwarded. Raises Refused, and then the ticket has ended."""
        decided: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self.when_decided(decided.set_result)
        decision = await decided
        if isinstance(decision, Refused):
            raise decision
        return decision

    def outlook(self) -> Outlook | None:
        """What it can expect while it waits; None once it does not."""
        return self._gate.outlook(self.id)

    def retry(self, tell: Callable[[Decision], None]) -> None:
        """The engine went away before the first byte of its answer: it is decided anew what follows.

        If the ticket has ended meanwhile, it has been told, or will be.
        """
        if self._gate.holds(self):
            self._decision = None
            self._tell = None
            self._gate.post(e.RequestBounced(self.id))
            self.when_decided(tell)

    def finish(self, ok: bool) -> None:
        """The answer is complete, or (`ok` false) broke off."""
        if self._gate.drop(self):
            self._gate.post(e.RequestFinished(self.id, ok))

    def left(self) -> None:
        """The client went away."""
        if self._gate.drop(self):
            self._gate.post(e.ClientLeft(self.id))

    # Called by the gate, in the middle of the core's work: what others do about it they do in the loop's next turn.

    def decide(self, decision: Decision) -> None:
        """This becomes of it."""
        forwarded = isinstance(self._decision, Grant)
        self._decision = decision
        if forwarded:
            if isinstance(decision, Refused) and self.on_abort is not None:
                asyncio.get_running_loop().call_soon(self.on_abort, decision)
        elif self._tell is not None:
            tell, self._tell = self._tell, None
            asyncio.get_running_loop().call_soon(tell, decision)


class Gate:
    """Hands out tickets. `post` feeds an event to the core and returns when its commands have been begun."""

    def __init__(
        self,
        post: Callable[[e.Event], None],
        served: Sequence[ServedModel],
        health: Callable[[], tuple[bool, str]],
        outlook: Callable[[int], Outlook | None] = lambda request: None,
    ) -> None:
        self.post = post
        self.healthy = health
        self.outlook = outlook
        """What a request that waits can expect, by its number."""
        self.serve(served)
        self._tickets: dict[int, Ticket] = {}
        self._ids = itertools.count(1)

    def serve(self, served: Sequence[ServedModel]) -> None:
        """Know these names from now on. Tickets that there are for others stay good."""
        self.served = tuple(served)
        """Every name that clients may use, in the order of the config."""
        self._models = {one.id: one.model for one in self.served}

    def resolve(self, name: str) -> str | None:
        """The configured model that a client's name stands for; None if there is none."""
        return self._models.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._models

    def submit(self, model: str, *, patient: bool = False, most_wait: float | None = None, priority: int = 0) -> Ticket:
        """Accept a request for a configured model. The ticket says what becomes of it."""
        ticket = Ticket(self, next(self._ids), model)
        self._tickets[ticket.id] = ticket
        self.post(e.RequestArrived(ticket.id, model, patient, most_wait, priority))
        return ticket

    def holds(self, ticket: Ticket) -> bool:
        """Whether the ticket has not ended."""
        return ticket.id in self._tickets

    def drop(self, ticket: Ticket) -> bool:
        """End a ticket; False if it had ended before."""
        return self._tickets.pop(ticket.id, None) is not None

    # The core's commands

    def forward(self, command: c.Forward, endpoint: Endpoint) -> None:
        grant = Grant(endpoint, command.model, command.queue_secs, command.switch_secs)
        self._tickets[command.request].decide(grant)

    def fail(self, request: int) -> None:
        """End a request that nothing will come of, for a fault that is ours; if it has not ended."""
        ticket = self._tickets.pop(request, None)
        if ticket is not None:
            ticket.decide(Refused(500, "internal_error", "server_error", "internal error"))

    def end(self, command: c.Refuse | c.Abort) -> None:
        """Refuse a request, or break it off."""
        retry_after = command.retry_after if isinstance(command, c.Refuse) else None
        ticket = self._tickets.pop(command.request)
        ticket.decide(Refused.by(command.refusal, command.message, retry_after))

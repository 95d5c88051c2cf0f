"""How long a request will wait for its model, by what has been measured, and who is before it.

For those who wait, and for Retry-After: an estimate, by which nothing is decided.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmuxd.core.costs import estimate
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.state import Model, State
from llmuxd.core.views import candidate_of, drain_secs, oldest_demand, typical_switch_secs, way_in_secs

_KIND = {S.STARTING: "start", S.WAKING: "wake", S.FALLING_ASLEEP: "sleep", S.STOPPING: "stop"}
"""What an engine in a transition is doing, as `Costs` calls it."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a waiting request can expect."""

    place: int
    """In the queue of its model, 1 for the next."""
    seconds: float


def outlook_of(state: State, request: int, now: float) -> Outlook | None:
    """Of a request that is queued; None for one that is not."""
    known = state.requests.get(request)
    if known is None or known not in state.models[known.model].queue:
        return None
    model = state.models[known.model]
    before = model.queue.before(known)
    return Outlook(before + 1, expected_wait(state, model, now, before))


def expected_wait(state: State, model: Model, now: float, before: int | None = None) -> float:
    """Seconds until a request for `model` is forwarded that has `before` others before it; None: all that wait."""
    before = len(model.queue) if before is None else before
    return _until_awake(state, model, now) + _until_its_turn(model, before)


def _until_its_turn(model: Model, before: int) -> float:
    """With an awake engine that takes `max_in_flight` at a time."""
    most = model.spec.max_in_flight
    answer = model.costs.answer.value or 0.0
    return 0.0 if most is None else answer * ((before + len(model.in_flight)) // most)


def _until_awake(state: State, model: Model, now: float) -> float:
    switch = state.switch
    if model.state is S.AWAKE and not (switch is not None and switch.gates(model.name)):
        return max(0.0, model.suspect_until - now)
    blocked = max(0.0, model.retry_at - now) if model.blocked(now) else 0.0
    under_way = sum(_rest(state, other, now) for other in state.models.values())
    if switch is not None and switch.target == model.name:
        return max(blocked, under_way + _drain(state, list(switch.victims), now) + _way_in(state, model))
    if switch is not None and switch.target is not None:
        under_way += _drain(state, list(switch.victims), now) + _way_in(state, state.models[switch.target])
    candidate = candidate_of(state, model)
    earlier = sum(_is_before(other, model) for other in state.models.values() if other is not model)
    drain = _drain(state, list(candidate.victims), now)
    return max(blocked, under_way) + drain + candidate.switch_secs + earlier * typical_switch_secs(state)


def _is_before(other: Model, model: Model) -> bool:
    """Whether requests have waited longer for a switch to `other` than any for one to `model`."""
    since, own = oldest_demand(other), oldest_demand(model)
    return since is not None and other.state is not S.AWAKE and (own is None or since < own)


def _rest(state: State, model: Model, now: float) -> float:
    """How much longer the transition of an engine will take; 0 if it is in none."""
    kind = _KIND.get(model.state)
    if kind is None:
        return 0.0
    usual = estimate(kind, model.costs, [other.costs for other in state.models.values()])
    return max(0.0, usual - (now - model.since))


def _way_in(state: State, model: Model) -> float:
    """What it takes to make a model awake that has not begun to be."""
    if model.state in (S.AWAKE, S.STARTING, S.WAKING):
        return 0.0
    return way_in_secs(model, [other.costs for other in state.models.values()])


def _drain(state: State, victims: list[str], now: float) -> float:
    """How long the victims' requests in flight will take."""
    return max((drain_secs(state.models[name], now) for name in victims), default=0.0)

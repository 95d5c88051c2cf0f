"""The scheduler's check of itself: which queues do not move although they should, and why.

A queue that waits for something that is on its way, a switch, a drain, a backoff, an operator, does not stall.
Found here is what no operator's patience mends: a defect of the core, or of what carries out its commands.
"""

from __future__ import annotations

from llmuxd.core import commands as c
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.policy import Policy
from llmuxd.core.state import IN_TRANSITION, Model, State
from llmuxd.core.views import make_room, oldest_demand, typical_switch_secs

MAX_TURN_SECS = 120.0
"""No awake model is left alone for longer, whatever it has to do, while another one is overdue."""

LATE_SECS = 5.0
"""How far behind its deadlines the core may be. Its timers are due within milliseconds."""


def find_stalls(state: State, policy: Policy, next_deadline: float | None, now: float) -> tuple[c.Stall, ...]:
    """One for each model whose requests wait for nothing."""
    late = next_deadline is not None and now - next_deadline > LATE_SECS
    found = []
    for model in state.models.values():
        since = oldest_demand(model)
        if since is None or not model.queue or now - since <= LATE_SECS:
            continue
        reason = f"a deadline passed {now - (next_deadline or now):.0f} s ago unnoticed" if late else ""
        reason = reason or _why(state, policy, model, now - since, now)
        if reason:
            found.append(c.Stall(model.name, now - since, reason))
    return tuple(found)


def _why(state: State, policy: Policy, model: Model, waiting: float, now: float) -> str:
    switch = state.switch
    if model.state is S.AWAKE:
        return "it is awake, and nothing is forwarded" if is_held_up(state, model, now) else ""
    if model.state in IN_TRANSITION:
        assert model.deadline is not None
        return "" if now - model.deadline <= LATE_SECS else f"it has been {model.state.value} for too long"
    if switch is not None:
        return _why_switch(state, now)
    if state.mode.manual or state.jobs or state.ending or not model.loadable(now):
        return ""
    longest = longest_waiting(state, now)
    if model is longest and passed_over_secs(state, policy, model, now) > MAX_TURN_SECS:
        return f"policy {policy.name} passes it over"
    return ""


def is_held_up(state: State, model: Model, now: float) -> bool:
    """Whether requests wait for a model that is awake and could take them."""
    if not model.queue or model.state is not S.AWAKE:
        return False
    if model.suspect_until and model.suspect_until + LATE_SECS > now:
        return False  # The end of a suspicion is noticed by a Tick.
    full = model.spec.max_in_flight is not None and len(model.in_flight) >= model.spec.max_in_flight
    return not full and (state.switch is None or not state.switch.gates(model.name))


def bound_of(policy: Policy, state: State) -> float | None:
    """The policy's staleness bound in seconds. A third party's that breaks has promised nothing."""
    try:
        return policy.bound(typical_switch_secs(state))
    except Exception:
        return None


def longest_waiting(state: State, now: float) -> Model | None:
    """The model whose demand is the oldest, of those that could be loaded. Only it can be passed over."""
    waiting = [m for m in state.models.values() if oldest_demand(m) is not None and m.loadable(now) and not m.failures]
    return min(waiting, key=lambda m: oldest_demand(m) or 0.0, default=None)


def passed_over_secs(state: State, policy: Policy, model: Model, now: float) -> float:
    """For how long the model has been overdue although nothing new has come into its way; negative if it is not."""
    since = oldest_demand(model)
    bound = bound_of(policy, state)
    if since is None or bound is None or now - since <= bound:
        return float("-inf")
    overdue_at = since + bound
    began = overdue_at
    for name in make_room(state, model):
        other = state.models[name]
        next_up = other.queue.first
        if next_up is not None and next_up.arrived < overdue_at:
            # It still serves what came before the other was overdue.
            return float("-inf")
        if other.state is S.AWAKE:
            began = max(began, other.since)
    return now - began


def _why_switch(state: State, now: float) -> str:
    """Why the switch under way does not come to its end; empty if it may."""
    switch = state.switch
    assert switch is not None
    if switch.phase in (c.Phase.COOLDOWN, c.Phase.DRAIN):
        return ""
    waits = [m for m in state.models.values() if m.state in IN_TRANSITION]
    if waits or now - switch.phase_began <= LATE_SECS:
        return ""
    return f"switch {switch.id} has been in its {switch.phase.value} phase for {now - switch.phase_began:.0f} s"

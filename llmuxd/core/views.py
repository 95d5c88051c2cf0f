"""What the policy is shown: the snapshot, made of the state. And which models would have to go for another one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from llmuxd.core.costs import UNMEASURED, Costs, estimate
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.eviction import STOP, EvictionPolicy, ProcessStrategy
from llmuxd.core.policy import Candidate, ModelView, Snapshot
from llmuxd.core.settings import InFlight
from llmuxd.core.state import Model, State


def has_demand(model: Model) -> bool:
    """Whether requests wait for it, to be forwarded or, parked, to go on."""
    return bool(model.queue) or model.parked()


def may_park(state: State, model: Model, eviction: EvictionPolicy) -> bool:
    """Whether an eviction pauses the model's requests in flight instead of waiting for them."""
    parks = state.settings.in_flight is not InFlight.DRAIN
    keeps = eviction.process is ProcessStrategy.KEEP_RUNNING and model.can_sleep
    return parks and keeps and model.can_park


def make_room(state: State, target: Model, used: Mapping[str, int] | None = None) -> dict[str, EvictionPolicy]:
    """Which models have to go, and how, for `target` to fit: as few, as idle and as gently as possible.

    `used` is what `state.used()` says, for who asks of many targets.
    """
    need = target.holds.awake
    free = _free_for(state, target, state.used() if used is None else used)
    if all(amount <= free[device] for device, amount in need.items()):
        return {}
    going: dict[str, EvictionPolicy] = {}
    gains: dict[str, Mapping[str, int]] = {}
    for model, eviction in _by_gentleness(state, target):
        if all(amount <= free[device] for device, amount in need.items()):
            break
        _add(free, gains.get(model.name, {}), -1)
        going[model.name], gains[model.name] = eviction, state.freed_by(model, eviction)
        _add(free, gains[model.name], 1)
    for name in list(going):
        _add(free, gains[name], -1)
        if all(amount <= free[device] for device, amount in need.items()):
            del going[name]
        else:
            _add(free, gains[name], 1)
    return going


def _by_gentleness(state: State, target: Model) -> Iterator[tuple[Model, EvictionPolicy]]:
    """What may be done to whom, the gentlest first: the idle put to sleep, the busy, sleepers stopped, all stopped."""
    pinned = state.mode.pinned
    awake = [m for m in state.models.values() if m.state is S.AWAKE and m is not target and m.spec.name != pinned]
    if len(awake) > 1:
        awake.sort(key=lambda m: (bool(m.in_flight or m.queue), m.idle_since))
    for model in awake:
        yield model, model.eviction
    for model in state.models.values():
        sleeps = model.state is S.ASLEEP and model is not target and model.spec.name != pinned
        if sleeps and any(state.claim(model).values()):
            yield model, STOP
    for model in awake:
        yield model, STOP


def _free_for(state: State, target: Model, used: Mapping[str, int]) -> dict[str, int]:
    """What `target` could have on each device if nothing went but itself and what is stopping anyhow."""
    free = {device: capacity - used[device] for device, capacity in state.devices.items()}
    for model in state.models.values():
        if model is target or model.state is S.STOPPING:
            _add(free, state.claim(model), 1)
    return free


def _add(free: dict[str, int], amounts: Mapping[str, int], sign: int) -> None:
    for device, amount in amounts.items():
        free[device] += sign * amount


def stopping_of(state: State) -> dict[str, EvictionPolicy]:
    """The models that are going anyhow."""
    return {m.name: STOP for m in state.models.values() if m.state is S.STOPPING}


def snapshot(state: State, now: float, wanted: Collection[str], due: bool) -> Snapshot:
    """All that a policy may know; the models that are `wanted` are its candidates."""
    used = state.used()
    views = tuple(
        _view(
            model,
            now,
            parks=may_park(state, model, model.eviction),
            candidate=candidate_of(state, model, used) if model.name in wanted else None,
        )
        for model in state.models.values()
    )
    return Snapshot(now, views, typical_switch_secs(state), state.settings.min_active, state.arrived, due)


def typical_switch_secs(state: State) -> float:
    """What a switch costs on the average, whatever the engines are doing just now."""
    nobody = Costs()
    costs = [m.costs for m in state.models.values()]
    return estimate("sleep", nobody, costs) + estimate("wake", nobody, costs)


def candidate_of(state: State, model: Model, used: Mapping[str, int] | None = None) -> Candidate:
    """What it would take to make the model awake now."""
    going = make_room(state, model, used)
    costs = [m.costs for m in state.models.values()]
    seconds = way_in_secs(model, costs)
    for name, eviction in going.items():
        victim = state.models[name]
        sleeps = eviction.process is not ProcessStrategy.STOP and victim.can_sleep
        seconds += estimate("sleep" if sleeps else "stop", victim.costs, costs)
    return Candidate(tuple(going), seconds)


def way_in_secs(model: Model, costs: Iterable[Costs]) -> float:
    """What it is taken to need to make a model awake that sleeps or has no engine; `costs` are those of all."""
    back = model.state in (S.ASLEEP, S.CHECKPOINTED)
    return estimate("wake" if back else "start", model.costs, costs)


def oldest_demand(model: Model) -> float | None:
    """Since when the longest wait for the model has lasted: an arrival, or the parking of its requests."""
    oldest = model.queue.oldest
    if model.parked():
        oldest = model.parked_since if oldest is None else min(oldest, model.parked_since)
    return oldest


def _view(model: Model, now: float, *, parks: bool, candidate: Candidate | None) -> ModelView:
    parked = len(model.in_flight) if model.parked() else 0
    first = model.queue.first
    return ModelView(
        name=model.name,
        awake=model.state is S.AWAKE,
        queued=len(model.queue),
        in_flight=len(model.in_flight),
        parked=parked,
        oldest_arrival=oldest_demand(model),
        waiting_secs=len(model.queue) * now - model.queue.arrivals + parked * (now - model.parked_since),
        since=model.since,
        last_arrival=model.last_arrival,
        drain_secs=drain_secs(model, now),
        answer_secs=model.costs.answer.value or UNMEASURED["answer"],
        parked_since=model.parked_since,
        parks=parks,
        barren_turns=model.barren_turns,
        arrival_rate=model.rate.at(now),
        priority=model.spec.priority,
        next_arrival=None if first is None else first.arrived,
        candidate=candidate,
    )


def drain_secs(model: Model, now: float) -> float:
    """How long the requests in flight of an awake model will take, by a guess."""
    if model.state is not S.AWAKE or not model.in_flight:
        return 0.0
    age = now - next(reversed(model.in_flight.values())).forwarded
    # What has taken longer than usual already takes, as a rule of thumb, about as long again.
    return max((model.costs.answer.value or 0.0) - age, age)

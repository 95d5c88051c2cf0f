"""A scenario from a seed: models, clients, an operator with a nervous hand, and everything that may go wrong.

What is drawn is made to hurt: devices with little room, evictions of every kind, engines that cannot park or sleep,
timeouts that are reached, clients that leave, and faults in the middle of switches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from llmuxd.core.eviction import AUTO, Auto, EvictionPolicy, ProcessStrategy, WeightStrategy
from llmuxd.core.policies import POLICIES
from llmuxd.core.policy import Policy, PolicyParameters
from llmuxd.core.settings import InFlight, ModelSpec, Placement, Settings
from llmuxd.sim.virtual.scenario import (
    Action,
    Arrival,
    EngineDies,
    EngineSecs,
    Fault,
    Move,
    OperationGoesWrong,
    OpFault,
    Scenario,
    SimModel,
)
from llmuxd.sim.virtual.service import BatchService, SerialService, Service, Work

CELLS = [EvictionPolicy(weights, process) for weights in WeightStrategy for process in ProcessStrategy]

COMMON = [EvictionPolicy.parse(text) for text in ("offload+keep_running", "discard+keep_running", "offload+stop")]

EVICTIONS: list[EvictionPolicy | Auto] = [*CELLS, *COMMON * 4, AUTO, AUTO]
"""The most common ones are drawn as often as all twelve together."""

LEAVING: list[EvictionPolicy | Auto] = [
    cell for cell in CELLS if cell.process in (ProcessStrategy.CUDA_SUSPEND, ProcessStrategy.CHECKPOINT)
]
"""By these a process leaves its devices and comes back."""

OPERATIONS = ("start", "sleep", "wake", "stop")
WEIGHTS = {Move.AUTO: 3.0, Move.MANUAL: 0.5, Move.PIN: 0.5, Move.SHUTDOWN: 0.3}
"""How often an operator does what; 1 where nothing is said. Manual mode refuses most of what comes."""


MOST_EVENTS = 20_000
"""Many times what the longest run takes that comes to rest."""


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    dice = random.Random(seed)
    devices, placements = _devices(dice)
    leaving = dice.random() < 0.25
    evictions = LEAVING if leaving else EVICTIONS
    models = tuple(_model(dice, name, placement, evictions) for name, placement in placements.items())
    names = [model.spec.name for model in models]
    secs = dice.choice([60.0, 300.0])
    chaotic = dice.random() < 0.8
    scenario = Scenario(
        models=models,
        devices=devices,
        settings=_settings(dice),
        policy=_policy(dice),
        arrivals=_arrivals(dice, names, secs),
        actions=_actions(dice, names, secs) if dice.random() < 0.6 else (),
        faults=_faults(dice, names, secs, OPERATIONS[1:3] if leaving else OPERATIONS) if chaotic else (),
        build_service=_service(dice),
        begin_asleep=dice.random() < 0.7,
        jitter=dice.choice([0.0, 0.3]),
        jitter_seed=seed,
        most_events=MOST_EVENTS,
        out_at_first=frozenset(names[1:2]) if len(names) > 2 and dice.random() < 0.2 else frozenset(),
    )
    # Drawn last: the rest of a seed's scenario is the same with them and without.
    priorities = dice.choice([(0,), (0, 0, 5), (-7, 0, 5, 100)])
    return replace(scenario, arrivals=tuple(replace(a, priority=dice.choice(priorities)) for a in scenario.arrivals))


def _devices(dice: random.Random) -> tuple[dict[str, int], dict[str, Placement]]:
    """One device with room for one, one with memory, or two of which some models take both."""
    names = "abcd"[: dice.choice([1, 2, 2, 3, 3, 4])]
    kind = dice.random()
    if kind < 0.4:
        return {"gpu0": 1}, {name: Placement({"gpu0": 1}) for name in names}
    devices = {"gpu0": 80} if kind < 0.7 else {"gpu0": 80, "gpu1": 80}
    placements = {}
    for name in names:
        taken = dice.sample(sorted(devices), dice.randint(1, len(devices)))
        awake = dice.choice([20, 35, 50, 80])
        placements[name] = Placement(
            awake=dict.fromkeys(taken, awake),
            asleep=dict.fromkeys(taken, dice.choice([0, 1, 5])),
            retained=dict.fromkeys(taken, awake // 2),
        )
    return devices, placements


def _model(
    dice: random.Random, name: str, placement: Placement, evictions: Sequence[EvictionPolicy | Auto]
) -> SimModel:
    spec = ModelSpec(
        name=name,
        eviction=dice.choice(evictions),
        placement=placement,
        start_timeout=40.0,
        max_in_flight=dice.choice([None, None, 1, 4]),
        max_queue=dice.choice([None, None, 5]),
        ttl=dice.choice([None, None, 3.0]),
        priority=dice.choice([1.0, 1.0, 5.0]),
    )
    secs = EngineSecs(
        start=dice.choice([2.0, 10.0]),
        sleep=dice.choice([0.0, 0.5, 2.0]),
        wake=dice.choice([0.0, 0.5, 3.0]),
        stop=dice.choice([0.0, 0.5]),
    )
    return SimModel(
        spec,
        secs,
        can_park=dice.random() < 0.8,
        can_sleep=dice.random() < 0.9,
        keeps_image=dice.random() < 0.7,
    )


def _settings(dice: random.Random) -> Settings:
    return Settings(
        request_timeout=dice.choice([15.0, 60.0, 300.0]),
        in_flight=dice.choice(list(InFlight)),
        min_active=dice.choice([0.0, 0.0, 1.0, 5.0]),
        sleep_timeout=8.0,
        wake_timeout=10.0,
        stop_grace=2.0,
        max_queue=dice.choice([8, 1024]),
        backoff_cap=20.0,
        deadline_margin=3.0,
    )


def _policy(dice: random.Random) -> Policy:
    name = dice.choice(["tenure", "tenure", *sorted(POLICIES)])
    return POLICIES[name](PolicyParameters(max_wait=dice.choice([1.0, 15.0])))


def _service(dice: random.Random) -> Callable[[], Service]:
    return BatchService if dice.random() < 0.7 else partial(SerialService, dice.choice([0.05, 0.5]))


def _arrivals(dice: random.Random, names: list[str], secs: float) -> tuple[Arrival, ...]:
    arrivals = []
    at = 0.0
    count = dice.choice([3, 20, 60, 120])
    favourite = dice.choice(names)
    for _ in range(count):
        at += dice.choice([0.0, 0.0, dice.expovariate(count / secs)])
        model = favourite if dice.random() < 0.4 else dice.choice(names)
        leaves = dice.uniform(0.0, 20.0) if dice.random() < 0.2 else None
        work = Work(dice.choice([1, 200, 5000]), dice.choice([1, 50, 300, 1500]))
        arrivals.append(Arrival(round(at, 3), model, work, leaves))
    return tuple(arrivals)


def _actions(dice: random.Random, names: list[str], secs: float) -> tuple[Action, ...]:
    weights = [WEIGHTS.get(move, 1.0) for move in Move]
    moves = dice.choices(list(Move), weights, k=dice.choice([2, 6, 12]))
    drawn = [
        Action(round(dice.uniform(0.0, secs), 3), move, dice.choice(names), _eviction(dice, move)) for move in moves
    ]
    return tuple(sorted(drawn, key=lambda action: action.at))


def _eviction(dice: random.Random, move: Move) -> EvictionPolicy | Auto:
    if move is Move.SET_EVICTION:
        return dice.choice(EVICTIONS)
    process = ProcessStrategy.CHECKPOINT if move is Move.BRING_IMAGE else dice.choice(list(ProcessStrategy))
    return EvictionPolicy(dice.choice(list(WeightStrategy)), process)


def _faults(dice: random.Random, names: list[str], secs: float, operations: Sequence[str]) -> tuple[Fault, ...]:
    faults: list[Fault] = []
    for _ in range(dice.choice([1, 3, 8, 20])):
        name = dice.choice(names)
        if dice.random() < 0.3:
            noticed = dice.choice([0.0, 0.3, 1.0])
            faults.append(EngineDies(round(dice.uniform(0.0, secs), 3), name, noticed))
        else:
            kind = dice.choice(operations)
            faults.append(OperationGoesWrong(name, kind, dice.choice([0, 0, 1, 2, 4, 8]), dice.choice(list(OpFault))))
    return tuple(faults)

"""The shortest form found of a scenario that breaks an invariant: what can be left out is left out.

Delta debugging (Zeller and Hildebrandt 2002), on each list of the scenario in turn; then what is left is made plainer,
which may make more of it superfluous; until nothing more can go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llmuxd.sim.virtual.scenario import ONE_TOKEN, Scenario

LISTS = ("faults", "actions", "arrivals")


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """A scenario as short as found that still `fails`."""
    while True:
        before = scenario
        for name in LISTS:
            scenario = _reduce(scenario, name, fails)
        scenario = _plainer(scenario, fails)
        scenario = _without_models(scenario, fails)
        if scenario == before:
            return scenario


def _reduce(scenario: Scenario, name: str, fails: Callable[[Scenario], bool]) -> Scenario:
    """Leave out ever smaller pieces of one of its lists."""
    size = max(1, len(getattr(scenario, name)) // 2)
    while items := getattr(scenario, name):
        for start in range(0, len(items), size):
            changes: dict[str, Any] = {name: (*items[:start], *items[start + size :])}
            shorter = replace(scenario, **changes)
            if fails(shorter):
                scenario = shorter
                break
        else:
            if size == 1:
                break
            size //= 2
    return scenario


def _plainer(scenario: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """Clients that stay, ask for one token, and are as urgent as all; durations without jitter."""
    changes: list[dict[str, Any]] = [{"jitter": 0.0}] if scenario.jitter else []
    for number, arrival in enumerate(scenario.arrivals):
        for plain in (
            replace(arrival, leaves_after=None),
            replace(arrival, work=ONE_TOKEN),
            replace(arrival, priority=0),
        ):
            if plain != arrival:
                arrivals = (*scenario.arrivals[:number], plain, *scenario.arrivals[number + 1 :])
                changes.append({"arrivals": arrivals})
    for change in changes:
        plainer = replace(scenario, **change)
        if fails(plainer):
            return plainer
    return scenario


def _without_models(scenario: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """Leave out the models that nothing speaks of."""
    spoken_of = {arrival.model for arrival in scenario.arrivals} | {action.model for action in scenario.actions}
    for model in scenario.models:
        rest = tuple(other for other in scenario.models if other is not model)
        if model.spec.name in spoken_of or not rest:
            continue
        shorter = replace(scenario, models=rest)
        if fails(shorter):
            scenario = shorter
    return scenario

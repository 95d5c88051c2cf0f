"""The sweep finds what it is there to find: each invariant is broken by a core that is broken on purpose.

A mutation takes one rule out of the production core. The sweep has to notice it within so many seeds, under the
name of the invariant that the rule is there for; and the core as it is has to pass the same seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core import queue
from llmuxd.core import state as core_state
from llmuxd.core.audit import INVARIANTS
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.engines import Engines
from llmuxd.core.eviction import ProcessStrategy
from llmuxd.core.policies import CostAware, Fifo, Tenure
from llmuxd.core.policy import Stay, SwitchTo
from llmuxd.core.queue import place_of
from llmuxd.core.requests import Requests
from llmuxd.core.state import State
from llmuxd.core.switcher import Switcher
from llmuxd.core.switching import Switching
from llmuxd.sim.virtual.chaos import CELLS, draw
from llmuxd.sim.virtual.sweep import Verdict, digest, log_of, run_seed, shortest, violation_of
from llmuxd.sim.virtual.world import World
from tests.core.playbook import Restless

SEEDS = range(400)

Mutate = Callable[[pytest.MonkeyPatch], None]


def everything_fits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(State, "fits", lambda self, target, going: True)


def forwards_while_waking(patch: pytest.MonkeyPatch) -> None:
    right = Requests.may_forward

    def may_forward(self: Requests, model: Any, now: float) -> bool:
        return right(self, model, now) or model.state is S.WAKING

    patch.setattr(Requests, "may_forward", may_forward)


def a_leaving_client_is_refused_as_well(patch: pytest.MonkeyPatch) -> None:
    right = Requests._left

    def left(self: Requests, event: e.ClientLeft, now: float) -> Any:
        self._state.out.append(c.Refuse(event.request, c.Refusal.CANNOT_LOAD, "gone"))
        return right(self, event, now)

    patch.setattr(Requests, "_left", left)


def a_bounced_request_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Requests, "_bounced", lambda self, event, now: self._take_in_flight(event.request, now)[0])


def no_deadline_for_a_wake(patch: pytest.MonkeyPatch) -> None:
    right = Engines.wake

    def wake(self: Engines, model: Any, now: float) -> None:
        right(self, model, now)
        model.deadline = None

    patch.setattr(Engines, "wake", wake)


def youngest_first(patch: pytest.MonkeyPatch) -> None:
    def decide(_self: Any, snapshot: Any) -> Any:
        return SwitchTo(max((m.oldest_arrival, m.name) for m, _ in snapshot.candidates)[1])

    for policy in (Fifo, CostAware, Tenure):
        patch.setattr(policy, "decide", decide)


def never_switches(patch: pytest.MonkeyPatch) -> None:
    for policy in (Fifo, CostAware, Tenure):
        patch.setattr(policy, "decide", lambda self, snapshot: Stay())


def a_failed_model_goes_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Switching, "_stands_back", lambda self, model, wanted: False)

    def decide(_self: Any, snapshot: Any) -> Any:
        return SwitchTo(max((m.oldest_arrival, m.name) for m, _ in snapshot.candidates)[1])

    patch.setattr(Tenure, "decide", decide)
    patch.setattr(Tenure, "bound", lambda self, secs: None)


def manual_mode_is_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    right = Switching._choose

    def choose(self: Switching, now: float, due: bool) -> Any:
        mode = self._state.mode
        self._state.mode = type(mode)()
        try:
            return right(self, now, due)
        finally:
            self._state.mode = mode

    patch.setattr(Switching, "_choose", choose)


def what_comes_up_by_itself_serves_nobody(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Switcher, "_serve_without_switch", lambda self, name, now: None)


def first_come_first_served(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(queue, "_place", lambda request: place_of(0, request.arrived, request.id))


def a_refused_image_is_tried_again(patch: pytest.MonkeyPatch) -> None:
    right = Switching._wake_failed

    def wake_failed(self: Switching, model: Any, reason: str, now: float) -> None:
        image = model.image
        right(self, model, reason, now)
        model.image = image

    patch.setattr(Switching, "_wake_failed", wake_failed)


def what_failed_to_sleep_is_left_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Switching, "sleep_failed", lambda self, model, kind, reason, now: self._engines.stayed(model, reason, now)
    )


def failed_jobs_are_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Switching, "fail_jobs", lambda self, reason: self._state.jobs.clear())


def whatever_sleeps_is_taken_to_have_left(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(core_state, "_left_by", lambda model, eviction: {})


SEEN_FROM_OUTSIDE: list[tuple[str, Mutate]] = [
    ("image", a_refused_image_is_tried_again),
    ("escalation", what_failed_to_sleep_is_left_alone),
    ("jobs", failed_jobs_are_not_told),
    ("memory", whatever_sleeps_is_taken_to_have_left),
]
"""What the world of the simulator sees to: the core has no means to."""

MUTATIONS: list[tuple[str, Mutate]] = [
    ("memory", everything_fits),
    ("forwarded_to_awake", forwards_while_waking),
    ("ends_once", a_leaving_client_is_refused_as_well),
    ("accounts", a_bounced_request_is_forgotten),
    ("deadlines", no_deadline_for_a_wake),
    ("staleness", youngest_first),
    ("staleness", never_switches),
    ("order", first_come_first_served),
    ("forwards", what_comes_up_by_itself_serves_nobody),
    ("failures", a_failed_model_goes_first),
    ("manual", manual_mode_is_not_looked_at),
]


def test_the_core_as_it_is_breaks_nothing():
    assert [str(v.violation) for v in verdicts() if v.violation is not None] == []


@cache
def verdicts() -> list[Verdict]:
    """Of the core as it is."""
    return [run_seed(seed) for seed in SEEDS]


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.process is not ProcessStrategy.STOP], ids=str)
def test_engines_sleep_and_wake_in_every_cell(cell):
    for event in ("EngineSlept", "EngineWoke"):
        assert sum(verdict.seen[f"{event} {cell}"] for verdict in verdicts()) > 0


@pytest.mark.parametrize(
    "failure",
    [
        "falling_asleep, cuda_suspend, refused",
        "falling_asleep, cuda_suspend, timeout",
        "falling_asleep, checkpoint, not_checkpointed",
        "falling_asleep, checkpoint, lied",
        "falling_asleep, checkpoint, timeout",
        "waking, cuda_suspend, refused",
        "waking, cuda_suspend, died",
        "waking, cuda_suspend, timeout",
        "waking, checkpoint, refused",
        "waking, checkpoint, died",
        "waking, checkpoint, timeout",
    ],
)
def test_every_way_out_of_a_cell_fails_in_every_manner(failure):
    assert sum(verdict.seen[f"failed: {failure}"] for verdict in verdicts()) > 0


def test_a_dump_may_kill_and_images_come_and_go():
    for what in (
        "died: falling_asleep, checkpoint",
        "died: awake, restored",
        "image refused",
        "ImageFound",
        "ImageLost",
    ):
        assert sum(verdict.seen[what] for verdict in verdicts()) > 0, what


@pytest.mark.parametrize(
    ("invariant", "mutate"), [*MUTATIONS, *SEEN_FROM_OUTSIDE], ids=lambda x: getattr(x, "__name__", x)
)
def test_a_broken_core_is_found_out(monkeypatch, invariant, mutate):
    mutate(monkeypatch)
    found = (verdict.violation.invariant for verdict in map(run_seed, SEEDS) if verdict.violation is not None)
    assert invariant in found


def test_each_invariant_has_a_mutation():
    assert {name for name, _ in MUTATIONS} == set(INVARIANTS)


def test_a_failing_seed_is_made_short(monkeypatch):
    everything_fits(monkeypatch)
    # Two requests are enough for it; with an operator there may be other ways, which are short in another way.
    found = (s for s in SEEDS if not draw(s).actions)
    seed = next(s for s in found if (v := run_seed(s).violation) is not None and v.invariant == "memory")
    scenario = shortest(seed, "memory")
    whole = draw(seed)
    violation = violation_of(World(scenario))
    assert violation is not None
    assert violation.invariant == "memory"
    assert len(scenario.arrivals) + len(scenario.actions) + len(scenario.faults) <= 3
    assert len(scenario.arrivals) <= len(whole.arrivals)
    assert log_of(scenario)[-1].startswith("VIOLATION memory")


def test_a_core_that_never_rests_decides_the_same():
    """But for the ticks of deadlines that have become needless."""
    for seed in range(150):
        assert decisions(seed, Switcher) == decisions(seed, Restless)


def decisions(seed: int, build_switcher: Callable[..., Switcher]) -> list[str]:
    lines: list[str] = []
    assert violation_of(World(draw(seed), log=lines.append, build_switcher=build_switcher)) is None
    return [line for line in lines if not line.endswith(" Tick()")]


def test_the_same_seed_gives_the_same_log():
    logs = {seed: digest(draw(seed)) for seed in range(5)}
    assert {seed: digest(draw(seed)) for seed in range(5)} == logs
    assert len(set(logs.values())) == 5

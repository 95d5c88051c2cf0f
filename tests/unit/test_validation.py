"""What a validation makes of what an engine says and measures: a row for each policy, and whether it is good enough."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.eviction import CELLS, EvictionPolicy, ProcessStrategy
from llmuxd.validation import BenchFailed, Row, cells_for, validate

OFFLOAD, SUSPEND, SAVE, STOP = (
    EvictionPolicy.parse(text)
    for text in ("offload+keep_running", "offload+cuda_suspend", "discard+checkpoint", "retain+stop")
)


@dataclass
class Played:
    """Plays a model. `asleep` is what it becomes and what it holds then; `says` its answers, the first the baseline."""

    asleep: tuple[S, int | None] = (S.ASLEEP, 500)
    says: list[str] = field(default_factory=lambda: ["why", "why"])
    awake_mib: int | None = 9000
    fails_in: str = ""
    is_awake: bool = False
    is_wanted: bool = False
    """Whether others wake it at once."""
    is_another: bool = False
    """Whether it is started anew instead of woken."""

    def _step(self, name: str) -> None:
        if self.fails_in == name:
            raise BenchFailed(f"{name} failed")

    async def wake(self) -> float:
        self._step("wake" if not self.is_awake else "again")
        self.is_awake = True
        return 2.0

    async def sleep(self, eviction: EvictionPolicy) -> tuple[float, S]:
        self._step("sleep")
        self.is_awake = self.is_wanted
        return 1.0, self.asleep[0]

    async def answer(self) -> str:
        self._step("answer")
        return self.says.pop(0)

    async def device_mib(self) -> int | None:
        return self.awake_mib if self.is_awake else self.asleep[1]

    def state(self) -> S:
        return S.AWAKE if self.is_awake else self.asleep[0]

    def came_back(self) -> bool:
        return not self.is_another


def row_of(bench: Played, policy: EvictionPolicy) -> Row:
    (row,) = asyncio.run(validate(bench, [policy], lambda row: None))
    return row


def test_a_row_has_all_that_was_measured():
    row = row_of(Played(), OFFLOAD)
    assert row == Row(str(OFFLOAD), 1.0, 2.0, 9000, 500, 9000, True, "")
    assert row.passed
    assert row.as_json()["passed"] is True


@pytest.mark.parametrize(
    ("policy", "asleep", "reason"),
    [
        (OFFLOAD, (S.ASLEEP, 9000), "no device memory was freed"),
        (OFFLOAD, (S.NOT_STARTED, 0), "it was not_started instead"),
        (SUSPEND, (S.ASLEEP, 1), "1 MiB of device memory were not freed"),
        (SAVE, (S.ASLEEP, 0), "it was asleep instead"),
        (SAVE, (S.CHECKPOINTED, 3), "3 MiB of device memory were not freed"),
        (STOP, (S.ASLEEP, 0), "it was asleep instead"),
        (OFFLOAD, (S.ASLEEP, None), ""),
        (SUSPEND, (S.ASLEEP, 0), ""),
        (SAVE, (S.CHECKPOINTED, 0), ""),
        (STOP, (S.CHECKPOINTED, 0), ""),
        (EvictionPolicy.parse("retain+keep_running"), (S.ASLEEP, 9000), ""),
    ],
)
def test_what_it_became_and_what_it_held_is_judged(policy, asleep, reason):
    assert row_of(Played(asleep=asleep), policy).reason == reason


def test_one_that_others_wake_at_once_is_judged_by_what_it_was():
    row = row_of(Played(is_wanted=True), SUSPEND)
    assert (row.after_mib, row.awake_mib, row.reason) == (None, 9000, "")
    assert row_of(Played(is_wanted=True, asleep=(S.NOT_STARTED, 0)), SUSPEND).reason == "it was not_started instead"


def test_another_answer_does_not_pass():
    row = row_of(Played(says=["why", "gibberish"]), OFFLOAD)
    assert (row.match, row.passed, row.reason) == (False, False, "it answers otherwise than before")


@pytest.mark.parametrize(("policy", "asleep"), [(OFFLOAD, S.ASLEEP), (SUSPEND, S.ASLEEP), (SAVE, S.CHECKPOINTED)])
def test_one_that_answers_as_before_because_it_was_started_anew_does_not_pass(policy, asleep):
    row = row_of(Played(asleep=(asleep, 0), is_another=True), policy)
    assert (row.match, row.reason) == (True, "it did not come back, and was started anew")
    assert row_of(Played(asleep=(S.NOT_STARTED, 0), is_another=True), STOP).passed


def test_without_any_measure_the_answer_counts():
    assert row_of(Played(awake_mib=None, asleep=(S.ASLEEP, None)), SUSPEND).passed


def test_a_step_that_fails_is_the_reason_and_the_rest_is_not_known():
    row = row_of(Played(fails_in="sleep"), OFFLOAD)
    assert (row.reason, row.sleep_secs, row.before_mib, row.match) == ("sleep failed", None, 9000, None)


def test_a_failed_policy_does_not_keep_the_next_from_being_tried():
    bench = Played(says=["why", "gibberish", "why"])
    told: list[str] = []
    rows = asyncio.run(validate(bench, [OFFLOAD, OFFLOAD], lambda row: told.append(row.eviction)))
    assert [row.passed for row in rows] == [False, True]
    assert told == [str(OFFLOAD)] * 2


def test_a_model_that_cannot_be_woken_cannot_be_validated():
    with pytest.raises(BenchFailed, match="wake failed"):
        row_of(Played(fails_in="wake"), OFFLOAD)


def test_what_a_box_can_do_is_what_is_tried():
    assert cells_for(frozenset(ProcessStrategy)) == list(CELLS)
    assert {cell.process for cell in cells_for([ProcessStrategy.STOP])} == {ProcessStrategy.STOP}

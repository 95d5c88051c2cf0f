"""`eviction = "auto"`: which cell is chosen, by what has been measured, what the box has, and how soon it is wanted."""

from __future__ import annotations

import pytest

from llmuxd.core import events as e
from llmuxd.core.choice import BARRED_SECS, Footprint, Resources
from llmuxd.core.costs import Costs
from llmuxd.core.eviction import AUTO, CELLS, STOP, EvictionPolicy, ProcessStrategy
from llmuxd.core.policies import Fifo
from llmuxd.core.settings import Settings
from tests.core.playbook import Play, spec

ALL = frozenset(ProcessStrategy)
OFFLOAD, DISCARD, SUSPEND, SAVE = (
    EvictionPolicy.parse(text)
    for text in ("offload+keep_running", "discard+keep_running", "retain+cuda_suspend", "discard+checkpoint")
)


def auto(**costs: dict[str, float]) -> Play:
    return Play(spec("a", AUTO), spec("b", AUTO), costs=costs)


def box(play: Play, now: float = 0.0, **resources: object) -> None:
    play.at(now, e.ResourcesMeasured(Resources(**resources)))  # type: ignore[arg-type]


def chosen(play: Play, name: str = "a") -> EvictionPolicy:
    model = play.model(name)
    assert model.eviction == model.choice.eviction
    return model.eviction


def test_twelve_cells_are_ten_and_each_is_there_once():
    assert len(CELLS) == len(set(CELLS)) == 10, "the three that stop differ in nothing"
    assert STOP in CELLS


def test_without_any_knowledge_a_model_that_is_used_sleeps_in_host_memory():
    play = auto()
    play.awake("a")
    assert chosen(play) == OFFLOAD


def test_one_that_nobody_wants_leaves_by_the_cheapest_way_out():
    play = auto(a={"stop": 0.5, "start": 50.0})
    assert chosen(play) == STOP
    assert "nobody has wanted it yet" in play.model("a").choice.why


def test_what_was_measured_counts_more_than_what_is_supposed():
    play = auto(a={f"wake {OFFLOAD}": 30.0, f"sleep {OFFLOAD}": 30.0, "stop": 9.0, "start": 50.0})
    play.ask(0, 1, "a")
    box(play)
    assert chosen(play) == DISCARD


def test_what_others_took_counts_where_nothing_was_measured():
    play = auto(b={f"wake {OFFLOAD}": 30.0, f"sleep {OFFLOAD}": 30.0}, a={"stop": 9.0, "start": 50.0})
    play.ask(0, 1, "a")
    box(play)
    assert chosen(play) == DISCARD


def test_only_what_the_box_can_do_is_chosen():
    play = auto(a={f"wake {SUSPEND}": 0.1, f"sleep {SUSPEND}": 0.1})
    play.ask(0, 1, "a")
    box(play)
    assert chosen(play) == OFFLOAD
    box(play, usable=ALL)
    assert chosen(play) == SUSPEND
    assert "next best: offload" in play.model("a").choice.why


@pytest.mark.parametrize(("free", "expected"), [(120_000, OFFLOAD), (12_000, DISCARD)])
def test_weights_go_to_host_memory_only_where_there_is_room(free, expected):
    play = auto(a={"start": 60.0})
    play.ask(0, 1, "a")
    box(play, host_free=free, footprints={"a": Footprint(host=2_000, device=20_000)})
    assert chosen(play) == expected


def test_images_are_written_only_where_there_is_room():
    measured = {f"sleep {SAVE}": 0.5, f"wake {SAVE}": 0.5}
    play = auto(a=measured)
    play.ask(0, 1, "a")
    feet = {"a": Footprint(host=2_000, device=20_000)}
    box(play, usable=ALL, disk_free=1_000, footprints=feet)
    assert chosen(play) != SAVE
    box(play, usable=ALL, disk_free=100_000, footprints=feet)
    assert chosen(play) == SAVE


def test_host_memory_is_given_back_by_one_that_has_not_been_wanted_for_long():
    measured = {f"sleep {OFFLOAD}": 1.0, f"wake {OFFLOAD}": 1.0, f"sleep {DISCARD}": 1.0, f"wake {DISCARD}": 8.0}
    play = auto(a={**measured, "stop": 5.0, "start": 60.0})
    play.awake("a")
    feet = {"a": Footprint(host=2_000, device=20_000)}
    box(play, 1.0, host_free=30_000, footprints=feet)
    assert chosen(play) == OFFLOAD
    box(play, 7200.0, host_free=30_000, footprints=feet)
    assert chosen(play) == DISCARD
    assert "last wanted 7200 s ago" in play.model("a").choice.why


def test_a_cell_that_has_failed_is_not_chosen_for_a_while():
    play = auto(a={"start": 60.0})
    play.awake("a")
    box(play, 1.0)
    assert play.at(1, e.OperatorSleep(1, "a")) == [f"sleep a {OFFLOAD} wait"]
    play.fails(2, "a")
    assert chosen(play) != OFFLOAD
    play.done(3, "a")
    play.ask(3 + BARRED_SECS, 1, "a")
    box(play, 3 + BARRED_SECS)
    assert chosen(play) == OFFLOAD


def test_a_stop_always_remains():
    play = auto()
    box(play, usable=frozenset({ProcessStrategy.STOP}))
    assert chosen(play) == STOP
    assert "next best" not in play.model("a").choice.why


def test_a_resume_that_fails_bars_its_cell():
    play = Play(spec("a", SUSPEND), spec("b"))
    play.asleep("a")
    play.ask(1, 1, "a")
    play.fails(2, "a")
    assert play.model("a").barred == {SUSPEND: 2 + BARRED_SECS}


def test_an_operator_sets_a_policy_and_gives_the_choice_back():
    play = auto()
    play.at(0, e.SetEviction("a", DISCARD))
    assert (play.model("a").eviction, play.model("a").choice) == (DISCARD, None)
    play.ask(1, 1, "a")
    play.at(1, e.SetEviction("a", AUTO))
    assert chosen(play) == OFFLOAD


def test_a_reload_takes_over_auto():
    play = Play(spec("a", SAVE), spec("b"))
    play.at(1, e.Reload((spec("a", AUTO), spec("b")), Settings(), Fifo()))
    assert chosen(play) == DISCARD


def test_costs_of_cells_outlive_a_restart():
    costs = Costs()
    costs.add("sleep", OFFLOAD, 2.0)
    costs.add("wake", SAVE, 3.0)
    again = Costs.of(costs.known)
    assert again.of_cell("sleep", OFFLOAD) == 2.0
    assert again.of_cell("wake", SAVE) == 3.0
    assert again.of_cell("wake", OFFLOAD) is None
    assert again.known == costs.known
    assert Costs.of({"nonsense": 1.0, "else offload+stop": 1.0}).known == {}
    assert str(AUTO) == "auto"

"""The cells of the eviction table: suspended engines, saved ones, images; whatever fails there ends in a stop."""

from __future__ import annotations

import pytest

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.core.state import IllegalEvent
from tests.core.playbook import OFFLOAD, Play, spec

SAVE = EvictionPolicy.parse("discard+checkpoint")
SUSPEND = EvictionPolicy.parse("offload+cuda_suspend")
CELLS = [f"{w}+{p}" for w in ("retain", "offload", "discard") for p in ("cuda_suspend", "checkpoint")]


def play_of(eviction: str | EvictionPolicy = SAVE, **more: object) -> Play:
    policy = EvictionPolicy.parse(eviction) if isinstance(eviction, str) else eviction
    return Play(spec("a", policy, **more), spec("b", policy, **more))


def saved(play: Play, name: str = "a", now: float = 0.0) -> None:
    play.awake(name, now)
    assert len(play.at(now, e.OperatorSleep(1000, name))) == 1
    assert play.done(now, name) == ["job 1000 done"]
    assert play.model(name).state is S.CHECKPOINTED


@pytest.mark.parametrize("cell", CELLS)
def test_two_models_take_turns_in_every_cell(cell):
    play = play_of(cell)
    play.awake("a")
    assert play.ask(1, 1, "b") == [f"sleep a {cell} wait"]
    assert play.done(2, "a") == ["start b"]
    assert play.state.used() == {"gpu": 1}, "what sleeps has left the device"
    assert play.done(3, "b") == ["forward 1"]
    play.at(4, e.RequestFinished(1))
    assert play.ask(5, 2, "a") == [f"sleep b {cell} wait"]
    assert play.done(6, "b") == [f"wake a {cell}"]
    assert play.done(7, "a") == ["forward 2"]


def test_a_saved_engine_has_no_process_and_is_restored_for_its_next_request():
    play = play_of()
    saved(play)
    assert play.model("a").image == SAVE
    assert play.ask(1, 1, "a") == [f"wake a {SAVE}"]
    assert play.model("a").restoring
    assert play.done(5, "a", image_kept=True) == ["forward 1"]
    assert play.model("a").incarnation == play.model("a").op, "it is another process than before"


def test_saving_and_restoring_have_as_much_time_as_a_start():
    play = play_of(start_timeout=1000.0)
    play.awake("a")
    play.at(0, e.OperatorSleep(1, "a"))
    assert play.model("a").deadline == 1010
    play.done(0, "a")
    play.ask(0, 1, "a")
    assert play.model("a").deadline == 1010


def test_an_image_that_is_kept_is_what_a_stopped_engine_comes_back_from():
    play = play_of()
    saved(play)
    play.ask(1, 1, "a")
    play.done(2, "a", image_kept=True)
    play.at(3, e.RequestFinished(1))
    assert play.at(4, e.OperatorStop(1, "a")) == ["stop a"]
    assert play.done(5, "a") == ["job 1 done"]
    assert play.model("a").state is S.CHECKPOINTED
    assert play.ask(6, 2, "a") == [f"wake a {SAVE}"]


def test_an_image_that_is_not_kept_is_used_once():
    play = play_of()
    saved(play)
    play.ask(1, 1, "a")
    play.done(2, "a", image_kept=False)
    play.at(3, e.RequestFinished(1))
    play.at(4, e.OperatorStop(1, "a"))
    play.done(5, "a")
    assert play.model("a").state is S.NOT_STARTED


@pytest.mark.parametrize("kind", ["refused", "timeout", "died"])
def test_an_engine_that_cannot_be_restored_is_started_cold_in_the_same_switch(kind):
    play = play_of()
    saved(play)
    play.ask(1, 1, "a")
    assert play.fails(2, "a", "it is of another vLLM", kind) == ["stop a"]
    assert play.done(3, "a") == ["start a"]
    assert "another vLLM" in play.model("a").last_error
    assert play.done(4, "a") == ["forward 1"]
    assert play.model("a").failures == 0


def test_a_restore_that_takes_too_long_is_given_up_for_a_cold_start():
    play = play_of(start_timeout=300.0)
    saved(play)
    play.at(1, e.OperatorWake(1, "a"))
    assert play.tick(311) == ["stop a"]
    assert play.done(312, "a") == ["start a"]


def test_an_engine_that_cannot_be_resumed_is_started_cold_in_the_same_switch():
    play = play_of(SUSPEND)
    play.asleep("a")
    play.ask(1, 1, "a")
    assert play.fails(2, "a", "restore: failed") == ["stop a"]
    assert play.done(3, "a") == ["start a"]


def test_the_death_of_an_engine_that_is_brought_back_is_told_by_its_operation():
    play = play_of()
    saved(play)
    play.ask(1, 1, "a")
    assert play.dies(2, "a") == []
    assert play.fails(2, "a", "killed", "died") == ["stop a"]


def test_too_little_memory_is_no_fault_of_the_image():
    play = Play(spec("a", SAVE), spec("b", OFFLOAD))
    play.asleep("b")
    saved(play, "a", 1)
    play.ask(2, 1, "a")
    assert play.fails(3, "a", "out of memory", "out_of_memory") == ["stop b", "stop a"]
    play.done(4, "b")
    assert play.done(4, "a") == [f"wake a {SAVE}"]


def test_a_restored_engine_that_dies_before_it_has_answered_loses_its_image():
    play = play_of()
    saved(play)
    play.at(1, e.OperatorWake(1, "a"))
    play.done(2, "a", image_kept=True)
    assert play.dies(3, "a") == ["refuse image a", "stop a"]
    play.done(4, "a")
    assert play.model("a").state is S.NOT_STARTED


def test_one_that_has_answered_keeps_it():
    play = play_of()
    saved(play)
    play.ask(1, 1, "a")
    play.done(2, "a", image_kept=True)
    play.at(3, e.RequestFinished(1))
    assert play.dies(3, "a") == ["stop a"]
    play.done(4, "a")
    assert play.model("a").state is S.CHECKPOINTED


def test_one_that_fails_again_and_again_waits_out_its_backoff_and_is_started_cold():
    play = play_of()
    saved(play)
    play.ask(1, 1, "a")
    play.done(2, "a", image_kept=True)
    play.at(3, e.RequestFinished(1))
    play.model("a").failures = 3
    play.dies(4, "a")
    play.done(4, "a")
    assert play.model("a").state is S.FAILED
    assert play.ask(100, 2, "a") == ["start a"]


# What cannot be saved, and lives


def test_an_engine_that_cannot_be_saved_in_a_switch_is_stopped():
    play = play_of()
    play.awake("a")
    play.ask(1, 1, "b")
    assert play.fails(2, "a", "no space", "not_checkpointed") == ["stop a"]
    assert play.done(3, "a") == ["start b"]


def test_one_that_an_operator_wanted_saved_serves_again():
    play = play_of()
    play.awake("a")
    play.at(1, e.OperatorSleep(1, "a"))
    assert play.fails(2, "a", "no space", "not_checkpointed") == ["wake a discard+keep_running"]
    assert play.done(3, "a") == ["job 1 failed"]
    (failed,) = [x for x in play.commands if isinstance(x, c.JobFailed)]
    assert failed.reason == "a was not checkpointed: sleep failed: no space"
    assert play.model("a").state is S.AWAKE


def test_one_that_was_idle_stays_asleep_as_its_weights_do():
    play = play_of(ttl=10.0)
    play.awake("a")
    assert play.tick(10) == [f"sleep a {SAVE} wait"]
    assert play.fails(11, "a", "no space", "not_checkpointed") == []
    assert (play.model("a").state, str(play.model("a").asleep_by)) == (S.ASLEEP, "discard+keep_running")
    assert play.ask(12, 1, "a") == ["wake a discard+keep_running"]


def test_one_that_was_idle_and_retains_its_weights_may_as_well_serve():
    play = play_of("retain+checkpoint", ttl=10.0)
    play.awake("a")
    play.tick(10)
    assert play.fails(11, "a", "no space", "not_checkpointed") == ["wake a retain+keep_running"]


def test_an_operator_who_wants_an_image_of_what_does_not_run_is_told():
    play = play_of()
    assert play.at(1, e.OperatorSleep(1, "a")) == ["job 1 failed"]
    (failed,) = [x for x in play.commands if isinstance(x, c.JobFailed)]
    assert failed.reason == "a was not checkpointed: is stopped"


def test_a_sleeper_is_not_put_to_another_sleep():
    play = play_of(OFFLOAD)
    play.asleep("a")
    assert play.at(1, e.OperatorSleep(1, "a", SAVE)) == ["job 1 failed"]
    assert play.at(1, e.OperatorSleep(2, "a", SUSPEND)) == ["job 2 failed"]
    assert play.at(1, e.OperatorSleep(3, "a", OFFLOAD)) == ["job 3 done"]


# Images that come and go


def test_an_image_of_an_earlier_daemon_is_restored_from():
    play = play_of()
    assert play.at(0, e.ImageFound("a", SAVE, can_park=False)) == []
    assert play.model("a").state is S.CHECKPOINTED
    assert play.ask(1, 1, "a") == [f"wake a {SAVE}"]
    play.done(2, "a", image_kept=True)
    assert not play.model("a").can_park


def test_an_image_is_noted_of_a_model_that_runs():
    play = play_of()
    play.awake("a")
    assert play.at(1, e.ImageFound("a", SAVE)) == []
    assert play.model("a").state is S.AWAKE
    play.at(2, e.OperatorStop(1, "a"))
    play.done(3, "a")
    assert play.model("a").state is S.CHECKPOINTED


def test_a_newer_image_takes_the_place_of_the_older():
    play = play_of()
    play.at(0, e.ImageFound("a", SAVE))
    retained = EvictionPolicy.parse("retain+checkpoint")
    play.at(1, e.ImageFound("a", retained))
    assert play.ask(2, 1, "a") == [f"wake a {retained}"]


def test_an_image_that_is_gone_means_a_cold_start():
    play = play_of()
    play.at(0, e.ImageFound("a", SAVE))
    assert play.at(1, e.ImageLost("a", "removed")) == []
    assert play.ask(2, 1, "a") == ["start a"]
    assert play.at(3, e.ImageLost("a", "removed")) == [], "that changes nothing for who runs"


def test_images_of_nobody_are_illegal():
    play = play_of()
    for event in (e.ImageFound("x", SAVE), e.ImageLost("x", "removed")):
        with pytest.raises(IllegalEvent):
            play.at(0, event)


def test_a_stop_of_what_is_saved_has_nothing_to_do():
    play = play_of()
    saved(play)
    assert play.at(1, e.OperatorStop(1, "a")) == ["job 1 done"]
    (done,) = [x for x in play.commands if isinstance(x, c.JobDone)]
    assert done.message == f"a is checkpointed ({SAVE})"

"""Real engines come and go through images, by requests alone; and by an operator's word."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.criu.stack import TWO, SavingStack, saving_stack, until

ROUNDS = 10
TIMES_FASTER = 3.0


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, vllm: Path, models: dict[str, Path], criu: Path
) -> Iterator[SavingStack]:
    with saving_stack(tmp_path_factory.mktemp("rounds"), vllm, models, criu) as made:
        yield made


@pytest.fixture(scope="module")
def first(stack: SavingStack) -> dict[str, str]:
    """What the models say when they were started cold."""
    return {name: stack.say(name)[0] for name in TWO}


def test_two_models_take_turns_by_requests_alone_and_say_what_they_said(stack, first):
    assert first["tiny-a"] != first["tiny-b"]
    for _ in range(ROUNDS):
        for name in TWO:
            said, _ = stack.say(name)
            assert said == first[name]
            other = next(each for each in TWO if each != name)
            assert stack.state(other) == "checkpointed"
            assert stack.status()["models"][other]["pid"] is None
    assert [stack.starts(name) for name in TWO] == [1, 1], "nothing was started cold again"


def test_a_restore_is_faster_than_a_cold_start(stack, first):
    for name in TWO:
        (cold,) = stack.spent(name, "starting")
        restores = stack.spent(name, "waking")
        assert len(restores) >= ROUNDS
        typical = sorted(restores)[len(restores) // 2]
        print(f"{name}: started in {cold:.1f} s, restored in {typical:.1f} s ({min(restores)} to {max(restores)})")
        assert cold >= TIMES_FASTER * typical


def test_images_do_not_pile_up(stack, first):
    stack.say("tiny-a")
    assert len(stack.saved("tiny-a")) == 1, "what has been restored is the one that counts"
    assert len(stack.saved("tiny-b")) <= 2


def test_nothing_is_left_in_shared_memory_of_what_is_saved(stack, first):
    stack.say("tiny-b")
    tree = stack.tree("tiny-b")
    assert tree.left(), "it has something there while it runs"
    stack.say("tiny-a")
    assert tree.left() == []


def test_a_stopped_daemon_finds_its_images_and_restores_for_the_first_request(stack, first):
    stack.say("tiny-a")
    stack.terminate()
    assert stack.wait(120) == 0
    assert stack.processes() == []
    stack.start()
    stack.wait_for_port()
    assert [stack.state(name) for name in TWO] == ["checkpointed"] * 2
    assert stack.say("tiny-b")[0] == first["tiny-b"]
    assert stack.starts("tiny-b") == 1


def test_a_killed_daemon_finds_them_too(stack, first):
    stack.say("tiny-a")
    stack.send(signal.SIGKILL)
    stack.wait()
    stack.start()
    stack.wait_for_port()
    assert (stack.state("tiny-a"), stack.state("tiny-b")) == ("awake", "checkpointed"), "one of them still runs"
    assert stack.say("tiny-b")[0] == first["tiny-b"]
    assert stack.say("tiny-a")[0] == first["tiny-a"]


def test_an_operator_saves_and_restores(stack, first):
    done = stack.ctl("checkpoint", "tiny-a", "--eviction", "offload+checkpoint", "--no-warmup", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["result"] == "ok", result
    assert stack.state("tiny-a") == "checkpointed"
    assert stack.saved("tiny-a")
    stack.ctl("restore", "tiny-a")
    assert stack.state("tiny-a") == "awake"
    assert stack.say("tiny-a")[0] == first["tiny-a"]
    stack.ctl("checkpoint", "tiny-a")
    stack.ctl("restore", "tiny-a", "--detached")
    until(lambda: stack.state("tiny-a") == "awake", 60, "it comes back by itself")
    assert stack.say("tiny-a")[0] == first["tiny-a"]


@pytest.mark.parametrize("weights", ["retain", "offload", "discard"])
def test_each_weight_strategy_comes_back_as_it_was(stack, first, weights):
    stack.ctl("wake", "tiny-b")
    stack.ctl("sleep", "tiny-b", "--eviction", f"{weights}+checkpoint")
    assert stack.state("tiny-b") == "checkpointed"
    assert stack.say("tiny-b")[0] == first["tiny-b"]

"""All twelve cells of the eviction table by requests alone, over simulated engines and stand-ins for the tools.

The stand-ins keep the tools' state machines, and fail where the real ones would. What the real CRIU does to a real vLLM
is in tests/criu.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llmuxd.core.eviction import EvictionPolicy, ProcessStrategy, WeightStrategy
from tests.integration.cells_stack import AWAKE, ENGINE, RESIDUAL, Cells
from tests.integration.stack import Daemon, until

ALL = [EvictionPolicy(weights, process) for process in ProcessStrategy for weights in WeightStrategy]
SUSPEND, SAVE = "offload+cuda_suspend", "discard+checkpoint"

ROUND = ["lock", "checkpoint", "restore", "unlock"]
"""What cuda-checkpoint does to a process that leaves its device and comes back."""


@pytest.fixture
def cells(tmp_path: Path, daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch) -> Cells:
    return Cells(tmp_path, daemon, monkeypatch)


@pytest.mark.parametrize("cell", ALL, ids=str)
def test_two_models_take_turns(cells, cell):
    stack = cells.start(str(cell))
    first = {name: stack.ask(name, "why", tokens=8).text for name in "ab"}
    assert first["a"] != first["b"]
    for name, other in ("ab", "ba"):
        before = cells.model(name)
        assert cells.held(other) == (AWAKE, left_by(cell))
        if cell.process in (ProcessStrategy.STOP, ProcessStrategy.CHECKPOINT):
            gone = "not_started" if cell.process is ProcessStrategy.STOP else "checkpointed"
            assert (before["engine"], before["pid"]) == (gone, None)
        else:
            assert (before["engine"], before["asleep_by"]) == ("asleep", str(cell))
        assert stack.ask(name, "why", tokens=8).text == first[name]
        after = cells.model(name)
        assert (after["engine"], after["last_error"]) == ("awake", None)
        assert before["pid"] in (None, after["pid"])
        assert cells.held(name) == (AWAKE, left_by(cell))
    assert (stack.ledger.overcommit(), stack.ledger.refused()) == (0, 0)
    saved = cell.process is ProcessStrategy.CHECKPOINT
    assert cells.criu_calls() == (["dump", "dump", "restore", "dump", "restore"] if saved else [])
    suspended = cell.process is ProcessStrategy.CUDA_SUSPEND
    assert cells.cuda_calls(cells.core("b")) == (ROUND if suspended else [])


def left_by(cell: EvictionPolicy) -> int:
    """What an engine that was evicted by it has on the device."""
    if cell.process is not ProcessStrategy.KEEP_RUNNING:
        return 0
    return AWAKE if cell.weights is WeightStrategy.RETAIN else RESIDUAL


# Whatever fails ends in a stop, its memory is free, and the model comes back from its weights


@pytest.mark.parametrize("fault", ["lock fail", "lock kill", "checkpoint fail", "checkpoint kill"])
def test_an_engine_that_cannot_be_suspended_is_stopped_for_the_other(cells, fault):
    stack = cells.start(SUSPEND)
    first = stack.ask("a", "why")
    cells.cuda_fault(fault)
    stopped_for_the_other(cells, first.text)


@pytest.mark.parametrize("fault", ["restore fail", "restore kill", "unlock fail"])
def test_an_engine_that_cannot_be_resumed_is_started_for_the_same_request(cells, fault):
    stack = cells.start(SUSPEND)
    first, pid = stack.ask("a", "why"), cells.model("a")["pid"]
    stack.ask("b")
    cells.cuda_fault(fault)
    assert stack.ask("a", "why").text == first.text
    assert cells.model("a")["pid"] != pid
    assert "it could not be brought back" in stack.log.read_text()


@pytest.mark.parametrize("fault", ["fail", "no-space", "die", "kill"])
def test_an_engine_that_cannot_be_saved_is_stopped_for_the_other(cells, fault):
    stack = cells.start(SAVE)
    first = stack.ask("a", "why")
    cells.criu_fault(f"dump {fault} 1")
    stopped_for_the_other(cells, first.text)
    assert not list(cells.images.rglob("*.partial"))


def stopped_for_the_other(cells: Cells, answer: str) -> None:
    """`a` is stopped while `b` is wanted, and starts when it is wanted itself."""
    stack = cells.stack
    pid = cells.model("a")["pid"]
    assert stack.ask("b").json["model"] == "b"
    assert (cells.model("a")["engine"], cells.held("b")) == ("not_started", (AWAKE, 0))
    assert not psutil.pid_exists(pid)
    assert cells.model("a")["last_error"]
    cells.cuda_fault("")
    assert stack.ask("a", "why").text == answer
    assert (stack.ledger.overcommit(), stack.ledger.refused()) == (0, 0)


@pytest.mark.parametrize("fault", ["fail", "die", "hang"])
def test_an_engine_that_cannot_be_restored_is_started_for_the_same_request(cells, fault):
    stack = cells.start(SAVE, start_timeout_secs=8, top={"wake_timeout_secs": 1})
    first = stack.ask("a", "why")
    stack.ask("b")
    cells.criu_fault(f"restore {fault} 1")
    assert stack.ask("a", "why").text == first.text
    assert cells.held("a") == (AWAKE, 0), "nothing is left of what was half restored"
    # The image is not tried again; the next one is.
    stack.ask("b")
    assert cells.model("a")["engine"] == "checkpointed"
    assert stack.ask("a", "why").text == first.text
    assert cells.model("a")["last_error"] is None


def test_a_restored_engine_that_dies_before_it_has_answered_is_started_for_the_same_request(cells):
    stack = cells.start(SAVE)
    first = stack.ask("a", "why")
    stack.ask("b")
    stack.fault("a", "die_in_wake*1")
    assert stack.ask("a", "why").text == first.text
    assert cells.criu_calls() == ["dump", "dump", "restore"]
    assert cells.held("a") == (AWAKE, 0)


def remove_it(image: Path) -> None:
    shutil.rmtree(image)


def damage_it(image: Path) -> None:
    with (image / "criu" / "pages-1.img").open("r+b") as pages:
        pages.write(b"another page")


def make_it_foreign(image: Path) -> None:
    manifest = json.loads((image / "manifest.json").read_text())
    manifest["host"]["machine_id"] = "another"
    (image / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [(remove_it, "no image"), (damage_it, "pages-1.img of it is damaged"), (make_it_foreign, "another machine")],
)
def test_an_image_that_is_not_good_is_refused_with_the_reason(cells, harm, reason):
    stack = cells.start(SAVE)
    first = stack.ask("a", "why")
    stack.ask("b")
    (image,) = (cells.images / "a").iterdir()
    harm(image)
    assert stack.ask("a", "why").text == first.text
    assert reason in stack.log.read_text()
    assert "restore" not in cells.criu_calls()


def test_an_operator_whose_dump_fails_is_told_and_the_model_serves_on(cells):
    stack = cells.start(SAVE)
    stack.ask("a")
    pid = cells.model("a")["pid"]
    cells.criu_fault("dump no-space 1")
    told = stack.ctl("sleep", "a")
    assert told.returncode == 1
    assert "No space left on device" in told.stderr
    assert stack.ask("a").status == 200
    assert cells.model("a")["pid"] == pid


def test_an_engine_of_several_ranks_whose_dump_fails_serves_on(cells):
    stack = cells.start(SAVE, **{**ENGINE, "extra_args": [*ENGINE["extra_args"], "--tensor-parallel-size=2"]})
    first = stack.ask("a", "why")
    pid = cells.model("a")["pid"]
    cells.criu_fault("dump no-space 1")
    assert stack.ctl("sleep", "a").returncode == 1
    assert stack.ask("a", "why").text == first.text
    assert cells.model("a")["pid"] == pid, "what holds its ranks together was built again"


# Over the life of a daemon


def test_an_image_outlives_the_daemon_and_an_engine_that_was_stopped(cells):
    stack = cells.start(SAVE)
    first = stack.ask("a", "why")
    stack.ask("b")
    assert stack.stop() == 0
    assert cells.stack.ledger.held() == {}
    stack.start()
    assert cells.model("a")["engine"] == "checkpointed"
    assert stack.ask("a", "why").text == first.text
    assert cells.criu_calls() == ["dump", "restore"]


def test_a_reload_looks_for_images_where_the_config_says_now(cells):
    stack = cells.start(SAVE)
    first = stack.ask("a", "why", tokens=8).text
    stack.ask("b", "why")
    generation = cells.model("a")["image"]["generation"]
    for folder, expected in ((cells.images.with_name("elsewhere"), "not_started"), (cells.images, "checkpointed")):
        stack.top["checkpoint"]["images_dir"] = str(folder)
        stack.write_config()
        assert stack.ctl("reload").returncode == 0
        until(lambda state=expected: cells.model("a")["engine"] == state, f"it is {expected}")
    assert cells.model("a")["image"]["generation"] == generation
    assert stack.ask("a", "why", tokens=8).text == first
    assert cells.criu_calls().count("restore") == 1


def test_what_an_interrupted_removal_has_left_goes_when_the_daemon_starts(cells):
    stack = cells.start(SAVE)
    stack.ask("a", "why")
    stack.ask("b", "why")
    stack.stop()
    left = [cells.images / "a" / name for name in ("20250101T000000.000001.unfinished", "20250101T000000.000002")]
    for folder in left:
        (folder / "criu").mkdir(parents=True)
    stack.start()
    assert cells.model("a")["engine"] == "checkpointed"
    assert not [folder for folder in left if folder.exists()]


def test_a_suspended_engine_outlives_a_daemon_that_was_killed(cells):
    stack = cells.start(SUSPEND)
    first, pid = stack.ask("a", "why"), cells.model("a")["pid"]
    stack.ask("b")
    stack.kill()
    stack.start()
    found = cells.model("a")
    assert (found["engine"], found["asleep_by"], found["pid"]) == ("asleep", SUSPEND, pid)
    assert stack.ask("a", "why").text == first.text
    assert cells.model("a")["pid"] == pid


@pytest.mark.parametrize("cell", [SUSPEND, SAVE])
@pytest.mark.parametrize(
    ("version", "down", "up"),
    [("0.32.0", "checkpoint_prepare", "checkpoint_restore"), ("0.31.0", "suspend_nccl", "resume_nccl")],
)
def test_what_holds_the_ranks_together_is_taken_down_before_and_built_again_after(cells, cell, version, down, up):
    two = {**ENGINE, "extra_args": [*ENGINE["extra_args"], "--tensor-parallel-size=2"]}
    two["env"] = {**ENGINE["env"], "LLMUX_SIM_VERSION": version}
    stack = cells.start(cell, **two)
    first = stack.ask("a", "why")
    stack.ask("b")
    assert stack.ask("a", "why").text == first.text
    log = (stack.home / "state" / "logs" / "a.log").read_text()
    said = re.findall(r"POST (/sleep|/wake_up)| collective_rpc (\w+)", log)
    order = [path or method for path, method in said]
    reload = ["/wake_up", "reload_weights"] if cell == SAVE else []
    assert order == ["/sleep", down, up, *reload, "/wake_up"]

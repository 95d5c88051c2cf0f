"""An operator saves, restores and validates: `llmuxctl` against a daemon with simulated engines and stand-ins."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmuxd.core.eviction import CELLS
from llmuxd.protocol import Exit
from tests.integration.cells_stack import ENGINE, Cells
from tests.integration.stack import Daemon, until

SAVE = "discard+checkpoint"
VALIDATE_SECS = 180.0
"""Many sleeps, wakes and starts, on a machine that may be busy."""


@pytest.fixture
def cells(tmp_path: Path, daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch) -> Cells:
    return Cells(tmp_path, daemon, monkeypatch)


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The last line of NDJSON."""
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_checkpoint_starts_warms_and_saves_with_progress_and_figures(cells):
    stack = cells.start("offload+keep_running")
    done = stack.ctl("checkpoint", "a")
    assert done.returncode == 0, done
    assert "a is checkpointed: " in done.stdout
    for step in ("a: starting", "a: one inference", "saving 2 processes", "a: checkpointed"):
        assert step in done.stderr
    model = cells.model("a")
    assert (model["engine"], model["image"]["eviction"]) == ("checkpointed", "offload+checkpoint")
    assert Path(model["image"]["folder"]).parent == cells.images / "a"
    assert stack.ctl("status").stdout.count("checkpointed") == 1


def test_checkpoint_takes_an_eviction_and_no_warmup_and_tells_it_as_json(cells):
    stack = cells.start("offload+keep_running")
    done = stack.ctl("checkpoint", "a", "--eviction", SAVE, "--no-warmup", "--json")
    last = result(done)
    assert (last["result"], last["model"], last["eviction"]) == ("ok", "a", SAVE)
    assert last["size"] > 0
    assert last["seconds"] > 0
    assert "inference" not in done.stdout


def test_a_checkpoint_that_fails_leaves_the_engine_running(cells):
    stack = cells.start("offload+keep_running")
    first = stack.ask("a", "why", tokens=8).text
    cells.criu_fault("dump fail\n")
    done = stack.ctl("checkpoint", "a")
    assert done.returncode == Exit.FAILED
    assert "a was not checkpointed" in done.stderr
    assert cells.model("a")["engine"] == "awake"
    assert stack.ask("a", "why", tokens=8).text == first


@pytest.mark.parametrize("eviction", ["discard+stop", "nonsense"])
def test_only_a_checkpoint_is_made_by_checkpoint(cells, eviction):
    stack = cells.start("offload+keep_running")
    done = stack.ctl("checkpoint", "a", "--eviction", eviction)
    assert done.returncode != 0
    assert ("discard+checkpoint" if eviction == "discard+stop" else "WEIGHTS+PROCESS") in done.stderr
    assert cells.model("a")["engine"] == "not_started"


def test_restore_brings_back_what_was_saved(cells):
    stack = cells.start(SAVE)
    first = stack.ask("a", "why", tokens=8).text
    stack.ctl("checkpoint", "a")
    done = stack.ctl("restore", "a")
    assert done.returncode == 0, done
    assert "a is awake, restored in " in done.stdout
    assert stack.ask("a", "why", tokens=8).text == first
    again = stack.ctl("restore", "a")
    assert (again.returncode, "a is awake already" in again.stderr) == (Exit.FAILED, True)


def test_a_detached_restore_is_not_waited_for(cells):
    stack = cells.start(SAVE)
    stack.ctl("checkpoint", "a")
    done = stack.ctl("restore", "a", "--detached")
    assert (done.returncode, "is being restored" in done.stdout) == (0, True)
    until(lambda: cells.model("a")["engine"] == "awake", "it is restored")


def test_a_restore_of_a_damaged_image_starts_the_engine_and_says_so(cells):
    stack = cells.start(SAVE)
    stack.ctl("checkpoint", "a")
    pages = next(Path(cells.model("a")["image"]["folder"]).glob("criu/pages*"))
    pages.write_bytes(b"x" * pages.stat().st_size)
    done = stack.ctl("restore", "a")
    assert done.returncode == 0, done
    assert "started from its weights" in done.stdout
    assert "is damaged" in done.stdout
    assert cells.model("a")["image"] is None


def test_there_is_nothing_to_restore_without_an_image(cells):
    stack = cells.start(SAVE)
    done = stack.ctl("restore", "a")
    assert done.returncode == Exit.FAILED
    assert "`llmuxctl checkpoint a` makes an image" in done.stderr
    assert stack.ctl("restore", "nobody").returncode == Exit.NO_SUCH_MODEL


def test_validate_tries_all_that_the_box_can_do_while_others_go_on(cells):
    stack = cells.start("offload+keep_running", top={"policy": {"request_timeout_secs": 120}})
    done = stack.ctl("validate", "a", "--json", timeout=VALIDATE_SECS)
    assert done.returncode == 0, done
    last = result(done)
    assert last["message"] == f"{len(CELLS)} of {len(CELLS)} policies passed"
    rows = {row["eviction"]: row for row in last["rows"]}
    assert set(rows) == set(map(str, CELLS))
    for policy, row in rows.items():
        assert (row["match"], row["passed"], row["reason"]) == (True, True, "")
        assert row["before_mib"] == row["awake_mib"] > 0
        assert row["sleep_secs"] > 0
        if not policy.endswith("keep_running"):
            assert row["after_mib"] == 0
    assert rows["retain+keep_running"]["after_mib"] == rows["retain+keep_running"]["before_mib"]
    assert 0 < rows["discard+keep_running"]["after_mib"] < rows["discard+keep_running"]["before_mib"]
    assert cells.model("a")["engine"] == "awake"


def test_validate_of_a_model_that_is_in_use(cells):
    stack = cells.start("offload+keep_running", top={"policy": {"request_timeout_secs": 120}})
    first = stack.ask("a", "why", tokens=8).text
    over = threading.Event()

    def use() -> list[str]:
        texts = []
        while not over.is_set():
            texts.append(stack.ask("a", "why", tokens=8).text)
        return texts

    with ThreadPoolExecutor(1) as pool:
        using = pool.submit(use)
        try:
            policies = "retain+keep_running,offload+cuda_suspend,discard+checkpoint,discard+stop"
            done = stack.ctl("validate", "a", "--policies", policies, timeout=VALIDATE_SECS)
        finally:
            over.set()
        assert set(using.result()) == {first}
    assert done.returncode == 0, done


def test_validate_shows_a_table_and_why_a_policy_did_not_pass(cells):
    stack = cells.start("offload+keep_running")
    cells.cuda_fault("checkpoint fail\n")
    cells.criu_fault("restore fail\n")
    policies = "offload+keep_running,offload+cuda_suspend,discard+checkpoint"
    done = stack.ctl("validate", "a", "--policies", policies, timeout=VALIDATE_SECS)
    assert done.returncode == Exit.FAILED
    lines = done.stdout.splitlines()
    assert lines[0].split("  ")[0] == "POLICY"
    assert lines[0].split()[-2:] == ["MATCH", "PASS"]
    assert [line.split()[0] for line in lines[1:4]] == policies.split(",")
    assert [line.split()[-1] for line in lines[1:4]] == ["yes", "NO", "NO"]
    assert "offload+cuda_suspend: it was not_started instead" in done.stdout
    assert "discard+checkpoint: it did not come back, and was started anew" in done.stdout
    assert "1 of 3 policies passed" in done.stderr


def test_validate_of_a_model_that_does_not_start_says_why(cells):
    stack = cells.start("offload+keep_running", env={**ENGINE["env"], "LLMUX_SIM_FAULTS": "die_at_start"})
    done = stack.ctl("validate", "a")
    assert done.returncode == Exit.FAILED
    assert "a cannot be validated" in done.stderr


def test_an_eviction_is_left_to_be_chosen_and_the_status_says_what_and_why(cells):
    stack = cells.start("auto")
    stack.ask("a", "why")
    found = until(lambda: cells.model("a")["auto"], "it is chosen")
    assert found["chosen"] == cells.model("a")["eviction"]
    assert "s to sleep" in found["why"]
    assert "auto: " in stack.ctl("status").stdout
    assert stack.ctl("eviction", "a", "discard+stop").returncode == 0
    assert cells.model("a")["auto"] is None
    done = stack.ctl("eviction", "a", "auto")
    assert "is chosen each time, now " in done.stdout
    assert "auto: " in stack.ctl("eviction").stdout
    assert stack.ask("b", "why").status == 200, "what was chosen works"


def test_a_model_with_a_checkpoint_path_is_restored_for_its_first_request(cells):
    given = cells.images.parent / "given"
    stack = cells.start("offload+keep_running", checkpoint_path=str(given))
    first = stack.ask("a", "why", tokens=8).text
    stack.ctl("checkpoint", "a")
    Path(cells.model("a")["image"]["folder"]).rename(given)
    stack.stop()
    stack.start()
    assert cells.model("a")["engine"] == "checkpointed"
    assert stack.ask("a", "why", tokens=8).text == first
    assert cells.criu_calls() == ["dump", "restore"]
    assert given.exists(), "it is only read"
    assert cells.model("b")["engine"] == "checkpointed", "an image of another model is refused when it is wanted"
    assert stack.ask("b", "why").status == 200
    assert "the model was configured otherwise" in stack.log.read_text()

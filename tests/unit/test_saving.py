"""What an operator is told of a restore, by how the model has come to be awake in the meantime."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llmuxd import saving
from llmuxd.control.api import Progress
from llmuxd.core.engine_state import EngineState as S
from llmuxd.runtime import Runtime
from llmuxd.steering import Steering


def told_of(restored: bool, last_error: str) -> dict[str, Any]:
    """The result of a restore, if the model is awake like this when its turn is over."""
    model = SimpleNamespace(state=S.CHECKPOINTED, restored=False, last_error="")
    switcher = SimpleNamespace(state=SimpleNamespace(models={"qwen": model}))
    runtime = SimpleNamespace(switcher=switcher, tellers=[], watchers=[])

    class Waking:
        async def wake(self, name: str, progress: Progress) -> dict[str, Any]:
            model.state, model.restored, model.last_error = S.AWAKE, restored, last_error
            return {"message": f"{name} is awake"}

    def ignore(step: dict[str, Any]) -> None:
        pass

    return asyncio.run(saving.restore(cast(Steering, Waking()), cast(Runtime, runtime), "qwen", False, ignore))


def test_one_that_was_restored() -> None:
    assert told_of(True, "")["message"].startswith("qwen is awake, restored in ")


@pytest.mark.parametrize(
    ("last_error", "message"),
    [
        ("its image is damaged\nat length", "qwen is awake, started from its weights: its image is damaged"),
        ("", "qwen is awake, started from its weights"),
    ],
    ids=["refused", "has answered since"],
)
def test_one_that_was_not(last_error: str, message: str) -> None:
    """With the first answer of a model its last error is over; a job that waits for another may see it only then."""
    found = told_of(False, last_error)
    assert (found["message"], found["restored"]) == (message, False)

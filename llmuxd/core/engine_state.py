"""The states of an engine: their names, as `status` shows them. The transitions are in `llmuxd.core.state`."""

from __future__ import annotations

from enum import Enum


class EngineState(str, Enum):
    """Where the engine of a model stands. Transitions in progress are states of their own."""

    NOT_STARTED = "not_started"
    STARTING = "starting"
    AWAKE = "awake"
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"
    CHECKPOINTED = "checkpointed"
    """There is no process: it was saved to an image, which it can be restored from."""
    WAKING = "waking"
    STOPPING = "stopping"
    FAILED = "failed"
    """Its last start, wake or run failed; it is not tried again before `retry_at` unless an operator asks for it."""

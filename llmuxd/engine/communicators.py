"""What holds the ranks of an engine together across devices, which no checkpoint can take along.

vLLM 0.32 takes it down and builds it again by `checkpoint_prepare` and `checkpoint_restore`; before, a vLLM with llmux
0.7's patch by `suspend_nccl` and `resume_nccl`. Which one there is goes by the version: to try a method that is not
there leaves the answers of some ranks to be read by the next call.

Not yet run on a GPU, see docs/gpu.md.
"""

from __future__ import annotations

from llmuxd.core.events import FailureKind
from llmuxd.engine.api import Suspect, VllmApi, is_at_least
from llmuxd.engine.errors import EngineError

_SINCE = (0, 32)


async def tear_down(api: VllmApi, version: str | None) -> None:
    """Before a suspension or a dump. Raises EngineError."""
    if is_at_least(version, _SINCE):
        await api.collective_rpc("checkpoint_prepare")
        return
    try:
        await api.collective_rpc("suspend_nccl")
    except EngineError as error:
        if isinstance(error, Suspect) or error.kind is not FailureKind.REFUSED:
            raise
        why = (
            f"vLLM {version or 'of no known version'} cannot let go of the ties between its ranks: take 0.32 or newer, "
            f"or for this model keep_running or stop as its eviction's process ({error.reason})"
        )
        raise EngineError(error.kind, why) from error


async def rebuild(api: VllmApi, version: str | None) -> None:
    """After a resume or a restore. Raises EngineError."""
    await api.collective_rpc("checkpoint_restore" if is_at_least(version, _SINCE) else "resume_nccl")

"""cuda-checkpoint: the processes of an engine leave their devices, memory and all, and come back.

The program is NVIDIA's (github.com/NVIDIA/cuda-checkpoint). What it moves goes to host memory; the process lives on and
blocks in its next call of CUDA. Its states and actions, since driver 570:

    running --lock--> locked --checkpoint--> checkpointed --restore--> locked --unlock--> running

All processes are locked before the first is checkpointed: none of them waits for a peer that has gone. With a driver
before 570 there is `--toggle` alone, which is both steps of either direction in one, and no way to ask.

From the tool's README: its options and words, and that an error may leave a process in no good state. From CRIU's
plugins/cuda/cuda_plugin_cli.c: which options there are is asked of the help; a process without CUDA is one for which
the program fails; after a failure the state is asked for anew, as an action that was cut short may have been done.
From the tool's issues: 30, that a locked process may make any call for its NCCL peers hang, so every call has an end;
44, that a restore that ran out of memory never succeeds again, so it is not tried twice.

A suspension that fails is undone as far as can be; a resume that fails is not. Not yet run on a GPU, see docs/gpu.md.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from enum import Enum
from pathlib import Path

from llmuxd.core.events import FailureKind
from llmuxd.engine.errors import EngineError, says_out_of_memory
from llmuxd.tasks import finish

LOCK_SECS = 10.0
"""How long a process may take to finish what it has on the device."""

ASK_SECS = 10.0
"""How long the program may take to say what a process is, or what itself can do."""

UNDO_SECS = 60.0
"""How long each of the two steps back may take when a suspension has failed."""

_SHOWN_CHARS = 200
_READ_BYTES = 65536
"""More is not kept of what the program says."""


class CudaState(Enum):
    """What the CUDA processes of an engine are, together."""

    NONE = "none"
    """There is none."""
    RUNNING = "running"
    SUSPENDED = "suspended"
    MIXED = "mixed"
    """Some this, some that, or in between, or it cannot be told."""


_TOGETHER = {
    frozenset[str](): CudaState.NONE,
    frozenset({"running"}): CudaState.RUNNING,
    frozenset({"checkpointed"}): CudaState.SUSPENDED,
}


class NotSuspended(EngineError):
    """A suspension has failed. `rolled_back`: all processes are seen to run as before; else stop the engine."""

    def __init__(self, kind: FailureKind, reason: str, *, rolled_back: bool) -> None:
        super().__init__(kind, reason)
        self.rolled_back = rolled_back


class CudaCheckpoint:
    """The program, for one engine.

    A call that is cancelled ends the program and leaves the processes in whatever state they have: stop the engine.
    """

    def __init__(self, program: str = "cuda-checkpoint") -> None:
        self._program = program
        self._has_actions: bool | None = None
        self._toggled: tuple[int, ...] = ()
        """Suspended by a program that could not be asked about it."""

    async def suspend(self, pids: Collection[int], timeout: float) -> tuple[int, ...]:
        """Take those of the processes that use CUDA off their devices, within `timeout` seconds; returns their pids.

        Raises EngineError, also if none of them uses CUDA: then nothing would be freed. NotSuspended if it had begun.
        """
        deadline = time.monotonic() + timeout
        if not await self._knows_actions():
            return await self._toggle_off(pids, deadline)
        states = await self._states(pids)
        _check_found(states)
        odd = {pid: state for pid, state in states.items() if state != "running"}
        if odd:
            raise EngineError(FailureKind.REFUSED, f"CUDA is {_shown(odd)}, and not running")
        lock_millis = int(max(0.001, min(LOCK_SECS, deadline - time.monotonic())) * 1000)
        try:
            await self._all(states, deadline, "--action", "lock", "--timeout", str(lock_millis))
            await self._all(states, deadline, "--action", "checkpoint")
        except EngineError as error:
            rolled_back = await self._roll_back(states)
            raise NotSuspended(error.kind, error.reason, rolled_back=rolled_back) from error
        return tuple(states)

    async def resume(self, pids: Collection[int], timeout: float) -> None:
        """Bring those back that were suspended, within `timeout` seconds.

        Raises EngineError, of kind OUT_OF_MEMORY if the devices have no room: stop the engine.
        """
        deadline = time.monotonic() + timeout
        if not await self._knows_actions():
            toggled, self._toggled = self._toggled, ()
            if not toggled or not set(toggled) <= set(pids):
                raise EngineError(
                    FailureKind.REFUSED, "it is not known which of its processes were suspended, or not all live"
                )
            await self._all(toggled, deadline, "--toggle")
            return
        states = await self._states(pids)
        odd = {pid: state for pid, state in states.items() if state != "checkpointed"}
        if odd or not states:
            raise EngineError(FailureKind.REFUSED, f"CUDA is {_shown(odd) or 'nowhere'}, and not suspended")
        await self._all(states, deadline, "--action", "restore")
        await self._all(states, deadline, "--action", "unlock")

    async def state(self, pids: Collection[int]) -> CudaState:
        """What those of the processes are that use CUDA. Raises EngineError if the program cannot be run."""
        if not await self._knows_actions():
            if self._toggled and set(self._toggled) <= set(pids):
                return CudaState.SUSPENDED
            return CudaState.MIXED if await asyncio.to_thread(_mapping_devices, pids) else CudaState.NONE
        states = await self._states(pids)
        return _TOGETHER.get(frozenset(states.values()), CudaState.MIXED)

    async def _toggle_off(self, pids: Collection[int], deadline: float) -> tuple[int, ...]:
        holders = await asyncio.to_thread(_mapping_devices, pids)
        _check_found(holders)
        try:
            await self._all(holders, deadline, "--toggle")
        except EngineError as error:
            # Toggled once more, one that still runs would be suspended, and none can be asked.
            raise NotSuspended(error.kind, error.reason, rolled_back=False) from error
        self._toggled = holders
        return holders

    async def _roll_back(self, pids: Collection[int]) -> bool:
        """Whether all of these run again, and are seen to."""
        try:
            states = await self._states(pids)
            saved = [pid for pid, state in states.items() if state == "checkpointed"]
            locked = [pid for pid, state in states.items() if state in ("checkpointed", "locked")]
            await self._all(saved, time.monotonic() + UNDO_SECS, "--action", "restore")
            await self._all(locked, time.monotonic() + UNDO_SECS, "--action", "unlock")
            states = await self._states(pids)
        except EngineError:
            return False
        return len(states) == len(pids) and set(states.values()) == {"running"}

    async def _knows_actions(self) -> bool:
        if self._has_actions is None:
            [(code, said)] = await self._ask([("--help",)])
            if "--toggle" not in said:
                raise EngineError(FailureKind.REFUSED, f"cuda-checkpoint --help failed: {_short(code, said)}")
            self._has_actions = "--action" in said and "--get-state" in said
        return self._has_actions

    async def _states(self, pids: Collection[int]) -> dict[int, str]:
        """pid -> state, of those that use CUDA. Raises EngineError if one does not answer in time."""
        answers = await self._ask([("--get-state", "--pid", str(pid)) for pid in pids])
        return {pid: said.strip() for pid, (code, said) in zip(pids, answers, strict=True) if code == 0}

    async def _ask(self, questions: Collection[tuple[str, ...]]) -> list[tuple[int, str]]:
        """The answers, in this order. Raises EngineError if one is not there in time."""
        calls = [asyncio.ensure_future(self._run(*question)) for question in questions]
        try:
            _, late = await asyncio.wait(calls, timeout=ASK_SECS) if calls else (set(), set())
        finally:
            await _end(calls)
        if late:
            why = f"cuda-checkpoint did not answer within {ASK_SECS:.0f} s ({len(late)} calls)"
            raise EngineError(FailureKind.TIMEOUT, why)
        return [call.result() for call in calls]

    async def _all(self, pids: Iterable[int], deadline: float, *arguments: str) -> None:
        """Do the same to all at once. Raises EngineError if one of them fails, when none is under way any more."""
        calls = [asyncio.ensure_future(self._run(*arguments, "--pid", str(pid))) for pid in pids]
        rest = max(0.0, deadline - time.monotonic())
        try:
            done, late = await asyncio.wait(calls, timeout=rest) if calls else (set(), set())
        finally:
            await _end(calls)
        what = " ".join(argument.removeprefix("--") for argument in arguments[:2]).removeprefix("action ")
        for call in done:
            code, said = call.result()
            if code != 0:
                kind = FailureKind.OUT_OF_MEMORY if says_out_of_memory(said) else FailureKind.REFUSED
                raise EngineError(kind, f"cuda-checkpoint: {what} failed: {_short(code, said)}")
        if late:
            raise EngineError(FailureKind.TIMEOUT, f"cuda-checkpoint: {what} was not done in time, within {rest:.0f} s")

    async def _run(self, *arguments: str) -> tuple[int, str]:
        """Exit code and the beginning of what it said. If this is cancelled, the program is ended."""
        try:
            process = await asyncio.create_subprocess_exec(
                self._program,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            why = (
                f"{self._program!r} cannot be executed: {error.strerror or error}; see checkpoint.cuda_checkpoint_path"
            )
            raise EngineError(FailureKind.REFUSED, why) from error
        assert process.stdout is not None
        said = b""
        try:
            while part := await process.stdout.read(_READ_BYTES):
                said = (said + part)[:_READ_BYTES]
            code = await process.wait()
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await finish(_over(process), "end of cuda-checkpoint")
        return code, said.decode(errors="replace")


async def _over(process: asyncio.subprocess.Process) -> None:
    """Until it is gone and its pipe is closed."""
    await process.communicate()


async def _end(calls: Collection[asyncio.Future[tuple[int, str]]]) -> None:
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


def _short(code: int, said: str) -> str:
    return " ".join(said.split())[:_SHOWN_CHARS] or f"exit code {code}"


def _check_found(pids: Collection[int]) -> None:
    if not pids:
        raise EngineError(FailureKind.REFUSED, "none of its processes uses CUDA: nothing can be suspended")


def _shown(states: dict[int, str]) -> str:
    return ", ".join(f"{state} (process {pid})" for pid, state in states.items())


def _mapping_devices(pids: Collection[int]) -> tuple[int, ...]:
    """Those that have a device of NVIDIA's mapped, or its unified memory open. Reads /proc."""
    return tuple(pid for pid in pids if _maps_device(pid))


def _maps_device(pid: int, proc: Path = Path("/proc")) -> bool:
    try:
        if "/dev/nvidia" in (proc / str(pid) / "maps").read_text(errors="replace"):
            return True
        # Others that are open tell nothing: torch counts the devices by NVML, which keeps /dev/nvidiactl, without CUDA.
        folder = proc / str(pid) / "fd"
        return any(os.readlink(link) == "/dev/nvidia-uvm" for link in folder.iterdir())
    except OSError:
        return False

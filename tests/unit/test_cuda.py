"""cuda-checkpoint as the daemon drives it, against a stand-in that keeps the real one's states for real processes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmuxd.core.events import FailureKind
from llmuxd.engine import cuda
from llmuxd.engine.cuda import CudaCheckpoint, CudaState, NotSuspended
from llmuxd.engine.device_memory import used_mib
from llmuxd.engine.errors import EngineError
from llmuxd.sim.ledger import GIB, Ledger

STANDINS = Path(__file__).resolve().parents[1] / "standins"
SECS = 20.0


class Box:
    """Two processes that use CUDA, one that does not, and a device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger.create(folder / "ledger", 8 * GIB)
        self._processes = [
            subprocess.Popen([title, "-c", "import time; time.sleep(300)"], executable=sys.executable)
            for title in ("VLLM::EngineCore", "VLLM::Worker_TP1", "python")
        ]
        self.pids = [process.pid for process in self._processes]
        self.users = self.pids[:2]
        for pid in self.users:
            self.ledger.hold(pid, 2 * GIB)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def fault(self, text: str) -> None:
        (self.folder / "faults").write_text(text)

    def calls(self) -> list[str]:
        """The actions in their order, without whom they were for."""
        return [line.split()[0] for line in (self.folder / "calls").read_text().splitlines()]

    def held(self) -> list[int]:
        return [self.ledger.held()[pid] // GIB for pid in self.users]


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    monkeypatch.setenv("LLMUX_CUDA_STATES", str(tmp_path))
    monkeypatch.setenv("LLMUX_CUDA_LEDGER", str(tmp_path / "ledger"))
    made = Box(tmp_path)
    # Between fork and exec a process has its parent's title.
    deadline = time.monotonic() + SECS
    while any(b"VLLM::" not in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in made.users):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield made
    made.close()


@pytest.fixture
def tool() -> CudaCheckpoint:
    return CudaCheckpoint(str(STANDINS / "cuda-checkpoint"))


def running_for(box: Box) -> list[str]:
    """The program's processes that work on those of the box."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "cuda-checkpoint" in command and any(f"--pid\0{pid}\0" in command for pid in box.pids):
            found.append(command)
    return found


def check_none_left(box: Box) -> None:
    """What the program has started itself was killed with it, and may take a moment longer."""
    deadline = time.monotonic() + SECS
    while left := running_for(box):
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_suspends_and_resumes_those_that_use_cuda(box: Box, tool: CudaCheckpoint) -> None:
    async def scenario() -> None:
        assert await tool.state(box.pids) is CudaState.RUNNING
        assert sorted(await tool.suspend(box.pids, SECS)) == sorted(box.users)
        assert await tool.state(box.pids) is CudaState.SUSPENDED
        assert await used_mib(box.pids, str(STANDINS / "nvidia-smi")) == 0
        await tool.resume(box.pids, SECS)
        assert await tool.state(box.pids) is CudaState.RUNNING
        assert await used_mib(box.pids, str(STANDINS / "nvidia-smi")) == 4096

    asyncio.run(scenario())
    assert box.calls() == ["lock"] * 2 + ["checkpoint"] * 2 + ["restore"] * 2 + ["unlock"] * 2


def test_a_process_without_cuda_is_refused(box: Box, tool: CudaCheckpoint) -> None:
    with pytest.raises(EngineError, match="none of its processes uses CUDA"):
        asyncio.run(tool.suspend(box.pids[2:], SECS))
    assert asyncio.run(tool.state(box.pids[2:])) is CudaState.NONE


@pytest.mark.parametrize("action", ["lock", "checkpoint"])
def test_a_suspension_that_fails_is_rolled_back(box: Box, tool: CudaCheckpoint, action: str) -> None:
    box.fault(f"{action} fail {box.users[1]}")

    async def scenario() -> None:
        with pytest.raises(NotSuspended, match=f"{action} failed") as caught:
            await tool.suspend(box.pids, SECS)
        assert caught.value.rolled_back
        assert await tool.state(box.pids) is CudaState.RUNNING

    asyncio.run(scenario())
    assert box.held() == [2, 2]


def test_what_was_done_before_its_program_hung_is_rolled_back(box: Box, tool: CudaCheckpoint) -> None:
    box.fault(f"checkpoint done-hang {box.users[1]}")

    async def scenario() -> None:
        with pytest.raises(NotSuspended) as caught:
            await tool.suspend(box.pids, 3.0)
        assert caught.value.kind is FailureKind.TIMEOUT
        assert caught.value.rolled_back

    asyncio.run(scenario())
    assert box.held() == [2, 2]
    check_none_left(box)


def test_a_rollback_that_fails_is_told(box: Box, tool: CudaCheckpoint) -> None:
    box.fault(f"checkpoint fail {box.users[1]}\nunlock fail")
    with pytest.raises(NotSuspended) as caught:
        asyncio.run(tool.suspend(box.pids, SECS))
    assert not caught.value.rolled_back


def test_a_process_that_dies_meanwhile_is_no_rollback(box: Box, tool: CudaCheckpoint) -> None:
    box.fault(f"checkpoint kill {box.users[1]}")
    with pytest.raises(NotSuspended) as caught:
        asyncio.run(tool.suspend(box.pids, SECS))
    assert not caught.value.rolled_back


def test_no_room_for_a_resume(box: Box, tool: CudaCheckpoint) -> None:
    async def scenario() -> None:
        await tool.suspend(box.pids, SECS)
        box.ledger.hold(box.pids[2], 7 * GIB)
        with pytest.raises(EngineError, match="out of memory") as caught:
            await tool.resume(box.pids, SECS)
        assert caught.value.kind is FailureKind.OUT_OF_MEMORY

    asyncio.run(scenario())


def test_resuming_what_runs_is_refused(box: Box, tool: CudaCheckpoint) -> None:
    with pytest.raises(EngineError, match="and not suspended"):
        asyncio.run(tool.resume(box.pids, SECS))


def test_no_program_is_left_after_a_cancellation(box: Box, tool: CudaCheckpoint) -> None:
    box.fault("lock hang")

    async def scenario() -> None:
        call = asyncio.ensure_future(tool.suspend(box.pids, SECS))
        deadline = time.monotonic() + SECS
        while not (box.folder / "calls").exists() or len(box.calls()) < 2:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(scenario())
    check_none_left(box)


def test_a_program_that_does_not_answer_is_given_up(
    box: Box, tool: CudaCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "ASK_SECS", 1.0)
    box.fault("get-state hang")
    with pytest.raises(EngineError, match="did not answer"):
        asyncio.run(tool.state(box.pids))
    check_none_left(box)


def test_a_program_that_knows_toggle_only(box: Box, tool: CudaCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMUX_CUDA_TOGGLE_ONLY", "1")
    monkeypatch.setattr(cuda, "_maps_device", lambda pid: pid in box.users)

    async def scenario() -> None:
        with pytest.raises(EngineError, match="not known"):
            await tool.resume(box.pids, SECS)
        assert sorted(await tool.suspend(box.pids, SECS)) == sorted(box.users)
        assert box.held() == [0, 0]
        assert await tool.state(box.pids) is CudaState.SUSPENDED
        await tool.resume(box.pids, SECS)
        assert box.held() == [2, 2]

    asyncio.run(scenario())


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(EngineError, match="cannot be executed"):
        asyncio.run(CudaCheckpoint("/nowhere/cuda-checkpoint").state([1]))


@pytest.mark.parametrize(
    ("mapped", "opened", "uses"),
    [
        ("7f00-7f01 rw-s 0 00:05 856 /dev/nvidia0", "/dev/null", True),
        ("", "/dev/nvidia-uvm", True),
        ("", "/dev/nvidiactl", False),
        ("", "/dev/nvidia-uvm-tools", False),
        ("", "/dev/null", False),
    ],
)
def test_who_uses_cuda_by_its_devices(tmp_path: Path, mapped: str, opened: str, uses: bool) -> None:
    (tmp_path / "1" / "fd").mkdir(parents=True)
    (tmp_path / "1" / "maps").write_text(mapped)
    (tmp_path / "1" / "fd" / "3").symlink_to(opened)
    assert cuda._maps_device(1, tmp_path) is uses
    assert not cuda._maps_device(2, tmp_path)

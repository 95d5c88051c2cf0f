"""Daemons whose engines can be suspended and saved: simulated engines, and stand-ins for cuda-checkpoint, CRIU and
nvidia-smi."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmuxctl.client import Client
from llmuxd.sim.ledger import GIB
from tests.integration.stack import Daemon

STANDINS = Path(__file__).resolve().parents[1] / "standins"

ENGINE: dict[str, Any] = {
    "env": {"LLMUX_SIM_WEIGHTS_GIB": "4", "LLMUX_SIM_KV_GIB": "1", "LLMUX_SIM_RESIDUAL_GIB": "0.5"},
    "extra_args": ["--gpu-memory-utilization", "0.3"],
}
AWAKE, RESIDUAL = 11 * GIB // 2, GIB // 2
"""What such an engine holds on the device while it is awake, and while its weights are not there."""


class Cells:
    """One daemon with two models, `a` and `b`, and what its tools are told and have done."""

    def __init__(self, home: Path, make: Any, patch: pytest.MonkeyPatch) -> None:
        self._home = home
        self._make = make
        self.images = home / "images"
        self.checkpoint: dict[str, Any] = {}
        """What the config says of checkpoints besides."""
        self.stack: Daemon
        cuda = home / "cuda"
        cuda.mkdir()
        for name, value in (
            ("PATH", f"{STANDINS}{os.pathsep}{os.environ['PATH']}"),
            ("LLMUX_CUDA_STATES", str(cuda)),
            ("LLMUX_CUDA_LEDGER", str(home / "device")),
            ("LLMUX_CRIU_CALLS", str(home / "criu-calls")),
            ("LLMUX_CRIU_FAULTS", str(home / "criu-faults")),
        ):
            patch.setenv(name, value)

    def start(self, eviction: str, top: Any = None, **more: Any) -> Daemon:
        """Both models are evicted by `eviction`; `more` is said of each."""
        checkpoint = {
            "criu_path": str(STANDINS / "criu"),
            "cuda_checkpoint_path": str(STANDINS / "cuda-checkpoint"),
            "images_dir": str(self.images),
            **self.checkpoint,
        }
        model = {**ENGINE, "eviction": eviction, **more}
        self.stack = self._make(a=model, b=model, top={"checkpoint": checkpoint, **(top or {})}).start()
        return self.stack

    # What goes wrong

    def cuda_fault(self, line: str) -> None:
        (self._home / "cuda" / "faults").write_text(line)

    def criu_fault(self, line: str) -> None:
        (self._home / "criu-faults").write_text(line)

    # What was done

    def cuda_calls(self, pid: int) -> list[str]:
        """The actions on one process."""
        return [action for action, whom in _calls(self._home / "cuda" / "calls") if whom == pid]

    def criu_calls(self) -> list[str]:
        """The actions, in their order."""
        return [action for action, _ in _calls(self._home / "criu-calls")]

    # What is

    def model(self, name: str) -> dict[str, Any]:
        """What the daemon says of a model."""
        status: dict[str, Any] = Client(str(self.stack.socket)).get("status")
        found: dict[str, Any] = status["models"][name]
        return found

    def core(self, model: str) -> int:
        """The process of its engine that uses the device."""
        (core,) = psutil.Process(self.model(model)["pid"]).children()
        return core.pid

    def held(self, model: str) -> tuple[int, int]:
        """What a model's engine holds on the device, and what all others do."""
        held = self.stack.ledger.held()
        own = held.pop(self.core(model), 0)
        return own, sum(held.values())


def _calls(path: Path) -> list[tuple[str, int]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [(action, int(pid)) for action, pid in map(str.split, lines)]

"""Eviction policies: what becomes of an engine's weights and of its process when its model is put to sleep.

Only the two axes, their names and their spelling live here; what each cell costs and how it is carried out
is the engine layer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WeightStrategy(str, Enum):
    """What vLLM does with the weights."""

    RETAIN = "retain"
    """Weights and KV cache stay on the device; scheduling is paused (sleep level 0)."""
    OFFLOAD = "offload"
    """Weights go to pinned host memory, the KV cache is dropped (sleep level 1)."""
    DISCARD = "discard"
    """Weights and KV cache are dropped; the weights are read again on waking (sleep level 2)."""


class ProcessStrategy(str, Enum):
    """What becomes of the operating-system process once the weights are dealt with."""

    KEEP_RUNNING = "keep_running"
    CUDA_SUSPEND = "cuda_suspend"
    CHECKPOINT = "checkpoint"
    STOP = "stop"


@dataclass(frozen=True)
class EvictionPolicy:
    """One cell of the eviction table, written ``weights+process``: ``offload+keep_running``."""

    weights: WeightStrategy = WeightStrategy.RETAIN
    process: ProcessStrategy = ProcessStrategy.KEEP_RUNNING

    @classmethod
    def parse(cls, text: str) -> EvictionPolicy:
        """Read ``weights+process``; raises ValueError that names what is allowed."""
        weights, plus, process = text.partition("+")
        if plus:
            try:
                return cls(WeightStrategy(weights.strip()), ProcessStrategy(process.strip()))
            except ValueError:
                pass
        raise ValueError(
            f"{text!r} is not an eviction policy; write WEIGHTS+PROCESS with WEIGHTS one of "
            f"{', '.join(w.value for w in WeightStrategy)} and PROCESS one of "
            f"{', '.join(p.value for p in ProcessStrategy)}"
        )

    def __str__(self) -> str:
        return f"{self.weights.value}+{self.process.value}"


class Auto(Enum):
    """Instead of a policy: the switcher chooses the cheapest cell each time. See `choice`."""

    AUTO = "auto"

    def __str__(self) -> str:
        return self.value


AUTO = Auto.AUTO

STOP = EvictionPolicy(WeightStrategy.RETAIN, ProcessStrategy.STOP)
"""The eviction that always works, and frees everything."""

FREES_NOTHING = EvictionPolicy(WeightStrategy.RETAIN, ProcessStrategy.KEEP_RUNNING)
"""A sleep by it leaves everything on the device."""

CELLS = tuple(
    EvictionPolicy(weights, process)
    for process in ProcessStrategy
    for weights in WeightStrategy
    if process is not ProcessStrategy.STOP or weights is STOP.weights
)
"""Those that differ: with the process its weights are gone, whatever their strategy."""

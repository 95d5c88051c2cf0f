"""What has to be known of an engine to find it again after the daemon that started it: its record.

A record is plain data. How it is kept is in `llmuxd.book`; how an engine is found by it is in `process`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmuxd.engine.spec import EngineSpec


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One engine that was started. It is only meaningful within one boot of the machine."""

    model: str
    incarnation: int
    pid: int
    start_ticks: int
    """When the process started, in clock ticks since boot."""
    create_time: float
    """The same as psutil gives it, in seconds since the epoch."""
    argv: tuple[str, ...]
    token: str
    """Its mark in the environment of all its processes."""
    log_start: int
    fingerprint: str
    """Of what it was started from; see `fingerprint`."""
    socket_dir: str
    port: int | None
    log_path: str
    cgroup: str | None = None
    members: tuple[tuple[int, int], ...] = ()
    """(pid, start ticks) of its processes."""
    shm: tuple[tuple[str, int], ...] = ()
    """(path, inode) of its files in /dev/shm."""
    can_park: bool = False
    can_sleep: bool = False
    version: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EngineRecord:
        """Raises TypeError, ValueError or KeyError if it is none."""
        pairs = {name: tuple(tuple(pair) for pair in data[name]) for name in ("members", "shm")}
        return cls(**{**data, **pairs, "argv": tuple(data["argv"])})

    def spec_from(self, spec: EngineSpec) -> EngineSpec:
        """The spec of today's config, with the address and the log that this engine has."""
        return replace(spec, socket_dir=Path(self.socket_dir), log_path=Path(self.log_path), port=self.port)

    def bare_spec(self) -> EngineSpec:
        """As much of a spec as it takes to stop the engine of a model that no config has."""
        return EngineSpec(self.model, "", (), Path(self.socket_dir), Path(self.log_path), port=self.port)


def fingerprint(spec: EngineSpec) -> str:
    """A digest of all that an engine is started from: two specs with the same one need no restart between them.

    It holds the environment's values too, secrets among them, which are not to be kept.
    """
    content = [
        spec.model_path,
        spec.name,
        spec.aliases,
        spec.vllm_command,
        spec.extra_args,
        sorted(spec.env.items()),
        str(spec.endpoint),
        str(spec.log_path),
        spec.savable,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

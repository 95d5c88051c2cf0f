"""The measurements, in rounds: in each of them every target has its turn at everything, in another order.

What disturbs a machine that others use too, disturbs neighbours alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.relay import usage
from benchmarks.relay.clients import streaming, timed
from benchmarks.relay.contestants import ALONE, LLMUXD, PROXIES, Broken, Field, Target, ask, poll
from benchmarks.relay.wrk import requests_per_second

CONNECTIONS = (32, 256)
STREAMS = {128: 50.0, 512: 25.0}
"""How many streams -> events per second on each of them: the more vLLM serves at once, the slower is each."""
LATENCY_RATE = 500
LATENCY_CONNECTIONS = 8
LATENCY_TURNS = 4
"""Of each target in a round: what is rare, and makes the p99, is to have its chance with all of them."""
STALLED = 1000

IDLE, BUSY, STALLING = "idle", "512 streams", "1,000 stalled streams"
_BUSY_STREAMS = 512

_T = TypeVar("_T")

LEAVE_SECS = 15.0
_STALL_WATCH_SECS = 15.0
_STALL_STILL_SECS = 2.0
_STALL_LOOK_SECS = 0.1
_SETTLE_SECS = 0.3


@dataclass(frozen=True)
class Cores:
    """Processor seconds per second."""

    proxy: float
    engine: float
    client: float
    others: float
    """Of whatever else runs on the machine, the host's other guests included."""


@dataclass
class Figures:
    """What was measured of one target, a figure per round."""

    rate: dict[int, list[float]] = field(default_factory=dict)
    """Connections -> requests per second."""
    chunk_us: dict[int, list[float]] = field(default_factory=dict)
    """Streams -> microseconds of the proxy's processor time per event that has arrived."""
    pace: dict[int, list[float]] = field(default_factory=dict)
    """Streams -> events that have arrived, of those that were to."""
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    memory_mib: dict[str, list[float]] = field(default_factory=dict)
    cores: dict[tuple[str, int], list[Cores]] = field(default_factory=dict)
    """(requests or streams, how many) -> what it took."""


Results = dict[str, Figures]


def measure(running: Field, home: Path, rounds: int, secs: int, tell: Callable[[str], None]) -> Results:
    """Measure all; `tell` hears what comes next. Raises Broken."""
    results = {target.name: Figures() for target in running.targets}
    for name in PROXIES:
        _note_memory(running.target(name), results[name], IDLE)
    for target in running.targets:
        requests_per_second(home, target.port, CONNECTIONS[0], 1)
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        first = number % len(running.targets)
        order = (*running.targets[first:], *running.targets[:first])
        _round(running, order, results, home, secs)
    tell("stalled clients")
    _run(_stalled(running, results[LLMUXD]))
    return results


def _round(running: Field, order: Sequence[Target], results: Results, home: Path, secs: int) -> None:
    for connections in CONNECTIONS:
        for target in order:
            _requests(running, target, results[target.name], home, connections, secs)
    times: dict[str, list[float]] = {target.name: [] for target in order}
    for _ in range(LATENCY_TURNS):
        for target in order:
            times[target.name] += _run(timed(target.port, LATENCY_RATE, LATENCY_CONNECTIONS, secs / LATENCY_TURNS))
    for name, of_target in times.items():
        of_target.sort()
        results[name].p50_ms.append(1000 * quantile(of_target, 0.5))
        results[name].p99_ms.append(1000 * quantile(of_target, 0.99))
    for count, pace in STREAMS.items():
        for target in order:
            _run(_streams(running, target, results[target.name], count, pace, secs))
            _until_streams_are_gone(running)


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    import uvloop

    result: _T = uvloop.run(work)
    return result


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of figures in ascending order."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _requests(running: Field, target: Target, figures: Figures, home: Path, connections: int, secs: int) -> None:
    meter = _Meter(running, target)
    figures.rate.setdefault(connections, []).append(requests_per_second(home, target.port, connections, secs))
    figures.cores.setdefault(("requests", connections), []).append(meter.cores())


async def _streams(running: Field, target: Target, figures: Figures, count: int, pace: float, secs: int) -> None:
    async with streaming(target.port, count, pace) as streams:
        await asyncio.sleep(_SETTLE_SECS)
        meter, before = _Meter(running, target), streams.events
        await asyncio.sleep(secs)
        cores, events, took = meter.cores(), streams.events - before, meter.secs
        figures.cores.setdefault(("streams", count), []).append(cores)
        figures.pace.setdefault(count, []).append(events / (count * pace * took))
        if target.session is not None:
            figures.chunk_us.setdefault(count, []).append(1e6 * cores.proxy * took / events)
            if count == _BUSY_STREAMS:
                _note_memory(target, figures, BUSY)


async def _stalled(running: Field, figures: Figures) -> None:
    """The most that llmuxd holds while its clients take nothing, until it has not grown for a while."""
    target = running.target(LLMUXD)
    assert target.session is not None
    async with streaming(target.port, STALLED, 0, stall=True):
        most = grown_at = 0.0
        begun = time.monotonic()
        while time.monotonic() < begun + _STALL_WATCH_SECS:
            now = usage.resident_mib(target.session)
            if now > most:
                most, grown_at = now, time.monotonic()
            if time.monotonic() > grown_at + _STALL_STILL_SECS:
                break
            await asyncio.sleep(_STALL_LOOK_SECS)
        there = await asyncio.to_thread(_streams_at_engine, running)
        if there < STALLED:
            raise Broken(f"of {STALLED} stalled streams the engine has {there}")
        figures.memory_mib.setdefault(STALLING, []).append(most)


def _note_memory(target: Target, figures: Figures, when: str) -> None:
    assert target.session is not None
    figures.memory_mib.setdefault(when, []).append(usage.resident_mib(target.session))


def _until_streams_are_gone(running: Field) -> None:
    """A proxy leaves the engine when its client has left."""
    if not poll(lambda: _streams_at_engine(running) == 0, LEAVE_SECS):
        raise Broken(f"{_streams_at_engine(running)} streams run on without a client")


def _streams_at_engine(running: Field) -> int:
    _, body = ask(running.target(ALONE).port, "GET", "/metrics")
    return int(body.split()[-1])


class _Meter:
    """What is used from now on."""

    def __init__(self, running: Field, target: Target) -> None:
        self._proxy, self._engine = target.session, running.engine
        self._begun = time.monotonic()
        self._before = self._used()
        self.secs = 0.0
        """How long it was until `cores`."""

    def _used(self) -> tuple[float, float, float, float]:
        proxy = 0.0 if self._proxy is None else usage.cpu_secs(self._proxy)
        return proxy, usage.cpu_secs(self._engine), usage.own_cpu_secs(), usage.machine_cpu_secs()

    def cores(self) -> Cores:
        """Since the beginning."""
        self.secs = time.monotonic() - self._begun
        used = zip(self._used(), self._before, strict=True)
        proxy, engine, client, all_of_it = ((now - before) / self.secs for now, before in used)
        return Cores(proxy, engine, client, max(0.0, all_of_it - proxy - engine - client))

"""What processes use: processor time and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from llmuxd.engine import proctable

MIB = 2**20
_CPUCLOCK_SCHED = 2


def processes(session: int) -> list[psutil.Process]:
    """All of a session: of llmuxd without its engine, which has one of its own; of nginx with its worker."""
    return [psutil.Process(pid) for pid, stat in proctable.snapshot().items() if stat.session == session]


def cpu_secs(session: int) -> float:
    """User and system time of a session's processes so far.

    It is what /proc/PID/stat has in steps of 10 ms, and clock_getcpuclockid(3) as it is.
    """
    return sum(time.clock_gettime((~process.pid << 3) | _CPUCLOCK_SCHED) for process in processes(session))


def resident_mib(session: int) -> float:
    """The resident memory of a session; pages that its processes share count for each."""
    return sum(process.memory_info().rss for process in processes(session)) / MIB


def own_cpu_secs() -> float:
    """Of this process and of those that it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def machine_cpu_secs() -> float:
    """Of all processes, and what the host took for others. The kernel's work for the network is no process's."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.steal)


def has_loaded(session: int, library: str) -> bool:
    """Whether one of a session's processes has this library in memory."""
    return any(library in Path(f"/proc/{process.pid}/maps").read_text() for process in processes(session))


def children(pid: int) -> Iterator[int]:
    """The processes that `pid` has started."""
    return (child for child, stat in proctable.snapshot().items() if stat.parent == pid)

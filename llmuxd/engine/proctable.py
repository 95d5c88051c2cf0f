"""Who is running, and which of them descend from an engine. Reads /proc, changes nothing.

A process is known by its pid and the time of its start, so that a pid that was given out again is never taken
for the process that had it. psutil's tree is not enough here: it loses the children of a parent that died. One
read of /proc/PID/stat gives parent, session, group and start of the same process at the same instant.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

PROC = "/proc"
_GONE = "ZX"


@dataclass(frozen=True, slots=True)
class Proc:
    """The identity of a process. `start_ticks` are clock ticks since boot, which no change of the clock moves."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class Stat:
    """One process at one instant."""

    proc: Proc
    parent: int
    group: int
    session: int
    state: str
    threads: int

    @property
    def alive(self) -> bool:
        """Whether it may hold anything yet. A zombie is an entry in its parent's books and does not.

        But a process shows as one as soon as its first thread has ended, while others are still on their way out.
        """
        return self.state not in _GONE or self.threads > 1


def read_stat(pid: int) -> Stat | None:
    """The process that has this pid now, a zombie included."""
    try:
        with open(f"{PROC}/{pid}/stat", "rb") as file:
            data = file.read()
    except OSError:
        return None
    # The name, in parentheses, may hold spaces and parentheses of its own.
    fields = data[data.rindex(b")") + 2 :].split()
    return Stat(
        proc=Proc(pid, int(fields[19])),
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        state=fields[0].decode(),
        threads=int(fields[17]),
    )


def is_alive(proc: Proc) -> bool:
    """Whether this very process still runs."""
    stat = read_stat(proc.pid)
    return stat is not None and stat.proc == proc and stat.alive


def snapshot() -> dict[int, Stat]:
    """Every process of the machine, by pid."""
    table = {}
    for name in os.listdir(PROC):
        if name.isdigit() and (stat := read_stat(int(name))) is not None:
            table[stat.proc.pid] = stat
    return table


def title(pid: int) -> str:
    """The command line as the process shows it; processes of vLLM rewrite it to their role."""
    return _read(f"{PROC}/{pid}/cmdline").replace(b"\0", b" ").decode("utf-8", "replace").strip()


def has_mark(pid: int, mark: bytes) -> bool:
    """Whether the process was started with `mark` in its environment, as far as it can be read."""
    return mark in _read(f"{PROC}/{pid}/environ")


def is_in_a_container(pid: int) -> bool:
    """Whether the process has numbers of its own for processes: what is written in its environment is about another
    machine, so to speak."""
    try:
        return os.readlink(f"{PROC}/{pid}/ns/pid") != os.readlink(f"{PROC}/self/ns/pid")
    except OSError:
        return False


def control_group(pid: int) -> str:
    """As the kernel names it; empty if the process is not there."""
    return _read(f"{PROC}/{pid}/cgroup").decode("utf-8", "replace").strip()


def arguments(pid: int) -> tuple[str, ...]:
    """The command line, argument by argument; empty if it cannot be read."""
    return tuple(part.decode("utf-8", "replace") for part in _read(f"{PROC}/{pid}/cmdline").split(b"\0")[:-1])


def boot_id() -> str:
    """Which boot of the machine this is; empty if the kernel does not tell."""
    return _read(f"{PROC}/sys/kernel/random/boot_id").decode().strip()


def members(
    leader: Proc, known: Collection[Proc], mark: bytes = b"", also: Collection[int] = (), leads: bool = True
) -> dict[Proc, Stat]:
    """The processes of an engine, zombies included.

    They are: the leader, those in the leader's session or group, those known from before, those with `mark` in
    their environment (not looked for if empty), those whose pid is in `also`, and all descendants of any of these.
    Until the leader is reaped, the kernel gives its pid to no other process, session or group; where it may have
    been, `leads` is False and its number says nothing.
    """
    table = snapshot()
    ours: dict[int, Stat] = {}
    for pid, stat in table.items():
        in_session = leads and leader.pid in (pid, stat.session, stat.group)
        is_known = in_session or stat.proc in known or pid in also
        if is_known or (mark and has_mark(pid, mark)):
            ours[pid] = stat
    children: dict[int, list[Stat]] = {}
    for stat in table.values():
        children.setdefault(stat.parent, []).append(stat)
    unvisited = list(ours.values())
    while unvisited:
        parent = unvisited.pop()
        for child in children.get(parent.proc.pid, ()):
            # A child older than its parent is somebody else's: the pid of its real parent was given out again.
            if child.proc.pid not in ours and child.proc.start_ticks >= parent.proc.start_ticks:
                ours[child.proc.pid] = child
                unvisited.append(child)
    return {stat.proc: stat for stat in ours.values()}


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""

"""What a restore needs of the machine: process numbers that are free, and nothing left of one that broke off.

The restore itself is in `images`, and what CRIU does in it in `criu`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from llmuxd.engine import shm
from llmuxd.engine.manifest import Subject
from llmuxd.engine.process import kill_marked
from llmuxd.engine.proctable import control_group, read_stat
from llmuxd.engine.spec import TOKEN_ENV

PIDS_FREE_SECS = 5.0
"""How long what has just ended may take to be reaped."""

_GHOST = ".ghost"
"""How CRIU names a file for a moment that had no name any more."""
_POLL_SECS = 0.05

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Begun:
    """A CRIU that has begun to restore."""

    has_own_group: bool
    """It is in a control group in which nobody else begins processes."""
    group: str
    start_ticks: int

    @classmethod
    def of(cls, criu: int, has_own_group: bool) -> Begun:
        """The CRIU with this pid, which has just begun."""
        stat = read_stat(criu)
        return cls(has_own_group, control_group(criu), 0 if stat is None else stat.proc.start_ticks)

    def may_have_made(self, pid: int) -> bool:
        """Whether the process with this number is of CRIU's making, or gone: not somebody's who was faster."""
        stat = read_stat(pid)
        if stat is None:
            return True
        if control_group(pid) != self.group:
            return False
        return self.has_own_group or (stat.session == pid and stat.proc.start_ticks >= self.start_ticks)


def threads_in(criu: Path) -> set[int]:
    """The numbers of all threads in CRIU's images, which they are to have again: CRIU names a file for each."""
    names = (path.stem.removeprefix("core-") for path in criu.glob("core-*.img"))
    return {int(name) for name in names if name.isdigit()}


async def taken(pids: Collection[int]) -> int | None:
    """One of them that is in use; None if all are free. What has just ended may take a moment to be gone."""
    deadline = time.monotonic() + PIDS_FREE_SECS
    while True:
        found = {pid: read_stat(pid) for pid in pids}
        there = {pid: known for pid, known in found.items() if known is not None}
        if not there:
            return None
        alive = [pid for pid, known in there.items() if known.alive]
        if alive or time.monotonic() > deadline:
            return (alive or list(there))[0]
        await asyncio.sleep(_POLL_SECS)


def end_half_restored(subject: Subject, begun: Begun, shm_before: Collection[shm.FileId]) -> None:
    """A CRIU that was killed leaves the processes that it has begun, waiting for it, and files for those that had none.

    The mark does not find all of them: it is unreadable while CRIU exchanges the memory of the process, and vLLM writes
    over that of its workers. But the numbers of all of them were free before, and they are in the session of the first.
    """
    leader = subject.pid if begun.may_have_made(subject.pid) else None
    killed = kill_marked(f"{TOKEN_ENV}={subject.token}\0".encode(), (), (), leader)
    if killed:
        log.info("%s: ended a half-restored engine of %d processes", subject.model, len(killed))
    shm.remove_leftovers(found for found in shm.existing() if found not in shm_before and found[0].endswith(_GHOST))

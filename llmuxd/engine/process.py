"""One engine as processes: spawn it or find it again, know all of it, kill all of it.

When to do so, and what the engine answers, is not here. A leader that was spawned here is not reaped before
everything is gone: as long as it is in the books, its pid, session and group can be nobody else's. One that an earlier
daemon spawned is reaped by somebody else as soon as it ends; from then on its number says nothing, and its processes
are known by what was known of them before, by their mark, and by their control group.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmuxd.core.events import FailureKind
from llmuxd.engine import proctable, shm
from llmuxd.engine.cgroup import Cgroup
from llmuxd.engine.errors import EngineError
from llmuxd.engine.proctable import Proc
from llmuxd.engine.record import EngineRecord
from llmuxd.engine.spec import TOKEN_ENV

KILL_SECS = 20.0
"""How long a killed process may take to be gone; one that waits for a device cannot be ended sooner."""

_POLL_SECS = 0.01
_VITAL = re.compile(r"VLLM::|EngineCore")
_UMASK = 0o027
_NOBODY = Proc(0, 0)


@dataclass(frozen=True, slots=True)
class Member:
    """What is known of one process of the engine. Without a vital one the engine cannot go on."""

    title: str
    vital: bool


class EngineProcess:
    """A process and all that descends from it. Safe to use from several threads.

    `spawn` makes one; `found_again` is one that an earlier daemon spawned.
    """

    def __init__(
        self,
        leader: Proc,
        create_time: float,
        token: str,
        log_start: int,
        cgroup: Cgroup | None,
        child: subprocess.Popen[bytes] | None,
    ) -> None:
        self.leader = leader
        self.create_time = create_time
        """Seconds of the wall clock since the epoch, as psutil gives it."""
        self.token = token
        self.log_start = log_start
        """Where in the log file this engine's output begins."""
        self.cgroup = cgroup
        self._child = child
        self._foreign = False
        """The leader's place is taken by somebody else's process."""
        self._over = False
        """All of it is gone, and the leader is reaped."""
        self._mark = f"{TOKEN_ENV}={token}\0".encode()
        self._members: dict[Proc, Member] = {}
        self._shm: set[shm.FileId] = set()
        self._shm_before: frozenset[shm.FileId] = frozenset()
        self._lock = threading.RLock()

    @classmethod
    def found_again(cls, record: EngineRecord) -> EngineProcess:
        """The engine of a record of this boot, or what is left of it; nothing may be.

        A process that has the leader's number and start, but neither its command line nor its mark, is none of it.
        """
        leader = Proc(record.pid, record.start_ticks)
        group = Cgroup(Path(record.cgroup)) if record.cgroup else None
        process = cls(leader, record.create_time, record.token, record.log_start, group, None)
        process._members = {Proc(*pair): Member("", False) for pair in record.members}
        process._shm = set(record.shm)
        process._foreign = proctable.is_alive(leader) and not process.is_that_of(record)
        process.refresh(thorough=True)
        return process

    @classmethod
    def restored(cls, pid: int, token: str, log_start: int, cgroup: Cgroup | None) -> EngineProcess:
        """An engine that was restored from an image, as the process `pid`. Raises EngineError if it is not there.

        Who restored it has ended: it is nobody's child that could wait for it.
        """
        stat = proctable.read_stat(pid)
        if stat is None or not proctable.has_mark(pid, f"{TOKEN_ENV}={token}\0".encode()):
            raise EngineError(FailureKind.DIED, f"process {pid} was restored, and is not there")
        process = cls(stat.proc, psutil.Process(pid).create_time(), token, log_start, cgroup, None)
        process.refresh(thorough=True)
        return process

    def is_that_of(self, record: EngineRecord) -> bool:
        """Whether the leader runs, and is the very process of the record: its number, its start, and its command line
        or its mark."""
        same = proctable.arguments(self.pid) == record.argv or proctable.has_mark(self.pid, self._mark)
        return same and proctable.is_alive(self.leader)

    @classmethod
    def spawn(
        cls, argv: Sequence[str], env: Mapping[str, str], log_path: Path, cgroup: Cgroup | None = None
    ) -> EngineProcess:
        """Start `argv` in a session of its own, its output appended to the log.

        It keeps the working folder of the daemon, which relative paths in the config are relative to.
        Raises OSError if it cannot be executed.
        """
        token = secrets.token_hex(16)
        shm_before = shm.existing()
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            log_start = os.fstat(log).st_size
            popen = subprocess.Popen(
                argv,
                env={**env, TOKEN_ENV: token},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                close_fds=True,
                start_new_session=True,
                umask=_UMASK,
            )
        finally:
            os.close(log)
        if cgroup is not None and not cgroup.enter(popen.pid):
            cgroup = None
        stat = proctable.read_stat(popen.pid)
        assert stat is not None, "a child that was not waited for is in the process table"
        create_time = psutil.Process(popen.pid).create_time()
        process = cls(stat.proc, create_time, token, log_start, cgroup, popen)
        process._shm_before = shm_before
        return process

    @property
    def pid(self) -> int:
        return self.leader.pid

    def ended(self) -> str | None:
        """How the leader ended, as the end of a sentence; None while it runs. Does not reap it."""
        if self._child is None:
            return None if proctable.is_alive(self.leader) else "has ended"
        try:
            status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return "is gone"
        if status is None:
            return None
        if status.si_code == os.CLD_EXITED:
            return f"exited with code {status.si_status}"
        return f"was killed by signal {status.si_status} ({_signal_name(status.si_status)})"

    def members(self) -> dict[Proc, Member]:
        """The processes found by the last `refresh`, those that have ended since included."""
        with self._lock:
            return dict(self._members)

    def forget(self, proc: Proc) -> None:
        """Take a process that has ended out of the books."""
        with self._lock:
            self._members.pop(proc, None)

    @property
    def shared_memory(self) -> tuple[shm.FileId, ...]:
        """The files in /dev/shm that `note_shared_memory` has found."""
        with self._lock:
            return tuple(sorted(self._shm))

    def refresh(self, thorough: bool = False) -> list[Proc]:
        """Look for the engine's processes; returns those alive. Reads all of /proc: call it from a thread.

        `thorough` also finds those that left the session and lost their parent before they were ever seen.
        """
        with self._lock:
            if self._over:
                return []
            found = self._find(self._mark if thorough else b"")
            alive = {proc: stat for proc, stat in found.items() if stat.alive}
            titles = {proc.pid: proctable.title(proc.pid) for proc in alive}
            for proc, stat in alive.items():
                title = titles[proc.pid]
                # A fork bears its parent's title until it executes something: it is not vital for that.
                vital = proc != self.leader and bool(_VITAL.search(title)) and title != titles.get(stat.parent)
                self._members[proc] = Member(title, vital)
            return list(alive)

    def note_shared_memory(self) -> None:
        """Remember which files in /dev/shm the engine uses, for the time when nobody is left to ask."""
        used = shm.in_use_by(self.refresh(thorough=True)) - self._shm_before
        with self._lock:
            self._shm |= used

    def terminate(self) -> None:
        """Ask the leader to end. Its children are its own to end: some of them end at once if asked."""
        _send(self.leader, signal.SIGTERM)

    def kill(self) -> None:
        """Kill every process of the engine, see that each is gone, and reap the leader. Blocks; idempotent.

        Raises EngineError if one of them survives SIGKILL for `KILL_SECS`.
        """
        deadline = time.monotonic() + KILL_SECS
        while not self._over:
            alive = self.refresh(thorough=True)
            if not alive:
                break
            if time.monotonic() > deadline:
                members = self.members()
                names = ", ".join(f"{proc.pid} ({members[proc].title[:60]})" for proc in alive)
                raise EngineError(FailureKind.TIMEOUT, f"still there {KILL_SECS:g} s after SIGKILL: process {names}")
            if self.cgroup is not None:
                self.cgroup.kill()
            for proc in alive:
                _send(proc, signal.SIGKILL)
            _wait_gone(alive, min(deadline, time.monotonic() + 1.0))
        with self._lock:
            if not self._over:
                self._reap()
                self._over = True
        if self.cgroup is not None:
            self.cgroup.remove()

    def remove_shared_memory(self) -> list[str]:
        """Remove what the killed engine left in /dev/shm; returns the paths."""
        return shm.remove_leftovers(self._shm)

    def _find(self, mark: bytes = b"") -> dict[Proc, proctable.Stat]:
        leads = self._child is not None or (proctable.is_alive(self.leader) and not self._foreign)
        also: Iterable[int] = () if self.cgroup is None else self.cgroup.pids()
        known = self._members.keys() - {self.leader} if self._foreign else self._members.keys()
        return proctable.members(self.leader, known, mark, frozenset(also), leads)

    def _reap(self) -> None:
        # Orphans are reaped by process 1. Where the daemon is that, or a subreaper, they are its own.
        for proc, stat in self._find().items():
            if (proc != self.leader or self._child is None) and stat.parent == os.getpid():
                os.waitpid(proc.pid, os.WNOHANG)
        if self._child is not None:
            self._child.wait()


def kill_marked(
    mark: bytes, groups: Sequence[Cgroup], spared: Sequence[EngineProcess], leader: int | None = None
) -> list[int]:
    """Kill every process with `mark` in its environment or in one of the groups, and what descends from it.

    With `leader`, the number of a process that can be nobody else's, that one and all of its session, too. But not
    those of the engines in `spared`, and those in containers: the mark names a folder, and a daemon in a container may
    have one of the same name. Returns the pids of those killed. Blocks until they are gone, or for `KILL_SECS`.
    """
    deadline = time.monotonic() + KILL_SECS
    known: set[Proc] = set()
    first = _NOBODY if leader is None else Proc(leader, 0)
    while time.monotonic() < deadline:
        inside = frozenset(pid for group in groups for pid in group.pids())
        found = proctable.members(first, known, mark, inside, leads=leader is not None)
        # Looked up after the others were found: what one of them has forked meanwhile is not among those.
        kept = {proc for process in spared for proc in process.refresh(thorough=True)}
        alive = [proc for proc, stat in found.items() if stat.alive and proc not in kept]
        alive = [proc for proc in alive if proc.pid in inside or not proctable.is_in_a_container(proc.pid)]
        if not alive:
            break
        known.update(alive)
        for proc in alive:
            _send(proc, signal.SIGKILL)
        _wait_gone(alive, min(deadline, time.monotonic() + 1.0))
    for group in groups:
        group.remove()
    return sorted(proc.pid for proc in known)


def _wait_gone(procs: Sequence[Proc], until: float) -> None:
    while any(proctable.is_alive(proc) for proc in procs) and time.monotonic() < until:
        time.sleep(_POLL_SECS)


def _send(proc: Proc, number: signal.Signals) -> None:
    """Signal this very process: a pidfd, checked after it was opened, cannot come to mean another one."""
    try:
        fd = os.pidfd_open(proc.pid)
    except ProcessLookupError:
        return
    except OSError:
        if proctable.is_alive(proc):
            _quietly_kill(proc.pid, number)
        return
    try:
        if proctable.is_alive(proc):
            signal.pidfd_send_signal(fd, number)
    except (ProcessLookupError, PermissionError):
        pass
    finally:
        os.close(fd)


def _quietly_kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"

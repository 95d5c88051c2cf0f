"""Faults of a simulated engine, by name, with a value and a number of times.

Written `NAME[=VALUE][*TIMES]`, separated by commas or lines: ``die_at_start*2, slow=4, refuse_sleep``. Without
TIMES a fault stays. They come from the environment, or from a file: there a test can set and clear them while an
engine runs, and a number of times counts over restarts.

Those of a request, N being a number of tokens, 1 if nothing else is said, and S real seconds, also 1:

    slow_head=S         the head of its answer comes that late
    stall_stream=N      its stream stops, with the connection open, until its client leaves or the fault is taken away
    cut_body=N          the connection is closed in the middle of the answer: after N tokens of a stream, or half-way
    dead_in_stream=N    EngineCore dies; its stream says so and ends regularly, as vLLM's does where it still can
    die_after_tokens=N  EngineCore dies, and the connection with it
    garbage_answer      something that is no HTTP is answered
    hang_generation     no token is made while the fault is there
"""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAMES = frozenset(
    {
        "cut_body",
        "dead_in_stream",
        "die_after_tokens",
        "die_at_start",
        "die_in_sleep",
        "die_in_wake",
        "fail_wake",
        "garbage_answer",
        "hang_generation",
        "hang_health",
        "hang_sleep",
        "hang_start",
        "hang_wake",
        "leak_sleep",
        "lie_sleep",
        "oom_wake",
        "refuse_sleep",
        "slow",
        "slow_head",
        "stall_stream",
    }
)

_FAULT = re.compile(r"(?P<name>[a-z_]+)(?:=(?P<value>[0-9.]+))?(?:\*(?P<times>[0-9]+))?")

SETTLED_NS = 50_000_000
"""A file that was written less than this ago may be written again without a later time stamp."""


@dataclass
class Fault:
    """One fault. `times` is how often it will still happen; None for always."""

    name: str
    value: float | None = None
    times: int | None = None

    def __str__(self) -> str:
        value = "" if self.value is None else f"={self.value:g}"
        return f"{self.name}{value}" + ("" if self.times is None else f"*{self.times}")


def parse(text: str) -> list[Fault]:
    """Read a list of faults. Raises ValueError for one that there is not."""
    faults = []
    for word in re.split(r"[,\s]+", text.strip()):
        match = _FAULT.fullmatch(word)
        if not word:
            continue
        if match is None or match["name"] not in NAMES:
            raise ValueError(f"no fault {word!r}; there are {', '.join(sorted(NAMES))}, as NAME[=VALUE][*TIMES]")
        value = None if match["value"] is None else float(match["value"])
        faults.append(Fault(match["name"], value, None if match["times"] is None else int(match["times"])))
    return faults


class Faults:
    """The faults of one engine."""

    def __init__(self, text: str, file: Path | None) -> None:
        self._own = parse(text)
        self._file = file
        self._seen: tuple[int, int, int] | None = None
        self._shared: list[Fault] = []

    def __bool__(self) -> bool:
        """Whether there are any. Asked for every token, so the file is read only when it has changed."""
        return any(fault.times != 0 for fault in (*self._own, *self._current()))

    def happens(self, name: str) -> bool:
        """Whether a fault happens now; it is used up by one."""
        found = self._find(name)
        if found is None:
            return False
        if found.times is None:
            return True
        with self._all() as faults:
            for fault in faults:
                if fault.name == name and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return True
        return False

    def stands(self, name: str) -> bool:
        """Whether a fault is there at all, be it used up."""
        return any(fault.name == name for fault in (*self._own, *self._current()))

    def value(self, name: str, default: float) -> float:
        """The value of a fault, which is not used up."""
        found = self._find(name)
        return default if found is None or found.value is None else found.value

    def _find(self, name: str) -> Fault | None:
        """The first fault of that name that can still happen, as the file was when it last changed."""
        for fault in self._own:
            if fault.name == name and fault.times != 0:
                return fault
        for fault in self._current():
            if fault.name == name and fault.times != 0:
                return fault
        return None

    def _current(self) -> list[Fault]:
        if self._file is None:
            return []
        try:
            found = self._file.stat()
        except FileNotFoundError:
            self._seen = None
            return []
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        if stamp != self._seen:
            with self._all():
                pass
            self._seen = stamp if time.time_ns() - found.st_mtime_ns > SETTLED_NS else None
        return self._shared

    @contextmanager
    def _all(self) -> Iterator[list[Fault]]:
        """All of them, the file under a lock; what is changed in them is written back."""
        if self._file is None or not self._file.exists():
            self._shared = []
            yield self._own
            return
        with self._file.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = file.read()
            self._shared = parse(before)
            yield [*self._own, *self._shared]
            after = "\n".join(map(str, self._shared))
            if after != before.strip():
                file.seek(0)
                file.truncate()
                file.write(after)
                self._seen = None

"""Faults of a simulated engine, by name, with a value and a number of times.

Written `NAME[=VALUE][*TIMES]`, separated by commas or lines: ``die_at_start*2, slow=4, refuse_sleep``. Without
TIMES a fault stays. They come from the environment, or from a file that is read anew whenever it matters: there a
test can set and clear them while an engine runs, and a number of times counts over restarts.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NAMES = frozenset(
    {
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
    }
)

_FAULT = re.compile(r"(?P<name>[a-z_]+)(?:=(?P<value>[0-9.]+))?(?:\*(?P<times>[0-9]+))?")


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

    def happens(self, name: str) -> bool:
        """Whether a fault happens now; it is used up by one."""
        with self._all() as faults:
            for fault in faults:
                if fault.name == name and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return True
        return False

    def value(self, name: str, default: float) -> float:
        """The value of a fault, which is not used up."""
        with self._all() as faults:
            found = [f.value for f in faults if f.name == name and f.times != 0 and f.value is not None]
        return found[0] if found else default

    @contextmanager
    def _all(self) -> Iterator[list[Fault]]:
        if self._file is None or not self._file.exists():
            yield self._own
            return
        with self._file.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = file.read()
            shared = parse(before)
            yield [*self._own, *shared]
            after = "\n".join(map(str, shared))
            if after != before.strip():
                file.seek(0)
                file.truncate()
                file.write(after)

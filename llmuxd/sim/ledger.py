"""The memory of a simulated device, shared by processes: a JSON file under a lock.

A process holds memory until it gives it back or is gone; gone means that its pid is not there any more, or is another
process's, as with a real driver. The file also remembers the peak and what did not fit, so that a test can ask about
the past.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GIB = 2**30


class OutOfMemory(Exception):
    """What was asked for is not free."""

    def __init__(self, asked: int, free: int) -> None:
        super().__init__(f"asked for {asked / GIB:.2f} GiB, free are {free / GIB:.2f} GiB")


def start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class Ledger:
    """One device. All sizes in bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def create(cls, path: Path, total: int) -> Ledger:
        """A new device of `total` bytes, with nothing on it."""
        path.write_text(json.dumps({"total": total, "held": {}, "peak": 0, "refused": 0, "overcommit": 0}))
        return cls(path)

    @property
    def total(self) -> int:
        with self._open() as device:
            return int(device["total"])

    def free(self) -> int:
        """What nobody holds."""
        with self._open() as device:
            return int(device["total"]) - _used(device)

    def held(self) -> dict[int, int]:
        """pid -> what it holds, of processes that live."""
        with self._open() as device:
            return {int(key.partition(":")[0]): size for key, size in device["held"].items()}

    def peak(self) -> int:
        """The most that was ever held at once."""
        with self._open() as device:
            return int(device["peak"])

    def refused(self) -> int:
        """How often a process that runs already wanted more than was free."""
        with self._open() as device:
            return int(device["refused"])

    def overcommit(self) -> int:
        """The most by which what was held and what was wanted together exceeded the device."""
        with self._open() as device:
            return int(device["overcommit"])

    def hold(self, pid: int, size: int) -> None:
        """From now on the process holds `size` bytes. Raises OutOfMemory, and then it holds what it held."""
        began = start_time(pid)
        with self._open() as device:
            if began is None:
                return
            key = f"{pid}:{began}"
            before = device["held"].get(key, 0)
            free = device["total"] - _used(device)
            fits = size - before <= free
            if fits:
                device["held"][key] = size
                device["peak"] = max(device["peak"], _used(device))
            else:
                device["refused"] += 1
                device["overcommit"] = max(device["overcommit"], size - before - free)
        if not fits:
            raise OutOfMemory(size - before, free)

    @contextmanager
    def _open(self) -> Iterator[dict[str, Any]]:
        """The device's content, the dead taken out; what is changed in it is written back.

        Whoever writes may be killed at any instant: the file is replaced as a whole, so the lock is another one.
        """
        with self._path.with_name(self._path.name + ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._path.read_text()
            device = json.loads(before)
            for key in list(device["held"]):
                pid, _, began = key.partition(":")
                if start_time(int(pid)) != int(began):
                    del device["held"][key]
            yield device
            after = json.dumps(device)
            if after != before:
                fresh = self._path.with_name(self._path.name + ".new")
                fresh.write_text(after)
                fresh.replace(self._path)


def _used(device: dict[str, Any]) -> int:
    return sum(device["held"].values())

"""What a check has found, and how the checks spell sizes and versions."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from enum import Enum

GIB = 1 << 30


class Status(Enum):
    OK = "ok"
    WARN = "warn"
    """Worth knowing; it works, or may."""
    FAIL = "fail"
    """It will not work."""
    SKIPPED = "skipped"
    """Not used here, or not to be seen by this user."""


@dataclass(frozen=True)
class Finding:
    """The outcome of a check. `advice` says what to do; it may have several lines."""

    status: Status
    found: str
    advice: str = ""

    def as_json(self, check: str) -> dict[str, str]:
        return {"check": check, **asdict(self), "status": self.status.value}


def ok(found: str, advice: str = "") -> Finding:
    return Finding(Status.OK, found, advice)


def warn(found: str, advice: str) -> Finding:
    return Finding(Status.WARN, found, advice)


def fail(found: str, advice: str) -> Finding:
    return Finding(Status.FAIL, found, advice)


def skipped(found: str, advice: str = "") -> Finding:
    return Finding(Status.SKIPPED, found, advice)


def size(number: float) -> str:
    """Bytes as people say them."""
    return f"{number / GIB:.1f} GiB" if number >= GIB / 10 else f"{number / (1 << 20):.0f} MiB"


def version_of(text: str) -> tuple[int, ...] | None:
    """The numbers of the first version in a text: 0.17.1 of "0.17.1rc1+cpu"."""
    found = re.search(r"\d+(?:\.\d+)+", text)
    return tuple(int(part) for part in found[0].split(".")) if found else None


def listed(words: list[str], most: int = 5) -> str:
    """Words in a row, not too many."""
    more = len(words) - most
    return ", ".join(words[:most]) + (f" and {more} more" if more > 0 else "")

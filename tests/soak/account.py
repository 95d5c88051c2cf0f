"""The account: what became of every request, as its client saw it and as the daemon did. Pure.

A client opens an entry before the first byte of its request goes out and closes it when it knows how it ended. The
daemon's side are its access log, a line per request, and its counters. Nothing may be missing on either, nothing may be
there twice, and both have to tell the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from tests.soak.judge import Asked, How, Outcome

SHOWN = 8
"""Of the problems of one sort, so many are told one by one."""


@dataclass(slots=True)
class Entry:
    """One request. `logged` is the status in the access log, 0 as long as there is none."""

    kind: str
    outcome: Outcome | None = None
    logged: int = 0


class Account:
    """All requests of a soak."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.kinds: dict[str, Counter[How]] = defaultdict(Counter)
        self.codes: Counter[str] = Counter()
        """Of refusals and error events that had a cause."""
        self.open = 0
        self._strangers: Counter[int] = Counter()
        """By status, lines of the access log without an id of ours: of requests whose heads never came."""
        self._may_be_strangers = 0
        self._problems: dict[str, list[str]] = defaultdict(list)
        self.news: list[str] = []
        """What was found to be wrong, for who tells of it and empties this."""

    # The clients' side

    def asked(self, asked: Asked) -> None:
        """A request is about to be sent."""
        if asked.id in self.entries:
            self.note("the soak used an id twice", asked.id)
        self.entries[asked.id] = Entry(asked.kind)
        self.open += 1

    def ended(self, asked: Asked, outcome: Outcome) -> None:
        """Its client knows how it ended."""
        entry = self.entries[asked.id]
        if entry.outcome is not None:
            self.note("two answers to one request", f"{asked.id}: {entry.outcome.how.value}, {outcome.how.value}")
            return
        self.open -= 1
        entry.outcome = outcome
        self.kinds[asked.kind][outcome.how] += 1
        if outcome.how is How.FAULT:
            self.note("answers that no client may get", f"{asked.id} ({asked.kind}): {outcome.detail}")
        elif outcome.detail:
            self.codes[outcome.detail] += 1
        if entry.logged:
            self._compare(asked.id, entry)

    def headless(self) -> None:
        """A client left before it had sent so much as its id: the daemon may tell of it or not."""
        self._may_be_strangers += 1

    # The daemon's side

    def logged(self, id: str, status: int) -> None:
        """There is a line in the access log."""
        entry = self.entries.get(id)
        if entry is None:
            self._strangers[status] += 1
            return
        if entry.logged:
            self.note("two lines in the access log for one request", f"{id}: {entry.logged}, {status}")
            return
        entry.logged = status
        if entry.outcome is not None:
            self._compare(id, entry)

    def _compare(self, id: str, entry: Entry) -> None:
        assert entry.outcome is not None
        if entry.outcome.counts and entry.logged not in entry.outcome.counts:
            self.note("the access log and the client disagree", f"{id}: {_seen(entry)}, logged as {entry.logged}")

    # What does not hold

    def problems(self, counted: Mapping[int, float]) -> dict[str, list[str]]:
        """What is wrong, by sort, when nothing is under way. `counted` are the daemon's counters by status."""
        found = {sort: list(some) for sort, some in self._problems.items()}
        lost = [f"{id} ({entry.kind})" for id, entry in self.entries.items() if entry.outcome is None]
        unlogged = [f"{id}: {_seen(entry)}" for id, entry in self.entries.items() if _is_missing(entry)]
        logged = Counter(entry.logged for entry in self.entries.values() if entry.logged) + self._strangers
        differing = [
            f"{status}: counted {counted.get(status, 0):.0f} times, logged {logged[status]} times"
            for status in sorted({*logged, *counted})
            if logged[status] != counted.get(status, 0)
        ]
        strangers = sum(self._strangers.values())
        if lost:
            found["requests that never ended"] = lost
        if unlogged:
            found["requests that are not in the access log"] = unlogged
        if strangers > self._may_be_strangers:
            more = f"{strangers}, and {self._may_be_strangers} may be there"
            found["lines in the access log for nobody's requests"] = [more]
        if differing:
            found["the access log and the counters disagree"] = differing
        return found

    def note(self, sort: str, text: str) -> None:
        """Something is wrong."""
        self._problems[sort].append(text)
        self.news.append(f"{sort}: {text}")


def _is_missing(entry: Entry) -> bool:
    return entry.outcome is not None and not entry.logged and not entry.outcome.unseen


def _seen(entry: Entry) -> str:
    assert entry.outcome is not None
    status = f", status {entry.outcome.status}" if entry.outcome.status else ""
    return f"{entry.kind}, {entry.outcome.how.value}{status}"


def told(problems: Mapping[str, list[str]]) -> list[str]:
    """A line for each problem, of each sort the first few."""
    lines = []
    for sort, some in problems.items():
        lines.append(f"{sort}: {len(some)}")
        lines += [f"  {text}" for text in some[:SHOWN]]
        if len(some) > SHOWN:
            lines.append(f"  and {len(some) - SHOWN} more")
    return lines

"""What a soak has to tell at its end, for a human and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.soak.account import told
from tests.soak.judge import How


@dataclass
class Report:
    """One soak. `problems` is empty if everything held."""

    seed: int
    minutes: float
    clients: int
    requests: int
    requests_per_second: float
    kinds: dict[str, dict[str, int]]
    codes: dict[str, int]
    seconds: dict[str, dict[str, float]]
    """Quantiles of durations: `first_byte`, `total`, `queue`, `own`."""
    deeds: dict[str, int]
    switches: int
    switch_failures: int
    access_lines: int
    warnings: int
    longest_unhealthy: float
    usage: list[dict[str, float]]
    exit_code: int | None
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        return not self.problems

    def as_json(self) -> str:
        return json.dumps({"held": self.held, **asdict(self)}, indent=1)

    def as_text(self) -> str:
        """Tables for a terminal."""
        lines = [
            f"seed {self.seed}, {self.minutes:g} minutes, {self.clients} clients: {self.requests} requests, "
            f"{self.requests_per_second:.0f} per second",
            "",
            *self._kinds(),
            "",
            "refusals and error events: " + (_counts(self.codes) or "none"),
            "",
            f"{'seconds':24}{'p50':>9}{'p99':>9}{'max':>9}",
            *(f"{name:24}{q['p50']:9.3f}{q['p99']:9.3f}{q['max']:9.3f}" for name, q in self.seconds.items()),
            "",
            f"switches: {self.switches}, failed: {self.switch_failures}",
            f"deeds: {_counts(self.deeds) or 'none'}",
            f"access log: {self.access_lines} lines; warnings: {self.warnings}; longest unhealthy: "
            f"{self.longest_unhealthy:.1f} s; exit code: {self.exit_code}",
            *self._usage(),
            "",
        ]
        if self.held:
            return "\n".join([*lines, "Everything held."])
        return "\n".join([*lines, "What did not hold:", *(f"  {line}" for line in told(self.problems))])

    def _kinds(self) -> list[str]:
        columns = [how.value for how in How]
        lines = [f"{'':24}" + "".join(f"{column:>12}" for column in columns)]
        for kind, counts in sorted(self.kinds.items()):
            lines.append(f"{kind:24}" + "".join(f"{counts.get(column, 0) or '.':>12}" for column in columns))
        return lines

    def _usage(self) -> list[str]:
        if not self.usage:
            return []
        first, last = self.usage[0], self.usage[-1]
        return [
            f"{what}: {first[key]:.0f} at first, {last[key]:.0f} at last"
            for what, key in (("file descriptors", "fds"), ("threads", "threads"), ("resident MiB", "rss_mib"))
        ]


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the largest; zeros of nothing."""
    found = sorted(values) or [0.0]
    return {
        "p50": found[len(found) // 2],
        "p99": found[min(len(found) - 1, len(found) * 99 // 100)],
        "max": found[-1],
    }


def _counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items(), key=lambda one: -one[1]))

"""What the measurements come to: the table, the figures to reach, the page docs/performance.md."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.relay.contestants import ALONE, CADDY, LLMUXD, NGINX, PROXIES, caddy_program, nginx_program, wrk_program
from benchmarks.relay.measure import BUSY, CONNECTIONS, IDLE, STALLING, STREAMS, Cores, Figures, Results
from llmuxd.version import __version__

RATE_TO_REACH = 1.0
CHUNK_TO_REACH = 0.5
ADDED_MS_TO_REACH = 0.3
STALLED_MIB_TO_REACH = 200.0

SATURATED = 0.85
"""Cores that the engine, or the client, may use before it may be what is measured."""
ON_PACE = 0.97
QUIET = 0.2
"""Cores that others may use before the figures say more about them."""

COLUMNS = (LLMUXD, CADDY, NGINX, ALONE)
BEGIN, END = "<!-- run: begin -->", "<!-- run: end -->"


@dataclass(frozen=True)
class Run:
    """One run of everything."""

    results: Results
    rounds: int
    secs: int
    took: float
    on_uvloop: bool
    access_lines: int


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    cells: tuple[str, ...]
    """Of each column."""
    ratio: str = ""
    aim: str = ""
    reached: bool | None = None
    """None if there is nothing to reach."""

    @property
    def line(self) -> str:
        word = {None: "", True: "reached", False: "**missed**"}[self.reached]
        return f"| {self.what} | {' | '.join(self.cells)} | {self.ratio} | {self.aim} | {word} |"


def rows(results: Results) -> list[Row]:
    """All lines."""
    return [
        *(_rate_row(results, connections) for connections in CONNECTIONS),
        *(_request_row(results, connections) for connections in CONNECTIONS),
        *(_chunk_row(results, count) for count in STREAMS),
        _added_row("added latency p50 (ms)", results, lambda one: one.p50_ms, ADDED_MS_TO_REACH),
        _added_row("added latency p99 (ms)", results, lambda one: one.p99_ms),
        _memory_row(results, IDLE),
        _memory_row(results, BUSY),
        _memory_row(results, STALLING, STALLED_MIB_TO_REACH),
    ]


def _rate_row(results: Results, connections: int) -> Row:
    rates = {name: results[name].rate[connections] for name in COLUMNS}
    ratio, text = _against_caddy(rates)
    cells = tuple(f"{median(rates[name]):,.0f}" for name in COLUMNS)
    return Row(f"requests/s, {connections} connections", cells, text, f"≥ {RATE_TO_REACH}", ratio >= RATE_TO_REACH)


def _request_row(results: Results, connections: int) -> Row:
    took = {name: _request_us(results[name], connections) for name in PROXIES}
    cells = (*(f"{median(took[name]):.0f}" for name in PROXIES), "")
    return Row(f"CPU per request, {connections} connections (µs)", cells, _against_caddy(took)[1])


def _request_us(figures: Figures, connections: int) -> list[float]:
    rates, cores = figures.rate[connections], figures.cores["requests", connections]
    return [1e6 * used.proxy / rate for rate, used in zip(rates, cores, strict=True)]


def _chunk_row(results: Results, count: int) -> Row:
    took = {name: results[name].chunk_us[count] for name in PROXIES}
    ratio, text = _against_caddy(took)
    cells = (*(f"{median(took[name]):.1f}" for name in PROXIES), "")
    what = f"CPU per chunk, {count} streams (µs)"
    return Row(what, cells, text, f"≤ {CHUNK_TO_REACH}", ratio <= CHUNK_TO_REACH)


def _against_caddy(figures: Mapping[str, Sequence[float]]) -> tuple[float, str]:
    """The median of the rounds' ratios, and in words with the smallest and the largest."""
    ratios = [ours / theirs for ours, theirs in zip(figures[LLMUXD], figures[CADDY], strict=True)]
    return median(ratios), f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _added_row(what: str, results: Results, times: Callable[[Figures], list[float]], aim: float | None = None) -> Row:
    alone = times(results[ALONE])
    added = {
        name: median([proxied - bare for proxied, bare in zip(times(results[name]), alone, strict=True)])
        for name in PROXIES
    }
    cells = (*(f"{added[name]:.3f}" for name in PROXIES), f"({median(alone):.3f})")
    if aim is None:
        return Row(what, cells)
    return Row(what, cells, "", f"< {aim}", added[LLMUXD] < aim)


def _memory_row(results: Results, when: str, aim: float | None = None) -> Row:
    most = [max(results[name].memory_mib.get(when, [0.0])) for name in PROXIES]
    cells = (*(f"{mib:.0f}" if mib else "" for mib in most), "")
    what = f"resident memory, {when} (MiB)"
    return Row(what, cells) if aim is None else Row(what, cells, "", f"< {aim:g}", most[0] < aim)


def table(lines: Sequence[Row]) -> str:
    head = f"| | {' | '.join(COLUMNS)} | llmuxd / Caddy | to reach | |"
    return "\n".join([head, "| --- " * (len(COLUMNS) + 4) + "|", *(row.line for row in lines)])


# Who used the processors


def cores_table(results: Results) -> str:
    """Proxy + engine + client, of every measurement."""
    keys = list(results[ALONE].cores)
    head = f"| cores used: proxy + engine + client | {' | '.join(COLUMNS)} |"
    lines = [head, "| --- " * (len(COLUMNS) + 1) + "|"]
    for kind, number in keys:
        what = f"requests/s, {number} connections" if kind == "requests" else f"{number} streams"
        cells = [_shares(results[name].cores[kind, number]) for name in COLUMNS]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shares(of_rounds: Sequence[Cores]) -> str:
    return " + ".join(
        f"{median([getattr(one, who) for one in of_rounds]):.2f}" for who in ("proxy", "engine", "client")
    )


def remarks(results: Results) -> list[str]:
    """What to know before one believes the figures."""
    found = []
    for name in COLUMNS:
        for (kind, number), cores in results[name].cores.items():
            for who in ("engine", "client"):
                used = median([getattr(one, who) for one in cores])
                if used > SATURATED:
                    found.append(f"{name}, {number} {kind}: the {who} used {used:.2f} cores and may be what is slow.")
        for count, pace in results[name].pace.items():
            if min(pace) < ON_PACE:
                found.append(f"{name}, {count} streams: {100 * min(pace):.0f} % of the events arrived in their time.")
    others = [one.others for name in COLUMNS for cores in results[name].cores.values() for one in cores]
    if median(others) > QUIET:
        found.append(
            f"Others used {median(others):.2f} cores of this machine meanwhile (median): figures are lower than on a "
            "quiet one, and less certain."
        )
    return found


# The machine, the page


def machine() -> str:
    """What it ran on, in sentences."""
    cpu = re.search(r"^model name\s*: *(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return (
        f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores; Linux {platform.release()}, "
        f"{platform.freedesktop_os_release()['PRETTY_NAME']}."
    )


def versions(run: Run) -> str:
    """Of all programs."""
    loop = f"on uvloop {importlib.metadata.version('uvloop')}" if run.on_uvloop else "**without uvloop**"
    return ", ".join(
        [
            f"llmuxd {__version__} ({loop}, Python {platform.python_version()})",
            f"Caddy {_said([caddy_program(), 'version'])}",
            f"nginx {_said([nginx_program(), '-v'])}",
            f"wrk {_said([wrk_program(), '-v'])}",
        ]
    )


def _said(argv: list[str]) -> str:
    """The version in what a program says of itself."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found[0] if found else "unknown"


def page_text(run: Run) -> str:
    """What docs/performance.md has between its marks, and what is printed."""
    notes = "".join(f"\n- {remark}" for remark in remarks(run.results))
    today = datetime.date.today().isoformat()
    return (
        f"{today}, {machine()} {versions(run)}. Rounds: {run.rounds}, {run.secs} s each time, "
        f"{run.took:.0f} s in all; llmuxd wrote {run.access_lines:,} lines of access log.\n\n"
        f"{table(rows(run.results))}\n\n{cores_table(run.results)}\n{notes}"
    ).rstrip()


def write(page: Path, text: str) -> None:
    """Put it between the marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")

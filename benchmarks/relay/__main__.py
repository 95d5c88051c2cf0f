"""`python -m benchmarks.relay`: llmuxd beside Caddy and nginx, in one run."""

from __future__ import annotations

import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks.relay import report
from benchmarks.relay.contestants import ROOT, Broken, running
from benchmarks.relay.measure import measure

PAGE = ROOT / "docs" / "performance.md"
EXIT_MISSED = 1
EXIT_BROKEN = 2


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns that each proxy gets.")
@click.option("--seconds", type=click.IntRange(1), default=2, show_default=True, help="Length of one measurement.")
@click.option("--check", is_flag=True, help="Exit with 1 if a figure that is to be reached is missed.")
@click.option("--write", is_flag=True, help=f"Write the table to {PAGE.relative_to(ROOT)}.")
def main(rounds: int, seconds: int, check: bool, write: bool) -> None:
    """Measure llmuxd, Caddy and nginx as reverse proxies of one simulated engine, and that engine alone.

    Exits with 2, and measures nothing by halves, if a program is missing or a request fails.
    """
    _allow_many_files()
    # What was started is to be ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_BROKEN))
    try:
        run = _run(rounds, seconds)
    except Broken as broken:
        click.echo(f"bench-relay: {broken}", err=True)
        sys.exit(EXIT_BROKEN)
    text = report.page_text(run)
    click.echo(text)
    if write:
        report.write(PAGE, text)
    if check and any(row.reached is False for row in report.rows(run.results)):
        sys.exit(EXIT_MISSED)


def _run(rounds: int, seconds: int) -> report.Run:
    begun = time.monotonic()

    def tell(what: str) -> None:
        click.echo(f"{time.monotonic() - begun:4.0f} s: {what}", err=True)

    with tempfile.TemporaryDirectory(prefix="llmux-bench-") as folder, running(Path(folder)) as field:
        results = measure(field, Path(folder), rounds, seconds, tell)
        return report.Run(results, rounds, seconds, time.monotonic() - begun, field.on_uvloop, field.access_lines())


def _allow_many_files() -> None:
    """What is started inherits it: a stream takes two descriptors of its proxy."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    main()

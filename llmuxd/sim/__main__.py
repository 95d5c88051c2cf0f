"""`python -m llmuxd.sim`: the production core under virtual time, with faults."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from pprint import pformat

import click

from llmuxd.core.audit import INVARIANTS
from llmuxd.sim.virtual.bench_cli import bench, report
from llmuxd.sim.virtual.chaos import draw
from llmuxd.sim.virtual.scenario import Scenario
from llmuxd.sim.virtual.sweep import Verdict, digest, log_of, shortest, sweep


class SeedRange(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """`FIRST:END`, END not included, or one seed."""

    name = "first:end"

    def convert(
        self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, colon, end = value.partition(":")
        try:
            seeds = (int(first), int(end) if colon else int(first) + 1)
        except ValueError:
            self.fail(f"{value!r} is neither FIRST:END nor a number", param, ctx)
        if not 0 <= seeds[0] < seeds[1]:
            self.fail(f"{value!r} has no seeds in it", param, ctx)
        return seeds


@click.group(invoke_without_command=True)
@click.option("--seeds", type=SeedRange(), default="0:1000", show_default=True, help="The seeds to run, as FIRST:END.")
@click.option("--processes", type=click.IntRange(1), help="How many at once; one per processor if not given.")
@click.pass_context
def cli(context: click.Context, seeds: tuple[int, int], processes: int | None) -> None:
    """Run the production core under virtual time.

    Without a command: one scenario per seed, with simulated engines, clients, an operator, and faults. After every
    event the invariants are checked. The first broken one is printed with its seed and the shortest form of the
    scenario that still breaks it, and the exit code is 1.
    """
    if context.invoked_subcommand is None:
        sys.exit(_sweep(seeds, processes))


@cli.command()
@click.argument("seed", type=click.IntRange(0))
@click.option("--log", type=click.Path(path_type=Path), help="Write the event log to a file instead.")
def replay(seed: int, log: Path | None) -> None:
    """Print every event and command of the run of SEED. The same seed gives the same log, byte for byte."""
    text = "\n".join(log_of(draw(seed))) + "\n"
    if log is None:
        click.echo(text, nl=False)
    else:
        log.write_text(text)
        click.echo(f"{log}: {text.count(chr(10))} lines, SHA-256 {digest(draw(seed))}")


@cli.command()
def invariants() -> None:
    """List what is checked."""
    for name, sentence in INVARIANTS.items():
        click.echo(f"{name:20} {sentence}")


def _sweep(seeds: tuple[int, int], processes: int | None) -> int:
    first, end = seeds
    began = time.monotonic()
    seen: Counter[str] = Counter()
    done = events = 0
    for verdict in sweep(first, end, processes):
        if verdict.violation is not None:
            _tell(verdict)
            return 1
        done += 1
        events += verdict.events
        seen += verdict.seen
        if sys.stderr.isatty() and done % 50 == 0:
            click.echo(f"\r{done} of {end - first} seeds", nl=False, err=True)
    secs = time.monotonic() - began
    if sys.stderr.isatty():
        click.echo("\r", nl=False, err=True)
    click.echo(f"{done} seeds ({first}:{end}), {events} events, {secs:.1f} s: no invariant broken")
    click.echo("  " + ", ".join(f"{count} {what}" for what, count in sorted(seen.items())))
    return 0


def _tell(verdict: Verdict) -> None:
    violation = verdict.violation
    assert violation is not None
    click.echo(f"seed {verdict.seed} breaks {violation}")
    click.echo("shrinking ...", err=True)
    scenario = shortest(verdict.seed, violation.invariant)
    click.echo(f"shortest form found:\n{_brief(scenario)}")
    lines = log_of(scenario)
    long_form = f"python -m llmuxd.sim replay {verdict.seed}"
    click.echo(f"its last events, of {len(lines)} lines (the unshortened run: {long_form}):")
    click.echo("\n".join(lines[-40:]))


def _brief(scenario: Scenario) -> str:
    parts = {
        "policy": scenario.policy,
        "settings": scenario.settings,
        "devices": dict(scenario.devices),
        "models": scenario.models,
        "begin_asleep": scenario.begin_asleep,
        "arrivals": scenario.arrivals,
        "actions": scenario.actions,
        "faults": scenario.faults,
    }
    return "\n".join(f"  {name}: {pformat(value, width=110, compact=True)}" for name, value in parts.items())


cli.add_command(bench)
cli.add_command(report)


if __name__ == "__main__":
    cli(prog_name="python -m llmuxd.sim")

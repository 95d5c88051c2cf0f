"""The commands `bench` and `report` of `python -m llmuxd.sim`."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import click

from llmuxd.core.policies import POLICIES
from llmuxd.core.settings import InFlight
from llmuxd.sim.virtual.bench import Case, batch_cases, batch_workloads, run_case, serial_cases
from llmuxd.sim.virtual.report import write_report

CHECKOUTS_TRACES = Path("benchmarks/traces")
"""Where the traces are in a checkout of llmux."""

COLUMNS = "{:32} {:>7} {:>5} {:>10} {:>6} {:>8} {:>6} {:>8} {:>8} {:>8} {:>8}"


def cases(policies: Sequence[str], pattern: str, traces: Path | None) -> list[Case]:
    """Every cell of the comparison: time_slice and the others of llmux 0.7 drain, tenure does both."""
    names = [name for name in batch_workloads(traces) if fnmatch(name, pattern)]
    found = [case for case in serial_cases(policies) if fnmatch(case.workload, pattern)]
    for policy in policies:
        ways = [InFlight.DRAIN, InFlight.PARK] if policy == "tenure" else [InFlight.DRAIN]
        found += batch_cases([policy], names, ways)
    return found


def run_all(chosen: Sequence[Case], traces: Path | None, processes: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of the cases, in their order, worked out on all processors."""
    with multiprocessing.Pool(processes) as pool:
        for number, row in enumerate(pool.imap(partial(run_case, traces=traces), chosen), 1):
            if sys.stderr.isatty():
                click.echo(f"\r{number} of {len(chosen)}", nl=False, err=True)
            yield row
    if sys.stderr.isatty():
        click.echo("\r", nl=False, err=True)


def _policies(_context: click.Context, _parameter: click.Parameter, names: tuple[str, ...]) -> list[str]:
    return list(names) or list(POLICIES)


def _traces(_context: click.Context, _parameter: click.Parameter, folder: Path | None) -> Path | None:
    if folder is None and CHECKOUTS_TRACES.is_dir():
        return CHECKOUTS_TRACES
    if folder is None:
        click.echo("without --traces: the recorded traces are left out", err=True)
    return folder


TRACES = click.option(
    "--traces",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    callback=_traces,
    help="A folder with the Aegaeon and Azure traces (aegaeon-*.csv, azure-2023-*.csv); in a checkout, its own.",
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option(
    "--policies", "-p", multiple=True, type=click.Choice(list(POLICIES)), callback=_policies, help="Only these."
)
@click.option("--workloads", default="*", help="Only those whose name matches this pattern.")
@TRACES
def bench(as_json: bool, policies: list[str], workloads: str, traces: Path | None) -> None:
    """Compare the policies: every workload at every switch cost. All of it takes some minutes."""
    if not as_json:
        heads = ["workload", "service", "cost", "policy", "flight", "switches", "gpu", "TTFT", "p99", "e2e", "pause"]
        click.echo(COLUMNS.format(*heads))
    for row in run_all(cases(policies, workloads, traces), traces):
        click.echo(json.dumps(row) if as_json else _line(row))


def _line(row: dict[str, Any]) -> str:
    service = f"{row['service_secs']:g} s" if "service_secs" in row else row["service"]
    figures = [row["ttft"]["mean"], row["ttft"]["p99"], row["e2e"]["mean"], row["pause_max"]]
    return COLUMNS.format(
        row["workload"],
        service,
        f"{row['switch_cost']:g}",
        row["policy"],
        row["in_flight"],
        row["switches"],
        f"{row['gpu_fraction']:.3f}",
        *(f"{figure:.1f}" for figure in figures),
    )


@click.command()
@click.option(
    "--page",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=Path("docs/policies.md"),
    show_default=True,
    help="The page whose tables are written; its plots go to img/ beside it.",
)
@TRACES
def report(page: Path, traces: Path | None) -> None:
    """Run the whole comparison and write its tables and plots into a page."""
    rows = list(run_all(cases(list(POLICIES), "*", traces), traces))
    missed = write_report(rows, page)
    click.echo(f"{page}: written, {len(rows)} runs, {missed} figures not reached")

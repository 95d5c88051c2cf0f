"""How things are shown: tables on a terminal, plain columns elsewhere, progress while something runs.

Rich is imported only on the paths that print to a terminal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_UNITS = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))

_COLOURS = {
    "awake": "green",
    "asleep": "blue",
    "checkpointed": "blue",
    "failed": "red",
    "starting": "yellow",
    "waking": "yellow",
    "falling_asleep": "yellow",
    "stopping": "yellow",
}

MODEL_COLUMNS = ("MODEL", "STATE", "IN FLIGHT", "QUEUED", "EVICTION", "PID", "SINCE")
_NUMBERS = ("IN FLIGHT", "QUEUED", "PID")


def clean(text: object) -> str:
    """Text for a terminal: what could steer it is shown as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def duration(seconds: float) -> str:
    """A duration as people say it: 45 s, 3 m 20 s, 2 h 5 m, 3 d 4 h."""
    left = max(0, int(seconds))
    for (size, unit), (smaller, small_unit) in pairwise(_UNITS):
        if left >= size:
            return f"{left // size} {unit} {left % size // smaller} {small_unit}"
    return f"{left} s"


def count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def show_status(status: dict[str, Any]) -> None:
    """Print the daemon's status for a human."""
    models = status["models"]
    print("\n".join(headlines(status)))
    if not models:
        print("No models are configured.")
        return
    rows = [model_row(name, model) for name, model in models.items()]
    errors = {clean(name): first_line(model["last_error"]) for name, model in models.items()}
    print()
    if sys.stdout.isatty():
        _show_on_terminal(rows, errors)
    else:
        plain_table((*MODEL_COLUMNS, "LAST ERROR"), [[*row, errors[row[0]] or "-"] for row in rows])


def event_line(event: dict[str, Any], now: float) -> str:
    """An event for a human: when, and the sentence that it has."""
    text = event.get("text") or " ".join(f"{key}={value}" for key, value in event.items())
    return f"{time.strftime('%H:%M:%S', time.localtime(now))}  {clean(text)}"


def headlines(status: dict[str, Any]) -> list[str]:
    """What the status says above its table."""
    return [clean(line) for line in _headlines(status)]


def _headlines(status: dict[str, Any]) -> Iterator[str]:
    pinned = f", {status['pinned']} pinned" if status.get("pinned") else ""
    yield (
        f"llmuxd {status['version']}: {status['state']} (mode {status['mode']}{pinned}, policy {status['policy']}, "
        f"up {duration(status['uptime_secs'])})"
    )
    awake = ", ".join(status["active"]) or "none"
    yield f"awake: {awake}; queued: {status['queued']}; in flight: {status['in_flight']}"
    health = status.get("health", {"ok": True})
    if not health["ok"]:
        yield f"NOT WELL: {health['reason']}"
    switch = status.get("switch")
    if switch:
        out = ", ".join(switch["from"]) or "nothing"
        target = switch["to"] or "nothing"
        yield f"switch {switch['id']}: {out} -> {target}, {switch['phase']}, {duration(switch['seconds'])} so far"
    for device in status["devices"]:
        users = ", ".join(device["awake"])
        yield f"{device['name']}: {device['used']} of {device['capacity']} used" + (f" ({users})" if users else "")


def model_row(name: str, model: dict[str, Any]) -> list[str]:
    """The cells of a model."""
    state = model["engine"]
    if model.get("asleep_by"):
        state += f" ({model['asleep_by']})"
    if model.get("retry_in_secs") is not None:
        # Rounded up: "retry in 0 s" would be over.
        state += f" (retry in {duration(model['retry_in_secs'] + 0.999)})"
    cells = (
        name,
        state,
        model["in_flight"],
        model["queued"],
        f"auto: {model['eviction']}" if model.get("auto") else model["eviction"],
        model["pid"] or "-",
        duration(time.time() - model["since"]),
    )
    return [clean(cell) for cell in cells]


def first_line(error: str | None) -> str:
    lines = (error or "").strip().splitlines()
    return clean(lines[0]) if lines else ""


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns without frames, nothing cut off: for pipes and files."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def console(stderr: bool = False) -> Console:
    """Rich's, as the environment wants it."""
    from rich.console import Console

    return Console(stderr=stderr, no_color=bool(os.environ.get("NO_COLOR")), highlight=False)


def styled(text: str, **style: Any) -> str:
    """Text with click's styles, where standard output is a terminal that wants them."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else click.style(text, **style)


def _show_on_terminal(rows: Sequence[Sequence[str]], errors: dict[str, str]) -> None:
    """A table, its cells broken into lines if it must be narrow; a paragraph per model if even that is too wide."""
    from rich.text import Text

    screen = console()
    table = fitting_table(rows, screen.width)
    if table is not None:
        screen.print(table)
    else:
        for name, state, in_flight, queued, eviction, pid, since in rows:
            screen.print(Text.assemble((name, "bold"), ": ", (state, _colour_of(state))), soft_wrap=True)
            line = f"  {in_flight} in flight, {queued} queued, {eviction}, pid {pid}, since {since}"
            screen.print(Text(line), soft_wrap=True)
    for name, error in errors.items():
        if error:
            screen.print(Text.assemble("last error of ", (name, "bold"), ": ", (error, "red")), soft_wrap=True)


def fitting_table(rows: Sequence[Sequence[str]], width: int) -> Table | None:
    """The table of the models, as wide as it can be; None if even the narrow one does not fit."""
    for layout in ((MODEL_COLUMNS, rows), _narrow(rows)):
        if _width(*layout) <= width:
            return _rich_table(*layout)
    return None


def _narrow(rows: Sequence[Sequence[str]]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    columns = [column.replace(" ", "\n") for column in MODEL_COLUMNS]
    return columns, [[row[0], *(cell.replace("+", "+\n").replace(" (", "\n(") for cell in row[1:])] for row in rows]


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    from rich.cells import cell_len

    gaps = 2 * (len(columns) - 1)
    return gaps + sum(
        max(cell_len(line) for row in (columns, *rows) for line in row[i].splitlines() or [""])
        for i in range(len(columns))
    )


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), collapse_padding=True, header_style="bold")
    for name, column in zip(MODEL_COLUMNS, columns, strict=True):
        table.add_column(column, justify="right" if name in _NUMBERS else "left", no_wrap=True)
    for row in rows:
        cells = [Text(cell) for cell in row]
        cells[1].stylize(_colour_of(row[1]))
        table.add_row(*cells)
    return table


def _colour_of(state: str) -> str:
    return _COLOURS.get(state.split()[0] if state.strip() else "", "")


class Progress:
    """Tells the steps of a long operation on standard error: a line each; on a terminal the seconds, too."""

    def __init__(self) -> None:
        self._live: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.progress import Progress as Bar
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
            self._live = Bar(*columns, console=console(stderr=True), transient=True)
            self._live.start()
            self._task = self._live.add_task("waiting", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, text: str) -> None:
        """Tell one step."""
        text = clean(text)
        if self._live is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._live.console.print(text, markup=False)
            self._live.update(self._task, description=text)

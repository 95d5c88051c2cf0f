"""How things are shown: tables on a terminal, plain columns elsewhere, progress while something runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

_UNITS = ((86400, "d"), (3600, "h"), (60, "m"))

_COLOURS = {
    "awake": "green",
    "asleep": "blue",
    "failed": "red",
    "starting": "yellow",
    "waking": "yellow",
    "falling_asleep": "yellow",
    "stopping": "yellow",
}

MODEL_COLUMNS = ("MODEL", "STATE", "IN FLIGHT", "QUEUED", "EVICTION", "PID", "SINCE", "LAST ERROR")


def clean(text: object) -> str:
    """Text for a terminal: what could steer it is shown as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def duration(seconds: float) -> str:
    """A duration as people say it: 45 s, 3 m 20 s, 2 h 5 m, 3 d 4 h."""
    left = max(0, int(seconds))
    for number, (size, unit) in enumerate(_UNITS):
        if left >= size:
            smaller, small_unit = _UNITS[number + 1] if number + 1 < len(_UNITS) else (1, "s")
            return f"{left // size} {unit} {left % size // smaller} {small_unit}"
    return f"{left} s"


def show_status(status: dict[str, Any]) -> None:
    """Print the daemon's status for a human."""
    for line in _headlines(status):
        print(clean(line))
    rows = [_model_row(name, model) for name, model in status["models"].items()]
    if not rows:
        print("No models are configured.")
    elif sys.stdout.isatty():
        _rich_table(MODEL_COLUMNS, rows)
    else:
        plain_table(MODEL_COLUMNS, rows)


def _headlines(status: dict[str, Any]) -> Iterable[str]:
    pinned = f", {status['pinned']} pinned" if status.get("pinned") else ""
    awake = ", ".join(status["active"]) or "none"
    yield (
        f"llmuxd {status['version']}: {status['state']} (mode {status['mode']}{pinned}, policy {status['policy']}, "
        f"up {duration(status['uptime_secs'])})"
    )
    yield f"awake: {awake}; queued: {status['queued']}; in flight: {status['in_flight']}"
    switch = status.get("switch")
    if switch:
        out = ", ".join(switch["from"]) or "nothing"
        target = switch["to"] or "nothing"
        yield f"switch {switch['id']}: {out} -> {target}, {switch['phase']} for {duration(switch['seconds'])}"


def _model_row(name: str, model: dict[str, Any]) -> list[str]:
    state = model["engine"]
    if model.get("asleep_by"):
        state += f" ({model['asleep_by']})"
    if model.get("retry_in_secs") is not None:
        state += f" (retry in {duration(model['retry_in_secs'] + 0.999)})"
    return [
        clean(name),
        state,
        str(model["in_flight"]),
        str(model["queued"]),
        model["eviction"],
        str(model["pid"] or "-"),
        duration(time.time() - model["since"]),
        clean((model["last_error"] or "-").splitlines()[0]),
    ]


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns without frames, nothing cut off: for pipes and files."""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(no_color=bool(os.environ.get("NO_COLOR")), highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # The name is what one came for: it is neither wrapped nor cut.
        justify = "right" if column in ("IN FLIGHT", "QUEUED", "PID") else "left"
        table.add_column(column, justify=justify, no_wrap=column in ("MODEL", "PID"), overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        colour = _COLOURS.get(row[1].partition(" ")[0], "")
        cells = [Text(cell) for cell in row]
        cells[1].stylize(colour)
        if row[-1] != "-":
            cells[-1].stylize("red")
        table.add_row(*cells)
    console.print(table)


class Progress:
    """Tells the steps of a long operation on standard error: a line each; on a terminal the seconds, too."""

    def __init__(self) -> None:
        self._status: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            console = Console(stderr=True, no_color=bool(os.environ.get("NO_COLOR")), highlight=False)
            columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
            self._status = Bar(*columns, console=console, transient=True)
            self._status.start()
            self._task = self._status.add_task("waiting", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def step(self, text: str) -> None:
        """Tell one step."""
        text = clean(text)
        if self._status is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._status.console.print(text, markup=False)
            self._status.update(self._task, description=text)

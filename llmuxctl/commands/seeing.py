"""The commands that show something and change nothing."""

from __future__ import annotations

import json
import sys
import time
from itertools import islice
from urllib.parse import urlencode

import click

from llmuxctl.client import Failed
from llmuxctl.output import event_line, show_status
from llmuxctl.session import Session, json_option, pass_session
from llmuxctl.words import MODEL
from llmuxd.protocol import Exit
from llmuxd.version import __version__


@click.command()
@json_option
@pass_session
def status(session: Session) -> None:
    """Show models, engines, queues and devices.

    \b
    llmuxctl status
    llmuxctl status --json | jq '.models[].engine'
    """
    answer = session.client.get("status")
    if session.as_json:
        print(json.dumps(answer, indent=2))
    else:
        show_status(answer)


@click.command()
@click.argument("model", type=MODEL)
@click.option("-f", "--follow", is_flag=True, help="Go on as the log grows, until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0), default=50, show_default=True, help="Begin with so many.")
@pass_session
def logs(session: Session, model: str, follow: bool, lines: int) -> None:
    """Print the log of MODEL's engine, as it is. It goes on when the engine is started again.

    \b
    llmuxctl logs qwen -n 200
    llmuxctl logs qwen -f
    """
    query = urlencode({"model": model, "lines": lines, "follow": int(follow)})
    try:
        for chunk in session.client.chunks(f"logs?{query}"):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        if not follow:
            raise


@click.command()
@click.option("-f", "--follow", is_flag=True, help="As it is in any case: there is no end but Ctrl-C and --count.")
@click.option("-n", "--count", type=click.IntRange(1), metavar="N", help="End after so many.")
@json_option
@pass_session
def events(session: Session, follow: bool, count: int | None) -> None:
    """Print what happens to engines and switches from now on, a line each, until Ctrl-C.

    \b
    llmuxctl events
    llmuxctl events --json | jq -c 'select(.event == "engine")'
    """
    happening = session.client.lines("events")
    try:
        for event in islice(happening, count):
            line = json.dumps(event) if session.as_json else event_line(event, time.time())
            print(line, flush=True)
    except KeyboardInterrupt:
        return
    finally:
        # Broken off by us, which is no failure.
        happening.close()


@click.command()
@click.option(
    "-i", "--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, metavar="SECONDS", help="How often."
)
@pass_session
def top(session: Session, interval: float) -> None:
    """Show the status again and again, until q or Ctrl-C. It goes on through a restart of the daemon.

    \b
    llmuxctl top
    """
    if not sys.stdout.isatty():
        raise click.UsageError("`top` needs a terminal; in a script use `llmuxctl status --json`, or `llmuxctl events`")
    from llmuxctl.top import watch

    watch(session.client, interval)


@click.command()
@json_option
@pass_session
def version(session: Session) -> None:
    """Print the versions of llmuxctl and of the daemon, if it runs."""
    daemon = None
    try:
        daemon = session.client.get("status")["version"]
    except Failed as failed:
        if failed.exit_code is not Exit.UNREACHABLE:
            raise
    if session.as_json:
        print(json.dumps({"llmuxctl": __version__, "llmuxd": daemon}))
    else:
        print(f"llmuxctl {__version__}\nllmuxd   {daemon or 'is not running'}")

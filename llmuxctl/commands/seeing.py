"""The commands that show something and change nothing."""

from __future__ import annotations

import json
import sys
from urllib.parse import urlencode

import click

from llmuxctl.client import Failed
from llmuxctl.output import show_status
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

"""What the commands share: the daemon to talk to, and whether it is JSON that they print.

The commands are in `llmuxctl.commands`, the group that holds them in `llmuxctl.cli`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

from llmuxctl.client import Client
from llmuxctl.output import clean

Command = Callable[..., Any]

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class Session:
    """What the options in front of the command say."""

    def __init__(self, socket: str, as_json: bool) -> None:
        self.client = Client(socket)
        self.as_json = as_json

    def show(self, answer: dict[str, Any]) -> None:
        """Print a short call's answer."""
        print(json.dumps(answer, indent=2) if self.as_json else clean(answer["message"]))


def json_option(command: Command) -> Command:
    """`--json` after the command does what it does in front of it."""

    def remember(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if value:
            session = context.find_object(Session)
            # There is none while a shell completes the line.
            if session is not None:
                session.as_json = True

    return click.option("--json", is_flag=True, expose_value=False, callback=remember, help="Print JSON.")(command)


pass_session = click.make_pass_decorator(Session)

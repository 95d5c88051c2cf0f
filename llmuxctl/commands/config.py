"""The commands about the configuration: the file, and what the daemon runs with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from llmuxctl.changes import show_changes
from llmuxctl.output import clean, count
from llmuxctl.session import Session, json_option, pass_session
from llmuxd.protocol import DEFAULT_CONFIG_PATH, Exit


@click.group()
def config() -> None:
    """Check a configuration file, show the one in force, or what a reload would change."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path, readable=False), default=DEFAULT_CONFIG_PATH)
@json_option
@pass_session
def check(session: Session, file: Path) -> None:
    """Check FILE (default: /etc/llmux/llmux.toml), without a daemon.

    Every problem is printed, not just the first. Exit code 2 if there is one.

    \b
    llmuxctl config check
    llmuxctl config check ./llmux.toml
    """
    from llmuxd.config import ConfigError, load_config

    models: list[str] = []
    warnings: list[str] = []
    problems: list[str] = []
    try:
        loaded = load_config(file)
        models, warnings = list(loaded.models), list(loaded.warnings)
    except ConfigError as error:
        problems = str(error).splitlines()
    if session.as_json:
        found = {"file": str(file), "models": models, "warnings": warnings, "problems": problems}
        print(json.dumps(found, indent=2))
    else:
        for line in (*(f"warning: {warning}" for warning in warnings), *problems):
            print(clean(line), file=sys.stderr)
        if not problems:
            print(f"{clean(file)}: {count(len(models), 'model')}, no errors")
    if problems:
        click.get_current_context().exit(Exit.USAGE)


@config.command()
@json_option
@pass_session
def show(session: Session) -> None:
    """Print the configuration that the daemon runs with, as JSON, secrets masked."""
    print(json.dumps(session.client.get("config"), indent=2))


@config.command()
@json_option
@pass_session
def diff(session: Session) -> None:
    """Show what a reload would change, and when each change would take effect. Nothing is changed.

    Exit code 2, and every problem, if the configuration on disk is bad.

    \b
    llmuxctl config diff
    llmuxctl config diff --json | jq -r '.changes[].path'
    """
    answer = session.client.get("config/diff")
    problems = answer.get("problems") or []
    if session.as_json:
        print(json.dumps(answer, indent=2))
    elif problems:
        for problem in problems:
            print(clean(problem), file=sys.stderr)
        print("A reload would change nothing.", file=sys.stderr)
    else:
        show_changes(answer["file"], answer["changes"])
    if problems:
        click.get_current_context().exit(Exit.USAGE)

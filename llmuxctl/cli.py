"""The commands of `llmuxctl`.

Exit codes are `llmuxd.protocol.Exit`, and as in a shell 130 for Ctrl-C and 141 if the reader of the output is gone.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from llmuxctl.client import Client, Failed, failure_of
from llmuxctl.output import Progress, clean, plain_table, show_status
from llmuxd.protocol import CONTROL_SOCKET_ENV, DEFAULT_CONFIG_PATH, Exit, default_control_socket
from llmuxd.version import __version__

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

Command = Callable[..., Any]


class Session:
    """What the options in front of the command say."""

    def __init__(self, socket: str, as_json: bool) -> None:
        self.client = Client(socket)
        self.as_json = as_json

    def show(self, answer: dict[str, Any]) -> None:
        """Print a short call's answer."""
        print(json.dumps(answer, indent=2) if self.as_json else clean(answer["message"]))


def _json_option(command: Command) -> Command:
    """`--json` after the command does what it does in front of it."""

    def remember(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
        if value:
            context.find_object(Session).as_json = True  # type: ignore[union-attr]

    return click.option("--json", is_flag=True, expose_value=False, callback=remember, help="Print JSON.")(command)


_pass = click.make_pass_decorator(Session)


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; here, since click has a way of its own with a reader that is gone."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            # Python would stumble over it again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(EXIT_BROKEN_PIPE)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    envvar=CONTROL_SOCKET_ENV,
    default=default_control_socket,
    metavar="PATH",
    help=(
        f"The daemon's control socket (default: {CONTROL_SOCKET_ENV}, else control.sock in LLMUX_RUNTIME_DIR, "
        "else /run/llmux/control.sock)."
    ),
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON; also allowed after the command.")
@click.version_option(__version__, prog_name="llmuxctl")
@click.pass_context
def group(context: click.Context, socket: str, as_json: bool) -> None:
    """Show and steer a running llmuxd.

    \b
    llmuxctl status
    llmuxctl switch qwen
    llmuxctl --json status | jq .models.qwen.engine

    \b
    Exit codes: 0 done, 1 it failed, 2 usage or config, 3 daemon not reachable,
    4 no such model, 5 not allowed.
    """
    context.obj = Session(socket, as_json)


def main() -> None:
    """The entry point: turns every failure into a sentence and an exit code."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")
    try:
        sys.exit(group(standalone_mode=False))
    except click.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)


# Seeing


@group.command()
@_json_option
@_pass
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


@group.command()
@click.argument("model")
@click.option("-f", "--follow", is_flag=True, help="Go on as the log grows, until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0), default=50, show_default=True, help="Begin with so many.")
@_pass
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


@group.command()
@_json_option
@_pass
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


# Doing


def _run(session: Session, call: str, **body: Any) -> None:
    """Run a long operation, telling its steps. Raises Failed if it does, or if Ctrl-C ends the waiting for it."""
    steps = session.client.steps(call, **{key: value for key, value in body.items() if value is not None})
    try:
        last = _tell_json(steps) if session.as_json else _tell(steps)
    except KeyboardInterrupt:
        text = "\nNot waiting any more. What the daemon has begun goes on; `llmuxctl status` shows it."
        raise Failed(EXIT_INTERRUPTED, text) from None
    failure = failure_of(last)
    if failure is not None and session.as_json:
        click.get_current_context().exit(failure.exit_code)
    if failure is not None:
        raise failure
    if not session.as_json:
        print(clean(last["message"]))


def _tell_json(steps: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Pass the steps on; returns the last one."""
    last: dict[str, Any] = {}
    for last in steps:
        print(json.dumps(last), flush=True)
    return last


def _tell(steps: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Tell the steps to a human; returns the last one, the result."""
    last: dict[str, Any] = {}
    with Progress() as progress:
        for last in steps:
            if "result" not in last:
                progress.step(last["text"])
    return last


@group.command()
@click.argument("model")
@_json_option
@_pass
def switch(session: Session, model: str) -> None:
    """Make MODEL awake now, without the cooldown. In manual mode it becomes the pinned one.

    The steps are told while it runs. Ctrl-C ends the telling, not the switch.

    \b
    llmuxctl switch qwen
    llmuxctl switch qwen --json
    """
    _run(session, "switch", model=model)


@group.command()
@click.argument("model")
@_json_option
@_pass
def wake(session: Session, model: str) -> None:
    """Make MODEL awake, in its turn, as a request for it would.

    \b
    llmuxctl wake qwen
    """
    _run(session, "wake", model=model)


@group.command()
@click.argument("model")
@click.option("--eviction", metavar="WEIGHTS+PROCESS", help="Instead of the model's own policy.")
@_json_option
@_pass
def sleep(session: Session, model: str, eviction: str | None) -> None:
    """Let MODEL finish what it has in flight, and put it to sleep.

    \b
    llmuxctl sleep qwen
    llmuxctl sleep qwen --eviction discard+keep_running
    """
    _run(session, "sleep", model=model, eviction=eviction)


@group.command()
@click.argument("model")
@_json_option
@_pass
def stop(session: Session, model: str) -> None:
    """Let MODEL finish what it has in flight, and stop its engine. A second time: at once.

    \b
    llmuxctl stop qwen
    """
    _run(session, "stop", model=model)


@group.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@_json_option
@_pass
def warmup(session: Session, models: tuple[str, ...]) -> None:
    """Warm each MODEL (all, if none is named): start it, one inference, put it to sleep.

    \b
    llmuxctl warmup
    llmuxctl warmup qwen mistral
    """
    _run(session, "warmup", models=list(models) or None)


@group.command()
@click.argument("model")
@_json_option
@_pass
def pin(session: Session, model: str) -> None:
    """Make MODEL awake and keep it so: manual mode, requests for other models are refused.

    \b
    llmuxctl pin qwen
    llmuxctl unpin
    """
    _run(session, "pin", model=model)


@group.command()
@_json_option
@_pass
def unpin(session: Session) -> None:
    """Back to auto mode."""
    session.show(session.client.post("unpin"))


@group.command()
@click.argument("mode", type=click.Choice(["auto", "manual"]))
@_json_option
@_pass
def mode(session: Session, mode: str) -> None:
    """Switch by the policy (auto), or only when an operator says so (manual).

    \b
    llmuxctl mode manual
    llmuxctl mode auto
    """
    session.show(session.client.post("mode", mode=mode))


@group.command()
@click.argument("model", required=False)
@click.argument("policy", required=False, metavar="[WEIGHTS+PROCESS]")
@_json_option
@_pass
def eviction(session: Session, model: str | None, policy: str | None) -> None:
    """Show the eviction policies, or change one until the daemon ends.

    \b
    WEIGHTS: retain, offload (sleep level 1), discard (level 2)
    PROCESS: keep_running, cuda_suspend, checkpoint, stop

    \b
    llmuxctl eviction
    llmuxctl eviction qwen discard+keep_running
    """
    if model is not None and policy is not None:
        session.show(session.client.post("eviction", model=model, eviction=policy))
        return
    query = "" if model is None else "?" + urlencode({"model": model})
    answer = session.client.get(f"eviction{query}")
    if session.as_json:
        print(json.dumps(answer, indent=2))
        return
    rows = [
        [clean(cell) for cell in (name, "{weights}+{process}".format(**m["eviction"]), m["process_state"])]
        for name, m in answer["models"].items()
    ]
    plain_table(("MODEL", "EVICTION", "STATE"), rows)


# The configuration


@group.group()
def config() -> None:
    """Check a configuration file, or show the one in force."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path), default=DEFAULT_CONFIG_PATH)
@_json_option
@_pass
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
            print(f"{clean(file)}: {len(models)} models, no errors")
    if problems:
        click.get_current_context().exit(Exit.USAGE)


@config.command()
@_json_option
@_pass
def show(session: Session) -> None:
    """Print the configuration that the daemon runs with, as JSON, secrets masked."""
    print(json.dumps(session.client.get("config"), indent=2))

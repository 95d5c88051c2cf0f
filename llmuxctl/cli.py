"""The commands of `llmuxctl`. Exit codes are `llmuxd.protocol.Exit`; Ctrl-C is 130."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click

from llmuxctl.client import Client, Failed, exit_of
from llmuxctl.output import Progress, clean, plain_table, show_status
from llmuxd.protocol import DEFAULT_CONFIG_PATH, Exit, default_control_socket
from llmuxd.version import __version__

EXIT_INTERRUPTED = 130

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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    envvar="LLMUX_CONTROL_SOCKET",
    default=default_control_socket,
    metavar="PATH",
    help="The daemon's control socket (default: /run/llmux/control.sock, or the one in LLMUX_RUNTIME_DIR).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.version_option(__version__, prog_name="llmuxctl")
@click.pass_context
def group(context: click.Context, socket: str, as_json: bool) -> None:
    """Show and steer a running llmuxd.

    \b
    Exit codes: 0 done, 1 it failed, 2 usage or config, 3 daemon not reachable,
    4 no such model, 5 not allowed.
    """
    context.obj = Session(socket, as_json)


def main() -> None:
    """The entry point: turns every failure into a sentence and an exit code."""
    try:
        group(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        print("\nInterrupted; what the daemon has begun goes on.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Failed as failed:
        print("\n".join(map(clean, str(failed).splitlines())), file=sys.stderr)
        sys.exit(failed.exit_code)
    except BrokenPipeError:
        # The reader, a pager or head, has seen enough; Python must not stumble over it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Seeing


@group.command()
@_json_option
@_pass
def status(session: Session) -> None:
    """Show models, engines, queues and devices."""
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
    """Print the log of a model's engine.

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
    """Print the versions of llmuxctl and of the daemon."""
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
    """Run a long operation, telling its steps; exits with what came of it."""
    steps = session.client.steps(call, **{key: value for key, value in body.items() if value is not None})
    last: dict[str, Any] = {}
    if session.as_json:
        for last in steps:
            print(json.dumps(last), flush=True)
    else:
        with Progress() as progress:
            for last in steps:
                if "result" not in last:
                    progress.step(last["text"])
        if last["result"] == "ok":
            print(clean(last["message"]))
        else:
            raise Failed(exit_of(last), last["error"])
    sys.exit(exit_of(last))


@group.command()
@click.argument("model")
@_json_option
@_pass
def switch(session: Session, model: str) -> None:
    """Make MODEL awake now, without the cooldown. In manual mode it becomes the pinned one."""
    _run(session, "switch", model=model)


@group.command()
@click.argument("model")
@_json_option
@_pass
def wake(session: Session, model: str) -> None:
    """Make MODEL awake, in its turn, as a request for it would."""
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
    """Let MODEL finish what it has in flight, and stop its engine. A second time: at once."""
    _run(session, "stop", model=model)


@group.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@_json_option
@_pass
def warmup(session: Session, models: tuple[str, ...]) -> None:
    """Warm each MODEL (all, if none is named): start it, one inference, put it to sleep."""
    _run(session, "warmup", models=list(models) or None)


@group.command()
@click.argument("model")
@_json_option
@_pass
def pin(session: Session, model: str) -> None:
    """Make MODEL awake and keep it so: manual mode, requests for other models are refused."""
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
    """Switch by the policy (auto), or only when an operator says so (manual)."""
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
    llmuxctl eviction qwen discard+keep_running
    """
    if model is not None and policy is not None:
        session.show(session.client.post("eviction", model=model, eviction=policy))
        return
    models = session.client.get("eviction")["models"]
    if model is not None:
        if model not in models:
            raise Failed(Exit.NO_SUCH_MODEL, f"no model {model!r}; configured: {', '.join(models) or 'none'}")
        models = {model: models[model]}
    if session.as_json:
        print(json.dumps({"models": models}, indent=2))
        return
    rows = [
        [clean(name), f"{m['eviction']['weights']}+{m['eviction']['process']}", m["process_state"]]
        for name, m in models.items()
    ]
    plain_table(("MODEL", "EVICTION", "STATE"), rows)


# The configuration


@group.group()
def config() -> None:
    """Check a configuration file, or show the one in force."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path), default=DEFAULT_CONFIG_PATH)
def check(file: Path) -> None:
    """Check FILE (default: /etc/llmux/llmux.toml) without a daemon. Exit code 2 if it is wrong."""
    from llmuxd.config import ConfigError, load_config

    try:
        loaded = load_config(file)
    except ConfigError as error:
        raise Failed(Exit.USAGE, str(error)) from None
    for warning in loaded.warnings:
        print(f"warning: {clean(warning)}", file=sys.stderr)
    print(f"{file}: {len(loaded.models)} models, no errors")


@config.command()
@_pass
def show(session: Session) -> None:
    """Print the configuration that the daemon runs with, as JSON, secrets masked."""
    print(json.dumps(session.client.get("config"), indent=2))

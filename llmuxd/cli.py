"""The command line of `llmuxd`.

Exit codes: 0 stopped as asked, 1 cannot serve here, 2 usage or config, 75 the engines are left to the next daemon.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmuxd.protocol import DEFAULT_CONFIG_PATH, state_dir
from llmuxd.version import __version__

if TYPE_CHECKING:
    from llmuxd.daemon import Ending

log = logging.getLogger("llmuxd")

EXIT_CANNOT_SERVE = 1
EXIT_BAD_CONFIG = 2
EXIT_HANDED_OVER = 75
STOP_GRACE_SECS = 10.0
"""What --stop-engines gives an engine to end by itself."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, readable=False),
    default=DEFAULT_CONFIG_PATH,
    show_default=True,
    metavar="FILE",
    help="TOML, or the JSON of llmux 0.7 if the name ends in .json.",
)
@click.option("--check", is_flag=True, help="Check the config, print what is wrong with it, and exit.")
@click.option("--stop-engines", is_flag=True, help="End every engine that a llmuxd has left behind, and exit.")
@click.option("--demo", is_flag=True, help="Serve three simulated models: no GPU, no root, no config.")
@click.option("--port", type=click.IntRange(0, 65535), help="With --demo: the port (default: 3000 if it is free).")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="What is logged to standard error.",
)
@click.version_option(__version__, prog_name="llmuxd")
def main(config_path: Path, check: bool, stop_engines: bool, demo: bool, port: int | None, log_level: str) -> None:
    """Serve more vLLM models than fit in GPU memory behind one OpenAI-compatible port.

    Runs in the foreground until SIGTERM or Ctrl-C, which lets requests in flight finish and stops every
    engine; a second one hurries. SIGUSR2 ends llmuxd alone: the engines run on, and the next llmuxd takes them over.
    SIGHUP reads the config anew; in a terminal, it ends llmuxd as SIGTERM does. LLMUX_RUNTIME_DIR and LLMUX_STATE_DIR
    move its folders away from /run/llmux and /var/lib/llmux for a user without root.
    """
    from llmuxd import logs

    logs.set_up(log_level)
    if demo and check:
        raise click.UsageError("--check is for a config, and --demo has none")
    if port is not None and not demo:
        raise click.UsageError("--port is for --demo; otherwise the config's `port` counts")
    if stop_engines:
        _stop_engines()
        return
    if demo:
        from llmuxd.demo import run_demo

        _serving(run_demo(port))
        return

    from llmuxd.config import ConfigError, load_config

    try:
        config = load_config(config_path)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(EXIT_BAD_CONFIG)
    for warning in config.warnings:
        click.echo(f"warning: {warning}", err=True)
    if check:
        count = len(config.models)
        click.echo(f"{config_path}: {count} {'model' if count == 1 else 'models'}, no errors")
        return

    from llmuxd.daemon import serve

    _serving(serve(config, config_path))


def _stop_engines() -> None:
    from llmuxd.adoption import stop_engines
    from llmuxd.engine import EngineError

    try:
        ended = asyncio.run(stop_engines(Path(state_dir()).absolute(), STOP_GRACE_SECS))
    except EngineError as error:
        click.echo(f"llmuxd: {error.reason}", err=True)
        sys.exit(EXIT_CANNOT_SERVE)
    click.echo(f"{ended} {'engine' if ended == 1 else 'engines'} ended" if ended else "no engines are there")


def _run(serving: Coroutine[Any, Any, Ending]) -> Ending:
    """In uvloop's event loop, if that is installed: it takes half the time for the same work."""
    try:
        import uvloop
    except ImportError:
        log.debug("event loop: asyncio")
        return asyncio.run(serving)
    log.debug("event loop: uvloop")
    # asyncio.Runner came with Python 3.11, uvloop.run with uvloop 0.18.
    loop = uvloop.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        ending: Ending = loop.run_until_complete(serving)
        return ending
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        asyncio.set_event_loop(None)
        loop.close()


def _serving(serving: Coroutine[Any, Any, Ending]) -> None:
    from llmuxd.daemon import CannotServe, Ending

    try:
        how = _run(serving)
    except CannotServe as error:
        click.echo(f"llmuxd: {error}", err=True)
        sys.exit(EXIT_CANNOT_SERVE)
    if how is Ending.HANDED_OVER:
        sys.exit(EXIT_HANDED_OVER)

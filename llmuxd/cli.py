"""The command line of `llmuxd`. Exit codes: 0 stopped as asked, 1 cannot serve here, 2 usage or config."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

import click

from llmuxd.protocol import DEFAULT_CONFIG_PATH
from llmuxd.version import __version__

EXIT_CANNOT_SERVE = 1
EXIT_BAD_CONFIG = 2


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=DEFAULT_CONFIG_PATH,
    show_default=True,
    metavar="FILE",
    help="TOML, or the JSON of llmux 0.7 if the name ends in .json.",
)
@click.option("--check", is_flag=True, help="Check the config, print what is wrong with it, and exit.")
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
def main(config_path: Path, check: bool, demo: bool, port: int | None, log_level: str) -> None:
    """Serve more vLLM models than fit in GPU memory behind one OpenAI-compatible port.

    Runs in the foreground until SIGTERM or Ctrl-C, which lets requests in flight finish and stops every
    engine; a second one hurries. LLMUX_RUNTIME_DIR and LLMUX_STATE_DIR move its folders away from /run/llmux
    and /var/lib/llmux for a user without root.
    """
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    if demo and check:
        raise click.UsageError("--check is for a config, and --demo has none")
    if port is not None and not demo:
        raise click.UsageError("--port is for --demo; otherwise the config's `port` counts")
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
        click.echo(f"{config_path}: {len(config.models)} models, no errors")
        return

    from llmuxd.daemon import serve

    _serving(serve(config))


def _serving(serving: object) -> None:
    from llmuxd.daemon import CannotServe

    assert asyncio.iscoroutine(serving)
    try:
        asyncio.run(serving)
    except CannotServe as error:
        click.echo(f"llmuxd: {error}", err=True)
        sys.exit(EXIT_CANNOT_SERVE)

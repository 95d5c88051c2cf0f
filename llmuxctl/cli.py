"""The group of all commands of `llmuxctl`, and its entry point.

Exit codes are `llmuxd.protocol.Exit`, and as in a shell 130 for Ctrl-C and 141 if the reader of the output is gone.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import click

from llmuxctl.client import Failed
from llmuxctl.commands import config, doctor, doing, key, saving, seeing
from llmuxctl.session import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED, Session
from llmuxd.protocol import CONTROL_SOCKET_ENV, Exit, default_control_socket
from llmuxd.version import __version__


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; here, since click has a way of its own with a reader that is gone."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            _write_no_more()
            ctx.exit(EXIT_BROKEN_PIPE)
        except OSError as error:
            # What a command does not expect is its output: a full disk, a terminal that is gone.
            _write_no_more()
            raise Failed(Exit.FAILED, f"llmuxctl: {error.strerror or error}") from None


def _write_no_more() -> None:
    """Python would stumble over the output again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    type=click.Path(readable=False),
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


for _command in (
    seeing.status,
    seeing.logs,
    seeing.events,
    seeing.top,
    seeing.version,
    doing.switch,
    doing.wake,
    doing.sleep,
    doing.stop,
    doing.warmup,
    doing.pin,
    doing.unpin,
    doing.mode,
    doing.eviction,
    saving.checkpoint,
    saving.restore,
    saving.validate,
    doing.reload,
    config.config,
    key.key,
    doctor.doctor,
):
    group.add_command(_command)


def main() -> None:
    """The entry point: turns every failure into a sentence and an exit code."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")
    try:
        # By its own name, however it was started: the completion asks for it by that.
        sys.exit(group.main(prog_name="llmuxctl", standalone_mode=False))
    except click.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)

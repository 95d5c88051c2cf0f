"""The command that looks at the box."""

from __future__ import annotations

import json
from pathlib import Path

import click

from llmuxctl.session import Session, json_option, pass_session
from llmuxd.protocol import DEFAULT_CONFIG_PATH, Exit


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, readable=False),
    default=DEFAULT_CONFIG_PATH,
    show_default=True,
    metavar="FILE",
    help="The configuration that the daemon is, or will be, started with.",
)
@json_option
@pass_session
def doctor(session: Session, config_path: Path) -> None:
    """Check this box, and say what to do: GPUs, vLLM, memory, disks, checkpoints, ports, the config, the service.

    Works without a daemon, and as any user; as root it sees more. Nothing is changed. Exit code 0 if nothing is
    wrong, 1 if something is.

    \b
    llmuxctl doctor
    llmuxctl doctor --json | jq '.[] | select(.status == "fail")'
    """
    from llmuxctl.doctor.box import Box
    from llmuxctl.doctor.examine import as_json, examine, is_wrong, tell
    from llmuxctl.doctor.situation import look

    found = examine(look(Box(), session.client.path, config_path.absolute()))
    if session.as_json:
        print(json.dumps(as_json(found), indent=2))
    else:
        tell(found)
    if is_wrong(found):
        click.get_current_context().exit(Exit.FAILED)

"""The commands about the keys of clients. They need no daemon: the config has the hashes, and nobody has the keys."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from llmuxctl.session import Session, json_option, pass_session
from llmuxctl.words import MODEL

PREFIX = "llmux-"
"""What a key begins with, so that one is known for what it is wherever it turns up."""

KEY_BYTES = 32


@click.group()
def key() -> None:
    """Make keys for clients."""


@key.command()
@click.argument("name")
@click.option("--models", type=MODEL, multiple=True, metavar="MODEL", help="A model that it may use; once for each.")
@click.option("--requests-per-minute", type=int, metavar="N", help="Requests that it may make in any 60 seconds.")
@click.option("--max-parallel", type=int, metavar="N", help="Requests that it may have at once, waiting ones included.")
@click.option(
    "--priority", type=int, metavar="N", help="Of its requests, -100 to 100; they may ask for less, not for more."
)
@json_option
@pass_session
def new(
    session: Session,
    name: str,
    models: tuple[str, ...],
    requests_per_minute: int | None,
    max_parallel: int | None,
    priority: int | None,
) -> None:
    """Make a key, and print it once: nothing keeps it. NAME is the word for it in the access log.

    The key is printed on standard output, and on standard error a table [[keys]] with its hash, which belongs into
    the configuration and counts with the next reload. To revoke the key, remove its table, and reload.

    \b
    llmuxctl key new alice
    llmuxctl key new bob --models qwen --models mistral --requests-per-minute 60
    KEY=$(llmuxctl key new ci --max-parallel 4)
    """
    import hashlib
    import secrets

    made = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    sha256 = hashlib.sha256(made.encode()).hexdigest()
    bounds = {"requests_per_minute": requests_per_minute, "max_parallel": max_parallel, "priority": priority}
    toml = _table({"name": name, "sha256": sha256, "models": list(models) or None, **bounds})
    if session.as_json:
        print(json.dumps({"key": made, "name": name, "sha256": sha256, "toml": toml}, indent=2))
        return
    print(made, flush=True)
    print("# The key is printed once, and kept nowhere. This belongs into the config,", file=sys.stderr)
    print("# into a file in /etc/llmux/conf.d for instance, and counts with `llmuxctl reload`.", file=sys.stderr)
    print(toml, end="", file=sys.stderr)


def _table(values: dict[str, Any]) -> str:
    """The table of a key, as TOML. What the config would not take is wrong usage here."""
    from llmuxd.config.errors import shown
    from llmuxd.config.kinds import Wrong
    from llmuxd.config.schema import TABLES

    lines = ["[[keys]]"]
    for name, value in values.items():
        if value is None:
            continue
        kind = TABLES["keys[]"][name].kind
        try:
            kind.read(value)
        except Wrong:
            option = "NAME" if name == "name" else f"--{name.replace('_', '-')}"
            raise click.BadParameter(f"found {shown(value)}; allowed: {kind.allowed}", param_hint=option) from None
        # Numbers, printable strings and lists of them are written in TOML as in JSON.
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join([*lines, ""])

"""The commands about images and evictions: save an engine, restore it, see that each eviction can be undone."""

from __future__ import annotations

from typing import Any

import click

from llmuxctl.client import failure_of
from llmuxctl.commands.doing import follow, run
from llmuxctl.output import clean, plain_table, styled
from llmuxctl.session import Session, json_option, pass_session
from llmuxctl.words import EVICTION, MODEL, SEVERAL_EVICTIONS
from llmuxd.protocol import Exit

COLUMNS = ("POLICY", "SLEEP s", "WAKE s", "BEFORE MiB", "AFTER MiB", "AWAKE MiB", "MATCH", "PASS")


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--eviction",
    type=EVICTION,
    metavar="WEIGHTS+checkpoint",
    help="What becomes of the weights before; by default as the model's own policy says.",
)
@click.option("--no-warmup", is_flag=True, help="Without one inference before.")
@json_option
@pass_session
def checkpoint(session: Session, model: str, eviction: str | None, no_warmup: bool) -> None:
    """Save MODEL's engine to an image, and end it. Its next request restores it.

    It is started first if it does not run, and warmed up by one inference, so that what vLLM does lazily is in the
    image. If it cannot be saved, it goes on running.

    \b
    llmuxctl checkpoint qwen
    llmuxctl checkpoint qwen --eviction discard+checkpoint --no-warmup
    """
    run(session, "checkpoint", model=model, eviction=eviction, warmup=False if no_warmup else None)


@click.command()
@click.argument("model", type=MODEL)
@click.option("--detached", is_flag=True, help="Do not wait for it.")
@json_option
@pass_session
def restore(session: Session, model: str, detached: bool) -> None:
    """Restore MODEL's engine from its image, as its next request would.

    If the image is not good for it any more, the engine is started from its weights, and the reason is told.

    \b
    llmuxctl restore qwen
    llmuxctl restore qwen --detached
    """
    run(session, "restore", model=model, detached=True if detached else None)


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--policies",
    type=SEVERAL_EVICTIONS,
    metavar="W+P,...",
    help="The policies to try, with commas between them; by default all that this box can do.",
)
@json_option
@pass_session
def validate(session: Session, model: str, policies: str | None) -> None:
    """See that MODEL comes back from each eviction as it was.

    For each policy it is put to sleep and woken. How long both took, what it held of the devices before, asleep and
    awake again, and whether it gives the same answer to the same question, is shown in a table. Requests for it and for
    other models are served meanwhile. Exit code 1 if a policy did not pass.

    \b
    llmuxctl validate qwen
    llmuxctl validate qwen --policies offload+keep_running,discard+checkpoint --json
    """
    chosen = None if policies is None else [word.strip() for word in policies.split(",") if word.strip()]
    last = follow(session, "validate", model=model, policies=chosen)
    failure = failure_of(last)
    rows = last.get("rows", [])
    if session.as_json:
        click.get_current_context().exit(Exit.DONE if failure is None else failure.exit_code)
    if rows:
        plain_table(COLUMNS, [_cells(row) for row in rows])
    for row in rows:
        if not row["passed"]:
            print(styled(clean(f"{row['eviction']}: {row['reason']}"), fg="red"))
    if failure is not None:
        raise failure
    print(clean(last["message"]))


def _cells(row: dict[str, Any]) -> list[str]:
    match = {True: "yes", False: "no", None: "-"}[row["match"]]
    seconds = ["-" if value is None else f"{value:.2f}" for value in (row["sleep_secs"], row["wake_secs"])]
    memory = ["-" if row[name] is None else str(row[name]) for name in ("before_mib", "after_mib", "awake_mib")]
    return [clean(cell) for cell in (row["eviction"], *seconds, *memory, match, "yes" if row["passed"] else "NO")]

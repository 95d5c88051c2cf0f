"""The commands that steer: what each does is the daemon's business, how it is told is here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import click

from llmuxctl.changes import one_line
from llmuxctl.client import Failed, failure_of
from llmuxctl.output import Progress, clean, plain_table
from llmuxctl.session import EXIT_INTERRUPTED, Session, json_option, pass_session
from llmuxctl.words import EVICTION, EVICTION_OR_AUTO, MODEL


def run(session: Session, call: str, **body: Any) -> None:
    """Run a long operation and tell its steps and its result."""
    last = finish(session, call, **body)
    if not session.as_json:
        print(clean(last["message"]))


def finish(session: Session, call: str, **body: Any) -> dict[str, Any]:
    """Run a long operation, telling its steps; returns the last one, which is good.

    Raises Failed if it does fail, or if Ctrl-C ends the waiting for it.
    """
    last = follow(session, call, **body)
    failure = failure_of(last)
    if failure is not None and session.as_json:
        click.get_current_context().exit(failure.exit_code)
    if failure is not None:
        raise failure
    return last


def follow(session: Session, call: str, **body: Any) -> dict[str, Any]:
    """Run a long operation, telling its steps; returns the last one, however it ended.

    Raises Failed if Ctrl-C ends the waiting for it.
    """
    steps = session.client.steps(call, **{key: value for key, value in body.items() if value is not None})
    try:
        return _tell_json(steps) if session.as_json else _tell(steps)
    except KeyboardInterrupt:
        text = "\nNot waiting any more. What the daemon has begun goes on; `llmuxctl status` shows it."
        raise Failed(EXIT_INTERRUPTED, text) from None


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
            # Changes of the config are in the result, too, where they are told in full.
            if "result" not in last and last.get("event") != "change":
                progress.step(last["text"])
    return last


@click.command()
@click.argument("model", type=MODEL)
@json_option
@pass_session
def switch(session: Session, model: str) -> None:
    """Make MODEL awake now, without the cooldown. In manual mode it becomes the pinned one.

    The steps are told while it runs. Ctrl-C ends the telling, not the switch.

    \b
    llmuxctl switch qwen
    llmuxctl switch qwen --json
    """
    run(session, "switch", model=model)


@click.command()
@click.argument("model", type=MODEL)
@json_option
@pass_session
def wake(session: Session, model: str) -> None:
    """Make MODEL awake, in its turn, as a request for it would.

    \b
    llmuxctl wake qwen
    """
    run(session, "wake", model=model)


@click.command()
@click.argument("model", type=MODEL)
@click.option("--eviction", type=EVICTION, metavar="WEIGHTS+PROCESS", help="Instead of the model's own policy.")
@json_option
@pass_session
def sleep(session: Session, model: str, eviction: str | None) -> None:
    """Let MODEL finish what it has in flight, and put it to sleep.

    \b
    llmuxctl sleep qwen
    llmuxctl sleep qwen --eviction discard+keep_running
    """
    run(session, "sleep", model=model, eviction=eviction)


@click.command()
@click.argument("model", type=MODEL)
@json_option
@pass_session
def stop(session: Session, model: str) -> None:
    """Let MODEL finish what it has in flight, and stop its engine. A second time: at once.

    \b
    llmuxctl stop qwen
    """
    run(session, "stop", model=model)


@click.command()
@click.argument("models", type=MODEL, nargs=-1, metavar="[MODEL]...")
@json_option
@pass_session
def warmup(session: Session, models: tuple[str, ...]) -> None:
    """Warm each MODEL (all, if none is named): start it, one inference, put it to sleep.

    \b
    llmuxctl warmup
    llmuxctl warmup qwen mistral
    """
    run(session, "warmup", models=list(models) or None)


@click.command()
@click.argument("model", type=MODEL)
@json_option
@pass_session
def pin(session: Session, model: str) -> None:
    """Make MODEL awake and keep it so: manual mode, requests for other models are refused.

    \b
    llmuxctl pin qwen
    llmuxctl unpin
    """
    run(session, "pin", model=model)


@click.command()
@json_option
@pass_session
def unpin(session: Session) -> None:
    """Back to auto mode."""
    session.show(session.client.post("unpin"))


@click.command()
@click.argument("mode", type=click.Choice(["auto", "manual"]))
@json_option
@pass_session
def mode(session: Session, mode: str) -> None:
    """Switch by the policy (auto), or only when an operator says so (manual).

    \b
    llmuxctl mode manual
    llmuxctl mode auto
    """
    session.show(session.client.post("mode", mode=mode))


@click.command()
@click.argument("model", type=MODEL, required=False)
@click.argument("policy", type=EVICTION_OR_AUTO, required=False, metavar="[WEIGHTS+PROCESS|auto]")
@json_option
@pass_session
def eviction(session: Session, model: str | None, policy: str | None) -> None:
    """Show the eviction policies, or change one until the daemon ends.

    \b
    WEIGHTS: retain, offload (sleep level 1), discard (level 2)
    PROCESS: keep_running, cuda_suspend, checkpoint, stop
    auto:    the cheapest of them, chosen each time; `llmuxctl status` says which

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
    rows = [[clean(cell) for cell in (name, _policy_of(m), m["process_state"])] for name, m in answer["models"].items()]
    plain_table(("MODEL", "EVICTION", "STATE"), rows)


def _policy_of(model: dict[str, Any]) -> str:
    policy = "{weights}+{process}".format(**model["eviction"])
    return f"auto: {policy}" if model.get("auto") else policy


@click.command()
@json_option
@pass_session
def reload(session: Session) -> None:
    """Read the configuration again and apply what has changed in it. One with an error changes nothing.

    New models appear, removed ones finish what they have in flight and stop, changed ones stop when they are
    next idle and are started anew when they are wanted. Exit code 2, and every problem, if the configuration is bad.

    \b
    llmuxctl config diff
    llmuxctl reload
    """
    last = finish(session, "reload")
    if not session.as_json:
        for change in last.get("changes", ()):
            print(one_line(change))
        print(clean(last["message"]))

"""The kinds of words that commands take: models and evictions, and what a shell may complete them to.

A model is whatever the daemon says that it is; here it is only completed, with the names that a running daemon has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llmuxctl.client import Client
from llmuxd.protocol import default_control_socket

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    _Word = click.ParamType[str]
else:
    # Generic only in recent versions of click.
    _Word = click.ParamType

COMPLETION_SECS = 0.3
"""How long a daemon may take to name its models while somebody waits at a prompt."""

# llmuxd.core.eviction has them as enums; a test holds the two together.
WEIGHTS = ("retain", "offload", "discard")
PROCESSES = ("keep_running", "cuda_suspend", "checkpoint", "stop")
AUTO = "auto"
EVICTIONS = tuple(f"{weights}+{process}" for weights in WEIGHTS for process in PROCESSES)


class ModelName(_Word):
    """A model's name or alias."""

    name = "model"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        there = ctx.params.get(param.name or "")
        # Of several, each is named once.
        named = there if isinstance(there, (tuple, list)) else ()
        words = _names(_socket_of(ctx))
        return [
            CompletionItem(word, help=about)
            for word, about in words.items()
            if word.startswith(incomplete) and word not in named
        ]


class Eviction(_Word):
    """An eviction policy, WEIGHTS+PROCESS. The daemon says whether it is one."""

    name = "eviction"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in EVICTIONS if word.startswith(incomplete)]


MODEL = ModelName()
EVICTION = Eviction()


class EvictionOrAuto(Eviction):
    """The same, or `auto`."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        auto = [CompletionItem(AUTO)] if AUTO.startswith(incomplete) else []
        return [*auto, *super().shell_complete(ctx, param, incomplete)]


class Evictions(_Word):
    """Several eviction policies, with commas between them."""

    name = "evictions"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        before, comma, last = incomplete.rpartition(",")
        there = before.split(",")
        words = (word for word in EVICTIONS if word.startswith(last) and word not in there)
        return [CompletionItem(f"{before}{comma}{word}") for word in words]


EVICTION_OR_AUTO = EvictionOrAuto()
SEVERAL_EVICTIONS = Evictions()


def _socket_of(ctx: click.Context) -> str:
    """The socket that is named on the line so far; while it is completed, no command has been run."""
    path = ctx.find_root().params.get("socket")
    return path if isinstance(path, str) and path else default_control_socket()


def _names(socket: str) -> dict[str, str]:
    """Every name of a model -> what to know about it. Empty if no daemon answers at once."""
    try:
        models: dict[str, Any] = Client(socket, COMPLETION_SECS, quiet=True).get("status")["models"]
        names = {name: str(model["engine"]) for name, model in models.items()}
        for name, model in models.items():
            names.update(dict.fromkeys(model.get("aliases") or (), f"alias of {name}"))
    except (click.ClickException, LookupError, TypeError, AttributeError):
        return {}
    # A name that no shell could take apart again is better typed.
    return {name: about for name, about in names.items() if name.isprintable()}

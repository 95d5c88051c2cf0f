"""How changes of the configuration are shown: what was, what will be, and when.

A change is what the daemon says of it: `path`, `change` (added, removed, changed), `old`, `new` and `effect`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmuxctl.output import clean, count, styled

_WHEN = {
    "now": "at once",
    "when idle": "when its engine is idle",
    "restart": "only with a restart of llmuxd",
}


def one_line(change: dict[str, Any] | str) -> str:
    """A change as a line: `models.qwen.ttl_secs: 60 -> 90 (at once)`."""
    if isinstance(change, str):
        return clean(change)
    kind = change.get("change")
    if kind == "added":
        what = "added" + ("" if change.get("new") is None else f", {_value(change['new'])}")
    elif kind == "removed":
        what = "removed" + ("" if change.get("old") is None else f", was {_value(change['old'])}")
    else:
        what = f"{_value(change.get('old'))} -> {_value(change.get('new'))}"
    return clean(f"{change['path']}: {what} ({_when(change)})")


def show_changes(file: str, changes: Sequence[dict[str, Any]]) -> None:
    """Print what a reload of `file` would change, like a diff; in colours on a terminal."""
    if not changes:
        print(f"{clean(file)}: no changes")
        return
    print(f"{clean(file)}: a reload would make {count(len(changes), 'change')}")
    for change in changes:
        print(f"\n{styled(clean(change['path']), bold=True)}  ({_when(change)})")
        kind = change.get("change")
        if kind != "added":
            print(styled(f"  - {_side(change, 'old')}", fg="red"))
        if kind != "removed":
            print(styled(f"  + {_side(change, 'new')}", fg="green"))


def _side(change: dict[str, Any], side: str) -> str:
    """The value on one side of a change. A table as a whole comes and goes without one."""
    whole = change.get("change") != "changed" and change.get(side) is None
    return str(change["change"]) if whole else clean(_value(change.get(side)))


def _when(change: dict[str, Any]) -> str:
    effect = str(change.get("effect", ""))
    return _WHEN.get(effect, effect)


def _value(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)

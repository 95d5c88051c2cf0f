"""The state file: which engines there are, so that the next daemon finds them.

It is written whenever an engine becomes something else, before vLLM is told to: whole, to a new file that takes the
place of the old one, and on the disk before it does. What is done with its content at the next start is in `adoption`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmuxd.core.engine_state import EngineState
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.core.state import SwitchMode
from llmuxd.engine.proctable import boot_id
from llmuxd.engine.record import EngineRecord

VERSION = 1
NAME = "engines.json"
_MODE = 0o600

log = logging.getLogger("llmuxd")


@dataclass(frozen=True, slots=True)
class Entry:
    """One engine, and what the core took it to be when this was written."""

    record: EngineRecord
    state: EngineState
    asleep_by: EvictionPolicy | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "record": self.record.as_json(),
            "state": self.state.value,
            "asleep_by": None if self.asleep_by is None else str(self.asleep_by),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entry:
        """Raises TypeError, ValueError or KeyError if it is none."""
        by = data["asleep_by"]
        record = EngineRecord.from_json(data["record"])
        return cls(record, EngineState(data["state"]), None if by is None else EvictionPolicy.parse(by))


class Book:
    """The state file in a folder. Writing happens in a thread; `set`, `drop` and `flush` belong to one event loop."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.mode = SwitchMode()
        self.costs: dict[str, dict[str, float]] = {}
        """Model -> what its operations have been measured to take, in seconds."""
        self._entries: dict[str, Entry] = {}
        self._version = 0
        """Counts the changes; `_written` is the newest one that is on the disk."""
        self._written = 0
        self._writing: asyncio.Task[None] | None = None

    def load(self) -> dict[str, Entry]:
        """What an earlier daemon of this boot wrote, by model; `mode` and `costs` are then its, too.

        A file that cannot be understood is put aside: its engines are then found by their mark alone.
        """
        try:
            data = json.loads(self.path.read_text())
            if data["version"] != VERSION:
                raise ValueError(f"its version is {data['version']}, this llmuxd writes {VERSION}")
            self.costs = {
                model: {kind: float(secs) for kind, secs in known.items()} for model, known in data["costs"].items()
            }
            if data["boot_id"] == boot_id():
                self.mode = SwitchMode(bool(data["mode"]["manual"]), data["mode"]["pinned"])
                self._entries = {name: Entry.from_json(entry) for name, entry in data["engines"].items()}
            return dict(self._entries)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            aside = self.path.with_suffix(".unreadable")
            log.error("%s cannot be understood (%s); it is kept as %s", self.path, error, aside.name)
            try:
                self.path.replace(aside)
            except OSError:
                pass
            return {}

    def set(self, model: str, entry: Entry) -> None:
        """Note an engine. It is on the disk after the next `flush`."""
        if self._entries.get(model) != entry:
            self._entries[model] = entry
            self._changed()

    def drop(self, model: str) -> None:
        """There is no engine of that model any more."""
        if self._entries.pop(model, None) is not None:
            self._changed()

    def set_mode(self, mode: SwitchMode) -> None:
        """Note the mode that the operator has left the daemon in."""
        if mode != self.mode:
            self.mode = mode
            self._changed()

    def set_costs(self, model: str, costs: Mapping[str, float]) -> None:
        """Note what a model's operations take. They change all the time: it is not worth a write by itself."""
        self.costs[model] = {kind: round(secs, 3) for kind, secs in costs.items()}

    async def flush(self) -> None:
        """Return when everything noted so far is on the disk. A write that fails is logged; nothing stops for it."""
        wanted = self._version
        while self._written < wanted and self._writing is not None:
            await asyncio.shield(self._writing)

    def _changed(self) -> None:
        self._version += 1
        if self._writing is None:
            self._writing = asyncio.get_running_loop().create_task(self._write_all(), name="state file")

    async def _write_all(self) -> None:
        try:
            while self._written < self._version:
                version, text = self._version, json.dumps(self._as_json(), indent=1)
                try:
                    await asyncio.to_thread(write_atomically, self.path, text)
                except OSError as error:
                    log.error("the state file cannot be written, so a restart would not find the engines: %s", error)
                self._written = version
        finally:
            self._writing = None

    def _as_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "boot_id": boot_id(),
            "costs": self.costs,
            "mode": {"manual": self.mode.manual, "pinned": self.mode.pinned},
            "engines": {model: entry.as_json() for model, entry in self._entries.items()},
        }


def write_atomically(path: Path, text: str) -> None:
    """Replace the file by one with this content, and see that it is on the disk. Raises OSError.

    Written by root, it belongs to who has the folder: the daemon of another user has to read it.
    """
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
    with os.fdopen(descriptor, "w") as file:
        if os.geteuid() == 0:
            owner = path.parent.stat()
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

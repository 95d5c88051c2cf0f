"""The engines of an earlier daemon: taken over where they are fit for it, ended where they are not.

It comes before anything else: no engine is started, and no operator or client is heard, before what is there is known.
What is found is decided by `engine.adopting`; whether there is room for it, by the core.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmuxd.book import Book, Entry
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState
from llmuxd.engine import Engine, EngineError
from llmuxd.engine.cgroup import delegated, engines_in
from llmuxd.engine.process import EngineProcess, kill_marked
from llmuxd.engine.spec import OWNER_ENV
from llmuxd.runtime import Runtime

GRACE_SECS = 5.0
"""What an engine that is not adopted gets to end by itself."""

log = logging.getLogger("llmuxd")


@dataclass
class _Found:
    """One engine of the book."""

    entry: Entry
    engine: Engine
    configured: bool
    state: EngineState | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        return self.entry.record.model

    async def look(self) -> None:
        """What it is now, or why it cannot be used."""
        if not self.engine.find_again(self.entry.record):
            self.problem = "it does not run any more"
        elif not self.configured:
            self.problem = "it is not in the config any more"
        else:
            try:
                self.state = await self.engine.adopt(self.entry.state, self.entry.asleep_by)
            except EngineError as error:
                self.problem = error.reason
        log.debug(
            "%s: found its engine, %s", self.name, self.problem or (self.state.value if self.state is not None else "")
        )

    def event(self) -> e.EngineAdopted:
        record, state = self.entry.record, self.state
        return e.EngineAdopted(
            self.name,
            record.incarnation,
            self.entry.asleep_by if state is EngineState.ASLEEP else None,
            record.can_park if self.engine.info is None else self.engine.info.can_park,
            record.can_sleep if self.engine.info is None else self.engine.info.can_sleep,
            starting=state is EngineState.STARTING,
            outdated=self.engine.outdated,
        )


async def adopt_engines(runtime: Runtime, entries: dict[str, Entry]) -> None:
    """Take over every engine that can be, and see that nothing else is left of the earlier daemon."""
    runtime.adopting.update(entries)
    found = [_Found(entry, *_engine_for(runtime, name, entry)) for name, entry in entries.items()]
    await asyncio.gather(*(one.look() for one in found))
    for one in found:
        if one.state is not None and one.engine.over:
            # It died while others were looked at, and the core had not heard of it yet.
            one.state, one.problem = None, one.engine.over
    # Those that are awake first: they have the memory.
    for one in sorted(found, key=lambda one: one.state is EngineState.ASLEEP):
        if one.state is not None and not _take_over(runtime, one):
            one.state, one.problem = None, "there is no room for it beside the others"
    rest = [one for one in found if one.state is None]
    await _stop_all(rest)
    for one in rest:
        runtime.adopting.discard(one.name)
        runtime.note(one.name)
    kept = [one.engine.process for one in found if one.state is not None and one.engine.process is not None]
    own = delegated()
    folders = _folders_of(found) | ({own} if own is not None else set())
    await asyncio.to_thread(_kill_strays, runtime.config.state_dir, kept, folders)


async def stop_engines(state_dir: Path, grace: float) -> int:
    """End every engine of the daemon that has this state folder, whether it runs or not; returns how many there were.

    Raises EngineError if a process survives.
    """
    book = Book(state_dir)
    found = [_Found(entry, Engine(entry.record.bare_spec(), _nobody), False) for entry in book.load().values()]
    await asyncio.gather(*(one.look() for one in found))
    stops = [one.engine.stop(grace) for one in found]
    for outcome in await asyncio.gather(*stops, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
    strays = await asyncio.to_thread(_kill_strays, state_dir, (), _folders_of(found))
    for one in found:
        book.drop(one.name)
    await book.flush()
    return len(found) + (1 if strays and not found else 0)


def _nobody(_incarnation: int, _reason: str) -> None:
    """The death of an engine that is being stopped is no news."""


def _engine_for(runtime: Runtime, name: str, entry: Entry) -> tuple[Engine, bool]:
    engine = runtime.engines.get(name)
    if engine is not None:
        return engine, True
    return Engine(entry.record.bare_spec(), _nobody), False


def _take_over(runtime: Runtime, one: _Found) -> bool:
    runtime.adopting.discard(one.name)
    if not runtime.adopt(one.event()):
        return False
    outdated = "; its config has changed, so it is stopped when it is next idle" if one.engine.outdated else ""
    what = one.state.value if one.state is not None else ""
    log.info("%s: adopted its engine, process %d, %s%s", one.name, one.entry.record.pid, what, outdated)
    runtime.note(one.name)
    return True


async def _stop_all(found: Iterable[_Found]) -> None:
    for one in found:
        log.warning("%s: its engine (process %d) is ended: %s", one.name, one.entry.record.pid, one.problem)
    stops = [one.engine.stop(GRACE_SECS) for one in found]
    for outcome in await asyncio.gather(*stops, return_exceptions=True):
        if isinstance(outcome, BaseException):
            log.error("an engine of an earlier daemon could not be ended: %s", outcome)


def _folders_of(found: Iterable[_Found]) -> set[Path]:
    """Where the engines' control groups are."""
    return {Path(one.entry.record.cgroup).parent for one in found if one.entry.record.cgroup is not None}


def _kill_strays(state_dir: Path, spared: Sequence[EngineProcess], folders: Collection[Path]) -> list[int]:
    """Kill what an earlier daemon started and did not come to note. Blocks."""
    mark = f"{OWNER_ENV}={state_dir}\0".encode()
    ours = {process.cgroup.path for process in spared if process.cgroup is not None}
    there = [group for folder in sorted(folders) for group in engines_in(folder, str(state_dir))]
    groups = [group for group in there if group.path not in ours]
    killed = kill_marked(mark, groups, spared)
    if killed:
        log.warning("processes that an earlier daemon has left were killed: %s", ", ".join(map(str, killed)))
    return killed

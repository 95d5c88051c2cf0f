"""Many seeds: each one's scenario is run, and the invariants are checked after every event of it."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from llmuxd.core.audit import Violation
from llmuxd.core.switcher import Switcher
from llmuxd.sim.virtual.chaos import draw
from llmuxd.sim.virtual.scenario import Scenario
from llmuxd.sim.virtual.shrink import shrink
from llmuxd.sim.virtual.world import World

BuildSwitcher = Callable[..., Switcher]

RUN_TWICE_EVERY = 100
"""Of so many seeds one is run twice, and has to go the same way."""

NOT_THE_SAME = "determinism"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one seed."""

    seed: int
    events: int
    seen: Counter[str] = field(default_factory=Counter)
    """How often something worth seeing happened."""
    violation: Violation | None = None


def run_seed(seed: int, build_switcher: BuildSwitcher = Switcher) -> Verdict:
    """Run the scenario of a seed."""
    world = World(draw(seed), build_switcher=build_switcher)
    violation = violation_of(world)
    if violation is None and seed % RUN_TWICE_EVERY == 0 and digest(draw(seed)) != digest(draw(seed)):
        violation = Violation(NOT_THE_SAME, "the same seed went another way the second time", 0.0)
    return Verdict(seed, world.outcome.events, world.outcome.seen, violation)


def violation_of(world: World) -> Violation | None:
    """Run a world; the invariant that it broke, an exception of the core being one."""
    try:
        return world.run().violation
    except Exception as error:
        return Violation("no_exception", f"{type(error).__name__}: {error}", world.now)


def sweep(first: int, end: int, processes: int | None = None) -> Iterator[Verdict]:
    """The verdicts over a range of seeds, as they come in, on all processors."""
    with multiprocessing.Pool(processes) as pool:
        yield from pool.imap_unordered(run_seed, range(first, end), chunksize=20)


def shortest(seed: int, invariant: str, build_switcher: BuildSwitcher = Switcher) -> Scenario:
    """The shortest form found of a seed's scenario that still breaks the invariant."""
    return shrink(draw(seed), partial(_breaks, invariant, build_switcher))


def _breaks(invariant: str, build_switcher: BuildSwitcher, scenario: Scenario) -> bool:
    violation = violation_of(World(scenario, build_switcher=build_switcher))
    return violation is not None and violation.invariant == invariant


def log_of(scenario: Scenario) -> list[str]:
    """Every event and command of a run, a line each."""
    lines: list[str] = []
    violation = violation_of(World(scenario, log=lines.append))
    return lines if violation is None else [*lines, f"VIOLATION {violation}"]


def digest(scenario: Scenario) -> str:
    """The SHA-256 of the event log."""
    return hashlib.sha256("\n".join(log_of(scenario)).encode()).hexdigest()

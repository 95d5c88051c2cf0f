"""The comparison of policies: each workload at each switch cost under each policy, in the same simulator.

Serial service is that of llmux 0.7's own simulator: one request at a time, no cooldown, the first load free. Batched
service is vLLM's: see `service.BatchService`. A switch of cost C takes C/2 to put one model to sleep and C/2 to wake
the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmuxd.core.eviction import EvictionPolicy
from llmuxd.core.policies import POLICIES
from llmuxd.core.policy import PolicyParameters
from llmuxd.core.settings import InFlight, ModelSpec, Placement, Settings
from llmuxd.sim.virtual import workloads
from llmuxd.sim.virtual.scenario import Arrival, EngineSecs, Scenario, SimModel
from llmuxd.sim.virtual.service import BatchService, SerialService
from llmuxd.sim.virtual.world import Outcome, World

DEVICE = "gpu0"
OFFLOAD = EvictionPolicy.parse("offload+keep_running")
SEED = 1
HOUR = 3600.0

SERIAL_COSTS: Sequence[tuple[float, float]] = ((2, 0.5), (5, 0.5), (10, 0.5), (20, 0.5), (10, 0.1), (10, 1), (10, 2))
"""(switch cost, service time), in seconds, as llmux 0.7 published them."""

SERIAL_PARAMETERS = PolicyParameters(tick_interval=0.01)
"""llmux 0.7's simulator looks at the queues every 0.5 s, and whenever the awake model runs empty as well."""

COOLED = ("fifo", "cost_aware", "time_slice")
COOLDOWN_SECS = 5.0
"""llmux 0.7's cooldown for its policies, the default of `min_active_secs` under them, in batched service."""

BATCH_COSTS: Sequence[float] = (2.0, 8.0)
RATES: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Requests per second and model."""


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the comparison. Times in seconds."""

    workload: str
    service: str
    """serial or batch"""
    switch_cost: float
    policy: str
    in_flight: InFlight
    service_secs: float | None = None
    """Of one request, in serial service."""


def serial_cases(policies: Iterable[str]) -> Iterator[Case]:
    """llmux 0.7's profiles, at its costs."""
    for cost, secs in SERIAL_COSTS:
        for profile in workloads.PROFILES:
            for policy in policies:
                yield Case(profile, "serial", cost, policy, InFlight.DRAIN, secs)


def batch_cases(policies: Iterable[str], names: Iterable[str], ways: Iterable[InFlight]) -> Iterator[Case]:
    """The named workloads in batched service."""
    for name in names:
        for cost in BATCH_COSTS:
            for way in ways:
                for policy in policies:
                    yield Case(name, "batch", cost, policy, way)


def batch_workloads(traces: Path | None) -> dict[str, Callable[[], list[Arrival]]]:
    """Name -> what arrives: Poisson and Zipf over 4 and 8 models, and the traces of that folder."""
    found: dict[str, Callable[[], list[Arrival]]] = {}
    for models in (4, 8):
        for rate in RATES:
            found[f"poisson-{models}x{rate}"] = partial(workloads.poisson, models, rate, HOUR, SEED)
            found[f"zipf-{models}x{rate}"] = partial(workloads.poisson, models, rate, HOUR, SEED, zipf=True)
    for path in sorted(traces.glob("*.csv*")) if traces is not None else ():
        name = path.name.partition(".csv")[0]
        if name.startswith("aegaeon"):
            found[name] = partial(workloads.aegaeon, path)
        else:
            for models in (4, 8):
                found[f"{name}-over-{models}"] = partial(workloads.azure, path, models, SEED)
    return found


def run_case(case: Case, traces: Path | None = None) -> dict[str, Any]:
    """One row of the result."""
    if case.service == "serial":
        arrivals = workloads.PROFILES[case.workload]()
    else:
        arrivals = batch_workloads(traces)[case.workload]()
    outcome = World(scenario_of(case, arrivals)).run()
    if outcome.violation is not None:
        raise AssertionError(f"{case}: {outcome.violation}")
    return _row(case, outcome)


def scenario_of(case: Case, arrivals: Sequence[Arrival]) -> Scenario:
    """The case as the simulator runs it."""
    serial = case.service == "serial"
    # Where one model is served, then the other, a free first load is a wake that costs nothing.
    half = case.switch_cost if serial else case.switch_cost / 2
    secs = EngineSecs(start=half, sleep=half, wake=0.0 if serial else half, stop=half)
    names = sorted({arrival.model for arrival in arrivals})
    models = tuple(
        SimModel(ModelSpec(name, OFFLOAD, Placement({DEVICE: 1}), max_in_flight=1 if serial else None), secs)
        for name in names
    )
    # Nobody is turned away, however long the queue: what is compared is the waiting.
    settings = Settings(
        request_timeout=1e9,
        in_flight=case.in_flight,
        min_active=0.0 if serial or case.policy not in COOLED else COOLDOWN_SECS,
        max_queue=10**9,
    )
    return Scenario(
        models=models,
        devices={DEVICE: 1},
        settings=settings,
        policy=POLICIES[case.policy](SERIAL_PARAMETERS if serial else PolicyParameters()),
        arrivals=tuple(arrivals),
        build_service=partial(SerialService, case.service_secs or 0.0) if serial else BatchService,
    )


def _row(case: Case, outcome: Outcome) -> dict[str, Any]:
    clients = outcome.clients
    serving = outcome.serving_secs
    spent = serving + (outcome.switches * case.switch_cost if case.service == "serial" else outcome.switching_secs)
    ttft = [c.first_token - c.arrival.at for c in clients if c.first_token is not None]
    e2e = [c.ended - c.arrival.at for c in clients if c.answered and c.ended is not None]
    waits = [c.forwarded - c.arrival.at for c in clients if c.forwarded is not None]
    row = {
        "workload": case.workload,
        "service": case.service,
        "switch_cost": case.switch_cost,
        "policy": case.policy,
        "in_flight": case.in_flight.value,
        "requests": len(clients),
        "answered": len(e2e),
        "switches": outcome.switches,
        "gpu_fraction": round(serving / spent, 4) if spent else 1.0,
        "ttft": _summary(ttft),
        "e2e": _summary(e2e),
        "wait_max": round(max(waits, default=0.0), 3),
        "pause_max": round(max((c.longest_pause for c in clients), default=0.0), 3),
    }
    if case.service_secs is not None:
        row["service_secs"] = case.service_secs
    return row


def _summary(values: Sequence[float]) -> dict[str, float]:
    """mean, median, 99th percentile (the least value that 99 % do not exceed) and maximum, in seconds."""
    ordered = sorted(values) or [0.0]
    return {
        "mean": round(statistics.fmean(ordered), 3),
        "p50": round(_percentile(ordered, 50), 3),
        "p99": round(_percentile(ordered, 99), 3),
        "max": round(ordered[-1], 3),
    }


def _percentile(ordered: Sequence[float], percent: int) -> float:
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]

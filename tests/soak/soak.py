"""The course of a soak: load, a quiet moment to count, load again, and the end of the daemon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from tests.soak.clients import Client
from tests.soak.field import Field
from tests.soak.judge import How
from tests.soak.keys import KEYS
from tests.soak.report import Report, quantiles
from tests.soak.saboteur import Saboteur
from tests.soak.stand import REQUEST_TIMEOUT_SECS, Samples, Stand, Usage, by_status, total
from tests.soak.watch import MOST_UNHEALTHY_SECS, Health, Log, Usages

LOAD_SECS = 60.0
"""Between two quiet moments; less in a short soak, which has four at least."""
PROGRESS_SECS = 30.0
SETTLE_SECS = 30.0
"""After the last answer, everything has come to rest within this."""
AT_REST = ("not_started", "awake", "asleep", "failed")
LEAST_SERVED = 0.3
"""Of the requests that models were asked; with fewer answers it was no soak."""


@dataclass(frozen=True)
class Plan:
    """What there is to be. `rate` is in requests per second, of all clients together, at most."""

    minutes: float
    seed: int
    clients: int
    rate: float
    deed_secs: float


async def soak(plan: Plan, home: Path) -> Report:
    """Start a daemon in this folder, soak it, end it. Nothing is left of it, whatever happens."""
    stand = Stand(home)
    try:
        await stand.start()
        one = _Soak(plan, stand)
        await one.run()
        code = await stand.stop()
    finally:
        await stand.close()
        left = await asyncio.to_thread(stand.sweep)
    return one.report(code, left)


class _Soak:
    """One soak over a daemon that serves."""

    def __init__(self, plan: Plan, stand: Stand) -> None:
        self._plan = plan
        self._stand = stand
        self._field = Field(stand.port, stand.served, f"s{plan.seed}", REQUEST_TIMEOUT_SECS)
        self._log = Log(stand.log, self._field.account)
        self._health = Health(self._field)
        self._usages = Usages()
        self._saboteur = Saboteur(stand, self._field, self._rng("saboteur"), plan.deed_secs)
        self._visitor = Client(self._field, self._rng("visitor"), 1.0)
        self._problems: dict[str, list[str]] = {}
        self._samples: Samples = {}
        self._began = time.monotonic()
        self._loaded_secs = 0.0

    def _rng(self, who: str) -> Random:
        return Random(f"{self._plan.seed} {who}")

    async def run(self) -> None:
        """Load and quiet by turns, until the time is over or it cannot go on."""
        think = self._plan.clients / self._plan.rate
        owners = [key for key in KEYS for _ in range(key.weight)]
        clients = [
            Client(self._field, self._rng(f"client {n}"), think, owners[n % len(owners)])
            for n in range(self._plan.clients)
        ]
        crews = [one.run() for one in clients]
        crews += [self._saboteur.run(), self._health.follow(), self._log.follow(), self._tell()]
        tasks = {asyncio.create_task(one) for one in crews}
        turns = asyncio.create_task(self._take_turns())
        done, others = await asyncio.wait({turns, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for task in done:
            if task.exception() is not None:
                code = self._stand.code()
                self._problem("it could not go on", f"{task.exception()!r}, exit code of llmuxd: {code}")

    async def _take_turns(self) -> None:
        end = self._began + self._plan.minutes * 60
        load = min(LOAD_SECS, self._plan.minutes * 60 / 4)
        await self._rest()
        while (left := end - time.monotonic()) > 0:
            began = time.monotonic()
            self._field.open()
            await asyncio.sleep(min(load, left))
            if not await self._field.quiet():
                self._problem("clients that never came to an end", f"after {time.monotonic() - self._began:.0f} s")
                return
            self._loaded_secs += time.monotonic() - began
            await self._rest()

    # Quiet moments

    async def _rest(self) -> None:
        """Nobody asks anything: see that all comes to rest, that all models serve, and what the daemon uses."""
        await self._settled()
        for served in self._field.models:
            if not await self._visitor.visit(served):
                self._problem("models that do not serve any more", served.name)
        status = await self._settled()
        used = await self._least_usage()
        self._usages.add(time.monotonic() - self._began, used, self._stand.descriptors())
        for name, model in status["models"].items():
            seen = await self._stand.credentials_seen(model["endpoint"]) if model["pid"] else 0
            if seen:
                self._problem("keys that went to an engine", f"{name} has seen {seen:g}")
        known = {model["pid"] for model in status["models"].values() if model["pid"]}
        for process in await asyncio.to_thread(self._stand.engines):
            if process.pid not in known and process.ppid() not in known:
                self._problem("engines that the daemon knows nothing of", f"{process}, it knows {sorted(known)}")
        self._samples = await self._stand.metrics()
        self._log.read()

    async def _settled(self) -> dict[str, Any]:
        """Wait until nothing is under way; the status."""
        deadline = time.monotonic() + SETTLE_SECS
        while True:
            status = await self._stand.status()
            models = status["models"].items()
            moving = [f"{name} is {model['engine']}" for name, model in models if model["engine"] not in AT_REST]
            if not moving and not status["queued"] and not status["in_flight"] and status["switch"] is None:
                return status
            if time.monotonic() > deadline:
                still = f"{status['queued']} queued, {status['in_flight']} in flight, switch: {status['switch']}"
                self._problem("not at rest although nobody asks anything", ", ".join([*moving, still]))
                return status
            await asyncio.sleep(0.1)

    async def _least_usage(self) -> Usage:
        """What it uses once closed connections are let go, which takes a moment."""
        found = self._stand.usage()
        for _ in range(20):
            await asyncio.sleep(0.1)
            found = min(found, self._stand.usage(), key=lambda usage: usage.fds)
        return found

    # Telling

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECS)
            used, account = self._stand.usage(), self._field.account
            print(
                f"{time.monotonic() - self._began:6.0f} s: {len(account.entries)} requests, {account.open} open, "
                f"{self._saboteur.kills} kills, {used.fds} fds, {used.threads} threads, {used.rss_mib:.0f} MiB",
                *(f"\n         {news}" for news in account.news),
                flush=True,
            )
            account.news.clear()

    def _problem(self, sort: str, text: str) -> None:
        self._problems.setdefault(sort, []).append(text)

    def report(self, code: int | None, left: list[str]) -> Report:
        """What there is to tell, once the daemon has ended with this code and left this behind."""
        self._log.read()
        account, times, samples = self._field.account, self._field.times, self._samples
        self._judge_the_rest(code, left)
        return Report(
            seed=self._plan.seed,
            minutes=self._plan.minutes,
            clients=self._plan.clients,
            requests=len(account.entries),
            requests_per_second=len(account.entries) / max(1.0, self._loaded_secs),
            kinds={kind: {how.value: n for how, n in counts.items()} for kind, counts in account.kinds.items()},
            codes=dict(account.codes),
            seconds={
                "first byte": quantiles(times.first_byte),
                "whole answer": quantiles(times.total),
                "queue (Server-Timing)": quantiles(times.queue),
                "llmuxd's own answers": quantiles(times.own),
            },
            deeds=dict(self._saboteur.done),
            switches=int(total(samples, "llmux_switches_total")),
            switch_failures=int(total(samples, "llmux_switch_failures_total")),
            access_lines=self._log.access_lines,
            warnings=self._log.warnings,
            longest_unhealthy=self._health.longest,
            usage=[{"at": at, **asdict(used)} for at, used in zip(self._usages.at, self._usages.usage, strict=True)],
            exit_code=code,
            problems=self._problems,
        )

    def _judge_the_rest(self, code: int | None, left: list[str]) -> None:
        """What can be told only now."""
        samples = self._samples
        self._problems.update(self._field.account.problems(by_status(samples)))
        self._all("errors in llmuxd's log", self._log.problems)
        self._all("what the operator was answered", self._saboteur.problems)
        self._all("limits of keys that were not kept", self._field.uses.problems())
        self._all("what grows", self._usages.problems())
        self._all("what is left when llmuxd has ended", left)
        for name in ("llmux_in_flight", "llmux_queued", "llmux_invariant_violations_total"):
            if total(samples, name):
                self._problem("figures that have to be 0", f"{name} is {total(samples, name):g}")
        if self._health.longest > MOST_UNHEALTHY_SECS:
            reasons = "; ".join(self._health.reasons)
            self._problem("unhealthy for too long", f"{self._health.longest:.1f} s ({reasons})")
        if code != 0:
            self._problem("the exit code after SIGTERM", str(code))
        served = sum(counts[How.COMPLETE] for counts in self._field.account.kinds.values())
        if not self._saboteur.kills or not total(samples, "llmux_switches_total"):
            self._problem("it was no soak", "nobody was killed, or there was no switch")
        if served < LEAST_SERVED * len(self._field.account.entries):
            self._problem("it was no soak", f"only {served} requests were answered")

    def _all(self, sort: str, texts: Iterable[str]) -> None:
        for text in texts:
            self._problem(sort, text)

"""How an awake engine serves its requests: one after the other, or many at once as vLLM does.

A service is told the time with each call. It says when something will happen next (`next_at`), and what has
happened when that time has come (`take`). Times and durations are in seconds of the virtual clock.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Work:
    """What a request asks of its engine: prompt and answer in tokens."""

    prompt: int
    answer: int


@dataclass(frozen=True, slots=True)
class Progress:
    """What has happened to a request: its first token is there, or its last one."""

    request: int
    finished: bool


class Service(Protocol):
    """The requests inside one engine."""

    def add(self, request: int, work: Work, now: float) -> None: ...

    def remove(self, request: int, now: float) -> None:
        """Forget a request, whatever has become of it."""
        ...

    def pause(self, now: float) -> None:
        """The engine goes to sleep with what it has."""
        ...

    def resume(self, now: float) -> None:
        """It is awake again."""
        ...

    def next_at(self) -> float | None:
        """When `take` will have something; None if never, as things are."""
        ...

    def take(self, now: float) -> list[Progress]:
        """What has happened by `now`."""
        ...


class SerialService:
    """One request at a time, first come first served, each for `secs`. A pause costs nothing but itself."""

    def __init__(self, secs: float) -> None:
        self._secs = secs
        self._waiting: deque[int] = deque()
        self._serving: int | None = None
        self._left = 0.0
        self._ends: float | None = None
        self._paused = False

    def add(self, request: int, work: Work, now: float) -> None:
        self._waiting.append(request)

    def remove(self, request: int, now: float) -> None:
        if request == self._serving:
            self._serving = self._ends = None
        elif request in self._waiting:
            self._waiting.remove(request)

    def pause(self, now: float) -> None:
        self._paused = True
        if self._ends is not None:
            self._left = self._ends - now
            self._ends = None

    def resume(self, now: float) -> None:
        self._paused = False
        if self._serving is not None:
            self._ends = now + self._left

    def next_at(self) -> float | None:
        if self._paused or (self._serving is None and not self._waiting):
            return None
        return 0.0 if self._serving is None else self._ends

    def take(self, now: float) -> list[Progress]:
        done: list[Progress] = []
        if self._paused:
            return done
        if self._ends is not None and self._ends <= now:
            assert self._serving is not None
            done.append(Progress(self._serving, finished=True))
            self._serving = self._ends = None
        if self._serving is None and self._waiting:
            self._serving = self._waiting.popleft()
            self._ends = now + self._secs
            done.append(Progress(self._serving, finished=False))
        return done


@dataclass(frozen=True, slots=True)
class BatchSpeed:
    """What an engine with continuous batching takes.

    The defaults are round numbers for a model of about 8 B parameters on one large GPU. With them, 4 models with
    0.3 requests/s each and the answer lengths of the Aegaeon traces take about 4 s per answer.
    """

    prefill_secs_per_token: float = 0.000025
    step_secs: float = 0.010
    """One decoding step, in which each running request gets a token."""
    step_secs_per_request: float = 0.0001
    """What each running request adds to it."""
    max_running: int = 256
    """vLLM's --max-num-seqs."""


@dataclass(slots=True)
class _Run:
    request: int
    work: Work
    produced: float = 0.0
    """Tokens so far. More than 0 before a prefill: it was paused, and its KV cache is to be computed again."""
    ends_at_step: float = 0.0


class BatchService:
    """Continuous batching: prefills one after the other, while decoding stands still, then a token for all per step.

    Sleep drops the KV cache (level 1 and 2), so that a request which was paused is prefilled again with all that it
    has produced, before the ones that never ran.
    """

    def __init__(self, speed: BatchSpeed | None = None) -> None:
        self._speed = speed or BatchSpeed()
        self._waiting: deque[_Run] = deque()
        self._prefilling: _Run | None = None
        self._prefill_ends = 0.0
        self._running: dict[int, _Run] = {}
        self._ends: list[tuple[float, int]] = []
        """Heap of (step, request); what is not in `_running` any more is dropped when it surfaces."""
        self._steps = 0.0
        self._at = 0.0
        self._paused = False

    def add(self, request: int, work: Work, now: float) -> None:
        self._waiting.append(_Run(request, work))
        self._begin_prefill(now)

    def remove(self, request: int, now: float) -> None:
        self._advance(now)
        self._running.pop(request, None)
        if self._prefilling is not None and self._prefilling.request == request:
            self._prefilling = None
        else:
            self._waiting = deque(run for run in self._waiting if run.request != request)
        self._begin_prefill(now)

    def pause(self, now: float) -> None:
        self._advance(now)
        runs = sorted(self._running.values(), key=lambda run: run.request)
        for run in runs:
            run.produced = run.work.answer - (run.ends_at_step - self._steps)
        if self._prefilling is not None:
            runs.append(self._prefilling)
        self._waiting.extendleft(reversed(runs))
        self._prefilling = None
        self._running.clear()
        self._ends.clear()
        self._paused = True

    def resume(self, now: float) -> None:
        self._at = now
        self._paused = False
        self._begin_prefill(now)

    def next_at(self) -> float | None:
        if self._paused:
            return None
        if self._prefilling is not None:
            return self._prefill_ends
        while self._ends and self._ends[0][1] not in self._running:
            heapq.heappop(self._ends)
        if not self._ends:
            return None
        return self._at + (self._ends[0][0] - self._steps) * self._step_secs()

    def take(self, now: float) -> list[Progress]:
        done: list[Progress] = []
        while (at := self.next_at()) is not None and at <= now:
            if self._prefilling is not None:
                done += self._end_prefill(at)
                continue
            step, request = heapq.heappop(self._ends)
            self._at, self._steps = at, step
            del self._running[request]
            done.append(Progress(request, finished=True))
            self._begin_prefill(at)
        return done

    def _step_secs(self) -> float:
        return self._speed.step_secs + self._speed.step_secs_per_request * len(self._running)

    def _advance(self, now: float) -> None:
        if self._running and self._prefilling is None and not self._paused:
            self._steps += (now - self._at) / self._step_secs()
        self._at = now

    def _begin_prefill(self, now: float) -> None:
        if self._paused or self._prefilling is not None or not self._waiting:
            return
        if len(self._running) >= self._speed.max_running:
            return
        self._advance(now)
        self._prefilling = run = self._waiting.popleft()
        tokens = run.work.prompt + run.produced
        self._prefill_ends = now + tokens * self._speed.prefill_secs_per_token

    def _end_prefill(self, now: float) -> list[Progress]:
        run = self._prefilling
        assert run is not None
        done = [Progress(run.request, finished=False)] if not run.produced else []
        self._prefilling = None
        self._at = now
        left = run.work.answer - max(run.produced, 1.0)
        if left <= 0:
            done.append(Progress(run.request, finished=True))
        else:
            run.ends_at_step = self._steps + left
            self._running[run.request] = run
            heapq.heappush(self._ends, (run.ends_at_step, run.request))
        self._begin_prefill(now)
        return done

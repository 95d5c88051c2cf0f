"""What arrives: llmux 0.7's twelve profiles, Poisson processes over models, and recorded traces.

Each workload is a list of arrivals in the order of their time, in seconds from 0, the same for the same arguments.
"""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from llmuxd.sim.virtual.scenario import Arrival
from llmuxd.sim.virtual.service import Work

ZIPF_EXPONENT = 1.2

# Tokens of prompts and answers: the quantiles 0, 0.05 ... 1 of the 562 requests in four traces of the Aegaeon artifact
# (SOSP 2025, Apache-2.0), one of them with doubled answers.
PROMPT_QUANTILES = (
    2, 6, 11, 22, 33, 58, 168, 223, 305, 429, 543, 645, 773, 859, 984, 1099, 1257, 1370, 1528, 1759, 11630,
)  # fmt: skip
ANSWER_QUANTILES = (
    16, 33, 64, 108, 125, 156, 182, 213, 241, 269, 297, 312, 337, 377, 420, 482, 538, 609, 714, 914, 2482,
)  # fmt: skip


# llmux 0.7's profiles


def _single_model() -> list[Arrival]:
    return [Arrival(0.1 * i, "A") for i in range(40)]


def _balanced() -> list[Arrival]:
    return [Arrival(0.1 * i, "AB"[i % 2]) for i in range(40)]


def _bursts(bursts: int, size: int) -> list[Arrival]:
    return [Arrival(5.0 * b + 0.01 * i, "AB"[b % 2]) for b in range(bursts) for i in range(size)]


def _dominant(n: int, share: float) -> list[Arrival]:
    """Mostly A. How many are of B is cut down to a whole number from what floating point makes of 1 - `share`."""
    of_b = int(n * (1 - share))
    arrivals = []
    seen = 0
    for i in range(n):
        is_b = seen < int((i + 1) / n * of_b)
        seen += is_b
        arrivals.append(Arrival(0.05 * i, "B" if is_b else "A"))
    return arrivals


def _interleave() -> list[Arrival]:
    return [Arrival(0.01 * i + 0.001 * k, "AB"[k]) for i in range(30) for k in range(2)]


def _surge() -> list[Arrival]:
    both = [Arrival(0.5 * i, "A") for i in range(20)] + [Arrival(5 + 0.01 * i, "B") for i in range(20)]
    return sorted(both, key=lambda arrival: arrival.at)


def _three_model() -> list[Arrival]:
    starts = [(3.0 * block, "ABC"[block % 3]) for block in range(6)]
    return [Arrival(start + 0.1 * i, model) for start, model in starts for i in range(10)]


def _random(n: int, seed: int) -> list[Arrival]:
    """From a linear congruential generator modulo 2^64 (Knuth's multiplier)."""
    arrivals = []
    at = 0.0
    state = seed
    for _ in range(n):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        at += ((state >> 40) % 200) / 1000
        arrivals.append(Arrival(at, "AB"[(state >> 33) % 2]))
    return arrivals


PROFILES: Mapping[str, Callable[[], list[Arrival]]] = {
    "single_model": _single_model,
    "balanced": _balanced,
    "bursty": lambda: _bursts(4, 10),
    "dominant": lambda: _dominant(50, 0.8),
    "interleave": _interleave,
    "surge": _surge,
    "three_model": _three_model,
    "random_50": lambda: _random(50, 42),
    "random_100": lambda: _random(100, 123),
    "random_200": lambda: _random(200, 456),
    "dominant_95": lambda: _dominant(80, 0.95),
    "heavy_burst": lambda: _bursts(6, 50),
}
"""The workloads by which llmux 0.7 compared its policies."""


# Poisson arrivals


def zipf_shares(models: int) -> list[float]:
    """What part of all requests each model gets, the first one most."""
    weights = [1 / rank**ZIPF_EXPONENT for rank in range(1, models + 1)]
    return [weight / sum(weights) for weight in weights]


def poisson(models: int, rate: float, seconds: float, seed: int, *, zipf: bool = False) -> list[Arrival]:
    """`rate` requests per second and model on the average, each model its own process; lengths as Aegaeon's.

    With `zipf` the models share the same total by Zipf's law with exponent 1.2.
    """
    shares = zipf_shares(models) if zipf else [1 / models] * models
    dice = random.Random(f"poisson/{models}/{rate}/{zipf}/{seed}")
    arrivals = []
    for number, share in enumerate(shares):
        at = dice.expovariate(rate * models * share)
        while at < seconds:
            work = Work(_drawn(PROMPT_QUANTILES, dice), _drawn(ANSWER_QUANTILES, dice))
            arrivals.append(Arrival(at, model_name(number), work))
            at += dice.expovariate(rate * models * share)
    return sorted(arrivals, key=lambda arrival: arrival.at)


def _drawn(quantiles: Sequence[int], dice: random.Random) -> int:
    place = dice.random() * (len(quantiles) - 1)
    low = int(place)
    return max(1, round(quantiles[low] + (place - low) * (quantiles[low + 1] - quantiles[low])))


def model_name(number: int) -> str:
    return f"m{number:02d}"


# Traces


def _rows(path: Path) -> Iterator[dict[str, str]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    yield from csv.DictReader(text.splitlines())


def aegaeon(path: Path) -> list[Arrival]:
    """A trace of the Aegaeon artifact: Request Time (h:m:s), Model Name, Input Length, Output Length."""
    arrivals = []
    for row in _rows(path):
        hours, minutes, seconds = row["Request Time"].split(":")
        at = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        arrivals.append(Arrival(at, row["Model Name"], Work(int(row["Input Length"]), int(row["Output Length"]))))
    return sorted(arrivals, key=lambda arrival: arrival.at)


def azure(path: Path, models: int, seed: int) -> list[Arrival]:
    """An Azure LLM inference trace of 2023, its requests given to models by Zipf's law with exponent 1.2."""
    dice = random.Random(f"azure/{models}/{seed}")
    shares = zipf_shares(models)
    arrivals = []
    begin: datetime | None = None
    for row in _rows(path):
        # Seven digits of a second, of which Python knows six.
        time = datetime.fromisoformat(row["TIMESTAMP"][:26])
        begin = begin or time
        model = model_name(dice.choices(range(models), shares)[0])
        work = Work(int(row["ContextTokens"]), max(1, int(row["GeneratedTokens"])))
        arrivals.append(Arrival((time - begin).total_seconds(), model, work))
    return sorted(arrivals, key=lambda arrival: arrival.at)

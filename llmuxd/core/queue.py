"""A request, and the queue of a model: who is next, who has waited longest, and who is where.

Where a request is, in a queue, in flight or gone, is `requests`' to decide.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

Place = tuple[int, float, int]
"""Orders the requests of a model: the higher priority, then the earlier arrival, then the lower number is first."""


def place_of(priority: int, arrived: float, request: int) -> Place:
    """Where a request stands among those that wait for the same model, however often it is queued."""
    return -priority, arrived, request


@dataclass(slots=True)
class Request:
    """One accepted request, from its arrival to its end. Times are clock seconds."""

    id: int
    model: str
    arrived: float
    deadline: float | None
    """When it is refused if it is still queued."""
    timeout: float | None = None
    """How long it may be queued in one go, in seconds; None for ever."""
    priority: int = 0
    retried: bool = False
    forwarded: float = 0.0


@dataclass(slots=True)
class Queue:
    """The requests that wait for one model, by `place_of`. Nothing here costs more than a look at a few of them."""

    arrivals: float = 0.0
    """The sum of the arrival times: how long all of them have waited is known without a look at each."""
    _requests: dict[int, Request] = field(default_factory=dict)
    _places: list[Place] = field(default_factory=list)
    """Sorted, as is the next."""
    _ages: list[tuple[float, int]] = field(default_factory=list)
    """Arrival and number: with priorities the first is not always the oldest."""

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: Request) -> bool:
        return request.id in self._requests

    def __iter__(self) -> Iterator[Request]:
        """The one to forward first comes first."""
        return (self._requests[id_] for _, _, id_ in self._places)

    @property
    def first(self) -> Request | None:
        """The one to forward next."""
        return self._requests[self._places[0][2]] if self._places else None

    @property
    def oldest(self) -> float | None:
        """When the one arrived that has waited longest, whatever its priority."""
        return self._ages[0][0] if self._ages else None

    def before(self, request: Request) -> int:
        """How many are forwarded before a request that is queued."""
        return bisect_left(self._places, _place(request))

    def add(self, request: Request) -> None:
        self._requests[request.id] = request
        insort(self._places, _place(request))
        insort(self._ages, (request.arrived, request.id))
        self.arrivals += request.arrived

    def remove(self, request: Request) -> None:
        del self._requests[request.id]
        del self._places[bisect_left(self._places, _place(request))]
        del self._ages[bisect_left(self._ages, (request.arrived, request.id))]
        self.arrivals = self.arrivals - request.arrived if self._requests else 0.0


def _place(request: Request) -> Place:
    return place_of(request.priority, request.arrived, request.id)

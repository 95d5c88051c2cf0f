"""Clients' keys: who a request is from, and what that client may do. Pure: the time is passed in.

Keys are known by their hashes alone, and are in no message. Which requests need one is `handler`'s to know; the order
in a model's queue, the core's.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import deque
from collections.abc import Iterable

from llmuxd.config import KeyConfig
from llmuxd.gate import Refused
from llmuxd.proxy.errors import Rejected
from llmuxd.proxy.headers import PRIORITY

WINDOW_SECS = 60.0
HIGHEST_PRIORITY = 100
"""The lowest is that much below 0."""

_BEARER = re.compile(rb"bearer[ \t]+(.*)", re.IGNORECASE | re.DOTALL)
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,3}")
_REMEMBERED = 16
"""Requests whose durations count in what the next one can expect."""


class _Use:
    """What a client does, and did. A reload of the config leaves it as it is: requests in flight will end in it."""

    __slots__ = ("admitted", "begun", "duration", "ended")

    def __init__(self) -> None:
        self.admitted: deque[float] = deque()
        """When, within the last minute, while there is a bound on their number."""
        self.begun: deque[float] = deque()
        """When those that have not ended began."""
        self.ended = 0
        self.duration = 0.0
        """The mean of the last ones."""


class Key:
    """One client. Times are seconds of a clock that does not go back.

    Of a request that `admit` does not refuse, `release` is to be called at its end.
    """

    __slots__ = ("_config", "_digest", "_models", "_use")

    def __init__(self, config: KeyConfig, old: Key | None = None) -> None:
        self._config = config
        self._digest = bytes.fromhex(config.sha256)
        self._models = None if config.models is None else frozenset(config.models)
        self._use: _Use = _Use() if old is None else old._use

    @property
    def name(self) -> str:
        """Empty if no key is needed, and nobody is known."""
        return self._config.name

    @property
    def identity(self) -> tuple[str, str]:
        """What makes it the same key under another config."""
        return self._config.name, self._config.sha256

    @property
    def in_flight(self) -> int:
        """Requests that have been admitted and have not ended, waiting ones included."""
        return len(self._use.begun)

    def is_hashed_as(self, digest: bytes) -> bool:
        """Whether this is the hash of the key; how long that takes tells nothing."""
        return hmac.compare_digest(self._digest, digest)

    def may_use(self, model: str) -> bool:
        """Whether the client may use a model, by its configured name."""
        return self._models is None or model in self._models

    def model_not_allowed(self, model: str) -> Rejected:
        """403, with the models that the key is for."""
        allowed = ", ".join(self._config.models or ())
        message = f"the key `{self.name}` may not use the model `{model}`. It may use: {allowed}"
        return Rejected(403, "model_not_allowed", message, "model")

    def priority_of(self, header: str | None) -> int:
        """The priority of a request with this x-llmux-priority: the key's if there is none. Raises Rejected."""
        field, most = PRIORITY.decode(), self._config.priority
        if header is None:
            return most
        text = header.strip(" \t")
        wanted = int(text) if _WHOLE_NUMBER.fullmatch(text) else None
        if wanted is None or abs(wanted) > HIGHEST_PRIORITY:
            message = f"{field} has to be a whole number, -{HIGHEST_PRIORITY} to {HIGHEST_PRIORITY}"
            raise Rejected(400, "invalid_priority", message, field)
        if wanted > most:
            who = f"the key `{self.name}`" if self.name else "a request without a key"
            raise Rejected(403, "priority_not_allowed", f"{who} may have a priority of {most} at most", field)
        return wanted

    def admit(self, now: float) -> Refused | None:
        """Count a request that begins; or why it may not, and then it does not count."""
        use, most, per_minute = self._use, self._config.max_parallel, self._config.requests_per_minute
        if most is not None and self.in_flight >= most:
            message = f"the key `{self.name}` has as many requests at once as it may: {most}"
            return Refused(429, "too_many_parallel_requests", "rate_limit_error", message, self._until_one_ends(now))
        if per_minute is not None:
            while use.admitted and now - use.admitted[0] >= WINDOW_SECS:
                use.admitted.popleft()
            # More than the bound, if that was lowered by a reload.
            over = len(use.admitted) - per_minute
            if over >= 0:
                message = f"the key `{self.name}` has made as many requests in a minute as it may: {per_minute}"
                free_in = use.admitted[over] + WINDOW_SECS - now
                return Refused(429, "rate_limit_exceeded", "rate_limit_error", message, free_in)
            use.admitted.append(now)
        use.begun.append(now)
        return None

    def release(self, now: float) -> None:
        """An admitted request has ended."""
        use = self._use
        # Whichever of them has ended: their mean is the same.
        lasted = now - use.begun.popleft()
        use.ended = min(use.ended + 1, _REMEMBERED)
        use.duration += (lasted - use.duration) / use.ended

    def _until_one_ends(self, now: float) -> float:
        """How long it takes, in seconds, by what the last ones took; by the age of the oldest if there are none."""
        use = self._use
        one = use.duration if use.ended else now - use.begun[0]
        return max(1.0, one / len(use.begun))


class KeyRing:
    """Every key there is. Without any, no request needs one."""

    def __init__(self, keys: Iterable[KeyConfig] = (), old: KeyRing | None = None) -> None:
        there = {} if old is None else {key.identity: key for key in old._keys}
        self._keys: tuple[Key, ...] = tuple(Key(config, there.get((config.name, config.sha256))) for config in keys)
        self._anyone = Key(KeyConfig("", ""))

    @property
    def open(self) -> bool:
        """Whether no request needs a key."""
        return not self._keys

    def renewed(self, keys: Iterable[KeyConfig]) -> KeyRing:
        """The keys of a new config. Those that stay, by name and hash, go on counting where they were."""
        return KeyRing(keys, self)

    def find(self, presented: bytes | None) -> Key | None:
        """The key that this is, if it is one. Each is compared with, so that the time it takes tells nothing."""
        if presented is None:
            return None
        digest = hashlib.sha256(presented).digest()
        matching = [key for key in self._keys if key.is_hashed_as(digest)]
        return matching[0] if matching else None

    def identify(self, authorization: bytes | None, x_api_key: bytes | None) -> Key:
        """Whom a request is from, by its two fields; where none needs a key, one without bounds. Raises Rejected."""
        if self.open:
            return self._anyone
        given = presented(authorization, x_api_key)
        if given is None:
            raise _not_valid("no key is given: send `Authorization: Bearer KEY` or `x-api-key: KEY`")
        key = self.find(given)
        if key is None:
            raise _not_valid("the key is not valid")
        return key


def presented(authorization: bytes | None, x_api_key: bytes | None) -> bytes | None:
    """The key in these fields; None if there is none. Raises Rejected if there are two."""
    bearer = _BEARER.fullmatch(authorization or b"")
    found = {key.strip(b" \t") for key in (bearer[1] if bearer else b"", x_api_key or b"")} - {b""}
    if len(found) > 1:
        raise _not_valid("Authorization and x-api-key hold different keys")
    return found.pop() if found else None


def _not_valid(message: str) -> Rejected:
    """401. The caller adds WWW-Authenticate."""
    return Rejected(401, "invalid_api_key", message)

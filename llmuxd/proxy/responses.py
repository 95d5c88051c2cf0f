"""Which engine made a stored response (OpenAI's Responses API), so that a later request for its id goes there. Pure.

An engine keeps its responses itself and forgets them when it ends: here is only who has them.
"""

from __future__ import annotations

import re
from collections import OrderedDict

MAX_RESPONSES = 10_000
"""Of more than these, the oldest are forgotten."""

_ID = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,120})"')


class Responses:
    """Response id -> the model whose engine made it, for the key that asked for it."""

    def __init__(self) -> None:
        self._made: OrderedDict[str, tuple[str, str]] = OrderedDict()

    def learn(self, answer: bytes, model: str, key: str) -> None:
        """An answer begins so: of its first event, or the object that it is, the id is noted.

        vLLM lets clients choose ids: one that is another key's stays so.
        """
        found = _ID.search(answer)
        if found is None:
            return
        response = found[1].decode()
        if self.is_anothers(response, key):
            return
        self._made[response] = (model, key)
        if len(self._made) > MAX_RESPONSES:
            self._made.popitem(last=False)

    def is_anothers(self, response: str, key: str) -> bool:
        """Whether it is known as another key's."""
        return self._made.get(response, ("", key))[1] != key

    def made_by(self, response: str, key: str) -> str | None:
        """The model that made it; None if there is none, or it is another key's."""
        model, owner = self._made.get(response, (None, key))
        return model if owner == key else None

"""The `daemon` fixture: makes daemons, and sees that nothing is left of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.stack import Daemon
from tests.loops import use_wanted_loop

use_wanted_loop()

MakeDaemon = Callable[..., Daemon]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[MakeDaemon]:
    """`daemon("a", "b", top={...}, policy={...}, a={...})`: a daemon, not started yet."""
    made: list[Daemon] = []

    def make(*names: str, top: Any = None, policy: Any = None, **models: Any) -> Daemon:
        configured = {name: models.get(name, {}) for name in (*names, *models)}
        made.append(Daemon(tmp_path, configured, top or {}, policy or {}))
        return made[-1]

    yield make
    for stack in made:
        try:
            if hasattr(stack, "process"):
                stack.stop()
        finally:
            left = stack.sweep()
        assert left == [], "processes were left behind"

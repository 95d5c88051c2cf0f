"""Which event loop the tests of this run use: LLMUX_TEST_LOOP=uvloop is what the daemon uses where uvloop is installed."""

from __future__ import annotations

import asyncio
import os


def use_wanted_loop() -> None:
    """For the rest of the process."""
    if os.environ.get("LLMUX_TEST_LOOP") == "uvloop":
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

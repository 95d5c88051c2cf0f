"""Reading the config anew while everything runs, and taking over what differs.

What a difference means for engines and requests is decided in `core.reloading`; which differences there are, in
`config.diff`. Here the files are read, and a config with a problem changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from llmuxd.config import Change, Config, ConfigError, changes, load_config
from llmuxd.control.api import BadConfig
from llmuxd.policies import PolicyBroken
from llmuxd.proxy.handler import Proxy
from llmuxd.runtime import Runtime

log = logging.getLogger("llmuxd")


class Reloader:
    """Reloads the config of one stack; `path` is None where it did not come from a file."""

    def __init__(self, path: Path | None, runtime: Runtime, proxy: Proxy) -> None:
        self._path = path
        self._runtime = runtime
        self._proxy = proxy
        self._one_at_a_time = asyncio.Lock()

    async def reload(self) -> list[Change]:
        """Read the files, and take over what is in them; the differences. Raises BadConfig."""
        async with self._one_at_a_time:
            try:
                config = await self._read()
                found = self.apply(config)
            except BadConfig as bad:
                log.error("the config is not reloaded, nothing has changed:\n  %s", str(bad).replace("\n", "\n  "))
                raise
        for warning in config.warnings:
            log.warning("%s", warning)
        told = "".join(f"\n  {change}" for change in found)
        log.info("the config is reloaded: %s", f"{len(found)} changes{told}" if found else "no changes")
        return found

    async def diff(self) -> dict[str, Any]:
        """What a reload would do: the file, the differences, the problems."""
        found: dict[str, Any] = {"file": None if self._path is None else str(self._path), "changes": [], "problems": []}
        try:
            config = await self._read()
        except BadConfig as bad:
            found["problems"] = str(bad).splitlines()
        else:
            found["changes"] = [change.as_json() for change in changes(self._runtime.config, config)]
        return found

    def apply(self, config: Config) -> list[Change]:
        """Take over a config that has been read; the differences. Raises BadConfig."""
        found = changes(self._runtime.config, config)
        try:
            self._runtime.reload(config)
        except (PolicyBroken, ValueError) as error:
            raise BadConfig(str(error)) from error
        self._proxy.reload(config)
        return found

    async def _read(self) -> Config:
        if self._path is None:
            raise BadConfig("this daemon's config did not come from a file; there is nothing to read anew")
        try:
            return await asyncio.to_thread(load_config, self._path)
        except ConfigError as error:
            raise BadConfig(str(error)) from error

"""The stack as a library: the proxy, the metrics and the control applications over one runtime.

`llmuxd.daemon` is built on this and nothing else. Listening, signals and folders are the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from llmuxd.adoption import adopt_engines
from llmuxd.book import Book, Entry
from llmuxd.config import Change, Config
from llmuxd.control import build_control
from llmuxd.core.switcher import Switcher
from llmuxd.logs import about
from llmuxd.metrics import Metrics, build_metrics
from llmuxd.proxy import Limits, build_proxy
from llmuxd.proxy.access import Writer, log_each
from llmuxd.proxy.handler import PROXY
from llmuxd.reloader import Reloader
from llmuxd.runtime import Runtime
from llmuxd.steering import Steering

log = logging.getLogger("llmuxd")


@dataclass(frozen=True)
class App:
    """One llmux stack. Serve the applications with aiohttp's runners (the proxy with `llmuxd.proxy.serve_proxy`,
    which also notices clients that leave); then `close` it."""

    proxy: web.Application
    metrics: web.Application | None
    """None if `metrics_port` is 0."""
    control: web.Application
    switcher: Switcher
    runtime: Runtime
    steering: Steering
    reloader: Reloader

    async def adopt(self, entries: Mapping[str, Entry]) -> None:
        """Take over the engines that an earlier daemon has left, by what its state file says of them, and the images.

        What cannot be taken over is ended. To be called before anything else.
        """
        await adopt_engines(self.runtime, dict(entries))
        for engine in self.runtime.engines.values():
            await engine.tidy_images()
        await self.runtime.images.find(list(self.runtime.engines))

    def reload(self, config: Config) -> list[Change]:
        """Take over a new config, as far as that is possible while running; the differences.

        Raises BadConfig, and nothing has changed then.
        """
        return self.reloader.apply(config)

    async def hand_over(self, timeout: float) -> None:
        """Finish what there is within `timeout` seconds, end the rest, and leave the engines to the next daemon."""
        await self.runtime.hand_over(timeout)

    async def close(self, timeout: float = 0.0) -> None:
        """Refuse new requests, let those in flight finish for `timeout` seconds, stop every engine."""
        await self.runtime.shut_down(timeout)


def build_app(
    config: Config, config_path: Path | None = None, book: Book | None = None, write_log: Writer = log_each
) -> App:
    """The stack that `config` describes. Nothing is started and nothing listens yet.

    With a `book` the engines can be found again by a later stack. `config_path` is what a reload reads; without it
    there is none by the control socket. `write_log` writes the access log, by default to the logger `llmuxd.access`.
    Use it, and call it, in one running event loop. Raises PolicyBroken.
    """
    metrics = Metrics()
    runtime = Runtime(config, metrics, book=book)
    proxy = build_proxy(runtime.gate, Limits.of(config), metrics, write_log)
    proxy[PROXY].reload(config)
    runtime.before_saving.append(proxy[PROXY].close_idle)
    reloader = Reloader(config_path, runtime, proxy[PROXY])
    steering = Steering(runtime, reloader)

    async def begin(_proxy: web.Application) -> None:
        runtime.start()

    proxy.on_startup.append(begin)
    return App(
        proxy=proxy,
        metrics=build_metrics(metrics) if config.metrics_port else None,
        control=build_control(steering, config.control_read_group),
        switcher=runtime.switcher,
        runtime=runtime,
        steering=steering,
        reloader=reloader,
    )


async def run_warmup(
    app: App,
    progress: Callable[[dict[str, Any]], None] | None = None,
    models: Sequence[str] | None = None,
) -> None:
    """Warm every model, or those: start it, one inference, put it to sleep by its eviction policy.

    Raises ControlFailed, naming each, if models failed; the others are warm then all the same.
    """
    names = list(app.switcher.state.models) if models is None else list(models)
    if names:
        await app.steering.warmup(names, progress or _log_progress)


def _log_progress(event: dict[str, Any]) -> None:
    if event["event"] in ("warmup", "inference"):
        log.info("%s", event["text"], extra=about(event["model"]))

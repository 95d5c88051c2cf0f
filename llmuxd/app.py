"""The stack as a library: the proxy, the metrics and the control applications over one runtime.

`llmuxd.daemon` is built on this and nothing else. Listening, signals and folders are the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from llmuxd.config import Config
from llmuxd.control import build_control
from llmuxd.core.switcher import Switcher
from llmuxd.metrics import Metrics, build_metrics
from llmuxd.proxy import build_proxy
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

    async def close(self, timeout: float = 0.0) -> None:
        """Refuse new requests, let those in flight finish for `timeout` seconds, stop every engine."""
        await self.runtime.shut_down(timeout)


def build_app(config: Config) -> App:
    """The stack that `config` describes. Nothing is started and nothing listens yet.

    Use it, and call it, in one running event loop.
    """
    metrics = Metrics()
    runtime = Runtime(config, metrics)
    steering = Steering(runtime)
    proxy = build_proxy(
        runtime.gate,
        max_body_bytes=config.max_body_bytes,
        metrics=metrics,
        heartbeat_secs=config.heartbeat_secs,
    )

    async def begin(_proxy: web.Application) -> None:
        runtime.self_check.start()

    proxy.on_startup.append(begin)
    return App(
        proxy=proxy,
        metrics=build_metrics(metrics) if config.metrics_port else None,
        control=build_control(steering),
        switcher=runtime.switcher,
        runtime=runtime,
        steering=steering,
    )


async def run_warmup(app: App, progress: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Warm every model: start it, one inference, put it to sleep by its eviction policy.

    Raises ControlFailed, naming each, if models failed; the others are warm then all the same.
    """
    await app.steering.warmup(None, progress or _log_progress)


def _log_progress(event: dict[str, Any]) -> None:
    if event["event"] in ("warmup", "inference"):
        log.info("%s", event["text"], extra={"model": event["model"]})

"""The metrics of llmuxd, under the names of llmux 0.7 where it had them, and the page that shows them.

Counting lives here; what is counted is told by the core's notices and by the gate. Each `Metrics` has a
registry of its own, so that several stacks can live in one process.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llmuxd.core import commands as c
from llmuxd.core.engine_state import EngineState

_SECONDS = (0.005, 0.05, 0.25, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 1800.0)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """All counters, gauges and histograms. Label `model` is a configured name, never what a client sent."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("llmux_requests", "Requests by their final status", "model", "status")
        self.queue_wait = self._histogram(
            "llmux_request_queue_wait_seconds", "From a request's arrival to its forwarding", "model"
        )
        self.in_flight = self._gauge("llmux_in_flight", "Requests forwarded and not finished", "model")
        self.queued = self._gauge("llmux_queued", "Requests waiting", "model")
        self.switch_phase = self._histogram(
            "llmux_switch_phase_seconds", "Duration of a phase of a switch", "phase", "to"
        )
        self.switch_total = self._histogram("llmux_switch_total_seconds", "Duration of a switch", "to")
        self.switches = self._counter("llmux_switches", "Completed switches", "to")
        self.switch_failures = self._counter("llmux_switch_failures", "Failed switches", "to")
        self.active = self._gauge("llmux_active_model_info", "1 for each model that is awake", "model")
        self.state = self._gauge("llmux_engine_state", "1 for the state an engine is in", "model", "state")
        self.parked = self._gauge("llmux_parked", "Requests paused in an engine that sleeps", "model")
        self.violations = self._counter("llmux_invariant_violations", "Invariants seen broken", "invariant")
        self.policy_failures = self._counter("llmux_policy_failures", "Decisions taken by fifo instead", "policy")
        self.engine_failures = self._counter("llmux_engine_failures", "Starts, wakes and runs that failed", "model")

    def add_model(
        self, model: str, in_flight: Callable[[], float], queued: Callable[[], float], parked: Callable[[], float]
    ) -> None:
        """Make a model's gauges appear from the start; the functions are asked whenever they are read."""
        self.active.labels(model).set(0)
        self.in_flight.labels(model).set_function(in_flight)
        self.queued.labels(model).set_function(queued)
        self.parked.labels(model).set_function(parked)
        for state in EngineState:
            self.state.labels(model, state.value).set(state is EngineState.NOT_STARTED)

    def remove_model(self, model: str) -> None:
        """Make the gauges of a model disappear that is not there any more; what was counted of it stays."""
        for gauge in (self.active, self.in_flight, self.queued, self.parked):
            gauge.remove(model)
        for state in EngineState:
            self.state.remove(model, state.value)

    def notice(self, notice: c.Notice) -> None:
        """Count what the core tells of engines and switches."""
        if isinstance(notice, c.EngineChanged):
            self.state.labels(notice.model, notice.old.value).set(0)
            self.state.labels(notice.model, notice.new.value).set(1)
            self.active.labels(notice.model).set(notice.new is EngineState.AWAKE)
            if notice.new is EngineState.FAILED:
                self.engine_failures.labels(notice.model).inc()
        elif isinstance(notice, c.ModelGone):
            self.remove_model(notice.model)
        elif isinstance(notice, c.PolicyFailed):
            self.policy_failures.labels(notice.policy).inc()
        elif isinstance(notice, c.SwitchPhaseEnded):
            if notice.target is not None:
                self.switch_phase.labels(notice.phase.value, notice.target).observe(notice.seconds)
        elif isinstance(notice, c.SwitchEnded) and notice.target is not None and not notice.cancelled:
            if notice.error:
                self.switch_failures.labels(notice.target).inc()
            else:
                self.switches.labels(notice.target).inc()
                self.switch_total.labels(notice.target).observe(notice.seconds)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=_SECONDS)


def build_metrics(metrics: Metrics) -> web.Application:
    """The application of the metrics port: GET /metrics."""

    async def show(_request: web.Request) -> web.Response:
        page = generate_latest(metrics.registry)
        return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE})

    app = web.Application()
    app.router.add_get("/metrics", show)
    return app

"""What the metrics page shows of models that come and go."""

from __future__ import annotations

from prometheus_client import generate_latest

from llmuxd.core import commands as c
from llmuxd.core.engine_state import EngineState as S
from llmuxd.metrics import Metrics


def shown(metrics: Metrics) -> list[str]:
    return [line for line in generate_latest(metrics.registry).decode().splitlines() if 'model="a"' in line]


def test_a_model_that_is_gone_has_no_gauges_and_may_come_back():
    metrics = Metrics()
    metrics.requests.labels("a", "200").inc()
    metrics.add_model("a", lambda: 1, lambda: 2, lambda: 3)
    metrics.notice(c.EngineChanged("a", S.STOPPING, S.NOT_STARTED, 1.0))
    assert len(shown(metrics)) > 10
    metrics.notice(c.ModelGone("a"))
    assert {line.partition("{")[0] for line in shown(metrics)} == {"llmux_requests_total", "llmux_requests_created"}
    metrics.add_model("a", lambda: 4, lambda: 5, lambda: 6)
    assert 'llmux_in_flight{model="a"} 4.0' in shown(metrics)

"""The comparison of policies: its workloads are the published ones, its services do what they say."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from llmuxd.core.settings import InFlight
from llmuxd.sim.__main__ import cli
from llmuxd.sim.virtual import workloads
from llmuxd.sim.virtual.bench import SERIAL_COSTS, Case, batch_workloads, run_case
from llmuxd.sim.virtual.plots import Line, chart
from llmuxd.sim.virtual.service import BatchService, BatchSpeed, Progress, SerialService, Work

COUNTS = {
    "single_model": 40, "balanced": 40, "bursty": 40, "dominant": 50, "interleave": 60, "surge": 40, "three_model": 60,
    "random_50": 50, "random_100": 100, "random_200": 200, "dominant_95": 80, "heavy_burst": 300,
}  # fmt: skip


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_the_profiles_are_the_published_ones(name, count):
    arrivals = workloads.PROFILES[name]()
    assert len(arrivals) == count
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)


def test_how_many_are_of_the_second_model():
    assert sum(a.model == "B" for a in workloads.PROFILES["dominant"]()) == 9
    assert sum(a.model == "B" for a in workloads.PROFILES["dominant_95"]()) == 4


@pytest.mark.parametrize(
    ("costs", "published"), list(zip(SERIAL_COSTS, [17, 16, 16, 16, 21, 14, 14], strict=True)), ids=str
)
def test_time_slice_switches_as_often_as_published(costs, published):
    cost, secs = costs
    profiles = [name for name in workloads.PROFILES if name != "single_model"]
    rows = [run_case(Case(name, "serial", cost, "time_slice", InFlight.DRAIN, secs)) for name in profiles]
    assert sum(row["switches"] for row in rows) == published
    assert sum(row["answered"] for row in rows) == 1020


def test_poisson_arrivals_are_as_many_as_asked_for_and_always_the_same():
    arrivals = workloads.poisson(4, 0.5, 3600.0, 1)
    assert arrivals == workloads.poisson(4, 0.5, 3600.0, 1)
    assert arrivals != workloads.poisson(4, 0.5, 3600.0, 2)
    assert len(arrivals) == pytest.approx(7200, rel=0.05)
    assert {a.model for a in arrivals} == {"m00", "m01", "m02", "m03"}
    zipf = workloads.poisson(4, 0.5, 3600.0, 1, zipf=True)
    assert len(zipf) == pytest.approx(7200, rel=0.05)
    assert sum(a.model == "m00" for a in zipf) / len(zipf) == pytest.approx(workloads.zipf_shares(4)[0], abs=0.03)
    assert sum(workloads.zipf_shares(8)) == pytest.approx(1)


def test_traces_are_read(tmp_path: Path):
    (tmp_path / "aegaeon-x.csv").write_text(
        "Request Time,Model Name,Input Length,Output Length\n00:01:03.500,b,10,20\n00:00:01.000,a,1,2\n"
    )
    azure = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,48,10\n2023-11-16 18:17:04.9799600,31,0\n"
    )
    (tmp_path / "azure-2023-x.csv.gz").write_bytes(gzip.compress(azure.encode()))
    found = batch_workloads(tmp_path)
    assert [(a.at, a.model, a.work) for a in found["aegaeon-x"]()] == [(1, "a", Work(1, 2)), (63.5, "b", Work(10, 20))]
    first, second = found["azure-2023-x-over-4"]()
    assert (first.at, first.work, second.at, second.work) == (0, Work(48, 10), 1, Work(31, 1))
    assert "azure-2023-x-over-8" in found


def drained(service: SerialService | BatchService) -> list[tuple[float, Progress]]:
    """Let it work until nothing is left."""
    seen = []
    now = 0.0
    while (at := service.next_at()) is not None:
        now = max(at, now)
        seen += [(round(now, 6), progress) for progress in service.take(now)]
    return seen


def test_serial_service_is_one_after_the_other():
    service = SerialService(2.0)
    service.add(1, Work(1, 1), 0.0)
    service.add(2, Work(1, 1), 0.0)
    assert drained(service) == [
        (0.0, Progress(1, finished=False)),
        (2.0, Progress(1, finished=True)),
        (2.0, Progress(2, finished=False)),
        (4.0, Progress(2, finished=True)),
    ]


SPEED = BatchSpeed(prefill_secs_per_token=0.01, step_secs=1.0, step_secs_per_request=0.5)


def test_a_batch_prefills_alone_and_its_step_grows():
    """Two of 100 tokens: 1 s each to prefill, then 1 + 2 x 0.5 s for a token of both."""
    service = BatchService(SPEED)
    service.add(1, Work(100, 2), 0.0)
    service.add(2, Work(100, 2), 0.0)
    assert drained(service) == [
        (1.0, Progress(1, finished=False)),
        (2.0, Progress(2, finished=False)),
        (4.0, Progress(1, finished=True)),
        (4.0, Progress(2, finished=True)),
    ]


def test_what_was_paused_is_prefilled_again_with_what_it_has():
    """After the first token and one step: 102 tokens to compute again, then 8 steps of 1.5 s."""
    service = BatchService(SPEED)
    service.add(1, Work(100, 10), 0.0)
    assert service.take(1.0) == [Progress(1, finished=False)]
    service.pause(2.5)
    assert service.next_at() is None
    service.resume(10.0)
    assert service.next_at() == pytest.approx(10 + 1.02)
    assert service.take(12.0) == []
    assert service.next_at() == pytest.approx(10 + 1.02 + 8 * 1.5)


def test_what_is_removed_makes_room_for_the_rest():
    service = BatchService(SPEED)
    service.add(1, Work(100, 100), 0.0)
    service.add(2, Work(100, 3), 0.0)
    service.take(2.0)
    service.remove(1, 2.0)
    assert service.next_at() == pytest.approx(2.0 + 2 * 1.5)


def test_a_row_says_what_is_asked_and_is_always_the_same():
    case = Case("poisson-4x0.1", "batch", 2.0, "tenure", InFlight.PARK)
    row = run_case(case)
    assert row == run_case(case)
    assert {"workload", "service", "switch_cost", "policy", "in_flight", "requests", "switches", "gpu_fraction", "ttft",
            "e2e", "wait_max"} <= set(row)  # fmt: skip
    assert set(row["ttft"]) == set(row["e2e"]) == {"mean", "p50", "p99", "max"}
    assert row["answered"] == row["requests"] > 1000
    assert 0 < row["ttft"]["mean"] < row["e2e"]["mean"]
    assert row["pause_max"] > 0


def test_the_command_prints_json_lines():
    result = CliRunner().invoke(cli, ["bench", "--json", "-p", "tenure", "--workloads", "balanced"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [(row["workload"], row["switch_cost"]) for row in rows] == [("balanced", cost) for cost, _ in SERIAL_COSTS]


def test_a_sweep_and_its_log():
    runner = CliRunner()
    result = runner.invoke(cli, ["--seeds", "0:20", "--processes", "1"])
    assert result.exit_code == 0, result.output
    assert "20 seeds (0:20)" in result.output
    assert "no invariant broken" in result.output
    log = runner.invoke(cli, ["replay", "3"]).output
    assert log == runner.invoke(cli, ["replay", "3"]).output
    assert log.startswith("0.000000 ")
    for wrong in ("x", "5:5", "7:2"):
        assert runner.invoke(cli, ["--seeds", wrong]).exit_code == 2


def test_a_chart_is_svg_with_its_words():
    image = chart("A < B", "x", "y", [Line("one", [(0, 1), (2, 3)]), Line("two", [(1, 1)], joined=False)])
    assert image.startswith("<svg")
    assert image.endswith("</svg>\n")
    assert "A &lt; B" in image
    assert image.count("<circle") == 3 + 2

"""The benchmark of the relay: its engine answers as llmuxd needs it, its clients count right, its table tells the
truth. The figures themselves are `make bench-relay`'s."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from benchmarks.relay import report, usage
from benchmarks.relay.clients import Broken, post, streaming, timed
from benchmarks.relay.contestants import ALONE, BODY, CADDY, LLMUXD, NGINX, free_port
from benchmarks.relay.engine import ANSWER_BYTES, EVENT_BYTES, PACE, Connection, Engine, chat_answer, event
from benchmarks.relay.measure import BUSY, CONNECTIONS, IDLE, STALLING, STREAMS, Cores, Figures, quantile
from llmuxd.engine.api import Health, VllmApi
from llmuxd.engine.spec import Endpoint
from llmuxd.tasks import poll

DEADLINE_SECS = 10.0


@contextlib.asynccontextmanager
async def engine_at(port: int) -> AsyncIterator[Engine]:
    loop = asyncio.get_running_loop()
    engine = Engine("bench", loop)
    server = await loop.create_server(lambda: Connection(engine), "127.0.0.1", port)
    try:
        yield engine
    finally:
        server.close()


def run(work):
    return asyncio.run(asyncio.wait_for(work, DEADLINE_SECS))


async def raw(port: int, request: bytes, end: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await reader.readuntil(end)
    finally:
        writer.close()


async def until(condition):
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.005)


SERVE = """
import gc
import sys
from pathlib import Path
from benchmarks.relay.engine import serve
try:
    from uvloop import run
except ImportError:  # With the oldest versions that are supported it is not there.
    from asyncio import run
# What nobody refers to is gone at once, not some time.
gc.set_threshold(1)
run(serve("bench", Path(sys.argv[1]), int(sys.argv[2])))
"""


def test_the_engine_stays_on_its_socket_and_its_port_until_it_is_ended(tmp_path):
    uds, port = tmp_path / "bench.sock", free_port()

    async def health(endpoint: Endpoint) -> Health:
        async with VllmApi(endpoint, "bench") as api:
            return await api.health(DEADLINE_SECS)

    async def both() -> None:
        async def serves() -> bool:
            return await health(Endpoint(port=port)) is not Health.REFUSED

        await poll(serves, 0.005)
        for _ in range(2):
            assert await health(Endpoint(uds=uds)) is Health.OK
            assert await health(Endpoint(port=port)) is Health.OK

    with subprocess.Popen([sys.executable, "-c", SERVE, str(uds), str(port)]) as process:
        try:
            run(both())
            process.terminate()
            assert process.wait(DEADLINE_SECS) == 0
        finally:
            process.kill()


def test_the_answers_have_the_size_that_they_are_to_have():
    assert len(chat_answer("bench")) == ANSWER_BYTES
    assert len(event("bench")) == EVENT_BYTES
    assert json.loads(chat_answer("bench"))["usage"]["completion_tokens"] == 64
    assert json.loads(event("bench").removeprefix(b"data: "))["choices"][0]["delta"]["content"]


def test_the_engine_is_one_that_llmuxd_can_start():
    async def work():
        port = free_port()
        async with engine_at(port), VllmApi(Endpoint(port=port), "bench") as api:
            assert await api.health(1.0) is Health.OK
            assert await api.has_sleep()
            assert (await api.version()).startswith("0.")
            await api.infer()
            await api.sleep(1, "wait")
            await api.verify_sleeping(True)
            await api.wake()
            await api.verify_sleeping(False)

    run(work())


def test_requests_on_one_connection_are_answered_in_turn_however_they_arrive():
    async def work():
        port = free_port()
        async with engine_at(port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            request = post(BODY)
            writer.write(request + request[:50])
            answers = [await reader.readuntil(b"\r\n\r\n"), await reader.readexactly(ANSWER_BYTES)]
            writer.write(request[50:])
            assert [await reader.readuntil(b"\r\n\r\n"), await reader.readexactly(ANSWER_BYTES)] == answers
            assert answers[0].startswith(b"HTTP/1.1 200 ")
            assert answers[1] == chat_answer("bench")
            writer.close()

    run(work())


def test_a_connection_that_is_to_be_closed_is():
    async def work():
        port = free_port()
        async with engine_at(port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(BODY).replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            assert (await reader.read()).endswith(chat_answer("bench"))
            writer.close()

    run(work())


def test_every_event_of_a_stream_is_a_chunk_of_its_own():
    async def work():
        port = free_port()
        request = post(json.dumps({"stream": True, PACE: 500.0}).encode())
        async with engine_at(port) as engine:
            head, _, body = (await raw(port, request, engine.chunk * 3)).partition(b"\r\n\r\n")
            assert b"transfer-encoding: chunked" in head
            assert body == (b"c8\r\n" + event("bench") + b"\r\n") * 3

    run(work())


def test_paced_streams_are_counted_and_end_with_their_clients():
    async def work():
        port = free_port()
        async with engine_at(port) as engine:
            async with streaming(port, 20, 100.0) as streams:
                before, begun = streams.events, asyncio.get_running_loop().time()
                await until(lambda: streams.events >= before + 400)
                took = asyncio.get_running_loop().time() - begun
                assert len(engine.streaming) == 20
            assert took > 0.19, "they came faster than they were to"
            await until(lambda: not engine.streaming)

    run(work())


def test_an_engine_that_knows_no_pace_stops_at_a_client_that_takes_nothing():
    async def work():
        port = free_port()
        async with engine_at(port) as engine, streaming(port, 3, 0, stall=True):
            await until(lambda: all(stream.held_up for stream in engine.streaming))
            assert len(engine.streaming) == 3

    run(work())


def test_a_stream_that_is_refused_is_no_stream():
    async def refuse(_reader, writer):
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def work():
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Broken, match="503"):
            async with streaming(port, 2, 10.0):
                pass
        with pytest.raises(Broken, match="0 of 10 requests were answered"):
            await timed(port, 100, 2, 0.1)
        server.close()

    run(work())


def test_as_many_requests_are_timed_as_were_due():
    async def work():
        port = free_port()
        async with engine_at(port):
            return await timed(port, 200, 2, 0.25)

    times = run(work())
    assert len(times) == 50
    assert all(secs > 0 for secs in times)


def test_quantiles():
    assert [quantile(range(100), share) for share in (0.5, 0.99, 1.0)] == [50, 99, 99]


def results(rate: float = 20_000.0, chunk: float = 12.0, added: float = 0.1, stalled: float = 150.0):
    """Of a run in which Caddy answers 15,000 requests a second and takes 30 us per chunk."""
    cores = {("requests", number): [Cores(1.0, 0.3, 0.2, 0.0)] * 3 for number in CONNECTIONS}

    def one(rate: float, chunk: float, p50: float) -> Figures:
        return Figures(
            rate={number: [rate] * 3 for number in CONNECTIONS},
            chunk_us={count: [chunk] * 3 for count in STREAMS},
            pace={count: [1.0] * 3 for count in STREAMS},
            p50_ms=[p50] * 3,
            p99_ms=[2 * p50] * 3,
            memory_mib={IDLE: [40.0], BUSY: [60.0]},
            cores=dict(cores),
        )

    found = {
        LLMUXD: one(rate, chunk, 0.1 + added),
        CADDY: one(15_000.0, 30.0, 0.3),
        NGINX: one(60_000.0, 10.0, 0.15),
        ALONE: one(65_000.0, 0.0, 0.1),
    }
    found[LLMUXD].memory_mib[STALLING] = [stalled]
    return found


def missed(found) -> list[str]:
    return [row.what for row in report.rows(found) if row.reached is False]


def test_what_is_reached_is_not_missed():
    rows = report.rows(results())
    assert [row.reached for row in rows] == [True, True, None, None, True, True, True, None, None, None, True]
    assert missed(results(rate=15_000.0, chunk=15.0)) == []


@pytest.mark.parametrize(
    ("worse", "what"),
    [
        ({"rate": 14_900.0}, "requests/s, 32 connections"),
        ({"chunk": 15.1}, "CPU per chunk, 128 streams (µs)"),
        ({"added": 0.3001}, "added latency p50 (ms)"),
        ({"stalled": 200.0}, "resident memory, 1,000 stalled streams (MiB)"),
    ],
)
def test_what_is_missed_is_said(worse, what):
    found = results(**worse)
    assert what in missed(found)
    assert "**missed**" in report.table(report.rows(found))


def test_ratios_are_of_the_same_round():
    found = results()
    found[LLMUXD].rate[32], found[CADDY].rate[32] = [10_000.0, 30_000.0, 20_000.0], [5_000.0, 30_000.0, 10_000.0]
    rows = report.rows(found)
    assert rows[0].ratio == "2.00 (1.00 to 2.00)"
    assert rows[2].what == "CPU per request, 32 connections (µs)"
    assert rows[2].cells == ("50", "100", "17", "")


def test_what_makes_a_figure_doubtful_is_said():
    found = results()
    assert report.remarks(found) == []
    found[CADDY].cores["requests", 32] = [Cores(0.9, 0.95, 0.2, 0.0)] * 3
    found[NGINX].pace[512] = [1.0, 0.6, 1.0]
    engine, pace = report.remarks(found)
    assert engine.startswith("Caddy, 32 requests: the engine used 0.95 cores")
    assert pace.startswith("nginx, 512 streams: 60 % of the events")
    for figures in found.values():
        for number in CONNECTIONS:
            figures.cores["requests", number] = [Cores(0.9, 0.3, 0.2, 0.7)]
    assert any(line.startswith("Others used 0.70 cores") for line in report.remarks(found))


def test_the_page_keeps_what_is_around_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(page, "new")
    assert page.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"


def test_usage_is_that_of_a_session():
    # A session of its own: what runs the tests may share its session with processes that only root can look into.
    code = "import sys; total = sum(range(300_000)); sys.stdout.write('up'); sys.stdout.flush(); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(2) == b"up"
        assert usage.resident_mib(process.pid) > 1
        assert usage.cpu_secs(process.pid) > 0
        assert usage.has_loaded(process.pid, "libc.so")
        assert not usage.has_loaded(process.pid, "no-such-library")
        process.stdin.close()

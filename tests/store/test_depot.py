"""A daemon whose images go to a real S3 server and come back from it, over simulated engines and a stand-in for CRIU."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmuxd.config import ObjectStoreConfig, parse_config
from llmuxd.depot import LOOK_SECS, Depot
from llmuxd.engine.object_store import READ_SECS
from tests.integration.cells_stack import Cells
from tests.integration.conftest import daemon
from tests.integration.stack import Daemon, until
from tests.store.conftest import ACCESS, BUCKET, SECRET
from tests.store.image import make_image, same
from tests.store.test_failing_store import listening
from tests.store.test_object_store import NEVER, quiet

__all__ = ["daemon"]

SAVE = "discard+checkpoint"


@pytest.fixture
def cells(tmp_path: Path, daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch) -> Cells:
    return Cells(tmp_path, daemon, monkeypatch)


def start(cells: Cells, s3: ObjectStoreConfig, endpoint: str | None = None) -> Daemon:
    table: dict[str, Any] = {
        "endpoint": endpoint or s3.endpoint,
        "bucket": BUCKET,
        "access_key": ACCESS,
        "secret_key": SECRET,
    }
    cells.checkpoint = {"object_store": table}
    return cells.start(SAVE)


def log_of(stack: Daemon) -> str:
    return stack.log.read_text()


def test_an_image_is_sent_and_fetched_when_it_is_not_here_any_more(cells, s3, store):
    stack = start(cells, s3)
    first = stack.ask("a", "why", tokens=8).text
    stack.ask("b", "why")
    remote = until(lambda: store.newest("a"), "the image is in the store")
    assert cells.model("a")["image"]["generation"] == remote.generation
    shutil.rmtree(cells.images / "a")
    assert stack.ask("a", "why", tokens=8).text == first
    assert cells.criu_calls().count("restore") == 1, "it was not started cold"
    assert "fetching image" in log_of(stack)


def test_a_daemon_without_an_image_finds_the_one_in_the_store(cells, s3, store):
    stack = start(cells, s3)
    first = stack.ask("a", "why", tokens=8).text
    stack.ask("b", "why")
    until(lambda: store.newest("a"), "the image is in the store")
    stack.stop()
    shutil.rmtree(cells.images)
    stack.start()
    until(lambda: cells.model("a")["engine"] == "checkpointed", "the image in the store is known")
    assert stack.ask("a", "why", tokens=8).text == first
    assert cells.criu_calls().count("restore") == 1


def test_an_image_that_was_refused_is_not_fetched_again(cells, s3, store):
    stack = start(cells, s3)
    first = stack.ask("a", "why", tokens=8).text
    stack.ask("b", "why")
    remote = until(lambda: store.newest("a"), "the image is in the store")
    (cells.images / "a" / remote.generation / "refused").write_text("it did not wake\n")
    assert stack.ask("a", "why", tokens=8).text == first, "it was started cold"
    assert cells.criu_calls().count("restore") == 0
    assert "fetching image" not in log_of(stack)


def test_without_a_store_that_can_be_reached_the_local_image_counts_and_that_is_told(cells, s3, store):
    stack = start(cells, s3, "http://127.0.0.1:1")
    first = stack.ask("a", "why", tokens=8).text
    stack.ask("b", "why")
    assert stack.ask("a", "why", tokens=8).text == first
    assert cells.criu_calls().count("restore") == 1
    told = log_of(stack)
    assert "is not in the store yet" in told
    assert "nothing was fetched from the store" in told
    assert "the local image" in told
    assert SECRET not in told


def test_what_a_daemon_could_not_send_is_sent_by_the_next(cells, s3, store):
    stack = start(cells, s3, "http://127.0.0.1:1")
    stack.ask("a", "why")
    stack.ask("b", "why")
    until(lambda: "is not in the store yet" in log_of(stack), "it is tried")
    stack.stop()
    assert store.newest("a") is None
    stack.top["checkpoint"]["object_store"]["endpoint"] = s3.endpoint
    stack.start()
    remote = until(lambda: store.newest("a"), "the image is in the store")
    assert cells.model("a")["image"]["generation"] == remote.generation


def test_a_store_that_is_silent_holds_up_neither_a_wake_nor_the_end(cells, s3):
    with listening(16) as endpoint:
        stack = start(cells, s3, endpoint)
        first = stack.ask("a", "why", tokens=8).text
        stack.ask("b", "why")
        began = time.monotonic()
        assert stack.ask("a", "why", tokens=8).text == first
        assert time.monotonic() - began < READ_SECS, "of all the attempts that it would be given"
        assert cells.criu_calls().count("restore") == 1
        assert "nothing was fetched from the store: it takes too long" in log_of(stack)
        began = time.monotonic()
        stack.ask("b", "why")
        assert cells.criu_calls().count("restore") == 2
        assert time.monotonic() - began < LOOK_SECS, "it is not asked again at once"
        began = time.monotonic()
        assert stack.stop() == 0
        assert time.monotonic() - began < READ_SECS


def test_what_is_fetched_is_given_up_in_time_and_gone_on_with(store, tmp_path, monkeypatch):
    store.upload(make_image(tmp_path / "here"), "qwen", quiet, NEVER)
    config = parse_config({}, environ={}).checkpoint
    depot = Depot(config)
    depot._store = store
    told: list[str] = []
    fetched, let = [], threading.Event()
    right = store._get

    def slowly(key: str, **more: Any) -> Any:
        if "/pieces/" in key:
            fetched.append(key)
            if len(fetched) > 2:
                let.wait(60)
        return right(key, **more)

    monkeypatch.setattr(store, "_get", slowly)
    folder = tmp_path / "there"

    async def fetch() -> None:
        await depot.fetch("qwen", folder, None, 5.0, told.append)
        assert "it takes too long; there is no local image" in told[-1]
        assert not [path for path in folder.iterdir() if path.suffix != ".partial"]
        let.set()
        # The thread that was given up may still be at it: this one comes after it.
        await depot.fetch("qwen", folder, None, 60.0, told.append)

    asyncio.run(fetch())
    (image,) = folder.iterdir()
    assert same(tmp_path / "here" / image.name, image)
    assert len(fetched) == len(set(fetched)) == 7, "no piece came twice"

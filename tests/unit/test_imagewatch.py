"""What the core hears of images that come and go beside it."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmuxd import imagewatch
from llmuxd.config import Config, parse_config
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.events import ImageFound, ImageLost
from llmuxd.depot import Depot
from llmuxd.engine.images import Image, is_there
from llmuxd.engine.object_store import StoreError
from llmuxd.imagewatch import ImageWatch
from llmuxd.runtime import Runtime
from llmuxd.specs import build_switcher
from tests.integration.engine_bench import until
from tests.unit.images_bench import OFFLOAD, SECS, Saving

CONFIG = parse_config({"models": {"m": {"model_path": "/models/m"}}}, environ={})


@pytest.fixture
def saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saving:
    monkeypatch.setattr(imagewatch, "EVERY_SECS", 0.01)
    return Saving(tmp_path, monkeypatch)


def test_an_image_that_somebody_removes_is_lost_and_the_one_before_counts(saving: Saving) -> None:
    switcher = build_switcher(CONFIG, 0.0, None)
    model = switcher.state.models["m"]
    posted: list[ImageFound | ImageLost] = []

    def post(event: ImageFound | ImageLost) -> None:
        posted.append(event)
        switcher.handle(event, float(len(posted)))

    async def test() -> None:
        images = []
        for _ in range(2):
            await saving.start()
            await saving.save()
            images.append(saving.images.newest())
        older, newer = images
        assert older is not None
        assert newer is not None
        watch = ImageWatch(switcher.state, {"m": saving.engine}, Depot(CONFIG.checkpoint), post, lambda *_: None)
        await watch.find(["m"])
        assert model.state is S.CHECKPOINTED
        watch.start()
        try:
            shutil.rmtree(newer.folder)
            assert await until(lambda: len(posted) == 2, SECS)
            assert (model.state, saving.engine.last_image) == (S.CHECKPOINTED, older)
            shutil.rmtree(older.folder)
            assert await until(lambda: len(posted) == 3, SECS)
        finally:
            watch.stop()
        assert (model.state, model.image) == (S.NOT_STARTED, None)
        assert posted == [
            ImageFound("m", OFFLOAD, True, True),
            ImageFound("m", OFFLOAD, True, True),
            ImageLost("m", "there is no image of it any more, neither here nor in a store"),
        ]

    saving.run(test)


class Store(Depot):
    """One that says what it is told to."""

    says: Image | Exception | None = None
    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    async def look(self, model: str) -> Image | None:
        self.meanwhile()
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


def test_what_a_store_says_that_cannot_be_asked_is_not_that_there_is_no_image(
    saving: Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagewatch, "RETRY_SECS", 0.01)
    switcher = build_switcher(CONFIG, 0.0, None)
    model = switcher.state.models["m"]
    store = Store(CONFIG.checkpoint)

    def post(event: ImageFound | ImageLost) -> None:
        switcher.handle(event, 1.0)

    async def test() -> None:
        await saving.start()
        await saving.save()
        image = saving.images.newest()
        watch = ImageWatch(switcher.state, {"m": saving.engine}, store, post, lambda *_: None)
        await watch.find(["m"])
        shutil.rmtree(saving.images.folder)
        store.says = StoreError("it is down")
        await watch._look(["m"])
        assert model.state is S.CHECKPOINTED, "nobody knows"
        store.says = None
        store.meanwhile = lambda: setattr(saving.engine, "last_image", image)
        await watch._look_in_store(["m"])
        assert model.state is S.CHECKPOINTED, "it was saved while the store was asked"
        store.meanwhile = lambda: None
        saving.engine.last_image = None
        store.says = StoreError("it is down")
        await watch._look_in_store(["m"])
        watch.start()
        try:
            store.says = None
            assert await until(lambda: model.image is None, SECS), "it is asked again"
        finally:
            watch.stop()
        assert model.state is S.NOT_STARTED

    saving.run(test)


def test_a_disk_that_cannot_be_read_has_no_images_and_breaks_nothing(
    saving: Saving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    switcher = build_switcher(CONFIG, 0.0, None)
    posted: list[ImageFound | ImageLost] = []

    def post(event: ImageFound | ImageLost) -> None:
        posted.append(event)
        switcher.handle(event, 1.0)

    def stale(*_: object) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    async def test() -> None:
        await saving.start()
        await saving.save()
        image = saving.images.newest()
        assert image is not None
        watch = ImageWatch(switcher.state, {"m": saving.engine}, Depot(CONFIG.checkpoint), post, lambda *_: None)
        with monkeypatch.context() as broken:
            broken.setattr(Path, "exists", stale)
            assert not is_there(image)
            await watch.find(["m"])
        assert posted == []
        await watch.find(["m"])
        assert len(posted) == 1
        for _ in range(2):  # It breaks, is mended, and breaks again.
            caplog.clear()
            with monkeypatch.context() as broken:
                broken.setattr(Path, "exists", stale)
                for _ in range(3):
                    await watch._check("m")
            told = [record.message.split(": ")[1] for record in caplog.records]
            assert told == [f"its image {image.folder} is not there any more", "its images cannot be looked for"], (
                "once"
            )
            await watch._check("m")
        assert len(posted) == 1, "nothing is lost"

    saving.run(test)


def test_a_reload_leaves_the_traffic_of_a_store_that_stays(tmp_path: Path) -> None:
    def config(bucket: str, keep: bool) -> Config:
        store = {"endpoint": "http://127.0.0.1:1", "bucket": bucket, "access_key": "a", "secret_key": "s"}
        table = {"models": {"m": {"model_path": "/m"}}, "checkpoint": {"object_store": store, "keep_images": keep}}
        folders = {"LLMUX_RUNTIME_DIR": str(tmp_path / "run"), "LLMUX_STATE_DIR": str(tmp_path / "state")}
        return parse_config(table, environ=folders)

    async def test() -> None:
        runtime = Runtime(config("one", True))
        depot = runtime.images.depot
        runtime.reload(config("one", False))
        assert runtime.images.depot is depot
        runtime.reload(config("other", False))
        assert runtime.images.depot is not depot
        runtime.images.stop()

    asyncio.run(test())

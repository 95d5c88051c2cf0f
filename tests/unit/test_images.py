"""Engines that are saved to images and brought back, by the stand-in for CRIU: what is there, in every case, afterwards."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.engine import images as images_module
from llmuxd.engine.errors import EngineError
from llmuxd.engine.images import Image, Images
from llmuxd.engine.manifest import NAME, FileState
from tests.integration.engine_bench import complete, until
from tests.unit.images_bench import OFFLOAD, SECS, Saving


@pytest.fixture
def saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saving:
    return Saving(tmp_path, monkeypatch)


@pytest.mark.parametrize("weights", ["retain", "offload", "discard"])
def test_a_saved_engine_comes_back_awake_with_the_same_answer(saving: Saving, weights: str) -> None:
    eviction = EvictionPolicy.parse(f"{weights}+checkpoint")

    async def test() -> None:
        answer = await saving.start()
        await saving.save(eviction)
        assert saving.engine.pid is None
        assert saving.processes() == []
        image = saving.images.newest()
        assert image is not None
        assert image.eviction == eviction
        assert image.manifest.size >= 2**20
        assert await saving.restore() is False
        assert await complete(saving.engine) == answer
        assert saving.generations() == [], "keep_images is off, and it has served its purpose"
        assert saving.deaths == []
        assert saving.told[0].startswith("saving 2 processes to ")

    saving.run(test)


def test_a_kept_image_restores_again_and_a_restored_engine_is_saved_again(saving: Saving) -> None:
    saving.images = saving.images_of("m", keep=True)
    saving.engine = saving.engine_of(saving.images)

    async def test() -> None:
        answer = await saving.start()
        await saving.save()
        for _ in range(2):
            assert await saving.restore() is True
            assert await complete(saving.engine) == answer
            await saving.engine.stop(0)
        assert len(saving.generations()) == 1
        await saving.restore()
        await saving.save()
        assert len(saving.generations()) == 2, "the older one is kept until the newer one has restored"
        await saving.restore()
        assert len(saving.generations()) == 1

    saving.run(test)


def test_of_three_images_the_oldest_goes(saving: Saving) -> None:
    async def test() -> None:
        for _ in range(3):
            await saving.start()
            await saving.save()
        assert len(saving.generations()) == 2

    saving.run(test)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("fail", "io_uring"), ("no-space", "No space left on device")],
)
def test_a_failed_dump_leaves_the_engine_asleep_and_well(saving: Saving, fault: str, reason: str) -> None:
    async def test() -> None:
        answer = await saving.start()
        saving.fault(f"dump {fault}")
        with pytest.raises(EngineError, match=reason) as raised:
            await saving.save()
        assert raised.value.kind is FailureKind.NOT_CHECKPOINTED
        assert saving.generations() == []
        await saving.engine.wake(EvictionPolicy.parse("offload+keep_running"), SECS)
        assert await complete(saving.engine) == answer
        assert saving.deaths == []

    saving.run(test)


def test_a_full_disk_is_seen_before_a_dump(saving: Saving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmuxd.engine.images._SPARE", 1e9)

    async def test() -> None:
        await saving.start()
        with pytest.raises(EngineError, match=r"may need .* GiB, and .*; see checkpoint.images_dir") as raised:
            await saving.save()
        assert raised.value.kind is FailureKind.NOT_CHECKPOINTED
        assert saving.calls() == []
        assert saving.generations() == []

    saving.run(test)


def test_a_dump_that_was_ended_in_the_middle_leaves_nothing_to_trust(saving: Saving) -> None:
    async def test() -> None:
        await saving.start()
        saving.fault("dump die")
        with pytest.raises(EngineError, match="was killed by signal 9") as raised:
            await saving.save()
        assert raised.value.kind is FailureKind.REFUSED
        assert saving.generations() == []

    saving.run(test)


def test_a_dump_that_never_ends_is_ended(saving: Saving) -> None:
    async def test() -> None:
        await saving.start()
        saving.fault("dump hang")
        with pytest.raises(EngineError, match="criu dump was not done within"):
            await saving.engine.sleep(OFFLOAD, "wait", 2.0)
        assert saving.generations() == []

    saving.run(test)


@pytest.mark.parametrize("action", ["dump", "restore"])
def test_what_is_cancelled_leaves_no_process_and_no_half_image(saving: Saving, action: str) -> None:
    async def test() -> None:
        await saving.start()
        if action == "restore":
            await saving.save()
        saving.fault(f"{action} hang")
        task = asyncio.ensure_future(saving.save() if action == "dump" else saving.restore())
        assert await until(lambda: any(line.startswith(action) for line in saving.calls()), SECS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if action == "restore":
            assert saving.processes() == []
            assert len(saving.generations()) == 1, "the image is not to blame"
        else:
            assert saving.generations() == []

    saving.run(test)


@pytest.mark.parametrize("reads", ["what it holds", "the image"])
def test_one_that_is_cancelled_while_files_are_read_leaves_no_image_and_reads_no_more(
    saving: Saving, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    at_it, ended = threading.Event(), threading.Event()
    right = images_module.states_of

    def slowly(paths: Any, known: Any = (), relative_to: Path | None = None, given_up: Any = None) -> list[FileState]:
        if (relative_to is None) is (reads == "what it holds"):
            at_it.set()
            if given_up.wait(SECS):
                ended.set()
        return right(paths, known, relative_to, given_up)

    monkeypatch.setattr(images_module, "states_of", slowly)

    async def test() -> None:
        await saving.start()
        task = asyncio.ensure_future(saving.save())
        assert await until(lambda: at_it.is_set() and saving.processes() == [], SECS), "CRIU is done with it"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await until(ended.is_set, SECS)
        assert saving.generations() == []

    saving.run(test)


def test_one_that_dies_as_soon_as_it_is_restored_is_no_success(saving: Saving, monkeypatch: pytest.MonkeyPatch) -> None:
    saving.images = saving.images_of("m", keep=True)
    saving.engine = saving.engine_of(saving.images)
    right = saving.images.confirm

    async def confirm(image: Image) -> None:
        assert saving.engine.pid is not None
        os.kill(saving.engine.pid, signal.SIGKILL)
        assert await until(lambda: bool(saving.engine.over), SECS)
        await right(image)

    async def test() -> None:
        await saving.start()
        await saving.save()
        monkeypatch.setattr(saving.images, "confirm", confirm)
        with pytest.raises(EngineError, match="it died as soon as it was awake"):
            await saving.restore()
        assert saving.processes() == []
        assert saving.images.newest() is None

    saving.run(test)


def test_one_that_dies_as_soon_as_it_is_awake_is_no_success(saving: Saving, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = EvictionPolicy.parse("offload+keep_running")
    right = saving.engine._wake_up

    async def wake_up(*arguments: Any) -> None:
        await right(*arguments)
        assert saving.engine.pid is not None
        os.kill(saving.engine.pid, signal.SIGKILL)
        assert await until(lambda: bool(saving.engine.over), SECS)

    async def test() -> None:
        await saving.start()
        await saving.engine.sleep(asleep, "wait", SECS)
        monkeypatch.setattr(saving.engine, "_wake_up", wake_up)
        with pytest.raises(EngineError) as raised:
            await saving.engine.wake(asleep, SECS)
        assert raised.value.kind is FailureKind.DIED

    saving.run(test)


def test_a_dump_that_kills_the_engine_and_fails_is_no_success(saving: Saving) -> None:
    async def test() -> None:
        await saving.start()
        saving.fault("dump kill")
        with pytest.raises(EngineError, match="Dumping FAILED"):
            await saving.save()
        assert saving.generations() == []
        assert await until(lambda: saving.engine.over != "", SECS), "the death is seen"

    saving.run(test)


def test_an_image_that_cannot_be_restored_is_put_aside_for_the_one_before(saving: Saving) -> None:
    async def test() -> None:
        answer = await saving.start()
        await saving.save()
        await saving.start()
        await saving.save()
        older, newer = saving.generations()
        saving.fault("restore fail 1")
        assert await saving.restore() is False
        assert await complete(saving.engine) == answer
        await saving.engine.stop(0)
        assert saving.generations() == []
        assert older < newer

    saving.run(test)


def test_without_a_good_image_a_restore_says_why_and_leaves_nothing(saving: Saving) -> None:
    async def test() -> None:
        await saving.start()
        await saving.save()
        saving.fault("restore fail")
        with pytest.raises(EngineError, match="has bad size") as raised:
            await saving.restore()
        assert raised.value.kind is FailureKind.REFUSED
        assert saving.engine.pid is None
        assert saving.images.newest() is None
        (generation,) = saving.generations()
        assert "has bad size" in (saving.images.folder / generation / "refused").read_text()

    saving.run(test)


def test_an_interrupted_restore_does_not_condemn_the_image(saving: Saving) -> None:
    async def test() -> None:
        answer = await saving.start()
        await saving.save()
        saving.fault("restore die 1")
        with pytest.raises(EngineError, match="was killed by signal 9"):
            await saving.restore()
        assert saving.processes() == []
        assert saving.images.newest() is not None
        await saving.restore()
        assert await complete(saving.engine) == answer

    saving.run(test)


def test_what_an_interrupted_dump_has_left_is_removed_and_never_an_image(saving: Saving) -> None:
    async def test() -> None:
        await saving.start()
        await saving.save()

    saving.run(test)
    (generation,) = saving.generations()
    half = saving.images.folder / "29991231T235959.000000.unfinished"
    (half / "criu").mkdir(parents=True)
    manifest = json.loads((saving.images.folder / generation / NAME).read_text())
    (half / NAME).write_text(json.dumps(manifest))
    found = saving.images.newest()
    assert found is not None
    assert found.generation == generation

    async def again() -> None:
        await saving.start()
        await saving.save()
        assert len(saving.generations()) == 2
        assert generation in saving.generations()
        assert not half.exists(), "the next dump removes it"

    saving.run(again)


@pytest.mark.parametrize("how", ["its folder is a link", "it was rotated away"])
def test_the_log_of_an_engine_is_no_file_that_has_to_stay_as_it_is(saving: Saving, how: str) -> None:
    async def test() -> None:
        log, real = saving.engine.spec.log_path, saving.folder / "logs"
        if how == "its folder is a link":
            real.mkdir()
            (saving.folder / "state").symlink_to(real)
            saving.engine.spec = dataclasses.replace(saving.engine.spec, log_path=saving.folder / "state" / "m.log")
        await saving.start()
        if how == "it was rotated away":
            log.rename(log.with_name("m.log.1"))
            log.touch()
        await saving.save()
        image = saving.images.newest()
        assert image is not None
        assert not [file.path for file in (*image.manifest.held, *image.manifest.kept) if "m.log" in file.path]

    saving.run(test)


def test_a_given_image_is_used_where_there_is_none_and_stays(saving: Saving) -> None:
    async def test() -> None:
        answer = await saving.start()
        await saving.save()
        image = saving.images.newest()
        assert image is not None
        elsewhere = saving.folder / "given"
        image.folder.rename(elsewhere)
        saving.images = Images(saving.images.folder, saving.images_of("m")._criu, False, elsewhere)
        saving.engine = saving.engine_of(saving.images)
        await saving.restore()
        assert await complete(saving.engine) == answer
        assert (elsewhere / NAME).exists()

    saving.run(test)

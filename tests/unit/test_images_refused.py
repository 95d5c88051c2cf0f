"""Images that do not fit any more: each is refused with the reason, before CRIU is called."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import WeightStrategy
from llmuxd.engine.criu import Criu
from llmuxd.engine.errors import EngineError
from llmuxd.engine.images import Image, Images, was_refused
from llmuxd.engine.manifest import NAME, FileState, Host, Manifest, Subject, states_of
from llmuxd.engine.proctable import control_group
from llmuxd.engine.restoring import Begun, end_half_restored
from llmuxd.engine.spec import EngineSpec

GENERATION = "20260102T030405.000000"


@pytest.fixture
def spec(tmp_path: Path) -> EngineSpec:
    return EngineSpec("m", "/models/m", ("vllm",), tmp_path / "e", tmp_path / "m.log")


@pytest.fixture
def images(tmp_path: Path) -> Images:
    folder = tmp_path / "images"
    folder.mkdir(mode=0o700)
    return Images(folder, Criu("criu"), keep=False)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libm.so.6"
    path.write_bytes(b"code")
    return path


@pytest.fixture
def image(images: Images, library: Path) -> Image:
    return made(images, library, GENERATION)


def made(images: Images, library: Path, generation: str) -> Image:
    """An image as a dump makes it, but for its content."""
    folder = images.folder / generation
    (folder / "criu").mkdir(parents=True)
    pages = folder / "criu" / "pages-1.img"
    pages.write_bytes(b"memory" * 1000)
    subject = Subject("m", ("vllm",), "print", WeightStrategy.OFFLOAD, "0.32.0", True, True, 4000, "token", "/m.log")
    manifest = Manifest(
        generation=generation,
        created=1.0,
        seconds=2.0,
        subject=subject,
        host=Host.here(),
        criu="4.2.1",
        pids=(4000, 4001),
        held=tuple(states_of([library])),
        kept=(),
        content=tuple(states_of([pages], relative_to=folder)),
    )
    write(folder, manifest)
    return Image(folder, manifest)


def write(folder: Path, manifest: Manifest) -> None:
    (folder / NAME).write_text(manifest.as_json())


def objection(images: Images, image: Image, spec: EngineSpec, **host: str) -> str:
    manifest = dataclasses.replace(image.manifest, host=dataclasses.replace(image.manifest.host, **host))
    return images.objections(Image(image.folder, manifest), spec, "print")


def test_nothing_speaks_against_one_that_was_just_made(images: Images, image: Image, spec: EngineSpec) -> None:
    assert images.objections(image, spec, "print") == ""
    found = images.newest()
    assert found == image
    assert found is not None
    assert found.manifest.size == 6000
    assert str(found.eviction) == "offload+checkpoint"


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ({"machine_id": "other"}, "another machine"),
        ({"kernel": "1.0"}, "made under Linux 1.0, and this is"),
        ({"driver": "NVRM version: 570"}, "made with NVRM version: 570, and this is"),
    ],
)
def test_another_host_kernel_or_driver(
    images: Images, image: Image, spec: EngineSpec, host: dict[str, str], reason: str
) -> None:
    assert reason in objection(images, image, spec, **host)


def test_another_configuration(images: Images, image: Image, spec: EngineSpec) -> None:
    assert "configured otherwise" in images.objections(image, spec, "another print")
    other = dataclasses.replace(spec, name="n")
    assert "configured otherwise" in images.objections(image, other, "print")


def overwrite(path: Path) -> None:
    """The same size, another content, the time of the last change put back."""
    found = path.stat()
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize(
    "spoil", [overwrite, Path.unlink, lambda path: path.write_bytes(b"")], ids=["overwritten", "removed", "emptied"]
)
@pytest.mark.parametrize("boot", ["", "an earlier one"])
def test_a_file_that_changed_under_it_and_a_damaged_image(
    images: Images, image: Image, library: Path, spec: EngineSpec, spoil: Callable[[Path], object], boot: str
) -> None:
    host = {"boot_id": boot} if boot else {}
    kept = library.read_bytes()
    spoil(library)
    assert objection(images, image, spec, **host) == f"{library} has changed since it was made"
    library.write_bytes(kept)
    spoil(image.folder / "criu" / "pages-1.img")
    assert objection(images, image, spec, **host) == "criu/pages-1.img of it is damaged"


def test_a_file_that_was_written_again_as_it_was_is_none_that_changed(
    images: Images, image: Image, library: Path, spec: EngineSpec
) -> None:
    library.unlink()
    library.write_bytes(b"code")
    assert images.objections(image, spec, "print") == ""
    assert objection(images, image, spec, boot_id="an earlier one") == ""


def test_what_did_not_change_is_not_read_again_in_the_same_boot(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    (state,) = states_of([path])
    wrong = dataclasses.replace(state, sha256="0" * 64)
    assert not wrong.changed(path, same_boot=True)
    assert wrong.changed(path, same_boot=False)
    assert states_of([path], known=[wrong])[0].sha256 == "0" * 64


def test_the_number_of_a_thread_that_is_taken_hinders_a_restore_and_is_not_the_images_fault(
    images: Images, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmuxd.engine.restoring.PIDS_FREE_SECS", 0.1)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        (image.folder / "criu" / f"core-{thread.native_id}.img").touch()
        with pytest.raises(EngineError, match=f"number {thread.native_id} is taken") as raised:
            asyncio.run(images.restore(image, 1.0, lambda pid: False))
    finally:
        done.set()
        thread.join()
    assert raised.value.kind is FailureKind.DIED
    assert images.newest() == image


@pytest.mark.parametrize(
    ("own", "group", "began", "killed"),
    [
        (True, None, 2**62, True),
        (True, "0::/elsewhere", 0, False),
        (False, None, 0, True),
        (False, None, 2**62, False),
        (False, "0::/elsewhere", 0, False),
    ],
)
def test_who_has_the_number_of_the_engine_by_accident_is_left_alone(
    image: Image, own: bool, group: str | None, began: int, killed: bool
) -> None:
    """Told by the control group, if CRIU has one of its own, else by when it began and that it leads a session."""
    begun = Begun(own, control_group(os.getpid()) if group is None else group, began)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        try:
            subject = dataclasses.replace(image.subject, pid=process.pid, token="nobody has this")
            end_half_restored(subject, begun, ())
            assert process.poll() == (-signal.SIGKILL if killed else None)
        finally:
            process.kill()


def test_reading_an_image_is_given_up(images: Images, image: Image, spec: EngineSpec, tmp_path: Path) -> None:
    given_up = threading.Event()
    given_up.set()
    assert states_of([tmp_path / "libm.so.6"], given_up=given_up) == []
    other_boot = dataclasses.replace(image.manifest, host=dataclasses.replace(image.manifest.host, boot_id="earlier"))
    assert images.objections(Image(image.folder, other_boot), spec, "print", given_up) != "", "nothing was looked at"


def test_what_is_no_image_any_more_is_removed_and_what_is_none_of_ours_stays(images: Images, image: Image) -> None:
    halves = ["20250101T000000.000000", "20250101T000000.000001.unfinished"]
    partial, foreign = "20250101T000000.000002.partial", "notes"
    for name in (*halves, partial, foreign):
        (images.folder / name / "criu").mkdir(parents=True)
    images.clean(fetched=False)
    assert {path.name for path in images.folder.iterdir()} == {GENERATION, partial, foreign}
    images.clean(fetched=True)
    assert {path.name for path in images.folder.iterdir()} == {GENERATION, foreign}
    assert images.newest() == image


def test_a_refused_image_is_not_found_again_and_says_why(images: Images, image: Image, library: Path) -> None:
    images.refuse(image, "it is of no use")
    assert images.newest() is None
    assert (image.folder / "refused").read_text() == "it is of no use\n"
    newer = made(images, library, "20270102T030405.000000")
    assert images.newest() == newer


def test_one_that_was_refused_is_remembered_until_there_is_a_newer_one(
    images: Images, image: Image, library: Path
) -> None:
    """Else it would come again and again from an object store, which has it longer."""
    older = made(images, library, "20250102T030405.000000")
    images.refuse(image, "it does not wake")
    asyncio.run(images.confirm(older))
    assert not image.folder.exists()
    assert was_refused(images.folder, image.generation)
    newer = made(images, library, "20270102T030405.000000")
    asyncio.run(images.confirm(newer))
    assert not was_refused(images.folder, image.generation)


def test_one_of_another_machine_stays_for_that_machine(images: Images, image: Image) -> None:
    host = dataclasses.replace(image.manifest.host, machine_id="other")
    theirs = Image(image.folder, dataclasses.replace(image.manifest, host=host))
    write(theirs.folder, theirs.manifest)
    images.refuse(theirs, "it was made on another machine")
    assert images.newest() is None
    again = Images(images.folder, Criu("criu"), keep=False)
    assert again.newest() == theirs


@pytest.mark.parametrize("mode", [0o770, 0o777])
def test_what_others_could_have_written_is_not_restored(images: Images, image: Image, mode: int) -> None:
    assert images.newest() == image
    image.folder.chmod(mode)
    assert images.newest() is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99}', '{"format": 1, "held": 3}', "{"])
def test_a_broken_manifest_makes_no_image(images: Images, image: Image, text: str) -> None:
    (image.folder / NAME).write_text(text)
    assert images.newest() is None


def test_a_manifest_comes_back_as_it_was_written(image: Image) -> None:
    assert Manifest.from_json(image.manifest.as_json()) == image.manifest
    assert json.loads(image.manifest.as_json())["generation"] == GENERATION


def test_files_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    assert states_of([tmp_path / "none"]) == []
    assert FileState("x", 1, "").changed(tmp_path / "none", same_boot=True)

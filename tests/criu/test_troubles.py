"""Whatever is wrong with an image, or with saving and restoring: the request is served, by a cold start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.criu.stack import SavingStack, saving_stack, until

SAVED, OTHER = "tiny-a", "tiny-b"

KILLS_ITSELF = """#!/bin/sh
# CRIU, but for a first dump or restore while FLAG is there: that is killed in the middle.
if [ "$1" = "$(cat {flag} 2>/dev/null)" ]; then
    rm {flag}
    {criu} "$@" &
    sleep 1
    kill -9 $!
    kill -9 $$
fi
exec {criu} "$@"
"""


@pytest.fixture(scope="module")
def flag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has the action in it that CRIU is to be killed in, the next time."""
    return tmp_path_factory.mktemp("flag") / "killed-in"


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, vllm: Path, models: dict[str, Path], criu: Path, flag: Path
) -> Iterator[SavingStack]:
    folder = tmp_path_factory.mktemp("troubles")
    program = flag.with_name("criu")
    program.write_text(KILLS_ITSELF.format(flag=flag, criu=criu))
    program.chmod(0o755)
    with saving_stack(folder, vllm, models, program) as made:
        yield made


@pytest.fixture(scope="module")
def first(stack: SavingStack) -> dict[str, str]:
    return {name: stack.say(name)[0] for name in (OTHER, SAVED)}


@pytest.fixture
def image(stack: SavingStack, first: dict[str, str]) -> Path:
    """The only image of the model that is saved now."""
    stack.ctl("wake", SAVED)
    stack.say(SAVED)
    stack.ctl("sleep", SAVED)
    for older in stack.saved(SAVED)[:-1]:
        (older / "refused").write_text("the test wants one\n")
    return stack.saved(SAVED)[-1]


@contextmanager
def cold_start_of(stack: SavingStack, first: dict[str, str], reason: str) -> Iterator[None]:
    """What is done in it makes the image useless: the model is started cold, says what it said, and the reason is told."""
    before = stack.starts(SAVED)
    yield
    assert stack.say(SAVED)[0] == first[SAVED]
    assert stack.starts(SAVED) == before + 1
    assert reason in stack.log.read_text()


def test_a_damaged_image_is_refused(stack, first, image):
    with cold_start_of(stack, first, "is damaged"):
        pages = max(image.glob("criu/pages-*.img"), key=lambda path: path.stat().st_size)
        with pages.open("r+b") as file:
            file.seek(1 << 20)
            file.write(b"\xff" * 4096)


def test_an_image_of_another_vllm_is_refused(stack, first, image, vllm):
    (metadata,) = vllm.resolve().parent.parent.glob("lib/python3*/site-packages/vllm-[0-9]*.dist-info/METADATA")
    text = metadata.read_text()
    try:
        with cold_start_of(stack, first, "METADATA has changed"):
            metadata.write_text(text + "Summary: another build\n")
    finally:
        metadata.write_text(text)


def test_a_process_number_that_is_taken_costs_a_cold_start_and_no_image(stack, first, image):
    pid = min(int(path.stem.removeprefix("core-")) for path in image.glob("criu/core-*.img"))
    taker = take(pid)
    try:
        with cold_start_of(stack, first, f"its process number {pid} is taken"):
            assert Path(f"/proc/{pid}").exists()
        assert not (image / "refused").exists(), "it is as good as before"
    finally:
        taker.kill()
        taker.wait()


def test_a_criu_that_is_killed_in_a_restore_leaves_nothing_and_costs_a_cold_start(stack, first, image, flag):
    with cold_start_of(stack, first, "was killed by signal 9"):
        flag.write_text("restore")
    assert not flag.exists(), "it was killed in it"


def test_a_criu_that_is_killed_in_a_dump_costs_a_cold_start(stack, first, image, flag):
    stack.say(SAVED)
    with cold_start_of(stack, first, "was killed by signal 9"):
        flag.write_text("dump")
        for older in stack.saved(SAVED):
            (older / "refused").write_text("the test wants none\n")
        # It is in the way of the other one, which is served all the same.
        assert stack.say(OTHER)[0] == first[OTHER]
        assert not flag.exists(), "it was killed in it"
        for left in stack.saved(SAVED):
            assert (left / "refused").exists()


def test_a_disk_without_room_stops_the_engine_where_another_one_needs_its_place(tmp_path, vllm, models, criu):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=0700", "images", str(small)], check=True)
    try:
        with saving_stack(tmp_path / "stack", vllm, models, criu, images=small / "images") as made:
            said = {name: made.say(name)[0] for name in (SAVED, OTHER)}
            assert "has room for" in made.log.read_text()
            assert made.saved(SAVED) == []
            failed = made.ctl("checkpoint", OTHER, "--no-warmup", check=False)
            assert failed.returncode == 1
            assert "checkpoint.images_dir" in failed.stdout + failed.stderr
            until(lambda: made.state(OTHER) == "awake", 60, "it goes on")
            assert made.say(OTHER)[0] == said[OTHER]
            assert made.starts(OTHER) == 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


def take(pid: int) -> subprocess.Popen[bytes]:
    """A process with this very number."""
    for _ in range(200):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        if process.pid == pid:
            return process
        process.kill()
        process.wait()
    raise AssertionError(f"no process gets the number {pid}; is it free? {os.path.exists(f'/proc/{pid}')}")

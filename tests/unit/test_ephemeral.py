"""The files that are kept beside an image: which they are, and that they come back as they were."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmuxd.engine import ephemeral

HOLDER = """
import mmap, sys
opened = open(sys.argv[1])
with open(sys.argv[2]) as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
gone = open(sys.argv[3])
import os; os.unlink(sys.argv[3])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a name that has a space in it."""
    made = tmp_path / "with space"
    made.mkdir()
    for name in ("opened", "mapped", "gone"):
        (made / name).write_text(name)
    return made


@pytest.fixture
def holder(folder: Path) -> Iterator[int]:
    files = [str(folder / name) for name in ("opened", "mapped", "gone")]
    argv = [sys.executable, "-c", HOLDER, *files]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid


def test_what_a_process_has_open_or_mapped_is_found(holder: int, folder: Path) -> None:
    held = ephemeral.held_by([holder])
    assert {path.name for path in held if path.parent == folder} == {"opened", "mapped"}
    assert any("libc.so" in path.name for path in held)
    assert not [path for path in held if path.is_relative_to("/dev")]


def test_a_process_that_is_gone_holds_nothing() -> None:
    assert ephemeral.held_by([2**22 + 1]) == set()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/tmp/torchinductor_root/ab/kernel.so", True),
        ("/home/u/.cache/vllm/torch_compile_cache/x", True),
        ("/home/u/.triton/cache/x.so", True),
        ("/big/triton/x.so", True),
        ("/usr/lib/libm.so.6", False),
        ("/home/u/.cache/venv/lib/python3.12/site-packages/torch/lib/libtorch.so", False),
        ("/big/models/m/model.safetensors", False),
    ],
)
def test_which_files_come_and_go(path: str, expected: bool) -> None:
    env = {"HOME": "/home/u", "TRITON_CACHE_DIR": "/big/triton"}
    assert ephemeral.is_ephemeral(Path(path), env) is expected


def test_files_come_back_with_content_mode_times_holes_and_shared_names(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    sparse, twin, plain = folder / "sparse", folder / "twin", folder / "plain"
    with sparse.open("wb") as file:
        file.seek(8 << 20)
        file.write(b"end")
        file.truncate(16 << 20)
    os.link(sparse, twin)
    plain.write_text("plain")
    plain.chmod(0o751)
    os.utime(plain, ns=(1_000_000_007, 2_000_000_009))
    saved = ephemeral.save([sparse, twin, plain], tmp_path / "files")
    for path in (sparse, twin, plain):
        path.unlink()
    folder.rmdir()
    ephemeral.put_back(saved)
    assert sparse.stat().st_ino == twin.stat().st_ino
    assert sparse.stat().st_size == 16 << 20
    assert sparse.stat().st_blocks * 512 < 1 << 20
    assert sparse.read_bytes()[8 << 20 :].startswith(b"end\0")
    assert plain.stat().st_mode & 0o7777 == 0o751
    assert plain.stat().st_mtime_ns == 2_000_000_009
    assert sorted(path.name for path in folder.iterdir()) == ["plain", "sparse", "twin"]


def test_a_file_that_is_there_is_replaced_and_who_has_it_open_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "kernel.so"
    path.write_text("as saved")
    saved = ephemeral.save([path], tmp_path / "files")
    path.write_text("newer")
    with path.open() as user:
        ephemeral.put_back(saved)
        assert user.read() == "newer"
    assert path.read_text() == "as saved"


@pytest.mark.parametrize(
    "leads", ["a link of somebody else", "a folder of somebody else", "a folder that is open to all"]
)
def test_nothing_is_put_where_somebody_else_may_have_led_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leads: str
) -> None:
    path, elsewhere = tmp_path / "cache" / "kernel.so", tmp_path / "elsewhere"
    path.parent.mkdir()
    path.write_text("as saved")
    saved = ephemeral.save([path], tmp_path / "files")
    path.unlink()
    path.parent.rmdir()
    elsewhere.mkdir()
    if leads == "a folder that is open to all":
        path.parent.mkdir()
        path.parent.chmod(0o777)
    else:
        path.parent.symlink_to(elsewhere) if "link" in leads else path.parent.mkdir()
        right = Path.lstat

        def lstat(step: Path) -> os.stat_result:
            found = right(step)
            return os.stat_result((*found[:4], 4711, *found[5:])) if step == path.parent else found

        # To give it to somebody takes root, which those who run the tests need not be.
        monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(PermissionError, match="others can change what is there"):
        ephemeral.put_back(saved)
    assert list(elsewhere.iterdir()) == []


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    path, other = tmp_path / "kernel.so", tmp_path / "other"
    path.write_text("as saved")
    saved = ephemeral.save([path], tmp_path / "files")
    other.write_text("somebody's")
    path.unlink()
    for link in (path, path.with_name("kernel.so.llmux-new")):
        link.symlink_to(other)
    ephemeral.put_back(saved)
    assert (path.read_text(), path.is_symlink(), other.read_text()) == ("as saved", False, "somebody's")


def test_a_file_that_cannot_be_read_fails_the_saving(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ephemeral.save([tmp_path / "none"], tmp_path / "files")


def test_shared_memory_is_found_by_its_inode_under_all_names() -> None:
    first = Path(f"/dev/shm/llmux-test-{os.getpid()}")
    second = first.with_name(first.name + "-again")
    first.write_bytes(b"x")
    os.link(first, second)
    try:
        assert ephemeral.shared_memory_of({first.stat().st_ino}) == [first, second]
    finally:
        first.unlink()
        second.unlink()

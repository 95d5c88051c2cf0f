"""Images in a real S3 server: whole or not there, cut off and gone on with, damaged and found out."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmuxd.config import ObjectStoreConfig, describe, parse_config
from llmuxd.config.secrets import access_of
from llmuxd.engine import object_store
from llmuxd.engine.object_store import Cancelled, ObjectStore, StoreError
from tests.store.conftest import ACCESS, BUCKET, SECRET, client_of
from tests.store.image import make_image, same

NEVER = threading.Event()


def quiet(_text: str) -> None:
    """Nobody listens."""


def keys(s3: ObjectStoreConfig) -> list[str]:
    return [entry["Key"] for entry in client_of(s3).list_objects_v2(Bucket=BUCKET).get("Contents", ())]


def test_what_is_sent_comes_back_as_it_was(store, s3, tmp_path):
    image = make_image(tmp_path / "here")
    told: list[str] = []
    sent = store.upload(image, "qwen", told.append, NEVER)
    assert (sent.pieces, sent.sent) == (10, 7), "of ten pieces three have nothing but zeros"
    assert sent.stored < 0.7 * sent.size, "what can be compressed was, and holes are not sent"
    assert any(key.endswith(".zst") for key in keys(s3))
    remote = store.newest("qwen")
    assert remote is not None
    back = tmp_path / "there" / remote.generation
    back.parent.mkdir()
    store.download(remote, back, told.append, NEVER)
    assert same(image, back)
    assert (back / "files" / "0000").stat().st_blocks * 512 <= object_store.PIECE_BYTES, (
        "three of its four pieces are holes"
    )
    assert [path.name for path in back.parent.iterdir()] == [back.name], "nothing unfinished is left"
    assert all(word in " ".join(told) for word in ("sending", "is in the store", "fetching", "is here"))


def test_what_is_there_is_not_sent_again(store, tmp_path):
    image = make_image(tmp_path)
    store.upload(image, "qwen", quiet, NEVER)
    assert store.upload(image, "qwen", quiet, NEVER).sent == 0


def test_without_zstandard_pieces_go_as_they_are(store, s3, tmp_path, monkeypatch):
    image = make_image(tmp_path / "here")
    monkeypatch.setattr(object_store, "_zstandard", lambda: None)
    store.upload(image, "qwen", quiet, NEVER)
    assert not any(key.endswith(".zst") for key in keys(s3))
    store.download(store.newest("qwen"), tmp_path / "there", quiet, NEVER)
    assert same(image, tmp_path / "there")


def killed_after(s3: ObjectStoreConfig, action: str, folder: Path, pieces: int) -> list[str]:
    """The pieces that a worker had done when it was killed, and went no further."""
    argv = [sys.executable, "-m", "tests.store.worker", action, s3.endpoint, str(folder), str(pieces)]
    done: list[str] = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            if "/pieces/" in line:
                done.append(line.strip())
            if len(done) >= pieces:
                worker.kill()
                break
    assert len(done) == pieces, "it came to its end before it was killed"
    return done


def test_a_killed_upload_shows_no_image_and_is_gone_on_with(store, s3, tmp_path):
    image = make_image(tmp_path / "here")
    done = killed_after(s3, "upload", image, 3)
    assert store.newest("qwen") is None, "a reader sees no half image"
    assert set(done) <= set(keys(s3))
    sent = store.upload(image, "qwen", quiet, NEVER)
    assert sent.sent <= 7 - len(done)
    store.download(store.newest("qwen"), tmp_path / "there", quiet, NEVER)
    assert same(image, tmp_path / "there")


def test_a_killed_download_shows_no_image_and_is_gone_on_with(store, s3, tmp_path, monkeypatch):
    image = make_image(tmp_path / "here")
    store.upload(image, "qwen", quiet, NEVER)
    there = tmp_path / "there"
    done = killed_after(s3, "download", there, 4)
    assert not there.exists()
    fetched: list[str] = []
    right = store._get
    monkeypatch.setattr(store, "_get", lambda key, **more: (fetched.append(key), right(key, **more))[1])
    store.download(store.newest("qwen"), there, quiet, NEVER)
    assert same(image, there)
    pieces = [key for key in fetched if "/pieces/" in key]
    assert len(pieces) <= 7 - len(done) + 1, "the one that it was killed in may come again"


def test_what_is_cancelled_ends_soon_and_is_gone_on_with(store, tmp_path, monkeypatch):
    image = make_image(tmp_path / "here")
    cancelled = threading.Event()
    right = store._put
    monkeypatch.setattr(store, "_put", lambda *put: (cancelled.set(), right(*put)))
    with pytest.raises(Cancelled):
        store.upload(image, "qwen", quiet, cancelled)
    assert store.newest("qwen") is None
    monkeypatch.undo()
    assert store.upload(image, "qwen", quiet, NEVER).sent < 7
    with pytest.raises(Cancelled):
        store.download(store.newest("qwen"), tmp_path / "there", quiet, cancelled)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_piece_is_found_out(store, s3, tmp_path, packed):
    image = make_image(tmp_path / "here")
    store.upload(image, "qwen", quiet, NEVER)
    key = next(key for key in keys(s3) if "/pieces/" in key and key.endswith(".zst") is packed)
    client = client_of(s3)
    content = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    content[len(content) // 2] ^= 0xFF
    client.put_object(Bucket=BUCKET, Key=key, Body=bytes(content))
    with pytest.raises(StoreError, match="damaged"):
        store.download(store.newest("qwen"), tmp_path / "there", quiet, NEVER)
    assert not (tmp_path / "there").exists()


def test_a_piece_that_is_gone_is_said(store, s3, tmp_path):
    store.upload(make_image(tmp_path / "here"), "qwen", quiet, NEVER)
    key = next(key for key in keys(s3) if "/pieces/" in key)
    client_of(s3).delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises(StoreError, match="not in the store any more"):
        store.download(store.newest("qwen"), tmp_path / "there", quiet, NEVER)


def test_the_newest_counts_and_stale_ones_go(store, s3, tmp_path):
    generations = [f"20261129T00000{n}.000000" for n in range(4)]
    for number, generation in enumerate(generations):
        store.upload(make_image(tmp_path, generation, seed=number, pieces=1), "qwen", quiet, NEVER)
    client = client_of(s3)
    client.put_object(
        Bucket=BUCKET, Key=f"{store._models('qwen')}20261128T000000.000000/pieces/half", Body=b"old and unfinished"
    )
    client.put_object(
        Bucket=BUCKET, Key=f"{store._models('qwen')}20261130T000000.000000/pieces/half", Body=b"new and unfinished"
    )
    store.upload(make_image(tmp_path / "other", pieces=1), "other", quiet, NEVER)
    assert store.newest("qwen").generation == generations[-1]
    assert store.remove_stale("qwen", 2) == 3
    left = {key.split("/")[3] for key in keys(s3) if key.startswith(store._models("qwen"))}
    assert left == {*generations[2:], "20261130T000000.000000"}, "what may be on its way stays"
    assert store.newest("other") is not None


def test_machines_that_share_a_bucket_have_nothing_of_each_other(store, s3, tmp_path):
    other = ObjectStore(s3, "another machine")
    store.upload(make_image(tmp_path / "ours", "20261128T000000.000000", pieces=1), "qwen", quiet, NEVER)
    for number in range(3):
        generation = f"20261129T00000{number}.000000"
        other.upload(make_image(tmp_path / "theirs", generation, seed=number, pieces=1), "qwen", quiet, NEVER)
    assert other.remove_stale("qwen", 2) == 1
    assert store.newest("qwen").generation == "20261128T000000.000000"
    assert store.remove_stale("qwen", 2) == 0
    assert other.newest("qwen").generation == "20261129T000002.000000"
    assert not [key for key in keys(s3) if "machine" in key], "the machine's id is not handed out"


def test_an_image_that_is_being_removed_is_not_in_the_store(store, tmp_path, monkeypatch):
    image = make_image(tmp_path, pieces=1)
    right = store._list
    monkeypatch.setattr(store, "_list", lambda base: ((image / "criu" / "pages-2.img").unlink(), right(base))[1])
    with pytest.raises(FileNotFoundError):
        store.upload(image, "qwen", quiet, NEVER)
    assert store.newest("qwen") is None


def test_what_is_here_is_not_fetched_again(store, tmp_path, monkeypatch):
    image = make_image(tmp_path, pieces=1)
    store.upload(image, "qwen", quiet, NEVER)
    remote = store.newest("qwen")
    monkeypatch.setattr(store, "_get", lambda key, **more: pytest.fail(f"{key} was fetched"))
    with pytest.raises(FileExistsError):
        store.download(remote, image, quiet, NEVER)
    assert [path.name for path in tmp_path.iterdir()] == [image.name]


def test_what_a_disk_takes_in_parts_is_written_whole(store, tmp_path, monkeypatch):
    image = make_image(tmp_path / "here", pieces=1)
    store.upload(image, "qwen", quiet, NEVER)
    right = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: right(file, data[: max(1, len(data) // 2)], at))
    store.download(store.newest("qwen"), tmp_path / "there", quiet, NEVER)
    assert same(image, tmp_path / "there")


def test_files_that_nobody_may_write_keep_their_mode_also_when_it_is_gone_on_with(store, tmp_path, monkeypatch):
    image = make_image(tmp_path / "here", pieces=1)
    (image / "criu" / "pages-1.img").chmod(0o444)
    store.upload(image, "qwen", quiet, NEVER)
    there = tmp_path / "there"

    def break_off(source: Path, target: Path) -> None:
        raise OSError("no link")

    monkeypatch.setattr(os, "link", break_off)
    with pytest.raises(OSError, match="no link"):
        store.download(store.newest("qwen"), there, quiet, NEVER)
    monkeypatch.undo()
    store.download(store.newest("qwen"), there, quiet, NEVER)
    assert same(image, there)
    assert (there / "criu" / "pages-1.img").stat().st_mode & 0o777 == 0o444


def test_an_index_that_leads_out_of_its_folder_is_refused(store, s3, tmp_path):
    store.upload(make_image(tmp_path / "here", pieces=1), "qwen", quiet, NEVER)
    remote = store.newest("qwen")
    for name in ("../out", "/tmp/out"):
        bad = replace(remote, index={**remote.index, "files": [{"path": name, "size": 0, "mode": 0o600, "pieces": []}]})
        with pytest.raises(StoreError, match="has a file"):
            store.download(bad, tmp_path / "there", quiet, NEVER)


def test_an_index_without_its_files_is_said(store, tmp_path):
    store.upload(make_image(tmp_path / "here", pieces=1), "qwen", quiet, NEVER)
    remote = store.newest("qwen")
    for files in (None, [{"path": "x"}], [{"path": "x", "size": "1", "mode": 0, "pieces": []}]):
        with pytest.raises(StoreError, match="cannot be read"):
            store.download(replace(remote, index={**remote.index, "files": files}), tmp_path / "there", quiet, NEVER)


def test_an_index_that_is_none_is_said(store, s3):
    client_of(s3).put_object(
        Bucket=BUCKET, Key=f"{store._models('qwen')}20261129T000000.000000/index.json", Body=b'{"format": 9}'
    )
    with pytest.raises(StoreError, match="cannot be read"):
        store.newest("qwen")


def test_a_store_that_is_not_there_is_said_in_bounded_time(tmp_path):
    store = ObjectStore(ObjectStoreConfig("http://127.0.0.1:1", BUCKET, ACCESS, SECRET))
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:1"):
        store.newest("qwen")
    assert time.monotonic() - began < 60, "a few attempts, not a few minutes"


def test_no_secret_is_told(s3, tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "llmuxd")
    wrong = replace(s3, secret_key="wrong-but-secret")
    with pytest.raises(StoreError) as refused:
        ObjectStore(wrong).newest("qwen")
    shown = f"{refused.value!r} {wrong!r} {ObjectStore(wrong)!r} {caplog.text}"
    assert "wrong-but-secret" not in shown
    assert ACCESS not in shown
    table = {"endpoint": "e", "bucket": "b", "access_key": ACCESS, "secret_key": SECRET}
    config = parse_config({"checkpoint": {"object_store": table}}, environ={})
    assert SECRET not in f"{config!r} {describe(config)!r}"


def test_keys_come_from_files_and_from_credentials(tmp_path, s3):
    (tmp_path / "access").write_text(ACCESS + "\n")
    (tmp_path / "secret").write_text(SECRET)
    named = ObjectStoreConfig("e", "b", access_key_file=tmp_path / "access", secret_key_file=Path("secret"))
    assert access_of(named, {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == (ACCESS, SECRET)
    missing = replace(s3, access_key="", access_key_file=tmp_path / "nothing")
    with pytest.raises(StoreError, match="nothing cannot be read"):
        ObjectStore(missing).newest("qwen")


def test_few_pieces_are_in_memory_at_once(store, tmp_path):
    image = make_image(tmp_path / "here", pieces=16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store.upload(image, "qwen", quiet, NEVER)
    store.download(store.newest("qwen"), tmp_path / "there", quiet, NEVER)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 12 * object_store.PIECE_BYTES, "of a bigger image, no more than of this"

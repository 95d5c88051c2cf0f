"""What of the object store needs no store: its keys, its names, what is said of a library that is missing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from llmuxd.config import ObjectStoreConfig
from llmuxd.config.secrets import CREDENTIALS_ENV, SecretMissing, access_of
from llmuxd.engine import object_store
from llmuxd.engine.manifest import NAME, Manifest
from llmuxd.engine.object_store import ObjectStore, StoreError
from tests.store.image import make_image

CONFIG = ObjectStoreConfig("http://127.0.0.1:1", "bucket", "the-access", "the-secret")


def in_files(access: Path, secret: Path) -> ObjectStoreConfig:
    return ObjectStoreConfig("e", "b", access_key_file=access, secret_key_file=secret)


def test_keys_stand_in_the_config_or_in_files_of_their_own(tmp_path):
    assert access_of(CONFIG, {}) == ("the-access", "the-secret")
    (tmp_path / "access").write_text("filed-access\n")
    (tmp_path / "secret").write_text("  filed-secret")
    assert access_of(in_files(tmp_path / "access", tmp_path / "secret"), {}) == ("filed-access", "filed-secret")


def test_a_name_without_a_folder_is_that_of_a_credential(tmp_path):
    for name in ("access", "secret"):
        (tmp_path / name).write_text(f"credential-{name}")
    found = access_of(in_files(Path("access"), Path("secret")), {CREDENTIALS_ENV: str(tmp_path)})
    assert found == ("credential-access", "credential-secret")


def test_a_file_that_cannot_be_read_is_named_and_not_quoted(tmp_path):
    (tmp_path / "access").write_bytes(b"half a secret \xff")
    with pytest.raises(SecretMissing, match="access cannot be read: it is not text") as refused:
        access_of(in_files(tmp_path / "access", tmp_path / "secret"), {})
    assert "half" not in str(refused.value)
    with pytest.raises(StoreError, match="nothing cannot be read: No such file"):
        ObjectStore(in_files(tmp_path / "nothing", tmp_path / "access")).newest("qwen")


def test_no_key_is_shown_with_a_config_or_a_store():
    shown = f"{CONFIG!r} {CONFIG} {ObjectStore(CONFIG)!r}"
    assert "the-access" not in shown
    assert "the-secret" not in shown


def test_without_boto3_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(StoreError, match="apt install python3-boto3"):
        ObjectStore(CONFIG).newest("qwen")


def test_without_zstandard_nothing_is_compressed_and_what_is_cannot_be_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert not object_store._pays(bytes(1000))
    with pytest.raises(StoreError, match="apt install python3-zstandard"):
        object_store._unpack(b"packed", 1000)


@pytest.mark.parametrize("name", ["/etc/passwd", "../out", "criu/../../out"])
def test_no_file_of_an_image_leads_out_of_it(tmp_path, name):
    with pytest.raises(StoreError, match="has a file"):
        object_store._inside(tmp_path, name)
    assert object_store._inside(tmp_path, "criu/pages-1.img") == tmp_path / "criu" / "pages-1.img"


@pytest.mark.parametrize("content", ["", "\n", "[default]\nid = HUSH\nkey = HUSH", "HUSH\x07"])
def test_what_cannot_be_a_key_is_refused_and_not_quoted(tmp_path, content):
    (tmp_path / "access").write_text(content)
    with pytest.raises(StoreError, match="access is not one line") as refused:
        ObjectStore(in_files(tmp_path / "access", tmp_path / "access")).newest("qwen")
    assert "HUSH" not in f"{refused.value!r} {refused.value.__cause__!r}"
    with pytest.raises(StoreError, match="the one in the config is not one line"):
        ObjectStore(ObjectStoreConfig("http://127.0.0.1:1", "b", "HUSH\nHUSH", "s")).newest("qwen")


def entries(image: Path) -> list[dict[str, Any]]:
    return list(object_store._entries(image, Manifest.from_json((image / NAME).read_text())))


def test_a_second_name_of_a_file_is_a_link(tmp_path):
    found = {entry["path"]: entry for entry in entries(make_image(tmp_path, pieces=0))}
    assert found["files/0000"]["size"] == 4 * object_store.PIECE_BYTES
    assert found["files/0001"] == {"path": "files/0001", "link": "files/0000"}


def test_what_is_about_an_image_is_not_of_it(tmp_path):
    image = make_image(tmp_path, pieces=0)
    (image / "refused").write_text("it did not wake\n")
    names = {entry["path"] for entry in entries(image)}
    assert names == {"criu/empty.img", "criu/pages-1.img", "criu/pages-2.img", "files/0000", "files/0001"}


def test_an_image_that_is_being_removed_is_not_taken_for_a_smaller_one(tmp_path):
    image = make_image(tmp_path, pieces=0)
    os.truncate(image / "criu" / "pages-2.img", 5)
    with pytest.raises(StoreError, match=r"pages-2\.img of the image is not as it was saved"):
        entries(image)
    (image / "criu" / "pages-2.img").unlink()
    with pytest.raises(FileNotFoundError):
        entries(image)

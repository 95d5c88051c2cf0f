"""Stores that do not answer, or answer with what nobody should read: one kind of error, soon, without secrets."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmuxd.config import ObjectStoreConfig
from llmuxd.engine import object_store
from llmuxd.engine.object_store import ATTEMPTS, ObjectStore, StoreError
from tests.store.conftest import ACCESS, BUCKET, SECRET

SHORT_SECS = 0.3


@contextmanager
def listening(backlog: int) -> Iterator[str]:
    """A socket that accepts nobody: its kernel connects as many as it has room for."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(backlog)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def ask(endpoint: str) -> float:
    """How long it takes to be told that the store does not answer."""
    began = time.monotonic()
    with pytest.raises(StoreError, match="timeout"):
        ObjectStore(ObjectStoreConfig(endpoint, BUCKET, ACCESS, SECRET)).newest("qwen")
    return time.monotonic() - began


def test_a_store_that_lets_nobody_connect_is_said(monkeypatch):
    monkeypatch.setattr(object_store, "CONNECT_SECS", SHORT_SECS)
    with listening(0) as endpoint, socket.socket() as first:
        first.connect(("127.0.0.1", int(endpoint.rpartition(":")[2])))
        assert ask(endpoint) >= ATTEMPTS * SHORT_SECS * 0.9


def test_a_store_that_never_answers_is_said(monkeypatch):
    monkeypatch.setattr(object_store, "READ_SECS", SHORT_SECS)
    with listening(16) as endpoint:
        assert ask(endpoint) >= ATTEMPTS * SHORT_SECS * 0.9


def test_an_endpoint_that_is_no_url_is_said():
    with pytest.raises(StoreError, match=r"endpoint 's3\.example\.org' is no URL"):
        ObjectStore(ObjectStoreConfig("s3.example.org", "b", "a", "s")).newest("qwen")


@contextmanager
def refusing(answer: str) -> Iterator[tuple[str, list[str]]]:
    """A store that answers everything with a 403 of this message; and what it was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Authorization", ""))
            body = f"<Error><Code>InvalidAccessKeyId</Code><Message>{answer}</Message></Error>".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is written."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def keys_in_files(endpoint: str, folder: Path, access: str, secret: str) -> ObjectStoreConfig:
    (folder / "access").write_text(access + "\n")
    (folder / "secret").write_text(secret)
    return ObjectStoreConfig(endpoint, BUCKET, access_key_file=folder / "access", secret_key_file=folder / "secret")


def test_a_store_that_tells_a_key_from_a_file_is_not_quoted(tmp_path):
    with refusing("who is FILED-ACCESS with FILED-SECRET") as (endpoint, asked):
        store = ObjectStore(keys_in_files(endpoint, tmp_path, "FILED-ACCESS", "FILED-SECRET"))
        with pytest.raises(StoreError) as refused:
            store.newest("qwen")
    assert "FILED-ACCESS" in asked[0], "it was the key of the file that was used"
    assert "InvalidAccessKeyId" in str(refused.value)
    assert "FILED" not in f"{refused.value!r} {store!r}"


def test_keys_that_have_changed_in_their_files_are_taken(s3, store, tmp_path):
    changed = ObjectStore(keys_in_files(s3.endpoint, tmp_path, ACCESS, "not any more"))
    with pytest.raises(StoreError, match="SignatureDoesNotMatch"):
        changed.newest("qwen")
    (tmp_path / "secret").write_text(SECRET)
    assert changed.newest("qwen") is None


@pytest.mark.parametrize("of_size", [2**30, 2 * object_store.PIECE_BYTES])
def test_a_piece_that_would_become_bigger_than_it_was_is_not_unpacked(of_size):
    packed = object_store._pack(bytes(of_size))
    with pytest.raises(StoreError, match="damaged"):
        object_store._unpack(packed, object_store.PIECE_BYTES)


def test_no_bit_of_a_header_can_be_flipped_unseen():
    data = bytes(16_000_000)
    packed = object_store._pack(data)
    seen = 0
    for bit in range(12 * 8):
        bad = bytearray(packed)
        bad[bit // 8] ^= 1 << bit % 8
        try:
            unpacked = object_store._unpack(bytes(bad), len(data))
        except StoreError:
            seen += 1
        else:
            assert len(unpacked) == len(data), "whether it is the right one is for the hash to find"
    assert seen > 60

"""Images in an S3-compatible store: sent in pieces, fetched in pieces, found by what is written last.

Of each image there are objects under `llmux/MACHINE/MODEL/GENERATION/`, as no other machine can restore it: a piece of
at most 16 MiB is `pieces/SHA256`, with `.zst` if it is compressed, and `index.json`, written when all pieces are there,
says of which pieces each file is made. A reader that sees no index sees no image. What was cut off is gone on with:
pieces that are there are not sent again, and pieces that have been fetched are noted beside the unfinished folder.

All calls block, use a few threads of their own, and hold a few pieces in memory. boto3 is optional, as is zstandard:
what is sent without it is not compressed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from llmuxd.config import ObjectStoreConfig
from llmuxd.config.secrets import SecretMissing, access_of
from llmuxd.engine.manifest import NAME, PARTIAL, Host, Manifest
from llmuxd.engine.spec import slug
from llmuxd.tasks import in_thread

PIECE_BYTES = 16 * 2**20
THREADS = 4
CONNECT_SECS, READ_SECS, ATTEMPTS = 5.0, 30.0, 3
PAYS = 0.9
"""A file is compressed if its first piece becomes smaller than this share of itself."""

_PREFIX = "llmux"
_INDEX = "index.json"
_PIECES = "pieces"
_JOURNAL = "fetched.journal"
_FORMAT = 1
_SLUG_LENGTH, _MACHINE_LENGTH = 64, 16
_LEVEL = 1
_GB = 1e9

Tell = Callable[[str], None]


class StoreError(Exception):
    """The store cannot be used, or what it has is not what was put there. The text has no secrets."""


class Cancelled(Exception):
    """It was to be given up."""


@dataclass(frozen=True, slots=True)
class RemoteImage:
    """A complete one in the store."""

    model: str
    manifest: Manifest
    index: dict[str, Any] = field(repr=False)

    @property
    def generation(self) -> str:
        return self.manifest.generation


@dataclass(frozen=True, slots=True)
class Sent:
    """What an upload came to. Sizes in bytes."""

    pieces: int
    """Of the image."""
    sent: int
    """Those that were not there yet."""
    size: int
    stored: int
    """What was sent, compressed as it was."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where a piece is in its file; `sha256` is empty if it has nothing but zeros."""

    path: str
    at: int
    size: int
    sha256: str = ""
    packed: bool = False

    @property
    def name(self) -> str:
        return f"{_PIECES}/{self.sha256}" + (".zst" if self.packed else "")


class ObjectStore:
    """What one machine, by default this one, has in a bucket."""

    def __init__(self, config: ObjectStoreConfig, machine_id: str | None = None) -> None:
        self._config = config
        # machine-id(5) asks not to hand it out as it is.
        machine = (Host.here().machine_id if machine_id is None else machine_id).encode()
        self._prefix = f"{_PREFIX}/{hashlib.sha256(b'llmux ' + machine).hexdigest()[:_MACHINE_LENGTH]}/"
        self._made: Any = None
        self._access = ("", "")
        self._lock = threading.Lock()

    # Sending

    def upload(self, folder: Path, model: str, tell: Tell, cancelled: threading.Event) -> Sent:
        """Have a complete image in the store. Raises StoreError; Cancelled; OSError if the image cannot be read."""
        text = (folder / NAME).read_text()
        manifest = Manifest.from_json(text)
        generation = manifest.generation
        base = self._base(model, generation)
        with _failing(self):
            there = {key.removeprefix(base) for key, _ in self._list(base)}
            if _INDEX in there:
                return Sent(0, 0, 0, 0)
            files, pieces, stored = [], 0, [0, 0]
            tell(f"sending image {generation} to the store")
            for entry in _entries(folder, manifest):
                if "link" not in entry:
                    entry["pieces"] = self._send_file(folder, entry, base, there, stored, cancelled)
                    pieces += len(entry["pieces"])
                files.append(entry)
            index = {"format": _FORMAT, "manifest": text, "files": files}
            self._put(base + _INDEX, json.dumps(index).encode())
        size = sum(entry.get("size", 0) for entry in files)
        tell(f"image {generation} is in the store: {stored[1] / _GB:.2f} GB sent of {size / _GB:.2f} GB")
        return Sent(pieces, stored[0], size, stored[1])

    def _send_file(
        self,
        folder: Path,
        entry: dict[str, Any],
        base: str,
        there: set[str],
        stored: list[int],
        cancelled: threading.Event,
    ) -> list[dict[str, Any]]:
        """Send what is not there of a file; its pieces for the index."""
        found: list[_Piece] = []
        packing: bool | None = None
        running: set[Future[int]] = set()
        try:
            with (folder / entry["path"]).open("rb", buffering=0) as file:
                for at in range(0, entry["size"], PIECE_BYTES):
                    if cancelled.is_set():
                        raise Cancelled
                    data = os.pread(file.fileno(), PIECE_BYTES, at)
                    if len(data) != min(PIECE_BYTES, entry["size"] - at):
                        raise _not_as_saved(entry["path"])
                    if data.count(0) == len(data):
                        found.append(_Piece(entry["path"], at, len(data)))
                        continue
                    packing = _pays(data) if packing is None else packing
                    piece = _Piece(entry["path"], at, len(data), hashlib.sha256(data).hexdigest(), packing)
                    found.append(piece)
                    if piece.name in there:
                        continue
                    there.add(piece.name)
                    running = _leave_room(running, stored, THREADS - 1)
                    running.add(in_thread(self._send_piece, base + piece.name, data, packing))
        finally:
            wait(running)
        _leave_room(running, stored, 0)
        return [{"at": p.at, "size": p.size, "sha256": p.sha256, "packed": p.packed} for p in found]

    def _send_piece(self, key: str, data: bytes, packing: bool) -> int:
        content = _pack(data) if packing else data
        self._put(key, content)
        return len(content)

    # Fetching

    def newest(self, model: str) -> RemoteImage | None:
        """The newest complete image of a model; None if there is none. Raises StoreError."""
        with _failing(self):
            for generation in self._generations(model):
                index = self._get(self._base(model, generation) + _INDEX, missing=True)
                if index is not None:
                    return _remote(model, index)
        return None

    def download(self, image: RemoteImage, folder: Path, tell: Tell, cancelled: threading.Event) -> None:
        """Bring an image into the folder. Raises StoreError; Cancelled; OSError, FileExistsError if it is there."""
        if folder.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        partial = folder.with_name(folder.name + PARTIAL)
        partial.mkdir(mode=0o700, exist_ok=True)
        journal = partial / _JOURNAL
        done = set(journal.read_text().splitlines()) if journal.exists() else set()
        base = self._base(image.model, image.generation)
        tell(f"fetching image {image.generation} from the store" + (", the rest of it" if done else ""))
        running: set[Future[int]] = set()
        with _failing(self), journal.open("a", buffering=1) as note:
            try:
                for piece in _pieces_of(image.index, partial):
                    line = f"{piece.path} {piece.at} {piece.sha256}"
                    if cancelled.is_set():
                        raise Cancelled
                    if not piece.sha256 or line in done:
                        continue
                    running = _leave_room(running, [0, 0], THREADS - 1)
                    running.add(in_thread(self._fetch_piece, base, piece, partial, _noting(note, line)))
                _leave_room(running, [0, 0], 0)
            finally:
                wait(running)
            for entry in image.index["files"]:
                path = _inside(partial, entry["path"])
                if "link" in entry:
                    path.unlink(missing_ok=True)
                    os.link(_inside(partial, entry["link"]), path)
                else:
                    path.chmod(entry["mode"])
        journal.unlink()
        (partial / NAME).write_text(image.index["manifest"])
        partial.rename(folder)
        tell(f"image {image.generation} is here: {image.manifest.size / _GB:.2f} GB")

    def _fetch_piece(self, base: str, piece: _Piece, folder: Path, note: Callable[[], Any]) -> int:
        content = self._get(base + piece.name)
        assert content is not None
        data = _unpack(content, piece.size) if piece.packed else content
        if len(data) != piece.size or hashlib.sha256(data).hexdigest() != piece.sha256:
            raise StoreError(f"{piece.path} at {piece.at} is not what was sent: the piece in the store is damaged")
        with _inside(folder, piece.path).open("r+b", buffering=0) as file:
            done = 0
            while done < piece.size:
                # The last of what a disk has room for is written, and an error is only of the next.
                done += os.pwrite(file.fileno(), memoryview(data)[done:], piece.at + done)
        note()
        return len(data)

    # Removing

    def remove_stale(self, model: str, keep: int) -> int:
        """Leave so many complete images of a model, and nothing older; how many were removed. Raises StoreError."""
        removed, complete = 0, 0
        with _failing(self):
            for generation in self._generations(model):
                base = self._base(model, generation)
                keys = [key for key, _ in self._list(base)]
                whole = base + _INDEX in keys
                # One without an index that is newer than all complete ones may be on its way.
                if (whole and complete < keep) or (not whole and complete == 0):
                    complete += whole
                    continue
                # Without its index it is no image any more, whatever comes of the rest.
                for key in sorted(keys, key=lambda key: not key.endswith(_INDEX)):
                    self._client().delete_object(Bucket=self._config.bucket, Key=key)
                removed += 1
        return removed

    # The bucket

    def _base(self, model: str, generation: str) -> str:
        return f"{self._models(model)}{generation}/"

    def _models(self, model: str) -> str:
        return f"{self._prefix}{slug(model, _SLUG_LENGTH)}/"

    def _generations(self, model: str) -> list[str]:
        """The newest first."""
        base = self._models(model)
        pages = (
            self._client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=self._config.bucket, Prefix=base, Delimiter="/")
        )
        found = [entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", ())]
        return sorted((prefix.removeprefix(base).rstrip("/") for prefix in found), reverse=True)

    def _list(self, prefix: str) -> Iterator[tuple[str, int]]:
        pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=self._config.bucket, Prefix=prefix)
        return ((entry["Key"], entry["Size"]) for page in pages for entry in page.get("Contents", ()))

    def _get(self, key: str, *, missing: bool = False) -> bytes | None:
        client = self._client()
        try:
            content: bytes = client.get_object(Bucket=self._config.bucket, Key=key)["Body"].read()
        except client.exceptions.NoSuchKey:
            if missing:
                return None
            raise StoreError(f"{key} is not in the store any more") from None
        return content

    def _put(self, key: str, content: bytes) -> None:
        answer = self._client().put_object(Bucket=self._config.bucket, Key=key, Body=content)
        tag = answer.get("ETag", "").strip('"')
        # Of an object that was sent whole, and is not encrypted by the store, it is the content's MD5.
        plain = "ServerSideEncryption" not in answer and len(tag) == 32
        if plain and tag != hashlib.md5(content, usedforsecurity=False).hexdigest():
            raise StoreError(f"the store has got something else than was sent as {key}")

    def _client(self) -> Any:
        """One for all threads; another one when the keys in their files are others."""
        try:
            access = access_of(self._config)
        except SecretMissing as missing:
            raise StoreError(f"the key of the object store: {missing}") from missing
        with self._lock:
            if self._made is None or access != self._access:
                self._made, self._access = _connect(self._config, *access), access
            return self._made

    def _without_secrets(self, text: str) -> str:
        for secret in (*self._access, self._config.access_key, self._config.secret_key):
            text = text.replace(secret, "***") if secret else text
        return text


def _connect(config: ObjectStoreConfig, access: str, secret: str) -> Any:
    try:
        import boto3
        from botocore.config import Config as BotoConfig
    except ImportError:
        raise StoreError("boto3 is not installed (Debian: apt install python3-boto3)") from None
    options: dict[str, Any] = {
        "connect_timeout": CONNECT_SECS,
        "read_timeout": READ_SECS,
        "retries": {"total_max_attempts": ATTEMPTS, "mode": "standard"},
        "s3": {"addressing_style": "path"},
        "max_pool_connections": 2 * THREADS,
    }
    if "request_checksum_calculation" in BotoConfig.OPTION_DEFAULTS:
        # Newer ones add a checksum that not every S3-compatible store knows.
        options |= {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    try:
        return boto3.session.Session().client(
            "s3",
            endpoint_url=config.endpoint,
            region_name=config.region,
            aws_access_key_id=access,
            aws_secret_access_key=secret,
            config=BotoConfig(**options),
        )
    except ValueError:
        raise StoreError(f"checkpoint.object_store.endpoint {config.endpoint!r} is no URL, http://... or so") from None


class _failing:
    """Turns what boto3 raises into a StoreError without secrets."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Before OSError: botocore's timeouts are of that kind as well.
        if type(error).__module__.partition(".")[0] in ("botocore", "boto3", "urllib3"):
            text = self._store._without_secrets(str(error))
            raise StoreError(f"{self._store._config.endpoint}: {text}") from None
        if error is None or isinstance(error, (StoreError, Cancelled, OSError)):
            return
        if isinstance(error, (KeyError, TypeError, ValueError)):
            raise StoreError(f"an image in the store cannot be read: {error!r}") from error


def _remote(model: str, content: bytes) -> RemoteImage:
    try:
        index = json.loads(content)
        if index["format"] != _FORMAT:
            raise ValueError("it is of another format")
        return RemoteImage(model, Manifest.from_json(index["manifest"]), index)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"an image of {model} in the store cannot be read: {error}") from error


def _entries(folder: Path, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """The files of an image, as its manifest names them; those with a second name of a file name the first.

    What else is in the folder is not of the image, but about it. Raises StoreError, or OSError, if one is not there as
    it was: the image may be being removed.
    """
    first: dict[tuple[int, int], str] = {}
    for state in sorted(manifest.content, key=lambda state: state.path):
        found = (folder / state.path).stat()
        if found.st_size != state.size:
            raise _not_as_saved(state.path)
        twin = first.setdefault((found.st_dev, found.st_ino), state.path)
        if twin == state.path:
            yield {"path": state.path, "size": found.st_size, "mode": found.st_mode & 0o7777}
        else:
            yield {"path": state.path, "link": twin}


def _not_as_saved(path: str) -> StoreError:
    return StoreError(f"{path} of the image is not as it was saved, and the image is not sent")


def _pieces_of(index: dict[str, Any], folder: Path) -> Iterator[_Piece]:
    """All pieces; each file is made, with holes of its size, before its first piece comes."""
    for entry in index["files"]:
        path = _inside(folder, entry["path"])
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if "link" in entry:
            continue
        if path.exists():
            path.chmod(0o600)  # A download that was cut off at its end has left the mode that it is to have.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, entry["size"])
        finally:
            os.close(descriptor)
        for piece in entry["pieces"]:
            yield _Piece(entry["path"], piece["at"], piece["size"], piece["sha256"], piece["packed"])


def _inside(folder: Path, name: str) -> Path:
    """The path of a file of an image. Raises StoreError for a name that leads out of it."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise StoreError(f"an image in the store has a file {name!r}")
    return folder / path


def _noting(note: TextIO, line: str) -> Callable[[], None]:
    def write() -> None:
        note.write(line + "\n")

    return write


def _leave_room(running: set[Future[int]], stored: list[int], most: int) -> set[Future[int]]:
    """Wait until at most so many are under way; count those that have ended. Raises what one of them has raised."""
    while True:
        done = {future for future in running if future.done()}
        for future in done:
            stored[0] += 1
            stored[1] += future.result()
        running = running - done
        if len(running) <= most:
            return running
        wait(running, return_when=FIRST_COMPLETED)


def _zstandard() -> ModuleType | None:
    try:
        import zstandard
    except ImportError:
        return None
    module: ModuleType = zstandard
    return module


def _pays(data: bytes) -> bool:
    return _zstandard() is not None and len(_pack(data)) < PAYS * len(data)


def _pack(data: bytes) -> bytes:
    zstandard = _zstandard()
    assert zstandard is not None
    packed: bytes = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
    return packed


def _unpack(content: bytes, size: int) -> bytes:
    zstandard = _zstandard()
    if zstandard is None:
        missing = "zstandard is not installed (Debian: apt install python3-zstandard)"
        raise StoreError(f"the image is compressed, and {missing}")
    try:
        # Else memory for what a damaged header says would be taken.
        if zstandard.frame_content_size(content) != size:
            raise StoreError(f"a piece in the store is damaged: it would not be unpacked to {size} bytes")
        data: bytes = zstandard.ZstdDecompressor().decompress(content)
    except zstandard.ZstdError as error:
        raise StoreError(f"a piece in the store is damaged: {error}") from error
    return data

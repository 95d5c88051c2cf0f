"""What an image says of itself: what was saved, where, and the files that it needs to be as they were.

It is plain data in a JSON file, written last: without it there is no image. How it is used is in `images`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llmuxd.core.eviction import EvictionPolicy, ProcessStrategy, WeightStrategy
from llmuxd.engine.proctable import boot_id
from llmuxd.engine.run import EngineInfo
from llmuxd.engine.spec import EngineSpec, build_argv

NAME = "manifest.json"
PARTIAL = ".partial"
"""Ends the name of a folder whose image comes from an object store, and is gone on with."""

FORMAT = 1
_CHUNK = 2**20
_THREADS = 2


@dataclass(frozen=True, slots=True)
class Host:
    """The machine, as far as a saved process depends on it."""

    machine_id: str
    boot_id: str
    kernel: str
    driver: str
    """NVIDIA's, as it says itself; empty without one."""

    @classmethod
    def here(cls) -> Host:
        """This one."""
        driver = _first_line("/proc/driver/nvidia/version")
        return cls(_first_line("/etc/machine-id"), boot_id(), os.uname().release, driver)


@dataclass(frozen=True, slots=True)
class Subject:
    """The engine that is saved."""

    model: str
    argv: tuple[str, ...]
    fingerprint: str
    """Of what it was started from; see `record.fingerprint`."""
    weights: WeightStrategy
    vllm_version: str | None
    can_park: bool
    can_sleep: bool
    pid: int
    token: str
    """Its mark in the environment."""
    log_path: str

    @classmethod
    def of(
        cls, spec: EngineSpec, fingerprint: str, info: EngineInfo, weights: WeightStrategy, pid: int, token: str
    ) -> Subject:
        argv = tuple(build_argv(spec))
        version, parks, sleeps = info.version, info.can_park, info.can_sleep
        return cls(spec.name, argv, fingerprint, weights, version, parks, sleeps, pid, token, str(spec.log_path))


@dataclass(frozen=True, slots=True)
class FileState:
    """One file: its content by hash, and what of it does not change unless the content may have."""

    path: str
    size: int
    sha256: str
    stamp: tuple[int, ...] = ()
    """Device, inode, times of the last change of content and of metadata, in ns: while it is the same, in the same
    boot, the content is."""

    def changed(self, path: Path, *, same_boot: bool, given_up: threading.Event | None = None) -> bool:
        """Whether the file there is not this one any more. Reads it, where that cannot be told otherwise; once
        `given_up` is set, the answer means nothing."""
        try:
            size, stamp = _stamp(path)
            if size != self.size:
                return True
            return not (same_boot and stamp == self.stamp) and sha256_of(path, given_up) != self.sha256
        except OSError:
            return True


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of it. Sizes in bytes, times in seconds since the epoch."""

    generation: str
    """Sorts by age."""
    created: float
    seconds: float
    """What saving it took."""
    subject: Subject
    host: Host
    criu: str
    pids: tuple[int, ...]
    """Of all processes: they have to be free for a restore."""
    held: tuple[FileState, ...]
    """The files that the processes have open or mapped, which have to be as they were."""
    kept: tuple[FileState, ...]
    """Those that were saved beside: where they have to be, and under which number they are in the image."""
    content: tuple[FileState, ...]
    """The files of the image, relative to its folder."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.content)

    @property
    def eviction(self) -> EvictionPolicy:
        return EvictionPolicy(self.subject.weights, ProcessStrategy.CHECKPOINT)

    def as_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError if it is none, or of another format."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("it is of another format")
            subject = {**data["subject"], "argv": tuple(data["subject"]["argv"])}
            subject["weights"] = WeightStrategy(subject["weights"])
            files = {name: tuple(map(_file, data[name])) for name in ("held", "kept", "content")}
            made = {**data, **files, "subject": Subject(**subject), "host": Host(**data["host"])}
            manifest = cls(**{**made, "pids": tuple(data["pids"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is no manifest: {error!r}") from error
        if not all(isinstance(getattr(manifest, each.name), str) for each in fields(cls) if each.type == "str"):
            raise ValueError("it is no manifest")
        return manifest


def _file(data: Mapping[str, Any]) -> FileState:
    return FileState(**{**data, "stamp": tuple(data["stamp"])})


def states_of(
    paths: Iterable[Path],
    known: Collection[FileState] = (),
    relative_to: Path | None = None,
    given_up: threading.Event | None = None,
) -> list[FileState]:
    """The files as they are; those that cannot be read are left out. Reads them: call it from a thread.

    The hash of one that is as it was in `known`, of this boot, is taken from there. Once `given_up` is set, no more is
    read.
    """
    before = {(file.path, file.size, file.stamp): file.sha256 for file in known if file.stamp}

    def look(path: Path) -> FileState | None:
        name = str(path if relative_to is None else path.relative_to(relative_to))
        try:
            size, stamp = _stamp(path)
            return FileState(name, size, before.get((name, size, stamp)) or sha256_of(path, given_up), stamp)
        except OSError:
            return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return [state for state in pool.map(look, paths) if state is not None]


def first_changed(
    files: Iterable[FileState], folder: Path | None, *, same_boot: bool, given_up: threading.Event | None = None
) -> FileState | None:
    """One that is not as it was; None if all are. `folder` is what their paths are relative to. Once `given_up` is set,
    no more is read, and the answer means nothing."""
    found = list(files)

    def look(file: FileState) -> bool:
        path = Path(file.path) if folder is None else folder / file.path
        return file.changed(path, same_boot=same_boot, given_up=given_up)

    with ThreadPoolExecutor(_THREADS) as pool:
        return next((file for file, changed in zip(found, pool.map(look, found), strict=True) if changed), None)


def sha256_of(path: Path, given_up: threading.Event | None = None) -> str:
    """Of the content. Raises OSError; InterruptedError, which is one, once `given_up` is set."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            if given_up is not None and given_up.is_set():
                raise InterruptedError(errno.EINTR, "given up", str(path))
            digest.update(memoryview(buffer)[:read])
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, tuple[int, ...]]:
    found = path.stat()
    return found.st_size, (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").partition("\n")[0].strip()
    except OSError:
        return ""

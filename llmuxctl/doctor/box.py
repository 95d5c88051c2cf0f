"""The machine as the checks see it: files, programs, users. Everything goes through here, so that a test can be a box.

Paths are absolute, and are looked up below `root`.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath

RUN_SECS = 10.0
_CREDENTIALS = struct.Struct("iII")


@dataclass(frozen=True)
class Ran:
    """How a program ended. `code` is None if it could not be started, or took too long."""

    code: int | None
    out: str = ""


@dataclass(frozen=True)
class User:
    """Somebody who opens files."""

    name: str
    uid: int
    groups: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Box:
    """A machine."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    uid: int = field(default_factory=os.geteuid)

    def path(self, absolute: str | PurePath) -> Path:
        """Where a path of the box is for this process."""
        return self.root / str(absolute).lstrip("/")

    def read(self, absolute: str | PurePath, limit: int = 1_000_000) -> str | None:
        """A file's text, None if it cannot be read."""
        try:
            with self.path(absolute).open("rb") as file:
                return file.read(limit).decode(errors="replace")
        except OSError:
            return None

    def exists(self, absolute: str | PurePath) -> bool:
        try:
            return self.path(absolute).exists()
        except OSError:
            return False

    def list(self, folder: str, pattern: str) -> list[str]:
        """The paths in a folder that match, in order."""
        try:
            found = sorted(self.path(folder).glob(pattern))
        except OSError:
            return []
        return ["/" + str(each.relative_to(self.root)) for each in found]

    def which(self, program: str, search: str) -> str | None:
        """The path of a program, found as `execvp` does with `search` for PATH; None if there is none."""
        if "/" in program:
            candidates = [program]
        else:
            candidates = [f"{folder}/{program}" for folder in search.split(":") if folder.startswith("/")]
        for candidate in candidates:
            try:
                found = self.path(candidate).stat()
            except OSError:
                continue
            if stat.S_ISREG(found.st_mode) and found.st_mode & 0o111:
                return candidate
        return None

    def run(self, argv: Sequence[str], seconds: float = RUN_SECS) -> Ran:
        """Run a program of the box to its end, and return what it printed."""
        try:
            done = subprocess.run(
                [str(self.path(argv[0])), *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
                env={**self.environ, "LC_ALL": "C"},
            )
        except (OSError, subprocess.TimeoutExpired):
            return Ran(None)
        return Ran(done.returncode, done.stdout.decode(errors="replace").strip())

    def free(self, absolute: str | PurePath) -> tuple[int, int] | None:
        """Free and all bytes of the file system of a path, or of the nearest folder above it that exists."""
        for folder in (PurePosixPath(absolute), *PurePosixPath(absolute).parents):
            if self.exists(folder):
                try:
                    found = shutil.disk_usage(self.path(folder))
                except OSError:
                    return None
                return found.free, found.total
        return None

    def may(self, user: User, absolute: str, want: int) -> bool | None:
        """Whether a user may use a file: `want` is 4 to read, 2 to write, 1 to execute, or their sum.

        None if it is not there, or not to be seen from here. Only modes count, no access lists.
        """
        folder = self.root
        for part in PurePosixPath(absolute).parts[1:-1]:
            folder /= part
            allowed = _allowed(folder, user, 1)
            if not allowed:
                return allowed
        return _allowed(self.path(absolute), user, want)

    def owner(self, absolute: str) -> int | None:
        try:
            return self.path(absolute).stat().st_uid
        except OSError:
            return None

    def peer(self, path: str) -> int | None:
        """The pid of who listens on a Unix socket."""
        try:
            with socket.socket(socket.AF_UNIX) as ours:
                ours.settimeout(1.0)
                ours.connect(str(self.path(path)))
                raw = ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return None
        return int(_CREDENTIALS.unpack(raw)[0])

    def holders(self, inode: int) -> frozenset[int]:
        """The processes that have a socket open, as far as this user may know."""
        return frozenset(pid for pid in self._pids() if self._has_open(pid, f"socket:[{inode}]"))

    def _pids(self) -> Iterator[int]:
        try:
            names = os.listdir(self.path("/proc"))
        except OSError:
            return
        yield from (int(name) for name in names if name.isdecimal())

    def _has_open(self, pid: int, target: str) -> bool:
        folder = self.path(f"/proc/{pid}/fd")
        try:
            return any(os.readlink(folder / name) == target for name in os.listdir(folder))
        except OSError:
            return False


def _allowed(path: Path, user: User, want: int) -> bool | None:
    try:
        found = path.stat()
    except OSError:
        return None
    if user.uid == 0:
        return True
    if found.st_uid == user.uid:
        granted = found.st_mode >> 6
    elif found.st_gid in user.groups:
        granted = found.st_mode >> 3
    else:
        granted = found.st_mode
    return granted & want == want

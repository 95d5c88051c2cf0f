"""A control group for each engine, in the group that systemd has delegated to the daemon.

In it every process of the engine is found, whatever session it moved to and whoever its parent is, and killed in one
go. Only cgroup v2 is used, and no controller is enabled: a group with controllers for its children may hold no
process itself, and systemd could not put the next daemon into it.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_PREFIX = "engine-"
_IN_A_GROUP = re.compile(rf"/{_PREFIX}[0-9a-f]{{8}}-.*")

_DELEGATED = ("user.delegate", "trusted.delegate")
"""How systemd marks what it has delegated."""


class Cgroup:
    """The control group of one engine."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def enter(self, pid: int) -> bool:
        """Make the group and move a process into it; False if that is not possible, which costs nothing but safety."""
        try:
            self.path.mkdir(exist_ok=True)
            (self.path / "cgroup.procs").write_text(str(pid))
        except OSError:
            return False
        return True

    def pids(self) -> set[int]:
        """The processes in it; none if it is not there."""
        try:
            return {int(word) for word in (self.path / "cgroup.procs").read_text().split()}
        except OSError:
            return set()

    def kill(self) -> None:
        """Kill all of them at once, where the kernel can (5.14)."""
        try:
            (self.path / "cgroup.kill").write_text("1")
        except OSError:
            return

    def remove(self) -> None:
        """Remove the group, once it is empty."""
        try:
            self.path.rmdir()
        except OSError:
            return


def delegated(root: Path = ROOT, own: Path = Path("/proc/self/cgroup")) -> Path | None:
    """The folder of this process's control group, if it is one of v2 that is this process's to divide."""
    try:
        line = next((line for line in own.read_text().splitlines() if line.startswith("0::/")), "")
        path = root / _IN_A_GROUP.sub("", line.removeprefix("0::/"))
        usable = line and (path / "cgroup.kill").exists() and os.access(path / "cgroup.procs", os.W_OK)
        if usable and (0 < path.stat().st_uid == os.getuid() or _is_marked(path)):
            return path
    except OSError:
        return None
    return None


def _is_marked(path: Path) -> bool:
    for name in _DELEGATED:
        try:
            if os.getxattr(path, name) == b"1":
                return True
        except OSError:
            continue
    return False


def group_of(folder: Path, owner: str, name: str) -> Path:
    """Where the group of an engine is; `owner` is the state folder of its daemon, as others may have engines beside."""
    return folder / f"{_prefix(owner)}{name}"


def engines_in(folder: Path, owner: str) -> list[Cgroup]:
    """The groups there of the engines of that owner, whichever daemon made them."""
    try:
        return [Cgroup(path) for path in sorted(folder.glob(_prefix(owner) + "*")) if path.is_dir()]
    except OSError:
        return []


def _prefix(owner: str) -> str:
    return f"{_PREFIX}{hashlib.sha256(os.fsencode(owner)).hexdigest()[:8]}-"

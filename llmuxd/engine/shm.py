"""Shared memory that an engine's processes leave in /dev/shm when they are killed.

A file there is an engine's if it was not there before the engine started, processes of the engine have it open
or mapped, and it is this user's. It is removed when the engine is gone, unless a process of somebody else
uses it. Names are no criterion: they differ between versions of vLLM, PyTorch and NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from llmuxd.engine.proctable import PROC, Proc, is_alive

SHM = "/dev/shm"

FileId = tuple[str, int]
"""Path and inode: a file that got the name of a removed one is another file."""


def existing() -> frozenset[FileId]:
    """The files in /dev/shm now."""
    try:
        with os.scandir(SHM) as entries:
            return frozenset((entry.path, entry.inode()) for entry in entries)
    except OSError:
        return frozenset()


def in_use_by(procs: Iterable[Proc]) -> set[FileId]:
    """This user's files in /dev/shm that the processes have open or mapped."""
    paths: set[str] = set()
    for proc in procs:
        found = _paths_of(proc.pid)
        if is_alive(proc):
            paths |= found
    found_files = set()
    for path in paths:
        try:
            status = os.lstat(path)
        except OSError:
            continue
        if status.st_uid == os.getuid():
            found_files.add((path, status.st_ino))
    return found_files


def remove_leftovers(files: Iterable[FileId]) -> list[str]:
    """Remove those that are still there and that no process uses; returns the paths of those removed.

    To be called when the engine is gone: every user of a file is then somebody else.
    """
    left = set(files) & existing()
    if not left:
        return []
    for name in os.listdir(PROC):
        if name.isdigit():
            used = _paths_of(int(name))
            left = {(path, inode) for path, inode in left if path not in used}
    removed = []
    for path, _ in sorted(left):
        try:
            Path(path).unlink()
        except FileNotFoundError:
            continue
        removed.append(path)
    return removed


def _paths_of(pid: int) -> set[str]:
    """The paths in /dev/shm that a process has open or mapped; none if it is not ours to look into."""
    prefix = SHM + "/"
    paths: set[str] = set()
    try:
        for fd in os.listdir(f"{PROC}/{pid}/fd"):
            try:
                target = os.readlink(f"{PROC}/{pid}/fd/{fd}")
            except FileNotFoundError:
                continue
            if target.startswith(prefix):
                paths.add(target)
        with open(f"{PROC}/{pid}/maps", "rb") as maps:
            for line in maps:
                position = line.find(prefix.encode())
                if position >= 0:
                    paths.add(os.fsdecode(line[position:].rstrip(b"\n")))
    except OSError:
        pass
    return paths

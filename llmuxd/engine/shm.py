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
    inodes = inodes_in_use_by(procs)
    return {(path, inode) for path, inode in existing() if inode in inodes and _is_ours(path)}


def inodes_in_use_by(procs: Iterable[Proc]) -> set[int]:
    """Those in /dev/shm that the processes have open or mapped, whether they have a name yet or not."""
    inodes: set[int] = set()
    for proc in procs:
        found = _inodes_of(proc.pid)
        if is_alive(proc):
            inodes |= found
    return inodes


def remove_leftovers(files: Iterable[FileId]) -> list[str]:
    """Remove those that are still there and that no process uses; returns the paths of those removed.

    To be called when the engine is gone: every user of a file is then somebody else.
    """
    left = set(files) & existing()
    if not left:
        return []
    for name in os.listdir(PROC):
        if name.isdigit():
            used = _inodes_of(int(name))
            left = {(path, inode) for path, inode in left if inode not in used}
    removed = []
    for path, _ in sorted(left):
        try:
            Path(path).unlink()
        except FileNotFoundError:
            continue
        removed.append(path)
    return removed


def _is_ours(path: str) -> bool:
    try:
        return os.lstat(path).st_uid == os.getuid()
    except OSError:
        return False


def _inodes_of(pid: int) -> set[int]:
    """The inodes in /dev/shm that a process has open or mapped; none if it is not ours to look into.

    Not the paths: glibc makes a semaphore under a name that it then replaces, and that is the one /proc shows.
    """
    prefix = SHM + "/"
    inodes: set[int] = set()
    try:
        for fd in os.listdir(f"{PROC}/{pid}/fd"):
            try:
                if os.readlink(f"{PROC}/{pid}/fd/{fd}").startswith(prefix):
                    inodes.add(os.stat(f"{PROC}/{pid}/fd/{fd}").st_ino)
            except FileNotFoundError:
                continue
        with open(f"{PROC}/{pid}/maps", "rb") as maps:
            # address, permissions, offset, device, inode, path
            inodes |= {int(line.split(maxsplit=5)[4]) for line in maps if prefix.encode() in line}
    except OSError:
        pass
    return inodes

"""How much of the devices' memory an engine holds, by what NVIDIA's driver says. Not yet run on a GPU."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection

from llmuxd.tasks import poll

_QUERY = ("--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")
_SECS = 10.0
_POLL_SECS = 0.1

FREE_SECS = 20.0
"""How long a driver may take to free what processes had that are gone."""


async def used_mib(pids: Collection[int], program: str = "nvidia-smi") -> int | None:
    """What these processes hold on all devices, in MiB; None where nothing can be measured."""
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            *_QUERY,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return None
    try:
        said, _ = await asyncio.wait_for(process.communicate(), _SECS)
    except asyncio.TimeoutError:
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.communicate())
    return None if process.returncode else held_by(pids, said.decode(errors="replace"))


async def left_by(pids: Collection[int], seconds: float = FREE_SECS) -> int:
    """What is still held, in MiB, in the name of processes that are gone; it is given so many seconds to be freed."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    held: int | None = None

    async def free() -> bool:
        nonlocal held
        held = await used_mib(pids)
        return not held or loop.time() >= deadline

    await poll(free, _POLL_SECS)
    return held or 0


def held_by(pids: Collection[int], said: str) -> int | None:
    """The sum over the processes, of nvidia-smi's lines "pid, MiB". In some containers and drivers it has "[N/A]" for
    the memory: if that is so for one of these, there is none."""
    total = 0
    for line in said.splitlines():
        found = re.fullmatch(r"\s*(\d+)\s*,\s*(\S.*?)\s*", line)
        if found is None:
            return None
        if int(found[1]) in pids:
            if not found[2].isdecimal():
                return None
            total += int(found[2])
    return total

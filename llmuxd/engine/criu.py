"""CRIU as far as it is needed: a tree of processes to a folder of images, and back.

What belongs to an image besides is in `images`. The options were found by saving real vLLM engines; what they mean is
in criu(8).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_OPTIONS = (
    "--shell-job",
    "--ext-unix-sk",
    "--tcp-established",
    "--link-remap",
    "--file-locks",
    "--ghost-limit=1G",
    "--manage-cgroups=ignore",
    "-v2",
)
_PIDFILE = "leader.pid"
_SHOWN_LINES = 3
_HARMLESS = ("rlimit: Can't setup RLIMIT_NOFILE",)
"""What CRIU calls an error and goes on after."""


class CriuError(Exception):
    """It did not work. `interrupted`: CRIU itself was ended in the middle, so that what it worked on may be damaged."""

    def __init__(self, reason: str, *, interrupted: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.interrupted = interrupted


class Criu:
    """The program. Safe to use for several engines at once.

    It has `mark` in its environment: one that a killed daemon has left at work is found by that.
    """

    def __init__(self, program: str, cuda_plugin_dir: str = "", mark: Mapping[str, str] | None = None) -> None:
        self.program = program
        self._mark = mark or {}
        self._plugins = ("--libdir", cuda_plugin_dir) if Path(cuda_plugin_dir, "cuda_plugin.so").exists() else ()

    async def version(self) -> str:
        """As it says itself. Raises CriuError."""
        try:
            process = await asyncio.create_subprocess_exec(
                self.program, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
        except OSError as error:
            raise self._not_there(error) from error
        said, _ = await process.communicate()
        return said.decode(errors="replace").partition("\n")[0].removeprefix("Version: ").strip()

    async def dump(self, pid: int, images: Path, timeout: float) -> None:
        """Save the process and all that descends from it; they are gone then.

        Raises CriuError; the processes go on then, unless it was interrupted.
        """
        await self._run("dump", images, timeout, ("--tree", str(pid)), {}, lambda _pid: None)

    async def restore(
        self, images: Path, timeout: float, mark: Mapping[str, str], enter: Callable[[int], object]
    ) -> int:
        """Bring the processes back; returns the pid of the first, which is nobody's child that could wait for it.

        CRIU, and what becomes of it, has `mark` in its environment: what an interrupted restore leaves is found by
        that. `enter` is called with CRIU's pid when it begins. Raises CriuError.
        """
        pidfile = images / _PIDFILE
        pidfile.unlink(missing_ok=True)
        await self._run("restore", images, timeout, ("--restore-detached", "--pidfile", str(pidfile)), mark, enter)
        return int(pidfile.read_text())

    async def _run(
        self,
        action: str,
        images: Path,
        timeout: float,
        arguments: Sequence[str],
        mark: Mapping[str, str],
        enter: Callable[[int], object],
    ) -> None:
        log = images / f"{action}.log"
        log.unlink(missing_ok=True)
        # Of each action its own: what a dump has left belongs to the image, and stays as it is.
        output = log.with_suffix(".out")
        # Who is not root has to say that it may lack something, whatever capabilities it has.
        options = _OPTIONS if os.geteuid() == 0 else (*_OPTIONS, "--unprivileged")
        argv = [self.program, action, "--images-dir", str(images), "--log-file", log.name, *options, *self._plugins]
        # A pipe would be held open by what is restored.
        said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={**os.environ, **self._mark, **mark},
                start_new_session=True,
            )
        except OSError as error:
            raise self._not_there(error) from error
        finally:
            os.close(said)
        enter(process.pid)
        try:
            code = await asyncio.wait_for(asyncio.shield(process.wait()), timeout)
        except asyncio.TimeoutError:
            raise CriuError(f"criu {action} was not done within {timeout:.0f} s", interrupted=True) from None
        finally:
            if process.returncode is None:
                _kill_group(process.pid)
                await asyncio.shield(process.wait())
        if code != 0:
            why = await asyncio.to_thread(_why, log, output)
            killed = f"was killed by signal {-code}" if code < 0 else f"failed ({code})"
            raise CriuError(f"criu {action} {killed}: {why}", interrupted=code < 0)

    def _not_there(self, error: OSError) -> CriuError:
        return CriuError(f"{self.program!r} cannot be executed: {error.strerror or error}; see checkpoint.criu_path")


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _why(log: Path, said: Path) -> str:
    """The last errors of a log, or the end of what was printed where there is no log."""
    for path in (log, said):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        errors = [line for line in lines if "Error" in line and not any(each in line for each in _HARMLESS)]
        shown = errors or lines
        if shown:
            return "; ".join(line.strip() for line in shown[-_SHOWN_LINES:])
    return "it said nothing"

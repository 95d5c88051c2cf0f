"""What there is to look at: the config file, the daemon if it runs, its unit if there is one, and the user it has."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmuxctl.client import Client, Failed
from llmuxctl.doctor.box import Box, User

if TYPE_CHECKING:
    from llmuxd.config import Config

DAEMON_SECS = 5.0
UNIT = "llmuxd.service"
UNIT_PROPERTIES = (
    "LoadState,ActiveState,SubState,UnitFileState,MainPID,User,SupplementaryGroups,Environment,EnvironmentFiles,"
    "LimitMEMLOCK,SystemCallFilter,ProtectHome,StatusText"
)
_PATH_OF_UNITS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Situation:
    """The facts that several checks need."""

    box: Box
    socket: str
    config_path: Path
    config: Config | None = None
    """None if it is bad; the defaults if there is no file."""
    problems: tuple[str, ...] = ()
    status: dict[str, Any] | None = None
    """What the daemon says, if it can be asked."""
    silence: Failed | None = None
    """Why it cannot."""
    pid: int | None = None
    """The daemon's."""
    systemd: bool = False
    unit: Mapping[str, str] = field(default_factory=dict)
    """Its properties; empty if there is none."""
    user: User = field(default_factory=lambda: User("root", 0))
    """Whom the daemon and the engines run as."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """The daemon's environment, as it is or as it would be."""

    @property
    def search(self) -> str:
        """Where the daemon looks for programs."""
        return self.environ.get("PATH", _PATH_OF_UNITS)

    @property
    def by_unit(self) -> bool:
        """Whether systemd runs the daemon, or would."""
        return bool(self.unit) and self.pid in (None, self.main_pid)

    @property
    def main_pid(self) -> int | None:
        return int(self.unit.get("MainPID") or 0) or None


def look(box: Box, socket: str, config_path: Path) -> Situation:
    """Find out what is there. Takes a few seconds at most."""
    config, problems = _config(config_path)
    status, silence = _ask(socket)
    systemd = box.exists("/run/systemd/system")
    unit = _unit(box) if systemd else {}
    pid = _daemon(box, socket)
    if pid is None and unit.get("MainPID", "0") != "0":
        pid = int(unit["MainPID"])
    by_unit = bool(unit) and (pid is None or str(pid) == unit.get("MainPID"))
    return Situation(
        box,
        socket,
        config_path,
        config,
        problems,
        status,
        silence,
        pid,
        systemd,
        unit,
        _user(box, pid, unit if by_unit else {}),
        _environ(box, pid, unit if by_unit else {}),
    )


def _config(path: Path) -> tuple[Config | None, tuple[str, ...]]:
    from llmuxd.config import ConfigError, load_config, parse_config

    try:
        return load_config(path), ()
    except ConfigError as error:
        # Without a file there is still the rest of the box to look at.
        return (None if os.path.lexists(path) else parse_config({})), tuple(str(error).splitlines())


def _ask(socket: str) -> tuple[dict[str, Any] | None, Failed | None]:
    try:
        return Client(socket, DAEMON_SECS, quiet=True).get("status"), None
    except Failed as failed:
        return None, failed


def _daemon(box: Box, socket: str) -> int | None:
    pid = box.peer(socket)
    # Another one may hold the socket for it.
    return pid if pid is not None and "llmuxd" in (box.read(f"/proc/{pid}/cmdline") or "") else None


def _unit(box: Box) -> dict[str, str]:
    systemctl = box.which("systemctl", box.environ.get("PATH", _PATH_OF_UNITS))
    if systemctl is None:
        return {}
    shown = box.run([systemctl, "show", UNIT, "-p", UNIT_PROPERTIES])
    found = dict(line.partition("=")[::2] for line in shown.out.splitlines() if "=" in line)
    if shown.code != 0 or found.get("LoadState") != "loaded":
        return {}
    listen = box.run([systemctl, "show", UNIT.replace(".service", ".socket"), "-p", "Listen"])
    return {**found, "Listen": listen.out.partition("Listen=")[2] if listen.code == 0 else ""}


def _user(box: Box, pid: int | None, unit: Mapping[str, str]) -> User:
    """Of the running daemon; else of its unit; else this one."""
    lines = (box.read(f"/proc/{pid}/status") or "").splitlines() if pid is not None else []
    ids = dict(line.partition(":")[::2] for line in lines)
    if "Uid" in ids and "Gid" in ids:
        uid = int(ids["Uid"].split()[1])
        groups = {int(ids["Gid"].split()[1]), *map(int, ids.get("Groups", "").split())}
        return User(name_of(uid), uid, frozenset(groups))
    if unit:
        named = _named(unit.get("User") or "root", unit.get("SupplementaryGroups", "").split())
        if named is not None:
            return named
    return User(name_of(box.uid), box.uid, frozenset((os.getegid(), *os.getgroups())))


def _named(name: str, more: list[str]) -> User | None:
    try:
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except KeyError:
        return None
    groups = set(os.getgrouplist(entry.pw_name, entry.pw_gid))
    groups.update(number for number in map(group_number, more) if number is not None)
    return User(entry.pw_name, entry.pw_uid, frozenset(groups))


def name_of(uid: int) -> str:
    """A user's name, or the number if there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_number(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _environ(box: Box, pid: int | None, unit: Mapping[str, str]) -> dict[str, str]:
    """Of the running daemon, if it may be read; else what its unit gives it; else this process's."""
    raw = box.read(f"/proc/{pid}/environ") if pid is not None else None
    if raw:
        return dict(pair.partition("=")[::2] for pair in raw.split("\0") if "=" in pair)
    if unit:
        found = {"PATH": _PATH_OF_UNITS, **_pairs(unit.get("Environment", ""))}
        for file in re.findall(r"(/\S+) \(ignore_errors", unit.get("EnvironmentFiles", "")):
            for line in (box.read(file) or "").splitlines():
                found.update(_pairs(line) if not line.lstrip().startswith(("#", ";")) else {})
        return found
    return dict(box.environ)


def _pairs(text: str) -> dict[str, str]:
    """NAME=value, quoted as in a shell where it has blanks."""
    try:
        words = shlex.split(text)
    except ValueError:
        return {}
    return dict(word.partition("=")[::2] for word in words if "=" in word)

"""The checks of the daemon itself: config, unit, whether it answers, groups, ports."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator

from llmuxctl.doctor.finding import Finding, Status, fail, listed, ok, skipped, warn
from llmuxctl.doctor.situation import UNIT, Situation, group_number, name_of
from llmuxctl.output import count, duration
from llmuxd.protocol import CONTROL_GROUP, Exit
from llmuxd.version import __version__

_LISTENING = "0A"
_ADDRESS = re.compile(r"([0-9A-F]{8}|[0-9A-F]{32}):[0-9A-F]{4}")
_UNREADABLE = "cannot be read: Permission denied"
_STREAM = re.compile(r"(\S+):(\d+) \(Stream\)")
_DEFAULT = ("127.0.0.1", 3000)
_EVERYWHERE = ("0.0.0.0", "::")
_RESTART = "Restart it, which keeps the engines: systemctl restart llmuxd"


def config(there: Situation) -> Finding:
    """All that is wrong with the file."""
    if any(_UNREADABLE in problem for problem in there.problems):
        return skipped(f"{name_of(there.box.uid)} may not read {there.config_path}", "As root, doctor sees it.")
    if there.config is None:
        return fail(f"{count(len(there.problems), 'problem')} in {there.config_path}", "\n".join(there.problems))
    if there.problems:
        return fail(f"no {there.config_path}", "Begin with the example, etc/llmux.toml; or name yours: --config FILE")
    if there.config.warnings:
        return warn(
            f"{there.config_path}: {count(len(there.config.models), 'model')}", "\n".join(there.config.warnings)
        )
    return ok(f"{there.config_path}: {count(len(there.config.models), 'model')}, no errors")


def unit(there: Situation) -> Finding:
    """What systemd says of the service."""
    if not there.systemd:
        return skipped("systemd does not run here")
    if not there.unit:
        return skipped(f"no {UNIT}; llmuxd is run by hand")
    active, sub = there.unit.get("ActiveState", ""), there.unit.get("SubState", "")
    enabled = there.unit.get("UnitFileState", "")
    said = there.unit.get("StatusText", "")
    found = f"{active} ({sub}), {enabled or 'no install state'}" + (f": {said}" if said else "")
    if active == "failed":
        return fail(found, "See why: journalctl -u llmuxd -n 50\nThen: systemctl restart llmuxd")
    if active in ("inactive", "deactivating"):
        return warn(found, "Start it: systemctl enable --now llmuxd")
    if enabled == "disabled":
        return warn(found, "It does not start at boot: systemctl enable llmuxd")
    return ok(found)


def daemon(there: Situation) -> Finding:
    """Whether it answers, and is well."""
    if there.status is None:
        failed = there.silence
        text = failed.message if failed is not None else "not asked"
        first = text.splitlines()[0]
        if failed is not None and failed.exit_code == Exit.NOT_ALLOWED:
            return fail(first, f"As root: usermod -aG {CONTROL_GROUP} {name_of(there.box.uid)}; then log in again.")
        if there.pid is not None:
            return fail(f"it runs (pid {there.pid}), but: {first}", "See its log: journalctl -u llmuxd -n 50")
        start = "systemctl start llmuxd" if there.by_unit else f"llmuxd --config {there.config_path}"
        return warn(first, f"Start it: {start}\nWith another socket: llmuxctl --socket PATH doctor")
    health = there.status.get("health") or {"ok": True}
    if not health["ok"]:
        return fail(f"not well: {health['reason']}", f"See its log: journalctl -u llmuxd -n 50\n{_RESTART}")
    failed_models = {
        name: model.get("last_error") or ""
        for name, model in there.status["models"].items()
        if model["engine"] == "failed"
    }
    found = f"{there.status['version']}, up {duration(there.status['uptime_secs'])}, {there.status['state']}"
    if failed_models:
        errors = [f"{name}: {(error.strip().splitlines() or ['?'])[0]}" for name, error in failed_models.items()]
        more = [f"llmuxctl logs {name}" for name in failed_models]
        return warn(f"{found}; failed: {listed(list(failed_models))}", "\n".join([*errors, *more]))
    if there.status["version"] != __version__:
        return warn(f"{found}; llmuxctl is {__version__}", _RESTART)
    return ok(found)


def groups(there: Situation) -> Finding:
    """Whether this user may steer. Whether the daemon may open the devices is another check."""
    name = name_of(there.box.uid)
    if there.box.uid == 0 or there.box.uid == there.user.uid:
        return ok(f"{name} may steer the daemon")
    number = group_number(CONTROL_GROUP)
    if number is None:
        return skipped(f"there is no group {CONTROL_GROUP}: root and {there.user.name} may steer the daemon")
    if number in _own_groups():
        return ok(f"{name} is in {CONTROL_GROUP}, and may steer the daemon")
    may = "may look, but not steer" if there.status is not None else "may not steer the daemon"
    advice = f"As root: usermod -aG {CONTROL_GROUP} {name}; then log in again."
    return warn(f"{name} is not in {CONTROL_GROUP}: {may}", advice)


def _own_groups() -> list[int]:
    return [os.getegid(), *os.getgroups()]


def port(there: Situation) -> Finding:
    """The port of the API: free, or llmuxd's; and whether it is open to others without a key."""
    from llmuxd.config import is_loopback

    if there.config is None:
        return skipped("the config does not say")
    held = _STREAM.search(there.unit.get("Listen", "")) if there.by_unit else None
    if held is None:
        return _port(there, "port", there.config.listen, there.config.port)
    address, number = held[1].strip("[]"), int(held[2])
    finding = _port(there, "port", address, number)
    everywhere = address in _EVERYWHERE and there.config.port == number
    own = (there.config.listen, there.config.port)
    if finding.status is Status.OK and not everywhere and own not in (_DEFAULT, (address, number)):
        said = f"{there.config.listen}:{there.config.port}"
        advice = "Remove them from the config, or: systemctl edit llmuxd.socket; ListenStream= clears, then yours"
        found = (
            f"llmuxd.socket listens on {held[1]}:{number}, the config says {said}: only the socket's waits at a restart"
        )
        return warn(found, advice)
    if finding.status is Status.OK and not there.config.keys and not is_loopback(address):
        found = f"{finding.found}, and anyone who reaches {held[1]}:{number} may use the models"
        return warn(found, "Give the clients keys: llmuxctl key new NAME")
    return finding


def metrics_port(there: Situation) -> Finding:
    """The port of the metrics: free, or llmuxd's."""
    if there.config is None:
        return skipped("the config does not say")
    return _port(there, "metrics_port", there.config.listen, there.config.metrics_port)


def _port(there: Situation, key: str, listen: str, number: int) -> Finding:
    if number == 0:
        return ok("none" if key == "metrics_port" else "any that is free")
    listen = "127.0.0.1" if listen == "localhost" else listen
    inodes = [inode for address, at, inode in _listeners(there) if at == number and _meet(address, listen)]
    if not inodes:
        return ok(f"{number} is free")
    holders = {pid for inode in inodes for pid in there.box.holders(inode)}
    if there.pid in holders:
        return ok(f"{number} is llmuxd's")
    if 1 in holders and there.unit:
        return ok(f"{number} is held by systemd for llmuxd")
    if not holders and (there.status is not None or there.pid is not None):
        return ok(f"{number} is taken, probably by llmuxd, which runs; as root, doctor sees by whom")
    names = [f"{(there.box.read(f'/proc/{pid}/comm') or '?').strip()} (pid {pid})" for pid in sorted(holders)]
    by = f" by {listed(names)}" if names else "; as root, doctor sees by whom"
    return fail(f"{number} is taken{by}", f"End that, or set another `{key}` in {there.config_path}.")


def _meet(address: str, listen: str) -> bool:
    try:
        ours = ipaddress.ip_address(listen)
    except ValueError:
        return True
    return address == str(ours) or ours.is_unspecified or ipaddress.ip_address(address).is_unspecified


def _listeners(there: Situation) -> Iterator[tuple[str, int, int]]:
    """Address, port and inode of every TCP socket that listens."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in (there.box.read(table) or "").splitlines()[1:]:
            cells = line.split()
            if len(cells) > 9 and cells[3] == _LISTENING and _ADDRESS.fullmatch(cells[1]):
                address, number = cells[1].split(":")
                # Four bytes at a time, in the order of the machine.
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                yield str(ipaddress.ip_address(b"".join(words))), int(number, 16), int(cells[9])

"""The package on a machine with a real systemd: installed with apt from a local archive, upgraded, removed, purged."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.deb.conftest import TOP
from tests.deb.machine import Machine

FOLDERS = ("/etc/llmux", "/var/lib/llmux", "/var/cache/llmux", "/run/llmux")
UNITS = ("llmuxd.service", "llmuxd.socket", "llmux.target", "llmux-engines.service")


@pytest.fixture
def installed(machine: Machine, deb: Path) -> Machine:
    if machine.run(["dpkg-query", "-W", "-f", "${Status}", "llmuxd"], check=False).stdout != "install ok installed":
        machine.install(deb)
    return machine


def test_lintian_has_nothing_to_say(deb: Path, tmp_path: Path) -> None:
    changes = next(deb.parent.glob("*.changes"))
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", str(changes)],
        capture_output=True,
        text=True,
        # It leaves databases there.
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_it_installs_with_what_the_release_has(machine: Machine, deb: Path) -> None:
    said = machine.install(deb)
    assert "Failed" not in said, said
    assert machine.out("stat -c '%a %U %G' /etc/llmux/llmux.toml /etc/llmux/conf.d").splitlines() == [
        "640 root llmux",
        "750 root llmux",
    ]
    assert machine.out("id -nG llmux").split() == ["llmux", "video", "render"]
    # No shell, and a number that logind does not take for a person's, whose shared memory it removes at logout.
    assert machine.out("getent passwd llmux").endswith(":/var/lib/llmux:/usr/sbin/nologin")
    assert int(machine.out("id -u llmux")) < 1000
    assert machine.out("stat -c '%a %U' /var/cache/llmux/tmp") == "700 llmux"
    assert machine.out("dpkg --audit") == ""


def test_the_packages_own_tests(installed: Machine) -> None:
    for name in ("smoke", "serve"):
        installed.put(f"/srv/{name}", TOP / f"packaging/deb/debian/tests/{name}", 0o755)
        print(installed.out(f"/srv/{name}", timeout=300))


def test_an_upgrade_restarts_the_daemon_once_and_the_port_never(installed: Machine, newer_deb: Path) -> None:
    installed.run(["systemctl", "start", "llmuxd"])
    before = {unit: installed.show(unit, "ActiveEnterTimestampMonotonic") for unit in UNITS}
    daemon, starts = installed.main_pid(), len(started(installed))
    installed.run(["sh", "-c", "echo '# mine' >> /etc/llmux/llmux.toml"])
    said = installed.install(newer_deb)
    assert "Failed" not in said, said
    installed.wait_for_state("llmuxd.service", "active")
    assert installed.main_pid() != daemon
    assert len(started(installed)) == starts + 1
    after = {unit: installed.show(unit, "ActiveEnterTimestampMonotonic") for unit in UNITS}
    assert after["llmuxd.socket"] == before["llmuxd.socket"]
    assert after["llmux-engines.service"] == before["llmux-engines.service"]
    assert installed.out("tail -1 /etc/llmux/llmux.toml") == "# mine"
    assert installed.out("stat -c '%a %G' /etc/llmux/llmux.toml") == "640 llmux"


def started(machine: Machine) -> list[str]:
    """A line for each start of the daemon so far."""
    lines = machine.out("journalctl --no-pager -b -o cat -u llmuxd.service").splitlines()
    return [line for line in lines if line.startswith("Started llmuxd.service")]


def test_an_upgrade_of_a_stopped_and_disabled_service_leaves_it_so(installed: Machine, deb: Path) -> None:
    installed.run(["systemctl", "disable", "--now", "llmuxd"])
    installed.add_package(deb)
    version = deb.name.split("_")[1]
    installed.run(["apt-get", "install", "-y", "-q", "--allow-downgrades", f"llmuxd={version}"])
    assert installed.state("llmuxd.service") == "inactive"
    assert installed.state("llmuxd.socket") == "inactive"
    installed.run(["systemctl", "enable", "--now", "llmuxd"])


def test_removal_stops_everything_and_keeps_config_and_state(installed: Machine) -> None:
    installed.run(["systemctl", "start", "llmuxd"])
    installed.run(["touch", "/var/lib/llmux/kept"])
    installed.run(["apt-get", "remove", "-y", "-q", "llmuxd"])
    assert installed.processes() == {}
    assert [installed.state(unit) for unit in UNITS] == ["inactive"] * 4
    assert installed.run("test -e /etc/llmux/llmux.toml && test -e /var/lib/llmux/kept", check=False).returncode == 0


def test_it_can_be_installed_again_after_removal(installed: Machine) -> None:
    installed.wait_for_state("llmuxd.service", "active")
    assert installed.run("test -e /var/lib/llmux/kept", check=False).returncode == 0


def test_purge_leaves_nothing(installed: Machine) -> None:
    installed.run(["touch", "/etc/llmux/conf.d/mine.toml"])
    installed.run(["apt-get", "purge", "-y", "-q", "llmuxd"])
    assert installed.processes() == {}
    left = [folder for folder in FOLDERS if installed.run(["test", "-e", folder], check=False).returncode == 0]
    assert left == []
    found = "find / -xdev ( -path /srv -o -path /proc -o -path /sys -o -path /var/log ) -prune -o -iname *llmux* -print"
    known = ["/etc/apt/", "/var/lib/apt/", "/var/cache/apt/"]
    lines = [line for line in installed.out(found.split()).splitlines() if not line.startswith(tuple(known))]
    assert lines == []
    assert installed.run("ls -d /sys/fs/cgroup/system.slice/llmux*", check=False).returncode != 0
    assert not any("llmux" in name for name in installed.out("ls /dev/shm /tmp").split())
    # The user stays, as is Debian's custom: a new one would get its number, and with it files that were left.
    assert installed.run(["id", "llmux"], check=False).returncode == 0


def test_it_can_be_installed_again_after_purge(installed: Machine) -> None:
    installed.wait_for_state("llmuxd.service", "active")
    assert installed.out("stat -c '%a %G' /etc/llmux/llmux.toml") == "640 llmux"

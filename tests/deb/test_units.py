"""What systemd makes of the units: when engines and port stay, when they go, and what the sandbox lets through.

The daemon is a stub, so that this shows the units and nothing else. test_package.py has the real one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deb.conftest import TOP, MakeMachine
from tests.deb.machine import Machine

HERE = Path(__file__).parent
UNITS = ("llmuxd.service", "llmuxd.socket", "llmux.target", "llmux-engines.service")
KEPT = ("llmuxd.socket", "llmux.target", "llmux-engines.service")

ASK = 'python3 -c \'import socket; s = socket.create_connection(("127.0.0.1", 3000), 10); s.send(b"x"); print(s.recv(99).decode())\''


@pytest.fixture(
    scope="module",
    params=[("bookworm", True), ("trixie", True), ("bookworm", False)],
    ids=["bookworm", "trixie", "bookworm-cgroup-v1"],
)
def units(request: pytest.FixtureRequest, make_machine: MakeMachine) -> Machine:
    """A machine with the units, and the stub in the daemon's place."""
    release, unified = request.param
    machine = make_machine(release, unified=unified, packages=False)
    folder = TOP / "packaging/systemd"
    for unit in UNITS:
        machine.put(f"/etc/systemd/system/{unit}", folder / unit)
    machine.put("/usr/lib/sysusers.d/llmuxd.conf", folder / "sysusers.conf")
    machine.put("/usr/lib/tmpfiles.d/llmuxd.conf", folder / "tmpfiles.conf")
    machine.put("/usr/bin/llmuxd", HERE / "stub.py", 0o755)
    machine.run("mkdir -p /etc/llmux && systemd-sysusers llmuxd.conf && systemd-tmpfiles --create llmuxd.conf")
    machine.run("systemctl daemon-reload")
    return machine


@pytest.fixture
def serving(units: Machine) -> Iterator[Machine]:
    units.run("rm -f /etc/llmux/bad; systemctl reset-failed llmuxd.service llmuxd.socket; systemctl start llmuxd")
    yield units
    units.run("rm -f /etc/llmux/bad; systemctl stop llmuxd.service llmux-engines.service", check=False)


def engine(machine: Machine) -> str:
    """The engine's pid and start, or nothing if there is none."""
    pids = [pid for pid, args in machine.processes().items() if args.startswith("sleep 1000000")]
    assert len(pids) <= 1, "an engine was started while another one ran"
    return f"{pids[0]}@{machine.create_time(pids[0])}" if pids else ""


def assert_kept(machine: Machine, before: str) -> None:
    assert before
    assert engine(machine) == before
    assert machine.state("llmuxd.socket") == machine.state("llmux-engines.service") == "active"
    # Restarted along with the daemon, maybe a moment after it.
    machine.wait_for_state("llmux.target", "active")


def assert_all_gone(machine: Machine) -> None:
    """As it is soon after `systemctl stop llmuxd`, which itself waits for the daemon alone."""
    for unit in KEPT:
        machine.wait_for_state(unit, "inactive")
    machine.wait(lambda: not machine.processes(), what="processes of llmux are left")
    assert machine.run(ASK, check=False).returncode != 0, "the port is still open"
    if machine.unified:
        find = "find /sys/fs/cgroup -name '*llmux*' -type d"
        machine.wait(lambda: not machine.out(find), what=f"a cgroup is left: {machine.out(find)}")


@pytest.mark.parametrize("verb", ["restart", "try-restart", "reload-or-restart", "reload"])
def test_restart_and_reload_keep_engines_and_port(serving: Machine, verb: str) -> None:
    before, daemon = engine(serving), serving.main_pid()
    serving.run(["systemctl", verb, "llmuxd"])
    assert_kept(serving, before)
    assert (serving.main_pid() == daemon) == verb.startswith("reload")
    assert f"pid {serving.main_pid()}" in serving.out(ASK)


@pytest.mark.parametrize("verb", ["daemon-reload", "daemon-reexec"])
def test_a_reload_of_systemd_itself_changes_nothing(serving: Machine, verb: str) -> None:
    before, daemon = engine(serving), serving.main_pid()
    serving.run(["systemctl", verb])
    serving.run(["systemctl", "start", "llmuxd"])
    assert_kept(serving, before)
    assert serving.main_pid() == daemon


@pytest.mark.parametrize("signal", ["KILL", "SEGV", "USR2", "ABRT"])
def test_a_daemon_that_dies_or_hands_over_is_started_again_and_keeps_its_engines(serving: Machine, signal: str) -> None:
    before, daemon = engine(serving), serving.main_pid()
    serving.run(f"kill -{signal} {daemon}")
    serving.wait(lambda: serving.main_pid() not in (0, daemon), what="no new daemon")
    serving.wait_for_state("llmuxd.service", "active")
    assert_kept(serving, before)


def test_a_connection_made_while_no_daemon_runs_is_answered(serving: Machine) -> None:
    serving.run(f"kill -KILL {serving.main_pid()}")
    assert serving.state("llmuxd.service") == "activating"
    answer = serving.out(ASK)
    assert answer == f"pid {serving.main_pid()}"


def test_crashes_without_end_do_not_make_systemd_give_up(serving: Machine) -> None:
    before = engine(serving)
    for _ in range(12):
        daemon = serving.main_pid()
        serving.run(f"kill -KILL {daemon}")
        serving.wait(lambda: serving.main_pid() not in (0, daemon), what="no new daemon")  # noqa: B023
    assert_kept(serving, before)


def test_stop_ends_everything(serving: Machine) -> None:
    serving.run(["systemctl", "stop", "llmuxd"])
    assert_all_gone(serving)
    assert serving.state("llmuxd.service") == "inactive"


def test_stop_while_it_waits_for_its_restart_ends_everything(serving: Machine) -> None:
    serving.run(f"kill -KILL {serving.main_pid()}")
    assert serving.show("llmuxd.service", "SubState") == "auto-restart"
    assert engine(serving)
    serving.run(["systemctl", "stop", "llmuxd"])
    assert_all_gone(serving)


def test_a_bad_config_keeps_engines_and_port_until_stop(serving: Machine) -> None:
    before = engine(serving)
    serving.put("/etc/llmux/bad", "")
    serving.run(["systemctl", "restart", "llmuxd"], check=False)
    assert serving.state("llmuxd.service") == "failed"
    assert serving.show("llmuxd.service", "ExecMainStatus") == "2"
    assert_kept(serving, before)
    serving.run(["systemctl", "stop", "llmuxd"])
    assert_all_gone(serving)


def test_a_bad_config_is_mended_and_the_engines_are_still_there(serving: Machine) -> None:
    before = engine(serving)
    serving.put("/etc/llmux/bad", "")
    serving.run(["systemctl", "restart", "llmuxd"], check=False)
    serving.run(["rm", "/etc/llmux/bad"])
    serving.run(["systemctl", "restart", "llmuxd"])
    assert_kept(serving, before)


def test_clients_do_not_keep_a_bad_config_starting_for_ever(serving: Machine) -> None:
    before = engine(serving)
    serving.put("/etc/llmux/bad", "")
    serving.run(["systemctl", "restart", "llmuxd"], check=False)
    asking = serving.run(ASK, check=False, timeout=30)
    assert asking.returncode != 0
    assert engine(serving) == before
    assert int(serving.out("journalctl -b -u llmuxd | grep -c 'a bad config'")) < 40
    serving.wait_for_state("llmuxd.socket", "failed")
    serving.run(["rm", "/etc/llmux/bad"])
    serving.run("systemctl reset-failed llmuxd.service && systemctl start llmuxd")
    assert_kept(serving, before)


def test_sigterm_ends_the_engines_and_the_next_connection_starts_anew(serving: Machine) -> None:
    serving.run(f"kill -TERM {serving.main_pid()}")
    serving.wait_for_state("llmuxd.service", "inactive")
    assert not serving.processes()
    assert f"pid {serving.main_pid()}" in serving.out(ASK) or serving.main_pid()
    assert engine(serving)


def test_a_restart_of_the_port_keeps_the_engines(serving: Machine) -> None:
    before = engine(serving)
    serving.run(["systemctl", "restart", "llmuxd.socket"])
    serving.wait_for_state("llmuxd.service", "active")
    assert_kept(serving, before)


def test_the_watchdog_restarts_a_daemon_that_hangs(serving: Machine) -> None:
    serving.run("mkdir -p /run/systemd/system/llmuxd.service.d")
    serving.run("printf '[Service]\\nWatchdogSec=5\\n' > /run/systemd/system/llmuxd.service.d/watchdog.conf")
    try:
        serving.run("systemctl daemon-reload && systemctl restart llmuxd")
        before, daemon = engine(serving), serving.main_pid()
        serving.run(f"kill -STOP {daemon}")
        serving.wait(lambda: serving.main_pid() not in (0, daemon), what="no new daemon")
        serving.wait_for_state("llmuxd.service", "active")
        assert_kept(serving, before)
    finally:
        serving.run("rm -r /run/systemd/system/llmuxd.service.d && systemctl daemon-reload")


def test_the_score_and_that_nothing_is_misspelt(units: Machine) -> None:
    """At most 2.5, as issue and unit say; a setting that this systemd does not know would be a warning."""
    done = units.run(
        "systemd-analyze security --offline=true --threshold=25 /etc/systemd/system/llmuxd.service | tail -1"
    )
    assert float(done.stdout.split(":")[1].split()[0]) <= 2.5
    units.run("systemd-analyze security --offline=true --threshold=25 /etc/systemd/system/llmux-engines.service")
    paths = " ".join(f"/etc/systemd/system/{unit}" for unit in UNITS)
    verified = units.run(f"systemd-analyze verify --man=no {paths}")
    assert "llmux" not in verified.stdout, verified.stdout


def probed(machine: Machine, *drop_ins: Path) -> dict[str, Any]:
    """What probe.py finds when it is run by the unit in the daemon's place."""
    folder = "/etc/systemd/system/llmuxd.service.d"
    machine.put("/usr/local/bin/probe", HERE / "probe.py", 0o755)
    machine.put(
        f"{folder}/probe.conf", "[Service]\nType=exec\nExecStart=\nExecStart=/usr/local/bin/probe\nRestart=no\n"
    )
    for drop_in in drop_ins:
        machine.put(f"{folder}/{drop_in.name}", drop_in)
    try:
        machine.run("rm -f /var/lib/llmux/probe.json; systemctl daemon-reload && systemctl start llmuxd")
        machine.wait_for_state("llmuxd.service", "inactive")
        seen: dict[str, Any] = json.loads(machine.path("/var/lib/llmux/probe.json").read_text())
    finally:
        machine.run(f"rm -r {folder}; systemctl daemon-reload; systemctl stop llmuxd")
    return seen


def test_what_the_drop_in_for_checkpoints_adds(units: Machine) -> None:
    """The kernel lets CRIU save a process under a system call filter only if CRIU is under none."""
    seen = probed(units, TOP / "packaging/systemd/checkpoint.conf")
    # The machine's first process is under a few of its own, nspawn's.
    assert seen["system call filters"] == units.out("grep Seccomp_filters: /proc/1/status").split()[1]
    admin, ptrace, restore, setpcap = 1 << 21, 1 << 19, 1 << 40, 1 << 8
    wanted = (admin | ptrace | restore | setpcap) & bounding(units)
    assert int(seen["capabilities"], 16) & wanted == wanted


def bounding(machine: Machine) -> int:
    """The capabilities that there are in this machine, which is itself in a container."""
    return int(machine.out("grep CapBnd: /proc/1/status").split()[1], 16)


def test_what_the_sandbox_lets_through(units: Machine) -> None:
    units.run("mkdir -p /home/alice /dev/dri && mknod -m 0660 /dev/nvidia0 c 1 5 && chgrp video /dev/nvidia0")
    units.run("mknod -m 0660 /dev/dri/renderD128 c 1 5 && chgrp render /dev/dri/renderD128")
    seen = probed(units)
    expected = dict(EXPECTED)
    assert int(seen.pop("system call filters")) > 2
    if not bounding(units) & CAP_SYS_RESOURCE:
        # This machine is in a container that may not raise limits: what the unit asks for is all there is to see.
        assert units.show("llmuxd.service", "LimitMEMLOCK") == "infinity"
        assert units.show("llmuxd.service", "LimitNOFILE") == str(expected["descriptors"])
        for key in ("memlock", "lock 64 MiB", "descriptors"):
            del seen[key], expected[key]
    assert seen == expected


CAP_SYS_RESOURCE = 1 << 24

EXPECTED = {
    # What GPUs and vLLM need.
    "open a GPU of NVIDIA": "ok",
    "open a GPU of AMD": "ok",
    "map memory to write and run": "ok",
    "lock 64 MiB": "ok",
    "get_mempolicy": "ok",
    "set_mempolicy": "ok",
    "mbind": "ok",
    "sched_setaffinity": "ok",
    "shared memory": "ok",
    "pidfd_open": "ok",
    "netlink": "ok",
    "read /proc/meminfo": "ok",
    "write /tmp": "ok",
    "write /var/tmp": "ok",
    "write /dev/shm": "ok",
    "write /run/llmux": "ok",
    "write /var/lib/llmux": "ok",
    "write /var/cache/llmux": "ok",
    "write TMPDIR": "ok",
    "groups": ["llmux", "render", "video"],
    "memlock": -1,
    "descriptors": 524288,
    # What nothing here needs.
    "io_uring_setup": "ENOSYS",
    "bpf": "ENOSYS",
    "ptrace": "ENOSYS",
    "mount": "ENOSYS",
    "new user namespace": "EPERM",
    "packet socket": "EAFNOSUPPORT",
    "write /usr": "EROFS",
    "write /etc": "EROFS",
    "write /opt": "EROFS",
    "list /home/alice": "EACCES",
    "capabilities": "0000000000000000",
    "new privileges": "1",
}

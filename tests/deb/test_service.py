"""The service in use: simulated engines, clients all the time, and everything that is done to a daemon.

Restart, kill -9, upgrade, reloads, stop, remove, purge, reinstall. What has to hold: the engines are the same processes
where they must be, no client is refused, and nobody loses an answer but those whom a kill -9 cuts off.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.deb.conftest import MakeMachine
from tests.deb.machine import Machine

HERE = Path(__file__).parent
CONFIG = "/etc/llmux/conf.d/test.toml"
CLIENTS = 6
"""As many as load.py has: so many requests can be under way at once."""

TOP = """
vllm_command = ["/usr/bin/python3", "-m", "llmuxd.sim.vllm"]
shutdown_timeout_secs = 20
"""
MODEL = """
[models.{name}]
model_path = "sim/{name}"
{more}
[models.{name}.env]
LLMUX_SIM_START_SECS = "0"
LLMUX_SIM_LOAD_GIB_S = "1000"
LLMUX_SIM_OFFLOAD_GIB_S = "1000"
LLMUX_SIM_WAKE_GIB_S = "1000"
LLMUX_SIM_LEDGER = "/var/lib/llmux/device"
LLMUX_SIM_ORPHAN_SECS = "600"
"""


def write_config(machine: Machine, top: str = "", **models: str) -> None:
    text = TOP + top + "".join(MODEL.format(name=name, more=more) for name, more in models.items())
    machine.put(CONFIG, text, 0o640)
    machine.run(["chgrp", "llmux", CONFIG])


def install_with_device(machine: Machine, deb: Path) -> None:
    """The package, and a simulated device for its engines."""
    machine.install(deb)
    create = "from llmuxd.sim.ledger import *; from pathlib import Path; Ledger.create(Path('/var/lib/llmux/device'), 24 * GIB)"
    machine.run(["python3", "-c", create], user="llmux")


def serve(machine: Machine, deb: Path) -> Machine:
    """Install the package, and have it serve two models by a reload."""
    install_with_device(machine, deb)
    machine.put("/srv/load.py", HERE / "load.py")
    write_config(machine, a="", b='aliases = ["bee"]')
    machine.run(["systemctl", "reload", "llmuxd"])
    assert ask(machine, "a") == ask(machine, "b") == 200
    return machine


@pytest.fixture(scope="module")
def installed(machine: Machine, deb: Path) -> Machine:
    return serve(machine, deb)


@pytest.fixture
def service(installed: Machine) -> Machine:
    """Serving two models, with an engine each."""
    installed.run(["systemctl", "start", "llmuxd"])
    assert ask(installed, "a") == ask(installed, "b") == 200
    return installed


def ask(machine: Machine, model: str) -> int:
    """One request; its status."""
    body = json.dumps({"model": model, "prompt": "x", "max_tokens": 1})
    curl = ["curl", "-sS", "-m", "60", "-o", "/dev/null", "-w", "%{http_code}", "-H", "Content-Type: application/json"]
    return int(machine.out([*curl, "-d", body, "http://127.0.0.1:3000/v1/completions"]))


def status(machine: Machine) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(machine.out("llmuxctl status --json"))
    return found


def engines(machine: Machine) -> dict[str, tuple[int, str]]:
    """Model -> pid and start of its engine. One that ends in this very moment has none."""
    pids = {name: model["pid"] for name, model in status(machine)["models"].items() if model["pid"]}
    stats = {name: machine.run(["cat", f"/proc/{pid}/stat"], check=False) for name, pid in pids.items()}
    return {
        name: (pids[name], stat.stdout.rsplit(")", 1)[1].split()[19])
        for name, stat in stats.items()
        if stat.returncode == 0
    }


@dataclass
class Load:
    """What became of the clients' requests."""

    requests: list[dict[str, Any]] = field(default_factory=list)

    def bad(self) -> list[dict[str, Any]]:
        return [request for request in self.requests if request["outcome"] != "ok"]


@contextmanager
def load(machine: Machine) -> Iterator[Load]:
    """Clients ask all the time while the block runs, and for a while before and after it."""
    machine.run("rm -f /run/stop-load")
    found = Load()
    process = machine.spawn(["python3", "/srv/load.py", "/run/stop-load"], stdout=subprocess.PIPE)
    try:
        time.sleep(1.0)
        yield found
        time.sleep(1.0)
    finally:
        machine.run("touch /run/stop-load")
        out, _ = process.communicate(timeout=120)
    found.requests += [json.loads(line) for line in out.splitlines()]
    assert len([request for request in found.requests if request["outcome"] == "ok"]) > 2 * CLIENTS, found.requests


class TestUse:
    def test_the_services_user_steers_it(self, service: Machine) -> None:
        assert "awake" in service.out("llmuxctl status", user="llmux")
        assert "a is awake" in service.out("llmuxctl switch a", user="llmux")
        assert "models are warm" in service.out("llmuxctl warmup", user="llmux", timeout=60)
        assert set(status(service)["models"]) == {"a", "b"}

    def test_nobody_else_does(self, service: Machine) -> None:
        done = service.run("llmuxctl status", user="nobody", check=False)
        assert done.returncode == 5, done.stdout
        assert service.out("stat -c '%a %G' /run/llmux/control.sock") == "660 llmux"

    def test_a_group_may_be_let_in_to_look(self, service: Machine) -> None:
        write_config(service, 'control_read_group = "games"\n', a="", b='aliases = ["bee"]')
        service.run(["systemctl", "restart", "llmuxd"])
        looks = ["runuser", "-u", "nobody", "-g", "games", "--", "llmuxctl"]
        assert "awake" in service.out([*looks, "status"])
        assert service.run([*looks, "switch", "a"], check=False).returncode == 5
        write_config(service, a="", b='aliases = ["bee"]')
        service.run(["systemctl", "restart", "llmuxd"])

    def test_systemctl_status_says_what_is_going_on(self, service: Machine) -> None:
        service.wait(lambda: service.show("llmuxd", "StatusText").startswith("awake: b; asleep: 1"))

    def test_the_journal_has_fields(self, service: Machine) -> None:
        switched = service.entries("-u", "llmuxd", "MODEL=b")
        assert any(entry["MESSAGE"].startswith("switch ") and entry["SWITCH_ID"].isdigit() for entry in switched)
        assert all(entry["MODEL"] == "b" for entry in switched)
        assert service.entries("-u", "llmuxd", "MODEL=no such") == []
        served = service.entries("-u", "llmuxd", "MODEL=b", "STATUS=200")
        assert served, "the access log has fields, too"
        assert served[-1]["MESSAGE"].startswith(f"id={served[-1]['REQUEST_ID']} key=- model=b ")
        assert service.entries("-u", "llmuxd", "STATUS=no such") == []

    def test_each_engine_has_a_cgroup_without_controllers(self, service: Machine) -> None:
        top = "/sys/fs/cgroup/system.slice/llmuxd.service"
        for name, (pid, _) in engines(service).items():
            assert str(pid) in service.out(f"cat {top}/engine-*-{name}/cgroup.procs").split()
        assert service.out(f"cat {top}/cgroup.subtree_control") == ""

    def test_engines_hold_no_descriptor_of_the_daemon(self, service: Machine) -> None:
        """A pipe or a socket to the daemon would end, or keep, the one with the other."""
        for pid, _ in engines(service).values():
            open_files = service.out(f"ls -l /proc/{pid}/fd")
            assert "pipe:" not in open_files
            assert "/var/lib/llmux/logs/" in open_files


class TestUnderLoad:
    def test_a_restart(self, service: Machine) -> None:
        before, daemon = engines(service), service.main_pid()
        with load(service) as found:
            service.run(["systemctl", "restart", "llmuxd"])
        assert found.bad() == []
        assert service.main_pid() != daemon
        assert engines(service) == before

    def test_a_kill_of_the_daemon(self, service: Machine) -> None:
        for _ in range(2):
            before, daemon = engines(service), service.main_pid()
            with load(service) as found:
                at = time.time()
                service.run(["kill", "-KILL", str(daemon)])
                killed = time.time()
                service.wait(lambda daemon=daemon: service.main_pid() not in (0, daemon), what="it is started again")
                service.wait_for_state("llmuxd.service", "active")
            cut = found.bad()
            assert {request["outcome"] for request in cut} <= {"cut"}, cut
            assert all(request["began"] < killed and request["ended"] > at for request in cut), cut
            assert len(cut) <= CLIENTS
            assert engines(service) == before

    def test_an_upgrade(self, service: Machine, newer_deb: Path) -> None:
        before, daemon = engines(service), service.main_pid()
        with load(service) as found:
            service.install(newer_deb)
            service.wait_for_state("llmuxd.service", "active")
        assert found.bad() == []
        assert service.main_pid() != daemon
        assert engines(service) == before

    def test_a_reload_of_a_good_config(self, service: Machine) -> None:
        before, daemon = engines(service), service.main_pid()
        with load(service) as found:
            write_config(service, a="", b='aliases = ["bee"]', c="")
            service.run(["systemctl", "reload", "llmuxd"])
            service.wait(lambda: ask(service, "c") == 200)
        assert found.bad() == []
        assert (engines(service)["a"], engines(service)["b"], service.main_pid()) == (before["a"], before["b"], daemon)
        write_config(service, a="", b='aliases = ["bee"]')
        service.run(["llmuxctl", "reload"])
        service.wait(lambda: list(status(service)["models"]) == ["a", "b"])

    def test_a_reload_that_changes_a_model(self, service: Machine) -> None:
        before = engines(service)
        with load(service) as found:
            write_config(service, a="", b='aliases = ["bee"]\nextra_args = ["--max-model-len", "512"]')
            assert "models.b.extra_args: " in service.out(["llmuxctl", "reload"])
            service.wait(lambda: engines(service).get("b") not in (None, before["b"]), what="b is started anew")
        assert found.bad() == []
        assert engines(service)["a"] == before["a"]

    def test_a_reload_of_a_bad_config(self, service: Machine) -> None:
        before, daemon, config = engines(service), service.main_pid(), service.out(["cat", CONFIG])
        at = time.time()
        with load(service) as found:
            service.put(CONFIG, config.replace("model_path", "modl_path"), 0o644)
            done = service.run(["llmuxctl", "reload"], check=False)
            assert done.returncode == 2
            assert "did you mean 'model_path'?" in done.stdout
            assert service.run(["systemctl", "reload", "llmuxd"], check=False).returncode != 0
            assert service.state("llmuxd") == "active"
        service.put(CONFIG, config + "\n", 0o644)
        assert any("modl_path" in entry["MESSAGE"] for entry in service.entries("-u", "llmuxd", f"--since=@{at:.3f}"))
        assert found.bad() == []
        assert (engines(service), service.main_pid()) == (before, daemon)

    def test_a_stop(self, service: Machine) -> None:
        with load(service) as found:
            service.run(["systemctl", "stop", "llmuxd"])
            assert_nothing_runs(service)
            service.run(["systemctl", "start", "llmuxd"])
        assert {request["outcome"] for request in found.bad()} <= {"refused", "status 503", "cut"}


def assert_nothing_runs(machine: Machine) -> None:
    machine.wait(lambda: machine.processes() == {}, what="every process is gone")
    if machine.unified:  # With v1 it is systemd that is late to remove those that are empty.
        cgroups = "find /sys/fs/cgroup -name 'engine-*' -o -name 'llmuxd.service'"
        machine.wait(lambda: machine.out(cgroups) == "", what="every cgroup is gone")
    assert machine.out("ls /run/llmux/engines") == ""
    assert machine.run("curl -sS -m 5 http://127.0.0.1:3000/health", check=False).returncode == 7, "refused"


class TestStop:
    """It ends all engines, whatever state the daemon is in."""

    def test_with_a_daemon_that_was_killed(self, service: Machine) -> None:
        service.run(f"kill -KILL {service.main_pid()}; systemctl stop llmuxd")
        assert_nothing_runs(service)

    def test_with_a_daemon_that_hangs(self, service: Machine) -> None:
        service.run("mkdir -p /run/systemd/system/llmuxd.service.d")
        service.run("printf '[Service]\\nTimeoutStopSec=2\\n' > /run/systemd/system/llmuxd.service.d/test.conf")
        service.run("systemctl daemon-reload")
        service.run(f"kill -STOP {service.main_pid()}; systemctl stop llmuxd", timeout=60)
        assert_nothing_runs(service)
        service.run(
            "rm -r /run/systemd/system/llmuxd.service.d; systemctl daemon-reload; systemctl reset-failed llmuxd"
        )

    def test_with_a_daemon_that_cannot_start(self, service: Machine) -> None:
        config = service.out(["cat", CONFIG])
        service.put(CONFIG, "nonsense = 1\n", 0o644)
        service.run(f"kill -KILL {service.main_pid()}")
        service.wait_for_state("llmuxd.service", "failed")
        assert service.processes() != {}, "the engines stay: mending the config costs no loading"
        service.run(["systemctl", "stop", "llmuxd"])
        assert_nothing_runs(service)
        service.put(CONFIG, config + "\n", 0o644)
        service.run(["systemctl", "reset-failed", "llmuxd"])


class TestEnd:
    """In this order."""

    def test_removal_ends_everything(self, service: Machine) -> None:
        service.run(["apt-get", "remove", "-y", "-q", "llmuxd"])
        assert_nothing_runs(service)

    def test_a_reinstallation_serves_as_before(self, installed: Machine) -> None:
        installed.run(["apt-get", "install", "-y", "-q", "llmuxd"], timeout=300)
        installed.wait_for_state("llmuxd.service", "active")
        assert ask(installed, "a") == 200

    def test_a_purge_leaves_nothing(self, installed: Machine) -> None:
        installed.run(["apt-get", "purge", "-y", "-q", "llmuxd"])
        installed.wait(lambda: installed.processes() == {})
        folders = ("/etc/llmux", "/var/lib/llmux", "/var/cache/llmux", "/run/llmux")
        assert [one for one in folders if installed.run(["test", "-e", one], check=False).returncode == 0] == []


def test_with_cgroup_v1(make_machine: MakeMachine, deb: Path) -> None:
    """No cgroup for an engine there: they are found by session, mark and descent."""
    machine = serve(make_machine("bookworm", unified=False), deb)
    before = engines(machine)
    with load(machine) as found:
        machine.run(["systemctl", "restart", "llmuxd"])
    assert found.bad() == []
    machine.run(["kill", "-KILL", str(machine.main_pid())])
    machine.wait(lambda: machine.state("llmuxd") == "active" and ask(machine, "a") == 200)
    assert engines(machine) == before
    machine.run(["systemctl", "stop", "llmuxd"])
    assert_nothing_runs(machine)

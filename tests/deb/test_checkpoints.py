"""The package's drop-in for checkpoints: a real CRIU saves and restores engines for the daemon, which is not root.

The engines are simulated: what CRIU does to a real vLLM is in tests/criu.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.deb.conftest import MakeMachine
from tests.deb.machine import CRIU, Machine
from tests.deb.test_service import engines, install_with_device, status, write_config

LIBRARIES = f"{CRIU}/root/usr/lib/x86_64-linux-gnu"
WRAPPER = f"""#!/bin/sh
exec {LIBRARIES}/ld-linux-x86-64.so.2 --library-path {LIBRARIES} {CRIU}/root/usr/sbin/criu "$@"
"""
CONFIG = """
[policy]
eviction = "discard+checkpoint"
min_active_secs = 0
"""
LINK = "ln -s /usr/share/llmuxd/checkpoint.conf /etc/systemd/system/llmuxd.service.d/"


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def saving(request: pytest.FixtureRequest, make_machine: MakeMachine, cache: Path, deb: Path) -> Machine:
    """With the package, three models, CRIU, and the drop-in linked as it says itself."""
    criu = cache.parent / "criu-1"
    assert (criu / "criu").exists(), "run `make test-deb`, which makes what these tests need"
    machine = make_machine(request.param, criu=criu)
    install_with_device(machine, deb)
    machine.put("/usr/local/bin/criu", WRAPPER, 0o755)
    write_config(machine, CONFIG, a="", b="", c='eviction = "offload+keep_running"')
    assert LINK in machine.path("/usr/share/llmuxd/checkpoint.conf").read_text()
    machine.run(f"mkdir -p /etc/systemd/system/llmuxd.service.d && {LINK}")
    machine.run("systemctl daemon-reload && systemctl restart llmuxd")
    return machine


def say(machine: Machine, model: str) -> str:
    body = json.dumps({"model": model, "prompt": "why", "max_tokens": 8, "temperature": 0})
    asking = ["curl", "-sS", "--fail-with-body", "-m", "60", "-H", "Content-Type: application/json", "-d", body]
    answer: dict[str, Any] = json.loads(machine.out([*asking, "http://127.0.0.1:3000/v1/completions"]))
    text: str = answer["choices"][0]["text"]
    return text


def cold_starts(machine: Machine) -> int:
    return sum("starting -> awake" in entry["MESSAGE"] for entry in machine.entries("-u", "llmuxd"))


def test_engines_are_saved_and_restored_by_requests_alone(saving: Machine) -> None:
    first = {model: say(saving, model) for model in "ab"}
    pid, _ = engines(saving)["b"]
    for _ in range(3):
        for model, other in ("ab", "ba"):
            assert say(saving, model) == first[model]
            assert status(saving)["models"][other]["engine"] == "checkpointed"
    assert engines(saving)["b"][0] == pid, "it is the process that it was"
    assert cold_starts(saving) == 2, saving.journal(60)


def test_an_image_outlives_the_daemon(saving: Machine) -> None:
    first = say(saving, "a")
    say(saving, "b")
    saving.run(["systemctl", "restart", "llmuxd"])
    saving.wait(lambda: status(saving)["models"]["a"]["engine"] == "checkpointed", what="the image is found")
    before = cold_starts(saving)
    assert say(saving, "a") == first
    assert cold_starts(saving) == before


def test_what_criu_may_the_engines_may_not(saving: Machine) -> None:
    say(saving, "c")
    say(saving, "a")
    assert status(saving)["models"]["c"]["engine"] == "asleep"
    for pid in saving.processes():
        text = saving.out(["cat", f"/proc/{pid}/status"])
        found = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        if pid == saving.main_pid():
            assert int(found["CapEff"], 16) != 0
        else:
            assert int(found["CapEff"], 16) == 0, saving.processes()[pid]


def test_doctor_sees_that_the_drop_in_is_linked(saving: Machine) -> None:
    def criu() -> str:
        lines = saving.run(["llmuxctl", "doctor"], check=False).stdout.splitlines()
        return next(line for line in lines if line.split()[1:2] == ["criu"])

    linked = "/etc/systemd/system/llmuxd.service.d/checkpoint.conf"
    assert "4.2.1" in criu(), "whatever it says of the machine, which is in a container"
    assert "the unit's system call filter stops it" not in criu()
    saving.run(f"mv {linked} /root/ && systemctl daemon-reload")
    assert "the unit's system call filter stops it" in criu()
    saving.run(f"mv /root/checkpoint.conf {linked} && systemctl daemon-reload")

"""`llmuxctl doctor` on boxes made of files: each check alone, and the command over all of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmuxctl.client import Failed
from llmuxctl.doctor import checkpoints, examine, gpus, resources, service, situation, vllm
from llmuxctl.doctor.box import Box, User
from llmuxctl.doctor.finding import Finding, Status, ok, version_of
from llmuxctl.doctor.situation import Situation, look
from llmuxd.config import parse_config
from llmuxd.protocol import Exit
from llmuxd.version import __version__
from tests.unit.ctl_daemon import STATUS, daemon, run

SERVICE = User("llmux", 990, frozenset({990, 44}))
NVIDIA = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"


class Made:
    """A box below a folder of the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.box = Box(root, {"PATH": "/usr/bin"}, 1000)
        root.joinpath("proc").mkdir()

    def file(self, path: str, text: str = "", mode: int = 0o644) -> Path:
        made = self.root / path.lstrip("/")
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(text)
        made.chmod(mode)
        return made

    def program(self, path: str, script: str = "") -> None:
        self.file(path, f"#!/bin/sh\n{script}\n", 0o755)

    def there(self, data: dict[str, Any] | None = None, **more: Any) -> Situation:
        config = parse_config(data or {}, environ={}, known_policies=("tenure",))
        facts = {"user": SERVICE, "environ": {"PATH": "/usr/bin:/opt/vllm/bin", "HOME": "/var/cache/llmux"}, **more}
        return Situation(self.box, "/run/llmux/control.sock", Path("/etc/llmux/llmux.toml"), config, **facts)

    def vllm(self, version: str = "0.32.0", shebang: str = "#!/opt/vllm/bin/python3") -> None:
        self.file("/opt/vllm/bin/vllm", f"{shebang}\nimport sys\n", 0o755)
        folder = f"/opt/vllm/lib/python3.11/site-packages/vllm-{version}.dist-info"
        self.file(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


@pytest.fixture(name="made")
def _made(tmp_path: Path) -> Made:
    root = tmp_path / "box"
    root.mkdir()
    # The folders above are looked at by nobody; those below have to be open to all.
    root.chmod(0o755)
    return Made(root)


def _is(finding: Finding, status: Status, *words: str) -> None:
    assert finding.status is status, finding
    for word in words:
        assert word in f"{finding.found}\n{finding.advice}", finding
    assert bool(finding.advice) or status in (Status.OK, Status.SKIPPED)


def _models(**models: Any) -> dict[str, Any]:
    return {"models": {name: {"model_path": "a/b", **values} for name, values in models.items()}}


# GPUs


def test_driver(made: Made) -> None:
    _is(gpus.driver(made.there()), Status.WARN, "neither")
    made.file("/sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    made.file("/sys/bus/pci/devices/0000:01:00.0/class", "0x030200\n")
    _is(gpus.driver(made.there()), Status.FAIL, "NVIDIA card, but no driver", "nvidia-driver")
    made.file("/proc/driver/nvidia/version", NVIDIA)
    _is(gpus.driver(made.there()), Status.WARN, "570.86.15, without nvidia-smi")
    made.program("/usr/bin/nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    _is(gpus.driver(made.there()), Status.FAIL, "version mismatch", "reboot")
    made.program("/usr/bin/nvidia-smi", "echo 'GPU 0'")
    assert gpus.driver(made.there()) == ok("NVIDIA 570.86.15")


def test_driver_of_amd_and_of_none(made: Made) -> None:
    made.file("/sys/bus/pci/devices/0000:03:00.0/vendor", "0x1002\n")
    made.file("/sys/bus/pci/devices/0000:03:00.0/class", "0x120000\n")
    _is(gpus.driver(made.there()), Status.FAIL, "AMD card, but no /dev/kfd")
    made.file("/dev/kfd")
    made.file("/sys/module/amdgpu/version", "6.7.0\n")
    assert gpus.driver(made.there()) == ok("AMD, amdgpu 6.7.0")


def test_a_cpu_build_needs_no_gpu(made: Made) -> None:
    made.vllm("0.32.0+cpu")
    _is(gpus.driver(made.there()), Status.OK, "build for the CPU")


def test_devices(made: Made) -> None:
    _is(gpus.devices(made.there()), Status.SKIPPED)
    made.file("/proc/driver/nvidia/version", NVIDIA)
    _is(gpus.devices(made.there()), Status.FAIL, "nvidia-modprobe")
    made.file("/dev/nvidia0", mode=0o666)
    made.file("/dev/nvidiactl", mode=0o666)
    made.file("/dev/nvidia-caps/nvidia-cap1", mode=0o400)
    _is(gpus.devices(made.there()), Status.FAIL, "/dev/nvidia-uvm")
    made.file("/dev/nvidia-uvm", mode=0o666)
    _is(gpus.devices(made.there()), Status.OK, "llmux may open /dev/nvidia-uvm, /dev/nvidia0, /dev/nvidiactl")
    made.file("/dev/nvidia0", mode=0o600)
    _is(gpus.devices(made.there()), Status.FAIL, "llmux may not open /dev/nvidia0")


def test_devices_by_group(made: Made) -> None:
    node = made.file("/dev/kfd", mode=0o660)
    made.file("/dev/dri/renderD128", mode=0o666)
    group = node.stat().st_gid
    _is(gpus.devices(made.there()), Status.FAIL, "may not open /dev/kfd")
    member = User("llmux", 990, frozenset({group}))
    _is(gpus.devices(made.there(user=member)), Status.OK, "/dev/dri/renderD128")


def test_memory_of_devices(made: Made) -> None:
    _is(gpus.memory(made.there()), Status.SKIPPED)
    made.program("/usr/bin/nvidia-smi", "echo '0, NVIDIA L40S, 40960, 46068'; echo '1, GB10, [N/A], [N/A]'")
    _is(gpus.memory(made.there()), Status.WARN, "0 NVIDIA L40S: 40.0 GiB of 45.0 GiB used", "by whom")
    _is(gpus.memory(made.there(status=STATUS)), Status.OK)
    made.program("/usr/bin/nvidia-smi", "exit 9")
    made.file("/sys/class/drm/card1/device/mem_info_vram_total", f"{64 << 30}\n")
    made.file("/sys/class/drm/card1/device/mem_info_vram_used", f"{1 << 30}\n")
    _is(gpus.memory(made.there()), Status.OK, "card1: 1.0 GiB of 64.0 GiB used")


# vLLM


def test_no_vllm(made: Made) -> None:
    _is(vllm.vllm(made.there()), Status.FAIL, "no vllm", "/usr/bin:/opt/vllm/bin", "llmux-install-vllm")
    _is(vllm.sleep_mode(made.there()), Status.SKIPPED)
    _is(vllm.vllm(made.there({"vllm_command": "/nowhere/vllm"})), Status.FAIL, "no /nowhere/vllm")
    made.file("/opt/vllm/bin/vllm", mode=0o644)
    _is(vllm.vllm(made.there()), Status.FAIL, "no vllm")


@pytest.mark.parametrize(
    "shebang",
    [
        "#!/opt/vllm/bin/python3",
        "#! /opt/vllm/bin/python",
        "#!/bin/sh\n'''exec' /opt/vllm/bin/python3.11 \"$0\" \"$@\"\n' '''",
    ],
)
def test_the_version_is_read_from_its_files(made: Made, shebang: str) -> None:
    made.vllm("0.32.0", shebang)
    assert vllm.vllm(made.there()) == ok("0.32.0 at /opt/vllm/bin/vllm")
    assert vllm.sleep_mode(made.there()) == ok("sleep, wake, park")


def test_the_version_of_a_command_that_begins_with_python(made: Made) -> None:
    made.vllm("0.31.1")
    made.program("/opt/vllm/bin/python")
    command = {"vllm_command": ["/opt/vllm/bin/python", "-m", "vllm.entrypoints.cli.main"]}
    assert vllm.vllm(made.there(command)) == ok("0.31.1 at /opt/vllm/bin/python")


def test_the_version_is_asked_for_where_no_file_tells_it(made: Made) -> None:
    made.program("/opt/vllm/bin/vllm", "echo WARNING: old; echo 0.24.0")
    _is(vllm.vllm(made.there()), Status.OK, "0.24.0 at")
    made.program("/opt/vllm/bin/vllm", "exit 1")
    _is(vllm.vllm(made.there()), Status.WARN, "does not say its version")


def test_root_runs_no_program_of_others(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made.program("/opt/vllm/bin/vllm", "echo 0.24.0")
    made.box = replace(made.box, uid=0)
    monkeypatch.setattr(Box, "owner", lambda _self, _path: 990)
    _is(vllm.vllm(made.there()), Status.WARN, "does not say its version")
    monkeypatch.setattr(Box, "owner", lambda _self, _path: 0)
    _is(vllm.vllm(made.there()), Status.OK, "0.24.0 at")


@pytest.mark.parametrize(
    ("version", "models", "status", "says"),
    [
        ("0.15.1", _models(a={}), Status.FAIL, "no --uds"),
        ("0.15.1", _models(a={"port": 8001}), Status.WARN, "no --uds"),
        ("0.16.0", _models(a={}), Status.WARN, "no mode=keep"),
        ("0.20.2", _models(a={}), Status.WARN, "cannot be tried again"),
        ("0.25.0", _models(a={}), Status.OK, "sleep"),
        ("0.32.0+cpu", _models(a={}), Status.OK, "frees no memory"),
    ],
)
def test_sleep_mode_by_version(made: Made, version: str, models: Any, status: Status, says: str) -> None:
    made.vllm(version)
    _is(vllm.sleep_mode(made.there(models)), status, says)


def test_a_vllm_that_the_service_may_not_run(made: Made) -> None:
    made.vllm()
    made.root.joinpath("opt/vllm/bin").chmod(0o700)
    _is(vllm.vllm(made.there()), Status.FAIL, "llmux may not run /opt/vllm/bin/vllm", "chmod")
    made.program("/home/me/vllm")
    unit = {"LoadState": "loaded", "ProtectHome": "yes"}
    home = made.there({"vllm_command": "/home/me/vllm"}, unit=unit)
    _is(vllm.vllm(home), Status.FAIL, "home folder", "ProtectHome=read-only")


# What engines need


def test_models(made: Made) -> None:
    _is(resources.models(made.there()), Status.WARN, "none are configured", "[models.NAME]")
    local = _models(a={"model_path": "/srv/a"}, b={})
    _is(resources.models(made.there(local)), Status.FAIL, "not there: a: /srv/a")
    made.file("/srv/a/config.json")
    _is(resources.models(made.there(local)), Status.OK, "fetched at the first start: b")
    offline = made.there(local, environ={"HF_HUB_OFFLINE": "1", "HF_HOME": "/hf"})
    _is(resources.models(offline), Status.FAIL, "not in /hf/hub: b")
    made.file("/hf/hub/models--a--b/snapshots/abc/config.json")
    _is(resources.models(made.there(local, environ={"HF_HOME": "/hf"})), Status.OK, "2 models, with all files here")
    made.root.joinpath("srv/a").chmod(0o700)
    _is(resources.models(made.there(local)), Status.FAIL, "llmux may not read a: /srv/a")


LIMITS = "Limit Soft Limit Hard Limit Units\nMax locked memory         {}              8388608              bytes\n"


def test_locked_memory(made: Made) -> None:
    offload = _models(a={})
    _is(resources.memlock(made.there(offload)), Status.SKIPPED)
    made.file("/proc/self/limits", LIMITS.format(8388608))
    _is(resources.memlock(made.there(offload)), Status.WARN, "8 MiB (of this shell)", "ulimit")
    _is(resources.memlock(made.there(_models(a={"eviction": "discard+keep_running"}))), Status.OK)
    made.vllm("0.32.0+cpu")
    _is(resources.memlock(made.there(offload)), Status.OK)
    made.root.joinpath("opt/vllm/bin/vllm").unlink()
    unit = {"LimitMEMLOCK": "infinity"}
    _is(resources.memlock(made.there(offload, unit=unit)), Status.OK, "unlimited (by its unit)")
    unit = {"LimitMEMLOCK": "65536", "MainPID": "7"}
    made.file("/proc/7/limits", LIMITS.format(65536))
    _is(
        resources.memlock(made.there(offload, unit=unit, pid=7)), Status.WARN, "running daemon", "LimitMEMLOCK=infinity"
    )
    made.file("/proc/7/limits", LIMITS.format("unlimited"))
    _is(resources.memlock(made.there(offload, unit=unit, pid=7)), Status.OK, "unlimited (the running daemon)")


def test_host_memory(made: Made) -> None:
    models = _models(a={"model_path": "/srv/a"}, b={}, c={"eviction": "discard+stop"})
    _is(resources.ram(made.there(models)), Status.SKIPPED)
    made.file("/proc/meminfo", f"MemTotal:       {8 << 20} kB\nMemFree: 1 kB\n")
    _is(resources.ram(made.there(models)), Status.OK, "8.0 GiB; 2 models of unknown size")
    _is(resources.ram(made.there(_models(c={"eviction": "discard+stop"}))), Status.OK, "no model sleeps in it")
    for gibibytes, status in ((2, Status.OK), (5, Status.WARN), (9, Status.FAIL)):
        os.truncate(made.file("/srv/a/model.safetensors"), gibibytes << 30)
        _is(resources.ram(made.there(models)), status, f"1 model with {gibibytes}.0 GiB", "1 of unknown size")


@pytest.mark.parametrize(("free", "status"), [(100, Status.OK), (10, Status.WARN), (0.01, Status.FAIL)])
def test_disks(made: Made, monkeypatch: pytest.MonkeyPatch, free: float, status: Status) -> None:
    used = SimpleNamespace(free=int(free * (1 << 30)), total=200 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: used)
    _is(resources.cache_disk(made.there()), status, "for /var/cache/llmux/.cache/huggingface/hub")
    _is(resources.cache_disk(made.there(environ={"HF_HOME": "/data/hf"})), status, "for /data/hf/hub")
    _is(resources.state_disk(made.there()), Status.FAIL if free < 1 else Status.OK, "for /var/lib/llmux")
    _is(resources.images_disk(made.there()), Status.SKIPPED)
    checkpointed = made.there(_models(a={"eviction": "discard+checkpoint"}))
    _is(resources.images_disk(checkpointed), status, "for /tmp/llmux-checkpoints")


def test_shared_memory(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    _is(resources.shared_memory(made.there()), Status.FAIL, "mount")
    made.root.joinpath("dev/shm").mkdir(parents=True)
    for free, total, status in (
        (64 << 20, 64 << 20, Status.WARN),
        (1, 8 << 30, Status.WARN),
        (4 << 30, 8 << 30, Status.OK),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, f=free, t=total: SimpleNamespace(free=f, total=t))
        _is(resources.shared_memory(made.there()), status)


# Checkpoints


CHECKPOINTED = _models(a={"eviction": "discard+checkpoint"})


def test_cuda_checkpoint(made: Made) -> None:
    _is(checkpoints.cuda_checkpoint(made.there()), Status.SKIPPED, "not used")
    _is(checkpoints.cuda_checkpoint(made.there(CHECKPOINTED)), Status.FAIL, "no cuda-checkpoint")
    made.program("/usr/bin/cuda-checkpoint")
    _is(checkpoints.cuda_checkpoint(made.there(CHECKPOINTED)), Status.WARN, "no NVIDIA driver")
    for version, status in (("545.23.08", Status.FAIL), ("555.42.02", Status.WARN), ("570.86.15", Status.OK)):
        made.file("/proc/driver/nvidia/version", NVIDIA.replace("570.86.15", version))
        _is(checkpoints.cuda_checkpoint(made.there(CHECKPOINTED)), status, version)


def test_criu(made: Made) -> None:
    _is(checkpoints.criu(made.there()), Status.SKIPPED, "not there")
    _is(checkpoints.criu(made.there(CHECKPOINTED)), Status.FAIL, "no criu")
    made.program(
        "/usr/bin/criu",
        '[ "$1" = --version ] && echo "Version: 4.2.1" && exit; echo "Error: vdso"; echo "Does not look good."; exit 1',
    )
    _is(checkpoints.criu(made.there()), Status.SKIPPED, "4.2.1 at /usr/bin/criu")
    _is(checkpoints.criu(made.there(CHECKPOINTED)), Status.OK, "as root")
    filtered = made.there(CHECKPOINTED, unit={"SystemCallFilter": "read"})
    _is(checkpoints.criu(filtered), Status.FAIL, "system call filter", "checkpoint.conf")
    _is(checkpoints.criu(made.there(CHECKPOINTED, unit={"SystemCallFilter": "~"})), Status.OK, "as root")
    made.box = replace(made.box, uid=0)
    _is(checkpoints.criu(made.there(CHECKPOINTED)), Status.FAIL, "Error: vdso")
    made.program("/usr/bin/criu", 'echo "Version: 4.2.1"')
    _is(checkpoints.criu(made.there(CHECKPOINTED)), Status.OK, "looks good")


# The service


def test_config(made: Made) -> None:
    _is(service.config(made.there(_models(a={}))), Status.OK, "1 model, no errors")
    _is(service.config(made.there({"admin_port": 1})), Status.WARN, "admin_port")
    _is(service.config(made.there(problems=("it is not there",))), Status.FAIL, "no /etc/llmux/llmux.toml")
    bad = replace(made.there(), config=None, problems=("one", "two"))
    _is(service.config(bad), Status.FAIL, "2 problems", "one\ntwo")
    closed = replace(bad, problems=("/etc/llmux/llmux.toml: cannot be read: Permission denied",))
    _is(service.config(closed), Status.SKIPPED, "may not read", "As root")


@pytest.mark.parametrize(
    ("unit", "status", "says"),
    [
        ({}, Status.SKIPPED, "by hand"),
        (
            {"ActiveState": "active", "SubState": "running", "UnitFileState": "enabled", "StatusText": "awake: q"},
            Status.OK,
            "awake: q",
        ),
        ({"ActiveState": "active", "SubState": "running", "UnitFileState": "disabled"}, Status.WARN, "at boot"),
        ({"ActiveState": "inactive", "SubState": "dead", "UnitFileState": "enabled"}, Status.WARN, "enable --now"),
        ({"ActiveState": "failed", "SubState": "failed", "UnitFileState": "enabled"}, Status.FAIL, "journalctl"),
    ],
)
def test_unit(made: Made, unit: dict[str, str], status: Status, says: str) -> None:
    _is(service.unit(made.there(systemd=True, unit=unit)), status, says)
    assert service.unit(made.there()).status is Status.SKIPPED


def test_daemon(made: Made) -> None:
    _is(service.daemon(made.there(status=STATUS)), Status.OK, __version__)
    broken = {**STATUS, "health": {"ok": False, "reason": "the scheduler is stuck"}}
    _is(service.daemon(made.there(status=broken)), Status.FAIL, "the scheduler is stuck", "journalctl")
    failed = {**STATUS["models"]["qwen"], "engine": "failed", "last_error": "out of memory\nmore"}
    _is(
        service.daemon(made.there(status={**STATUS, "models": {"qwen": failed}})),
        Status.WARN, "failed: qwen", "qwen: out of memory\n", "llmuxctl logs qwen",
    )  # fmt: skip
    _is(service.daemon(made.there(status={**STATUS, "version": "9.9"})), Status.WARN, "9.9", "systemctl restart")
    off = Failed(Exit.UNREACHABLE, "llmuxd is not running: there is no socket.\nStart it")
    _is(service.daemon(made.there(silence=off)), Status.WARN, "there is no socket", "llmuxd --config /etc/llmux")
    _is(service.daemon(made.there(silence=off, unit={"LoadState": "loaded"})), Status.WARN, "systemctl start llmuxd")
    _is(service.daemon(made.there(silence=off, pid=7)), Status.FAIL, "it runs (pid 7), but")
    refused = Failed(Exit.NOT_ALLOWED, "You may not use it")
    _is(service.daemon(made.there(silence=refused)), Status.FAIL, "usermod -aG llmux")


def test_groups(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "group_number", {"llmux": 990}.get)
    monkeypatch.setattr(service, "_own_groups", lambda: [1000])
    _is(service.groups(made.there()), Status.WARN, "is not in llmux: may not steer", "usermod -aG llmux")
    _is(service.groups(made.there(status=STATUS)), Status.WARN, "may look, but not steer")
    _is(service.groups(made.there(user=User("me", 1000))), Status.OK)
    monkeypatch.setattr(service, "_own_groups", lambda: [1000, 990])
    _is(service.groups(made.there()), Status.OK, "is in llmux")
    monkeypatch.setattr(service, "group_number", {}.get)
    _is(service.groups(made.there()), Status.SKIPPED, "there is no group llmux")


TCP = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def _listening(address: str, inode: int, state: str = "0A") -> str:
    return f"   0: {address} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1\n"


def test_ports(made: Made) -> None:
    _is(service.port(made.there()), Status.OK, "3000 is free")
    _is(service.port(made.there({"port": 0})), Status.OK, "any")
    _is(service.metrics_port(made.there({"metrics_port": 0})), Status.OK, "none")
    made.file("/proc/net/tcp", TCP + _listening("0100007F:0BB8", 42) + _listening("0100007F:2382", 43, "01"))
    made.file("/proc/net/tcp6", TCP + _listening("00000000000000000000000000000000:1F90", 44))
    _is(service.metrics_port(made.there()), Status.OK, "9090 is free")
    _is(service.port(made.there()), Status.FAIL, "3000 is taken; as root", "another `port`")
    _is(service.port(made.there({"port": 8080})), Status.FAIL, "8080 is taken")
    _is(service.port(made.there({"listen": "192.0.2.1"})), Status.OK, "3000 is free")
    _is(service.port(made.there({"listen": "localhost"})), Status.FAIL)
    _is(service.port(made.there(status=STATUS)), Status.OK, "probably by llmuxd")
    made.file("/proc/7/comm", "nginx\n")
    made.root.joinpath("proc/7/fd").mkdir()
    os.symlink("socket:[42]", made.root / "proc/7/fd/5")
    _is(service.port(made.there(status=STATUS, pid=8)), Status.FAIL, "3000 is taken by nginx (pid 7)")
    _is(service.port(made.there(pid=7)), Status.OK, "3000 is llmuxd's")


def test_the_port_that_systemd_holds(made: Made) -> None:
    unit = {"LoadState": "loaded", "Listen": "127.0.0.1:3000 (Stream)"}
    _is(service.port(made.there(unit=unit)), Status.OK, "3000 is free")
    other = made.there({"port": 8000}, unit=unit)
    _is(service.port(other), Status.WARN, "only the socket's waits", "systemctl edit llmuxd.socket")
    made.file("/proc/net/tcp", TCP + _listening("0100007F:0BB8", 42))
    made.root.joinpath("proc/1/fd").mkdir(parents=True)
    os.symlink("socket:[42]", made.root / "proc/1/fd/5")
    _is(service.port(made.there(unit=unit)), Status.OK, "held by systemd")


# Together


def test_the_situation_of_a_unit_that_does_not_run(made: Made, tmp_path: Path) -> None:
    made.root.joinpath("run/systemd/system").mkdir(parents=True)
    made.program(
        "/usr/bin/systemctl",
        'case "$2" in\n'
        "*.socket) echo 'Listen=127.0.0.1:3000 (Stream)';;\n"
        "*) echo LoadState=loaded; echo MainPID=0; echo User=root; echo 'Environment=HF_HOME=/hf \"A=b c\"'; "
        "echo 'EnvironmentFiles=/etc/default/llmuxd (ignore_errors=yes)';;\nesac",
    )
    made.file("/etc/default/llmuxd", "# HF_HOME=/no\nHF_TOKEN='x y'\nHF_HUB_OFFLINE=1\n\"\n")
    there = look(made.box, str(tmp_path / "none"), tmp_path / "none.toml")
    assert (there.environ["HF_TOKEN"], there.environ["HF_HUB_OFFLINE"]) == ("x y", "1")
    assert (there.by_unit, there.user.uid, there.pid, there.unit["Listen"]) == (
        True,
        0,
        None,
        "127.0.0.1:3000 (Stream)",
    )
    assert (there.environ["HF_HOME"], there.environ["A"]) == ("/hf", "b c")
    assert there.config is not None
    assert "cannot be read" in there.problems[0]
    made.program("/usr/bin/systemctl", "echo LoadState=not-found")
    assert not look(made.box, str(tmp_path / "none"), tmp_path / "none.toml").by_unit


def test_the_situation_of_a_daemon_that_runs(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Box, "peer", lambda _self, _path: 7)
    made.file("/proc/7/cmdline", "python3\0/usr/bin/llmuxd\0")
    made.file("/proc/7/status", "Name:\tllmuxd\nUid:\t990\t990\t990\t990\nGid:\t990\t990\t990\t990\nGroups:\t44 105 \n")
    made.file("/proc/7/environ", "PATH=/opt/bin\0HF_HOME=/hf\0")
    with daemon() as served:
        there = look(made.box, str(served.socket), made.root / "none.toml")
    assert (there.pid, there.user.uid, there.user.groups) == (7, 990, frozenset({990, 44, 105}))
    assert (there.search, there.status) == ("/opt/bin", STATUS)
    made.file("/proc/7/cmdline", "/sbin/init\0")
    assert situation._daemon(made.box, "/run/llmux/control.sock") is None


def test_a_check_that_breaks_does_not_stop_the_others(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_there: Situation) -> Finding:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(examine, "CHECKS", (("one", breaks), ("two", lambda _there: ok("fine"))))
    found = examine.examine(made.there())
    _is(found[0][1], Status.WARN, "ZeroDivisionError: oh")
    assert found[1] == ("two", ok("fine"))


def test_every_check_survives_an_empty_box(made: Made) -> None:
    for there in (made.there(), replace(made.there(), config=None, problems=("bad",))):
        assert not [f for _, f in examine.examine(there) if "the check broke" in f.found]


@pytest.fixture(name="doctor")
def _doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    return lambda *arguments: run(capsys, monkeypatch, tmp_path / "none", "doctor", *arguments)


def test_the_command_on_this_machine(doctor: Callable[..., Any], tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('prt = 1\nvllm_command = "/no\\u001bwhere"\n')
    said = doctor("--config", str(bad))
    assert (said.code, said.err, "\x1b" in said.out) == (1, "", False)
    assert len([line for line in said.out.splitlines() if line.startswith(("ok ", "warn ", "FAIL ", "- "))]) == len(
        examine.CHECKS
    )
    assert "prt" in said.out
    found = json.loads(doctor("--config", str(bad), "--json").out)
    assert [each["check"] for each in found] == [name for name, _ in examine.CHECKS]
    assert all(set(each) == {"check", "status", "found", "advice"} for each in found)
    assert {each["status"] for each in found} <= {"ok", "warn", "fail", "skipped"}


def test_nothing_wrong_is_0(doctor: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "CHECKS", (("one", lambda _there: ok("fine")),))
    said = doctor()
    assert (said.code, said.out) == (0, "ok    one  fine\n\nNothing is wrong.\n")


def test_versions() -> None:
    assert version_of("0.17.1rc1.dev5+g123") == (0, 17, 1)
    assert version_of("no version") is None

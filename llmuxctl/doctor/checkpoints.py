"""The checks of what checkpoints need: cuda-checkpoint and CRIU. Engines are started without io_uring by themselves."""

from __future__ import annotations

from llmuxctl.doctor.finding import Finding, fail, ok, skipped, version_of, warn
from llmuxctl.doctor.gpus import nvidia_driver
from llmuxctl.doctor.situation import Situation

DRIVER_WITH_CHECKPOINT = (550,)
DRIVER_WITH_TREES = (570,)
CHECK_SECS = 60.0

AUTO = ""
"""The process of an eviction that is left to be chosen: it may be any."""

_LINK_DROP_IN = """As root: mkdir -p /etc/systemd/system/llmuxd.service.d
ln -s /usr/share/llmuxd/checkpoint.conf /etc/systemd/system/llmuxd.service.d/
systemctl daemon-reload && systemctl restart llmuxd"""
_NOT_WANTED = "not used by the config"
_NO_FILTER = ("", "~")
"""How systemd shows that there is none: as it was never set, and as a drop-in has taken it off."""


def wanted(there: Situation) -> bool:
    """Whether a model is checkpointed, or started from a checkpoint."""
    return _any(there, "checkpoint")


def _suspend_wanted(there: Situation) -> bool:
    return _any(there, "checkpoint", "cuda_suspend")


def _any(there: Situation, *processes: str) -> bool:
    return there.config is not None and any(
        str(model.eviction).partition("+")[2] in (*processes, AUTO) or model.checkpoint_path is not None
        for model in there.config.models.values()
    )


def cuda_checkpoint(there: Situation) -> Finding:
    """NVIDIA's program that moves a process off a device, and a driver that can."""
    program = there.config.checkpoint.cuda_checkpoint_path if there.config is not None else "cuda-checkpoint"
    path = there.box.which(program, there.search)
    if not _suspend_wanted(there):
        return skipped(f"{path or 'not there'}; {_NOT_WANTED}")
    if path is None:
        return fail(
            f"no {program}",
            "Get it from github.com/NVIDIA/cuda-checkpoint, and name it: checkpoint.cuda_checkpoint_path",
        )
    version = nvidia_driver(there)
    numbers = version_of(version or "")
    if numbers is None:
        return warn(f"{path}, but no NVIDIA driver", "It works with NVIDIA's driver only.")
    if numbers < DRIVER_WITH_CHECKPOINT:
        return fail(f"{path}, but driver {version} is too old", "It needs driver 550; 570 for process trees.")
    if numbers < DRIVER_WITH_TREES:
        return warn(f"{path}, driver {version}", "Driver 570 adds a lock with a timeout, and CRIU's process trees.")
    return ok(f"{path}, driver {version}")


def criu(there: Situation) -> Finding:
    """CRIU, its version, and as root what it says of this kernel."""
    program = there.config.checkpoint.criu_path if there.config is not None else "criu"
    path = there.box.which(program, there.search)
    if path is None:
        if not wanted(there):
            return skipped(f"not there; {_NOT_WANTED}")
        return fail(f"no {program}", "Install it (apt install criu), or name it: checkpoint.criu_path")
    version = _version(there, path)
    if not wanted(there):
        return skipped(f"{version} at {path}; {_NOT_WANTED}")
    if there.by_unit and there.unit.get("SystemCallFilter", "") not in _NO_FILTER:
        return fail(f"{version} at {path}, but the unit's system call filter stops it", _LINK_DROP_IN)
    if there.box.uid != 0:
        return ok(f"{version} at {path}; as root, doctor also runs `criu check`")
    ran = there.box.run([path, "check"], CHECK_SECS)
    if ran.code != 0:
        lines = ran.out.splitlines() or ["it fails"]
        said = next((line for line in lines if line.startswith("Error")), lines[-1])
        return fail(f"{version}: criu check: {said}", "This kernel needs another version of CRIU: criu.org/Packages")
    return ok(f"{version} at {path}; criu check: looks good")


def _version(there: Situation, path: str) -> str:
    found = version_of(there.box.run([path, "--version"]).out)
    return ".".join(map(str, found)) if found else "an unknown version"

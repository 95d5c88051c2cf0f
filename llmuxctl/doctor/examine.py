"""The table of all checks, and how what they find is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmuxctl.doctor import checkpoints, gpus, resources, service, store, vllm
from llmuxctl.doctor.finding import Finding, Status, warn
from llmuxctl.doctor.situation import Situation
from llmuxctl.output import clean, styled

Check = Callable[[Situation], Finding]

CHECKS: tuple[tuple[str, Check], ...] = (
    ("driver", gpus.driver),
    ("devices", gpus.devices),
    ("device memory", gpus.memory),
    ("config", service.config),
    ("vllm", vllm.vllm),
    ("sleep mode", vllm.sleep_mode),
    ("models", resources.models),
    ("host memory", resources.ram),
    ("locked memory", resources.memlock),
    ("shared memory", resources.shared_memory),
    ("disk: state", resources.state_disk),
    ("disk: models", resources.cache_disk),
    ("disk: images", resources.images_disk),
    ("cuda-checkpoint", checkpoints.cuda_checkpoint),
    ("criu", checkpoints.criu),
    ("object store", store.object_store),
    ("port", service.port),
    ("metrics port", service.metrics_port),
    ("unit", service.unit),
    ("daemon", service.daemon),
    ("groups", service.groups),
)
"""By name, in the order in which they are told."""

_MARKS = {
    Status.OK: ("ok", "green"),
    Status.WARN: ("warn", "yellow"),
    Status.FAIL: ("FAIL", "red"),
    Status.SKIPPED: ("-", "bright_black"),
}


def examine(there: Situation) -> list[tuple[str, Finding]]:
    """Run every check. One that breaks says so, and the others go on."""
    found = []
    for name, check in CHECKS:
        try:
            found.append((name, check(there)))
        except Exception as error:
            found.append((name, warn(f"the check broke: {type(error).__name__}: {error}", "Please report this.")))
    return found


def is_wrong(found: list[tuple[str, Finding]]) -> bool:
    return any(finding.status is Status.FAIL for _, finding in found)


def tell(found: list[tuple[str, Finding]]) -> None:
    """A line per check, and below it what to do."""
    width = max(len(name) for name, _ in found)
    for name, finding in found:
        mark, colour = _MARKS[finding.status]
        print(f"{styled(mark.ljust(4), fg=colour)}  {name.ljust(width)}  {clean(finding.found)}")
        for line in finding.advice.splitlines():
            print(f"{' ' * (width + 8)}{clean(line)}")
    counts = {status: sum(finding.status is status for _, finding in found) for status in Status}
    if counts[Status.FAIL] or counts[Status.WARN]:
        print(f"\n{counts[Status.FAIL]} wrong, {counts[Status.WARN]} to look at, {counts[Status.OK]} fine")
    else:
        print("\nNothing is wrong.")


def as_json(found: list[tuple[str, Finding]]) -> list[dict[str, Any]]:
    return [finding.as_json(name) for name, finding in found]

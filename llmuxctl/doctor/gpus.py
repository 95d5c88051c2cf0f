"""The checks of drivers, devices and their memory."""

from __future__ import annotations

import re

from llmuxctl.doctor.finding import Finding, fail, listed, ok, size, skipped, warn
from llmuxctl.doctor.situation import Situation, group_name
from llmuxctl.doctor.vllm import installed

_NVIDIA, _AMD = "0x10de", "0x1002"
_DISPLAY_CLASSES = ("0x03", "0x12")
"""Of PCI devices: display controllers, and accelerators."""
_MUCH_USED = 0.1


def _cards(there: Situation, vendor: str) -> int:
    """The vendor's cards on the bus, with a driver or without."""
    count = 0
    for folder in there.box.list("/sys/bus/pci/devices", "*"):
        kind = there.box.read(f"{folder}/class") or ""
        if (there.box.read(f"{folder}/vendor") or "").strip() == vendor and kind.startswith(_DISPLAY_CLASSES):
            count += 1
    return count


def nvidia_driver(there: Situation) -> str | None:
    """The version of the driver that is loaded; "" if it does not say."""
    text = there.box.read("/proc/driver/nvidia/version")
    if text is None:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""


def driver(there: Situation) -> Finding:
    """A driver for the cards that the box has."""
    nvidia, smi = nvidia_driver(there), there.box.which("nvidia-smi", there.search)
    if nvidia is not None and smi is None:
        return warn(f"NVIDIA {nvidia}, without nvidia-smi", "Install nvidia-smi, of the same version as the driver.")
    if nvidia is not None and smi is not None:
        ran = there.box.run([smi, "-L"])
        if ran.code != 0:
            said = ran.out.splitlines()[0] if ran.out else "it does not answer"
            return fail(
                f"NVIDIA {nvidia}, but nvidia-smi: {said}", "After an update of the driver: reboot. Else: dmesg"
            )
        return ok(f"NVIDIA {nvidia}")
    if there.box.exists("/dev/kfd"):
        version = (there.box.read("/sys/module/amdgpu/version") or "of the kernel").strip()
        return ok(f"AMD, amdgpu {version}")
    if _cards(there, _NVIDIA):
        return fail("an NVIDIA card, but no driver", "Install it (Debian: apt install nvidia-driver), and reboot.")
    if _cards(there, _AMD):
        return fail("an AMD card, but no /dev/kfd", "Load its driver (modprobe amdgpu), or install ROCm's.")
    found = installed(there)
    if found is not None and found.is_cpu:
        return ok("no GPU; vLLM is a build for the CPU")
    return warn("neither an NVIDIA nor an AMD card", "On a CPU use a build for it: llmux-install-vllm --cpu.")


def _nodes(there: Situation) -> list[str]:
    box = there.box
    nodes = [node for node in box.list("/dev", "nvidia*") if re.search(r"/nvidia(\d+|ctl|-uvm)$", node)]
    if box.exists("/dev/kfd"):
        nodes += ["/dev/kfd", *box.list("/dev/dri", "renderD*")]
    return nodes


def devices(there: Situation) -> Finding:
    """The device nodes, and whether the daemon's user may open them."""
    nodes = _nodes(there)
    if not nodes:
        if nvidia_driver(there) is not None:
            return fail("the driver is loaded, but there is no /dev/nvidia*", "Make them: nvidia-modprobe -u -c 0")
        return skipped("none")
    closed = [node for node in nodes if there.box.may(there.user, node, 6) is False]
    if closed:
        groups = sorted({group_name(there.box.path(node).stat().st_gid) for node in closed} - {"root"})
        join = f"usermod -aG {','.join(groups)} {there.user.name}" if groups else "let their driver make them 0666"
        return fail(
            f"{there.user.name} may not open {listed(closed)}",
            f"As root: {join}\nThen restart: systemctl restart llmuxd",
        )
    if nvidia_driver(there) is not None and "/dev/nvidia-uvm" not in nodes:
        return fail("no /dev/nvidia-uvm: CUDA does not start without", "As root: nvidia-modprobe -u -c 0")
    return ok(f"{there.user.name} may open {listed(nodes)}")


def memory(there: Situation) -> Finding:
    """The devices' memory, and whether somebody else has it."""
    rows = _nvidia_memory(there) or _amd_memory(there)
    if not rows:
        return skipped("no device to ask")
    found = "; ".join(f"{name}: {size(used)} of {size(total)} used" for name, used, total in rows)
    engines = there.status is not None or there.pid is not None
    if not engines and any(used > total * _MUCH_USED for _, used, total in rows):
        return warn(found, "llmuxd does not run, and yet memory is taken: nvidia-smi or rocm-smi shows by whom.")
    return ok(found)


def _nvidia_memory(there: Situation) -> list[tuple[str, int, int]]:
    smi = there.box.which("nvidia-smi", there.search)
    if smi is None:
        return []
    ran = there.box.run([smi, "--query-gpu=index,name,memory.used,memory.total", "--format=csv,noheader,nounits"])
    rows = []
    for line in ran.out.splitlines() if ran.code == 0 else []:
        cells = [cell.strip() for cell in line.split(",")]
        # Boards with unified memory say "[N/A]".
        if len(cells) == 4 and cells[2].isdecimal() and cells[3].isdecimal():
            rows.append((f"{cells[0]} {cells[1]}", int(cells[2]) << 20, int(cells[3]) << 20))
    return rows


def _amd_memory(there: Situation) -> list[tuple[str, int, int]]:
    rows = []
    for path in there.box.list("/sys/class/drm", "card*/device/mem_info_vram_total"):
        total = (there.box.read(path) or "").strip()
        used = (there.box.read(path.replace("_total", "_used")) or "").strip()
        if total.isdecimal() and used.isdecimal():
            rows.append((path.split("/")[4], int(used), int(total)))
    return rows

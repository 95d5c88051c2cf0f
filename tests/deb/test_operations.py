"""docs/operations.md is true: each of its blocks of commands is run, in their order, by a real root on a real machine.

There is no network and no GPU there: pip finds a package named vllm whose command is the simulated engine.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from tests.deb.conftest import TOP
from tests.deb.machine import Failed, Machine

PAGE = TOP / "docs/operations.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
BLOCK_SECS = 300

VLLM = """
import os, sys

def main():
    if "--version" in sys.argv:
        print("0.32.0")
        return
    os.environ.update(LLMUX_SIM_SCALE="0.01")
    os.execv("/usr/bin/python3", ["/usr/bin/python3", "-m", "llmuxd.sim.vllm", *sys.argv[1:]])
"""


def make_wheel(folder: Path) -> Path:
    """A package named vllm."""
    wheel = folder / "vllm-0.32.0-py3-none-any.whl"
    info = "vllm-0.32.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", VLLM)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\nvllm = vllm:main\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(scope="module")
def box(machine: Machine, deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine as the page's reader has it: the package lies in root's folder."""
    wheel = make_wheel(tmp_path_factory.mktemp("wheel"))
    machine.put(f"/root/{deb.name}", deb)
    machine.put(f"/srv/wheels/{wheel.name}", wheel)
    machine.put("/etc/pip.conf", "[global]\nno-index = true\nfind-links = /srv/wheels\n")
    machine.run(["apt-get", "update", "-qq"])
    return machine


def test_the_page_has_commands() -> None:
    assert len(BLOCKS) > 12


def test_every_command_works(box: Machine) -> None:
    for number, block in enumerate(BLOCKS, 1):
        box.put("/srv/block", f"cd /root\n{block}")
        try:
            print(box.out(["bash", "-euxo", "pipefail", "/srv/block"], timeout=BLOCK_SECS))
        except Failed as failed:
            raise Failed(f"block {number} of {PAGE.name}:\n{block}\n{failed}") from None
    assert box.processes() == {}
    assert box.run("test -e /etc/llmux -o -e /var/lib/llmux -o -e /var/cache/llmux", check=False).returncode == 1

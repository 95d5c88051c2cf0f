"""What is measured of the box for those that are evicted."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from llmuxd.config import parse_config
from llmuxd.core.eviction import ProcessStrategy as P
from llmuxd.resources import _disk_free_mib, _resident_mib, usable


def config(criu: str, cuda: str):
    return parse_config({"checkpoint": {"criu_path": criu, "cuda_checkpoint_path": cuda}}, environ={})


def test_only_what_there_are_programs_for_can_be_done(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    always = {P.KEEP_RUNNING, P.STOP}
    assert usable(config("/nonexistent/criu", "/nonexistent/cuda")) == always
    assert usable(config(str(program), "/nonexistent/cuda")) == always | {P.CHECKPOINT}
    assert usable(config("/nonexistent/criu", str(program))) == always | {P.CUDA_SUSPEND}
    program.chmod(0o644)
    assert usable(config(str(program), str(program))) == always


def test_the_memory_of_processes_is_their_own_and_one_that_is_gone_has_none() -> None:
    own = psutil.Process().memory_info()
    expected = (own.rss - own.shared) // 2**20
    assert abs(_resident_mib([os.getpid()]) - expected) <= 8
    assert _resident_mib([2**22 + 1]) == 0


def test_the_disk_is_that_of_the_folder_or_of_where_it_would_be(tmp_path: Path) -> None:
    there, not_yet = _disk_free_mib(tmp_path), _disk_free_mib(tmp_path / "images" / "qwen")
    assert there is not None
    assert not_yet is not None
    assert abs(there - not_yet) < 1024, "of the same disk"

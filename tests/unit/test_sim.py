"""The parts of the simulated engine that need no process: ledger, faults, options."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llmuxd.sim import options
from llmuxd.sim.faults import Faults, parse
from llmuxd.sim.ledger import GIB, Ledger, OutOfMemory, start_time


class TestLedger:
    def test_what_does_not_fit_is_refused_and_changes_nothing(self, tmp_path):
        ledger = Ledger.create(tmp_path / "d", 10)
        ledger.hold(os.getpid(), 6)
        ledger.hold(os.getpid(), 9)
        with pytest.raises(OutOfMemory):
            ledger.hold(os.getpid(), 11)
        assert ledger.held() == {os.getpid(): 9}
        assert (ledger.free(), ledger.total) == (1, 10)
        ledger.hold(os.getpid(), 2)
        assert (ledger.free(), ledger.peak()) == (8, 9)

    def test_the_memory_of_a_dead_process_is_free(self, tmp_path):
        ledger = Ledger.create(tmp_path / "d", 10)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        ledger.hold(child.pid, 7)
        with pytest.raises(OutOfMemory):
            ledger.hold(os.getpid(), 4)
        child.kill()
        child.wait()
        ledger.hold(os.getpid(), 4)
        assert ledger.held() == {os.getpid(): 4}
        ledger.hold(child.pid, 1)
        assert ledger.held() == {os.getpid(): 4}, "the dead hold nothing"
        assert start_time(child.pid) is None

    def test_processes_share_it(self, tmp_path):
        path = tmp_path / "d"
        Ledger.create(path, 10**6)
        code = f"""
import os
from pathlib import Path
from llmuxd.sim.ledger import Ledger
ledger = Ledger(Path({str(path)!r}))
for size in range(1, 101):
    ledger.hold(os.getpid(), size * 100)
input()
"""
        children = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) for _ in range(3)]
        try:
            ledger = Ledger(path)
            while sorted(ledger.held().values()) != [10_000] * 3:
                assert all(child.poll() is None for child in children)
            assert ledger.peak() == 30_000
        finally:
            for child in children:
                child.communicate(b"\n")


class TestFaults:
    def test_they_are_read_and_used_up(self, tmp_path):
        file = tmp_path / "f"
        faults = Faults("slow=4, refuse_sleep*2", file)
        assert faults.value("slow", 1.0) == 4.0
        assert [faults.happens("refuse_sleep") for _ in range(3)] == [True, True, False]
        assert not faults.happens("fail_wake")
        file.write_text("fail_wake*1\nhang_health")
        assert [faults.happens("fail_wake") for _ in range(2)] == [True, False]
        assert file.read_text() == "fail_wake*0\nhang_health"
        assert faults.happens("hang_health")
        file.write_text("")
        assert not faults.happens("hang_health")

    @pytest.mark.parametrize("text", ["nonsense", "slow=", "slow=x", "refuse_sleep*", "a b c"])
    def test_wrong_ones_are_named(self, text):
        with pytest.raises(ValueError, match=r"no fault .* there are cut_body"):
            parse(text)


def test_unknown_arguments_of_vllm_are_taken():
    argv = ["serve", "m", "--served-model-name", "a", "b", "--uds", "/s", "--max-model-len", "9", "--enforce-eager"]
    found = options.parse(argv, {"LLMUX_SIM_WEIGHTS_GIB": "2", "VLLM_SERVER_DEV_MODE": "1"})
    assert (found.names, str(found.uds), found.weights, found.development) == (("a", "b"), "/s", 2 * GIB, True)
    assert found.kv_cache(10 * GIB) == 9 * GIB - 2 * GIB - GIB // 2
    with pytest.raises(SystemExit):
        options.parse(["run", "m"], {})

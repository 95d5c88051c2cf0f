"""Spawning, finding and killing process trees: real processes that do what engines' processes do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from llmuxd.engine import proctable, shm
from llmuxd.engine.process import EngineProcess, _send, kill_marked

Spawn = Callable[[str], EngineProcess]

# Each child tells its pid in a file of the working folder and sleeps.
PRELUDE = """
import os, signal, subprocess, sys, time
def tell(name):
    with open(name + ".tmp", "w") as file:
        file.write(str(os.getpid()))
    os.rename(name + ".tmp", name)
def child(name, code="", **options):
    code = open("prelude.py").read() + code + f"\\ntell({name!r}); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code], **options)
"""


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


@pytest.fixture
def spawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spawn]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prelude.py").write_text(PRELUDE)
    made: list[EngineProcess] = []

    def start(code: str) -> EngineProcess:
        process = EngineProcess.spawn([sys.executable, "-c", PRELUDE + code], os.environ, tmp_path / "log")
        made.append(process)
        return process

    yield start
    for process in made:
        process.kill()


def told(name: str) -> proctable.Proc:
    """The process that told its pid under this name."""
    wait_for(lambda: os.path.exists(name), f"{name} runs")
    stat = proctable.read_stat(int(Path(name).read_text()))
    assert stat is not None
    return stat.proc


def gone(proc: proctable.Proc) -> bool:
    return not proctable.is_alive(proc)


def test_it_gets_a_session_a_log_and_no_input(spawn: Spawn, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("an earlier incarnation\n")
    process = spawn("print(os.getsid(0) == os.getpid(), sys.stdin.read() == '', file=sys.stderr)")
    wait_for(lambda: process.ended() is not None, "it ends")
    assert (tmp_path / "log").read_text() == "an earlier incarnation\nTrue True\n"
    assert process.log_start == len("an earlier incarnation\n")


def test_no_descriptor_of_the_daemon_reaches_it(spawn: Spawn, tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)
        process = spawn(
            "print(*(os.readlink(f'/proc/self/fd/{fd}') for fd in '012'), len(os.listdir('/proc/self/fd')))"
        )
        wait_for(lambda: process.ended() is not None, "it ends")
    # The fourth is the listing's own.
    log = str(tmp_path / "log")
    assert (tmp_path / "log").read_text() == f"/dev/null {log} {log} 4\n"


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("sys.exit(0)", "exited with code 0"),
        ("sys.exit(3)", "exited with code 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9 (SIGKILL)"),
    ],
)
def test_how_it_ended(spawn: Spawn, code: str, how: str) -> None:
    process = spawn(code)
    wait_for(lambda: process.ended() is not None, "it ends")
    assert process.ended() == how
    stat = proctable.read_stat(process.pid)
    assert stat is not None
    assert stat.state == "Z", "asking does not reap it"
    process.kill()
    assert proctable.read_stat(process.pid) is None


def test_a_missing_executable_leaves_nothing(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        EngineProcess.spawn([str(tmp_path / "none")], os.environ, tmp_path / "log")
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_whole_tree_is_killed(spawn: Spawn) -> None:
    process = spawn(
        "child('same'); child('deaf', 'signal.signal(signal.SIGTERM, signal.SIG_IGN)')\n"
        "child('group', preexec_fn=os.setpgrp)\n"
        "child('session', start_new_session=True)\n"
        "child('nested', \"child('inner', start_new_session=True)\", start_new_session=True)\n"
        "tell('leader'); time.sleep(600)"
    )
    procs = [told(name) for name in ("leader", "same", "deaf", "group", "session", "nested", "inner")]
    assert set(process.refresh()) == set(procs)
    process.kill()
    assert all(gone(proc) for proc in procs)
    assert proctable.read_stat(process.pid) is None, "it is reaped"
    process.kill()


def test_orphans_of_a_killed_leader_are_killed(spawn: Spawn) -> None:
    process = spawn("child('same'); child('session', start_new_session=True); time.sleep(600)")
    procs = [told("same"), told("session")]
    process.refresh()
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: process.ended() is not None, "the leader ends")
    assert not any(gone(proc) for proc in procs)
    assert set(process.refresh()) == set(procs)
    process.kill()
    assert all(gone(proc) for proc in procs)


def test_an_orphan_that_was_never_seen_is_found_by_its_mark(spawn: Spawn) -> None:
    process = spawn("child('hidden', start_new_session=True)")
    hidden = told("hidden")
    wait_for(lambda: process.ended() is not None, "the leader ends")
    assert process.refresh() == []
    assert process.refresh(thorough=True) == [hidden]
    process.kill()
    assert gone(hidden)


def test_another_engine_and_other_processes_are_left_alone(spawn: Spawn, tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        one = spawn("child('one'); time.sleep(600)")
        two = spawn("child('two'); time.sleep(600)")
        child_of_one, child_of_two = told("one"), told("two")
        one.kill()
        assert gone(child_of_one)
        assert set(two.refresh()) == {two.leader, child_of_two}
        assert two.ended() is None
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_what_a_daemon_in_a_container_has_started_is_left_alone() -> None:
    mark = f"LLMUX_TEST_MARK={os.getpid()}"
    inside = ["unshare", "--pid", "--fork", "--kill-child", "env", mark, "sleep", "60"]
    with subprocess.Popen(inside, stderr=subprocess.DEVNULL) as there:
        try:
            wait_for(lambda: there.poll() is not None or psutil.Process(there.pid).children(), "it runs")
            if there.poll() is not None:
                pytest.skip("namespaces cannot be made here")
            with subprocess.Popen(["env", mark, "sleep", "60"]) as here:
                wait_for(lambda: psutil.Process(here.pid).name() == "sleep", "it runs")
                wait_for(lambda: psutil.Process(there.pid).children()[0].name() == "sleep", "it runs")
                assert kill_marked(mark.encode() + b"\0", [], []) == [here.pid]
            assert there.poll() is None
        finally:
            there.kill()


def test_a_signal_does_not_reach_a_process_that_got_the_pid(spawn: Spawn) -> None:
    process = spawn("time.sleep(600)")
    earlier = proctable.Proc(process.pid, process.leader.start_ticks - 1)
    _send(earlier, signal.SIGKILL)
    _send(process.leader, signal.SIGKILL)
    wait_for(lambda: process.ended() is not None, "the real one ends")


def test_a_zombie_whose_threads_run_is_alive(spawn: Spawn) -> None:
    spawn(
        "import ctypes, threading; threading.Thread(target=time.sleep, args=(600,)).start(); tell('threads')\n"
        "libc = ctypes.PyDLL(None); libc.pthread_exit.argtypes = [ctypes.c_void_p]\n"
        "threading.Thread(target=time.sleep, args=(600,)).start(); libc.syscall(60, 0)"
    )
    proc = told("threads")

    def is_zombie() -> bool:
        stat = proctable.read_stat(proc.pid)
        return stat is not None and stat.state == "Z"

    wait_for(is_zombie, "its first thread has ended")
    assert proctable.is_alive(proc)


def test_a_fork_with_its_parents_title_is_not_vital(spawn: Spawn, tmp_path: Path) -> None:
    script = "import os, time; pid = os.fork(); open('f', 'w').write(str(pid)) if pid else None; time.sleep(600)"
    process = spawn(f"subprocess.Popen([sys.executable, '-c', {script!r}, 'VLLM::EngineCore']); time.sleep(600)")
    wait_for(lambda: len(process.refresh()) == 3, "the child has forked")
    vital = [member for member in process.members().values() if member.vital]
    assert len(vital) == 1
    assert "VLLM::EngineCore" in vital[0].title


def test_shared_memory_of_the_killed_is_removed_and_no_other(spawn: Spawn) -> None:
    theirs = Path(f"{shm.SHM}/llmux-test-theirs-{os.getpid()}")
    used = Path(f"{shm.SHM}/llmux-test-used-{os.getpid()}")
    ours = [Path(f"{shm.SHM}/llmux-test-{kind}-{os.getpid()}") for kind in ("open", "mapped")]
    theirs.write_bytes(b"x" * 4096)
    try:
        process = spawn(
            f"import mmap; theirs = open({str(theirs)!r}, 'r+b'); opened = open({str(ours[0])!r}, 'wb')\n"
            f"used = open({str(used)!r}, 'wb')\n"
            f"file = open({str(ours[1])!r}, 'w+b'); file.truncate(4096); m = mmap.mmap(file.fileno(), 4096)\n"
            "file.close(); tell('ready'); time.sleep(600)"
        )
        told("ready")
        process.note_shared_memory()
        with used.open("rb"):
            process.kill()
            assert sorted(process.remove_shared_memory()) == sorted(str(path) for path in ours)
        assert theirs.exists()
        assert used.exists()
        assert not any(path.exists() for path in ours)
    finally:
        for path in (theirs, used, *ours):
            path.unlink(missing_ok=True)


def test_a_file_is_known_by_its_inode_not_by_its_name() -> None:
    """glibc makes a semaphore under one name, links it to another and removes the first: /proc shows the first."""
    first = f"/dev/shm/llmux-test-{os.getpid()}"
    second = f"{first}.linked"
    mine = proctable.read_stat(os.getpid())
    assert mine is not None
    with open(first, "w"):
        os.link(first, second)
        os.unlink(first)
        used = shm.in_use_by([mine.proc])
        assert second in {path for path, _ in used}
        assert shm.remove_leftovers(used) == [], "somebody uses it"
    assert shm.remove_leftovers({file for file in used if file[0] == second}) == [second]

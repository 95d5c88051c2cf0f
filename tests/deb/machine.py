"""A throw-away Debian with a real systemd as its first process, in systemd-nspawn.

The machine has no network but its own loopback: packages come from folders that are mounted into it, and its port
3000 is nobody else's. Commands are run in it with nsenter, which works whatever state its systemd is in. They are
in its namespaces, but not in a cgroup of its own, which nothing here needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CRIU = "/opt/criu"
BOOT_SECS = 60
PATIENCE_SECS = 60
"""For what takes a second or two where nothing else is done."""
HALT_SECS = 30
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "SYSTEMD_PAGER": "",
}

Command = str | Sequence[str]


class Failed(AssertionError):
    """A command in the machine ended with an error."""


class Machine:
    """One booted machine. Use as a context manager: what it leaves outside is removed at the end.

    With `criu`, a folder that has one, processes can be saved in it.
    """

    def __init__(
        self, tree: Path, runs: Path, *, unified: bool = True, archive: Path | None = None, criu: Path | None = None
    ) -> None:
        self.release = tree.name
        self.unified = unified
        self._tree = tree
        self._archive = archive
        self._criu = criu
        # Named by this process, so that a later run can tell what a killed one left behind.
        self._folder = runs / f"{os.getpid()}-{time.monotonic_ns()}"
        self.root = self._folder / "root"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._init = 0
        self._mounted = False
        self._cgroups: list[Path] = []

    def __enter__(self) -> Machine:
        try:
            self._make_root()
            self._boot()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._end()

    # --- in the machine

    def run(
        self, command: Command, *, check: bool = True, timeout: float = 120, user: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, or a line of shell, and wait for it. Output and errors come together in `stdout`."""
        done = subprocess.run(
            self._argv(command, user),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            env=ENVIRONMENT,
        )
        if check and done.returncode:
            raise Failed(f"[{self.release}] {command} ended with {done.returncode}:\n{done.stdout}\n{self.journal(50)}")
        return done

    def out(self, command: Command, **options: Any) -> str:
        """The output of a command that must succeed, without the last newline."""
        return self.run(command, **options).stdout.rstrip("\n")

    def spawn(self, command: Command, *, user: str | None = None, **options: Any) -> subprocess.Popen[str]:
        """Start a command and do not wait for it; it ends with the machine at the latest."""
        return subprocess.Popen(
            self._argv(command, user), stdin=subprocess.DEVNULL, text=True, env=ENVIRONMENT, **options
        )

    def state(self, unit: str) -> str:
        """A unit's ActiveState: active, activating, deactivating, inactive, failed."""
        return self.show(unit, "ActiveState")

    def show(self, unit: str, name: str) -> str:
        return self.out(["systemctl", "show", "-P", name, unit])

    def main_pid(self, unit: str = "llmuxd.service") -> int:
        return int(self.show(unit, "MainPID"))

    def wait(self, condition: Any, secs: float = PATIENCE_SECS, what: str = "") -> Any:
        """Ask `condition()` until it gives something true; returns that."""
        end = time.monotonic() + secs
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > end:
                raise Failed(f"[{self.release}] not within {secs} s: {what or condition}\n{self.journal(50)}")
            time.sleep(0.05)

    def wait_for_state(self, unit: str, state: str, secs: float = PATIENCE_SECS) -> None:
        self.wait(lambda: self.state(unit) == state, secs, f"{unit} is {self.state(unit)}, wanted {state}")

    def processes(self, user: str = "llmux") -> dict[int, str]:
        """The pids of a user's processes, as the machine sees them, with their command lines."""
        done = self.run(["ps", "-o", "pid=,args=", "-u", user], check=False)
        lines = (line.split(None, 1) for line in done.stdout.splitlines() if line.strip()[:1].isdigit())
        return {int(pid): args for pid, args in lines}

    def create_time(self, pid: int) -> str:
        """When a process began, in the kernel's ticks: with the pid it tells a process from any other."""
        return self.out(["cat", f"/proc/{pid}/stat"]).rsplit(")", 1)[1].split()[19]

    def journal(self, lines: int = 200, *matches: str) -> str:
        done = subprocess.run(
            self._argv(["journalctl", "--no-pager", "-b", "-n", str(lines), *matches], None),
            capture_output=True,
            text=True,
            errors="replace",
            env=ENVIRONMENT,
        )
        return done.stdout

    def entries(self, *matches: str) -> list[dict[str, Any]]:
        """The journal's entries with all their fields, for example `entries("-u", "llmuxd", "MODEL=qwen")`."""
        done = self.run(["journalctl", "--no-pager", "-b", "-o", "json", *matches])
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    # --- files

    def path(self, path: str) -> Path:
        """Where a file of the machine's disk is seen from outside. /run, /tmp and /dev/shm are not on its disk."""
        return self.root / path.lstrip("/")

    def put(self, path: str, content: str | bytes | Path, mode: int = 0o644) -> None:
        """Write a file, or copy one from outside."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_bytes(content.encode() if isinstance(content, str) else content)
        target.chmod(mode)

    # --- packages

    def add_package(self, deb: Path) -> None:
        """Put a package into the machine's own archive, from where `apt-get install` takes it."""
        local = self.path("/srv/local")
        local.mkdir(parents=True, exist_ok=True)
        shutil.copy(deb, local)
        index(local)
        self.put("/etc/apt/sources.list.d/local.list", "deb [trusted=yes] file:/srv/local ./\n")
        self.run(["apt-get", "update", "-qq"])

    def install(self, deb: Path) -> str:
        """Install, or upgrade to, a package with apt. Returns what apt and the package's scripts said."""
        self.add_package(deb)
        name, version = deb.name.split("_")[:2]
        return self.out(["apt-get", "install", "-y", "-q", f"{name}={version}"], timeout=600)

    # --- outside

    def _make_root(self) -> None:
        upper, work = self._folder / "upper", self._folder / "work"
        for folder in (self.root, upper, work):
            folder.mkdir(parents=True)
        options = f"lowerdir={self._tree},upperdir={upper},workdir={work}"
        mounted = subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", options, str(self.root)], stderr=subprocess.DEVNULL
        )
        self._mounted = mounted.returncode == 0
        if not self._mounted:
            # No overlay on this file system, as in most containers: a copy takes seconds more.
            copied = ["cp", "-a", "--reflink=auto", f"{self._tree}/.", str(self.root)]
            subprocess.run(copied, check=True)
        sources = self.path("/etc/apt/sources.list")
        sources.write_text("deb [trusted=yes] file:/srv/archive ./\n" if self._archive else "")
        # Timers that start apt in the middle of a test would hold its lock.
        for unit in ("apt-daily.timer", "apt-daily-upgrade.timer"):
            link = self.path(f"/etc/systemd/system/{unit}")
            link.unlink(missing_ok=True)
            link.symlink_to("/dev/null")

    def _boot(self) -> None:
        argv = ["systemd-nspawn", "--register=no", "--keep-unit", "--quiet", "--private-network", "--boot"]
        # By name, so that a machine is told from others in its own log; the folder's name is unique.
        argv += ["--machine", f"llmux-{self._folder.name}", "--hostname", "llmux-test", "-D", str(self.root)]
        if self._archive:
            argv.append(f"--bind-ro={self._archive}:/srv/archive")
        environ = os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": str(int(self.unified))}
        if self._criu:
            argv += ["--capability=CAP_CHECKPOINT_RESTORE", f"--bind-ro={self._criu}:{CRIU}"]
            # A process under a system call filter, as nspawn's is, may not save another that is under one.
            environ["SYSTEMD_SECCOMP"] = "0"
        self._cgroups = make_cgroups(f"llmux-{self._folder.name}")
        entering = ["sh", "-c", 'for group; do shift; [ "$group" != -- ] || break; echo $$ >"$group"; done; exec "$@"']
        entering += ["sh", *(str(group / "cgroup.procs") for group in self._cgroups), "--"]
        with (self._folder / "console").open("wb") as console:
            # If this process is killed, nspawn goes too, and with it the machine.
            self._nspawn = subprocess.Popen(
                [*entering, "setpriv", "--pdeathsig", "KILL", *argv],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
                env=environ,
            )
        end = time.monotonic() + BOOT_SECS
        while not self._is_up():
            if self._nspawn.poll() is not None or time.monotonic() > end:
                text = (self._folder / "console").read_text(errors="replace")
                raise Failed(f"[{self.release}] the machine did not boot:\n{text[-3000:]}")
            time.sleep(0.1)

    def _is_up(self) -> bool:
        assert self._nspawn is not None
        if not self._init:
            self._init = _first_process_below(self._nspawn.pid)
        if not self._init:
            return False
        with contextlib.suppress(subprocess.SubprocessError):
            asked = self.run(["systemctl", "is-system-running"], check=False, timeout=10)
            return asked.stdout.strip() in ("running", "degraded")
        return False

    def _argv(self, command: Command, user: str | None) -> list[str]:
        inner = ["sh", "-c", command] if isinstance(command, str) else list(command)
        if user is not None:
            inner = ["runuser", "-u", user, "--", *inner]
        # In the working directory of that first process: the one of this process is not in the machine.
        return ["nsenter", "--target", str(self._init), "--all", "--wd", *inner]

    def _end(self) -> None:
        nspawn = self._nspawn
        if nspawn is not None:
            if self._init and nspawn.poll() is None:
                with contextlib.suppress(subprocess.SubprocessError, OSError):
                    # SIGRTMIN+4 is "power off" to systemd.
                    os.kill(self._init, signal.SIGRTMIN + 4)
                    nspawn.wait(HALT_SECS)
            if nspawn.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(nspawn.pid, signal.SIGKILL)
                # The first process of a pid namespace takes all others of it along.
                if self._init and _is_init(self._init):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self._init, signal.SIGKILL)
                nspawn.wait()
            self._nspawn = None
        for group in self._cgroups:
            remove_cgroup(group)
        self._cgroups = []
        remove(self._folder)


def remove(folder: Path) -> None:
    """Unmount and remove the folder of a run."""
    for _ in range(50):
        root = str(folder / "root")
        if not os.path.ismount(root) or subprocess.run(["umount", root], stderr=subprocess.DEVNULL).returncode == 0:
            break
        time.sleep(0.1)
    else:
        raise RuntimeError(f"{folder}/root cannot be unmounted")
    shutil.rmtree(folder)


def remove_leftovers(runs: Path) -> None:
    """Remove what runs left that were killed."""
    for folder in runs.glob("*-*"):
        if not Path(f"/proc/{folder.name.split('-')[0]}").exists():
            remove(folder)


def index(folder: Path) -> None:
    """Make a folder of packages an archive that apt can use."""
    scan = ["dpkg-scanpackages", "--multiversion", "."]
    done = subprocess.run(scan, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    (folder / "Packages").write_text(done.stdout)


def download(tree: Path, deb: Path, archive: Path, extra: Sequence[str] = ()) -> None:
    """Fetch what a package needs and recommends, from the release's own archive, into a folder."""
    partial = archive.with_name(f"{archive.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "partial").mkdir(parents=True)
    script = "apt-get update -qq && apt-get install -y -qq --download-only -o Dir::Cache::archives=/srv/archive " + (
        shlex.join([f"/srv/{deb.name}", *extra])
    )
    argv = [
        "systemd-nspawn",
        "--register=no",
        "--keep-unit",
        "--quiet",
        "--volatile=overlay",
        "-D",
        str(tree),
        "--resolv-conf=replace-host",
    ]
    argv += [f"--bind={partial}:/srv/archive", f"--bind-ro={deb}:/srv/{deb.name}", "sh", "-c", script]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(f"the packages that {deb.name} needs cannot be fetched:\n{done.stdout}{done.stderr}")
    shutil.rmtree(partial / "partial", ignore_errors=True)
    (partial / "lock").unlink(missing_ok=True)
    (partial / deb.name).unlink(missing_ok=True)
    index(partial)
    partial.rename(archive)


def make_cgroups(name: str) -> list[Path]:
    """A control group of that name below this process's own, in the hierarchies that a machine's systemd uses.

    Without it, machines that run at the same time would share theirs, and end each other's processes.
    """
    mounts = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options):
            mounts["" if kind == "cgroup2" else "name=systemd"] = Path(before.split()[4])
    made = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, hierarchy, path = line.split(":", 2)
        if hierarchy in mounts:
            group = mounts[hierarchy] / path.lstrip("/") / name
            group.mkdir()
            made.append(group)
    return made


def remove_cgroup(group: Path) -> None:
    """Remove a group and what a machine has made below it, once nothing runs there any more."""
    end = time.monotonic() + HALT_SECS
    while group.exists():
        for folder in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            group.rmdir()
        if time.monotonic() > end:
            raise Failed(f"{group} cannot be removed: something runs in it")


def _first_process_below(pid: int) -> int:
    """The first process of the pid namespace that a child of `pid` opened, or 0."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if _is_init(int(child)):
                return int(child)
    return 0


def _is_init(pid: int) -> bool:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                ids = line.split()[1:]
                return len(ids) > 1 and ids[-1] == "1"
    return False

#!/usr/bin/python3
"""What a process may do under the sandbox of llmuxd.service: tries it, and writes it down as JSON."""

import ctypes
import errno
import grp
import json
import mmap
import os
import resource
import socket
from pathlib import Path

PTRACE_ATTACH = 16

libc = ctypes.CDLL(None, use_errno=True)
SYSCALLS = {
    "x86_64": {
        "get_mempolicy": 239,
        "set_mempolicy": 238,
        "mbind": 237,
        "io_uring_setup": 425,
        "bpf": 321,
        "ptrace": 101,
        "mount": 165,
        "unshare": 272,
    },
    "aarch64": {
        "get_mempolicy": 236,
        "set_mempolicy": 237,
        "mbind": 235,
        "io_uring_setup": 425,
        "bpf": 280,
        "ptrace": 117,
        "mount": 40,
        "unshare": 97,
    },
}[os.uname().machine]


def syscall(name, *args):
    if libc.syscall(SYSCALLS[name], *args) < 0:
        raise OSError(ctypes.get_errno(), name)


def tried(action, *args):
    try:
        action(*args)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "ok"


def new_user_namespace():
    """In a child, for a process that is in one is somebody else to the files that are tried next."""
    child = os.fork()
    if not child:
        try:
            syscall("unshare", 0x10000000)
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    number = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if number:
        raise OSError(number, "unshare")


def write(folder):
    path = os.path.join(folder, f"llmux-probe-{os.getpid()}")
    with open(path, "w") as file:
        file.write("x")
    os.unlink(path)


def lock(size):
    area = mmap.mmap(-1, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)) < 0:
        raise OSError(ctypes.get_errno(), "mlock")


def bind_memory():
    area = mmap.mmap(-1, 1 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    syscall("mbind", ctypes.c_void_p(address), ctypes.c_ulong(1 << 20), 0, None, 0, 0)


def shared_memory():
    from multiprocessing import shared_memory

    memory = shared_memory.SharedMemory(create=True, size=1 << 20)
    memory.close()
    memory.unlink()


def status_of(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


status = status_of("self")
write_and_run = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
seen = {
    "open a GPU of NVIDIA": tried(open, "/dev/nvidia0", "rb+", 0),
    "open a GPU of AMD": tried(open, "/dev/dri/renderD128", "rb+", 0),
    "map memory to write and run": tried(lambda: mmap.mmap(-1, 4096, prot=write_and_run)),
    "lock 64 MiB": tried(lock, 64 << 20),
    "get_mempolicy": tried(syscall, "get_mempolicy", None, None, 0, None, 0),
    "set_mempolicy": tried(syscall, "set_mempolicy", 0, None, 0),
    "mbind": tried(bind_memory),
    "sched_setaffinity": tried(lambda: os.sched_setaffinity(0, os.sched_getaffinity(0))),
    "shared memory": tried(shared_memory),
    "pidfd_open": tried(lambda: os.close(os.pidfd_open(os.getpid()))),
    "netlink": tried(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()),
    "read /proc/meminfo": tried(Path("/proc/meminfo").read_text),
    "write TMPDIR": tried(lambda: write(os.environ["TMPDIR"])),
    "groups": sorted(grp.getgrgid(gid).gr_name for gid in {os.getgid(), *os.getgroups()}),
    "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "io_uring_setup": tried(syscall, "io_uring_setup", 0, None),
    "bpf": tried(syscall, "bpf", 0, None, 0),
    "ptrace": tried(syscall, "ptrace", PTRACE_ATTACH, 0, 0, 0),
    "mount": tried(syscall, "mount", None, None, None, 0, None),
    "new user namespace": tried(new_user_namespace),
    "packet socket": tried(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()),
    "list /home/alice": tried(os.listdir, "/home/alice"),
    "capabilities": status["CapBnd"],
    "system call filters": status["Seccomp_filters"],
    "new privileges": status["NoNewPrivs"],
}
for folder in (
    "/tmp",
    "/var/tmp",
    "/dev/shm",
    "/run/llmux",
    "/var/lib/llmux",
    "/var/cache/llmux",
    "/usr",
    "/etc",
    "/opt",
):
    seen[f"write {folder}"] = tried(write, folder)
with open("/var/lib/llmux/probe.json", "w") as file:
    json.dump(seen, file, indent=2)

"""The files that a saved process needs and that may not be there any more when it comes back.

They are those in /dev/shm, which go with the boot of the machine and are removed after a killed engine; and those that
it holds in folders for temporary files and for what compilers leave: a JIT's cache is emptied, and /tmp is swept. They
are copied beside the image, with holes where they have some and with the names that they share, and put back before a
restore. CRIU gives a file there a further name in a dump (link_remap.N), and takes it away in the restore.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

SHM = Path("/dev/shm")
_CACHES = (
    "VLLM_CACHE_ROOT",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "FLASHINFER_WORKSPACE_BASE",
    "CUDA_CACHE_PATH",
    "TMPDIR",
)
_CACHE_FOLDERS = ("vllm", "torch", "flashinfer", "triton", "tvm-ffi", "outlines")
"""In a user's folder for caches. A whole venv may lie there, too."""
_DELETED = " (deleted)"
_CHUNK = 2**20


def held_by(pids: Iterable[int]) -> set[Path]:
    """The regular files that the processes have open or mapped. Reads /proc: call it from a thread."""
    found: set[str] = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
                found.update(line.split(None, 5)[5].rstrip("\n") for line in maps if line.count(" ") and "/" in line)
            found.update(os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd"))
        except (OSError, IndexError):
            continue
    paths = (Path(name) for name in found if name.startswith("/") and not name.endswith(_DELETED))
    return {path for path in paths if not path.is_relative_to("/dev") and path.is_file()}


def is_ephemeral(path: Path, env: Mapping[str, str]) -> bool:
    """Whether it lies where files come and go."""
    home = Path(env.get("HOME", "/"))
    cache = Path(env.get("XDG_CACHE_HOME") or home / ".cache")
    folders = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"), home / ".triton", home / ".nv"]
    folders += [cache / name for name in _CACHE_FOLDERS]
    folders += [Path(env[name]) for name in _CACHES if env.get(name)]
    return any(path.is_relative_to(folder) for folder in folders) and "site-packages" not in path.parts


def shared_memory_of(inodes: Collection[int]) -> list[Path]:
    """The names in /dev/shm of an engine's own files, those that CRIU has given to them in the dump among them."""
    with os.scandir(SHM) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.inode() in inodes)


def save(paths: Iterable[Path], folder: Path) -> dict[Path, Path]:
    """Copy the files into the folder; what is where. Raises OSError. Names of the same file stay that."""
    folder.mkdir()
    saved: dict[Path, Path] = {}
    first: dict[tuple[int, int], Path] = {}
    for number, path in enumerate(paths):
        copy = folder / f"{number:04}"
        found = path.stat()
        twin = first.setdefault((found.st_dev, found.st_ino), copy)
        if twin != copy:
            os.link(twin, copy)
        else:
            copy_sparse(path, copy)
        saved[path] = copy
    return saved


def put_back(saved: Mapping[Path, Path]) -> None:
    """Undo `save`: each file is replaced by its copy.

    Raises OSError; PermissionError, which is one, where somebody else might lead it to another place, or change what
    was put back.
    """
    first: dict[tuple[int, int], Path] = {}
    for path, copy in saved.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_way_to(path)
        found = copy.stat()
        twin = first.setdefault((found.st_dev, found.st_ino), path)
        new = path.with_name(f"{path.name}.llmux-new")
        new.unlink(missing_ok=True)
        if twin != path:
            os.link(twin, new)
        else:
            copy_sparse(copy, new)
        new.replace(path)


def _check_way_to(path: Path) -> None:
    """Folders and links on the way to it have to be ours or root's: in /tmp anyone could have made them."""
    for step in path.parents:
        found = step.lstat()
        open_to_all = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
        if found.st_uid not in (0, os.geteuid()) or open_to_all:
            raise PermissionError(errno.EPERM, "others can change what is there", str(step))


def copy_sparse(source: Path, target: Path) -> None:
    """Copy content, owner, mode and times, and no holes, to where nothing is yet. Raises OSError."""
    with source.open("rb", buffering=0) as reading, target.open("xb", buffering=0) as writing:
        size = os.fstat(reading.fileno()).st_size
        at = 0
        while at < size:
            try:
                at = os.lseek(reading.fileno(), at, os.SEEK_DATA)
            except OSError:
                break  # Only holes are left.
            end = os.lseek(reading.fileno(), at, os.SEEK_HOLE)
            while at < end:
                data = os.pread(reading.fileno(), min(_CHUNK, end - at), at)
                if not data:
                    break
                at += os.pwrite(writing.fileno(), data, at)
        os.ftruncate(writing.fileno(), size)
        found = os.fstat(reading.fileno())
        os.fchmod(writing.fileno(), found.st_mode & 0o7777)
        os.chown(writing.fileno(), found.st_uid, found.st_gid)
        os.utime(writing.fileno(), ns=(found.st_atime_ns, found.st_mtime_ns))

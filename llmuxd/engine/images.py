"""The images of one model: its engine is saved to a new one, and restored from the newest that fits.

Each is a folder of its own, named by its generation, in the folder of the model: `criu/` is CRIU's, `files/` what was
kept beside, and the manifest, written last, makes it complete. When to save and to restore is the core's to decide.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.engine import ephemeral, shm
from llmuxd.engine.criu import Criu, CriuError
from llmuxd.engine.errors import EngineError
from llmuxd.engine.manifest import NAME, PARTIAL, FileState, Host, Manifest, Subject, first_changed, states_of
from llmuxd.engine.proctable import Proc, read_stat
from llmuxd.engine.restoring import Begun, end_half_restored, taken, threads_in
from llmuxd.engine.spec import TOKEN_ENV, EngineSpec, make_private_folder
from llmuxd.tasks import finish

GENERATIONS = 2
"""How many images are kept until the newest has restored an engine."""

_SPARE = 1.1
"""An image takes so many times the memory that is saved, at most."""

_UNFINISHED = ".unfinished"
_GENERATION = re.compile(rf"\d{{8}}T\d{{6}}\.\d{{6}}({_UNFINISHED}|{PARTIAL})?")
_REFUSED = "refused"
_CRIU, _FILES = "criu", "files"
_GIB, _GB = 2**30, 1e9

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Image:
    """A complete one."""

    folder: Path
    manifest: Manifest

    @property
    def generation(self) -> str:
        return self.manifest.generation

    @property
    def subject(self) -> Subject:
        return self.manifest.subject

    @property
    def eviction(self) -> EvictionPolicy:
        """The policy that it was made by: waking what is restored undoes its weights' part."""
        return self.manifest.eviction


class Images:
    """Those of one model, in `folder`, and the one at `given`, if the config names one.

    With `keep` an image is there for another time after it has restored an engine.
    """

    def __init__(self, folder: Path, criu: Criu, keep: bool, given: Path | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self._criu = criu
        self._given = given
        self._refused: set[Path] = set()
        """Those of others, which are not ours to mark."""

    # Which there are

    def newest(self) -> Image | None:
        """The newest complete one that was not refused, else the given one. Reads the disk."""
        found = [image for image in self._own() if not (image.folder / _REFUSED).exists()]
        given = [] if self._given is None else [_read(self._given)]
        usable = [image for image in (*found, *given) if image is not None and image.folder not in self._refused]
        return usable[0] if usable else None

    def _own(self) -> list[Image]:
        """The newest first."""
        if not _is_private(self.folder):
            return []
        names = sorted((path.name for path in self.folder.iterdir()), reverse=True)
        images = (_read(self.folder / name) for name in names if not name.endswith((_UNFINISHED, PARTIAL)))
        return [image for image in images if image is not None]

    def is_own(self, image: Image) -> bool:
        """Whether it was made, or fetched, into the folder of the model."""
        return image.folder.parent == self.folder

    def clean(self, *, fetched: bool) -> None:
        """Remove what interrupted dumps and removals have left, and, with `fetched`, downloads that were cut off. None
        may be under way."""
        if not _is_private(self.folder):
            return
        for path in list(self.folder.iterdir()):
            named = _GENERATION.fullmatch(path.name)
            if named is None or (named[1] == PARTIAL and not fetched):
                continue
            if named[1] or not (path / NAME).exists():
                shutil.rmtree(path, ignore_errors=True)

    def refuse(self, image: Image, reason: str) -> None:
        """It is not tried again, and goes with the next dump; one that is another host's, or given, stays as it is."""
        foreign = image.manifest.host.machine_id != Host.here().machine_id
        if foreign or not self.is_own(image):
            self._refused.add(image.folder)
            return
        try:
            (image.folder / _REFUSED).write_text(reason + "\n")
            # It may be in an object store, and the folder goes before it does.
            _mark_of(self.folder, image.generation).touch()
        except OSError:
            self._refused.add(image.folder)

    # Saving

    async def dump(
        self, pids: Collection[int], subject: Subject, timeout: float, tell: Callable[[str], None] = lambda text: None
    ) -> Image:
        """Save the engine with these processes; they are gone then.

        Raises EngineError: of kind NOT_CHECKPOINTED if the engine goes on as before, of another if CRIU was ended in
        the middle of it.
        """
        began = time.time()
        generation = time.strftime("%Y%m%dT%H%M%S", time.gmtime(began)) + f".{int(began % 1 * 1e6):06}"
        partial = self.folder / (generation + _UNFINISHED)
        given_up = threading.Event()
        try:
            make_private_folder(self.folder)
            if not _is_private(self.folder):
                raise EngineError(FailureKind.NOT_CHECKPOINTED, f"{self.folder} or its parent is not ours alone")
            await asyncio.to_thread(self._make_room, pids)
            (partial / _CRIU).mkdir(parents=True)
            version = await self._criu.version()
            previous = await asyncio.to_thread(self._own)
            known = previous[0].manifest.held if previous and _same_boot(previous[0]) else ()
            held, kept, shared = await asyncio.to_thread(_files_of, pids, Path(subject.log_path))
            tell(f"saving {len(pids)} processes to {partial.with_suffix('')}")
            # Reading files and writing memory hardly hinder each other.
            reading = asyncio.ensure_future(asyncio.to_thread(states_of, held, known, None, given_up))
            await self._criu.dump(subject.pid, partial / _CRIU, timeout)
            made = _Made(generation, began, subject, version, tuple(pids), await reading)
        except (CriuError, OSError, EngineError) as error:
            given_up.set()
            reason = error.reason if isinstance(error, (CriuError, EngineError)) else f"{partial}: {error}"
            interrupted = isinstance(error, CriuError) and error.interrupted
            await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
            kind = FailureKind.REFUSED if interrupted else FailureKind.NOT_CHECKPOINTED
            raise EngineError(kind, reason) from error
        except BaseException:
            given_up.set()
            await finish(asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True), "remove half an image")
            raise
        completing = asyncio.ensure_future(asyncio.to_thread(self._complete, partial, made, kept, shared, given_up))
        try:
            image = await asyncio.shield(completing)
        except OSError as error:
            await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
            raise EngineError(FailureKind.REFUSED, f"the image cannot be completed: {error}") from error
        except BaseException:
            given_up.set()
            await finish(_discard(completing, partial), "remove half an image")
            raise
        secs = image.manifest.seconds
        tell(f"saved {image.manifest.size / _GB:.1f} GB in {secs:.1f} s to {image.folder}")
        return image

    def _make_room(self, pids: Collection[int]) -> None:
        """Raises EngineError if the disk has no room for the image."""
        # What is saved now is newer than anything that was being fetched.
        self.clean(fetched=True)
        needed = _SPARE * sum(map(_resident, pids))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            need, has = f"{needed / _GIB:.1f} GiB", f"{free / _GIB:.1f} GiB"
            raise EngineError(
                FailureKind.NOT_CHECKPOINTED,
                f"the image may need {need}, and {self.folder} has room for {has}; see checkpoint.images_dir",
            )

    def _complete(
        self, partial: Path, made: _Made, kept: Collection[Path], shared: Collection[int], given_up: threading.Event
    ) -> Image:
        """Add what belongs to the image, and the manifest at the end. Raises OSError, also once `given_up` is set."""
        memory = ephemeral.shared_memory_of(shared)
        saved = ephemeral.save((*kept, *memory), partial / _FILES)
        for path in memory:
            path.unlink(missing_ok=True)
        kept_states = tuple(
            FileState(str(path), state.size, state.sha256, ())
            for path, state in zip(saved, _all_states_of(saved.values(), None, given_up), strict=True)
        )
        content = _all_states_of(sorted(p for p in partial.rglob("*") if p.is_file()), partial, given_up)
        seconds = round(time.time() - made.began, 3)
        manifest = Manifest(
            generation=made.generation,
            created=round(made.began, 3),
            seconds=seconds,
            subject=made.subject,
            host=Host.here(),
            criu=made.criu,
            pids=made.pids,
            held=tuple(made.held),
            kept=kept_states,
            content=tuple(content),
        )
        # What the disk may lose in a crash of the machine is found out by its hash.
        (partial / NAME).write_text(manifest.as_json())
        folder = partial.with_name(made.generation)
        if given_up.is_set():
            raise InterruptedError(errno.EINTR, "given up", str(partial))
        partial.rename(folder)
        self._prune(GENERATIONS)
        return Image(folder, manifest)

    def _prune(self, count: int) -> None:
        """Leave so many of those that can be used."""
        left = count
        own = self._own()
        for mark in self.folder.glob(f"*.{_REFUSED}"):
            if own and mark.name < own[0].folder.name:
                mark.unlink(missing_ok=True)
        for image in own:
            if image.manifest.host.machine_id != Host.here().machine_id:
                continue
            if left and not (image.folder / _REFUSED).exists():
                left -= 1
            else:
                _remove(image.folder)

    # Restoring

    def objections(
        self, image: Image, spec: EngineSpec, fingerprint: str, given_up: threading.Event | None = None
    ) -> str:
        """Why the image may not be restored here and now; empty if nothing speaks against it. May read all of it, until
        `given_up` is set: what is returned then means nothing."""
        manifest, here = image.manifest, Host.here()
        subject, there = manifest.subject, manifest.host
        if there.machine_id != here.machine_id:
            return "it was made on another machine"
        if there.kernel != here.kernel:
            return f"it was made under Linux {there.kernel}, and this is {here.kernel}"
        if there.driver != here.driver:
            return f"it was made with {there.driver or 'no driver'}, and this is {here.driver or 'none'}"
        if subject.model != spec.name or subject.fingerprint != fingerprint:
            return "the model was configured otherwise when it was made"
        same_boot = there.boot_id == here.boot_id
        changed = first_changed(manifest.held, None, same_boot=same_boot, given_up=given_up)
        if changed is not None:
            return f"{changed.path} has changed since it was made"
        damaged = first_changed(manifest.content, image.folder, same_boot=same_boot, given_up=given_up)
        if damaged is not None:
            return f"{damaged.path} of it is damaged"
        return ""

    async def restore(self, image: Image, timeout: float, enter: Callable[[int], bool]) -> int:
        """Bring the engine back, as it was; the pid of its first process.

        `enter` is called with CRIU's, and says whether that is in a control group of the engine's own then.

        Raises EngineError: REFUSED if the image is not good for it, DIED if it was hindered. Nothing of the engine is
        there then, nor after a cancellation.
        """
        manifest = image.manifest
        mark = {TOKEN_ENV: manifest.subject.token}
        files = {Path(file.path): image.folder / _FILES / f"{n:04}" for n, file in enumerate(manifest.kept)}
        shm_before = shm.existing()
        begun: Begun | None = None

        def began(criu: int) -> None:
            nonlocal begun
            begun = Begun.of(criu, enter(criu))

        try:
            await asyncio.to_thread(ephemeral.put_back, files)
            number = await taken({*manifest.pids, *threads_in(image.folder / _CRIU)})
            if number is not None:
                raise EngineError(FailureKind.DIED, f"its process number {number} is taken by another process")
            return await self._criu.restore(image.folder / _CRIU, timeout, mark, began)
        except BaseException as error:
            if begun is not None:
                # Without a CRIU nothing has come back, and the numbers are somebody else's.
                ending = asyncio.to_thread(end_half_restored, manifest.subject, begun, shm_before)
                await finish(ending, "end what came back")
            for path in files:
                if path.is_relative_to(ephemeral.SHM):
                    path.unlink(missing_ok=True)
            if isinstance(error, CriuError):
                hindered = error.interrupted or begun is None
                raise EngineError(FailureKind.DIED if hindered else FailureKind.REFUSED, error.reason) from error
            if isinstance(error, (OSError, ValueError)):
                # A full disk, a folder that may not be written: the image is as good as before.
                raise EngineError(FailureKind.DIED, f"it cannot be put back: {error}") from error
            raise

    async def confirm(self, image: Image) -> None:
        """The engine that was restored from it serves: those before it are not needed any more, nor it, if images are
        not kept."""
        if not self.is_own(image):
            return
        await asyncio.to_thread(self._prune, 1 if self.keep else 0)


@dataclass(frozen=True, slots=True)
class _Made:
    """What is known of an image before it is complete."""

    generation: str
    began: float
    subject: Subject
    criu: str
    pids: tuple[int, ...]
    held: Collection[FileState]


def was_refused(folder: Path, generation: str) -> bool:
    """Whether the image of a model with that folder was refused here, though it may be there no more."""
    return _mark_of(folder, generation).exists()


def _mark_of(folder: Path, generation: str) -> Path:
    return folder / f"{generation}.{_REFUSED}"


def is_there(image: Image) -> bool:
    """Whether an image that was found is still complete, and can be read. Reads the disk."""
    try:
        return (image.folder / NAME).exists()
    except OSError:
        return False


def _read(folder: Path) -> Image | None:
    """None if it is not there, not complete, or not to be trusted."""
    try:
        if not _is_private(folder):
            return None
        return Image(folder, Manifest.from_json((folder / NAME).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s is no image: %s", folder, error)
        return None


def _all_states_of(paths: Iterable[Path], folder: Path | None, given_up: threading.Event) -> list[FileState]:
    """Of all of them. Raises OSError if one cannot be read."""
    names = list(paths)
    states = states_of(names, relative_to=folder, given_up=given_up)
    if len(states) < len(names):
        raise OSError(errno.EIO, "not every file of the image can be read", str(folder or names[0]))
    return states


async def _discard(completing: asyncio.Future[Image], partial: Path) -> None:
    """Remove an image that was given up when it was nearly complete. One that is complete by now stays: it is good."""
    await asyncio.wait([completing])
    await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove an image. One that is cut off in the middle of it is none any more."""
    unfinished = folder.with_name(folder.name + _UNFINISHED)
    try:
        folder.rename(unfinished)
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder, error)
        return
    shutil.rmtree(unfinished, ignore_errors=True)


def _is_private(folder: Path) -> bool:
    """Whether nobody but this user and root can have put something into the folder: what is restored runs as we do."""
    for path, may_be_root in ((folder, False), (folder.parent, True)):
        try:
            found = path.stat()
        except OSError:
            return False
        owners = {os.geteuid(), 0} if may_be_root else {os.geteuid()}
        open_to_all = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in owners or open_to_all:
            return False
    return True


def _files_of(pids: Collection[int], log_path: Path) -> tuple[list[Path], list[Path], set[int]]:
    """What the processes hold: the files that have to be as they are, those to be kept, and the inodes of those in
    shared memory."""
    log_path = log_path.resolve()
    # Its log grows, and may have been rotated away under another name.
    logs = str(log_path)
    held = {path for path in ephemeral.held_by(pids) if not str(path).startswith(logs)}
    env = _environment_of(pids)
    kept = sorted(path for path in held if ephemeral.is_ephemeral(path, env))
    fixed = held - set(kept)
    for site in {parent for path in fixed for parent in path.parents if parent.name == "site-packages"}:
        # Nobody holds vLLM's Python code open; its version stands here.
        fixed.update(site.glob("vllm*.dist-info/METADATA"))
    return sorted(fixed), kept, shm.inodes_in_use_by(_procs(pids))


def _procs(pids: Collection[int]) -> list[Proc]:
    stats = (read_stat(pid) for pid in pids)
    return [found.proc for found in stats if found is not None]


def _environment_of(pids: Collection[int]) -> Mapping[str, str]:
    for pid in sorted(pids):
        try:
            env = psutil.Process(pid).environ()
        except psutil.Error:
            continue
        if TOKEN_ENV in env:
            return env
    return os.environ


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _same_boot(image: Image) -> bool:
    return image.manifest.host.boot_id == Host.here().boot_id

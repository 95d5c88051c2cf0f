"""Images in the object store: sent there after they were made, fetched from there before they are needed.

What is sent goes on in the background, one image at a time, and is begun again where it was cut off. What cannot be
fetched, or not in time, is told, and the local image counts. The store itself is in `llmuxd.engine.object_store`.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llmuxd.config import CheckpointConfig
from llmuxd.engine.images import Image, was_refused
from llmuxd.engine.object_store import Cancelled, ObjectStore, RemoteImage, StoreError
from llmuxd.engine.spec import make_private_folder
from llmuxd.tasks import in_thread

RETRY_SECS = 60.0
"""How long after a failure an image is sent again."""

LOOK_SECS = 10.0
"""How long a wake waits for the store to say what it has. If it did not, those of the next `RETRY_SECS` do not wait."""

KEPT = 2
"""Generations of a model that the store keeps."""

T = TypeVar("T")

Tell = Callable[[str], None]


class Depot:
    """One store and its traffic, in one event loop. Without a store in the config everything here does nothing.

    The store is used in threads, which end some time after they were given up; nothing waits for them.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self._store = None if config.object_store is None else ObjectStore(config.object_store)
        self._under_way: set[threading.Event] = set()
        """What is set to give up what is under way."""
        self._sending: dict[str, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._fetching: dict[str, threading.Lock] = defaultdict(threading.Lock)
        """By model: one that was given up may still write, and the next goes on with what it leaves."""
        self._silent_until = 0.0

    def send(self, model: str, image: Image, tell: Tell) -> None:
        """Have an image of a model in the store, sooner or later. A newer one takes its place."""
        if self._store is None:
            return
        before = self._sending.get(model)
        if before is not None:
            before.cancel()
        task = asyncio.create_task(self._send(self._store, model, image, tell), name=f"send the image of {model}")
        self._sending[model] = task

    async def _send(self, store: ObjectStore, model: str, image: Image, tell: Tell) -> None:
        while image.folder.exists():
            try:
                async with self._one_at_a_time:
                    await self._until_cancelled(lambda gives_up: store.upload(image.folder, model, tell, gives_up))
                    await self._until_cancelled(lambda _gives_up: store.remove_stale(model, KEPT))
                return
            except (FileNotFoundError, Cancelled):
                return  # It was removed meanwhile, and a newer one comes.
            except (StoreError, OSError) as error:
                again = f"it is tried again in {RETRY_SECS:.0f} s"
                tell(f"image {image.generation} is not in the store yet: {error}; {again}")
            await asyncio.sleep(RETRY_SECS)

    async def fetch(self, model: str, folder: Path, local: Image | None, timeout: float, tell: Tell) -> None:
        """Bring the store's newest image of a model into the folder of its images, if it is newer than `local`, within
        `timeout` seconds in all; what was not brought by then is gone on with the next time."""
        store = self._store
        if store is None:
            return
        loop = asyncio.get_running_loop()
        if local is not None and loop.time() < self._silent_until:
            return
        counts = "there is no local image" if local is None else f"the local image {local.generation} counts"
        try:
            until = loop.time() + timeout
            self._silent_until = loop.time() + RETRY_SECS
            remote = await asyncio.wait_for(self._newest(store, model), min(LOOK_SECS, timeout))
            self._silent_until = 0.0
            if remote is None or (local is not None and remote.generation <= local.generation):
                return
            target = folder / remote.generation
            if target.exists() or was_refused(folder, remote.generation):
                return
            make_private_folder(folder)
            one_after_the_other = self._fetching[model]

            def bring(gives_up: threading.Event) -> None:
                with one_after_the_other:
                    store.download(remote, target, tell, gives_up)

            await asyncio.wait_for(self._until_cancelled(bring), until - loop.time())
        except Cancelled:
            return
        except asyncio.TimeoutError:
            tell(f"nothing was fetched from the store: it takes too long; {counts}")
        except (StoreError, OSError) as error:
            tell(f"nothing was fetched from the store: {error}; {counts}")

    async def look(self, model: str) -> Image | None:
        """What `fetch` would bring of a model that has no image here: only its manifest is read. Raises StoreError."""
        if self._store is None:
            return None
        remote = await self._newest(self._store, model)
        return None if remote is None else Image(Path(), remote.manifest)

    async def _newest(self, store: ObjectStore, model: str) -> RemoteImage | None:
        return await self._until_cancelled(lambda _gives_up: store.newest(model))

    async def _until_cancelled(self, call: Callable[[threading.Event], T]) -> T:
        """Make a call in a thread; cancelled, it has the call give up, and does not wait for that.

        Raises Cancelled after `close`.
        """
        gives_up = threading.Event()
        self._under_way.add(gives_up)
        try:
            return await asyncio.wrap_future(in_thread(call, gives_up))
        finally:
            gives_up.set()
            self._under_way.discard(gives_up)

    def close(self) -> None:
        """Cut off what is under way; it is gone on with another time."""
        for gives_up in self._under_way:
            gives_up.set()
        for task in self._sending.values():
            task.cancel()

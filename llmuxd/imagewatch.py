"""Which images there are, here and in the object store: told to the core as they come and go.

What is made of an image is the engines'; what it means that there is one is decided in the core.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import Any

from llmuxd.core import commands as c
from llmuxd.core.engine_state import EngineState
from llmuxd.core.events import ImageFound, ImageLost
from llmuxd.core.state import State
from llmuxd.depot import RETRY_SECS, Depot
from llmuxd.engine import Engine
from llmuxd.engine.images import Image, is_there
from llmuxd.engine.object_store import StoreError
from llmuxd.tasks import in_thread

EVERY_SECS = 10.0
"""How often it is looked whether the images are still there."""

log = logging.getLogger("llmuxd")

Tell = Callable[[str, str], None]


class ImageWatch:
    """Looks for the images of a runtime's engines, in its event loop, and has them in the store, too.

    `tell` is called with a model and a sentence.
    """

    def __init__(
        self,
        state: State,
        engines: Mapping[str, Engine],
        depot: Depot,
        post: Callable[[ImageFound | ImageLost], None],
        tell: Tell,
    ) -> None:
        self.depot = depot
        """The store's part; another one when the config names another store."""
        self._state = state
        self._engines = engines
        self._post = post
        self._tell = tell
        self._tasks: set[asyncio.Task[None]] = set()
        self._unknown: set[str] = set()
        """Models without an image here, of which the store could not be asked."""
        self._unreadable: set[str] = set()
        """Models whose images could not be looked for: it is told once."""

    def start(self) -> None:
        """Begin, in the running event loop."""
        self._begin(self._look_in_store(list(self._state.models)))
        self._begin(self._watch_for_ever())

    def stop(self) -> None:
        self.depot.close()
        for task in self._tasks:
            task.cancel()

    async def find(self, names: Iterable[str]) -> None:
        """Look for local images of the models. One that is not in the store yet is sent there: what a shutdown has cut
        off is gone on with."""
        for name in names:
            image = await self._here(name)
            if image is not None:
                self._found(name, image)
                if self._engines[name].made(image):
                    self.depot.send(name, image, partial(self._tell, name))

    def look(self, names: Iterable[str]) -> None:
        """The same in the background, in other places than before: what is in none of them is lost."""
        self._begin(self._look(list(names)))

    def notice(self, notice: c.Notice) -> None:
        """What the core tells: an image that was just made is sent."""
        if not isinstance(notice, c.EngineChanged):
            return
        image = self._engines[notice.model].last_image
        if image is None:
            return
        if notice.new is EngineState.CHECKPOINTED and notice.old is EngineState.FALLING_ASLEEP:
            self.depot.send(notice.model, image, partial(self._tell, notice.model))
        elif notice.old is EngineState.STARTING and notice.new is EngineState.AWAKE:
            # Its restore was hindered, and it was started instead: the image is as good as before.
            self._found(notice.model, image)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="look for images")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _found(self, name: str, image: Image) -> None:
        if name in self._state.models:
            self._post(ImageFound(name, image.eviction, image.subject.can_park, image.subject.can_sleep))

    def _lost(self, name: str) -> None:
        model = self._state.models.get(name)
        if model is not None and model.image is not None:
            self._post(ImageLost(name, "there is no image of it any more, neither here nor in a store"))

    def _local(self, name: str) -> Image | None:
        """The model's local image, as far as it was seen."""
        engine = self._engines.get(name)
        return None if engine is None else engine.last_image

    async def _here(self, name: str) -> Image | None:
        """The model's newest local image. One that cannot be looked for is as good as none."""
        engine = self._engines.get(name)
        try:
            image = None if engine is None else await engine.image()
        except OSError as error:
            if name not in self._unreadable:
                log.warning("%s: its images cannot be looked for: %s", name, error)
            self._unreadable.add(name)
            return None
        self._unreadable.discard(name)
        return image

    async def _look(self, names: list[str]) -> None:
        await self.find(names)
        await self._look_in_store(names)

    async def _look_in_store(self, names: Iterable[str]) -> None:
        """For images of models that have none here: they are fetched when they are wanted."""
        for name in names:
            self._unknown.discard(name)
            if name not in self._engines or self._local(name) is not None:
                continue
            try:
                image = await self.depot.look(name)
            except StoreError as error:
                log.warning("%s: the store cannot be asked for images: %s", name, error)
                self._unknown.add(name)
                continue
            if self._local(name) is not None:
                continue  # It was saved meanwhile.
            if image is not None:
                self._found(name, image)
            else:
                self._lost(name)

    async def _watch_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        ask_again = loop.time() + RETRY_SECS
        while True:
            await asyncio.sleep(EVERY_SECS)
            for name in list(self._state.models):
                await self._check(name)
            if loop.time() >= ask_again:
                await self._look_in_store(list(self._unknown))
                ask_again = loop.time() + RETRY_SECS

    async def _check(self, name: str) -> None:
        """See that the image that a model would be restored from is there."""
        model, known = self._state.models.get(name), self._local(name)
        if model is None or model.state is not EngineState.CHECKPOINTED:
            return
        # A disk that does not answer holds up nothing but this.
        if known is None or await asyncio.wrap_future(in_thread(is_there, known)):
            self._unreadable.discard(name)
            return
        if model.state is not EngineState.CHECKPOINTED or self._local(name) is not known:
            return
        if name not in self._unreadable:
            log.warning("%s: its image %s is not there any more", name, known.folder)
        image = await self._here(name)
        if image is not None:
            self._found(name, image)
        else:
            await self._look_in_store([name])

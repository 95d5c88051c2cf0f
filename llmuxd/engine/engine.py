"""The engine of one model: start, sleep, wake, infer, stop, and the word when it dies unasked.

This is the whole of an engine to those outside. How it lives and ends as processes is in `lifecycle`; how vLLM is told
to sleep in `sleeping`, what is saved of a process in `images`, how an engine is found that an earlier daemon has left
in `adopting`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time

from llmuxd.core.engine_state import EngineState
from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import EvictionPolicy, ProcessStrategy
from llmuxd.engine.adopting import state_of
from llmuxd.engine.api import Health
from llmuxd.engine.claim import claim
from llmuxd.engine.cuda import CudaState
from llmuxd.engine.device_memory import used_mib
from llmuxd.engine.errors import EngineError
from llmuxd.engine.images import Image, Images
from llmuxd.engine.lifecycle import READY_POLL_SECS, READY_TIMEOUT_SECS, Lifecycle, api_of, check_alive
from llmuxd.engine.manifest import Subject
from llmuxd.engine.process import EngineProcess, kill_marked
from llmuxd.engine.proctable import arguments
from llmuxd.engine.record import EngineRecord
from llmuxd.engine.run import EngineInfo, Run
from llmuxd.engine.sleeping import cut_ties, pids_of, resume, sleep_weights, suspend, tie_again, wake_weights
from llmuxd.engine.spec import TOKEN_ENV, make_private_folder
from llmuxd.tasks import finish, poll

ADOPT_SECS = 120.0
"""How long an engine that was found may take to show what it is. Nobody is served meanwhile."""

_CRIU_MARGIN_SECS = 5.0
"""What the end of a program that ran out of time takes."""

log = logging.getLogger(__name__)


class Engine(Lifecycle):
    """The vLLM process of one model. All methods are called in one event loop.

    `on_death(incarnation, reason)` is called at most once per incarnation, for a death after `start` has returned
    that `stop` did not ask for; an operation under way then fails as well. What the dead engine has left is there
    until `stop` is called. `on_change` is called when `record` says something new.
    """

    # Sleeping

    async def sleep(self, eviction: EvictionPolicy, mode: str, timeout: float) -> None:
        """Put the engine to sleep by `eviction`, weights and process, and see that it sleeps, or is saved and gone.

        `mode` (wait, keep or abort) says what becomes of requests in flight. Raises EngineError: of kind
        NOT_CHECKPOINTED if it could not be saved, and sleeps as its weights were told to; after any other, and after a
        cancellation or a timeout, what vLLM is doing is not known: nothing but `stop` may follow.
        """
        run, info = self._running()
        api = api_of(run)

        async def put_to_sleep() -> None:
            await sleep_weights(api, info, eviction.weights, mode)
            if eviction.process is not ProcessStrategy.KEEP_RUNNING:
                await cut_ties(api, info, run.spec)
            if eviction.process is ProcessStrategy.CUDA_SUSPEND:
                assert run.process is not None
                run.suspended = True
                await suspend(run.process, self.tools.cuda, timeout)

        began = time.monotonic()
        await self._operate(run, put_to_sleep(), timeout, "sleep")
        if eviction.process is ProcessStrategy.CHECKPOINT:
            await self._save(run, info, eviction, timeout - (time.monotonic() - began))

    async def wake(self, eviction: EvictionPolicy, timeout: float) -> None:
        """Undo `sleep(eviction)`, and see that the engine is awake; for one that was saved, see `restore`.

        Raises EngineError; the same holds as for `sleep`: nothing but `stop` may follow.
        """
        run, info = self._running()
        await self._operate(run, self._wake_up(run, info, eviction, timeout), timeout, "wake")
        # Its death is not news while it wakes: whoever asked for that is told here, at the very end.
        check_alive(run)

    async def _wake_up(self, run: Run, info: EngineInfo, eviction: EvictionPolicy, timeout: float) -> None:
        api = api_of(run)
        if eviction.process is ProcessStrategy.CUDA_SUSPEND:
            assert run.process is not None
            await resume(run.process, self.tools.cuda, timeout)
            run.suspended = False
        if eviction.process is not ProcessStrategy.KEEP_RUNNING:
            await tie_again(api, info, run.spec)
        await wake_weights(api, info, eviction.weights)

    async def infer(self, timeout: float) -> None:
        """One small inference: what vLLM does lazily is done before the first client. Raises EngineError."""
        run, _ = self._running()
        await self._operate(run, api_of(run).infer(), timeout, "inference")

    async def answer(self, timeout: float) -> str:
        """What it answers to always the same question; see `VllmApi.answer`. Raises EngineError."""
        run, _ = self._running()
        return await self._operate(run, api_of(run).answer(), timeout, "answer")

    async def device_mib(self) -> int | None:
        """Device memory that its processes hold; None where that cannot be measured."""
        process = self.process
        return await used_mib([] if process is None else await pids_of(process))

    # Saving it, and bringing it back

    async def _save(self, run: Run, info: EngineInfo, eviction: EvictionPolicy, timeout: float) -> None:
        """Write the engine to an image; everything of it is gone then."""
        process = run.process
        assert process is not None
        assert run.watch is not None
        # A connection that somebody has to the engine cannot be saved. And its end is no death from here on.
        self.tools.before_saving()
        await run.watch.close()
        subject = self._subject(run, info, eviction)
        try:
            saving = self._images.dump(await pids_of(process), subject, timeout, self.tools.tell)
            image = await self._until_over(run, saving, timeout + _CRIU_MARGIN_SECS, "checkpoint")
        except BaseException as error:
            before = api_of(run)
            self._watch(run, process)
            run.watch.serving()
            await before.close()
            if isinstance(error, EngineError) and error.kind is FailureKind.NOT_CHECKPOINTED:
                # It goes on as an engine that only sleeps, and nothing was undone of that kind yet.
                await self._operate(run, tie_again(api_of(run), info, run.spec), timeout, "rebuilding its ties")
            raise
        self.last_image = image
        await finish(self._gone(run, process), f"clean up {self.spec.name}")

    async def _gone(self, run: Run, process: EngineProcess) -> None:
        await self._kill(process)
        await self._clean_up(run)

    def _subject(self, run: Run, info: EngineInfo, eviction: EvictionPolicy) -> Subject:
        process = run.process
        assert process is not None
        return Subject.of(run.spec, run.fingerprint, info, eviction.weights, process.pid, process.token)

    async def restore(self, incarnation: int, timeout: float) -> bool:
        """Bring the engine back from its newest image that works, and wake it; those that do not are put aside.

        Returns whether the image is there for another time. Raises EngineError if none of them works: everything of
        the engine is gone then, as after a cancellation.
        """
        images, began = self._images, time.monotonic()
        problems: list[str] = []
        # If it takes longer, there is time for the local one.
        await self.tools.fetch(await self.image(), timeout / 2)
        while (image := await asyncio.to_thread(images.newest)) is not None:
            try:
                rest = timeout - (time.monotonic() - began)
                return await self._bring_back(image, incarnation, rest)
            except EngineError as error:
                problems.append(f"image {image.generation}: {error.reason}")
                log.warning("%s: %s", self.spec.name, problems[-1])
                if error.kind is not FailureKind.REFUSED:
                    raise  # The image is not to blame.
                images.refuse(image, error.reason)
        self.last_image = None
        raise EngineError(FailureKind.REFUSED, "; ".join(problems) or "there is no image any more")

    async def _bring_back(self, image: Image, incarnation: int, timeout: float) -> bool:
        run = self._new_run(incarnation)
        try:
            await self._until_over(run, self._restore(run, image, timeout), timeout + _CRIU_MARGIN_SECS, "restore")
            check_alive(run)
        except BaseException as error:
            failure = self._explain_restore(run, error) if isinstance(error, EngineError) else error
            await finish(self._abandon_restored(run, image), f"clean up {self.spec.name}")
            raise failure from None
        run.ready = True
        self._on_change()
        await self._images.confirm(image)
        if run.over.done():
            await finish(self._abandon_restored(run, image), f"clean up {self.spec.name}")
            raise EngineError(FailureKind.REFUSED, f"it died as soon as it was awake: {run.over.result()}")
        self.last_image = image if self._images.keep else None
        return self._images.keep

    async def _restore(self, run: Run, image: Image, timeout: float) -> None:
        images, spec = self._images, run.spec
        await claim(spec.endpoint)
        run.claimed = True
        make_private_folder(spec.rpc_dir)
        given_up = threading.Event()
        try:
            objection = await asyncio.to_thread(images.objections, image, spec, run.fingerprint, given_up)
        finally:
            given_up.set()
        if objection:
            raise EngineError(FailureKind.REFUSED, objection)
        group = self._cgroup
        log_start = spec.log_path.stat().st_size if spec.log_path.exists() else 0
        pid = await images.restore(image, timeout, lambda criu: group is not None and group.enter(criu))
        process = run.process = EngineProcess.restored(pid, image.subject.token, log_start, group)
        self._watch(run, process)
        api, watch = api_of(run), run.watch
        assert watch is not None

        async def answers() -> bool:
            return await api.health(READY_TIMEOUT_SECS) is Health.OK

        await poll(answers, READY_POLL_SECS)
        watch.serving()
        await asyncio.to_thread(process.note_shared_memory)
        subject = image.subject
        self.info = EngineInfo(
            process.pid, process.create_time, subject.vllm_version, subject.can_park, subject.can_sleep
        )
        await self._wake_up(run, self.info, image.eviction, timeout)

    def _explain_restore(self, run: Run, error: EngineError) -> EngineError:
        """The error of a failed restore. What came back and does not wake is to blame for that, if memory is not."""
        explained = self._explain_start(run, error)
        came_back = run.process is not None and run.stop_task is None
        if came_back and explained.kind is not FailureKind.OUT_OF_MEMORY:
            return EngineError(FailureKind.REFUSED, explained.reason)
        return explained

    async def _abandon_restored(self, run: Run, image: Image) -> None:
        if run.process is None:
            # What came of it so far has no number that is known, but its mark.
            mark = f"{TOKEN_ENV}={image.subject.token}\0".encode()
            groups = [] if self._cgroup is None else [self._cgroup]
            await asyncio.to_thread(kill_marked, mark, groups, ())
        await self._abandon(run)

    def refuse_image(self, reason: str) -> None:
        """Put the newest image aside: no engine that is worth anything comes of it."""
        image, self.last_image = self._images.newest(), None
        if image is not None:
            log.warning("%s: image %s is put aside: %s", self.spec.name, image.generation, reason)
            self._images.refuse(image, reason)

    async def image(self) -> Image | None:
        """The one that the engine would be restored from; None if there is none."""
        images = self.tools.images
        self.last_image = None if images is None else await asyncio.to_thread(images.newest)
        return self.last_image

    async def tidy_images(self) -> None:
        """Remove what an earlier daemon has left half done. Nothing may be under way."""
        if self.tools.images is not None:
            try:
                await asyncio.to_thread(self.tools.images.clean, fetched=False)
            except OSError as error:
                log.warning("%s: %s cannot be tidied: %s", self.spec.name, self.tools.images.folder, error)

    def made(self, image: Image) -> bool:
        """Whether the image is one of its own, and not one that it was given."""
        return self.tools.images is not None and self.tools.images.is_own(image)

    @property
    def _images(self) -> Images:
        """Raises EngineError if there is no place for any."""
        if self.tools.images is None:
            raise EngineError(FailureKind.NOT_CHECKPOINTED, "there is no folder for images")
        return self.tools.images

    # Finding it again

    def find_again(self, record: EngineRecord) -> bool:
        """Take over what there is of an engine that an earlier daemon started.

        True if it runs: `adopt` it, or `stop` it. False if it does not, and then `stop` removes what is left of it.
        """
        process = EngineProcess.found_again(record)
        spec = record.spec_from(self.spec)
        run = Run(record.incarnation, spec, record.fingerprint, asyncio.get_running_loop().create_future())
        run.claimed = True
        run.process = process
        self._run = run
        if not process.is_that_of(record):
            return False
        self.info = EngineInfo(process.pid, process.create_time, record.version, record.can_park, record.can_sleep)
        self._watch(run, process)
        return True

    async def adopt(self, was: EngineState, asleep_by: EvictionPolicy | None) -> EngineState:
        """What the engine that was found is now: AWAKE, ASLEEP by `asleep_by`, or STARTING; then `go_on` is due.

        Raises EngineError if it is not fit for use.
        """
        run, info = self._running()
        if asleep_by is not None and asleep_by.process is ProcessStrategy.CUDA_SUSPEND:
            suspended = await self._find_suspended(run, was)
            if suspended is not None:
                return suspended
        looking = state_of(api_of(run), info, was, asleep_by)
        state = await self._until_over(run, looking, ADOPT_SECS, "a look at it")
        assert run.watch is not None
        if state is EngineState.STARTING:
            return state
        if was is EngineState.STARTING:
            self.info = await self._until_over(run, self._become_ready(run), ADOPT_SECS, "a look at it")
            if self.info.can_sleep and await api_of(run).is_sleeping():
                # Where the disk was full, the record is older than its sleep.
                raise EngineError(FailureKind.LIED, "it sleeps, and nobody knows by which level")
        else:
            run.watch.serving()
        run.ready = True
        return state

    async def _find_suspended(self, run: Run, was: EngineState) -> EngineState | None:
        """ASLEEP if its processes are suspended: such an engine cannot be asked. None if they run.

        Raises EngineError if it is something in between.
        """
        assert run.process is not None
        assert run.watch is not None
        state = await self.tools.cuda.state(await pids_of(run.process))
        if state in (CudaState.RUNNING, CudaState.NONE):
            if was is EngineState.AWAKE:
                return None
            raise EngineError(FailureKind.LIED, "its processes were suspended, or about to be, and run")
        if state is CudaState.MIXED or was is not EngineState.ASLEEP:
            raise EngineError(FailureKind.LIED, f"it was {was.value}, and its processes are {state.value}")
        run.suspended = run.ready = True
        run.watch.serving()
        return EngineState.ASLEEP

    async def go_on(self, timeout: float) -> EngineInfo:
        """`start` of an engine that was adopted while it starts: what is left of it."""
        run, _ = self._running()
        return await self._bring_up(run, timeout, spawn=False)

    def record(self) -> EngineRecord | None:
        """What a later daemon has to know to find this engine again; None while there is none."""
        run, info = self._run, self.info
        if run is None or run.process is None:
            return None
        process = run.process
        return EngineRecord(
            model=run.spec.name,
            incarnation=run.incarnation,
            pid=process.pid,
            start_ticks=process.leader.start_ticks,
            create_time=process.create_time,
            argv=arguments(process.pid),
            token=process.token,
            log_start=process.log_start,
            fingerprint=run.fingerprint,
            socket_dir=str(run.spec.socket_dir),
            port=run.spec.port,
            log_path=str(run.spec.log_path),
            cgroup=None if process.cgroup is None else str(process.cgroup.path),
            members=tuple(sorted((proc.pid, proc.start_ticks) for proc in process.members())),
            shm=process.shared_memory,
            can_park=info is not None and info.can_park,
            can_sleep=info is not None and info.can_sleep,
            version=None if info is None else info.version,
        )

"""One engine's life as processes and as something that answers: from its spawn to the last byte that it leaves behind.

What is done with an engine that lives is in `engine`, which is built on this. When to do what is the core's to decide,
and it calls one operation at a time: only `stop` may come while another one is under way.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from llmuxd.core.events import FailureKind
from llmuxd.engine.api import Health, Suspect, VllmApi, can_park
from llmuxd.engine.cgroup import Cgroup
from llmuxd.engine.claim import claim
from llmuxd.engine.device_memory import left_by
from llmuxd.engine.errors import EngineError, log_says_out_of_memory
from llmuxd.engine.images import Image
from llmuxd.engine.logtail import tail_lines
from llmuxd.engine.process import EngineProcess
from llmuxd.engine.record import fingerprint
from llmuxd.engine.run import EngineInfo, Run
from llmuxd.engine.spec import (
    Endpoint,
    EngineSpec,
    api_key,
    build_argv,
    build_env,
    check_executable,
    make_private_folder,
)
from llmuxd.engine.tools import Tools
from llmuxd.engine.watch import Watch
from llmuxd.tasks import finish, poll

READY_POLL_SECS = 0.02
READY_TIMEOUT_SECS = 5.0

SHOWN_LOG_LINES = 15

_SEARCHED_LOG_LINES = 200
_STOP_POLL_SECS = 0.02
_CHILDREN_GRACE_SECS = 1.0
_DEATH_CERTAIN_SECS = 1.5

T = TypeVar("T")

log = logging.getLogger(__name__)


class Lifecycle:
    """The processes of one model's engine. It can be started again and again; each start makes an incarnation."""

    def __init__(
        self,
        spec: EngineSpec,
        on_death: Callable[[int, str], None],
        on_change: Callable[[], None] = lambda: None,
        cgroup: Cgroup | None = None,
        tools: Tools | None = None,
    ) -> None:
        self.spec = spec
        """What the next start is made from; a new config may change it at any time."""
        self.info: EngineInfo | None = None
        self.last_image: Image | None = None
        """What was last known of the image that it would be restored from."""
        self._on_death = on_death
        self._on_change = on_change
        self._cgroup = cgroup
        self.tools = tools or Tools()
        """What it is suspended and saved with; a new config may change it at any time."""
        self._run: Run | None = None

    @property
    def endpoint(self) -> Endpoint:
        """Of the engine that there is, or of the next one."""
        return self._running_spec.endpoint

    @property
    def log_path(self) -> Path:
        return self._running_spec.log_path

    @property
    def _running_spec(self) -> EngineSpec:
        return self.spec if self._run is None else self._run.spec

    @property
    def outdated(self) -> bool:
        """Whether there is an engine, and it was started from something else than the next one would be."""
        return self._run is not None and self._run.fingerprint != fingerprint(self.spec)

    @property
    def over(self) -> str:
        """Why the engine that there is can do nothing any more: it died, or is being stopped; else empty."""
        return self._run.over.result() if self._run is not None and self._run.over.done() else ""

    @property
    def process(self) -> EngineProcess | None:
        """The engine as processes; None when there is none."""
        return None if self._run is None else self._run.process

    @property
    def pid(self) -> int | None:
        """The pid of the API server; None when there is none."""
        return None if self.process is None else self.process.pid

    async def start(self, incarnation: int, timeout: float) -> EngineInfo:
        """Start the process and wait, for at most `timeout` seconds, until it answers /health.

        On failure or cancellation everything of it is gone before this raises. Raises EngineError: SPAWN if the
        command cannot be executed or its address is taken, DIED (or OUT_OF_MEMORY) with the end of its log,
        TIMEOUT; RuntimeError if the engine has been started and not stopped.
        """
        return await self._bring_up(self._new_run(incarnation), timeout, spawn=True)

    async def stop(self, grace: float) -> None:
        """Ask the API server to end, wait `grace` seconds, kill the whole tree, and remove what it left behind.

        Works in any state, and does nothing if there is no engine. Calls at the same time share one stop, and the
        shortest grace counts. Cancelling a call does not cancel the stop. Raises EngineError if a process
        survives SIGKILL; `stop` can then be called again.
        """
        run = self._run
        if run is None:
            return
        # What is suspended hears nothing, and cannot end by itself.
        grace = 0.0 if run.suspended else grace
        kill_at = asyncio.get_running_loop().time() + grace
        if run.stop_task is None:
            run.kill_at = kill_at
            if not run.over.done():
                run.over.set_result("it was stopped")
            run.stop_task = asyncio.create_task(self._stop(run), name=f"stop {self.spec.name}")
        else:
            run.kill_at = min(run.kill_at, kill_at)
        await asyncio.shield(run.stop_task)

    def let_go(self) -> Coroutine[Any, Any, None]:
        """Leave the engine to itself, at once: this object is of no more use, and an operation that is cancelled after
        this ends nothing. What is returned ends the watching, and is to be awaited."""
        run, self._run = self._run, None
        self._on_change = lambda: None
        return _part_with(run)

    # Starting

    def _new_run(self, incarnation: int) -> Run:
        """Raises RuntimeError if there is one."""
        if self._run is not None:
            raise RuntimeError(f"the engine of {self.spec.name} is running; stop it first")
        over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._run = Run(incarnation, self.spec, fingerprint(self.spec), over)
        return self._run

    async def _bring_up(self, run: Run, timeout: float, *, spawn: bool) -> EngineInfo:
        try:
            if spawn:
                await claim(self.endpoint)
                run.claimed = True
                self._spawn(run)
            info = await self._until_over(run, self._become_ready(run), timeout, "start")
            check_alive(run)
        except BaseException as error:
            failure = self._explain_start(run, error) if isinstance(error, EngineError) else error
            await finish(self._abandon(run), f"clean up {self.spec.name}")
            raise failure from None
        run.ready = True
        self.info = info
        self._on_change()
        return info

    def _spawn(self, run: Run) -> None:
        check_alive(run)
        spec = run.spec
        shutil.rmtree(spec.rpc_dir, ignore_errors=True)
        try:
            make_private_folder(spec.rpc_dir)
        except OSError as error:
            raise EngineError(FailureKind.SPAWN, str(error)) from error
        try:
            argv, env = build_argv(spec, os.environ), build_env(spec, os.environ)
            check_executable(spec, env)
            run.process = EngineProcess.spawn(argv, env, spec.log_path, self._cgroup)
        except OSError as error:
            reason = f"{spec.vllm_command[0]!r} cannot be executed: {error.strerror or error}"
            raise EngineError(FailureKind.SPAWN, reason) from error
        self._watch(run, run.process)

    def _watch(self, run: Run, process: EngineProcess) -> None:
        """Get in touch with the engine's processes and its HTTP."""
        run.api = VllmApi(run.spec.endpoint, run.spec.name, api_key(run.spec, os.environ))
        run.watch = Watch(process, run.api.health, lambda reason: self._died(run, reason), self._on_change)
        self._on_change()

    async def _become_ready(self, run: Run) -> EngineInfo:
        api, process, watch = run.api, run.process, run.watch
        assert api is not None
        assert process is not None
        assert watch is not None
        uds = self.endpoint.uds

        async def answers() -> bool:
            return (uds is None or uds.exists()) and await api.health(READY_TIMEOUT_SECS) is Health.OK

        await poll(answers, READY_POLL_SECS)
        watch.serving()
        version, can_sleep, _ = await asyncio.gather(
            api.version(), api.has_sleep(), asyncio.to_thread(process.note_shared_memory)
        )
        return EngineInfo(process.pid, process.create_time, version, can_park(version), can_sleep)

    def _explain_start(self, run: Run, error: EngineError) -> EngineError:
        """The error of a failed start, with what its log says."""
        if run.process is None or run.stop_task is not None:
            return error
        lines = tail_lines(self.log_path, _SEARCHED_LOG_LINES, run.process.log_start)
        kind = error.kind
        if kind is FailureKind.DIED and log_says_out_of_memory(lines):
            kind = FailureKind.OUT_OF_MEMORY
        shown = [line for line in lines if line.strip()][-SHOWN_LOG_LINES:]
        if not shown:
            return EngineError(kind, f"{error.reason}; its log is empty")
        return EngineError(kind, "\n  ".join([f"{error.reason}; its log ends with", *shown]))

    async def _abandon(self, run: Run) -> None:
        try:
            # A stop that is under way, and made the start fail, keeps its grace.
            await self.stop(0.0 if run.stop_task is None else math.inf)
        except EngineError as survivor:
            log.error("%s: %s", self.spec.name, survivor.reason)

    # Operating

    def _running(self) -> tuple[Run, EngineInfo]:
        if self._run is None or self.info is None:
            raise EngineError(FailureKind.DIED, "there is no engine running")
        return self._run, self.info

    async def _operate(self, run: Run, call: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        try:
            return await self._until_over(run, call, timeout, what)
        except EngineError as error:
            # vLLM's answer may be no more than "Internal Server Error"; the reason is then in its log.
            refused = error.kind is FailureKind.REFUSED
            if refused and log_says_out_of_memory(tail_lines(self.log_path, _SEARCHED_LOG_LINES, log_start)):
                raise EngineError(FailureKind.OUT_OF_MEMORY, error.reason) from error
            raise

    async def _until_over(self, run: Run, call: Coroutine[Any, Any, T], timeout: float, what: str) -> T:
        """Await `call`, unless the engine dies, is stopped, or `timeout` seconds are over."""
        task = asyncio.ensure_future(call)
        ends: list[asyncio.Future[Any]] = [task, run.over]
        try:
            await asyncio.wait(ends, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                try:
                    return task.result()
                except Suspect:
                    # A dying engine fails its requests before it is seen dead.
                    await asyncio.wait([run.over], timeout=_DEATH_CERTAIN_SECS)
                    if not run.over.done():
                        raise
            check_alive(run)
            raise EngineError(FailureKind.TIMEOUT, f"{what} was not done within {timeout:g} s")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _died(self, run: Run, reason: str) -> None:
        if run.over.done():
            return
        run.over.set_result(reason)
        if run.ready:
            self._on_death(run.incarnation, reason)

    # Stopping

    async def _stop(self, run: Run) -> None:
        try:
            if run.watch is not None:
                await run.watch.close()
            if run.process is not None:
                await self._end_gently(run, run.process)
                await self._kill(run.process)
        except asyncio.CancelledError:
            # The loop is being closed: nobody will come back to this engine.
            if run.process is not None:
                run.process.kill()
            raise
        except EngineError:
            run.stop_task = None
            raise
        finally:
            if run.stop_task is not None:
                await self._clean_up(run)

    async def _kill(self, process: EngineProcess) -> None:
        """See that everything of it is gone, what it had on the devices included."""
        pids = {proc.pid for proc in process.members()}
        await asyncio.to_thread(process.kill)
        held = await left_by(pids | {proc.pid for proc in process.members()})
        if held:
            log.error("%s: its processes are gone, and %d MiB of device memory are not free", self.spec.name, held)

    async def _end_gently(self, run: Run, process: EngineProcess) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(process.note_shared_memory)
        if process.ended() is not None or run.kill_at <= loop.time():
            return
        process.terminate()

        async def leader_ended() -> bool:
            return process.ended() is not None or loop.time() >= run.kill_at

        await poll(leader_ended, _STOP_POLL_SECS)
        # The children end after it, and what they remove themselves need not be found.
        until = min(run.kill_at, loop.time() + _CHILDREN_GRACE_SECS)

        async def all_ended() -> bool:
            return not await asyncio.to_thread(process.refresh) or loop.time() >= until

        await poll(all_ended, _STOP_POLL_SECS)

    async def _clean_up(self, run: Run) -> None:
        if run.claimed:
            if run.spec.endpoint.uds is not None:
                run.spec.endpoint.uds.unlink(missing_ok=True)
            shutil.rmtree(run.spec.rpc_dir, ignore_errors=True)
        if run.process is not None:
            removed = run.process.remove_shared_memory()
            if removed:
                log.info("%s: removed what it left: %s", self.spec.name, ", ".join(removed))
        if run.api is not None:
            await run.api.close()
        self.info = None
        self._run = None
        self._on_change()


def api_of(run: Run) -> VllmApi:
    assert run.api is not None, "an engine that is ready has been spawned"
    return run.api


def check_alive(run: Run) -> None:
    """Raises EngineError if the engine has died, or is being stopped."""
    if run.over.done():
        raise EngineError(FailureKind.DIED, run.over.result())


async def _part_with(run: Run | None) -> None:
    if run is not None and run.watch is not None:
        await run.watch.close()
    if run is not None and run.api is not None:
        await run.api.close()

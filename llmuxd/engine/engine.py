"""The engine of one model: start, sleep, wake, infer, stop, and the word when it dies unasked.

An `Engine` can be started again and again; each start makes an incarnation. What to call when is the core's to
decide, and it calls one operation at a time: only `stop` may come while another one is under way. How an engine of an
earlier daemon is found again is in `adopting`.
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

from llmuxd.core.engine_state import EngineState
from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import EvictionPolicy, WeightStrategy
from llmuxd.engine.adopting import state_of
from llmuxd.engine.api import Health, Suspect, VllmApi, can_park
from llmuxd.engine.cgroup import Cgroup
from llmuxd.engine.errors import EngineError, log_says_out_of_memory
from llmuxd.engine.logtail import tail_lines
from llmuxd.engine.process import EngineProcess
from llmuxd.engine.proctable import arguments
from llmuxd.engine.record import EngineRecord, fingerprint
from llmuxd.engine.run import EngineInfo, Run
from llmuxd.engine.spec import Endpoint, EngineSpec, api_key, build_argv, build_env, make_private_folder
from llmuxd.engine.watch import Watch
from llmuxd.tasks import finish, poll

READY_POLL_SECS = 0.02
READY_TIMEOUT_SECS = 5.0
ADOPT_SECS = 120.0
"""How long an engine that was found may take to show what it is. Nobody is served meanwhile."""

SHOWN_LOG_LINES = 15

_SEARCHED_LOG_LINES = 200
_STOP_POLL_SECS = 0.02
_CHILDREN_GRACE_SECS = 1.0
_DEATH_CERTAIN_SECS = 1.5
_CLAIM_TIMEOUT_SECS = 1.0

_LEVELS = {WeightStrategy.RETAIN: 0, WeightStrategy.OFFLOAD: 1, WeightStrategy.DISCARD: 2}

T = TypeVar("T")

log = logging.getLogger(__name__)


class Engine:
    """The vLLM process of one model. All methods are called in one event loop.

    `on_death(incarnation, reason)` is called at most once per incarnation, for a death after `start` has returned
    that `stop` did not ask for; an operation under way then fails as well. What the dead engine has left is there
    until `stop` is called. `on_change` is called when `record` says something new.
    """

    def __init__(
        self,
        spec: EngineSpec,
        on_death: Callable[[int, str], None],
        on_change: Callable[[], None] = lambda: None,
        cgroup: Cgroup | None = None,
    ) -> None:
        self.spec = spec
        """What the next start is made from; a new config may change it at any time."""
        self.info: EngineInfo | None = None
        self._on_death = on_death
        self._on_change = on_change
        self._cgroup = cgroup
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
    def pid(self) -> int | None:
        """The pid of the API server; None when there is none."""
        return None if self.process is None else self.process.pid

    async def start(self, incarnation: int, timeout: float) -> EngineInfo:
        """Start the process and wait, for at most `timeout` seconds, until it answers /health.

        On failure or cancellation everything of it is gone before this raises. Raises EngineError: SPAWN if the
        command cannot be executed or its address is taken, DIED (or OUT_OF_MEMORY) with the end of its log,
        TIMEOUT; RuntimeError if the engine has been started and not stopped.
        """
        if self._run is not None:
            raise RuntimeError(f"the engine of {self.spec.name} is running; stop it first")
        run = self._run = Run(
            incarnation, self.spec, fingerprint(self.spec), asyncio.get_running_loop().create_future()
        )
        return await self._bring_up(run, timeout, spawn=True)

    async def _bring_up(self, run: Run, timeout: float, *, spawn: bool) -> EngineInfo:
        try:
            if spawn:
                await self._claim_endpoint()
                run.claimed = True
                self._spawn(run)
            info = await self._until_over(run, self._become_ready(run), timeout, "start")
            if run.over.done():
                raise EngineError(FailureKind.DIED, run.over.result())
        except BaseException as error:
            failure = self._explain_start(run, error) if isinstance(error, EngineError) else error
            await finish(self._abandon(run), f"clean up {self.spec.name}")
            raise failure from None
        run.ready = True
        self.info = info
        self._on_change()
        return info

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
        looking = state_of(_api(run), was, asleep_by, can_park=info.can_park, can_sleep=info.can_sleep)
        state = await self._until_over(run, looking, ADOPT_SECS, "a look at it")
        assert run.watch is not None
        if state is EngineState.STARTING:
            return state
        if was is EngineState.STARTING:
            self.info = await self._until_over(run, self._become_ready(run), ADOPT_SECS, "a look at it")
            if self.info.can_sleep and await _api(run).is_sleeping():
                # Where the disk was full, the record is older than its sleep.
                raise EngineError(FailureKind.LIED, "it sleeps, and nobody knows by which level")
        else:
            run.watch.serving()
        run.ready = True
        return state

    async def go_on(self, timeout: float) -> EngineInfo:
        """`start` of an engine that was adopted while it starts: what is left of it."""
        run, _ = self._running()
        return await self._bring_up(run, timeout, spawn=False)

    @property
    def process(self) -> EngineProcess | None:
        """The engine as processes; None when there is none."""
        return None if self._run is None else self._run.process

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

    async def sleep(self, eviction: EvictionPolicy, mode: str, timeout: float) -> None:
        """Put the engine to sleep by the weights of `eviction`, and see that it sleeps.

        `mode` (wait, keep or abort) says what becomes of requests in flight; a vLLM that cannot park knows none
        and aborts them. The process of `eviction` is the caller's. Raises EngineError; after that, and after a
        cancellation or a timeout, what vLLM is doing is not known: nothing but `stop` may follow.
        """
        run, info = self._running()
        if not info.can_sleep:
            raise EngineError(FailureKind.REFUSED, "it has no /sleep (VLLM_SERVER_DEV_MODE does not work)")
        if not info.can_park and eviction.weights is WeightStrategy.RETAIN:
            # Before 0.17 there is no level 0: as a level that is neither 1 nor 2 it would drop the weights.
            return
        api = _api(run)

        async def put_to_sleep() -> None:
            await api.sleep(_LEVELS[eviction.weights], mode if info.can_park else None)
            await api.verify_sleeping(True)

        await self._operate(run, put_to_sleep(), timeout, "sleep")

    async def wake(self, eviction: EvictionPolicy, timeout: float) -> None:
        """Undo `sleep(eviction)`, and see that the engine is awake.

        Raises EngineError; the same holds as for `sleep`: nothing but `stop` may follow.
        """
        run, info = self._running()
        if not info.can_park and eviction.weights is WeightStrategy.RETAIN:
            return
        api = _api(run)

        async def wake_up() -> None:
            if eviction.weights is WeightStrategy.DISCARD:
                # Scheduling resumes when the last part is back, and must not before the weights are read again.
                await api.wake("weights")
                await api.reload_weights()
                await api.wake("kv_cache")
            else:
                await api.wake()
            await api.verify_sleeping(False)

        await self._operate(run, wake_up(), timeout, "wake")

    async def infer(self, timeout: float) -> None:
        """One small inference: what vLLM does lazily is done before the first client. Raises EngineError."""
        run, _ = self._running()
        await self._operate(run, _api(run).infer(), timeout, "inference")

    async def stop(self, grace: float) -> None:
        """Ask the API server to end, wait `grace` seconds, kill the whole tree, and remove what it left behind.

        Works in any state, and does nothing if there is no engine. Calls at the same time share one stop, and the
        shortest grace counts. Cancelling a call does not cancel the stop. Raises EngineError if a process
        survives SIGKILL; `stop` can then be called again.
        """
        run = self._run
        if run is None:
            return
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

    async def _claim_endpoint(self) -> None:
        """Remove a socket that a dead engine left. Raises EngineError if a living process has the address."""
        uds, port = self.endpoint.uds, self.endpoint.port
        try:
            if uds is not None:
                make_private_folder(uds.parent)
                connecting = asyncio.open_unix_connection(str(uds))
            else:
                connecting = asyncio.open_connection("127.0.0.1", port)
            _, writer = await asyncio.wait_for(connecting, _CLAIM_TIMEOUT_SECS)
        except (ConnectionRefusedError, FileNotFoundError):
            if uds is not None:
                uds.unlink(missing_ok=True)
        except asyncio.TimeoutError:
            raise self._address_taken() from None
        except OSError as error:
            raise EngineError(FailureKind.SPAWN, f"{self.endpoint}: {error}") from error
        else:
            writer.close()
            raise self._address_taken()

    def _address_taken(self) -> EngineError:
        return EngineError(FailureKind.SPAWN, f"another process already listens on {self.endpoint}")

    def _spawn(self, run: Run) -> None:
        if run.over.done():
            raise EngineError(FailureKind.DIED, run.over.result())
        spec = run.spec
        shutil.rmtree(spec.rpc_dir, ignore_errors=True)
        try:
            make_private_folder(spec.rpc_dir)
        except OSError as error:
            raise EngineError(FailureKind.SPAWN, str(error)) from error
        try:
            argv, env = build_argv(spec, os.environ), build_env(spec, os.environ)
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

    async def _operate(self, run: Run, call: Coroutine[Any, Any, None], timeout: float, what: str) -> None:
        log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        try:
            await self._until_over(run, call, timeout, what)
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
            if run.over.done():
                raise EngineError(FailureKind.DIED, run.over.result())
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
                await asyncio.to_thread(run.process.kill)
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


def _api(run: Run) -> VllmApi:
    assert run.api is not None, "an engine that is ready has been spawned"
    return run.api


async def _part_with(run: Run | None) -> None:
    if run is not None and run.watch is not None:
        await run.watch.close()
    if run is not None and run.api is not None:
        await run.api.close()

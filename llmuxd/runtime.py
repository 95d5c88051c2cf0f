"""The imperative shell around the core: feeds it events, carries out its commands, keeps its clock.

`Runtime.post` is the single writer. It hands one event after the other to the core and begins the commands that
come back; nothing in it awaits. What takes time runs as a task, one per engine, and comes back as an event. What to
do is never decided here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from llmuxd.config import Config, PolicyConfig
from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.settings import InFlight, ModelSpec, Placement, Settings
from llmuxd.core.state import IllegalEvent, Model
from llmuxd.core.switcher import Switcher
from llmuxd.engine import Engine, EngineError, engine_spec
from llmuxd.gate import Gate, ServedModel
from llmuxd.metrics import Metrics
from llmuxd.policies import build_policy
from llmuxd.selfcheck import SelfCheck

log = logging.getLogger("llmuxd")

DEVICE = "gpu0"
"""Until models are placed by memory there is one device, with room for one model."""


@dataclass(frozen=True)
class JobResult:
    """How an operator's job ended."""

    ok: bool
    message: str
    allowed: bool = True


def build_switcher(config: Config, now: float) -> Switcher:
    """The core, as the config wants it. Raises PolicyBroken."""
    policy = config.policy
    models = [
        ModelSpec(
            name=model.name,
            eviction=model.eviction,
            placement=Placement(awake={DEVICE: 1}),
            start_timeout=model.start_timeout_secs,
            max_in_flight=model.max_in_flight,
            max_queue=model.max_queue,
            ttl=model.ttl_secs,
            priority=model.priority,
        )
        for model in config.models.values()
    ]
    settings = Settings(
        request_timeout=policy.request_timeout_secs,
        in_flight=_in_flight_of(policy),
        min_active=policy.min_active_secs,
        sleep_timeout=config.sleep_timeout_secs,
        wake_timeout=config.wake_timeout_secs,
        stop_grace=config.stop_timeout_secs,
        max_queue=config.max_queue,
    )
    return Switcher(models, {DEVICE: 1}, settings, build_policy(policy.policy_type, policy.parameters), now)


def _in_flight_of(policy: PolicyConfig) -> InFlight:
    if not policy.drain_before_switch:
        return InFlight.CUT
    return policy.in_flight


class Runtime:
    """Runs one switcher over its engines. All methods are called in the event loop that it was made in."""

    def __init__(
        self, config: Config, metrics: Metrics | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config = config
        self.clock = clock
        self.switcher = build_switcher(config, clock())
        self.metrics = metrics or Metrics()
        served = [
            ServedModel(name, model.name, model.model_path)
            for model in config.models.values()
            for name in (model.name, *model.aliases)
        ]
        self.gate = Gate(self.post, served, self.health)
        self.engines: Mapping[str, Engine] = {
            name: Engine(engine_spec(config, model), self._death_of(name)) for name, model in config.models.items()
        }
        for name, model in self.switcher.state.models.items():
            # A model's queue may be replaced, so that it is looked up each time.
            self.metrics.add_model(name, partial(_in_flight, model), partial(_queued, model), partial(_parked, model))
        self.watchers: list[Callable[[c.Notice], None]] = [self.metrics.notice]
        self.all_stopped = asyncio.Event()
        self._events: deque[e.Event] = deque()
        self._posting = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._operations: dict[str, asyncio.Task[None]] = {}
        self._jobs: dict[int, asyncio.Future[JobResult]] = {}
        self._last_job = 0
        self.self_check = SelfCheck(self.switcher, self.post, self.clock, self.metrics)

    # The single writer

    def post(self, event: e.Event) -> None:
        """Feed an event to the core, and begin what it commands before returning.

        Called from within a command's own beginning, it queues the event and returns at once.
        """
        self._events.append(event)
        if self._posting:
            return
        self._posting = True
        try:
            while self._events:
                self._handle(self._events.popleft())
        finally:
            self._posting = False
        try:
            self._arm()
        except Exception as error:
            self.self_check.failed("its deadlines", error)

    def _handle(self, event: e.Event) -> None:
        """Never raises: whoever posted is not to blame, and has others to serve.

        What the core breaks over is told by health, and ended by the watchdog; it goes on meanwhile as well as it can.
        """
        now = self.clock()
        try:
            commands = self.switcher.handle(event, now)
        except IllegalEvent as illegal:
            log.error("event refused by the core: %s", illegal)
            self._give_up(event, str(illegal))
            return
        except Exception as error:
            self.self_check.failed(repr(event), error)
            self._give_up(event, f"internal error: {error!r}")
            return
        self.self_check.handled(event, commands, now)
        for command in commands:
            try:
                self._begin(command)
            except Exception as error:
                self.self_check.failed(repr(command), error)
                if isinstance(command, c.Forward):
                    self.gate.fail(command.request)

    def _give_up(self, event: e.Event, why: str) -> None:
        """Nothing will come of the event: tell whoever waits for it."""
        if isinstance(event, (e.RequestArrived, e.RequestBounced)):
            self.gate.fail(event.request)
            if event.request in self.switcher.state.requests:
                # The core may have got as far as taking it in.
                self._events.append(e.ClientLeft(event.request))
            return
        waiting = self._jobs.pop(getattr(event, "job", 0), None)
        if waiting is not None:
            waiting.set_result(JobResult(False, why))

    def _begin(self, command: c.Command) -> None:
        if isinstance(command, c.Forward):
            self.metrics.queue_wait.labels(command.model).observe(command.queue_secs)
            self.gate.forward(command, self.engines[command.model].endpoint)
        elif isinstance(command, (c.Refuse, c.Abort)):
            self.gate.end(command)
        elif isinstance(command, (c.StartEngine, c.SleepEngine, c.WakeEngine, c.StopEngine)):
            self._operate(command)
        elif isinstance(command, c.JobDone):
            self._jobs.pop(command.job).set_result(JobResult(True, command.message))
        elif isinstance(command, c.JobFailed):
            self._jobs.pop(command.job).set_result(JobResult(False, command.reason, command.allowed))
        elif isinstance(command, c.AllStopped):
            self.all_stopped.set()
        elif not isinstance(command, c.Probed):
            _log_notice(command)
            for watch in self.watchers:
                watch(command)

    # Time

    def _arm(self) -> None:
        """Have a Tick fed when the core's next deadline is due."""
        due = self.switcher.next_deadline
        if due == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        if due is None:
            self._timer = None
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(0.0, due - self.clock()), self._tick)

    def _tick(self) -> None:
        self._timer = self._timer_at = None
        self.post(e.Tick())

    # Engines

    def _operate(self, command: c.EngineCommand) -> None:
        """Run an engine command as the engine's one task; a stop takes the place of what is under way."""
        before = self._operations.get(command.model)
        self._operations[command.model] = asyncio.create_task(
            self._run(command, before), name=f"{type(command).__name__} {command.model}"
        )

    async def _run(self, command: c.EngineCommand, before: asyncio.Task[None] | None) -> None:
        if before is not None and not before.done():
            before.cancel()
            await asyncio.wait([before])
        model, op = command.model, command.op
        event: e.EngineEvent
        try:
            event = await _carry_out(command, self.engines[model])
        except EngineError as error:
            event = e.OperationFailed(model, op, error.kind, error.reason)
        except Exception as error:
            log.exception("an operation on the engine of %s broke", model)
            event = e.OperationFailed(model, op, e.FailureKind.REFUSED, f"internal error: {error!r}")
        self.post(event)

    def _death_of(self, model: str) -> Callable[[int, str], None]:
        return lambda incarnation, reason: self.post(e.EngineDied(model, incarnation, reason))

    # Operators

    def begin_job(self, build: Callable[[int], e.OperatorEvent]) -> asyncio.Future[JobResult]:
        """Post the operator's event that `build` makes of a job number; the future tells how it ends."""
        self._last_job += 1
        future: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
        self._jobs[self._last_job] = future
        self.post(build(self._last_job))
        return future

    def health(self) -> tuple[bool, str]:
        """Whether requests are accepted, and the reason if not."""
        if self.switcher.state.shutdown_deadline is not None:
            return False, "shutting down"
        return self.self_check.healthy()

    async def shut_down(self, timeout: float) -> None:
        """Refuse new work, let what is in flight finish for `timeout` seconds, stop every engine.

        Called again, meanwhile, with a shorter timeout, it hurries. Returns when all of them are gone.
        """
        self.post(e.Shutdown(self.clock() + timeout))
        stopped = asyncio.create_task(self.all_stopped.wait())
        broke = asyncio.create_task(self.self_check.broke.wait())
        await asyncio.wait([stopped, broke], return_when=asyncio.FIRST_COMPLETED)
        broke.cancel()
        if not stopped.done():
            # A broken core may never say that all is over.
            await asyncio.wait([stopped], timeout=timeout + self.config.stop_timeout_secs)
            await self._stop_engines()
            self.all_stopped.set()
        await stopped
        self.self_check.stop()
        if self._timer is not None:
            self._timer.cancel()

    async def _stop_engines(self) -> None:
        """Past the core."""
        for operation in self._operations.values():
            operation.cancel()
        stops = [engine.stop(self.config.stop_timeout_secs) for engine in self.engines.values()]
        for failed in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(failed, BaseException):
                log.error("an engine could not be stopped: %s", failed)


async def _carry_out(command: c.EngineCommand, engine: Engine) -> e.EngineEvent:
    """Do what the core asks of an engine; the event that says that it is done. Raises EngineError."""
    model, op = command.model, command.op
    if isinstance(command, c.StartEngine):
        info = await engine.start(op, command.timeout)
        return e.EngineStarted(model, op, info.can_park, info.can_sleep)
    if isinstance(command, c.SleepEngine):
        await engine.sleep(command.eviction, command.mode.value, command.timeout)
        return e.EngineSlept(model, op)
    if isinstance(command, c.WakeEngine):
        await engine.wake(command.eviction, command.timeout)
        return e.EngineWoke(model, op)
    await engine.stop(command.grace)
    return e.EngineStopped(model, op)


def _in_flight(model: Model) -> float:
    return len(model.in_flight)


def _queued(model: Model) -> float:
    return len(model.queue)


def _parked(model: Model) -> float:
    return len(model.in_flight) if model.parked() else 0.0


def _log_notice(notice: c.Notice) -> None:
    extra = {"model": getattr(notice, "model", None) or getattr(notice, "target", None)}
    if isinstance(notice, c.EngineChanged):
        # The whole of a long reason, an engine's last words, is told once: where the switch fails for it.
        reason = f": {notice.reason.splitlines()[0]}" if notice.reason else ""
        level = logging.WARNING if notice.new.value == "failed" else logging.INFO
        text = f"{notice.model}: {notice.old.value} -> {notice.new.value} after {notice.seconds:.1f} s{reason}"
        log.log(level, text, extra=extra)
    elif isinstance(notice, c.SwitchBegan):
        log.info("switch %d begins: %s", notice.switch, _route(notice.target, notice.victims), extra=extra)
    elif isinstance(notice, c.SwitchPhaseEnded):
        log.debug("switch %d: %s took %.2f s", notice.switch, notice.phase.value, notice.seconds, extra=extra)
    elif isinstance(notice, c.PolicyFailed):
        return  # It may be with every event: the self-check tells it once a minute.
    elif isinstance(notice, c.ModelGone):
        log.info("%s is gone: it was taken out of the config", notice.model, extra=extra)
    elif notice.cancelled:
        log.info("switch %d is not needed any more", notice.switch, extra=extra)
    elif notice.error:
        log.error("switch %d failed after %.1f s: %s", notice.switch, notice.seconds, notice.error, extra=extra)
    else:
        log.info("switch %d done in %.1f s", notice.switch, notice.seconds, extra=extra)


def _route(target: str | None, victims: tuple[str, ...]) -> str:
    return f"{', '.join(victims) or 'nothing'} out, {target or 'nothing'} in"

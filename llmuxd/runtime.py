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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from llmuxd.book import Book, Entry
from llmuxd.config import Config
from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState
from llmuxd.core.eviction import ProcessStrategy
from llmuxd.core.outlook import Outlook, outlook_of
from llmuxd.core.state import WITHOUT_PROCESS, IllegalEvent, Model, check_placement
from llmuxd.depot import Depot
from llmuxd.engine import Engine, EngineError, engine_spec
from llmuxd.engine.cgroup import Cgroup, delegated, group_of
from llmuxd.engine.spec import slug
from llmuxd.engine.tools import Tools
from llmuxd.gate import Gate
from llmuxd.imagewatch import ImageWatch
from llmuxd.logs import about
from llmuxd.metrics import Metrics
from llmuxd.notices import log_notice
from llmuxd.resources import Surveyor, usable
from llmuxd.selfcheck import SelfCheck
from llmuxd.specs import build_switcher, model_specs, policy_of, served_models, settings_of, tools_of

log = logging.getLogger("llmuxd")


@dataclass(frozen=True)
class JobResult:
    """How an operator's job ended."""

    ok: bool
    message: str
    allowed: bool = True


class Runtime:
    """Runs one switcher over its engines. All methods are called in the event loop that it was made in."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        book: Book | None = None,
    ) -> None:
        self.config = config
        self.clock = clock
        self.book = book
        """Where the engines are noted for the next daemon; None if they are not."""
        self.switcher = build_switcher(config, clock(), book)
        self.metrics = metrics or Metrics()
        self.gate = Gate(self.post, served_models(config), self.health, self._outlook)
        self._cgroups = delegated()
        self.adopting: set[str] = set()
        """Models whose entries in the book are of engines that have not been looked at yet."""
        self.engines: dict[str, Engine] = {}
        self.images = ImageWatch(self.switcher.state, self.engines, Depot(config.checkpoint), self.post, self._tell_of)
        self._note_wait: dict[str, Callable[[float], None]] = {}
        """By model: tells the metrics how long a request was queued. To look it up there takes longer than to do it."""
        for name in config.models:
            self._add(name)
        self.watchers: list[Callable[[c.Notice], None]] = [self.images.notice, self.metrics.notice]
        self.tellers: list[Callable[[str, str], None]] = []
        """Called with a model and a sentence, about what takes long."""
        self.before_saving: list[Callable[[], None]] = []
        """Called before an engine is saved to an image: nobody may be connected to it then."""
        self.all_stopped = asyncio.Event()
        self.handed_over = asyncio.Event()
        self.left = False
        """The engines are the next daemon's: nothing is done to them any more, and what the book says of them stays."""
        self._events: deque[e.Event] = deque()
        self._posting = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._operations: dict[str, asyncio.Task[None]] = {}
        self._jobs: dict[int, asyncio.Future[JobResult]] = {}
        self._last_job = 0
        self.self_check = SelfCheck(self.switcher, self.post, self.clock, self.metrics)
        self._surveyor = Surveyor(self.switcher.state, self.engines, self.post)

    def _add(self, name: str) -> None:
        """Be ready to start the engine of a model that is in the config and in the core."""
        spec = engine_spec(self.config, self.config.models[name])
        group = None if self._cgroups is None else Cgroup(group_of(self._cgroups, spec.owner, slug(name, 64)))
        self._note_wait[name] = self.metrics.queue_wait.labels(name).observe
        self.engines[name] = Engine(spec, self._death_of(name), partial(self.note, name), group, self._tools_of(name))
        model = self.switcher.state.models[name]
        # A model's queue may be replaced, so that it is looked up each time.
        self.metrics.add_model(name, partial(_in_flight, model), partial(_queued, model), partial(_parked, model))

    def _tools_of(self, name: str) -> Tools:
        model = self.config.models[name]
        return tools_of(self.config, model, self.images.depot, self._before_saving, partial(self._tell_of, name))

    def _before_saving(self) -> None:
        for call in self.before_saving:
            call()

    def _tell_of(self, model: str, text: str) -> None:
        log.info("%s: %s", model, text, extra=about(model))
        for tell in self.tellers:
            tell(model, text)

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
        if self.book is not None and self.book.mode is not self.switcher.mode:
            self.book.set_mode(self.switcher.mode)
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
            self._note_wait[command.model](command.queue_secs)
            self.gate.forward(command, self.engines[command.model].endpoint)
        elif isinstance(command, (c.Refuse, c.Abort)):
            self.gate.end(command)
        elif isinstance(command, (c.StartEngine, c.SleepEngine, c.WakeEngine, c.StopEngine)):
            self._operate(command)
        elif isinstance(command, c.RefuseImage):
            self.engines[command.model].refuse_image(command.reason)
        elif isinstance(command, c.JobDone):
            self._jobs.pop(command.job).set_result(JobResult(True, command.message))
        elif isinstance(command, c.JobFailed):
            self._jobs.pop(command.job).set_result(JobResult(False, command.reason, command.allowed))
        elif isinstance(command, c.AllStopped):
            self.all_stopped.set()
        elif isinstance(command, c.HandedOver):
            self.handed_over.set()
        elif not isinstance(command, c.Probed):
            self._tell(command)

    def _tell(self, notice: c.Notice) -> None:
        if isinstance(notice, c.EngineChanged):
            self.note(notice.model)
        elif isinstance(notice, c.ModelGone):
            self.engines.pop(notice.model, None)
        log_notice(notice)
        for watch in self.watchers:
            watch(notice)

    def note(self, name: str) -> None:
        """Have the book say what there is of a model's engine."""
        if self.book is None or self.left or name in self.adopting:
            return
        engine, model = self.engines.get(name), self.switcher.state.models.get(name)
        record = None if engine is None else engine.record()
        if model is not None:
            self.book.set_costs(name, model.costs.known)
        if record is None or model is None or model.state in WITHOUT_PROCESS:
            self.book.drop(name)
        else:
            self.book.set(name, Entry(record, model.state, model.asleep_by))

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
        engine = self.engines[command.model]
        self._begin_operation(command.model, command.op, type(command).__name__, partial(_carry_out, command, engine))

    def _begin_operation(self, model: str, op: int, what: str, work: Callable[[], Awaitable[e.EngineEvent]]) -> None:
        before = self._operations.get(model)
        self._operations[model] = asyncio.create_task(self._run(model, op, work, before), name=f"{what} {model}")

    async def _run(
        self, model: str, op: int, work: Callable[[], Awaitable[e.EngineEvent]], before: asyncio.Task[None] | None
    ) -> None:
        if before is not None and not before.done():
            before.cancel()
            await asyncio.wait([before])
        if self.book is not None:
            # What vLLM is about to be told has to be known to who comes after a crash.
            await self.book.flush()
        event: e.EngineEvent
        try:
            event = await work()
        except EngineError as error:
            event = e.OperationFailed(model, op, error.kind, error.reason)
        except Exception as error:
            log.exception("an operation on the engine of %s broke", model)
            event = e.OperationFailed(model, op, e.FailureKind.REFUSED, f"internal error: {error!r}")
        self.post(event)

    def adopt(self, event: e.EngineAdopted) -> bool:
        """An engine of an earlier daemon was found, and `engines` has it; False if the core has no room for it."""
        model, engine = self.switcher.state.models[event.model], self.engines[event.model]
        self.post(event)
        if model.state in WITHOUT_PROCESS:
            return False
        if model.state is EngineState.STARTING and model.op == event.incarnation:
            timeout = model.spec.start_timeout
            work = partial(_go_on_starting, event.model, event.incarnation, engine, timeout)
            self._begin_operation(event.model, event.incarnation, "GoOnStarting", work)
        return True

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

    def _outlook(self, request: int) -> Outlook | None:
        return outlook_of(self.switcher.state, request, self.clock())

    def health(self) -> tuple[bool, str]:
        """Whether requests are accepted, and the reason if not."""
        if self.switcher.state.shutdown_deadline is not None:
            return False, "shutting down"
        return self.self_check.healthy()

    def reload(self, config: Config) -> None:
        """Take over a new config, as far as that is possible while running.

        Raises PolicyBroken, or ValueError if something of it is not to be had here; nothing has changed then.
        """
        engines = {name: engine_spec(config, model) for name, model in config.models.items()}
        models, policy = model_specs(config), policy_of(config)
        for model in models:
            check_placement(model, self.switcher.state.devices)
        if self.config.checkpoint.object_store != config.checkpoint.object_store:
            self.images.depot.close()
            self.images.depot = Depot(config.checkpoint)
        elsewhere = {
            name
            for name in self.engines.keys() & engines.keys()
            if _images_of(self.config, name) != _images_of(config, name)
        }
        self.config = config
        changed = set()
        for name in self.engines.keys() & engines.keys():
            engine, before = self.engines[name], self.engines[name].spec
            engine.spec = engines[name]
            engine.tools = self._tools_of(name)
            mended = self.switcher.state.models[name].state in WITHOUT_PROCESS and before != engine.spec
            if engine.outdated or mended:
                changed.add(name)
        self.post(e.Reload(models, settings_of(config), policy, frozenset(changed)))
        new = [name for name in engines if name not in self.engines]
        for name in new:
            self._add(name)
        self.images.look({*new, *elsewhere})
        self.gate.serve(served_models(config))

    async def hand_over(self, timeout: float) -> None:
        """Serve what there is for `timeout` seconds at most, end the rest, and leave the engines to the next daemon.

        Returns when nothing more will change, and the state file says all of it.
        """
        self.post(e.HandOver(self.clock() + timeout))
        await self._until(self.handed_over, timeout + self.config.wake_timeout_secs)
        self.left = True
        leaving = [engine.let_go() for engine in self.engines.values()]
        for operation in self._operations.values():
            # A start goes on without us.
            operation.cancel()
        await asyncio.gather(*leaving)
        if self.book is not None:
            await self.book.flush()
        self._be_still()

    async def _until(self, event: asyncio.Event, timeout: float) -> bool:
        """Wait for what the core will say, unless it is broken: then `timeout` seconds at most."""
        said = asyncio.create_task(event.wait())
        broke = asyncio.create_task(self.self_check.broke.wait())
        await asyncio.wait([said, broke], return_when=asyncio.FIRST_COMPLETED)
        broke.cancel()
        if not said.done():
            await asyncio.wait([said], timeout=timeout)
        said.cancel()
        return event.is_set()

    def start(self) -> None:
        """Begin what goes on by itself, in the running event loop."""
        self.self_check.start()
        self._surveyor.start(lambda: self.config)
        self.images.start()

    def usable(self) -> frozenset[ProcessStrategy]:
        """What can be done here with the process of an engine that is evicted."""
        return usable(self.config)

    def _be_still(self) -> None:
        self.self_check.stop()
        self._surveyor.stop()
        self.images.stop()
        if self._timer is not None:
            self._timer.cancel()

    async def shut_down(self, timeout: float) -> None:
        """Refuse new work, let what is in flight finish for `timeout` seconds, stop every engine.

        Called again, meanwhile, with a shorter timeout, it hurries. Returns when all of them are gone.
        """
        self.post(e.Shutdown(self.clock() + timeout))
        if not await self._until(self.all_stopped, timeout + self.config.stop_timeout_secs):
            # A broken core may never say that all is over.
            await self._stop_engines()
            self.all_stopped.set()
        if self.book is not None:
            await self.book.flush()
        self._be_still()

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
        if command.eviction.process is ProcessStrategy.CHECKPOINT:
            return e.EngineWoke(model, op, await engine.restore(op, command.timeout))
        await engine.wake(command.eviction, command.timeout)
        return e.EngineWoke(model, op)
    await engine.stop(command.grace)
    return e.EngineStopped(model, op)


async def _go_on_starting(model: str, op: int, engine: Engine, timeout: float) -> e.EngineEvent:
    info = await engine.go_on(timeout)
    return e.EngineStarted(model, op, info.can_park, info.can_sleep)


def _images_of(config: Config, model: str) -> tuple[object, ...]:
    """Where the images of a model are."""
    checkpoint = config.checkpoint
    return checkpoint.images_dir, checkpoint.object_store, config.models[model].checkpoint_path


def _in_flight(model: Model) -> float:
    return len(model.in_flight)


def _queued(model: Model) -> float:
    return len(model.queue)


def _parked(model: Model) -> float:
    return len(model.in_flight) if model.parked() else 0.0

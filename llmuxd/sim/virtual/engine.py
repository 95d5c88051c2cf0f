"""A simulated engine: a process with memory, requests inside, and faults.

It tells the core only what a real one would through the runtime. What it really is (`physical`) may differ from what
the core believes: it has died and nobody has noticed, or it has lied.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.eviction import Auto, EvictionPolicy, ProcessStrategy, WeightStrategy
from llmuxd.sim.virtual.scenario import OpFault, SimModel
from llmuxd.sim.virtual.service import Service, Work

if TYPE_CHECKING:
    from llmuxd.sim.virtual.world import World

DIED_NOTICED_SECS = 0.2
DIES_AFTER_SECS = 0.1

OFFLOADED = EvictionPolicy(WeightStrategy.OFFLOAD, ProcessStrategy.KEEP_RUNNING)
"""How one sleeps at first whose policy is left to be chosen."""


class Physical(Enum):
    """What the process is."""

    GONE = "gone"
    STARTING = "starting"
    AWAKE = "awake"
    FALLING_ASLEEP = "falling asleep"
    ASLEEP = "asleep"
    SAVED = "saved"
    """There is no process, and an image of it."""
    WAKING = "waking"
    STOPPING = "stopping"


_LARGE = (Physical.STARTING, Physical.AWAKE, Physical.FALLING_ASLEEP, Physical.WAKING)


class VirtualEngine:
    """The engine of one model, in all its lives."""

    def __init__(self, world: World, model: SimModel, service: Service) -> None:
        self.physical = Physical.GONE
        self.name = model.spec.name
        self._world = world
        self._model = model
        self._service = service
        self._inside: dict[int, Work] = {}
        self._counts = {"start": 0, "sleep": 0, "wake": 0, "stop": 0}
        self._incarnation = 0
        self._asleep_by = OFFLOADED if isinstance(model.spec.eviction, Auto) else model.spec.eviction
        self._image: EvictionPolicy | None = None
        """The policy by which the image was made that there is; None if there is none."""
        self._spoilt = False
        """That image is good for nothing, which shows when it is restored from."""
        self._refused = False
        """The core has been told that there is no image, or has said so itself."""
        self._under_way: int | None = None
        """The core's number of a start, sleep or wake that has not come to its end."""
        self._holds: Mapping[str, int] = {}
        self._operation = 0
        """Counts up with each; the completion of an older one is void."""
        self._last_op = 0
        """The core's number of its last command."""
        self._plan_number = 0

    # What the world asks

    def holds(self) -> Mapping[str, int]:
        """Device -> what it really holds there."""
        return self._holds

    def be_asleep(self) -> None:
        """As after a warm-up; one that is stopped when it has to go is not there."""
        process = self._asleep_by.process
        if not self._model.can_sleep or process is ProcessStrategy.STOP:
            return
        if process is ProcessStrategy.CHECKPOINT:
            self.bring_image(self._asleep_by)
        else:
            self._incarnation = 1
            self._enter(Physical.ASLEEP)

    def adoptable(self) -> bool:
        return self.physical in (Physical.STARTING, Physical.AWAKE, Physical.ASLEEP)

    def image(self) -> e.ImageFound | None:
        """What a daemon finds on the disk."""
        if self._image is None:
            return None
        self._refused = False
        return e.ImageFound(self.name, self._image, self._model.can_park, self._model.can_sleep)

    def bring_image(self, eviction: EvictionPolicy, *, spoilt: bool = False) -> None:
        """There is one from now on, in the place of any other."""
        self._image, self._spoilt, self._refused = eviction, spoilt, False

    def lose_image(self, *, known: bool) -> None:
        """It is gone from the disk. `known`: the core knows, and must not have anything restored from it."""
        self._image = None
        self._refused = self._refused or known

    def restore_failed(self, kind: e.FailureKind) -> None:
        """Whoever tried it puts the image aside if that is to blame; this daemon's core forgets it at any rate."""
        if kind is e.FailureKind.REFUSED:
            self._image = None
        self._refused = True

    def adoption(self) -> e.EngineAdopted:
        starting = self.physical is Physical.STARTING
        if not starting:
            self._operation += 1
        asleep_by = self._asleep_by if self.physical is Physical.ASLEEP else None
        can = self._model.can_park, self._model.can_sleep
        return e.EngineAdopted(self.name, self._incarnation, asleep_by, *can, starting=starting)

    def vanish(self) -> None:
        """The process is gone, with all that it had."""
        self._operation += 1
        self._under_way = None
        for request in self._inside:
            self._service.remove(request, self._world.now)
        self._inside.clear()
        self._enter(Physical.GONE)

    def die(self, reason: str, noticed_after: float) -> None:
        """It ends unasked: its connections break now, the supervisor notices later."""
        self._break_all()
        incarnation, op = self._incarnation, self._under_way
        self.vanish()
        self._report(e.EngineDied(self.name, incarnation, reason), noticed_after)
        if op is not None:
            # What is under way fails by it, too.
            self._report(e.OperationFailed(self.name, op, e.FailureKind.DIED, reason), noticed_after)

    # Requests

    def accept(self, request: int, work: Work) -> None:
        """A request is forwarded to it."""
        world = self._world
        self._inside[request] = work
        if self.physical is Physical.GONE:
            # Dead, and not known to be: the connection is refused.
            del self._inside[request]
            world.at(world.now, partial(self._break, request, world.life))
            return
        if self.physical is not Physical.AWAKE:
            world.violate("forwarded_to_awake", f"request {request} to {self.name}, which is {self.physical.value}")
        self._service.add(request, work, world.now)
        self._plan()

    def forget(self, request: int) -> None:
        """Whatever has become of the request."""
        if self._inside.pop(request, None) is not None:
            self._service.remove(request, self._world.now)
            self._plan()

    def _plan(self) -> None:
        """Look at the service again when something is due in it."""
        world = self._world
        world.busy(self.name, self.physical is Physical.AWAKE and bool(self._inside))
        self._plan_number += 1
        at = self._service.next_at() if self.physical is Physical.AWAKE else None
        if at is not None:
            world.at(at, partial(self._serve, self._plan_number))

    def _serve(self, plan: int) -> None:
        if plan != self._plan_number:
            return
        for progress in self._service.take(self._world.now):
            if progress.request not in self._inside:
                continue
            if not progress.finished:
                self._world.first_token(progress.request)
            else:
                del self._inside[progress.request]
                self._world.finished(progress.request)
        self._plan()

    def _break(self, request: int, life: int) -> None:
        if life == self._world.life and self._world.holds(request):
            self._world.broken(request)

    def _break_all(self) -> None:
        world = self._world
        for request in list(self._inside):
            self._service.remove(request, world.now)
            del self._inside[request]
            world.at(world.now, partial(self._break, request, world.life))

    # Operations

    def carry_out(self, command: c.EngineCommand) -> None:
        """Begin what the core asks; it is told of the end as an event."""
        self._operation += 1
        self._last_op = command.op
        self._under_way = None if isinstance(command, c.StopEngine) else command.op
        if isinstance(command, c.StartEngine):
            self._start(command)
        elif isinstance(command, c.SleepEngine):
            self._sleep(command)
        elif isinstance(command, c.WakeEngine):
            self._wake(command)
        else:
            self._stop(command)

    def _start(self, command: c.StartEngine) -> None:
        self._incarnation = command.op
        self._physical(Physical.STARTING)
        if not self._allocate(command, "start"):
            return
        started = e.EngineStarted(self.name, command.op, self._model.can_park, self._model.can_sleep)
        self._operate("start", command.op, command.timeout, started, Physical.AWAKE, Physical.STARTING)

    def _wake(self, command: c.WakeEngine) -> None:
        restores = command.eviction.process is ProcessStrategy.CHECKPOINT
        if restores:
            self._incarnation = command.op
            if self._refused:
                self._world.violate("image", f"{self.name} is restored, and its image was refused or is lost")
        if not self._allocate(command, "wake"):
            return
        self._physical(Physical.WAKING)
        woke = e.EngineWoke(self.name, command.op, image_kept=restores and self._model.keeps_image)
        if restores and (self._image is None or self._spoilt):
            why = "there is no image any more" if self._image is None else "it is damaged"
            failed = e.OperationFailed(self.name, command.op, e.FailureKind.REFUSED, why)
            self._then(self._duration("wake", None), partial(self._arrive, Physical.GONE, failed))
            return
        back = Physical.GONE if restores else Physical.ASLEEP
        if restores and not self._model.keeps_image:
            self.lose_image(known=False)
        self._operate("wake", command.op, command.timeout, woke, Physical.AWAKE, back)

    def _sleep(self, command: c.SleepEngine) -> None:
        world = self._world
        keeps = command.mode is c.SleepMode.KEEP
        if self._inside and not (keeps and self._model.can_park):
            world.violate("parked_where_possible", f"{self.name} is put to sleep with requests inside")
        self._asleep_by = command.eviction
        self._physical(Physical.FALLING_ASLEEP)
        self._service.pause(world.now)
        for request in self._inside:
            world.paused(request)
        self._plan()
        slept = e.EngineSlept(self.name, command.op)
        saves = command.eviction.process is ProcessStrategy.CHECKPOINT
        to = Physical.SAVED if saves else Physical.ASLEEP
        self._operate("sleep", command.op, command.timeout, slept, to, Physical.AWAKE)

    def _stop(self, command: c.StopEngine) -> None:
        fault = self._fault("stop")
        self._break_all()
        if self.physical is not Physical.GONE:
            self._physical(Physical.STOPPING)
        stopped = e.EngineStopped(self.name, command.op)
        seconds = self._duration("stop", fault)
        if fault in (OpFault.FAIL, OpFault.LIE, OpFault.HIDDEN_LIE):
            survived = e.OperationFailed(self.name, command.op, e.FailureKind.TIMEOUT, "it survives")
            self._report(survived, command.grace)
        elif fault is not OpFault.LOST:
            self._then(seconds, partial(self._gone, stopped))

    def _gone(self, stopped: e.EngineStopped) -> None:
        self.vanish()
        self._world.post(stopped)

    def _operate(self, kind: str, op: int, timeout: float, done: e.EngineEvent, to: Physical, back: Physical) -> None:
        """Come to the state `to`, or to what the fault makes of it."""
        fault = self._fault(kind)
        seconds = min(self._duration(kind, fault), timeout)
        if fault is OpFault.LOST:
            return
        if fault is OpFault.DIE:
            self._then(seconds / 2, partial(self.die, f"died in its {kind}", DIED_NOTICED_SECS))
        elif fault is OpFault.HANG:
            late = e.OperationFailed(self.name, op, e.FailureKind.TIMEOUT, f"no {kind} in {timeout:g} s")
            self._then(timeout, partial(self._world.post, late))
        elif fault is OpFault.HIDDEN_LIE and to is Physical.SAVED:
            self._then(seconds, partial(self._arrive, to, done, spoilt=True))
        elif fault is OpFault.HIDDEN_LIE and kind == "sleep":
            self._world.hidden_lies += 1
            self._then(seconds, partial(self._arrive, to, done, keeps_memory=True))
        elif fault in (OpFault.FAIL, OpFault.LIE, OpFault.HIDDEN_LIE):
            lied = fault is not OpFault.FAIL and kind == "sleep"
            failure = e.FailureKind.LIED if lied else e.FailureKind.REFUSED
            if kind == "sleep" and to is Physical.SAVED and fault is OpFault.FAIL:
                # The dump alone has failed: it sleeps as its weights were told to.
                failure, back = e.FailureKind.NOT_CHECKPOINTED, Physical.ASLEEP
                self._asleep_by = EvictionPolicy(self._asleep_by.weights, ProcessStrategy.KEEP_RUNNING)
            failed = e.OperationFailed(self.name, op, failure, f"{kind} failed")
            self._then(seconds, partial(self._arrive, back, failed))
        else:
            self._then(seconds, partial(self._arrive, to, done))
            if fault is OpFault.DIE_AFTER:
                self._world.at(self._world.now + seconds + DIES_AFTER_SECS, partial(self._die_if, op))

    def _die_if(self, op: int) -> None:
        """Unless the core has asked for something else since."""
        if self._last_op == op and self.physical is not Physical.GONE:
            self.die("died soon after", DIED_NOTICED_SECS)

    def _arrive(
        self, state: Physical, event: e.EngineEvent, *, keeps_memory: bool = False, spoilt: bool = False
    ) -> None:
        world = self._world
        held = self._holds
        self._under_way = None
        if state is Physical.SAVED:
            # What is left of it is an image.
            self.bring_image(self._asleep_by, spoilt=spoilt)
            state = Physical.GONE
        self._enter(state)
        if keeps_memory:
            self._holds = held
        if state is Physical.AWAKE:
            self._service.resume(world.now)
            for request in self._inside:
                world.resumed(request)
        self._plan()
        world.post(event)

    def _allocate(self, command: c.StartEngine | c.WakeEngine, kind: str) -> bool:
        """Take the memory of an awake engine; without it the operation fails as vLLM's would."""
        world = self._world
        wanted = self._model.spec.placement.awake
        short = [d for d, n in wanted.items() if n > world.free(d) + self._holds.get(d, 0)]
        if not short:
            self._holds = wanted
            return True
        if not world.hidden_lies:
            world.violate("memory", f"{self.name} finds no room on {short[0]}")
        reason = f"CUDA out of memory in {kind}"
        failed = e.OperationFailed(self.name, command.op, e.FailureKind.OUT_OF_MEMORY, reason)
        self._then(self._duration(kind, None), partial(world.post, failed))
        return False

    # Helpers

    def _physical(self, state: Physical) -> None:
        self.physical = state

    def _enter(self, state: Physical) -> None:
        self._physical(state)
        placement = self._model.spec.placement
        if state in _LARGE:
            self._holds = placement.awake
        elif state is Physical.ASLEEP:
            retains = self._asleep_by.weights is WeightStrategy.RETAIN
            suspended = self._asleep_by.process is ProcessStrategy.CUDA_SUSPEND
            self._holds = {} if suspended else placement.retained if retains else placement.asleep
        elif state is Physical.GONE:
            self._holds = {}
            self._plan()

    def _fault(self, kind: str) -> OpFault | None:
        nth = self._counts[kind]
        self._counts[kind] += 1
        return self._world.faults.get((self.name, kind, nth))

    def _duration(self, kind: str, fault: OpFault | None) -> float:
        seconds: float = getattr(self._model.secs, kind)
        scenario = self._world.scenario
        if scenario.jitter:
            drawn = zlib.crc32(f"{scenario.jitter_seed}/{self.name}/{kind}/{self._counts[kind]}".encode()) / 2**32
            seconds *= 1 + scenario.jitter * (2 * drawn - 1)
        return seconds * 10 if fault is OpFault.SLOW else seconds

    def _then(self, seconds: float, happen: partial[None]) -> None:
        """When the operation under way has taken that long, unless another one has taken its place."""
        self._world.at(self._world.now + seconds, partial(self._if_current, self._operation, happen))

    def _if_current(self, operation: int, happen: partial[None]) -> None:
        if operation == self._operation:
            happen()

    def _report(self, event: e.EngineEvent, after: float) -> None:
        """Tell the daemon that is there now, if it still is by then."""
        self._world.at(self._world.now + after, partial(self._tell, event, self._world.life))

    def _tell(self, event: e.EngineEvent, life: int) -> None:
        if life == self._world.life:
            self._world.post(event)

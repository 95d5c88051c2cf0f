"""The simulated EngineCore: memory, sleeping, scheduling, generation. The HTTP around it is in `http`.

The memory is held by a real child process, so that killing it, or leaving it behind as an orphan, has the consequences
that it has with vLLM.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from llmuxd.sim.faults import Faults
from llmuxd.sim.ledger import GIB, Ledger, OutOfMemory
from llmuxd.sim.options import Options

_WORDS = [
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "haven",
    "inlet",
    "jetty",
    "knoll",
    "lagoon",
    "mesa",
    "north",
    "ocean",
    "pine",
]

_CORE = """
import os, signal, sys, time
parent, left = os.getppid(), [float(sys.argv[1])]
signal.signal(signal.SIGTERM, lambda *_: left.append(0.0))
while os.getppid() == parent:
    time.sleep(0.05)
time.sleep(left[-1])
"""
"""What the child runs: nothing. It outlives a parent that was killed, for a while, as vLLM's workers may; one that
ends as it should asks it, by SIGTERM, not to."""

LEAVE_POLL_SECS = 0.02
TOKENS_PER_TURN = 32

log = logging.getLogger("vllm")


class Aborted(Exception):
    """The request was ended by a sleep with mode=abort."""


class EngineDead(Exception):
    """The EngineCore process is gone."""


class NotPossible(Exception):
    """vLLM refuses this in the state that the engine is in."""


class DiedTelling(EngineDead):
    """It is gone, and the API server lives to tell it in the stream."""


class BodyCut(Exception):
    """The connection is to be closed in mid-answer."""


@dataclass(eq=False)
class Generation:
    """One request in the engine."""

    gone: Callable[[], bool]
    """Whether its client has left."""
    streamed: bool
    aborted: bool = False
    emitted: int = 0
    scheduled: bool = False
    stalled: bool = False
    left: bool = False
    """Its client was found to have left."""


@dataclass
class Engine:
    """The state of one engine. `core` is its child process."""

    options: Options
    faults: Faults
    ledger: Ledger | None
    core: subprocess.Popen[bytes] = field(init=False)
    level: int | None = None
    """The sleep level; None when awake."""
    paused: bool = False
    holds_new: bool = False
    """Paused with mode=wait, and not drained yet: what runs goes on, new requests are not scheduled."""
    asleep: set[str] = field(default_factory=set)
    """The parts that are not on the device: weights, kv_cache."""
    weights_valid: bool = True
    tied: bool = True
    """Its ranks are held together by their communicators; without them no token is made."""
    running: set[Generation] = field(default_factory=set)
    aborted_total: int = 0
    tokens_total: int = 0
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while memory moves: EngineCore does one such thing at a time, and answers nothing meanwhile."""

    # Life

    async def start(self) -> None:
        """Load, or come back as it was saved. Raises OutOfMemory as vLLM's check at start does."""
        options = self.options
        self._spawn()
        if options.level is not None:
            self._come_back(options.level)
            return
        if self.ledger is not None:
            wanted = int(options.utilization * self.ledger.total)
            if self.ledger.free() < wanted:
                raise OutOfMemory(wanted, self.ledger.free())
            self._hold()
        await self.spend(options.start_secs + options.weights / GIB / options.load_gib_s)

    def _come_back(self, level: int) -> None:
        """As a process that was saved while it slept, its communicators taken down if it has any."""
        self.level, self.paused = level, True
        self.tied = self.options.ranks == 1
        if level > 0:
            self.asleep = {"weights", "kv_cache"}
            self.weights_valid = level == 1
        self._hold()

    def _spawn(self) -> None:
        argv = ["VLLM::EngineCore", "-S", "-E", "-c", _CORE, str(self.options.orphan_secs)]
        self.core = subprocess.Popen(argv, executable=sys.executable, stdin=subprocess.DEVNULL)

    @property
    def dead(self) -> bool:
        return self.core.poll() is not None

    def die(self) -> None:
        """The EngineCore process crashes."""
        self.core.kill()
        self.core.wait()

    async def spend(self, seconds: float) -> None:
        """Let simulated time pass."""
        await asyncio.sleep(seconds * self.options.scale * self.faults.value("slow", 1.0))

    # Memory

    def _hold(self) -> None:
        """Tell the ledger what is on the device. Raises OutOfMemory."""
        if self.ledger is None:
            return
        size = self.options.residual
        if "weights" not in self.asleep:
            size += self.options.weights
        if "kv_cache" not in self.asleep:
            size += self.options.kv_cache(self.ledger.total)
        self.ledger.hold(self.core.pid, size)

    # Sleeping

    @property
    def is_paused(self) -> bool:
        """Whether scheduling is paused, in whatever mode."""
        return self.paused or self.holds_new

    @property
    def is_sleeping(self) -> bool:
        """As GET /is_sleeping: also while it is only paused."""
        return self.is_paused or bool(self.asleep)

    async def pause(self, mode: str) -> None:
        """As POST /pause: scheduling alone. Returns when the pause is complete."""
        if mode == "abort":
            for generation in self.running:
                generation.aborted = True
        if mode != "wait":
            self.paused = True
            return
        self.holds_new = True
        while any(g.scheduled for g in self.running) and not self.dead:  # noqa: ASYNC110
            await asyncio.sleep(LEAVE_POLL_SECS)
        # A /resume or /wake_up in the meantime has undone the pause, and nothing tells its owner.
        self.paused = self.paused or self.holds_new
        self.holds_new = False

    def resume(self) -> None:
        """As POST /resume: unconditionally, whatever is asleep."""
        self.paused = self.holds_new = False

    async def sleep(self, level: int, mode: str) -> None:
        """As POST /sleep. One that sleeps already stays as it is."""
        await self.pause(mode)
        async with self.busy:
            if "weights" in self.asleep:
                return
            self.level = level
            if level == 0 or self.faults.happens("leak_sleep"):
                return
            if level == 1:
                await self.spend(self.options.weights / GIB / self.options.offload_gib_s)
            else:
                self.weights_valid = False
            self.asleep = {"weights", "kv_cache"}
            self._hold()

    async def wake(self, tags: set[str]) -> None:
        """As POST /wake_up. Raises OutOfMemory; what was asleep then still is."""
        async with self.busy:
            before = set(self.asleep)
            # A tag that is not asleep makes vLLM leave the others as they are.
            back = before if not tags else tags if tags <= before else set()
            self.asleep = before - back
            try:
                self._hold()
            except OutOfMemory:
                self.asleep = before
                raise
            if "weights" in back and self.weights_valid:
                await self.spend(self.options.weights / GIB / self.options.wake_gib_s)
            if not self.asleep:
                self.level = None
                self.resume()

    async def reload_weights(self) -> None:
        """As collective_rpc reload_weights. Where the weights have no memory it is the end of EngineCore."""
        async with self.busy:
            self._touch("weights")
            await self.spend(self.options.weights / GIB / self.options.load_gib_s)
            self.weights_valid = True

    def release_kv_cache(self) -> None:
        """As POST /release_kv_cache_memory: it comes back with the next wake. Raises NotPossible."""
        if not self.paused:
            raise NotPossible("release_kv_cache_memory() requires a completed pause first")
        if self.asleep:
            raise NotPossible("release_kv_cache_memory() requires all executor memory to be resident")
        self.asleep.add("kv_cache")
        self._hold()

    def _touch(self, *parts: str) -> None:
        """Use memory. Raises EngineDead where it is not mapped: an illegal access that no process survives."""
        if not self.tied and "kv_cache" in parts:
            log.error("RuntimeError: NCCL communicator was aborted")
            self.die()
            raise EngineDead
        if self.asleep & set(parts):
            log.error("torch.AcceleratorError: CUDA error: an illegal memory access was encountered")
            self.die()
            raise EngineDead

    # Generation

    async def generate(
        self, prompt: str, count: int, gone: Callable[[], bool], *, speaker: str = "", streamed: bool = False
    ) -> AsyncGenerator[str, None]:
        """`count` tokens that depend on the model and the prompt alone; the first one is the speaker, or the model.

        Raises Aborted and EngineDead; ends early, without a word, if the client has left.
        """
        generation = Generation(gone, streamed)
        self.running.add(generation)
        speaker = speaker or self.options.names[0]
        seed = hashlib.sha256(f"{self.options.model}\0{prompt}".encode()).digest()
        try:
            while generation.emitted < count:
                while not self._may_go_on(generation):  # noqa: ASYNC110
                    await asyncio.sleep(LEAVE_POLL_SECS)
                if generation.left:
                    self.aborted_total += 1
                    return
                # The weights that a token is made of are those at its beginning: a sleep may come in its middle.
                valid = self.weights_valid
                await self._step(generation)
                index, generation.emitted = generation.emitted, generation.emitted + 1
                self.tokens_total += 1
                yield self._token(seed, index, speaker) if valid else "\ufffd"
                if self.faults:
                    self._fail_after(generation)
        except GeneratorExit:
            self.aborted_total += 1
            raise
        finally:
            self.running.discard(generation)

    def _may_go_on(self, generation: Generation) -> bool:
        """Whether the request may make its next token now, or has lost its client."""
        if self.dead:
            raise EngineDead
        if generation.aborted:
            raise Aborted
        if generation.gone():
            generation.left = True
            return True
        held = self.holds_new and not generation.scheduled
        if self.paused or held or (self.faults and self.faults.happens("hang_generation")):
            return False
        if generation.stalled and self.faults.stands("stall_stream"):
            return False
        self._touch("weights", "kv_cache")
        generation.scheduled = True
        return True

    async def _step(self, generation: Generation) -> None:
        """The time of one token. Without any, the others get their turn now and then."""
        seconds = self.options.scale / self.options.tokens_per_s
        if seconds > 0:
            await asyncio.sleep(seconds * self.faults.value("slow", 1.0))
        elif generation.emitted % TOKENS_PER_TURN == TOKENS_PER_TURN - 1:
            await asyncio.sleep(0)

    def _fail_after(self, generation: Generation) -> None:
        """What goes wrong after a number of tokens."""
        if self._is_due("die_after_tokens", generation):
            self.die()
        if not generation.streamed:
            return
        if self._is_due("stall_stream", generation):
            generation.stalled = True
        if self._is_due("cut_body", generation):
            raise BodyCut
        if self._is_due("dead_in_stream", generation):
            self.die()
            raise DiedTelling

    def _is_due(self, fault: str, generation: Generation) -> bool:
        return generation.emitted >= self.faults.value(fault, 1.0) and self.faults.happens(fault)

    def _token(self, seed: bytes, index: int, speaker: str) -> str:
        if index == 0:
            return speaker
        digest = hashlib.sha256(b"%b\0%d" % (seed, index)).digest()
        return " " + _WORDS[digest[0] % len(_WORDS)]

"""Continuous batching, for both tiers: commands gather while a step runs; the next takes them all.

No timers: the batch is whatever has gathered. Owns the hand-over between event loop and device
thread and the routing of results to the streams they belong to. Knows neither protobuf nor what a
step does; lives on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from outrider.engine.device_thread import DeviceThread

# How often an idle service looks for what it kept too long.
TIDY_INTERVAL_S = 5.0
# A stream that has more than this waiting is not read further: gRPC's flow control takes over.
MAX_PENDING_COMMANDS = 16_384


@dataclass(frozen=True)
class GenerationKey:
    """`peer_id`: one stream of one orchestrator. `generation_id`: its name on that stream."""

    peer_id: int
    generation_id: int


class Keyed(Protocol):
    @property
    def key(self) -> GenerationKey: ...


Command = TypeVar("Command")
CommandIn = TypeVar("CommandIn", contravariant=True)
Result = TypeVar("Result", bound=Keyed)
ResultOut = TypeVar("ResultOut", bound=Keyed, covariant=True)
ResultIn = TypeVar("ResultIn", bound=Keyed, contravariant=True)


class Worker(Protocol[CommandIn, ResultOut]):
    """The device thread's half of a service."""

    @property
    def has_work(self) -> bool:
        """Whether a step without commands would do something."""

    @property
    def num_open(self) -> int:
        """Generations that are open."""

    def step(self, commands: Sequence[CommandIn]) -> Sequence[ResultOut]:
        """Applies the commands in order, does one batch of work. Raises for none of them."""

    def tidy(self) -> None:
        """For idle moments."""


class Peer(Protocol[ResultIn]):
    """Who gets a stream's results; called on the event loop, must not block."""

    def deliver(self, results: Sequence[ResultIn]) -> None: ...


class Scheduler(Generic[Command, Result]):
    """One per service; `run` is its only task."""

    def __init__(self, worker: Worker[Command, Result], device: DeviceThread) -> None:
        self._worker = worker
        self._device = device
        self._pending: list[Command] = []
        self._peers: dict[int, Peer[Result]] = {}
        self._wake = asyncio.Event()
        self._taken = asyncio.Event()

    def attach(self, peer_id: int, peer: Peer[Result]) -> None:
        self._peers[peer_id] = peer

    def detach(self, peer_id: int, last_commands: Iterable[Command]) -> None:
        """The stream has ended: its results go nowhere; `last_commands` free what it held."""
        self._peers.pop(peer_id, None)
        self._pending.extend(last_commands)
        self._wake.set()

    async def submit(self, commands: Iterable[Command]) -> None:
        """Queues commands for the next step, once there is room."""
        while len(self._pending) >= MAX_PENDING_COMMANDS:
            self._taken.clear()
            await self._taken.wait()
        self._pending.extend(commands)
        self._wake.set()

    @property
    def is_idle(self) -> bool:
        """Nothing waits, and no generation is open."""
        return not (self._pending or self._worker.has_work or self._worker.num_open)

    async def run(self) -> None:
        """Steps while there is work; ends by cancellation."""
        while True:
            if not self._pending and not self._worker.has_work:
                await self._idle()
            commands, self._pending = self._pending, []
            self._wake.clear()
            self._taken.set()
            self._deliver(await self._device.run(self._worker.step, commands))

    async def _idle(self) -> None:
        while not self._wake.is_set():
            try:
                async with asyncio.timeout(TIDY_INTERVAL_S):
                    await self._wake.wait()
            except TimeoutError:
                await self._device.run(self._worker.tidy)

    def _deliver(self, results: Sequence[Result]) -> None:
        by_peer: dict[int, list[Result]] = {}
        for result in results:
            by_peer.setdefault(result.key.peer_id, []).append(result)
        for peer_id, theirs in by_peer.items():
            if peer := self._peers.get(peer_id):  # else its stream has ended
                peer.deliver(theirs)

"""Continuous batching, for both tiers: commands gather while a step runs; the next takes them all.

The batch is whatever has gathered; a service may wait a moment for those it has just answered. Owns
the hand-over between event loop and device thread and the routing of results to the streams they
belong to. Knows neither protobuf nor what a step does; lives on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from outrider.engine.device_thread import DeviceThread
from outrider.errors import CapacityExceeded

# How often an idle service looks for what it kept too long.
TIDY_INTERVAL_S = 5.0
# However long a step: those who wait for their draft do not come back at once.
MAX_REJOIN_S = 0.005
# A stream that has more than this waiting is not read further: gRPC's flow control takes over.
MAX_PENDING_COMMANDS = 16_384
# One for each orchestrator that uses the replica, and those that are coming and going.
MAX_STREAMS = 1_024


@dataclass(frozen=True)
class GenerationKey:
    """`peer_id`: one stream of one orchestrator. `generation_id`: its name on that stream."""

    peer_id: int
    generation_id: int


class Keyed(Protocol):
    @property
    def key(self) -> GenerationKey: ...


Command = TypeVar("Command", bound=Keyed)
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

    def prepare(self, budget_s: float) -> None:
        """Before the first step; takes about so long."""

    def step(
        self, commands: Sequence[CommandIn], is_interrupted: Callable[[], bool]
    ) -> Sequence[ResultOut]:
        """Applies the commands in order, works until there are results. Raises for none of them.

        Returns after the batch under way once `is_interrupted`, which any thread may call.
        """

    def tidy(self) -> None:
        """For idle moments."""


class Peer(Protocol[ResultIn]):
    """Who gets a stream's results; called on the event loop, must not block."""

    def deliver(self, results: Sequence[ResultIn]) -> None: ...


class Scheduler(Generic[Command, Result]):
    """One per service; `run` is its only task."""

    def __init__(
        self, worker: Worker[Command, Result], device: DeviceThread, *, rejoin_share: float = 0.0
    ) -> None:
        """`rejoin_share` of a step is waited at most for those it answered to be back.

        For a service whose generations ask again at once. A step that left without them would take
        the others alone, and they the next: two cohorts for ever, and twice the steps.
        """
        self._worker = worker
        self._rejoin_share = rejoin_share
        self._device = device
        self._pending: list[Command] = []
        self._peers: dict[int, Peer[Result]] = {}
        self._wake = asyncio.Event()
        self._taken = asyncio.Event()

    def attach(self, peer_id: int, peer: Peer[Result]) -> None:
        """Raises CapacityExceeded."""
        if len(self._peers) >= MAX_STREAMS:
            raise CapacityExceeded(f"{MAX_STREAMS} streams are open, the most allowed")
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

    async def prepare(self, budget_s: float) -> None:
        """To be awaited before `run`; takes about so long."""
        await self._device.run(self._worker.prepare, budget_s)

    async def run(self) -> None:
        """Steps while there is work; ends by cancellation."""
        while True:
            if not self._pending and not self._worker.has_work:
                await self._idle()
            commands, self._pending = self._pending, []
            self._wake.clear()
            self._taken.set()
            started_at = time.monotonic()
            results = await self._device.run(self._worker.step, commands, self._has_news)
            self._deliver(results)
            if results and self._rejoin_share:
                step_s = time.monotonic() - started_at
                await self._rejoined({result.key for result in results}, step_s)

    async def _rejoined(self, answered: set[GenerationKey], step_s: float) -> None:
        """Returns when all of them have asked again or ended, or it would cost too much."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(self._rejoin_share * step_s, MAX_REJOIN_S)):
                while not answered <= {command.key for command in self._pending}:
                    self._wake.clear()
                    await self._wake.wait()

    def _has_news(self) -> bool:
        return bool(self._pending)

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

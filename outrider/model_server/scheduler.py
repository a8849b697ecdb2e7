"""Continuous batching for both tiers: commands queue while a step runs; the next step takes all.

Owns the hand-over between event loop and device thread, and routes results to their streams. A
service may wait briefly for the generations it has just answered. What a step does is up to the
`Worker`. For use on the event loop only.
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

# How often an idle service frees expired sessions.
TIDY_INTERVAL_S = 5.0
# Upper bound, however long a step takes: generations that wait for a draft do not return at once.
MAX_REJOIN_S = 0.005
# At this many queued commands no stream is read further; gRPC's flow control takes over.
MAX_PENDING_COMMANDS = 16_384
# One for each orchestrator that uses the replica, plus those that connect and disconnect.
MAX_STREAMS = 1_024


@dataclass(frozen=True)
class GenerationKey:
    """`peer_id`: one stream of one orchestrator. `generation_id`: its id on that stream."""

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
    """The part of a service that runs on the device thread."""

    @property
    def has_work(self) -> bool:
        """Whether a step without commands would have work to do."""

    @property
    def num_open(self) -> int:
        """Number of open generations."""

    def prepare(self, budget_s: float) -> None:
        """Runs before the first step; takes about `budget_s`."""

    def step(
        self, commands: Sequence[CommandIn], is_interrupted: Callable[[], bool]
    ) -> Sequence[ResultOut]:
        """Applies the commands in order, then works until there are results.

        Returns after the running batch once `is_interrupted`, which any thread may call. Never
        raises because of a single command.
        """

    def tidy(self) -> None:
        """Periodic cleanup; called while the service is idle."""


class Peer(Protocol[ResultIn]):
    """Receives a stream's results. Called on the event loop; must not block."""

    def deliver(self, results: Sequence[ResultIn]) -> None: ...


class Scheduler(Generic[Command, Result]):
    """One per service. `run` is its only task."""

    def __init__(
        self, worker: Worker[Command, Result], device: DeviceThread, *, rejoin_share: float = 0.0
    ) -> None:
        """Waits at most `rejoin_share` of a step for the answered generations' next requests.

        For a service whose generations ask again at once. A step that left without them would
        serve only the others. The sessions would settle into two alternating batches and need twice
        the steps.
        """
        self._worker = worker
        self._rejoin_share = rejoin_share
        self._device = device
        self._pending: list[Command] = []
        self._peers: dict[int, Peer[Result]] = {}
        self._wake = asyncio.Event()
        self._taken = asyncio.Event()

    def attach(self, peer_id: int, peer: Peer[Result]) -> None:
        """Registers a stream. Raises CapacityExceeded at MAX_STREAMS."""
        if len(self._peers) >= MAX_STREAMS:
            raise CapacityExceeded(f"{MAX_STREAMS} streams are open, the maximum")
        self._peers[peer_id] = peer

    def detach(self, peer_id: int, last_commands: Iterable[Command]) -> None:
        """Removes an ended stream: drops its results; `last_commands` free its resources."""
        self._peers.pop(peer_id, None)
        self._pending.extend(last_commands)
        self._wake.set()

    async def submit(self, commands: Iterable[Command]) -> None:
        """Queues commands for the next step; waits while the queue is full."""
        while len(self._pending) >= MAX_PENDING_COMMANDS:
            self._taken.clear()
            await self._taken.wait()
        self._pending.extend(commands)
        self._wake.set()

    def submit_held(self, commands: Iterable[Command]) -> None:
        """Queues the commands of one generation that were held back, without waiting for room."""
        self._pending.extend(commands)
        self._wake.set()

    @property
    def is_idle(self) -> bool:
        """Whether no command is queued and no generation is open."""
        return not (self._pending or self._worker.has_work or self._worker.num_open)

    async def prepare(self, budget_s: float) -> None:
        """Must be awaited before `run`; takes about `budget_s`."""
        await self._device.run(self._worker.prepare, budget_s)

    async def run(self) -> None:
        """Runs steps while there is work, until cancelled."""
        while True:
            if not self._pending and not self._worker.has_work:
                await self._idle()
            commands, self._pending = self._pending, []
            self._wake.clear()
            self._taken.set()
            started_at = time.monotonic()
            results = await self._device.run(self._worker.step, commands, self._has_commands)
            self._deliver(results)
            if results and self._rejoin_share:
                step_s = time.monotonic() - started_at
                await self._wait_for_rejoin({result.key for result in results}, step_s)

    async def _wait_for_rejoin(self, answered: set[GenerationKey], step_s: float) -> None:
        """Returns when each has sent a command, or when the longest useful wait is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(self._rejoin_share * step_s, MAX_REJOIN_S)):
                while not answered <= {command.key for command in self._pending}:
                    self._wake.clear()
                    await self._wake.wait()

    def _has_commands(self) -> bool:
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
        for peer_id, stream_results in by_peer.items():
            if peer := self._peers.get(peer_id):  # otherwise its stream has ended
                peer.deliver(stream_results)

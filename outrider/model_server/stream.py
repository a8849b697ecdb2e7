"""One orchestrator's stream at a model service: frames in, results out, and what it leaves behind.

Knows of either tier's frames what both have: opens, closes, names to forget. Their items are read
by subclasses. Lives on the event loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import grpc

from outrider.errors import InvalidRequest, Unavailable
from outrider.model_server.messages import Close, Failure, FailureReason, Forget
from outrider.model_server.replica_status import ReplicaStatus
from outrider.model_server.scheduler import GenerationKey, Keyed, Scheduler
from outrider.model_server.stream_telemetry import StreamTelemetry
from outrider.replica import CostReport, ReplicaState
from outrider.runtime.grpc_status import StreamWriter, translated
from outrider.runtime.grpc_streams import Outbox, StreamCall
from outrider.runtime.heartbeat import Heartbeat
from outrider.runtime.protobuf import costs_to_proto, state_to_proto

Command = TypeVar("Command", bound=Keyed)
Result = TypeVar("Result", bound=Keyed)
Frame = Any

# Opens, rows, commits, closes and names together. An orchestrator sends at most 256.
MAX_FRAME_ITEMS = 16_384
# Open, or refused and not closed. A replica has fewer KV pages, and takes no more than those.
MAX_OPEN_GENERATIONS = 65_536
# Heartbeats that an orchestrator may miss before its stream is ended: 10 s of its 0.5. A frame with
# a long context may hold the others up, and what a dead orchestrator leaves is in nobody's way.
MAX_QUIET_BEATS = 20


class StreamPeer(ABC, Generic[Command, Result]):
    """`open_keys` are the generations to close when the stream ends.

    Closes, Forgets and Failures are among either tier's commands and results.
    """

    def __init__(self, peer_id: int) -> None:
        self.id = peer_id
        # The replica's state goes the way of the results, so that it is told in their order.
        self.outbox: Outbox[Result | ReplicaState] = Outbox()
        self.open_keys: set[GenerationKey] = set()
        self._state = ReplicaState.READY
        self.watch: StreamTelemetry | None = None

    def deliver(self, results: Sequence[Result]) -> None:
        if self.watch is not None:
            self.watch.answered(results)
        self.outbox.put(results)

    def tell(self, state: ReplicaState) -> None:
        """What the replica has become."""
        self._state = state
        self.outbox.put([state])

    def admit(self, key: GenerationKey) -> None:
        """Notes that the generation is to be closed with the stream.

        Raises InvalidRequest, and Unavailable where the replica takes no new ones now.
        """
        if self._state in (ReplicaState.DRAINING, ReplicaState.STUCK, ReplicaState.FAILING):
            raise Unavailable(f"the replica is {self._state.value}: it takes no generations")
        if len(self.open_keys) >= MAX_OPEN_GENERATIONS and key not in self.open_keys:
            raise InvalidRequest(
                "generation_id", f"{len(self.open_keys)} are open on this stream, the most allowed"
            )
        self.open_keys.add(key)

    @abstractmethod
    def opening(self, key: GenerationKey, item: Any) -> Command:
        """Of one of the frame's opens. Raises InvalidRequest."""

    @abstractmethod
    def requests(self, frame: Frame) -> Iterable[Any]:
        """What the frame asks of generations that are open."""

    @abstractmethod
    def request(self, key: GenerationKey, item: Any) -> Command:
        """Of one of them. Raises InvalidRequest."""

    def commands(self, frame: Frame) -> list[Command]:
        """The frame's commands in order; what cannot be read fails its generation alone."""
        commands: list[Any] = []
        for item in frame.opens:
            commands += self._read(self._admitted, item)
        for item in self.requests(frame):
            commands += self._read(self.request, item)
        for item in frame.closes:
            key = GenerationKey(self.id, item.generation_id)
            self.open_keys.discard(key)
            commands.append(Close(key, keep=item.keep))
        nobody = GenerationKey(self.id, 0)
        return commands + [Forget(nobody, name) for name in frame.forget_session_ids]

    def closing(self) -> list[Command]:
        """Of all that is open, for the end of the stream."""
        commands: list[Any] = [Close(key, keep=False) for key in self.open_keys]
        return commands

    def _admitted(self, key: GenerationKey, item: Any) -> Command:
        self.admit(key)
        return self.opening(key, item)

    def _read(self, parse: Callable[[GenerationKey, Any], Command], item: Any) -> list[Any]:
        key = GenerationKey(self.id, item.generation_id)
        try:
            return [parse(key, item)]
        except InvalidRequest as error:
            self._fail(Failure(key, FailureReason.BAD_MESSAGE, str(error)))
            return [Close(key, keep=False)]  # should the id be in use
        except Unavailable as error:
            self._fail(Failure(key, FailureReason.DRAINING, str(error)))
            return []

    def _fail(self, failure: Any) -> None:
        self.deliver([failure])


async def serve_stream(
    scheduler: Scheduler[Command, Result],
    peer: StreamPeer[Command, Result],
    frames: AsyncIterator[Frame],
    context: grpc.aio.ServicerContext[Any, Any],
    to_frame: Callable[[Sequence[Result]], Frame],
    costs: Callable[[], CostReport],
    status: ReplicaStatus,
    watch: StreamTelemetry,
) -> None:
    """Reads and writes independently: reading a frame never waits for a step.

    `costs` are told with the frame after each change, the state at the start and at each change.
    """

    async def read(frame: Frame) -> None:
        if frame.heartbeat_ms:
            heartbeat.begin(frame.heartbeat_ms)
        with heartbeat.busy():
            await peer.outbox.room()  # who asks and does not listen waits
            _check_size(frame)
            watch.read(frame)
            await scheduler.submit(peer.commands(frame))

    writer = StreamWriter(context)
    heartbeat = Heartbeat(peer.outbox, MAX_QUIET_BEATS)
    told = costs()  # with the model's description, before the stream
    async with translated(context):
        scheduler.attach(peer.id, peer)
        peer.watch = watch
        try:
            with status.followed_by(peer.tell):
                async with heartbeat, StreamCall(frames, read, peer.outbox):
                    async for items in peer.outbox.batches():
                        frame = _answer(items, to_frame)
                        if (report := costs()) is not told:
                            told = report
                            frame.costs.CopyFrom(costs_to_proto(report))
                        await writer.write(frame)
        finally:
            scheduler.detach(peer.id, peer.closing())
            watch.closed()


def _answer(
    items: Sequence[Result | ReplicaState], to_frame: Callable[[Sequence[Result]], Frame]
) -> Frame:
    frame = to_frame([item for item in items if not isinstance(item, ReplicaState)])
    for item in items:
        if isinstance(item, ReplicaState):
            frame.state = state_to_proto(item)
    return frame


def _check_size(frame: Frame) -> None:
    """Raises InvalidRequest, which ends the stream: whose item is one too many nobody can say."""
    counts = {field.name: len(items) for field, items in frame.ListFields() if field.is_repeated}
    if sum(counts.values()) > MAX_FRAME_ITEMS:
        most = max(counts, key=lambda name: counts[name])
        raise InvalidRequest(
            most, f"{sum(counts.values())} items in one frame; at most {MAX_FRAME_ITEMS}"
        )

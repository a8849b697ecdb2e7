"""An orchestrator's stream at a model service: frames in, results out, cleanup at the end.

Handles the parts of a frame that both tiers share: opens, closes, sessions to forget. Subclasses
parse the tier's own opens and requests. For use on the event loop only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import grpc

from outrider.errors import InvalidRequest, Unavailable
from outrider.model_server.grammar_gate import GrammarGate
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

# Opens, requests, commits, closes and session ids together. An orchestrator sends at most 256.
MAX_FRAME_ITEMS = 16_384
# Counts open generations and rejected ones not yet closed. A replica has fewer KV pages than this,
# and rejects generations beyond them.
MAX_OPEN_GENERATIONS = 65_536
# Heartbeats that an orchestrator may miss before its stream ends: 10 s at its 0.5 s interval. A
# frame with a long context may delay heartbeats, and a dead orchestrator's KV blocks nobody.
MAX_MISSED_HEARTBEATS = 20


class StreamPeer(ABC, Generic[Command, Result]):
    """Server side of one stream. `open_keys` are the generations to close when the stream ends.

    Commands of both tiers include Close and Forget; their results include Failure.
    """

    def __init__(self, peer_id: int) -> None:
        self.id = peer_id
        # State changes go through the same queue as results, so the order is preserved.
        self.outbox: Outbox[Result | ReplicaState] = Outbox()
        self.open_keys: set[GenerationKey] = set()
        # Closed by a frame whose commands are not queued yet.
        self._closing_keys: set[GenerationKey] = set()
        self._state = ReplicaState.READY
        self.watch: StreamTelemetry | None = None

    def deliver(self, results: Sequence[Result]) -> None:
        if self.watch is not None:
            self.watch.answered(results)
        self.outbox.put(results)

    def send_state(self, state: ReplicaState) -> None:
        """Sends a new state of the replica."""
        self._state = state
        self.outbox.put([state])

    def admit(self, key: GenerationKey) -> None:
        """Adds the generation to those that are closed with the stream.

        Raises InvalidRequest if too many are open, Unavailable if the replica accepts no new ones.
        """
        if self._state in (ReplicaState.DRAINING, ReplicaState.STUCK, ReplicaState.FAILING):
            raise Unavailable(f"the replica is {self._state.value} and accepts no generations")
        if len(self.open_keys) >= MAX_OPEN_GENERATIONS and key not in self.open_keys:
            raise InvalidRequest(
                "generation_id",
                f"{len(self.open_keys)} generations are open on this stream, the maximum",
            )
        self.open_keys.add(key)

    @abstractmethod
    def opening(self, key: GenerationKey, item: Any) -> Command:
        """The command for one of the frame's opens. Raises InvalidRequest."""

    @abstractmethod
    def requests(self, frame: Frame) -> Iterable[Any]:
        """The frame's requests to open generations."""

    @abstractmethod
    def request(self, key: GenerationKey, item: Any) -> Command:
        """The command for one of these requests. Raises InvalidRequest."""

    def commands(self, frame: Frame) -> list[Command]:
        """The frame's commands in order. An item that cannot be read fails only its generation."""
        commands: list[Any] = []
        for item in frame.opens:
            commands += self._read(self._admitted, item)
        for item in self.requests(frame):
            commands += self._read(self.request, item)
        for item in frame.closes:
            key = GenerationKey(self.id, item.generation_id)
            self.open_keys.discard(key)
            self._closing_keys.add(key)
            commands.append(Close(key, keep=item.keep))
        no_generation = GenerationKey(self.id, 0)
        sessions = [self.session_key(session_id) for session_id in frame.forget_session_ids]
        return commands + [Forget(no_generation, session) for session in sessions]

    def session_key(self, session_id: str) -> str:
        """Name of the session at this replica."""
        return session_id

    def queued(self) -> None:
        """The commands of the last frame are queued."""
        self._closing_keys.clear()

    def closing(self) -> list[Command]:
        """Commands that close every open generation, for the end of the stream."""
        keys = self.open_keys | self._closing_keys
        commands: list[Any] = [Close(key, keep=False) for key in keys]
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
            return [Close(key, keep=False)]  # the id may be in use
        except Unavailable as error:
            self._fail(Failure(key, FailureReason.DRAINING, str(error)))
            return []

    def _fail(self, failure: Any) -> None:
        self.deliver([failure])


async def serve_stream(
    scheduler: Scheduler[Command, Result],
    peer: StreamPeer[Command, Result],
    gate: GrammarGate[Command],
    frames: AsyncIterator[Frame],
    context: grpc.aio.ServicerContext[Any, Any],
    to_frame: Callable[[Sequence[Result]], Frame],
    costs: Callable[[], CostReport],
    status: ReplicaStatus,
    watch: StreamTelemetry,
) -> None:
    """Serves one stream; reading and writing are independent, so reading never waits for a step.

    Sends `costs` after each change, and the state at the start and at each change.
    """

    async def read(frame: Frame) -> None:
        if frame.heartbeat_ms:
            heartbeat.begin(frame.heartbeat_ms)
        with heartbeat.busy():
            await peer.outbox.room()  # backpressure for a peer that does not read its answers
            _check_size(frame)
            watch.read(frame)
            await scheduler.submit(gate.passed(peer.commands(frame)))
            peer.queued()

    writer = StreamWriter(context)
    heartbeat = Heartbeat(peer.outbox, MAX_MISSED_HEARTBEATS)
    reported = costs()  # the first report was sent with ModelInfo, before the stream
    async with translated(context):
        scheduler.attach(peer.id, peer)
        peer.watch = watch
        try:
            with status.listened_by(peer.send_state):
                async with heartbeat, StreamCall(frames, read, peer.outbox):
                    async for items in peer.outbox.batches():
                        frame = _response_frame(items, to_frame)
                        if (report := costs()) is not reported:
                            reported = report
                            frame.costs.CopyFrom(costs_to_proto(report))
                        await writer.write(frame)
        finally:
            gate.close()
            scheduler.detach(peer.id, peer.closing())
            watch.closed()


def _response_frame(
    items: Sequence[Result | ReplicaState], to_frame: Callable[[Sequence[Result]], Frame]
) -> Frame:
    frame = to_frame([item for item in items if not isinstance(item, ReplicaState)])
    for item in items:
        if isinstance(item, ReplicaState):
            frame.state = state_to_proto(item)
    return frame


def _check_size(frame: Frame) -> None:
    """Raises InvalidRequest, which ends the stream: no single generation is at fault."""
    counts = {field.name: len(items) for field, items in frame.ListFields() if field.is_repeated}
    if sum(counts.values()) > MAX_FRAME_ITEMS:
        most = max(counts, key=lambda name: counts[name])
        raise InvalidRequest(
            most, f"{sum(counts.values())} items in one frame; at most {MAX_FRAME_ITEMS}"
        )

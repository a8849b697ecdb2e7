"""Replica link: one long-lived stream to one replica, for all generations there.

Connects, checks the replica's model, sends pending messages as one frame, dispatches what arrives,
and reconnects when the stream breaks. Runs on the event loop. The messages of each tier are in its
subclasses: `draft_client`, `target_client`.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

import grpc
import structlog

from orchestrator.replicas.circuit_breaker import CircuitBreaker
from orchestrator.replicas.refusal import ReplicaRefusal
from outrider.client.channel import OpenChannel, open_plain
from outrider.errors import ConfigError, Unavailable
from outrider.replica import CostReport
from outrider.runtime.grpc_streams import Outbox
from outrider.runtime.heartbeat import Heartbeat
from outrider.runtime.message_limits import SMALL_BYTES
from outrider.runtime.protobuf import costs_from_proto
from outrider.v1 import model_pb2

log = structlog.get_logger()

MODEL_INFO_TIMEOUT_S = 5.0
# A replica that sends nothing for 5 heartbeats (2.5 s) is considered lost.
HEARTBEAT_MS = 500
MAX_MISSED_HEARTBEATS = 5
# Between attempts. About as long as the channel's own backoff (outrider.runtime.grpc_status).
RECONNECT_DELAY_S = 0.2
MAX_FRAME_ITEMS = 256
# Only an open with a long context may be larger; it is then a frame of its own. So frames stay far
# below the message size limit, and replicas parse them unchecked (outrider.runtime.message_limits).
MAX_FRAME_BYTES = SMALL_BYTES
# Bytes per item in a frame besides the item: one of tag, at most five of length.
_MAX_ITEM_HEADER_BYTES = 6


class StreamHandle(Protocol):
    """One generation at the replica."""

    def link_lost(self, why: str) -> None: ...


# Fetches the replica's ModelInfo.token_hashes.
FetchTokenHashes = Callable[[], Awaitable[bytes]]
# Raises ConfigError if the replica's model does not fit.
ModelCheck = Callable[[model_pb2.ModelInfo, FetchTokenHashes], Awaitable[None]]

_OPEN_STATES = (model_pb2.REPLICA_STATE_UNSPECIFIED, model_pb2.REPLICA_STATE_READY)

Item = TypeVar("Item")
HandleType = TypeVar("HandleType", bound=StreamHandle)
Frame = Any


class ReplicaLink(ABC, Generic[Item, HandleType]):
    """Link to one replica.

    `check_model` is called at each connection. `on_change` is called when the connection, a refusal
    or the replica's state has changed.
    """

    tier: str
    open_type: type
    close_type: type

    def __init__(
        self,
        endpoint: str,
        check_model: ModelCheck,
        on_change: Callable[[], None],
        open_channel: OpenChannel = open_plain,
    ) -> None:
        self.endpoint = endpoint
        self.model: model_pb2.ModelInfo | None = None
        # Costs of passes, as last reported by the replica.
        self.costs = CostReport()
        self.refusal = ReplicaRefusal(self.tier, endpoint, on_change)
        # Generations of other orchestrators there, according to the registry.
        self.num_others = 0
        self.breaker = CircuitBreaker(self.tier, endpoint, on_change)
        self._state: int = model_pb2.REPLICA_STATE_UNSPECIFIED
        self._is_unresponsive = False
        self._check_model = check_model
        self._on_change = on_change
        self._open_channel = open_channel
        self._handles: dict[int, HandleType] = {}
        self._outbox: Outbox[Item] | None = None
        self._next_id = 0

    @property
    def is_connected(self) -> bool:
        return self._outbox is not None

    @property
    def is_idle(self) -> bool:
        """Whether no generation of this orchestrator is there."""
        return not self._handles

    @property
    def takes_generations(self) -> bool:
        """Whether it accepts generations: connected, ready, and responsive."""
        return self.is_connected and not self._is_unresponsive and self._state in _OPEN_STATES

    @property
    def condition(self) -> str:
        """State for metrics and logs: the replica's own, or why it is not used."""
        if not self.is_connected:
            return "refused" if self.refusal.why else "away"
        if self._is_unresponsive:
            return "silent"
        return "failing" if self.breaker.is_open else _state_name(self._state)

    @property
    def num_open(self) -> int:
        """Open generations of this orchestrator there."""
        return len(self._handles)

    @property
    def max_len(self) -> int:
        """Tokens of the longest generation that fits the replica; 0 before it is connected."""
        model = self.model
        return min(model.max_context_len, model.kv_capacity_tokens) if model is not None else 0

    @property
    def load(self) -> int:
        """Open generations there, including those of other orchestrators."""
        return len(self._handles) + self.num_others

    def mark_unresponsive(self) -> None:
        """A request timed out: no new generations go there until it sends something."""
        self._is_unresponsive = True
        self._on_change()

    async def run(self) -> None:
        """Connects again whenever the stream ends; ends by cancellation."""
        while True:
            try:
                await self._connect()
                why = "the stream ended"
            except grpc.aio.AioRpcError as error:
                why = f"{error.code().name}: {error.details()}"
            except Unavailable as error:
                why = str(error)
            except ConfigError as error:
                why = str(error)
                self.refusal.note(error)
            except asyncio.InvalidStateError:  # grpc.aio raises it for a write to a broken stream
                why = "the stream broke"
            except asyncio.CancelledError:  # of this task, or only of the call
                why = "the stream was cancelled"
            except Exception as error:  # a defect here must not end the process
                log.error("link_failed", tier=self.tier, exc_info=error)
                why = f"internal error: {error}"
            if _is_cancelled():  # also if the stream broke at the same moment
                self._disconnected("the link is closed")
                raise asyncio.CancelledError
            if self.is_connected:
                log.warning("replica_lost", tier=self.tier, endpoint=self.endpoint, why=why)
            self._disconnected(why)
            self._on_change()
            await asyncio.sleep(RECONNECT_DELAY_S)

    async def _connect(self) -> None:
        async with self._open_channel(self.endpoint) as channel:
            async with self.refusal.backing_off(channel):
                model, self._state = await self._get_model(channel)
                await self._check_model(model, lambda: self._get_token_hashes(channel))
            outbox: Outbox[Item] = Outbox()
            call = self._open_stream(channel)
            try:
                self.model, self._outbox = model, outbox
                self.refusal.clear()
                self._is_unresponsive = False
                self.breaker.reset()
                self._on_change()
                log.info("replica_connected", tier=self.tier, endpoint=self.endpoint)
                await self._exchange(call, outbox)
            finally:
                call.cancel()  # leaving the loop does not cancel it

    async def _send(self, call: Any, outbox: Outbox[Item]) -> None:
        heartbeat_ms = HEARTBEAT_MS  # in the first frame
        async for items in outbox.batches():
            for part in self._in_order(items):
                frame = self._frame(part)
                frame.heartbeat_ms, heartbeat_ms = heartbeat_ms, 0
                await call.write(frame)

    async def _exchange(self, call: Any, outbox: Outbox[Item]) -> None:
        """Sends and receives until the stream ends. Raises Unavailable without heartbeats."""
        heartbeat = Heartbeat(outbox, MAX_MISSED_HEARTBEATS)
        heartbeat.begin(HEARTBEAT_MS)
        async with heartbeat:
            sending = asyncio.create_task(self._send(call, outbox))
            # If sending fails, stop reading: no more answers come.
            sending.add_done_callback(lambda _: call.cancel())
            try:
                async for frame in call:
                    heartbeat.received()
                    if self._is_unresponsive:
                        self._is_unresponsive = False
                        self._on_change()
                    if frame.state:
                        self._set_state(frame.state)
                    self._dispatch(frame)
            finally:
                sending.cancel()
                with contextlib.suppress(
                    asyncio.CancelledError, asyncio.InvalidStateError, grpc.aio.AioRpcError
                ):
                    await sending

    def _set_state(self, state: int) -> None:
        if state == self._state:
            return
        name = _state_name(state)
        log.info("replica_state", tier=self.tier, endpoint=self.endpoint, state=name)
        self._state = state
        if state in (model_pb2.REPLICA_STATE_STUCK, model_pb2.REPLICA_STATE_FAILING):
            self._lose_all(f"is {name}")
        self._on_change()

    def _disconnected(self, why: str) -> None:
        self._outbox = None
        self._lose_all(f"is gone: {why}")

    def _lose_all(self, why: str) -> None:
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.link_lost(f"the {self.tier} replica {self.endpoint} {why}")

    def attach(self, make_handle: Callable[[int], HandleType]) -> HandleType:
        """Add a generation and return its handle. Raises Unavailable without a connection."""
        if not self.is_connected:
            raise Unavailable(f"the {self.tier} replica is not connected", self.endpoint)
        self.breaker.tried()
        self._next_id += 1
        handle = make_handle(self._next_id)
        self._handles[self._next_id] = handle
        return handle

    def detach(self, generation_id: int) -> None:
        self._handles.pop(generation_id, None)

    def send(self, *items: Item) -> None:
        """Queue items for the next frame. Without a connection they are dropped."""
        if self._outbox is not None:
            self._outbox.put(items)

    async def _get_model(self, channel: grpc.aio.Channel) -> tuple[model_pb2.ModelInfo, int]:
        """The model and state of the replica. Stores its costs."""
        response = await self._ask_model(channel)
        self.costs = costs_from_proto(response.costs)
        return response.model, response.state

    async def _get_token_hashes(self, channel: grpc.aio.Channel) -> bytes:
        response = await self._ask_model(channel, with_token_hashes=True)
        return bytes(response.model.token_hashes)

    @abstractmethod
    async def _ask_model(self, channel: grpc.aio.Channel, **fields: bool) -> Any:
        """The response of GetModelInfo; `fields`: fields of the request."""

    @abstractmethod
    def _open_stream(self, channel: grpc.aio.Channel) -> Any: ...

    def _in_order(self, items: list[Item]) -> list[list[Item]]:
        """Splits items into frames, so that none exceeds MAX_FRAME_ITEMS or MAX_FRAME_BYTES.

        An open after a close starts a new frame, because replicas apply a frame's opens first.
        """
        parts: list[list[Item]] = [[]]
        has_close = False
        num_bytes = 0
        for item in items:
            size = _num_bytes(item)
            comes_late = has_close and isinstance(item, self.open_type)
            is_full = len(parts[-1]) >= MAX_FRAME_ITEMS or num_bytes + size > MAX_FRAME_BYTES
            if parts[-1] and (comes_late or is_full):
                parts.append([])
                has_close, num_bytes = False, 0
            has_close = has_close or isinstance(item, self.close_type)
            num_bytes += size
            parts[-1].append(item)
        return parts

    @abstractmethod
    def _frame(self, items: list[Item]) -> Frame: ...

    @abstractmethod
    def _dispatch(self, frame: Frame) -> None: ...


def _num_bytes(item: Any) -> int:
    """Bytes of an item in a frame, with tag and length."""
    size = len(item.encode()) if isinstance(item, str) else item.ByteSize()
    return int(size) + _MAX_ITEM_HEADER_BYTES


def _state_name(state: int) -> str:
    """Name of a state; the number if a later release added it."""
    if state == model_pb2.REPLICA_STATE_UNSPECIFIED:
        return "ready"
    names = {number: name for name, number in model_pb2.ReplicaState.items()}
    return names.get(state, str(state)).removeprefix("REPLICA_STATE_").lower()


def _is_cancelled() -> bool:
    """Whether this task is cancelled, not only a call that it awaits."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0

"""Runs one phase of load: sends requests when due, or in a closed loop, and records messages.

Every message is recorded when it arrives. One event loop drives thousands of streams. `records`
defines the metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from outrider.errors import ConfigError
from outrider.v1 import model_pb2, orchestrator_pb2, orchestrator_pb2_grpc
from outrider.vocabulary import Vocabulary
from outrider_bench.loadtest.plan import Conversation, Job, prompt_ids
from outrider_bench.loadtest.records import CUT, OK, Record
from outrider_bench.loadtest.requests import RequestOptions, note_failure, note_message

# Timeout of unary calls. If a deletion times out, its session expires later.
_SHORT_TIMEOUT_S = 10.0

Stub = orchestrator_pb2_grpc.OrchestratorServiceStub


@dataclass(frozen=True)
class LoadedOrchestrators:
    """The orchestrators under test and their model. Conversations use the connections in turn."""

    stubs: Sequence[Stub]
    info: orchestrator_pb2.GetModelInfoResponse
    ordinary_ids: npt.NDArray[np.int64]

    def stub(self, conversation: Conversation) -> Stub:
        """Stub for a conversation."""
        return self.stubs[conversation.jobs[0].index % len(self.stubs)]


async def loaded_orchestrators(*channels: grpc.aio.Channel) -> LoadedOrchestrators:
    """The orchestrators behind these channels. Raises grpc.aio.AioRpcError if none answers."""
    stubs = [Stub(channel) for channel in channels]
    request = orchestrator_pb2.GetModelInfoRequest(with_token_hashes=True)
    call: Any = stubs[0].GetModelInfo(request, timeout=_SHORT_TIMEOUT_S)
    info = await call
    return LoadedOrchestrators(stubs, info, _ordinary_ids(info.target))


def _ordinary_ids(model: model_pb2.ModelInfo) -> npt.NDArray[np.int64]:
    """Token ids for random prompts: those that mean a text and do not end an output.

    Without a tokenizer: the whole vocabulary except EOS. Raises ConfigError if none is left.
    """
    ids = np.arange(model.vocab_size)
    if model.token_hashes:
        ids = Vocabulary.from_bytes(model.token_hashes).ordinary_ids
    ids = ids[(ids < model.vocab_size) & ~np.isin(ids, list(model.eos_token_ids))]
    if not len(ids):
        raise ConfigError(f"{model.name}: its tokenizer has no ordinary tokens for random prompts")
    return ids


class Phase:
    """One phase of load. Time starts at its creation; `records` grows as requests are sent.

    `number` and `run` distinguish phases and tests, in prompts and session names. `on_end` is
    called after every answered request.
    """

    def __init__(
        self,
        orchestrators: LoadedOrchestrators,
        options: RequestOptions,
        *,
        number: int,
        seed: int,
        run: str,
        on_end: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self._orchestrators = orchestrators
        self._on_end = on_end
        self._options = options
        self._number = number
        self._seed = seed
        self._run = run
        self._begin = time.monotonic()
        self.records: list[Record] = []

    @property
    def now_s(self) -> float:
        """Seconds since the start of the phase."""
        return time.monotonic() - self._begin

    async def open_loop(self, conversations: Iterable[Conversation]) -> None:
        """Starts every conversation at its time, however many run. Returns when all have ended."""
        async with asyncio.TaskGroup() as tasks:
            for conversation in conversations:
                assert conversation.at_s is not None, "an open loop has times"
                await asyncio.sleep(max(0.0, conversation.at_s - self.now_s))
                tasks.create_task(self._conversation(conversation, conversation.at_s))

    async def closed_loop(
        self, conversations: Iterator[Conversation], num_clients: int, until_s: float = float("inf")
    ) -> None:
        """Each client starts its next conversation when its last ends; none after `until_s`."""

        async def client() -> None:
            # One shared iterator: no client waits for the slowest one's share.
            while self.now_s < until_s:
                conversation = next(conversations, None)
                if conversation is None:
                    return
                if not await self._conversation(conversation, self.now_s):
                    # A rejected client would retry at once, a thousand times a second.
                    await asyncio.sleep(0.05)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_clients):
                tasks.create_task(client())

    async def _conversation(self, conversation: Conversation, at_s: float) -> bool:
        """Sends all turns, each when the previous one has ended. Returns whether all succeeded."""
        session_id = f"load-{self._run}-{self._number}-{conversation.jobs[0].index}"
        session_id = session_id if conversation.is_session else ""
        intended_s, is_ok = at_s, True
        stub = self._orchestrators.stub(conversation)
        try:
            for job in conversation.jobs:
                if job.not_before_s > self.now_s:
                    await asyncio.sleep(job.not_before_s - self.now_s)
                    intended_s = job.not_before_s
                record = await self._call(stub, job, session_id, intended_s)
                if not record.is_ok:
                    is_ok = False
                    break
                intended_s = self.now_s
        finally:
            if session_id:
                await self._delete(stub, session_id)
        return is_ok

    async def _call(self, stub: Stub, job: Job, session_id: str, intended_s: float) -> Record:
        """Makes one call. Failures of the server are recorded, not raised."""
        ids = []
        if job.text is None:
            ids = prompt_ids(job, self._orchestrators.ordinary_ids, self._seed, self._number)
        request = self._options.request(job, ids, session_id, seed=self._seed + job.index)
        record = Record(job.index, intended_s, prompt_len=len(ids), sent_s=self.now_s)
        self.records.append(record)
        call: Any = stub.Generate(request, timeout=self._options.timeout_s)
        try:
            async for message in call:
                note_message(record, message, self.now_s)
            record.status = OK if record.finish_reason else "NO_RESULT"
        except grpc.aio.AioRpcError as error:
            note_failure(record, error)
        finally:
            if record.status == CUT:
                record.ended_s = None
            else:
                record.ended_s = record.ended_s or self.now_s
                self._on_end(record)
            call.cancel()  # leaving the loop does not cancel the call
        return record

    async def _delete(self, stub: Stub, session_id: str) -> None:
        request = orchestrator_pb2.DeleteSessionRequest(session_id=session_id)
        with contextlib.suppress(grpc.aio.AioRpcError):
            call: Any = stub.DeleteSession(request, timeout=_SHORT_TIMEOUT_S)
            await call

"""Runs one phase of load: sends requests when due, or in a closed loop, and records messages.

Every message is recorded when it arrives. One event loop drives thousands of streams. `records`
defines the metrics.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from outrider.errors import ConfigError
from outrider.tokenizer import Tokenizer
from outrider.v1 import model_pb2, orchestrator_pb2
from outrider.vocabulary import Vocabulary
from outrider_bench.loadtest.grpc_sender import SHORT_TIMEOUT_S, GrpcSender
from outrider_bench.loadtest.plan import Conversation, Job, prompt_ids
from outrider_bench.loadtest.records import CUT, Record
from outrider_bench.loadtest.requests import LoadRequest, RequestOptions, Sender


@dataclass(frozen=True)
class LoadedOrchestrators:
    """The orchestrators under test and their model. Conversations use the connections in turn.

    `ordinary_ids`: for random prompts. `tokenizer`: writes them as text in chats.
    """

    senders: Sequence[Sender]
    info: orchestrator_pb2.GetModelInfoResponse
    ordinary_ids: npt.NDArray[np.int64]
    tokenizer: Tokenizer | None = None

    def sender(self, conversation: Conversation) -> Sender:
        """Sender of a conversation."""
        return self.senders[conversation.jobs[0].index % len(self.senders)]


async def loaded_orchestrators(
    *channels: grpc.aio.Channel, tokenizer: Tokenizer | None = None
) -> LoadedOrchestrators:
    """The orchestrators behind these channels. Raises grpc.aio.AioRpcError if none answers."""
    senders = [GrpcSender(channel) for channel in channels]
    request = orchestrator_pb2.GetModelInfoRequest(with_token_hashes=True)
    call: Any = senders[0].stub.GetModelInfo(request, timeout=SHORT_TIMEOUT_S)
    info = await call
    return LoadedOrchestrators(senders, info, ordinary_ids(info.target), tokenizer)


def ordinary_ids(model: model_pb2.ModelInfo) -> npt.NDArray[np.int64]:
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

    async def open_loop(
        self, conversations: Iterable[Conversation], max_running: int | None = None
    ) -> None:
        """Starts every conversation at its time. Returns when all have ended.

        `max_running`: those that run at a time; further ones wait, and their latency counts from
        their time.
        """
        room = asyncio.Semaphore(max_running) if max_running is not None else None

        async def run(conversation: Conversation, at_s: float) -> None:
            if room is None:
                await self._conversation(conversation, at_s)
                return
            async with room:
                await self._conversation(conversation, at_s, max(0.0, self.now_s - at_s))

        async with asyncio.TaskGroup() as tasks:
            for conversation in conversations:
                assert conversation.at_s is not None, "an open loop has times"
                await asyncio.sleep(max(0.0, conversation.at_s - self.now_s))
                tasks.create_task(run(conversation, conversation.at_s))

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

    async def _conversation(
        self, conversation: Conversation, at_s: float, queued_s: float = 0.0
    ) -> bool:
        """Sends all turns, each when the previous one has ended. Returns whether all succeeded.

        `queued_s`: see `Record`, of the first turn.
        """
        session_id = f"load-{self._run}-{self._number}-{conversation.jobs[0].index}"
        sender = self._orchestrators.sender(conversation)
        session_id = session_id if conversation.is_session and sender.keeps_sessions else ""
        intended_s, is_ok = at_s, True
        earlier: list[dict[str, str]] = []
        try:
            for job in conversation.jobs:
                if job.not_before_s > self.now_s:
                    await asyncio.sleep(job.not_before_s - self.now_s)
                    intended_s = job.not_before_s
                request = self._request(job, session_id, earlier)
                record, text = await self._call(sender, request, intended_s, queued_s)
                if not record.is_ok:
                    is_ok = False
                    break
                if not session_id and request.messages:
                    earlier = [*map(dict, request.messages), {"role": "assistant", "content": text}]
                intended_s, queued_s = self.now_s, 0.0
        finally:
            if session_id:
                await sender.delete_session(session_id)
        return is_ok

    def _request(self, job: Job, session_id: str, earlier: Sequence[dict[str, str]]) -> LoadRequest:
        orchestrators = self._orchestrators
        ids: list[int] = []
        messages: Sequence[dict[str, str]] = ()
        if job.text is None:
            ids = prompt_ids(job, orchestrators.ordinary_ids, self._seed, self._number)
        if self._options.is_chat:
            text = job.text
            if text is None:
                assert orchestrators.tokenizer is not None, "checked"
                text = orchestrators.tokenizer.decode(ids)
            messages = (*earlier, {"role": "user", "content": text})
        return LoadRequest(job, self._options, self._seed + job.index, session_id, ids, messages)

    async def _call(
        self, sender: Sender, request: LoadRequest, intended_s: float, queued_s: float
    ) -> tuple[Record, str]:
        """Makes one call; returns its record and the output's text."""
        prompt_len = 0 if request.messages else len(request.token_ids)
        record = Record(request.job.index, intended_s, prompt_len, self.now_s, queued_s)
        self.records.append(record)
        text = ""
        try:
            text = await sender.send(request, record, lambda: self.now_s)
        finally:
            if record.status == CUT:
                record.ended_s = None
            else:
                record.ended_s = record.ended_s or self.now_s
                self._on_end(record)
        return record, text

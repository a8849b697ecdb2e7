"""The calls and their clock: visits are made when they are due, or as fast as they are answered.

Owns the streams of one phase; every message is noted the moment it comes. What the times mean is
for `records`. One event loop drives thousands of streams.
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
from outrider_bench.loadtest.asking import Ask, note_failure, note_message
from outrider_bench.loadtest.plan import Job, Visit, prompt_ids
from outrider_bench.loadtest.records import CUT, OK, Record

# Of the short calls. A server that does not answer a deletion loses a clean-up.
_SHORT_TIMEOUT_S = 10.0

Stub = orchestrator_pb2_grpc.OrchestratorServiceStub


@dataclass(frozen=True)
class Subject:
    """Whom a phase asks, and what it says of itself. Visits take the connections in turn."""

    stubs: Sequence[Stub]
    info: orchestrator_pb2.GetModelInfoResponse
    ordinary_ids: npt.NDArray[np.int64]

    def stub(self, visit: Visit) -> Stub:
        return self.stubs[visit.jobs[0].index % len(self.stubs)]


async def subject(*channels: grpc.aio.Channel) -> Subject:
    """Behind these channels. Raises grpc.aio.AioRpcError where nobody answers."""
    stubs = [Stub(channel) for channel in channels]
    request = orchestrator_pb2.GetModelInfoRequest(with_token_hashes=True)
    call: Any = stubs[0].GetModelInfo(request, timeout=_SHORT_TIMEOUT_S)
    info = await call
    return Subject(stubs, info, _ordinary_ids(info.target))


def _ordinary_ids(model: model_pb2.ModelInfo) -> npt.NDArray[np.int64]:
    """What prompts are made of: tokens that mean a text, and do not end one.

    Without a tokenizer: all of the vocabulary but what ends an output.
    """
    ids = np.arange(model.vocab_size)
    if model.token_hashes:
        ids = Vocabulary.from_bytes(model.token_hashes).ordinary_ids
    ids = ids[(ids < model.vocab_size) & ~np.isin(ids, list(model.eos_token_ids))]
    if not len(ids):
        raise ConfigError(f"{model.name}: its tokenizer has no ordinary token to make prompts of")
    return ids


class Phase:
    """One stretch of load. Its clock starts when it is made; `records` grows as requests are sent.

    `number` tells phases of one test apart: in prompts, and in the names of sessions, in which
    `run` tells tests apart. `on_end` is told of every request that was answered.
    """

    def __init__(
        self,
        subject: Subject,
        ask: Ask,
        *,
        number: int,
        seed: int,
        run: str,
        on_end: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self._subject = subject
        self._on_end = on_end
        self._ask = ask
        self._number = number
        self._seed = seed
        self._run = run
        self._begin = time.monotonic()
        self.records: list[Record] = []

    @property
    def now_s(self) -> float:
        """Seconds since its begin."""
        return time.monotonic() - self._begin

    async def open_loop(self, visits: Iterable[Visit]) -> None:
        """Every visit at its time, however many are under way; returns when all have ended."""
        async with asyncio.TaskGroup() as tasks:
            for visit in visits:
                assert visit.at_s is not None, "it has a time"
                await asyncio.sleep(max(0.0, visit.at_s - self.now_s))
                tasks.create_task(self._visit(visit, visit.at_s))

    async def closed_loop(
        self, visits: Iterator[Visit], num_callers: int, until_s: float = float("inf")
    ) -> None:
        """Each caller makes its next visit when the last has ended; none begins after `until_s`."""

        async def caller() -> None:
            # One iterator for all: nobody waits for the slowest caller's share.
            while self.now_s < until_s:
                visit = next(visits, None)
                if visit is None:
                    return
                if not await self._visit(visit, self.now_s):
                    # Who was refused would ask again at once, a thousand times a second.
                    await asyncio.sleep(0.05)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_callers):
                tasks.create_task(caller())

    async def _visit(self, visit: Visit, at_s: float) -> bool:
        """All turns, each when the one before has ended; whether all were answered."""
        session_id = f"load-{self._run}-{self._number}-{visit.jobs[0].index}"
        session_id = session_id if visit.is_session else ""
        intended_s, is_ok = at_s, True
        stub = self._subject.stub(visit)
        try:
            for job in visit.jobs:
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
        """Never raises for what the server does: that is noted."""
        ids = []
        if job.text is None:
            ids = prompt_ids(job, self._subject.ordinary_ids, self._seed, self._number)
        request = self._ask.request(job, ids, session_id, seed=self._seed + job.index)
        record = Record(job.index, intended_s, prompt_len=len(ids), sent_s=self.now_s)
        self.records.append(record)
        call: Any = stub.Generate(request, timeout=self._ask.timeout_s)
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
            call.cancel()  # leaving the loop does not cancel it: the server would go on
        return record

    async def _delete(self, stub: Stub, session_id: str) -> None:
        request = orchestrator_pb2.DeleteSessionRequest(session_id=session_id)
        with contextlib.suppress(grpc.aio.AioRpcError):
            call: Any = stub.DeleteSession(request, timeout=_SHORT_TIMEOUT_S)
            await call

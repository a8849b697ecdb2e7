"""A whole run: reference, load under faults, audit. Knows no terminal and no file."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from outrider.errors import Unavailable
from outrider.runtime.grpc_status import CLIENT_CHANNEL_OPTIONS
from outrider.v1 import orchestrator_pb2
from outrider_bench.chaos.audit import Audit
from outrider_bench.chaos.calls import Orchestrators
from outrider_bench.chaos.client import Follower, Stream
from outrider_bench.chaos.expected import Reference
from outrider_bench.chaos.faults import Fault, Tier
from outrider_bench.chaos.inject import Occurrence
from outrider_bench.chaos.jobs import Job, make_cases, make_jobs

_CALL_TIMEOUT_S = 10.0
# A client's channel may still be waiting to reconnect (at most 2 s: outrider.runtime.grpc_status).
_AFTERMATH_S = 3.0
# With so many something is broken for good: the rest would only take time.
_MAX_PROBLEMS = 25

Progress = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and of how much."""


@dataclass(frozen=True)
class Load:
    """`generations`: at least; more, until every sort of fault has happened. Lengths to
    `max_tokens`.
    """

    generations: int
    concurrent: int
    seed: int
    max_tokens: int
    num_cases: int


class Faults(Protocol):
    """Where faults come from. `happened` as of `Injector`."""

    @property
    def occurrences(self) -> Sequence[Occurrence[Stream]]: ...
    async def run(self, faults: Iterator[Fault]) -> None: ...
    def end(self) -> None: ...
    def happened(self, tier: Tier, replica: int, since: float) -> bool: ...


@dataclass
class Findings:
    """What a run has shown; `problems` beside those of the streams."""

    streams: list[Stream] = field(default_factory=list)
    occurrences: Sequence[Occurrence[Stream]] = ()
    problems: list[str] = field(default_factory=list)
    num_ties: int = 0
    num_unrecorded: int = 0
    duration_s: float = 0.0
    # Streams that were held against the reference and against Redis.
    num_audited: int = 0
    # The run was cancelled under load or in the audit: `streams` are those that had ended.
    is_cut: bool = False

    @property
    def all_problems(self) -> list[str]:
        own = [f"{s.job}: {what}" for s in self.streams for what in s.problems]
        return [*self.problems, *own]


class Run:
    """One run against the orchestrators at `endpoints`; `findings` grow while it lasts.

    Cancelled, it leaves in `findings` what there is.
    """

    def __init__(
        self,
        load: Load,
        endpoints: Sequence[str],
        progress: Progress,
        findings: Findings | None = None,
    ) -> None:
        self.findings = findings or Findings()
        self._load = load
        self._endpoints = endpoints
        self._progress = progress
        self._faults: Faults | None = None
        self._num_done = 0
        # Set with the connections.
        self.orchestrators: Orchestrators

    async def run(self, faults: Faults, schedule: Iterator[Fault], num_sorts: int) -> None:
        """Until the load is through, each of `num_sorts` sorts of faults has happened, and all is
        judged. Raises Unavailable if the system does not serve to begin with.
        """
        self._faults = faults
        async with self._connected() as self.orchestrators:
            info = await self._model_info()
            load = self._load
            cases = make_cases(load.seed, load.num_cases, info.target.vocab_size)
            reference = Reference(self.orchestrators[0], load.max_tokens)
            self._progress("reference", 0, len(cases))
            await reference.learn(cases)
            jobs = make_jobs(
                load.seed,
                cases,
                prefix=f"chaos-{time.time_ns() // 1000}",
                max_tokens=load.max_tokens,
                max_gamma=info.max_gamma,
                num_orchestrators=len(self.orchestrators),
            )
            began_at = time.monotonic()
            try:
                try:
                    await self._disturbed(faults, schedule, jobs, num_sorts)
                finally:
                    self.findings.duration_s = time.monotonic() - began_at
                    self.findings.occurrences = faults.occurrences
                await self._audit(reference)
            except asyncio.CancelledError:
                self.findings.is_cut = True
                self.findings.streams = [s for s in self.findings.streams if s.ended_at is not None]
                raise

    async def _disturbed(
        self, faults: Faults, schedule: Iterator[Fault], jobs: Iterator[Job], num_sorts: int
    ) -> None:
        follower = Follower(self.orchestrators, self)

        async def call() -> None:
            while self._wants_more(faults, num_sorts):
                stream = Stream(next(jobs))
                self.findings.streams.append(stream)
                await follower.follow(stream)
                self._num_done += 1
                total = max(self._load.generations, len(self.findings.streams))
                self._progress("generations", self._num_done, total)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(faults.run(schedule), name="faults")
            async with asyncio.TaskGroup() as callers:
                for _ in range(self._load.concurrent):
                    callers.create_task(call())
            faults.end()

    def _wants_more(self, faults: Faults, num_sorts: int) -> bool:
        if len(self.findings.all_problems) > _MAX_PROBLEMS:
            return False
        is_enough = len(self.findings.streams) >= self._load.generations
        return not is_enough or len({o.name for o in faults.occurrences}) < num_sorts

    async def _audit(self, reference: Reference) -> None:
        findings = self.findings

        def on_judged() -> None:
            findings.num_audited += 1
            self._progress("audit", findings.num_audited, len(findings.streams))

        audit = Audit(self.orchestrators, reference, self)
        await audit.judge(findings.streams, on_judged)
        findings.num_ties, findings.num_unrecorded = reference.num_ties, audit.num_unrecorded

    def orchestrator(self, number: int, since: float) -> bool:
        """As of `Excuse`."""
        assert self._faults is not None, "it runs"
        return self._faults.happened(Tier.ORCHESTRATOR, number, since - _AFTERMATH_S)

    def redis(self, since: float) -> bool:
        """As of `Excuse`."""
        assert self._faults is not None, "it runs"
        return self._faults.happened(Tier.REDIS, 0, since - _AFTERMATH_S)

    @property
    def running(self) -> list[Stream]:
        return [stream for stream in self.findings.streams if stream.ended_at is None]

    async def session(self, stream: Stream) -> orchestrator_pb2.GetSessionResponse | None:
        """What its orchestrator says of it now; None: nothing."""
        request = orchestrator_pb2.GetSessionRequest(session_id=stream.job.session_id)
        try:
            stub = self.orchestrators[stream.orchestrator]
            answer: orchestrator_pb2.GetSessionResponse = await stub.GetSession(request, timeout=1)
        except grpc.aio.AioRpcError:
            return None
        return answer

    async def _model_info(self) -> orchestrator_pb2.GetModelInfoResponse:
        request = orchestrator_pb2.GetModelInfoRequest()
        try:
            answer: Any = await self.orchestrators[0].GetModelInfo(request, timeout=_CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            why = f"{error.code().name}: {error.details()}"
            raise Unavailable(f"no orchestrator at {self._endpoints[0]}: {why}") from error
        info: orchestrator_pb2.GetModelInfoResponse = answer
        return info

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Orchestrators]:
        async with contextlib.AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(
                    grpc.aio.insecure_channel(endpoint, options=CLIENT_CHANNEL_OPTIONS)
                )
                for endpoint in self._endpoints
            ]
            yield Orchestrators(channels)

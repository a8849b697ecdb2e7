"""One chaos run: reference outputs, load under faults, audit."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from outrider.errors import Unavailable
from outrider.runtime.grpc_options import CLIENT_CHANNEL_OPTIONS
from outrider.v1 import orchestrator_pb2
from outrider_bench.chaos.audit import StreamAudit
from outrider_bench.chaos.calls import OrchestratorStubs
from outrider_bench.chaos.client import ResumingClient, Stream
from outrider_bench.chaos.faults import Fault, Tier
from outrider_bench.chaos.inject import Occurrence
from outrider_bench.chaos.jobs import Job, make_cases, make_jobs
from outrider_bench.chaos.reference import Reference

_CALL_TIMEOUT_S = 10.0
# A client's channel may wait this long before it reconnects (at most 2 s:
# outrider.runtime.grpc_status).
_RECONNECT_S = 3.0
# The load ends early after more problems than this: the system is broken for good.
_MAX_PROBLEMS = 25

Progress = Callable[[str, int, int], None]
"""Called with the phase, the number of finished items and their total."""


@dataclass(frozen=True)
class LoadSettings:
    """Load of a run.

    `generations`: least number; there are more until every fault has occurred. `max_tokens`:
    longest output. `num_cases`: distinct prompts.
    """

    generations: int
    concurrent: int
    seed: int
    max_tokens: int
    num_cases: int


class FaultSource(Protocol):
    """Source of faults; see `FaultInjector`."""

    @property
    def occurrences(self) -> Sequence[Occurrence[Stream]]: ...
    async def run(self, faults: Iterator[Fault]) -> None: ...
    def stop(self) -> None: ...
    def was_faulted(self, tier: Tier, replica: int, since: float) -> bool: ...


@dataclass
class Findings:
    """Results of a run. `problems`: those that belong to no stream."""

    streams: list[Stream] = field(default_factory=list)
    occurrences: Sequence[Occurrence[Stream]] = ()
    problems: list[str] = field(default_factory=list)
    num_ties: int = 0
    num_unrecorded: int = 0
    duration_s: float = 0.0
    # Streams compared with the reference and with Redis.
    num_audited: int = 0
    # The run was cancelled under load or during the audit: `streams` are those that had ended.
    is_cut: bool = False

    @property
    def all_problems(self) -> list[str]:
        """Problems of the run and of its streams."""
        own = [f"{s.job}: {what}" for s in self.streams for what in s.problems]
        return [*self.problems, *own]


class ChaosRun:
    """One run against the orchestrators at `endpoints`. Fills `findings`, even if cancelled."""

    def __init__(
        self,
        load: LoadSettings,
        endpoints: Sequence[str],
        progress: Progress,
        findings: Findings | None = None,
    ) -> None:
        self.findings = findings or Findings()
        self._load = load
        self._endpoints = endpoints
        self._progress = progress
        self._faults: FaultSource | None = None
        self._num_done = 0
        # Set once connected.
        self.orchestrators: OrchestratorStubs

    async def run(
        self, faults: FaultSource, schedule: Iterator[Fault], num_fault_types: int
    ) -> None:
        """Runs load until it is complete and `num_fault_types` types have occurred, then audits.

        Raises Unavailable if the system does not serve before the load begins.
        """
        self._faults = faults
        async with self._connected() as self.orchestrators:
            info = await self._model_info()
            load = self._load
            cases = make_cases(load.seed, load.num_cases, info.target.vocab_size)
            reference = Reference(self.orchestrators[0], load.max_tokens)
            self._progress("reference", 0, len(cases))
            await reference.prepare(cases)
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
                    await self._run_load(faults, schedule, jobs, num_fault_types)
                finally:
                    self.findings.duration_s = time.monotonic() - began_at
                    self.findings.occurrences = faults.occurrences
                await self._audit(reference)
            except asyncio.CancelledError:
                self.findings.is_cut = True
                self.findings.streams = [s for s in self.findings.streams if s.ended_at is not None]
                raise

    async def _run_load(
        self,
        faults: FaultSource,
        schedule: Iterator[Fault],
        jobs: Iterator[Job],
        num_fault_types: int,
    ) -> None:
        client = ResumingClient(self.orchestrators, self)

        async def run_client() -> None:
            while self._needs_more(faults, num_fault_types):
                stream = Stream(next(jobs))
                self.findings.streams.append(stream)
                await client.run(stream)
                self._num_done += 1
                total = max(self._load.generations, len(self.findings.streams))
                self._progress("generations", self._num_done, total)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(faults.run(schedule), name="faults")
            async with asyncio.TaskGroup() as clients:
                for _ in range(self._load.concurrent):
                    clients.create_task(run_client())
            faults.stop()

    def _needs_more(self, faults: FaultSource, num_fault_types: int) -> bool:
        if len(self.findings.all_problems) > _MAX_PROBLEMS:
            return False
        has_enough = len(self.findings.streams) >= self._load.generations
        return not has_enough or len({o.name for o in faults.occurrences}) < num_fault_types

    async def _audit(self, reference: Reference) -> None:
        findings = self.findings

        def on_audited() -> None:
            findings.num_audited += 1
            self._progress("audit", findings.num_audited, len(findings.streams))

        audit = StreamAudit(self.orchestrators, reference, self)
        await audit.run(findings.streams, on_audited)
        findings.num_ties, findings.num_unrecorded = reference.num_ties, audit.num_unrecorded

    def orchestrator_was_faulted(self, number: int, since: float) -> bool:
        """Implements `FaultHistory`."""
        assert self._faults is not None, "set by run"
        return self._faults.was_faulted(Tier.ORCHESTRATOR, number, since - _RECONNECT_S)

    def redis_was_faulted(self, since: float) -> bool:
        """Implements `FaultHistory`."""
        assert self._faults is not None, "set by run"
        return self._faults.was_faulted(Tier.REDIS, 0, since - _RECONNECT_S)

    @property
    def running(self) -> list[Stream]:
        """Streams that have not ended."""
        return [stream for stream in self.findings.streams if stream.ended_at is None]

    async def session(self, stream: Stream) -> orchestrator_pb2.GetSessionResponse | None:
        """The stream's session as its orchestrator reports it; None: no answer."""
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
    async def _connected(self) -> AsyncIterator[OrchestratorStubs]:
        async with contextlib.AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(
                    grpc.aio.insecure_channel(endpoint, options=CLIENT_CHANNEL_OPTIONS)
                )
                for endpoint in self._endpoints
            ]
            yield OrchestratorStubs(channels)

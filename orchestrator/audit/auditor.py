"""Auditor: samples generations, re-runs them in the background and counts what differs.

Users' requests come first: finished generations wait in a bounded queue, a re-run begins and
continues only while no request waits, and what does not fit is dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence

import structlog

from orchestrator.audit.observed import ObservedGeneration
from orchestrator.audit.report import AuditReport, Failure
from orchestrator.audit.rerun import AuditDropped, Comparison, Divergence, Rerun
from orchestrator.audit.sampled_tests import SampledTests
from orchestrator.generation.observation import GenerationObserver
from orchestrator.generation.preparation import PreparedTurn
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.target_client import TargetLink
from orchestrator.sessions import Lease
from outrider.settings.observation import ObservationSettings

log = structlog.get_logger()

# Finished generations that wait for their re-run, and re-runs at a time.
MAX_PENDING = 32
MAX_RUNNING = 4
# Interval at which a waiting re-run checks whether users' requests still wait.
_IDLE_CHECK_S = 0.1
# Gaps in logits that rounding explains, by the target's dtype: 100 times what logits of two passes
# over the same tokens usually differ by in float32, twice that in lower precision
# (docs/concepts/exactness.md).
TOLERANCES = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.5}


class Auditor:
    """Audit of one orchestrator. `is_busy` returns whether users' requests wait."""

    def __init__(
        self,
        settings: ObservationSettings,
        targets: ReplicaPool[TargetLink],
        is_busy: Callable[[], bool],
    ) -> None:
        self.share = settings.audit_share
        self.planted_bias = settings.audit_planted_bias
        self.tests = SampledTests(settings.audit_false_alarm_probability)
        self._tolerance = settings.audit_tolerance
        self._shows_tokens = settings.audit_shows_tokens
        self._targets = targets
        self._is_busy = is_busy
        self._pending: asyncio.Queue[ObservedGeneration] = asyncio.Queue(MAX_PENDING)
        self.report = AuditReport()

    def observers(self, prepared: PreparedTurn, lease: Lease) -> Sequence[GenerationObserver]:
        """The observers of a generation that is sampled; none of others and of resumed ones.

        The tests need independent randomness: a client may use one seed again and again.
        """
        if prepared.resumed is not None or random.random() >= self.share:
            return ()
        observed = ObservedGeneration(lease.session_id, lease.client, self._add)
        request = prepared.request
        if request.is_seeded or not request.params.needs_supports(request.verification):
            return (observed,)
        return (observed, self.tests.observer(request.verification))

    def _add(self, generation: ObservedGeneration) -> None:
        try:
            self._pending.put_nowait(generation)
        except asyncio.QueueFull:
            self.report.dropped["queue_full"] += 1

    @property
    def tolerance(self) -> float:
        """Gap in logits up to which a difference is rounding."""
        if self._tolerance is not None:
            return self._tolerance
        model = self._targets.model
        dtype = model.dtype if model is not None else ""
        return TOLERANCES.get(dtype, max(TOLERANCES.values()))

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Re-runs generations for the block."""
        if self.planted_bias:
            log.warning("audit_planted_bias", bias=self.planted_bias, effect="outputs are wrong")
        num = MAX_RUNNING if self.share else 0
        async with asyncio.TaskGroup() as tasks:
            workers = [tasks.create_task(self._work(), name="audit") for _ in range(num)]
            try:
                yield
            finally:
                for worker in workers:
                    worker.cancel()
        self.report.dropped["stopping"] += self._pending.qsize()

    async def _work(self) -> None:
        while True:
            generation = await self._pending.get()
            try:
                await self._idle()
                rerun = Rerun(self._targets, generation, self._is_busy, self.tolerance)
                comparison = await rerun.run()
            except AuditDropped as error:
                self.report.dropped[error.reason] += 1
                log.debug("audit_dropped", session_id=generation.session_id, why=str(error))
            except asyncio.CancelledError:
                self.report.dropped["stopping"] += 1
                raise
            else:
                self._count(generation, comparison)

    async def _idle(self) -> None:
        """Waits until no request of a user waits."""
        while True:
            if not self._is_busy():
                return
            await asyncio.sleep(_IDLE_CHECK_S)

    def _count(self, generation: ObservedGeneration, comparison: Comparison) -> None:
        report, tolerance = self.report, self.tolerance
        report.num_positions += comparison.num_positions
        failed = [each for each in comparison.divergences if each.gap > tolerance]
        near_ties = [each for each in comparison.divergences if each.gap <= tolerance]
        report.num_near_ties += len(near_ties)
        report.max_gap = max([report.max_gap, *(each.gap for each in near_ties)])
        if failed:
            report.generations["mismatch"] += 1
            self._add_failure(generation, comparison, failed)
        else:
            report.generations["near_tie" if near_ties else "same"] += 1

    def _add_failure(
        self,
        generation: ObservedGeneration,
        comparison: Comparison,
        divergences: Sequence[Divergence],
    ) -> None:
        first, shows = divergences[0], self._shows_tokens
        failure = Failure(
            time=time.time(),
            session_id=generation.session_id,
            client=generation.client,
            verification=generation.method,
            index=first.index,
            prompt_len=generation.prompt_len,
            gap=first.gap,
            num_divergences=len(divergences),
            replicas=tuple(sorted(generation.replicas)),
            rerun_replica=comparison.replica,
            token_id=first.token_id if shows else None,
            expected_id=first.expected_id if shows else None,
        )
        self.report.failures.append(failure)
        fields = {name: value for name, value in vars(failure).items() if name != "time"}
        log.error("audit_mismatch", **fields)

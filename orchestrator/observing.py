"""Observation of an orchestrator's generations, as the settings ask for it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from orchestrator.audit.auditor import Auditor
from orchestrator.generation.observation import GenerationObserver
from orchestrator.generation.preparation import PreparedTurn
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.target_client import TargetLink
from orchestrator.sessions import Lease
from orchestrator.traffic.record import ModelNames
from orchestrator.traffic.recorder import NO_RECORDS, TrafficRecorder
from outrider.settings.observation import ObservationSettings
from outrider.telemetry import observation_metrics as metrics
from outrider.telemetry.exposition import Reading


class Observing:
    """What observes this orchestrator's generations. `is_busy`: whether users' requests wait.

    Raises ConfigError if the directory of recorded traffic cannot be used.
    """

    def __init__(
        self,
        settings: ObservationSettings,
        targets: ReplicaPool[TargetLink],
        is_busy: Callable[[], bool],
    ) -> None:
        self._targets = targets
        self.auditor = Auditor(settings, targets, is_busy)
        self._traffic = (
            TrafficRecorder(settings, self._names) if settings.traffic_dir is not None else None
        )

    def _names(self) -> ModelNames:
        model = self._targets.model
        assert model is not None, "a target was connected"
        return ModelNames(model.model_fingerprint, model.tokenizer_fingerprint)

    def observers(self, prepared: PreparedTurn, lease: Lease) -> Sequence[GenerationObserver]:
        """Observers of a generation that begins; usually none."""
        observers = list(self.auditor.observers(prepared, lease))
        if self._traffic is not None:
            observers += self._traffic.observers(prepared, lease)
        return observers

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Does the observers' background work for the block."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self.auditor.running())
            if self._traffic is not None:
                await stack.enter_async_context(self._traffic.running())
            yield

    def readings(self) -> Iterator[Reading]:
        """Yields the metrics; may be called on any thread."""
        records = self._traffic.records if self._traffic is not None else NO_RECORDS
        yield Reading.by(metrics.TRAFFIC_RECORDS, dict(records))
        report = self.auditor.report
        yield Reading.by(metrics.AUDITED_GENERATIONS, dict(report.generations))
        yield Reading.by(metrics.AUDITS_DROPPED, dict(report.dropped))
        yield Reading.one(metrics.AUDITED_TOKENS, report.num_positions)
        yield Reading.one(metrics.AUDIT_NEAR_TIES, report.num_near_ties)
        yield Reading.one(metrics.AUDIT_MAX_GAP, report.max_gap)
        tests = self.auditor.tests.tests.values()
        yield Reading.by(metrics.AUDIT_TRIALS, {test.name: test.num_trials for test in tests})
        yield Reading.by(
            metrics.AUDIT_EVIDENCE, {test.name: test.evidence.max_log_evidence for test in tests}
        )
        yield Reading.by(metrics.AUDIT_ALARMS, {test.name: test.num_alarms for test in tests})

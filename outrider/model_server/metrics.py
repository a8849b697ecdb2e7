"""Metrics of a replica, for both model tiers.

The worker reports passes on the device thread, the streams report failures on the event loop. All
other values come from the service's statistics. `readings` is called on the scraper's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from outrider.model_server.messages import FailureReason, ServiceStatistics
from outrider.model_server.replica_status import ReplicaStatus
from outrider.replica import ReplicaState
from outrider.telemetry import catalogue as metrics
from outrider.telemetry.distribution import Distribution
from outrider.telemetry.exposition import Reading

# Metrics of both tiers, or of the one tier whose statistics have the field.
_STATISTICS = {
    metrics.OPEN_GENERATIONS: "num_open_generations",
    metrics.IDLE_SESSIONS: "num_idle_sessions",
    metrics.PREFILL_TOKENS: "num_prefill_tokens_total",
    metrics.PREFIX_CACHE_QUERIES: "num_prefix_queried_tokens_total",
    metrics.PREFIX_CACHE_HITS: "num_prefix_hit_tokens_total",
    metrics.WAITING_ROWS: "num_waiting_rows",
    metrics.NUM_PREEMPTIONS: "num_preempted_total",
    metrics.DRAFT_QUEUE: "num_waiting_generations",
}
# Metrics by target, of the draft tier.
_TARGET_STATISTICS = {
    metrics.DRAFT_TARGET_OPEN: "num_open_generations",
    metrics.DRAFT_TARGET_QUEUE: "num_waiting_generations",
    metrics.DRAFT_TARGET_TOKENS: "num_run_tokens_total",
    metrics.DRAFT_TARGET_COMPARED: "num_compared_tokens_total",
    metrics.DRAFT_TARGET_AGREED: "num_agreed_tokens_total",
}
# Characters of a fingerprint, as in logs.
_SHORT = 12


class ModelServerMetrics:
    """Counters and histograms of one replica. Few have values before the model is loaded."""

    def __init__(self, tier: str, status: ReplicaStatus) -> None:
        self._tier = tier
        self._status = status
        self._rows = Distribution(metrics.BATCH_ROWS.bounds)
        self._tokens = Distribution(metrics.BATCH_TOKENS.bounds)
        self._steps = Distribution(metrics.STEP_SECONDS.bounds)
        self._failures: Counter[str] = Counter({reason.value: 0 for reason in FailureReason})
        self._statistics: Callable[[], ServiceStatistics] | None = None
        self._kv_capacity_tokens = 0

    def loaded(self, statistics: Callable[[], ServiceStatistics], kv_capacity_tokens: int) -> None:
        """`statistics` may be called on any thread."""
        self._statistics, self._kv_capacity_tokens = statistics, kv_capacity_tokens

    def observe_pass(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """Records a forward pass and the sampling after it. Called on the device thread."""
        self._rows.observe(num_rows)
        self._tokens.observe(num_tokens)
        self._steps.observe(seconds)

    def observe_failure(self, reason: FailureReason) -> None:
        """Counts a generation that failed here. Called on the event loop."""
        self._failures[reason.value] += 1

    def readings(self) -> Iterator[Reading]:
        """All metrics of the replica; may be called on any thread."""
        tier, current = self._tier, self._status.state
        yield Reading(
            metrics.REPLICA_STATE,
            {(tier, state.value): float(state is current) for state in ReplicaState},
        )
        failures = dict(self._failures)
        yield Reading(metrics.FAILURES, {(tier, name): num for name, num in failures.items()})
        yield Reading.by(metrics.BATCH_ROWS, {tier: self._rows})
        yield Reading.by(metrics.BATCH_TOKENS, {tier: self._tokens})
        yield Reading.by(metrics.STEP_SECONDS, {tier: self._steps})
        if self._statistics is not None:
            yield from self._load_readings(self._statistics())

    def _load_readings(self, statistics: ServiceStatistics) -> Iterator[Reading]:
        capacity = self._kv_capacity_tokens
        usage = statistics.kv_used_tokens / capacity if capacity else 0.0
        yield Reading.by(metrics.KV_CACHE_USAGE, {self._tier: usage})
        yield Reading.by(metrics.KV_CACHE_CAPACITY_TOKENS, {self._tier: capacity})
        for metric, field in _STATISTICS.items():
            if (value := getattr(statistics, field, None)) is not None:
                labels = (self._tier,) if metric.labels else ()
                yield Reading(metric, {labels: value})
        targets = {
            (target.name, target.model_fingerprint[:_SHORT]): target
            for target in getattr(statistics, "targets", ())
        }
        for metric, field in _TARGET_STATISTICS.items() if targets else ():
            yield Reading(metric, {names: getattr(t, field) for names, t in targets.items()})

"""Metrics of recorded traffic and of the losslessness audit, a part of the catalogue."""

from __future__ import annotations

from outrider.telemetry.metric import Metric, counter, gauge

TRAFFIC_RECORDS = counter(
    "traffic_records",
    "Generations sampled for traffic_dir: written; or dropped, because writing was too slow or "
    "failed.",
    "outcome",
)
AUDITED_GENERATIONS = counter(
    "audited_generations",
    "Generations that were re-run without drafts: same; near_tie, different tokens whose scores "
    "differ by rounding only; mismatch, a defect.",
    "outcome",
)
AUDITS_DROPPED = counter(
    "audits_dropped",
    "Sampled generations that were not re-run to the end: queue_full, busy (requests waited), "
    "no_target, failed (the target's error), stopping.",
    "reason",
)
AUDITED_TOKENS = counter("audited_tokens", "Tokens that were compared with a re-run.")
AUDIT_NEAR_TIES = counter(
    "audit_near_ties", "Tokens that differ from a re-run by rounding only (audit_tolerance)."
)
AUDIT_MAX_GAP = gauge(
    "audit_max_gap", "Greatest difference of scores at a near tie since the start, in logits."
)
AUDIT_TRIALS = gauge(
    "audit_trials",
    "Trials of each test of sampled verification in the present day: acceptance, identity "
    "(draft tokens), position (emitted tokens).",
    "test",
)
AUDIT_EVIDENCE = gauge(
    "audit_log_evidence",
    "Greatest logarithm of the evidence against exact verification in the present day, by test.",
    "test",
)
AUDIT_ALARMS = counter(
    "audit_alarms",
    "Alarms of the tests of sampled verification, at most one a day each.",
    "test",
)

OBSERVATION_METRICS: tuple[Metric, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Metric)
)

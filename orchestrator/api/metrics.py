"""Counters of the orchestrator and their conversion to metrics.

The event loop updates plain numbers once per chunk or request. A scrape converts them on its own
thread, so each reading copies them first. `outrider.telemetry` serves the metrics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any

from orchestrator.generation.state import Commitment, FinishReason, TokenOrigin
from orchestrator.speculation.router import Reason
from orchestrator.speculation.verification import SourceName
from outrider.runtime.grpc_status import STATUS_NAMES
from outrider.telemetry import catalogue as metrics
from outrider.telemetry.distribution import Distribution
from outrider.telemetry.exposition import Reading, Value
from outrider.telemetry.metric import Metric

if TYPE_CHECKING:
    from orchestrator.admission.queue import AdmissionQueue
    from orchestrator.generation.context import GenerationContext
    from orchestrator.replicas.rollout import DraftRollout

# vLLM's finish reason for a cancelled request.
ABORT = "abort"
_FINISHED = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: ABORT,
}
_STATES = ("ready", "draining", "stuck", "failing", "starting", "silent", "refused", "away")
_SOURCES = (SourceName.MODEL, SourceName.LOOKUP, SourceName.GRAMMAR)
_NO_CHOICES: dict[tuple[str, ...], Value] = {
    (source, reason): 0 for source in (*_SOURCES, SourceName.NONE) for reason in Reason
}
_DISTRIBUTIONS = (
    metrics.TIME_TO_FIRST_TOKEN,
    metrics.INTER_TOKEN_LATENCY,
    metrics.TIME_PER_OUTPUT_TOKEN,
    metrics.E2E_REQUEST_LATENCY,
    metrics.REQUEST_QUEUE_TIME,
    metrics.REQUEST_PROMPT_TOKENS,
    metrics.REQUEST_GENERATION_TOKENS,
    metrics.DRAFT_ROUND_TRIP,
    metrics.VERIFY_ROUND_TRIP,
)
_REVISION_COUNTS = {
    metrics.DRAFT_REVISION_DRAFTS: "num_drafts",
    metrics.DRAFT_REVISION_DRAFT_TOKENS: "num_draft_tokens",
    metrics.DRAFT_REVISION_ACCEPTED_TOKENS: "num_accepted_tokens",
    metrics.DRAFT_REVISION_REJECTED_TOKENS: "num_rejected_tokens",
}


@dataclass
class SentTokens:
    """Number of tokens sent to clients, by origin."""

    accepted: int = 0
    recovered: int = 0
    bonus: int = 0
    plain: int = 0
    # Generated before the turn was resumed here, and read from Redis.
    replayed: int = 0


class OrchestratorMetrics:
    """Counters and histograms of one orchestrator, updated by `ApiTelemetry`."""

    def __init__(self) -> None:
        self.tokens = SentTokens()
        self.num_prompt_tokens = self.num_unread_streams = 0
        # Rounds by their number of draft tokens; rounds with drafts by their accepted tokens.
        self.rounds: Counter[int] = Counter()
        self.accepted: Counter[int] = Counter()
        self.num_rejected = 0
        # Draft tokens by source, accepted or rejected.
        self.by_source: Counter[tuple[str, ...]] = Counter(
            dict.fromkeys(product(_SOURCES, ("accepted", "rejected")), 0)
        )
        # All labels start at 0: a series that begins with its first error has no rate.
        self.statuses: Counter[str] = Counter(dict.fromkeys(STATUS_NAMES, 0))
        self.finished: Counter[str] = Counter(dict.fromkeys(_FINISHED.values(), 0))
        # Draft tokens in the last round of each running request, by the id of its object.
        self.gammas: dict[int, int] = {}
        self.distributions = {metric: Distribution(metric.bounds) for metric in _DISTRIBUTIONS}
        # Saves the lookup for each chunk.
        self.inter_token = self.distributions[metrics.INTER_TOKEN_LATENCY]

    def observe(self, metric: Metric, value: float) -> None:
        self.distributions[metric].observe(value)

    def add_rounds(self, rounds: Iterable[Commitment]) -> int:
        """Counts rounds whose tokens were sent. Returns the last round's number of draft tokens."""
        gamma = 0
        for commitment in rounds:
            if commitment.tokens:
                self._add_tokens(commitment.tokens[-1].origin, len(commitment.tokens))
                if commitment.tokens[-1].origin is TokenOrigin.REPLAYED:
                    continue
            gamma = commitment.num_draft_tokens
            self.rounds[gamma] += 1
            if gamma:
                self.accepted[commitment.num_accepted_tokens] += 1
                self.num_rejected += commitment.is_rejected
                self.by_source[commitment.source, "accepted"] += commitment.num_accepted_tokens
                self.by_source[commitment.source, "rejected"] += commitment.is_rejected
        return gamma

    def _add_tokens(self, last: TokenOrigin, num: int) -> None:
        """Counts the tokens of one round by the origin of its last token.

        The tokens before the last are accepted draft tokens; a replayed round is all replayed.
        """
        tokens = self.tokens
        if last is TokenOrigin.REPLAYED:
            tokens.replayed += num
            return
        tokens.accepted += num - 1
        if last is TokenOrigin.ACCEPTED:
            tokens.accepted += 1
        elif last is TokenOrigin.RECOVERED:
            tokens.recovered += 1
        elif last is TokenOrigin.BONUS:
            tokens.bonus += 1
        else:
            tokens.plain += 1

    def add_finish(self, reason: FinishReason) -> None:
        self.finished[_FINISHED[reason]] += 1

    def readings(self) -> Iterator[Reading]:
        """Yields all counters as metrics; may be called on any thread."""
        tokens = SentTokens(**vars(self.tokens))
        origins = {name: num for name, num in vars(tokens).items() if name != "replayed"}
        yield Reading.by(metrics.TOKENS, origins)
        yield Reading.one(metrics.GENERATION_TOKENS, sum(origins.values()))
        yield Reading.one(metrics.REPLAYED_TOKENS, tokens.replayed)
        yield Reading.one(metrics.PROMPT_TOKENS, self.num_prompt_tokens)
        yield Reading.by(metrics.REQUESTS, dict(self.statuses))
        yield Reading.one(metrics.UNREAD_STREAMS, self.num_unread_streams)
        yield Reading.by(metrics.REQUEST_SUCCESS, dict(self.finished))
        yield from self._speculation()
        gammas = list(self.gammas.values())
        yield Reading.one(metrics.GAMMA, sum(gammas) / len(gammas) if gammas else 0.0)
        for metric, distribution in self.distributions.items():
            yield Reading.one(metric, distribution)

    def _speculation(self) -> Iterator[Reading]:
        rounds, accepted = dict(self.rounds), dict(self.accepted)
        yield Reading.by(metrics.ROUNDS, {str(g): rounds[g] for g in sorted(rounds)})
        yield Reading(metrics.DRAFT_SOURCE_TOKENS, dict(self.by_source))
        yield Reading.one(metrics.NUM_DRAFTS, sum(accepted.values()))
        yield Reading.one(metrics.NUM_DRAFT_TOKENS, sum(g * num for g, num in rounds.items()))
        yield Reading.one(metrics.NUM_ACCEPTED_TOKENS, sum(k * n for k, n in accepted.items()))
        yield Reading.one(metrics.NUM_REJECTED_TOKENS, self.num_rejected)
        # [i]: rounds with more than i accepted draft tokens.
        most = max(accepted, default=0)
        num_rounds = accumulate(accepted.get(k, 0) for k in range(most, 0, -1))
        by_position = dict(zip(range(most - 1, -1, -1), num_rounds, strict=True))
        yield Reading.by(
            metrics.NUM_ACCEPTED_PER_POS, {str(i): by_position[i] for i in sorted(by_position)}
        )


def readings(
    meter: OrchestratorMetrics, admission: AdmissionQueue, context: GenerationContext
) -> Iterator[Reading]:
    """Yields all metrics of an orchestrator; may be called on any thread."""
    yield Reading.one(metrics.NUM_REQUESTS_RUNNING, admission.num_generating)
    yield Reading.one(metrics.NUM_REQUESTS_WAITING, admission.num_waiting)
    yield from meter.readings()
    costs = context.costs.shared
    hits, misses = costs.num_lookahead_hits, costs.num_lookahead_misses
    yield Reading.by(metrics.LOOKAHEAD_ROUNDS, {"hit": hits, "miss": misses})
    yield Reading(metrics.DRAFT_SOURCE_ROUNDS, {**_NO_CHOICES, **costs.choices})
    if costs.num_lookahead_hits or costs.num_lookahead_misses:
        yield Reading.one(metrics.LOOKAHEAD_HIT_RATE, costs.lookahead_hit_rate)
    yield Reading.one(metrics.REDIS_UP, float(not context.store.is_away))
    if context.rollout is not None:
        yield from _revisions(context.rollout)
    pools = [pool for pool in (context.targets, context.drafts) if pool is not None]
    links = [(pool.tier, link) for pool in pools for link in list(pool.links.values())]
    yield from _replicas(links, [pool.tier for pool in pools])


def _revisions(rollout: DraftRollout) -> Iterator[Reading]:
    role, counts, num_replicas = rollout.record.role, dict(rollout.counts), rollout.num_replicas()
    replicas: dict[tuple[str, ...], Value] = {
        (name, role(name).value): num for name, num in num_replicas.items()
    }
    yield Reading(metrics.DRAFT_REVISION_REPLICAS, replicas)
    for metric, field in _REVISION_COUNTS.items():
        yield Reading.by(metric, {name: getattr(each, field) for name, each in counts.items()})
    sums = dict(rollout.sums)
    compared = dict.fromkeys(num_replicas, 0) | {name: s.num for name, s in sums.items()}
    yield Reading.by(metrics.DRAFT_REVISION_COMPARED, compared)
    rates = {name: s.mean for name, s in sums.items() if s.num}
    yield Reading.by(metrics.DRAFT_REVISION_COMPARED_RATE, rates)
    yield Reading.by(metrics.DRAFT_ROLLOUT_DECISIONS, dict(rollout.decisions))


def _replicas(links: list[tuple[str, Any]], tiers: list[str]) -> Iterator[Reading]:
    states: dict[tuple[str, ...], Value] = {
        (tier, state): 0.0 for tier in tiers for state in _STATES
    }
    generations: dict[tuple[str, ...], Value] = {}
    conditions: Counter[tuple[str, ...]] = Counter()
    for tier, link in links:
        conditions[tier, link.condition] += 1
        if link.is_connected:
            generations[tier, link.endpoint] = link.num_open
    yield Reading(metrics.REPLICAS, {**states, **conditions})
    yield Reading(metrics.REPLICA_GENERATIONS, generations)

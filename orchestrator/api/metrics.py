"""What the orchestrator counts, and how it reads as metrics.

Plain numbers, added to once a chunk or once a call; what Prometheus is told is worked out from them
when it asks. Written on the event loop, read on the scraper's thread: every reading copies first.
Knows no call, no Redis command and nothing of how metrics are served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from orchestrator.generation.state import Commitment, FinishReason, TokenOrigin
from outrider.runtime.grpc_status import STATUS_NAMES
from outrider.telemetry import catalogue as metrics
from outrider.telemetry.catalogue import Metric
from outrider.telemetry.distribution import Distribution
from outrider.telemetry.exposition import Reading, Value

if TYPE_CHECKING:
    from orchestrator.admission.queue import AdmissionQueue
    from orchestrator.generation.context import GenerationContext

# vLLM's word for outputs that somebody has cut off.
ABORT = "abort"
_FINISHED = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: ABORT,
}
_STATES = ("ready", "draining", "stuck", "failing", "starting", "silent", "refused", "away")
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


@dataclass
class SentTokens:
    """Sent to callers, by where they came from."""

    accepted: int = 0
    recovered: int = 0
    bonus: int = 0
    plain: int = 0
    # Recorded before the turn was resumed here; not generated again.
    earlier: int = 0


class OrchestratorMetrics:
    """Of one orchestrator. Told by its calls what happened to them."""

    def __init__(self) -> None:
        self.tokens = SentTokens()
        self.num_prompt_tokens = self.num_unread_streams = 0
        # Rounds by their number of draft tokens, and those with any by how many of them stood.
        self.rounds: Counter[int] = Counter()
        self.accepted: Counter[int] = Counter()
        self.num_rejected = 0
        # At 0 from the start on: a series that begins with its first error has no rate.
        self.statuses: Counter[str] = Counter(dict.fromkeys(STATUS_NAMES, 0))
        self.finished: Counter[str] = Counter(dict.fromkeys(_FINISHED.values(), 0))
        # Draft tokens of the last round of each stream that runs.
        self.gammas: dict[int, int] = {}
        self.distributions = {metric: Distribution(metric.bounds) for metric in _DISTRIBUTIONS}

        # For what happens more often than once a call.
        self.inter_token = self.distributions[metrics.INTER_TOKEN_LATENCY]

    def observe(self, metric: Metric, value: float) -> None:
        self.distributions[metric].observe(value)

    def sent(self, rounds: Iterable[Commitment]) -> int:
        """Rounds whose tokens the caller has been sent; how many draft tokens the last one had."""
        gamma = 0
        for commitment in rounds:
            if commitment.tokens:
                self._sent(commitment.tokens[-1].origin, len(commitment.tokens))
                if commitment.tokens[-1].origin is TokenOrigin.EARLIER:
                    continue
            gamma = commitment.num_draft_tokens
            self.rounds[gamma] += 1
            if gamma:
                self.accepted[commitment.num_accepted_tokens] += 1
                self.num_rejected += commitment.is_rejected
        return gamma

    def _sent(self, last: TokenOrigin, num: int) -> None:
        """Of one round: all but its last token are accepted ones, or all are earlier ones."""
        tokens = self.tokens
        if last is TokenOrigin.EARLIER:
            tokens.earlier += num
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

    def finished_as(self, reason: FinishReason) -> None:
        self.finished[_FINISHED[reason]] += 1

    def readings(self) -> Iterator[Reading]:
        """What is counted here; on any thread."""
        tokens = SentTokens(**vars(self.tokens))
        origins = {name: num for name, num in vars(tokens).items() if name != "earlier"}
        yield Reading.by(metrics.TOKENS, origins)
        yield Reading.one(metrics.GENERATION_TOKENS, sum(origins.values()))
        yield Reading.one(metrics.REPLAYED_TOKENS, tokens.earlier)
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
        yield Reading.one(metrics.NUM_DRAFTS, sum(accepted.values()))
        yield Reading.one(metrics.NUM_DRAFT_TOKENS, sum(g * num for g, num in rounds.items()))
        yield Reading.one(metrics.NUM_ACCEPTED_TOKENS, sum(k * n for k, n in accepted.items()))
        yield Reading.one(metrics.NUM_REJECTED_TOKENS, self.num_rejected)
        # [i]: rounds in which more than i stood.
        most = max(accepted, default=0)
        standing = accumulate(accepted.get(k, 0) for k in range(most, 0, -1))
        by_position = dict(zip(range(most - 1, -1, -1), standing, strict=True))
        yield Reading.by(
            metrics.NUM_ACCEPTED_PER_POS, {str(i): by_position[i] for i in sorted(by_position)}
        )


def readings(
    meter: OrchestratorMetrics, admission: AdmissionQueue, tiers: GenerationContext
) -> Iterator[Reading]:
    """All that an orchestrator has to tell; on any thread."""
    yield Reading.one(metrics.NUM_REQUESTS_RUNNING, admission.num_generating)
    yield Reading.one(metrics.NUM_REQUESTS_WAITING, admission.num_waiting)
    yield from meter.readings()
    costs = tiers.costs.shared
    hits, misses = costs.num_lookahead_hits, costs.num_lookahead_misses
    yield Reading.by(metrics.LOOKAHEAD_ROUNDS, {"hit": hits, "miss": misses})
    if costs.num_lookahead_hits or costs.num_lookahead_misses:
        yield Reading.one(metrics.LOOKAHEAD_HIT_RATE, costs.lookahead_hit_rate)
    yield Reading.one(metrics.REDIS_UP, float(not tiers.store.is_away))
    links = [
        (pool.tier, link)
        for pool in (tiers.targets, tiers.drafts)
        if pool is not None
        for link in list(pool.links.values())
    ]
    yield from _replicas(links, [pool.tier for pool in (tiers.targets, tiers.drafts) if pool])


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

"""Cost model: tokens, time and tokens per second of rounds with γ = 0, 1, … draft tokens. Pure.

    tokens(γ) = 1 + Σ_{k ≤ γ} P(at least k draft tokens are accepted)
    round(γ)  = max(pass with γ draft tokens in every verify request + network + queue,
                    drafting of γ + 1 tokens)
    value(γ)  = tokens(γ) / (round(γ) + P(no proposal is ready) · wait(γ))

`tokens` is equation 1 of Leviathan et al. 2023 (arXiv 2211.17192) with an acceptance rate for each
position. The time of a pass is the one in which all generations of the batch choose the same γ.
Symbols: `survival`, [k]: P(at least k + 1 draft tokens are accepted); `miss_rate`: P(no proposal is
ready when the verify result before it arrives).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from orchestrator.speculation.round_costs import PairCosts, TargetCosts

# From this mean batch size on there are others to share a pass with. Choice between 1 and 2.
_MIN_SHARED_ROWS = 1.5


@dataclass(frozen=True)
class RoundValues:
    """Values by γ; times in seconds.

    `round_s`: a round with its proposal ready. `draft_wait_s`: until a proposal that is requested
    now arrives; `added_wait_s`: by how much that makes the round longer. `queue_s`: time in the
    target's queue. `tokens_per_s`: rounds whose proposal may be ready; `waiting_tokens_per_s`:
    rounds that wait for it. `may_pay`: γ > 0 would pay if all draft tokens were accepted.
    """

    tokens: tuple[float, ...]
    round_s: tuple[float, ...]
    draft_wait_s: tuple[float, ...]
    added_wait_s: tuple[float, ...]
    queue_s: float
    tokens_per_s: tuple[float, ...]
    waiting_tokens_per_s: tuple[float, ...]
    may_pay: bool

    @classmethod
    def of(
        cls,
        costs: PairCosts,
        steps_s: tuple[float, ...],
        survival: tuple[float, ...],
        miss_rate: float,
    ) -> RoundValues:
        """`steps_s`: as `TargetCosts.steps_s`; one longer than `survival`."""
        target, draft_step_s = costs.target, costs.draft.step_s
        gammas = range(len(steps_s))
        tokens = tuple(accumulate((1.0, *survival)))
        wait_s = tuple(costs.draft.overhead_s + g * draft_step_s if g else 0.0 for g in gammas)
        added_s = tuple(_added_wait_s(target, wait) if wait else 0.0 for wait in wait_s)
        # The draft works during the round: γ tokens and its guess of the token after them.
        drafting_s = tuple((g + 1) * draft_step_s for g in gammas)
        verify_s = verify_round_s(target, steps_s)
        round_s = (verify_s[0], *(max(verify_s[g], drafting_s[g]) for g in gammas[1:]))
        ready = tuple(tokens[g] / (round_s[g] + miss_rate * added_s[g]) for g in gammas)
        waiting = tuple(tokens[g] / (round_s[g] + added_s[g]) for g in gammas)
        # All draft tokens are accepted, and arrive without overhead.
        best_case = max((g + 1) / (round_s[g] + miss_rate * g * draft_step_s) for g in gammas)
        return cls(
            tokens=tokens,
            round_s=round_s,
            draft_wait_s=wait_s,
            added_wait_s=added_s,
            queue_s=target.queue_s,
            tokens_per_s=ready,
            waiting_tokens_per_s=waiting,
            may_pay=best_case > ready[0],
        )

    def waiting_gain(self, gamma: int) -> float:
        """Tokens of a round that waits for γ draft tokens, minus what its time is worth.

        Time is worth the best rate there is (renewal-reward argument).
        """
        duration_s = self.tokens[gamma] / self.waiting_tokens_per_s[gamma]
        return self.tokens[gamma] - max(self.tokens_per_s) * duration_s

    def break_even_wait_s(self, gamma: int) -> float:
        """The wait for γ draft tokens that brings as much as no wait. Queue time is free."""
        gain = self.waiting_gain(gamma) - self.waiting_gain(0)
        return self.added_wait_s[gamma] + gain / max(self.tokens_per_s) + self.queue_s


def verify_round_s(target: TargetCosts, steps_s: tuple[float, ...]) -> tuple[float, ...]:
    """[γ]: seconds of a round whose draft tokens are ready and took no time."""
    return (
        _plain_round_s(target, steps_s[0]),
        *(_verify_s(target, step_s) for step_s in steps_s[1:]),
    )


def _verify_s(target: TargetCosts, step_s: float) -> float:
    """From a verify request to its result, for a pass of `step_s`.

    Passes in the queue have as many draft tokens as chosen here, so the queue grows with γ. (With
    a queue of constant length, γ = 14 looked cheap to 64 generations, at 0.57 of plain decoding.)
    """
    network_s = min(target.min_overhead_s, target.overhead_s)
    return step_s + (network_s + target.num_queued_passes * step_s)


def _plain_round_s(target: TargetCosts, step_s: float) -> float:
    """A round with γ = 0, as if all generations of the batch chose γ = 0.

    They would then share one pass and none would queue. Otherwise generations that form
    alternating batches, because they wait for drafts, would never leave them. (Four generations
    stayed at γ = 1 with α = 0.2, at 0.75 of plain decoding.)
    """
    report = target.report()
    alone_s = _verify_s(target, step_s)
    if report.mean_num_rows < _MIN_SHARED_ROWS:
        return alone_s
    num_rows = report.mean_num_rows * (1 + target.num_queued_passes)
    return min(alone_s, report.pass_s(num_rows, num_rows) + target.min_overhead_s)


def _added_wait_s(target: TargetCosts, wait_s: float) -> float:
    """By how much a wait makes a round longer: less if the request would queue anyway."""
    return max(0.0, target.min_overhead_s + wait_s - target.overhead_s)

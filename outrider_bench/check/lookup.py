"""Prompt lookup without a draft, replayed along the target's own texts. Pure arithmetic.

Uses the orchestrator's own lookup and acceptance model, and chooses γ of each round as its router
does. A proposal is deterministic, so a draft token is accepted exactly if it is the token emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from orchestrator.speculation.acceptance import MatchAcceptance
from orchestrator.speculation.gamma import PLAIN_HYSTERESIS
from orchestrator.speculation.lookup import PromptLookup
from orchestrator.speculation.round_values import verify_round_s
from outrider_bench.check.prediction import PairCost, Prediction, Situation, target_costs

# (prompt, the target's text after it).
Text = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class LookupRounds:
    """Rounds of the texts. `speed_up` over rounds without draft tokens.

    `alpha`: accepted over accepted and rejected draft tokens; None: there were none.
    `drafted_share`: share of rounds with draft tokens.
    """

    speed_up: float
    alpha: float | None
    tokens_per_round: float
    drafted_share: float


class _Tally:
    """Counts of rounds so far."""

    def __init__(self) -> None:
        self.rounds = self.drafted = self.tokens = self.verified = self.accepted = 0
        self.seconds = 0.0

    def result(self, plain_s: float) -> LookupRounds:
        return LookupRounds(
            speed_up=self.tokens * plain_s / self.seconds,
            alpha=self.accepted / self.verified if self.verified else None,
            tokens_per_round=self.tokens / self.rounds,
            drafted_share=self.drafted / self.rounds,
        )


def replayed(texts: Sequence[Text], round_s: Sequence[float]) -> LookupRounds | None:
    """`round_s` [γ]: seconds of a round. None if no text has two tokens."""
    tally, shared = _Tally(), MatchAcceptance()
    for prompt, text in texts:
        if len(text) > 1:
            _replay(prompt, text, round_s, shared, tally)
    return tally.result(round_s[0]) if tally.rounds else None


def _replay(
    prompt: Sequence[int],
    text: Sequence[int],
    round_s: Sequence[float],
    shared: MatchAcceptance,
    tally: _Tally,
) -> None:
    # The first token comes from the prompt's pass.
    context, position = [*prompt, text[0]], 1
    acceptance = MatchAcceptance(shared)
    lookup = PromptLookup(context, len(prompt) + len(text), acceptance.observe)
    while position < len(text):
        lookup.update()
        proposal = lookup.propose(min(len(round_s) - 1, len(text) - position - 1))
        gamma = _best_gamma(lookup, acceptance, len(proposal), round_s)
        num_accepted = 0
        while num_accepted < gamma and proposal[num_accepted] == text[position + num_accepted]:
            num_accepted += 1
        tally.rounds += 1
        tally.drafted += gamma > 0
        tally.verified += min(gamma, num_accepted + 1)
        tally.accepted += num_accepted
        tally.tokens += num_accepted + 1
        tally.seconds += round_s[gamma]
        context += text[position : position + num_accepted + 1]
        position += num_accepted + 1


def _best_gamma(
    lookup: PromptLookup, acceptance: MatchAcceptance, num: int, round_s: Sequence[float]
) -> int:
    """As the router: the γ of the highest expected rate; 0 if that is not clearly above plain."""
    if not num:
        return 0
    tokens = accumulate((1.0, *acceptance.survival(lookup.match_len, num)))
    rates = [t / s for t, s in zip(tokens, round_s, strict=False)]
    gamma = max(range(1, num + 1), key=lambda g: rates[g])
    return gamma if rates[gamma] >= PLAIN_HYSTERESIS * rates[0] else 0


def round_seconds(cost: PairCost, num_streams: int, max_gamma: int) -> tuple[float, ...]:
    """[γ]: seconds of a round with γ ready draft tokens."""
    target = target_costs(cost, num_streams)
    return verify_round_s(target, target.steps_s(max_gamma))


def predicted_lookup(
    texts: Sequence[Text], cost: PairCost, situation: Situation, max_gamma: int
) -> Prediction:
    """Speed-up of prompt lookup with at most γ draft tokens, for γ = 0 to `max_gamma`.

    There is no network to a draft, and nothing to hide.
    """
    num = situation.num_streams
    round_s = round_seconds(cost, num, max_gamma)
    rounds = [replayed(texts, round_s[: gamma + 1]) for gamma in range(1, max_gamma + 1)]
    speed_ups = (1.0, *(1.0 if one is None else one.speed_up for one in rounds))
    return Prediction(
        situation,
        in_turn=speed_ups,
        ahead=speed_ups,
        plain_tokens_per_s=num / round_s[0],
        draft_shares=(0.0,) * len(speed_ups),
    )

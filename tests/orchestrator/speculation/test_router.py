"""Router: the faster source is chosen, in each round, and its choices are counted.

Texts are played against the router with reported costs; seconds are added up, not waited for.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest

from orchestrator.speculation.acceptance import MatchAcceptance
from orchestrator.speculation.cost_book import CostBook
from orchestrator.speculation.draft_source import DraftRequest, DraftSource, NoDrafts
from orchestrator.speculation.drafting import Drafting
from orchestrator.speculation.gamma import GammaPolicy
from orchestrator.speculation.lookup import LookupDrafts
from orchestrator.speculation.router import Reason, Router
from orchestrator.speculation.verification import Proposal, SourceName
from outrider.replica import CostReport
from tests.orchestrator.replicas.requests import draft_request

MAX_GAMMA = 16
PASS_S, DRAFT_S = 0.02, 0.001
# A target whose pass takes 2 % longer for each further token, as on a device bound by memory.
TARGET = CostReport((1, 17, 513), (PASS_S, 1.32 * PASS_S, 11.2 * PASS_S), 0.0, 1.0)
DRAFT = CostReport((1,), (DRAFT_S,), 0.0, 1.0)


class ReadyDrafts(NoDrafts):
    """A draft replica whose proposals are always in time; each token is right with `alpha`.

    Which tokens are right depends on their position only, so that ways can be compared.
    """

    may_open = True
    replica = "draft:1"

    def __init__(self, request: DraftRequest, text: list[int], alpha: float) -> None:
        self._context = request.token_ids
        rng = random.Random(0)
        self._text = [token if rng.random() < alpha else -1 for token in text]
        self.commits: list[tuple[int, int]] = []
        self.is_open = False

    def open(self, gamma: int, lookahead: int) -> bool:
        self.is_open = gamma > 0
        return self.is_open

    def propose(self, min_tokens: int = 1) -> Proposal | None:
        base_len = len(self._context)
        tokens = tuple(self._text[base_len : base_len + MAX_GAMMA])
        return Proposal(base_len, tokens, None) if tokens else None

    def commit(self, gamma: int, ahead_gamma: int) -> None:
        self.commits.append((gamma, ahead_gamma))


def words(num: int, seed: int) -> list[int]:
    """Tokens like free text: few of its pairs repeat."""
    return random.Random(seed).choices(range(5000), k=num)


SOURCE = words(1600, seed=1)
TEXTS: dict[str, list[int]] = {
    "quoting": SOURCE[50:1550],
    "free": words(500, seed=2),
    "mixed": [
        token
        for part in range(5)
        for token in (*SOURCE[100 * part : 100 * part + 60], *words(60, seed=10 + part))
    ],
}


@dataclass
class Played:
    """One text, played. `router`: afterwards."""

    seconds: float
    num_rounds: Counter[SourceName]
    router: Router
    model: DraftSource

    def tokens_per_s(self, text: str) -> float:
        return len(TEXTS[text]) / self.seconds


def play(
    text: str,
    *,
    alpha: float | None = None,
    has_lookup: bool = False,
    gamma: int | None = None,
    is_requested: bool = False,
    is_bare: bool = False,
) -> Played:
    """`alpha`: of the draft tier; None: there is none. `is_bare`: without the router."""
    whole = [*SOURCE, *TEXTS[text]]
    request = replace(draft_request(whole[: len(SOURCE)]), max_len=len(whole))
    context = request.token_ids
    assert isinstance(context, list)
    costs = CostBook(lambda _: TARGET, lambda _: DRAFT)
    policy = GammaPolicy(costs.pair(), MAX_GAMMA, fixed=gamma)
    model = ReadyDrafts(request, whole, alpha) if alpha is not None else NoDrafts()
    drafting = Drafting(model, policy, costs, 1)
    router = Router(
        drafting,
        LookupDrafts(request, MatchAcceptance()) if has_lookup else None,
        policy,
        costs.shared.choices,
        max_gamma=MAX_GAMMA,
        fixed_gamma=gamma,
        is_requested=is_requested,
    )
    drafting.open()
    steps_s = policy.costs.target.steps_s(MAX_GAMMA)
    played = Played(0.0, Counter(), router, model)
    context.append(whole[len(context)])
    while (room := len(whole) - len(context) - 1) >= 0:
        proposal = drafting.next(room) if is_bare else router.next(room)
        tokens = proposal.token_ids if proposal is not None else ()
        source = proposal.source if proposal is not None else SourceName.NONE
        num_right = 0
        while num_right < len(tokens) and tokens[num_right] == whole[len(context) + num_right]:
            num_right += 1
        played.seconds += steps_s[len(tokens)]
        played.num_rounds[source] += 1
        context += whole[len(context) : len(context) + num_right + 1]
        is_rejected = num_right < len(tokens)
        if is_bare:
            drafting.observe_round(len(tokens), num_right, is_rejected=is_rejected)
        else:
            router.observe_round(len(tokens), num_right, is_rejected=is_rejected, source=source)
    return played


def test_lookup_alone_is_faster_than_plain_decoding_where_text_repeats() -> None:
    plain = play("quoting").tokens_per_s("quoting")
    assert play("quoting", has_lookup=True).tokens_per_s("quoting") > 4 * plain
    assert play("mixed", has_lookup=True).tokens_per_s("mixed") > 1.5 * play("mixed").tokens_per_s(
        "mixed"
    )


def test_free_text_is_not_slowed_down() -> None:
    plain = play("free").tokens_per_s("free")
    assert play("free", has_lookup=True).tokens_per_s("free") >= 0.99 * plain


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("text", TEXTS)
def test_beside_a_draft_the_router_is_as_fast_as_the_better_source(text: str, alpha: float) -> None:
    model = play(text, alpha=alpha).tokens_per_s(text)
    lookup = play(text, has_lookup=True).tokens_per_s(text)
    both = play(text, alpha=alpha, has_lookup=True).tokens_per_s(text)
    assert both >= 0.97 * max(model, lookup)
    if text == "mixed":
        assert both > 1.05 * max(model, lookup)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.9])
def test_without_lookup_every_round_is_as_without_a_router(alpha: float) -> None:
    """The same draft tokens, the same commits to the draft tier and the same time."""
    routed, bare = play("mixed", alpha=alpha), play("mixed", alpha=alpha, is_bare=True)
    assert isinstance(routed.model, ReadyDrafts)
    assert isinstance(bare.model, ReadyDrafts)
    assert routed.model.commits == bare.model.commits
    assert (routed.seconds, routed.num_rounds) == (bare.seconds, bare.num_rounds)


def test_without_lookup_rounds_are_those_of_the_draft_tier() -> None:
    played = play("free", alpha=0.7)
    reasons = {(source, reason) for source, reason in played.router.choices}
    assert reasons == {(SourceName.MODEL, Reason.ONLY)}
    assert not played.num_rounds[SourceName.LOOKUP]
    assert played.router.expected == {}


def test_choices_and_their_reasons_are_counted() -> None:
    played = play("mixed", alpha=0.6, has_lookup=True)
    choices = played.router.choices
    assert {source for source, _ in choices} == {SourceName.MODEL, SourceName.LOOKUP}
    assert choices[SourceName.LOOKUP, Reason.FASTER] == played.num_rounds[SourceName.LOOKUP] > 0
    assert choices[SourceName.MODEL, Reason.NO_MATCH] > 0
    assert set(played.router.expected) == set(SourceName) - {SourceName.AUTO, SourceName.GRAMMAR}


def test_a_requested_lookup_is_counted_as_requested() -> None:
    played = play("quoting", has_lookup=True, is_requested=True)
    assert played.router.choices[SourceName.LOOKUP, Reason.REQUESTED] > 0
    assert {source for source, _ in played.router.choices} <= {SourceName.LOOKUP, SourceName.NONE}


def test_a_fixed_gamma_is_used_for_lookup_too() -> None:
    """Wherever there is a match, whatever it is expected to bring."""
    played = play("quoting", has_lookup=True, gamma=3)
    assert played.seconds == pytest.approx(
        sum(played.num_rounds.values()) * PASS_S * 1.06, rel=0.05
    )
    assert played.num_rounds[SourceName.LOOKUP] > 100


def test_the_draft_tier_is_not_asked_during_a_long_copy() -> None:
    played = play("quoting", alpha=0.5, has_lookup=True)
    assert isinstance(played.model, ReadyDrafts)
    num_lookup = played.num_rounds[SourceName.LOOKUP]
    assert num_lookup > 20
    assert len(played.model.commits) < num_lookup / 2

"""How far draft tokens survive, as measured: against counting by hand, and over its prior."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from orchestrator.speculation.acceptance import AcceptanceModel

_LIMIT = 16


@st.composite
def verdicts(draw: st.DrawFn) -> list[tuple[int, int, bool]]:
    """(draft tokens, accepted, rejected): a stop may end a round after an accepted token."""
    rounds = []
    for gamma in draw(st.lists(st.integers(1, _LIMIT), max_size=60)):
        num_accepted = draw(st.integers(0, gamma))
        is_rejected = num_accepted < gamma and draw(st.booleans())
        rounds.append((gamma, num_accepted, is_rejected))
    return rounds


def _told(survival: AcceptanceModel, rounds: list[tuple[int, int, bool]]) -> AcceptanceModel:
    for gamma, num_accepted, is_rejected in rounds:
        survival.observe(gamma, num_accepted, is_rejected=is_rejected)
    return survival


@given(rounds=verdicts(), of_others=verdicts(), gamma=st.integers(0, 20))
def test_chances_fall_along_a_block(
    rounds: list[tuple[int, int, bool]], of_others: list[tuple[int, int, bool]], gamma: int
) -> None:
    pair = _told(AcceptanceModel(), of_others)
    survival = _told(AcceptanceModel(pair), rounds)
    acceptances, prefixes = survival.acceptance_rates(gamma), survival.survival(gamma)
    assert len(acceptances) == len(prefixes) == gamma
    assert all(0 < chance < 1 for chance in acceptances), "never certain"
    assert prefixes == sorted(prefixes, reverse=True)
    product = 1.0
    for acceptance, prefix in zip(acceptances, prefixes, strict=True):
        product *= acceptance
        assert prefix == pytest.approx(product)


@given(rounds=verdicts(), better=st.integers(0, 59))
def test_one_more_token_accepted_never_lowers_a_chance(
    rounds: list[tuple[int, int, bool]], better: int
) -> None:
    """The same rounds, but that in one of them the rejected token stood and the next did not."""
    improved = list(rounds)
    if better < len(rounds) and rounds[better][2]:
        gamma, num_accepted, _ = rounds[better]
        improved[better] = (gamma, num_accepted + 1, False)
    before = _told(AcceptanceModel(), rounds).survival(_LIMIT)
    after = _told(AcceptanceModel(), improved).survival(_LIMIT)
    assert all(a >= b - 1e-12 for a, b in zip(after, before, strict=True))


@given(rounds=verdicts())
def test_what_is_behind_a_rejection_says_nothing(rounds: list[tuple[int, int, bool]]) -> None:
    """A round with more draft tokens, none of them judged, teaches the same of those that were."""
    longer = [(_LIMIT, accepted, rejected) for _, accepted, rejected in rounds]
    judged = max((accepted + rejected for _, accepted, rejected in rounds), default=0)
    short = _told(AcceptanceModel(), rounds).acceptance_rates(judged)
    assert _told(AcceptanceModel(), longer).acceptance_rates(judged) == pytest.approx(short)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_what_is_measured_wins_over_any_prior(share: float) -> None:
    """One token a round, in so many of four accepted; the prior has seen the opposite for long."""
    pair = AcceptanceModel()
    for _ in range(500):
        pair.observe(1, int(share < 0.5), is_rejected=share >= 0.5)
    survival = AcceptanceModel(pair)
    for number in range(400):
        is_accepted = number % 4 < 4 * share
        survival.observe(1, int(is_accepted), is_rejected=not is_accepted)
    assert survival.acceptance_rates(1)[0] == pytest.approx(share, abs=0.1)
    assert pair.acceptance_rates(1)[0] == pytest.approx(share, abs=0.1), "shared"
    assert AcceptanceModel(pair).acceptance_rates(1)[0] == pytest.approx(share, abs=0.1), (
        "and passes it on"
    )


def test_the_last_rounds_speak() -> None:
    """After a hundred bad rounds, a hundred good ones are most of what is known."""
    survival = _told(AcceptanceModel(), [(4, 0, True)] * 100)
    assert survival.survival(4)[0] < 0.15
    _told(survival, [(4, 4, False)] * 100)
    assert survival.survival(4)[0] > 0.75

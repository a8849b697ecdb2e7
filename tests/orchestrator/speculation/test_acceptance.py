"""Acceptance model: properties of its probabilities, and the effect of its prior."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from orchestrator.speculation.acceptance import AcceptanceModel

_LIMIT = 16


@st.composite
def observations(draw: st.DrawFn) -> list[tuple[int, int, bool]]:
    """(draft tokens, accepted, rejected): a stop may end a round after an accepted token."""
    rounds = []
    for gamma in draw(st.lists(st.integers(1, _LIMIT), max_size=60)):
        num_accepted = draw(st.integers(0, gamma))
        is_rejected = num_accepted < gamma and draw(st.booleans())
        rounds.append((gamma, num_accepted, is_rejected))
    return rounds


def _observed(model: AcceptanceModel, rounds: list[tuple[int, int, bool]]) -> AcceptanceModel:
    for gamma, num_accepted, is_rejected in rounds:
        model.observe(gamma, num_accepted, is_rejected=is_rejected)
    return model


@given(rounds=observations(), of_others=observations(), gamma=st.integers(0, 20))
def test_survival_falls_along_a_block(
    rounds: list[tuple[int, int, bool]], of_others: list[tuple[int, int, bool]], gamma: int
) -> None:
    pair = _observed(AcceptanceModel(), of_others)
    model = _observed(AcceptanceModel(pair), rounds)
    rates, survival = model.acceptance_rates(gamma), model.survival(gamma)
    assert len(rates) == len(survival) == gamma
    assert all(0 < rate < 1 for rate in rates), "never certain"
    assert survival == sorted(survival, reverse=True)
    product = 1.0
    for rate, prob in zip(rates, survival, strict=True):
        product *= rate
        assert prob == pytest.approx(product)


@given(rounds=observations(), better=st.integers(0, 59))
def test_one_more_accepted_token_never_lowers_a_probability(
    rounds: list[tuple[int, int, bool]], better: int
) -> None:
    """The same rounds, but in one of them the rejected token is accepted."""
    improved = list(rounds)
    if better < len(rounds) and rounds[better][2]:
        gamma, num_accepted, _ = rounds[better]
        improved[better] = (gamma, num_accepted + 1, False)
    before = _observed(AcceptanceModel(), rounds).survival(_LIMIT)
    after = _observed(AcceptanceModel(), improved).survival(_LIMIT)
    assert all(a >= b - 1e-12 for a, b in zip(after, before, strict=True))


@given(rounds=observations())
def test_tokens_after_a_rejection_do_not_count(rounds: list[tuple[int, int, bool]]) -> None:
    """Rounds with more draft tokens, none of them verified, give the same rates."""
    longer = [(_LIMIT, accepted, rejected) for _, accepted, rejected in rounds]
    verified = max((accepted + rejected for _, accepted, rejected in rounds), default=0)
    short = _observed(AcceptanceModel(), rounds).acceptance_rates(verified)
    assert _observed(AcceptanceModel(), longer).acceptance_rates(verified) == pytest.approx(short)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_measurements_outweigh_any_prior(share: float) -> None:
    """One draft token per round, accepted at the given share. The prior has seen the opposite."""
    pair = AcceptanceModel()
    for _ in range(500):
        pair.observe(1, int(share < 0.5), is_rejected=share >= 0.5)
    model = AcceptanceModel(pair)
    for number in range(400):
        is_accepted = number % 4 < 4 * share
        model.observe(1, int(is_accepted), is_rejected=not is_accepted)
    assert model.acceptance_rates(1)[0] == pytest.approx(share, abs=0.1)
    assert pair.acceptance_rates(1)[0] == pytest.approx(share, abs=0.1), "shared"
    assert AcceptanceModel(pair).acceptance_rates(1)[0] == pytest.approx(share, abs=0.1), (
        "passed on to new generations"
    )


def test_recent_rounds_count_most() -> None:
    """A hundred good rounds outweigh the hundred bad ones before them."""
    model = _observed(AcceptanceModel(), [(4, 0, True)] * 100)
    assert model.survival(4)[0] < 0.15
    _observed(model, [(4, 4, False)] * 100)
    assert model.survival(4)[0] > 0.75

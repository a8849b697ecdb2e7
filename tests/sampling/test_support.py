"""Truncated draft distributions: the distribution sent is the one sampled from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.sampling.support import MAX_SUPPORT_SIZE, SUPPORT_MASS, Support, truncate

_weights = st.lists(st.floats(2.0**-100, 1.0, width=32), min_size=1, max_size=MAX_SUPPORT_SIZE)


@given(_weights)
def test_normalised_sums_to_one_and_keeps_ratios(weights: list[float]) -> None:
    """Float64 probabilities in the order given, from float32 weights."""
    token_ids = np.arange(100, 100 + len(weights))
    support = Support.normalised(token_ids, np.array(weights, np.float32))
    assert support.probs.dtype == np.float64
    assert support.probs.sum() == pytest.approx(1, abs=1e-14)
    assert (support.probs > 0).all()
    assert support.probs * sum(weights) == pytest.approx(weights, rel=1e-12)


@given(_weights)
def test_sender_and_receiver_have_the_same_distribution(weights: list[float]) -> None:
    """Packed, sent and normalised again, it is the sender's distribution, bit for bit."""
    sent = np.array(weights, np.float32)
    ids = np.arange(len(weights))
    received = np.frombuffer(sent.tobytes(), "<f4")
    here, there = Support.normalised(ids, sent), Support.normalised(ids, received)
    assert here.probs.tolist() == there.probs.tolist()


@given(_weights, st.floats(0, 1, exclude_max=True))
def test_sample_is_the_inverse_of_the_cumulative_distribution(
    weights: list[float], uniform: float
) -> None:
    """The first token whose cumulative probability exceeds the uniform, the last one at the end."""
    support = Support.normalised(np.arange(len(weights)), np.array(weights, np.float32))
    cumulative = 0.0
    expected = len(weights) - 1
    for token, prob in enumerate(support.probs.tolist()):
        cumulative += prob
        if uniform < cumulative:
            expected = token
            break
    assert support.sample(uniform) == expected


def test_sample_gives_each_token_its_share() -> None:
    """An even grid of uniforms falls to the tokens in proportion, to within one grid step."""
    support = Support.normalised(np.array([7, 3, 5]), np.array([0.5, 0.2, 0.3], np.float32))
    num = 10_000
    drawn = [support.sample((i + 0.5) / num) for i in range(num)]
    for token, prob in zip(support.token_ids, support.probs, strict=True):
        assert abs(drawn.count(int(token)) / num - prob) <= 1 / num


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 1 - 2.0**-53])
def test_sample_stays_inside_at_the_ends(uniform: float) -> None:
    """Rounding of the cumulative sum never gives a token outside the support."""
    for size in (1, 3, 10, 32):
        support = Support.normalised(np.arange(size), np.full(size, 0.1, np.float32))
        assert support.sample(uniform) == (0 if uniform < 0.01 else size - 1)


def test_index_of() -> None:
    """Index of a token, -1 outside; for ids of any integer type."""
    for dtype in (np.int64, np.uint32, np.int32):
        support = Support.normalised(np.array([9, 4, 6], dtype), np.ones(3, np.float32))
        assert [support.index_of(token) for token in (9, 4, 6, 5)] == [0, 1, 2, -1]


@given(_weights, st.floats(0.01, 1))
def test_truncate_is_the_shortest_head_that_covers_the_mass(
    weights: list[float], mass: float
) -> None:
    """Without its last token the head has less than `mass`; with it, at least (or is all)."""
    probs = np.sort(np.array(weights))[::-1]
    probs /= probs.sum()
    ids, sent = truncate(np.arange(len(probs)), probs, mass)
    assert sent.dtype == np.float32
    assert len(ids) == len(sent) >= 1
    assert ids.tolist() == list(range(len(ids)))
    assert (sent > 0).all()
    assert sent.tolist() == probs[: len(ids)].astype(np.float32).tolist()
    cumulative = np.cumsum(probs)
    assert len(ids) == 1 or cumulative[len(ids) - 2] < mass
    assert len(ids) == len(probs) or cumulative[len(ids) - 1] >= mass or probs[len(ids)] < 1e-30


def test_truncate_by_default_keeps_99_hundredths() -> None:
    """The most likely tokens with 99 % of the mass."""
    probs = np.array([0.5, 0.3, 0.19, 0.005, 0.005])
    ids, _ = truncate(np.arange(5), probs)
    assert len(ids) in (3, 4)  # 0.5 + 0.3 + 0.19 is 0.99 up to rounding
    assert probs[: len(ids)].sum() >= SUPPORT_MASS - 1e-15
    ids, _ = truncate(np.arange(3), np.array([0.992, 0.004, 0.004]))
    assert ids.tolist() == [0]


def test_truncate_drops_weights_that_underflow_in_float32() -> None:
    """A token whose float32 weight is zero is not in the support and never sampled."""
    probs = np.array([1.0, 1e-60, 1e-61])
    ids, weights = truncate(np.array([5, 6, 7]), probs, mass=2.0)
    assert ids.tolist() == [5]
    assert weights.tolist() == [1.0]

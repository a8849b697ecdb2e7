"""Exactness by enumeration: the output distribution equals the target's within 1e-12.

Every draft, every sample of the target and every cell of the uniforms is enumerated. The
distribution over the noise is computed from the weights that the noise is added to. Cells and
weights are found by bisecting the function's results (`laws.py`), independently of its code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.sampling.formulas import total_variation
from outrider.sampling.support import Support
from outrider.sampling.verify import (
    VerifyInput,
    VerifyOutcome,
    verify_block,
    verify_equal,
    verify_tokens,
)

from .laws import (
    NO_TOKEN,
    Case,
    Verify,
    distribution_error,
    emitted_distribution,
    mean_accepted,
    random_case,
    silence,
    target_distribution,
)

_EXACT = 1e-12

_both = pytest.mark.parametrize("verify", [verify_tokens, verify_block], ids=["tokens", "block"])

_SHAPES: dict[str, dict[str, Any]] = {
    "full support": {"full_support": True},
    "truncated": {},
    "truncated, zeros": {"target_zeros": 0.4},
    "full, zeros": {"full_support": True, "target_zeros": 0.4},
    "no tail": {"no_tail": True},
    "no tail, zeros": {"no_tail": True, "target_zeros": 0.3},
}


@pytest.mark.slow
@_both
@pytest.mark.parametrize("shape", _SHAPES)
@pytest.mark.parametrize(("vocab_size", "gamma", "num_cases"), [(3, 1, 10), (3, 2, 5), (4, 2, 2)])
def test_the_output_distribution_is_the_targets(
    verify: Verify, shape: str, vocab_size: int, gamma: int, num_cases: int
) -> None:
    """Random tables depending on the whole context, with supports and zeros of every kind."""
    for seed in range(num_cases):
        case = random_case(seed, vocab_size, gamma, **_SHAPES[shape])
        assert distribution_error(verify, case) < _EXACT, f"seed {seed}"


@_both
@pytest.mark.parametrize(
    ("vocab_size", "gamma", "shape"),
    [
        (vocab_size, gamma, shape)
        for vocab_size, gamma in ((5, 2), (3, 3))
        for shape in ("full support", "truncated", "truncated, zeros", "no tail, zeros")
    ],
)
def test_the_output_distribution_is_the_targets_for_larger_blocks(
    verify: Verify, vocab_size: int, gamma: int, shape: str
) -> None:
    """As above with five tokens, and with three draft tokens."""
    case = random_case(100, vocab_size, gamma, **_SHAPES[shape])
    assert distribution_error(verify, case) < _EXACT


@_both
@pytest.mark.parametrize("shape", ["full support", "truncated", "truncated, zeros"])
def test_a_block_with_a_token_that_the_target_cannot_run(verify: Verify, shape: str) -> None:
    """It is verified up to that token, at any position; no token follows."""
    for seed in range(4):
        case = random_case(200 + seed, 3, 2, **_SHAPES[shape])
        for bad in range(3):
            assert distribution_error(verify, replace(case, bad=bad)) < _EXACT, (
                f"seed {seed}, bad {bad}"
            )


@_both
def test_a_long_block_with_a_token_that_the_target_cannot_run(verify: Verify) -> None:
    case = random_case(104, 3, 3, full_support=True)
    assert distribution_error(verify, replace(case, bad=1)) < _EXACT


@_both
def test_equal_models_accept_everything(verify: Verify) -> None:
    """A draft that is the target loses no token, and the distribution is exact."""
    case = random_case(7, 3, 2, full_support=True)
    target = {}
    for context, support in case.draft.items():
        target[context] = np.zeros(3)
        target[context][support.token_ids] = support.probs
    same = Case(3, 2, target, case.draft)
    law, accepted = emitted_distribution(verify, same)
    assert accepted == pytest.approx(2, abs=_EXACT)
    assert np.abs(law - target_distribution(same)).max() < _EXACT


@_both
def test_disjoint_models_accept_nothing(verify: Verify) -> None:
    """If the target excludes all draft tokens, every token is a recovered one."""
    case = random_case(8, 4, 2, full_support=True)
    support = Support(np.array([2, 0]), np.array([0.5, 0.5]))
    row = np.array([0.0, 0.3, 0.0, 0.7])
    disjoint = Case(4, 2, dict.fromkeys(case.target, row), dict.fromkeys(case.draft, support))
    law, accepted = emitted_distribution(verify, disjoint)
    assert accepted == 0
    assert np.abs(law - target_distribution(disjoint)).max() < _EXACT


@_both
def test_a_one_hot_target_decides_the_output(verify: Verify) -> None:
    """One-hot target rows, as at vanishing temperature: one sequence has all the mass."""
    case = random_case(9, 3, 2)
    rows = {context: np.eye(3)[(len(context) + 1) % 3] for context in case.target}
    certain = Case(3, 2, rows, case.draft)
    law, _ = emitted_distribution(verify, certain)
    assert law[1, 2, 0] == pytest.approx(1, abs=_EXACT)


def test_block_verification_never_accepts_less() -> None:
    """Sun et al. 2024, Theorem 2, on 60 random cases; strictly more on many of them."""
    gains = []
    for seed in range(60):
        gamma = 3 if seed % 8 == 0 else 2
        shape = list(_SHAPES.values())[seed % len(_SHAPES)]
        case = random_case(1000 + seed, 3, gamma, **shape)
        gains.append(mean_accepted(verify_block, case) - mean_accepted(verify_tokens, case))
    assert min(gains) > -_EXACT
    assert np.sum(np.array(gains) > 1e-3) > 15


@_both
def test_acceptance_of_one_token_is_one_minus_tv(verify: Verify) -> None:
    """At γ = 1 both rules accept with 1 - TV(target, draft) (Leviathan et al., Corollary 3.6)."""
    for seed in range(40):
        vocab_size = 2 + seed % 7
        shape = list(_SHAPES.values())[seed % len(_SHAPES)]
        case = random_case(2000 + seed, vocab_size, 1, **shape)
        draft_probs = np.zeros(vocab_size)
        draft_probs[case.draft[()].token_ids] = case.draft[()].probs
        expected = 1 - total_variation(case.target[()], draft_probs)
        assert mean_accepted(verify, case) == pytest.approx(expected, abs=_EXACT)


def test_each_token_is_accepted_with_one_minus_tv() -> None:
    """Token verification, γ = 2: the mean is the sum over prefixes of Π min(target, draft)."""
    for seed in range(10):
        case = random_case(3000 + seed, 4, 2)

        def overlap(context: tuple[int, ...], case: Case = case) -> dict[int, float]:
            support = case.draft[context]
            common = np.minimum(case.target[context][support.token_ids], support.probs)
            return dict(zip(support.token_ids.tolist(), common.tolist(), strict=True))

        first = overlap(())
        expected = sum(p * (1 + sum(overlap((t,)).values())) for t, p in first.items())
        assert mean_accepted(verify_tokens, case) == pytest.approx(expected, abs=_EXACT)


@_both
def test_no_draft_gives_the_targets_token(verify: Verify) -> None:
    """γ = 0 is plain decoding."""
    nothing = np.zeros(0)
    assert verify([], [], VerifyInput([], nothing, nothing, [5]), [], silence) == VerifyOutcome(
        0, 5
    )


@_both
def test_an_empty_residual_never_emits_a_meaningless_sample(verify: Verify) -> None:
    """Equal models, the target's float32 rounded down, nothing outside the support.

    The bug: at a uniform next to 1 the token is rejected, max(p - q, 0) is zero everywhere, and
    `samples[0]`, a draw from an empty set, is emitted (token 0 of the engine, allowed or not).
    """
    weights = np.array([0.6, 0.3, 0.1], np.float32) / np.float32(1.0000002)
    support = Support.normalised(np.array([4, 5, 6]), weights)
    evidence = VerifyInput(
        [weights.astype(np.float64)], np.zeros(1), np.array([-np.inf]), [NO_TOKEN, 4]
    )
    outcome = verify([4], [support], evidence, [1 - 2.0**-53], silence)
    emitted = 4 if outcome.num_accepted else outcome.next_token
    assert emitted in (4, 5, 6)


@given(
    st.lists(st.integers(0, 3), max_size=6),
    st.lists(st.integers(0, 3), min_size=7, max_size=7),
)
def test_equality_emits_the_samples(draft: list[int], samples: list[int]) -> None:
    """The output is the longest possible prefix of the target's samples, whatever the draft."""
    outcome = verify_equal(draft, samples[: len(draft) + 1])
    emitted = [*draft[: outcome.num_accepted], outcome.next_token]
    assert emitted == samples[: outcome.num_accepted + 1]
    assert outcome.num_accepted == len(draft) or draft[outcome.num_accepted] != outcome.next_token


@pytest.mark.parametrize("uniform", [0.0, 2.0**-54, 0.5, 1 - 2.0**-53])
@_both
def test_extreme_uniforms_emit_possible_tokens(verify: Verify, uniform: float) -> None:
    """At the ends of [0, 1) no token is emitted that the target excludes."""
    for seed in range(30):
        case = random_case(4000 + seed, 4, 1, target_zeros=0.5)
        support, row = case.draft[()], case.target[()]
        outside = row.copy()
        outside[support.token_ids] = 0
        sample = int(outside.argmax()) if outside.any() else -1
        bonus = {int(t): int(case.target[(int(t),)].argmax()) for t in support.token_ids}
        for token in support.token_ids.tolist():
            with np.errstate(divide="ignore"):
                of_sample = np.log([outside[sample] if sample >= 0 else 0.0])
            evidence = VerifyInput(
                [row[support.token_ids]],
                np.array([outside.sum()]),
                of_sample,
                [sample, bonus[token]],
            )
            outcome = verify([token], [support], evidence, [uniform], silence)
            first = token if outcome.num_accepted else outcome.next_token
            assert first >= 0
            assert row[first] > 0

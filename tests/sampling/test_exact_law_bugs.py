"""Planted bugs: the check of test_exact_law must detect them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from outrider.sampling.support import Support
from outrider.sampling.verify import Noise, VerifyInput, VerifyOutcome, verify_block, verify_tokens

from .laws import Verify, distribution_error, random_case

_EXACT = 1e-12
_WRONG = 1e-3

_both = pytest.mark.parametrize("verify", [verify_tokens, verify_block], ids=["tokens", "block"])


def _one_accept_uniform_for_all(verify: Verify) -> Verify:
    def planted(
        draft: Sequence[int],
        supports: Sequence[Support],
        evidence: VerifyInput,
        accept: Sequence[float],
        noise: Noise,
    ) -> VerifyOutcome:
        return verify(draft, supports, evidence, [accept[0]] * len(draft), noise)

    return planted


@_both
def test_a_reused_uniform_is_caught(verify: Verify) -> None:
    """One uniform for two positions changes the distribution."""
    planted = _one_accept_uniform_for_all(verify)
    errors = [distribution_error(planted, random_case(seed, 3, 2)) for seed in range(12)]
    assert max(errors) > 5 * _WRONG


def _copied_loop(
    draft: Sequence[int],
    supports: Sequence[Support],
    evidence: VerifyInput,
    accept: Sequence[float],
    noise: Noise,
    bug: str,
) -> VerifyOutcome:
    """An independent copy of speculative sampling, with one of the likely bugs."""
    for i, token in enumerate(draft):
        where = int(np.flatnonzero(supports[i].token_ids == token)[0])
        p, q = evidence.target_probs[i], supports[i].probs
        if bug == "at least half" and p[where] >= q[where] / 2:
            continue
        if accept[i] < p[where] / q[where]:
            continue
        weights = p if bug == "recover from the target" else np.maximum(p - q, 0)
        tail = float(np.exp(evidence.tail_logprobs[i]))
        if bug == "forget the tail" and weights.any():
            tail = 0.0
        elif bug == "the mass for the log-probability":
            tail = float(evidence.tail_mass[i])
        elif bug == "no log-probability" and tail:
            tail = 1.0
        found = {t: w for t, w in zip(supports[i].token_ids.tolist(), weights, strict=True) if w}
        if tail:
            found[evidence.samples[i]] = tail
        scores = np.log(list(found.values())) + noise(i, np.array(list(found)))
        return VerifyOutcome(i, list(found)[int(scores.argmax())])
    return VerifyOutcome(len(draft), evidence.samples[len(draft)])


@pytest.mark.parametrize(
    "bug",
    [
        "recover from the target",
        "forget the tail",
        "the mass for the log-probability",
        "no log-probability",
        "at least half",
    ],
)
def test_a_copy_with_a_bug_is_caught(bug: str) -> None:
    """An independent copy of the loop passes the check as it is and fails it with each bug."""
    case = random_case(2, 4, 2)

    def copied(*arguments: Any) -> VerifyOutcome:
        return _copied_loop(*arguments, bug="none")

    def planted(*arguments: Any) -> VerifyOutcome:
        return _copied_loop(*arguments, bug=bug)

    assert distribution_error(copied, case) < _EXACT
    assert distribution_error(planted, case) > _WRONG


@_both
def test_noise_of_another_position_is_caught(verify: Verify) -> None:
    """The position after the rejected one: its noise is still needed for another token."""

    def planted(*block: Any) -> VerifyOutcome:
        *others, noise = block
        return verify(*others, lambda position, token_ids: noise(position + 1, token_ids))

    assert distribution_error(planted, random_case(2, 4, 2)) > _WRONG


@pytest.mark.parametrize(
    ("verify", "verified"),
    [
        pytest.param(verify_tokens, lambda block, bad: (), id="tokens-none"),
        pytest.param(verify_block, lambda block, bad: (), id="block-none"),
        pytest.param(verify_tokens, lambda block, bad: block[:1], id="tokens-first"),
        pytest.param(verify_block, lambda block, bad: block[:1], id="block-first"),
        pytest.param(
            verify_tokens, lambda block, bad: block[: block.index(bad)], id="tokens-before"
        ),
        pytest.param(verify_block, lambda block, bad: block[: block.index(bad)], id="block-before"),
    ],
)
def test_dropping_a_token_because_of_its_value_is_caught(verify: Verify, verified: Any) -> None:
    """In a block with a token that the target cannot run, too few tokens are verified."""
    cases = [random_case(200 + seed, 3, 2, full_support=True) for seed in range(4)]
    errors = [distribution_error(verify, replace(case, bad=1, verified=verified)) for case in cases]
    assert max(errors) > 5 * _WRONG

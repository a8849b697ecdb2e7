"""The checks of the sampled law have the power to see mistakes: bugs planted in the orchestrator.

How often that is a false alarm: see sampled.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import orchestrator.speculation.verification
from outrider.sampling.random import Purpose, target_gumbels
from outrider.sampling.random import uniforms as real_uniforms
from outrider.sampling.verify import VerifyOutcome, verify_tokens
from tests.e2e.pairs import SpreadPair
from tests.e2e.sampled import FALSE_ALARM, LARGE, METHODS, OUTPUT_LEN, SMALL, drawn, law_p_values
from tests.e2e.traffic import REJECTION
from tests.stack import running_stack


def _accept_all(*block: Any) -> VerifyOutcome:
    """The draft's law instead of the target's."""
    draft_token_ids, _, evidence, *_ = block
    return VerifyOutcome(len(draft_token_ids), evidence.samples[-1])


def _accept_the_likelier(*block: Any) -> VerifyOutcome:
    """p > q instead of u·q < p: tokens the draft overrates can never be accepted."""
    draft_token_ids, supports, evidence, accept, noise = block
    return verify_tokens(draft_token_ids, supports, evidence, np.ones_like(accept), noise)


def _recover_from_the_target(*block: Any) -> VerifyOutcome:
    """After a rejection a draw from p, not from max(p - q, 0)."""
    draft_token_ids, supports, evidence, _, noise = block
    verdict = verify_tokens(*block)
    at = verdict.num_accepted
    if at == len(draft_token_ids):
        return verdict
    ids = np.append(supports[at].token_ids, evidence.samples[at])
    probs = np.append(evidence.target_probs[at], np.exp(evidence.tail_logprobs[at]))
    scores = np.log(np.maximum(probs, 1e-300)) + noise(at, ids)
    return VerifyOutcome(at, int(ids[scores.argmax()]))


def _lose_the_tail(*block: Any) -> VerifyOutcome:
    """The target's mass outside the draft's support is forgotten."""
    draft_token_ids, supports, evidence, accept, noise = block
    nothing = np.zeros_like(evidence.tail_mass)
    evidence = replace(evidence, tail_mass=nothing, tail_logprobs=nothing - np.inf)
    return verify_tokens(draft_token_ids, supports, evidence, accept, noise)


def _noise_of_the_next_position(seed: int, position: int, token_ids: Any) -> Any:
    """Recovered tokens see noise that is still to draw another token."""
    return target_gumbels(seed, position + 1, token_ids)


def _draft_uniforms(seed: int, purpose: Purpose, positions: Any, base_len: int) -> Any:
    """Acceptance sees the uniform that drew the draft token."""
    used = Purpose.DRAFT if purpose is Purpose.ACCEPT else purpose
    return real_uniforms(seed, used, positions, base_len)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rejection", "block"])
async def test_many_tokens(method: str, spread_pair: SpreadPair, redis: str) -> None:
    """As many as catch the subtlest of the bugs planted below."""
    num_outputs, num_places = LARGE
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = await drawn(stack, {}, METHODS[method], OUTPUT_LEN, num_outputs)
    found = law_p_values(spread_pair, outputs, {}, num_places)
    assert min(found.values()) > FALSE_ALARM, f"{method}: {found}"


@pytest.mark.parametrize(
    ("name", "bug", "size"),
    [
        ("verify_tokens", _accept_all, SMALL),
        ("verify_tokens", _accept_the_likelier, SMALL),
        ("verify_tokens", _recover_from_the_target, SMALL),
        ("verify_tokens", _lose_the_tail, SMALL),
        pytest.param("target_gumbels", _noise_of_the_next_position, LARGE, marks=pytest.mark.slow),
        pytest.param("uniforms", _draft_uniforms, LARGE, marks=pytest.mark.slow),
    ],
)
async def test_a_planted_bug_is_caught(
    name: str,
    bug: Any,
    size: tuple[int, int],
    spread_pair: SpreadPair,
    redis: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checks above, at their own sizes, fail: they have the power to see such mistakes."""
    monkeypatch.setattr(orchestrator.speculation.verification, name, bug)
    num_outputs, num_places = size
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = await drawn(stack, {}, REJECTION, OUTPUT_LEN, num_outputs)
    found = law_p_values(spread_pair, outputs, {}, num_places)
    assert min(found.values()) < FALSE_ALARM, f"not caught: {found}"

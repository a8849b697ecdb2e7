"""What comes out at temperature > 0 has the target's own law, through the real services.

The laws are Hugging Face's logits under processors that tests/e2e/reference.py writes out once
more. Seeds are fixed and, where γ is too, the orchestrator waits for every proposal: outputs and
p-values repeat. Where γ is chosen, and where drafts for many outcomes race with the verdict, they
do not. Each p-value is uniform on [0, 1] if all is right, so each check has a false-alarm
probability of 1e-6, for a fresh choice of seeds or in each run; there are about 70.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import orchestrator.blocks
from orchestrator.blocks import Proposal
from orchestrator.drafting import Drafting
from outrider.sampling.random import Purpose, target_gumbels
from outrider.sampling.random import uniforms as real_uniforms
from outrider.sampling.verify import Verdict, verify_tokens
from tests.e2e.law_tests import joint_law, joint_p_value, p_values, places
from tests.e2e.pairs import CASES, PROMPT, SpreadPair
from tests.e2e.reference import Sampling
from tests.e2e.traffic import (
    BLOCK,
    COUPLED,
    REJECTION,
    assert_speculated,
    far_target,
    generate_all,
)
from tests.stack import Output, Stack, running_stack

_FALSE_ALARM = 1e-6
# Where nothing else is said.
_FIXED = {"gamma": 3}

_METHODS = {"rejection": REJECTION, "block": BLOCK, "coupled": COUPLED}

# Tokens of an output, unless it stops before.
_OUTPUT_LEN = 24
# Outputs of a check, and how many of all their tokens it judges: fixed, see law_tests.
_SMALL = (48, 700)
_MEDIUM = (100, 2200)
_LARGE = (300, 7000)
_NUM_SHORT_OUTPUTS = 600


async def _outputs(
    stack: Stack,
    sampling: Sampling,
    verification: int,
    num_tokens: int,
    num_outputs: int,
    how: dict[str, int] = _FIXED,
) -> list[Output]:
    """With look-ahead asked for few at a time, so that the draft has the time for it."""
    given = {"ignore_eos": True, **sampling, "max_tokens": num_tokens}
    calls: list[dict[str, Any]] = [
        {
            "prompt": PROMPT,
            "sampling": {**given, "seed": seed},
            "verification": verification,
            **how,
        }
        for seed in range(num_outputs)
    ]
    return await generate_all(stack, calls, at_once=4 if how.get("lookahead") else 64)


def _p_values(
    spread_pair: SpreadPair, outputs: Sequence[Output], sampling: Sampling, num_places: int
) -> dict[str, float]:
    given = {"ignore_eos": True, **sampling}
    found = []
    for seed, output in enumerate(outputs):
        laws = spread_pair.reference.laws(PROMPT, output.token_ids, given)
        drafts = spread_pair.draft_reference.laws(PROMPT, output.token_ids, given)
        # What the draft overrates first: wrong acceptance crowds the places at one end.
        overrated = drafts / np.maximum(laws, 1e-300)
        found.append(places(laws, output.token_ids, overrated, seed))
    return p_values(found, num_places)


@pytest.mark.parametrize("case", CASES)
async def test_every_processor(case: str, spread_pair: SpreadPair, redis: str) -> None:
    """By rejection and by blocks; coupled outputs are compared token for token elsewhere."""
    sampling, (num_outputs, num_places) = CASES[case], _SMALL
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = {
            name: await _outputs(stack, sampling, _METHODS[name], _OUTPUT_LEN, num_outputs)
            for name in ("rejection", "block")
        }
    for name, theirs in outputs.items():
        assert_speculated(theirs)
        found = _p_values(spread_pair, theirs, sampling, num_places)
        assert min(found.values()) > _FALSE_ALARM, f"{name}: {found}"


@pytest.mark.parametrize("method", _METHODS)
async def test_the_joint_law_of_short_outputs(
    method: str, spread_pair: SpreadPair, redis: str
) -> None:
    """All outputs of four tokens over a vocabulary cut to five."""
    sampling = {"allowed_token_ids": [0, 2, 3, 5, 6]}
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = await _outputs(stack, sampling, _METHODS[method], 4, _NUM_SHORT_OUTPUTS)
    assert_speculated(outputs)
    joint = joint_law(spread_pair.reference, PROMPT, 4, {"ignore_eos": True, **sampling})
    assert sum(joint.values()) == pytest.approx(1.0)
    assert joint_p_value(joint, [output.token_ids for output in outputs]) > _FALSE_ALARM


# γ is the server's to choose, by costs that make it worth while.
_CHOSEN = {"lookahead": 2, "fan_out": 16}
# Blocks so long that something is left of them when the target has emitted their first tokens.
_LONG = {"gamma": 5, "lookahead": 0}
_LONG_AHEAD = {"gamma": 5, "lookahead": 2, "fan_out": 16}


def go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proposal that had to be waited for comes just too late for its round.

    The round goes without draft tokens; where the target then emits what was drafted, the rest of
    the proposal is used for the next one. Only the order of events decides, never a token.
    """
    wait = Drafting.wait

    async def wait_in_vain(self: Drafting, state: Any) -> None:
        await wait(self, state)

    monkeypatch.setattr(Drafting, "wait", wait_in_vain)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("method", ["rejection", "block"])
async def test_gamma_chosen_and_many_outcomes_drafted_ahead(
    method: str, spread_pair: SpreadPair, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both laws: of short outputs jointly, and of long ones place by place."""
    far_target(monkeypatch, 0.025)
    sampling = {"allowed_token_ids": [0, 2, 3, 5, 6]}
    num_outputs, num_places = _MEDIUM
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        short = await _outputs(
            stack, sampling, _METHODS[method], 4, _NUM_SHORT_OUTPUTS // 2, _CHOSEN
        )
        long = await _outputs(stack, {}, _METHODS[method], _OUTPUT_LEN, num_outputs, _CHOSEN)
    assert_speculated(short)
    assert_speculated(long)
    assert sum(output.speculation.num_lookahead_hits for output in long) > 0
    used = np.sum([_padded(o.speculation.num_rounds_per_gamma) for o in long], axis=0)
    assert np.count_nonzero(used) >= 3, "several γ were chosen"
    joint = joint_law(spread_pair.reference, PROMPT, 4, {"ignore_eos": True, **sampling})
    assert joint_p_value(joint, [output.token_ids for output in short]) > _FALSE_ALARM
    found = _p_values(spread_pair, long, {}, num_places)
    assert min(found.values()) > _FALSE_ALARM, f"{method}: {found}"


def _padded(counts: Sequence[int]) -> list[int]:
    return [*counts, *[0] * (17 - len(counts))]


@pytest.mark.parametrize("how", [_LONG, _LONG_AHEAD], ids=["sequential", "ahead"])
@pytest.mark.parametrize("method", ["rejection", "block"])
async def test_the_rest_of_late_proposals(
    method: str,
    how: dict[str, int],
    spread_pair: SpreadPair,
    redis: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sequential drafting, so that every draft token used is of a tail; and with look-ahead."""
    go_without(monkeypatch)
    if how["lookahead"]:
        far_target(monkeypatch, 0.025)
    num_outputs, num_places = _MEDIUM
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = await _outputs(stack, {}, _METHODS[method], _OUTPUT_LEN, num_outputs, how)
    assert_speculated(outputs)
    assert sum(output.speculation.num_drafts for output in outputs) > 2 * num_outputs
    found = _p_values(spread_pair, outputs, {}, num_places)
    assert min(found.values()) > _FALSE_ALARM, f"{method}: {found}"


def _supports_not_shifted(self: Proposal, context_len: int) -> Proposal | None:
    """The tail's tokens with the supports of the proposal's first ones."""
    skipped = context_len - self.base_len
    if not 0 <= skipped < len(self.token_ids):
        return None
    supports = self.supports[: len(self.token_ids) - skipped] if self.supports else None
    return Proposal(context_len, self.token_ids[skipped:], supports)


async def test_a_bug_in_tails_is_caught(
    spread_pair: SpreadPair, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the check above, at its own size."""
    go_without(monkeypatch)
    monkeypatch.setattr(Proposal, "continuing", _supports_not_shifted)
    num_outputs, num_places = _MEDIUM
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = await _outputs(stack, {}, REJECTION, _OUTPUT_LEN, num_outputs, _LONG)
    found = _p_values(spread_pair, outputs, {}, num_places)
    assert min(found.values()) < _FALSE_ALARM, f"not caught: {found}"


def _accept_all(*block: Any) -> Verdict:
    """The draft's law instead of the target's."""
    draft_token_ids, _, evidence, *_ = block
    return Verdict(len(draft_token_ids), evidence.samples[-1])


def _accept_the_likelier(*block: Any) -> Verdict:
    """p > q instead of u·q < p: tokens the draft overrates can never be accepted."""
    draft_token_ids, supports, evidence, accept, noise = block
    return verify_tokens(draft_token_ids, supports, evidence, np.ones_like(accept), noise)


def _recover_from_the_target(*block: Any) -> Verdict:
    """After a rejection a draw from p, not from max(p - q, 0)."""
    draft_token_ids, supports, evidence, _, noise = block
    verdict = verify_tokens(*block)
    at = verdict.num_accepted
    if at == len(draft_token_ids):
        return verdict
    ids = np.append(supports[at].token_ids, evidence.samples[at])
    probs = np.append(evidence.target_probs[at], np.exp(evidence.tail_logprobs[at]))
    scores = np.log(np.maximum(probs, 1e-300)) + noise(at, ids)
    return Verdict(at, int(ids[scores.argmax()]))


def _lose_the_tail(*block: Any) -> Verdict:
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
    num_outputs, num_places = _LARGE
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = await _outputs(stack, {}, _METHODS[method], _OUTPUT_LEN, num_outputs)
    found = _p_values(spread_pair, outputs, {}, num_places)
    assert min(found.values()) > _FALSE_ALARM, f"{method}: {found}"


@pytest.mark.parametrize(
    ("name", "bug", "size"),
    [
        ("verify_tokens", _accept_all, _SMALL),
        ("verify_tokens", _accept_the_likelier, _SMALL),
        ("verify_tokens", _recover_from_the_target, _SMALL),
        ("verify_tokens", _lose_the_tail, _SMALL),
        pytest.param("target_gumbels", _noise_of_the_next_position, _LARGE, marks=pytest.mark.slow),
        pytest.param("uniforms", _draft_uniforms, _LARGE, marks=pytest.mark.slow),
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
    monkeypatch.setattr(orchestrator.blocks, name, bug)
    num_outputs, num_places = size
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = await _outputs(stack, {}, REJECTION, _OUTPUT_LEN, num_outputs)
    found = _p_values(spread_pair, outputs, {}, num_places)
    assert min(found.values()) < _FALSE_ALARM, f"not caught: {found}"

"""The target's own law also where γ is chosen, many outcomes are drafted, and proposals come late.

How often that is a false alarm: see sampled.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from orchestrator.speculation.drafting import Drafting
from orchestrator.speculation.verification import Proposal
from tests.e2e.law_tests import joint_law, joint_p_value
from tests.e2e.pairs import PROMPT, SpreadPair
from tests.e2e.sampled import (
    FALSE_ALARM,
    MEDIUM,
    METHODS,
    NUM_SHORT_OUTPUTS,
    OUTPUT_LEN,
    drawn,
    law_p_values,
)
from tests.e2e.traffic import REJECTION, assert_speculated, far_target
from tests.stack import running_stack

pytestmark = pytest.mark.slow

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

    async def wait_in_vain(self: Drafting, room: int) -> None:
        await wait(self, room)

    monkeypatch.setattr(Drafting, "wait", wait_in_vain)


@pytest.mark.parametrize("method", ["rejection", "block"])
async def test_gamma_chosen_and_many_outcomes_drafted_ahead(
    method: str, spread_pair: SpreadPair, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both laws: of short outputs jointly, and of long ones place by place."""
    far_target(monkeypatch, 0.025)
    sampling = {"allowed_token_ids": [0, 2, 3, 5, 6]}
    num_outputs, num_places = MEDIUM
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        short = await drawn(stack, sampling, METHODS[method], 4, NUM_SHORT_OUTPUTS // 2, _CHOSEN)
        long = await drawn(stack, {}, METHODS[method], OUTPUT_LEN, num_outputs, _CHOSEN)
    assert_speculated(short)
    assert_speculated(long)
    assert sum(output.speculation.num_lookahead_hits for output in long) > 0
    used = np.sum([_padded(o.speculation.num_rounds_per_gamma) for o in long], axis=0)
    assert np.count_nonzero(used) >= 3, "several γ were chosen"
    joint = joint_law(spread_pair.reference, PROMPT, 4, {"ignore_eos": True, **sampling})
    assert joint_p_value(joint, [output.token_ids for output in short]) > FALSE_ALARM
    found = law_p_values(spread_pair, long, {}, num_places)
    assert min(found.values()) > FALSE_ALARM, f"{method}: {found}"


def _padded(counts: Sequence[int]) -> list[int]:
    return [*counts, *[0] * (17 - len(counts))]


@pytest.mark.parametrize(
    ("method", "how"),
    [("rejection", _LONG), ("block", _LONG_AHEAD)],
    ids=["rejection, sequential", "block, ahead"],
)
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
    num_outputs, num_places = MEDIUM
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = await drawn(stack, {}, METHODS[method], OUTPUT_LEN, num_outputs, how)
    assert_speculated(outputs)
    assert sum(output.speculation.num_drafts for output in outputs) > 2 * num_outputs
    found = law_p_values(spread_pair, outputs, {}, num_places)
    assert min(found.values()) > FALSE_ALARM, f"{method}: {found}"


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
    num_outputs, num_places = MEDIUM
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = await drawn(stack, {}, REJECTION, OUTPUT_LEN, num_outputs, _LONG)
    found = law_p_values(spread_pair, outputs, {}, num_places)
    assert min(found.values()) < FALSE_ALARM, f"not caught: {found}"

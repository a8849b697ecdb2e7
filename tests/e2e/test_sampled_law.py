"""What comes out at temperature > 0 has the target's own law, through the real services.

Every processor, and all short outputs jointly; how often that is a false alarm: see sampled.py.
"""

from __future__ import annotations

import pytest

from tests.e2e.law_tests import joint_law, joint_p_value
from tests.e2e.pairs import CASES, PROMPT, SpreadPair
from tests.e2e.sampled import (
    FALSE_ALARM,
    METHODS,
    NUM_SHORT_OUTPUTS,
    OUTPUT_LEN,
    SMALL,
    drawn,
    law_p_values,
)
from tests.e2e.traffic import assert_speculated
from tests.stack import running_stack

pytestmark = pytest.mark.slow

# Processors act on the target's logits, whoever judges by them then: one way of judging each, both
# for none of them and for all together. Coupled outputs are compared token for token elsewhere.
_WAYS = [
    (case, method)
    for number, case in enumerate(CASES)
    for method in ("rejection", "block")
    if case in ("plain", "all") or (method == "block") == number % 2
]


@pytest.mark.parametrize(("case", "method"), _WAYS)
async def test_every_processor(case: str, method: str, spread_pair: SpreadPair, redis: str) -> None:
    sampling, (num_outputs, num_places) = CASES[case], SMALL
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = await drawn(stack, sampling, METHODS[method], OUTPUT_LEN, num_outputs)
    assert_speculated(outputs)
    found = law_p_values(spread_pair, outputs, sampling, num_places)
    assert min(found.values()) > FALSE_ALARM, str(found)


@pytest.mark.parametrize("method", METHODS)
async def test_the_joint_law_of_short_outputs(
    method: str, spread_pair: SpreadPair, redis: str
) -> None:
    """All outputs of four tokens over a vocabulary cut to five."""
    sampling = {"allowed_token_ids": [0, 2, 3, 5, 6]}
    async with running_stack(spread_pair.target, spread_pair.draft, redis) as stack:
        outputs = await drawn(stack, sampling, METHODS[method], 4, NUM_SHORT_OUTPUTS)
    assert_speculated(outputs)
    joint = joint_law(spread_pair.reference, PROMPT, 4, {"ignore_eos": True, **sampling})
    assert sum(joint.values()) == pytest.approx(1.0)
    assert joint_p_value(joint, [output.token_ids for output in outputs]) > FALSE_ALARM

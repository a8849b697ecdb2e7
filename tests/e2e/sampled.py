"""Outputs drawn through the services, and how well they fit the law they should have.

The laws are Hugging Face's logits under processors that tests/e2e/reference.py writes out once
more. Seeds are fixed and, where γ is too, the orchestrator waits for every proposal: outputs and
p-values repeat. Where γ is chosen, and where drafts for many outcomes race with the verdict, they
do not. Each p-value is uniform on [0, 1] if all is right, so each check has a false-alarm
probability of 1e-6, for a fresh choice of seeds or in each run; there are about 50.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.e2e.law_tests import p_values, places
from tests.e2e.pairs import PROMPT, SpreadPair
from tests.e2e.reference import Sampling
from tests.e2e.traffic import BLOCK, COUPLED, REJECTION, generate_all
from tests.stack import Output, Stack

FALSE_ALARM = 1e-6
# Where nothing else is said.
FIXED = {"gamma": 3}

METHODS = {"rejection": REJECTION, "block": BLOCK, "coupled": COUPLED}

# Tokens of an output, unless it stops before.
OUTPUT_LEN = 24
# Outputs of a check, and how many of all their tokens it judges: fixed, see law_tests.
SMALL = (48, 700)
MEDIUM = (60, 1320)
LARGE = (300, 7000)
NUM_SHORT_OUTPUTS = 600


async def drawn(
    stack: Stack,
    sampling: Sampling,
    verification: int,
    num_tokens: int,
    num_outputs: int,
    how: dict[str, int] = FIXED,
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
    return await generate_all(stack, calls, at_once=8 if how.get("lookahead") else 64)


def law_p_values(
    spread_pair: SpreadPair, outputs: Sequence[Output], sampling: Sampling, num_places: int
) -> dict[str, float]:
    given = {"ignore_eos": True, **sampling}
    ids = [output.token_ids for output in outputs]
    of_target = spread_pair.reference.laws_of(PROMPT, ids, given)
    of_draft = spread_pair.draft_reference.laws_of(PROMPT, ids, given)
    found = []
    for seed, (laws, drafts) in enumerate(zip(of_target, of_draft, strict=True)):
        # What the draft overrates first: wrong acceptance crowds the places at one end.
        overrated = drafts / np.maximum(laws, 1e-300)
        found.append(places(laws, ids[seed], overrated, seed))
    return p_values(found, num_places)

"""Prompt lookup is lossless, alone and beside a draft: greedy, coupled and sampled outputs.

Each check of a distribution has two p-values and fails if one is below 1e-6: a false-alarm
probability of 2e-6 at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import orchestrator.speculation.lookup
from orchestrator.speculation.lookup import PromptLookup
from outrider.sampling.support import Support
from outrider.v1 import orchestrator_pb2 as pb
from tests.e2e.law_tests import p_values, places
from tests.e2e.pairs import PROMPT, SpreadPair, TinyPair
from tests.e2e.sampled import FALSE_ALARM, METHODS, OUTPUT_LEN, drawn
from tests.e2e.traffic import COUPLED, assert_speculated, far_target, generate_all, prompt_of
from tests.stack import Output, running_stack

# Outputs of a check, and how many of all their tokens it judges.
SIZE = (120, 2700)
LOOKUP = pb.DRAFT_SOURCE_LOOKUP
GREEDY = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}


def num_accepted(outputs: list[Output], source: int) -> int:
    return sum(
        stats.num_accepted_tokens
        for output in outputs
        for stats in output.speculation.sources
        if stats.source == source
    )


@pytest.mark.parametrize("has_draft", [False, True], ids=["alone", "beside a draft"])
@pytest.mark.parametrize("how", [{}, {"gamma": 3}, {"draft_source": LOOKUP}], ids=str)
async def test_greedy_and_coupled_tokens_are_those_without_drafts(
    how: dict[str, Any], has_draft: bool, tiny_pair: TinyPair, redis: str
) -> None:
    """The prompts repeat themselves; a tiny model's greedy output soon does, too."""
    ways: list[dict[str, Any]] = [
        {"sampling": GREEDY},
        *(
            {"sampling": {**GREEDY, "temperature": 0.3, "seed": seed}, "verification": COUPLED}
            for seed in range(4)
        ),
    ]
    calls = [{"prompt": 2 * prompt_of(length), **way} for length in (5, 40) for way in ways]
    draft = tiny_pair.draft if has_draft else None
    async with running_stack(tiny_pair.target, draft, redis, prompt_lookup=True) as stack:
        plain = await generate_all(
            stack, [{**call, "draft_source": pb.DRAFT_SOURCE_NONE} for call in calls]
        )
        outputs = await generate_all(stack, [{**call, **how} for call in calls])
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
    assert sum(output.speculation.num_draft_tokens for output in plain) == 0
    # Beside a draft its measured speed decides, and without γ a pass may be too cheap here.
    if "gamma" in how and not has_draft:
        assert num_accepted(outputs, LOOKUP) > 0


def lookup_p_values(
    spread_pair: SpreadPair, outputs: list[Output], num_places: int
) -> dict[str, float]:
    """As `law_p_values`, with the token that lookup proposes first: bias of it shows at one end."""
    ids = [output.token_ids for output in outputs]
    found = []
    for seed, laws in enumerate(spread_pair.reference.laws_of(PROMPT, ids, {"ignore_eos": True})):
        context, preference = list(PROMPT), np.zeros_like(laws)
        lookup = PromptLookup(context, len(PROMPT) + OUTPUT_LEN)
        for position, token_id in enumerate(ids[seed]):
            lookup.update()
            preference[position, list(lookup.propose(1))] = 1
            context.append(token_id)
        found.append(places(laws, ids[seed], preference, seed))
    return p_values(found, num_places)


WAYS: dict[str, dict[str, Any]] = {
    "alone": {"gamma": 3, "draft_source": LOOKUP},
    "adaptive": {"draft_source": LOOKUP},
    "beside a draft": {"gamma": 3},
    "beside a draft, adaptive": {"lookahead": 2, "fan_out": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("rejection", "alone"),
        ("block", "adaptive"),
        ("block", "beside a draft"),
        ("rejection", "beside a draft, adaptive"),
    ],
)
async def test_sampled_output_has_the_target_s_distribution(
    method: str, way: str, spread_pair: SpreadPair, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 8 tokens, most pairs occurred before: most rounds have draft tokens of lookup."""
    if "gamma" not in WAYS[way]:
        far_target(monkeypatch, 0.002)
    num_outputs, num_places = SIZE
    draft = spread_pair.draft if "beside" in way else None
    async with running_stack(spread_pair.target, draft, redis, prompt_lookup=True) as stack:
        outputs = await drawn(stack, {}, METHODS[method], OUTPUT_LEN, num_outputs, WAYS[way])
    assert_speculated(outputs)
    assert num_accepted(outputs, LOOKUP) > 0
    assert (num_accepted(outputs, pb.DRAFT_SOURCE_MODEL) > 0) == ("beside" in way)
    found = lookup_p_values(spread_pair, outputs, num_places)
    assert min(found.values()) > FALSE_ALARM, str(found)


def _less_certain(token_id: int) -> Support:
    """The proposed token was not sampled from this."""
    return Support(np.array([token_id, (token_id + 1) % 8], np.int64), np.array([0.5, 0.5]))


@pytest.mark.slow
async def test_a_wrong_distribution_of_the_draft_token_is_caught(
    spread_pair: SpreadPair, redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above, at its own size, has the power to see it."""
    monkeypatch.setattr(orchestrator.speculation.lookup, "certain", _less_certain)
    num_outputs, num_places = SIZE
    async with running_stack(spread_pair.target, None, redis, prompt_lookup=True) as stack:
        outputs = await drawn(
            stack, {}, METHODS["rejection"], OUTPUT_LEN, num_outputs, WAYS["alone"]
        )
    found = lookup_p_values(spread_pair, outputs, num_places)
    assert min(found.values()) < FALSE_ALARM, f"not caught: {found}"

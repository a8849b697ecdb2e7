"""`draft_wait` always: every round has the request's γ, whatever the draft's timing."""

from __future__ import annotations

from typing import Any

import pytest

from outrider.v1 import draft_pb2, orchestrator_pb2, sampling_pb2
from tests.services.parts import GREEDY, refusal
from tests.services.test_drafting import DraftMessage, Script, scripted
from tests.stack import Output, Stack, request, running_stack

ALWAYS = orchestrator_pb2.DRAFT_WAIT_ALWAYS
GAMMA, NUM_TOKENS = 4, 120
VOCABULARY = "vocab_size=1000"
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": (GREEDY, {}),
    "sequential": (GREEDY, {"lookahead": 0}),
    "wide": (GREEDY, {"lookahead": 4, "fan_out": 32}),
    "sampled": ({"temperature": 1.0, "seed": 5, "ignore_eos": True}, {"lookahead": 4}),
    "coupled": (
        {"temperature": 1.0, "seed": 5, "ignore_eos": True},
        {"verification": sampling_pb2.VERIFICATION_COUPLED, "lookahead": 2},
    ),
}


async def rounds(stack: Stack, way: str, **fields: Any) -> list[int]:
    """How many rounds had 0, 1, … draft tokens."""
    sampling, more = WAYS[way]
    output = await stack.generate(
        [7, 8, 9], sampling={**sampling, "max_tokens": NUM_TOKENS}, gamma=GAMMA, **more, **fields
    )
    assert len(output.token_ids) == NUM_TOKENS
    return list(output.speculation.num_rounds_per_gamma)


@pytest.mark.slow
@pytest.mark.parametrize("draft_ms", [0.2, 6])
@pytest.mark.parametrize("way", WAYS)
async def test_every_round_after_the_first_has_the_requested_gamma(
    way: str, draft_ms: float, redis_url: str
) -> None:
    """Except the last ones, where fewer tokens are left. Also with a slow draft."""
    async with running_stack(
        None,
        None,
        redis_url,
        target_settings={"simulate": f"step_ms=2,{VOCABULARY}"},
        draft_settings={"simulate": f"step_ms={draft_ms},survival=0.8/0.6,{VOCABULARY}"},
        draft_wait_ms=60_000.0,
    ) as stack:
        for _ in range(2):
            by_gamma = await rounds(stack, way, draft_wait=ALWAYS)
            assert len(by_gamma) == GAMMA + 1
            assert by_gamma[0] <= 2, "the prompt, and a last round with one token left"
            assert sum(by_gamma[1:GAMMA]) <= GAMMA
            assert by_gamma[GAMMA] >= NUM_TOKENS // (GAMMA + 1) - 2


@pytest.mark.parametrize("way", ["setting", "field"])
async def test_a_draft_that_never_proposes_is_waited_for_once(way: str, redis_url: str) -> None:
    """Then it is not used for a while: each further wait would delay the output as much."""
    received: list[DraftMessage] = []

    def silent(script: Script, message: DraftMessage) -> list[draft_pb2.Proposal]:
        received.append(message)
        return []

    script = Script(NUM_TOKENS, silent)
    settings = {"draft_wait": "always"} if way == "setting" else {}
    fields = {} if way == "setting" else {"draft_wait": ALWAYS}
    async with scripted(redis_url, script, draft_wait_ms=1_000.0, **settings) as stack:
        output = Output()
        sampling = {**GREEDY, "max_tokens": NUM_TOKENS}
        wanted = request(script.path[:5], sampling, gamma=GAMMA, **fields)
        async for chunk in stack.client.Generate(wanted, timeout=100):
            output.add(chunk)
    assert output.token_ids == script.path[5 : 5 + NUM_TOKENS]
    assert output.speculation.num_drafts == 0
    assert [message.gamma for message in received] == [0, GAMMA], "the open, and one commit"


async def test_an_unknown_value_is_refused(redis_url: str) -> None:
    async with scripted(redis_url, Script(9, lambda script, message: [])) as stack:
        refused = await refusal(stack.generate([1], sampling=GREEDY, draft_wait=9))
    assert refused.fields == ["draft_wait"]

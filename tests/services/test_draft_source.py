"""`draft_source` of a request, through the services: honoured or refused by name, and reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from outrider.security.keys import KeyLimits
from outrider.v1 import orchestrator_pb2 as pb
from outrider.v1 import sampling_pb2
from tests.security.parts import write_keys
from tests.services.parts import GREEDY, refusal
from tests.stack import Output, Stack, request, running_stack

NUM_TOKENS = 40
# Its tokens do not repeat; those that it has proposed by lookup are rejected.
SIMULATED = {"simulate": "step_ms=1,vocab_size=1000"}
PROMPT = [7, 8, 9, 7, 8]


def by_source(output: Output) -> dict[str, pb.SourceStats]:
    """The reported statistics, by name of the source."""
    prefix = "DRAFT_SOURCE_"
    return {
        pb.DraftSource.Name(stats.source).removeprefix(prefix): stats
        for stats in output.speculation.sources
    }


async def generate(stack: Stack, prompt: list[int] = PROMPT, **fields: Any) -> Output:
    sampling = {**GREEDY, "max_tokens": NUM_TOKENS}
    return await stack.generate(prompt, sampling=sampling, **fields)


async def test_the_named_source_is_the_only_one_used(redis_url: str) -> None:
    async with running_stack(
        None, None, redis_url,
        target_settings=SIMULATED, draft_settings=SIMULATED, prompt_lookup=True,
    ) as stack:  # fmt: skip
        model = await generate(stack, draft_source=pb.DRAFT_SOURCE_MODEL, gamma=4)
        lookup = await generate(stack, draft_source=pb.DRAFT_SOURCE_LOOKUP, gamma=4)
        none = await generate(stack, draft_source=pb.DRAFT_SOURCE_NONE)
    assert set(by_source(model)) == {"MODEL"}
    assert by_source(model)["MODEL"].num_drafts == model.speculation.num_drafts > 0
    assert set(by_source(lookup)) <= {"LOOKUP", "NONE"}
    assert lookup.speculation.draft_wire_bytes == 0
    assert set(by_source(none)) == {"NONE"}
    assert none.speculation.num_drafts == none.speculation.draft_wire_bytes == 0
    assert model.token_ids == lookup.token_ids == none.token_ids


async def test_every_round_is_reported_with_its_source_and_reason(redis_url: str) -> None:
    async with running_stack(
        None, None, redis_url, target_settings=SIMULATED, prompt_lookup=True
    ) as stack:
        first = await generate(stack, gamma=4)
        # The same output again: the session's earlier text contains all of it.
        again = await generate(stack, [*PROMPT, *first.token_ids, *PROMPT], gamma=4)
    for output in (first, again):
        stats, sources = output.speculation, by_source(output)
        num_rounds = sum(sum(s.num_rounds_by_reason.values()) for s in sources.values())
        # Not chosen: the prompt's round, and a last one with one token left.
        assert 0 <= stats.num_rounds - num_rounds <= 2
        assert sum(s.num_drafts for s in sources.values()) == stats.num_drafts
        assert sum(s.num_draft_tokens for s in sources.values()) == stats.num_draft_tokens
        reasons = {reason for s in sources.values() for reason in s.num_rounds_by_reason}
        assert reasons <= {"no match", "faster"}
    assert not by_source(first)["NONE"].HasField("acceptance_rate")


@pytest.mark.parametrize(
    ("fields", "refused_field"),
    [
        ({"draft_source": pb.DRAFT_SOURCE_LOOKUP}, "draft_source"),
        ({"draft_source": pb.DRAFT_SOURCE_MODEL}, "draft_source"),
        ({"draft_source": pb.DRAFT_SOURCE_NONE, "gamma": 3}, "gamma"),
        ({"draft_source": 9}, "draft_source"),
    ],
)
async def test_a_source_that_is_not_there_is_refused(
    fields: dict[str, int], refused_field: str, redis_url: str
) -> None:
    """Without a draft tier and without prompt lookup."""
    async with running_stack(
        None, None, redis_url, target_settings=SIMULATED, prompt_lookup=False
    ) as stack:
        refused = await refusal(generate(stack, **fields))
    assert refused.fields == [refused_field]


async def test_a_resumed_turn_runs_without_a_source_that_is_not_there(redis_url: str) -> None:
    """Another orchestrator may have other sources: the output does not depend on them."""
    async with running_stack(
        None, None, redis_url, target_settings=SIMULATED, prompt_lookup=True
    ) as stack:
        whole = await generate(
            stack, draft_source=pb.DRAFT_SOURCE_LOOKUP, session_id="s", create_session=True
        )
    async with running_stack(
        None, None, redis_url, target_settings=SIMULATED, prompt_lookup=False
    ) as stack:
        rest = Output()
        resumed = pb.GenerateRequest(session_id="s", resume_from=5)
        async for chunk in stack.client.Generate(resumed, timeout=200):
            rest.add(chunk)
    assert rest.token_ids == whole.token_ids[5:]


# Room for one segment of each of two keys.
POOL = {"prompt_lookup": True, "prompt_lookup_pool": 32_768}
NEW_PROMPT = [7, 8, 9, 3]


def num_accepted(output: Output) -> int:
    sources = by_source(output)
    return sources["LOOKUP"].num_accepted_tokens if "LOOKUP" in sources else 0


async def test_past_outputs_are_found_by_their_own_key_only(redis_url: str, tmp_path: Path) -> None:
    """The same request gives the same output: it is proposed to the key that has received it."""
    keys = write_keys(tmp_path / "keys", ada=KeyLimits(), bob=KeyLimits())
    sampling = {**GREEDY, "max_tokens": NUM_TOKENS}

    async def ask(stack: Stack, name: str) -> Output:
        output, metadata = Output(), (("x-api-key", keys[name]),)
        asked = request(NEW_PROMPT, sampling, gamma=8)
        async for chunk in stack.client.Generate(asked, timeout=200, metadata=metadata):
            output.add(chunk)
        return output

    async with running_stack(
        None, None, redis_url,
        target_settings=SIMULATED, api_keys_file=str(tmp_path / "keys"), **POOL,
    ) as stack:  # fmt: skip
        outputs = [await ask(stack, name) for name in ("ada", "bob", "ada", "bob")]
    assert [num_accepted(output) > 0 for output in outputs] == [False, False, True, True]
    assert len({tuple(output.token_ids) for output in outputs}) == 1


@pytest.mark.parametrize(
    ("sampling", "verification", "is_used"),
    [
        ({"temperature": 1.0}, sampling_pb2.VERIFICATION_REJECTION, True),
        ({"temperature": 1.0, "seed": 5}, sampling_pb2.VERIFICATION_REJECTION, False),
        ({"temperature": 1.0, "seed": 5}, sampling_pb2.VERIFICATION_BLOCK, False),
        ({"temperature": 1.0, "seed": 5}, sampling_pb2.VERIFICATION_COUPLED, True),
        ({"temperature": 0.0, "seed": 5}, sampling_pb2.VERIFICATION_REJECTION, True),
    ],
)
async def test_past_outputs_of_the_same_seed_are_no_draft_tokens_of_rejection(
    sampling: dict[str, Any], verification: int, is_used: bool, redis_url: str
) -> None:
    """They have the same noise, so the output would not have the target's distribution."""
    given = {**sampling, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    async with running_stack(None, None, redis_url, target_settings=SIMULATED, **POOL) as stack:
        for _ in range(2):
            output = await stack.generate(
                NEW_PROMPT, sampling=given, gamma=8, verification=verification
            )
    assert (num_accepted(output) > 0) == is_used

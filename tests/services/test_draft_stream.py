"""The draft's stream without an orchestrator: proposals, and every kind of bad message."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from outrider.v1 import draft_pb2, sampling_pb2
from tests.services.parts import Greedy, System
from tests.services.streams import (
    Following,
    Stream,
    draft_commit,
    draft_open,
    ids,
    numbers,
    proposing,
)
from tests.stack import eventually

PROMPT = [3, 1, 4, 1]
HEALTHY, BAD = 1, 2
Frame = draft_pb2.ProposeRequest
Reason = draft_pb2.DraftLost


@pytest.mark.slow
@pytest.mark.parametrize(("lookahead", "fan_out"), [(0, 1), (1, 1), (1, 6), (2, 16), (3, 4)])
async def test_proposals_continue_the_committed_context(
    lookahead: int, fan_out: int, system: System, draft_greedy: Greedy
) -> None:
    """Every proposal is the draft's own greedy continuation of exactly the committed context."""
    async with proposing(system) as stream:
        prompts = [[n, 1, 2, 3] * (1 + 3 * n) for n in range(3)]
        opens = [
            draft_open(
                n + 1, prompt, lookahead=lookahead, fan_out=fan_out, max_len=len(prompt) + 120
            )
            for n, prompt in enumerate(prompts)
        ]
        await stream.write(Frame(opens=opens))
        await asyncio.gather(
            *(
                Following(stream, n + 1, prompt, draft_greedy).run(15)
                for n, prompt in enumerate(prompts)
            )
        )


@contextlib.asynccontextmanager
async def beside_a_healthy_one(system: System, truth: Greedy) -> AsyncIterator[Stream]:
    async with proposing(system) as stream:
        healthy = Following(stream, HEALTHY, PROMPT, truth)
        await stream.write(Frame(opens=[draft_open(HEALTHY, PROMPT, lookahead=1, fan_out=4)]))
        await healthy.run(2)
        running = asyncio.create_task(healthy.run(8))
        yield stream
        await running
        await healthy.run(2)
        await eventually(lambda: _only_one_is_open(system))  # the bad one is closed
        await stream.write(Frame(closes=[draft_pb2.DraftClose(generation_id=HEALTHY)]))
        await eventually(lambda: _nothing_is_held(system))


async def _only_one_is_open(system: System) -> bool:
    return (await system.draft_load()).num_open_generations == 1


async def _nothing_is_held(system: System) -> bool:
    load = await system.draft_load()
    return (load.num_open_generations, load.kv_used_tokens) == (0, 0)


async def lost(stream: Stream, generation_id: int = BAD) -> draft_pb2.DraftLost:
    while isinstance(answer := await stream.answer(generation_id), draft_pb2.Proposal):
        pass
    assert isinstance(answer, draft_pb2.DraftLost)
    return answer


NAN = sampling_pb2.SamplingParams(temperature=math.nan)
OUTSIDE = sampling_pb2.SamplingParams(logit_bias={256: 1.0})
TWO_FORMATS = sampling_pb2.SamplingParams(
    structured_outputs=sampling_pb2.StructuredOutputs(regex="a", grammar="b")
)
BAD_OPENS: dict[str, tuple[dict[str, Any], str]] = {
    "no context": ({"token_ids": b""}, "token_ids"),
    "half a token": ({"token_ids": b"\1\0\0"}, "token_ids"),
    "token out of range": ({"token_ids": ids([1, 2, 3, 256])}, "token_ids"),
    "token absurd": ({"token_ids": ids([1, 2, 3, 2**32 - 1])}, "token_ids"),
    "prompt_len 0": ({"prompt_len": 0}, "prompt_len"),
    "prompt_len absurd": ({"prompt_len": 2**32 - 1}, "prompt_len"),
    "vocab_size 0": ({"vocab_size": 0}, "token_ids"),
    "gamma 17": ({"gamma": 17}, "gamma"),
    "gamma absurd": ({"gamma": 2**32 - 1}, "gamma"),
    "ahead_gamma 17": ({"ahead_gamma": 17}, "ahead_gamma"),
    "lookahead absurd": ({"lookahead": 2**32 - 1}, "lookahead"),
    "verification 9": ({"verification": 9}, "verification"),
    "temperature NaN": ({"sampling": NAN}, "temperature"),
    "bias out of range": ({"sampling": OUTSIDE}, "logit_bias"),
    "two formats": ({"sampling": TWO_FORMATS}, "structured_outputs"),
}
# After a good open and its first round: 5 tokens committed, a proposal of four tokens is out.
BAD_COMMITS: dict[str, tuple[dict[str, Any], str]] = {
    "no token": ({"token_ids": b""}, "committed_len"),
    "half a token": ({"token_ids": b"\1\0\0"}, "token_ids"),
    "token out of range": ({"token_ids": ids([256])}, "token_ids"),
    "token absurd": ({"token_ids": ids([2**32 - 1])}, "token_ids"),
    "more tokens than said": ({"token_ids": ids([9, 9])}, "committed_len"),
    "length too small": ({"committed_len": 5}, "committed_len"),
    "length too large": ({"committed_len": 7}, "committed_len"),
    "length absurd": ({"committed_len": 2**32 - 1}, "committed_len"),
    "length 0": ({"committed_len": 0}, "committed_len"),
    "gamma 17": ({"gamma": 17}, "gamma"),
    "ahead_gamma absurd": ({"ahead_gamma": 2**32 - 1}, "ahead_gamma"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_OPENS)
async def test_bad_opens(name: str, system: System, draft_greedy: Greedy) -> None:
    fields, said = BAD_OPENS[name]
    async with beside_a_healthy_one(system, draft_greedy) as stream:
        await stream.write(Frame(opens=[draft_open(BAD, PROMPT, **fields)]))
        answer = await lost(stream)
        assert (answer.reason, said in answer.detail) == (Reason.REASON_BAD_MESSAGE, True), answer


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_COMMITS)
async def test_bad_commits(name: str, system: System, draft_greedy: Greedy) -> None:
    fields, said = BAD_COMMITS[name]
    async with beside_a_healthy_one(system, draft_greedy) as stream:
        await stream.write(Frame(opens=[draft_open(BAD, PROMPT)]))
        await stream.write(Frame(commits=[draft_commit(BAD, [9], 5)]))
        proposal = await stream.answer(BAD)
        assert numbers(proposal.token_ids) == draft_greedy([*PROMPT, 9], 4)
        bad = draft_commit(BAD, **{"token_ids": [9], "committed_len": 6, **fields})
        await stream.write(Frame(commits=[bad]))
        answer = await lost(stream)
        assert (answer.reason, said in answer.detail) == (Reason.REASON_BAD_MESSAGE, True), answer


async def test_commits_of_unknown_generations_are_ignored(
    system: System, draft_greedy: Greedy
) -> None:
    """They may be in flight when the replica ends a generation."""
    async with beside_a_healthy_one(system, draft_greedy) as stream:
        for number in (0, 99, 2**32 - 1):
            await stream.write(Frame(commits=[draft_commit(number, [9], 5)]))
            await stream.write(Frame(closes=[draft_pb2.DraftClose(generation_id=number)]))
        await stream.write(Frame(opens=[draft_open(BAD, [])]))
        await lost(stream)
        assert not any(stream.num_unread(number) for number in (0, 99, 2**32 - 1))


@pytest.mark.parametrize("second", [{}, {"token_ids": b"\1"}])
async def test_open_twice(second: dict[str, Any], system: System, draft_greedy: Greedy) -> None:
    """Valid or not: a generation that was reported lost is not drafted for any more."""
    async with beside_a_healthy_one(system, draft_greedy) as stream:
        await stream.write(Frame(opens=[draft_open(BAD, PROMPT)]))
        again = draft_open(BAD, PROMPT, session_id="other", **second)
        await stream.write(Frame(opens=[again]))
        assert (await lost(stream)).reason == Reason.REASON_BAD_MESSAGE
        await stream.write(Frame(commits=[draft_commit(BAD, [9], 5)]))
        await asyncio.sleep(0.1)
        assert stream.num_unread(BAD) == 0


async def test_no_room(system: System, draft_greedy: Greedy) -> None:
    """A full context is a bad message; a full KV cache may have room later."""
    async with beside_a_healthy_one(system, draft_greedy) as stream:
        await stream.write(Frame(opens=[draft_open(BAD, PROMPT, max_len=5)]))
        refused = await lost(stream)
        assert refused.reason == Reason.REASON_BAD_MESSAGE
        assert "leave no room" in refused.detail
        opens = [draft_open(n, [n] * 2_000, max_len=2**32 - 1, lookahead=1) for n in range(5, 13)]
        await stream.write(Frame(opens=opens))
        assert (await lost(stream, 12)).reason == Reason.REASON_KV_FULL
        closes = [draft_pb2.DraftClose(generation_id=n) for n in range(5, 12)]
        await stream.write(Frame(closes=closes))


@pytest.mark.parametrize("epoch", [1, 4])
async def test_an_older_epoch_is_refused(epoch: int, system: System, draft_greedy: Greedy) -> None:
    async with beside_a_healthy_one(system, draft_greedy) as stream, proposing(system) as other:
        await stream.write(Frame(opens=[draft_open(5, PROMPT, session_id="s", epoch=5)]))
        holder = Following(stream, 5, PROMPT, draft_greedy)
        await holder.run(2)
        await other.write(Frame(opens=[draft_open(BAD, PROMPT, session_id="s", epoch=epoch)]))
        assert (await lost(other)).reason == Reason.REASON_DISPLACED
        await holder.run(2)
        await stream.write(Frame(closes=[draft_pb2.DraftClose(generation_id=5)]))


async def test_a_newer_epoch_displaces(system: System, draft_greedy: Greedy) -> None:
    """The older one fails with DISPLACED, and its KV is freed for the newer one."""
    async with beside_a_healthy_one(system, draft_greedy) as stream, proposing(system) as other:
        await stream.write(Frame(opens=[draft_open(BAD, PROMPT, session_id="s", epoch=5)]))
        await Following(stream, BAD, PROMPT, draft_greedy).run(2)
        await other.write(Frame(opens=[draft_open(5, PROMPT, session_id="s", epoch=6)]))
        answer = await lost(stream)
        assert (answer.reason, "epoch 6" in answer.detail) == (Reason.REASON_DISPLACED, True)
        await Following(other, 5, PROMPT, draft_greedy).run(2)
        await other.write(Frame(closes=[draft_pb2.DraftClose(generation_id=5)]))


async def test_proposals_shrink_to_the_room_that_is_left(
    system: System, draft_greedy: Greedy
) -> None:
    """The commit that fills max_len is accepted."""
    async with beside_a_healthy_one(system, draft_greedy) as stream:
        await stream.write(Frame(opens=[draft_open(BAD, PROMPT, max_len=8, lookahead=1)]))
        other = (draft_greedy(PROMPT, 1)[0] + 1) % 256
        await stream.write(Frame(commits=[draft_commit(BAD, [other], 5)]))
        while (proposal := await stream.answer(BAD)).assumed_token_ids:
            assert proposal.base_len == 5, "drafted ahead of another outcome"
        drafts = numbers(proposal.token_ids)
        assert drafts == draft_greedy([*PROMPT, other], 3)
        await stream.write(Frame(commits=[draft_commit(BAD, [*drafts[:2], 9], 8)]))
        await stream.write(Frame(commits=[draft_commit(BAD, [9], 9)]))
        answer = await lost(stream)
        assert "max_len" in answer.detail

"""The draft's stream without an orchestrator: proposals ahead of commits, supports, costs."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest

from outrider.model_server import step_costs as costs
from outrider.runtime.protobuf import FLOAT32, UINT16, unpack
from outrider.v1 import draft_pb2, sampling_pb2, target_pb2
from tests.services.parts import Greedy, System
from tests.services.streams import Following, draft_commit, draft_open, numbers, proposing
from tests.stack import eventually

PROMPT = [3, 1, 4, 1]
# Too short to be sent half drafted.
GAMMA = 2
Frame = draft_pb2.ProposeRequest


async def test_outcomes_are_proposed_before_the_commit(system: System) -> None:
    """Several outcomes of one round; the committed one is not sent again."""
    # So hot that several outcomes are likely; coupled, so that drafts are the same at each try.
    sampling = sampling_pb2.SamplingParams(temperature=10.0, seed=3, ignore_eos=True)
    fields: dict[str, Any] = {
        "sampling": sampling,
        "verification": sampling_pb2.VERIFICATION_COUPLED,
        "ahead_gamma": GAMMA,
    }
    async with proposing(system) as stream:
        opened = draft_open(1, PROMPT, lookahead=1, fan_out=3, **fields)
        await stream.write(Frame(opens=[opened]))
        ahead = [await stream.answer(1) for _ in range(2)]
        outcomes = [numbers(proposal.assumed_token_ids) for proposal in ahead]
        assert outcomes[0] != outcomes[1]
        for number, (proposal, outcome) in enumerate(zip(ahead, outcomes, strict=True), 2):
            assert (proposal.base_len, len(outcome)) == (len(PROMPT) + 1, 1)
            context = [*PROMPT, *outcome]
            anew = draft_open(number, context, prompt_len=len(PROMPT), gamma=GAMMA, **fields)
            await stream.write(Frame(opens=[anew]))
            assert (await stream.answer(number)).token_ids == proposal.token_ids
        assert stream.num_unread(1) <= 1, "three outcomes and no more"
        await stream.write(Frame(commits=[draft_commit(1, outcomes[1], len(PROMPT) + 1)]))
        while not (further := await stream.answer(1)).base_len > len(PROMPT) + 1:
            assert numbers(further.assumed_token_ids) not in outcomes, "sent again"
        assert len(numbers(further.assumed_token_ids)) >= 1, "drafted on from it"


async def test_supports_are_sent_with_sampled_tokens(system: System) -> None:
    """With rejection: each token with the distribution it was sampled from."""
    sampling = sampling_pb2.SamplingParams(temperature=1.0, seed=3, ignore_eos=True)
    async with proposing(system) as stream:
        for number, verification in ((1, 1), (2, 2), (3, 3)):
            fields: dict[str, Any] = {"sampling": sampling, "verification": verification}
            opened = draft_open(number, PROMPT, lookahead=1, ahead_gamma=GAMMA, **fields)
            await stream.write(Frame(opens=[opened]))
            proposal = await stream.answer(number)
            support_sizes = unpack(proposal.support_sizes, UINT16, "sizes").tolist()
            drafts = numbers(proposal.token_ids)
            if verification == sampling_pb2.VERIFICATION_COUPLED:
                assert (support_sizes, proposal.support_ids) == ([], b"")
                continue
            weights = unpack(proposal.support_probs, FLOAT32, "probs")
            assert len(support_sizes) == len(drafts) == GAMMA
            assert sum(support_sizes) == len(numbers(proposal.support_ids)) == len(weights)
            ends = np.cumsum(support_sizes)[:-1]
            parts = np.split(np.array(numbers(proposal.support_ids)), ends)
            assert all(token in part for token, part in zip(drafts, parts, strict=True))


async def test_costs_are_reported(system: System) -> None:
    """With the model, and on the stream after a change."""
    assert system.draft is not None
    asked = draft_pb2.DraftServiceGetModelInfoRequest()
    asked_of_target = target_pb2.TargetServiceGetModelInfoRequest()
    for reported in (
        (await system.draft.GetModelInfo(asked)).costs,
        (await system.target.GetModelInfo(asked_of_target)).costs,
    ):
        assert reported.num_tokens[0] == 1
        assert len(reported.num_tokens) == len(reported.step_s) >= 3
        assert all(0 < a <= b for a, b in itertools.pairwise(reported.step_s))


async def test_changed_costs_come_with_a_frame(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight sessions at once change the costs: passes have more rows than before."""
    monkeypatch.setattr(costs, "_REPORT_INTERVAL_S", 0.0)
    everyone = range(1, 9)
    async with proposing(system) as stream:
        await stream.write(Frame(opens=[draft_open(n, PROMPT) for n in everyone]))
        # In one frame, so that they are in the same passes.
        await stream.write(Frame(commits=[draft_commit(n, [9], 5) for n in everyone]))
        for number in everyone:
            assert isinstance(await stream.answer(number), draft_pb2.Proposal)
        assert stream.costs is not None
        assert stream.costs.mean_num_rows > 1.03


async def test_a_replica_without_work_is_idle(system: System, draft_greedy: Greedy) -> None:
    """After everything worthwhile is drafted, it sends nothing and runs no pass."""
    async with proposing(system) as stream:
        opened = draft_open(1, PROMPT, lookahead=2, fan_out=8)
        await stream.write(Frame(opens=[opened]))
        await Following(stream, 1, PROMPT, draft_greedy).run(3)

        async def is_quiet() -> bool:
            former = stream.num_unread(1), (await _used(system))
            await asyncio.sleep(0.2)
            return former == (stream.num_unread(1), await _used(system))

        await eventually(is_quiet)


async def _used(system: System) -> int:
    return int((await system.draft_load()).kv_used_tokens)

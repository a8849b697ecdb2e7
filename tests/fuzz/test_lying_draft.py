"""A draft replica that says anything at all: it costs speed, never an answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from outrider.runtime.protobuf import FLOAT32, pack
from outrider.v1 import draft_pb2, model_pb2
from tests import redis_fixture
from tests.fuzz.corpus import VOCAB_SIZE
from tests.fuzz.healthy import SimulatedTruth
from tests.fuzz.mutation import Mutator
from tests.services.fake_draft import FakeDraft, faking
from tests.services.parts import nothing_held
from tests.services.streams import ids, numbers, sizes
from tests.stack import eventually, running_stack

redis_server = redis_fixture.redis_server
redis_url = redis_fixture.redis_url

NUM_CALLS = 24
# At first, so that it is believed.
_NUM_HONEST = 100
MODEL = model_pb2.ModelInfo(
    name="liar",
    vocab_size=VOCAB_SIZE,
    max_gamma=8,
    max_context_len=4_096,
    kv_capacity_tokens=65_536,
)


class LyingDraft(FakeDraft):
    """Proposals that are often right, often spoilt, and now and then frames out of nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__(MODEL, lambda asked: [])
        self._chance = random.Random(seed)
        self._mutator = Mutator(self._chance)
        self._contexts: dict[int, list[int]] = {}
        self._sampled: dict[int, bool] = {}
        self._truth = SimulatedTruth(VOCAB_SIZE)
        self._num_answers = 0

    async def Propose(
        self, request_iterator: AsyncIterator[draft_pb2.ProposeRequest], context: Any
    ) -> None:
        async for frame in request_iterator:
            for opening in frame.opens:
                self.num_opens += 1
                is_sampled = opening.sampling.temperature > 0 and opening.verification != 2
                self._sampled[opening.generation_id] = is_sampled
            for asked in (*frame.opens, *frame.commits):
                await context.write(self._response(asked))

    def _response(
        self, asked: draft_pb2.DraftOpen | draft_pb2.DraftCommit
    ) -> draft_pb2.ProposeResponse:
        honest = draft_pb2.ProposeResponse(proposals=[self._proposal(asked)])
        self._num_answers += 1
        level = self._chance.random()
        if level < 0.6 or self._num_answers < _NUM_HONEST:
            return honest
        if level < 0.95:
            return self._mutator.mutate(honest)
        return self._mutator.generate(draft_pb2.ProposeResponse)

    def _proposal(self, asked: draft_pb2.DraftOpen | draft_pb2.DraftCommit) -> draft_pb2.Proposal:
        number = asked.generation_id
        told = numbers(asked.token_ids)
        if isinstance(asked, draft_pb2.DraftOpen):
            self._contexts[number] = told
        else:
            self._contexts.setdefault(number, []).extend(told)
        path, gamma = self._contexts[number], self._chance.randint(1, 8)
        drafts = self._truth(path, gamma)
        wrong = self._chance.randrange(2 * gamma)
        drafts = [(t + 1) % VOCAB_SIZE if i >= wrong else t for i, t in enumerate(drafts)]
        proposal = draft_pb2.Proposal(
            generation_id=number, base_len=len(path), token_ids=ids(drafts)
        )
        if self._sampled.get(number):
            proposal.support_sizes = sizes([1] * gamma)
            proposal.support_ids = ids(drafts)
            proposal.support_probs = pack([1.0] * gamma, FLOAT32)
        return proposal


@pytest.mark.parametrize("seed", range(4))
async def test_outputs_are_what_they_are_without_it(seed: int, redis_url: str) -> None:
    """Greedy, coupled, rejection and block alike: simulated targets emit one truth."""
    draft, truth = LyingDraft(seed), SimulatedTruth(VOCAB_SIZE)
    target = {"simulate": f"step_ms=1,vocab_size={VOCAB_SIZE},context_len=4096"}
    async with (
        faking(draft) as endpoint,
        running_stack(
            None,
            None,
            redis_url,
            target_settings=target,
            draft_endpoint=endpoint,
            draft_wait_ms=20.0,
        ) as stack,
    ):
        outputs = await asyncio.gather(
            *(
                stack.generate(
                    [number, 1, 2],
                    sampling={"temperature": number % 2, "max_tokens": 40, "ignore_eos": True},
                    verification=number % 4,
                    gamma=4,
                )
                for number in range(NUM_CALLS)
            )
        )
        await eventually(lambda: nothing_held(stack))
    for number, output in enumerate(outputs):
        assert output.token_ids == truth([number, 1, 2], 40)
    assert draft.num_opens > 0
    assert any(output.speculation.num_accepted_tokens for output in outputs)

"""The internal streams without an orchestrator: sends frames, sorts results by generation."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from outrider.runtime.protobuf import UINT16, UINT32, pack, unpack
from outrider.v1 import draft_pb2, model_pb2, sampling_pb2, target_pb2
from tests.services.parts import System

ANSWER_TIMEOUT_S = 60.0
# (context, number of tokens) -> the tokens that the model continues with.
Truth = Callable[[Sequence[int], int], list[int]]


def ids(values: Sequence[int]) -> bytes:
    return pack(values, UINT32)


def sizes(values: Sequence[int]) -> bytes:
    return pack(values, UINT16)


def numbers(data: bytes) -> list[int]:
    values: list[int] = unpack(data, UINT32, "ids").tolist()
    return values


def target_open(generation_id: int, **fields: Any) -> target_pb2.TargetOpen:
    """Greedy, room for 200 tokens, a session of its own."""
    given = {
        "session_id": f"session-{generation_id}",
        "epoch": 1,
        "prompt_len": 4,
        "max_len": 200,
        "sampling": sampling_pb2.SamplingParams(temperature=0, ignore_eos=True),
        **fields,
    }
    return target_pb2.TargetOpen(generation_id=generation_id, **given)


def row(
    generation_id: int,
    keep_len: int,
    context: Sequence[int],
    drafts: Sequence[int] = (),
    **raw: Any,
) -> target_pb2.VerifyRow:
    fields = {"context_token_ids": ids(context), "draft_token_ids": ids(drafts), **raw}
    return target_pb2.VerifyRow(generation_id=generation_id, keep_len=keep_len, **fields)


def draft_open(generation_id: int, context: Sequence[int], **fields: Any) -> draft_pb2.DraftOpen:
    """Greedy, four tokens a block, sequential, room for 200 tokens; drafts after a commit only."""
    given = {
        "session_id": f"session-{generation_id}",
        "epoch": 1,
        "token_ids": ids(context),
        "prompt_len": len(context),
        "max_len": 200,
        "sampling": sampling_pb2.SamplingParams(temperature=0, ignore_eos=True),
        "gamma": 0,
        "ahead_gamma": 4,
        "fan_out": 1,
        "vocab_size": 256,
        **fields,
    }
    return draft_pb2.DraftOpen(generation_id=generation_id, **given)


def draft_commit(
    generation_id: int, token_ids: Sequence[int] | bytes, committed_len: int, **fields: int
) -> draft_pb2.DraftCommit:
    """`committed_len` includes the tokens. Asks for four draft tokens, and four per block ahead."""
    return draft_pb2.DraftCommit(
        generation_id=generation_id,
        token_ids=token_ids if isinstance(token_ids, bytes) else ids(token_ids),
        committed_len=committed_len,
        **{"gamma": 4, "ahead_gamma": 4, **fields},
    )


class Stream:
    """A raw bidirectional call. `answer` returns the results of a generation in order.

    `costs`: those received last. `states`: all received states.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._writing = asyncio.Lock()
        self._news = asyncio.Condition()
        self._answers: dict[int, list[Any]] = {}
        self.costs: model_pb2.StepCosts | None = None
        self.states: list[int] = []

    async def write(self, frame: Any) -> None:
        async with self._writing:  # two writes at a time break the call
            await self._call.write(frame)

    async def listen(self) -> None:
        async for frame in self._call:
            others = ("costs", "state")
            fields = [values for field, values in frame.ListFields() if field.name not in others]
            async with self._news:
                self.costs = frame.costs if frame.HasField("costs") else self.costs
                if frame.state:
                    self.states.append(frame.state)
                for answer in (answer for values in fields for answer in values):
                    self._answers.setdefault(answer.generation_id, []).append(answer)
                self._news.notify_all()

    async def answer(self, generation_id: int) -> Any:
        """The generation's next result."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S), self._news:
            await self._news.wait_for(lambda: self._answers.get(generation_id))
            return self._answers[generation_id].pop(0)

    def num_unread(self, generation_id: int) -> int:
        return len(self._answers.get(generation_id, ()))


@contextlib.asynccontextmanager
async def raw(call: Any) -> AsyncIterator[Stream]:
    """Context of a raw stream; cancels the call at the end, unless the service has ended it."""
    stream = Stream(call)
    listening = asyncio.create_task(stream.listen())
    try:
        yield stream
    finally:
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await listening


@contextlib.asynccontextmanager
async def proposing(system: System) -> AsyncIterator[Stream]:
    """Context of a raw stream to the draft."""
    assert system.draft is not None
    async with raw(system.draft.Propose()) as stream:
        yield stream


class Decoding:
    """One greedy generation, with draft tokens that are right up to a random position."""

    def __init__(self, stream: Stream, generation_id: int, prompt: list[int], truth: list[int]):
        self._stream = stream
        self._id = generation_id
        self._chance = random.Random(generation_id)
        self._truth = prompt + truth
        self.prompt_len = len(prompt)
        self.committed = list(prompt)
        self._held = 0

    @property
    def output(self) -> list[int]:
        return self.committed[self.prompt_len :]

    async def step(self) -> None:
        gamma, num_right = self._chance.randrange(6), self._chance.randrange(7)
        start = len(self.committed)
        drafts = self._truth[start : start + gamma]
        drafts = [t if i < num_right else (t + 1) % 256 for i, t in enumerate(drafts)]
        context = self.committed[self._held :]
        await self._stream.write(
            target_pb2.VerifyRequest(rows=[row(self._id, self._held, context, drafts)])
        )
        answer = await self._stream.answer(self._id)
        assert isinstance(answer, target_pb2.VerifyResult), answer
        samples = numbers(answer.sample_ids)
        assert len(samples) == len(drafts) + 1
        num_accepted = 0
        while num_accepted < len(drafts) and drafts[num_accepted] == samples[num_accepted]:
            num_accepted += 1
        self._held = start + num_accepted
        self.committed += samples[: num_accepted + 1]

    async def run(self, num_tokens: int) -> None:
        while len(self.output) < num_tokens:
            await self.step()


class Following:
    """One generation, in rounds that accept all, some or none of a proposal."""

    def __init__(self, stream: Stream, generation_id: int, prompt: list[int], truth: Truth):
        self._stream = stream
        self._id = generation_id
        self._chance = random.Random(generation_id)
        self._truth = truth
        self.committed = list(prompt)
        self._proposals: list[draft_pb2.Proposal] = []

    async def step(self) -> None:
        """Runs a round; it continues with the rest of a proposal that is not used up."""
        drafts = self._rest()
        new = drafts[: self._chance.randrange(len(drafts) + 1)]
        likely = self._truth(self.committed + new, 1)[0]
        new.append(likely if self._chance.random() < 0.7 else (likely + 1) % 256)
        self.committed += new
        message = draft_commit(self._id, new, len(self.committed))
        await self._stream.write(draft_pb2.ProposeRequest(commits=[message]))
        while not (drafts := self._rest()):
            answer = await self._stream.answer(self._id)
            assert isinstance(answer, draft_pb2.Proposal), answer
            self._proposals.append(answer)
        assert drafts == self._truth(self.committed, len(drafts))

    def _rest(self) -> list[int]:
        """The longest rest of a proposal that continues the committed tokens."""
        return max((self._rest_of(proposal) for proposal in self._proposals), key=len, default=[])

    def _rest_of(self, proposal: draft_pb2.Proposal) -> list[int]:
        assumed = numbers(proposal.assumed_token_ids)
        start, drafts = proposal.base_len - len(assumed), numbers(proposal.token_ids)
        assert 1 <= len(drafts) <= 4
        known = self.committed[start:]
        same = [*assumed, *drafts][: len(known)] == known and len(known) >= len(assumed)
        return drafts[len(known) - len(assumed) :] if same else []

    async def run(self, num_rounds: int) -> None:
        for _ in range(num_rounds):
            await self.step()

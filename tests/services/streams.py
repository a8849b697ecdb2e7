"""The internal streams by hand: frames out, answers in, sorted by generation."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

from outrider.v1 import draft_pb2, sampling_pb2, target_pb2
from outrider.wire import UINT16, UINT32, pack, unpack

ANSWER_TIMEOUT_S = 10.0


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
    """Greedy, four tokens a proposal, sequential, room for 200 tokens."""
    given = {
        "session_id": f"session-{generation_id}",
        "epoch": 1,
        "token_ids": ids(context),
        "prompt_len": len(context),
        "max_len": 200,
        "sampling": sampling_pb2.SamplingParams(temperature=0, ignore_eos=True),
        "gamma": 4,
        "vocab_size": 256,
        **fields,
    }
    return draft_pb2.DraftOpen(generation_id=generation_id, **given)


class Stream:
    """A raw bidirectional call. `answer` hands out what came for a generation, in order."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._writing = asyncio.Lock()
        self._news = asyncio.Condition()
        self._answers: dict[int, list[Any]] = {}

    async def write(self, frame: Any) -> None:
        async with self._writing:  # two writes at a time break the call
            await self._call.write(frame)

    async def listen(self) -> None:
        async for frame in self._call:
            fields = [values for _, values in frame.ListFields()]
            async with self._news:
                for answer in (answer for values in fields for answer in values):
                    self._answers.setdefault(answer.generation_id, []).append(answer)
                self._news.notify_all()

    async def answer(self, generation_id: int) -> Any:
        """The next one for the generation."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S), self._news:
            await self._news.wait_for(lambda: self._answers.get(generation_id))
            return self._answers[generation_id].pop(0)

    def num_unread(self, generation_id: int) -> int:
        return len(self._answers.get(generation_id, ()))


@contextlib.asynccontextmanager
async def raw(call: Any) -> AsyncIterator[Stream]:
    """For the time of a block; then the call is cancelled."""
    stream = Stream(call)
    listening = asyncio.create_task(stream.listen())
    try:
        yield stream
    finally:
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening


class Decoding:
    """One greedy generation by hand: drafts that are right up to a random place."""

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

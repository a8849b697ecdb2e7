"""Honest sessions that run on a service while it is fuzzed, and must not notice it.

Each knows what it is to be told: another answer is an AssertionError, none a TimeoutError. Owns
their pace: slow enough to last, quick enough to be disturbed.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from outrider.engine.simulated import SimulatedEngine
from outrider.settings.simulation import Simulation
from outrider.v1 import draft_pb2, target_pb2
from tests.fuzz.findings import Findings
from tests.services.streams import Decoding, Following, Stream, draft_open, raw, target_open
from tests.stack import Output, request

_PAUSE_S = 0.004
_PROMPT = [3, 1, 4, 1]
_NUM_TOKENS = 80
_TARGET_MAX_LEN = 200
_DRAFT_MAX_LEN = 240
# A draft generation commits up to five tokens a round.
_NUM_ROUNDS = 40
# The model's next tokens after a context: as many as the second argument says.
Truth = Callable[[Sequence[int], int], list[int]]


class SimulatedTruth:
    """What simulated tiers emit, by the engine's own word."""

    def __init__(self, vocab_size: int) -> None:
        self._engine = SimulatedEngine(Simulation(vocab_size=vocab_size), 4_096)

    def __call__(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        path = list(token_ids)
        for _ in range(num_tokens):
            path.append(self._engine.truth(len(path), path[-1]))
        return path[len(token_ids) :]


class Session(Protocol):
    """Goes on until `stopped`; at least one output is whole then."""

    async def run(self, stopped: asyncio.Event) -> None: ...


class TargetSession:
    """One generation for the whole time: rolled back to its prompt, it decodes the same again."""

    def __init__(self, stub: Any, truth: Truth, findings: Findings) -> None:
        self._stub = stub
        self._truth = truth(_PROMPT, _NUM_TOKENS + 8)
        self._findings = findings

    async def run(self, stopped: asyncio.Event) -> None:
        async with raw(self._stub.Verify()) as stream:
            opening = target_open(1, session_id="healthy", max_len=_TARGET_MAX_LEN)
            await stream.write(target_pb2.VerifyRequest(opens=[opening]))
            while True:
                await self._decode(stream)
                if stopped.is_set():
                    break
            closing = target_pb2.TargetClose(generation_id=1)
            await stream.write(target_pb2.VerifyRequest(closes=[closing]))

    async def _decode(self, stream: Stream) -> None:
        decoding = Decoding(stream, 1, list(_PROMPT), self._truth)
        while len(decoding.output) < _NUM_TOKENS:
            await decoding.step()
            await asyncio.sleep(_PAUSE_S)
        assert decoding.output[:_NUM_TOKENS] == self._truth[:_NUM_TOKENS]
        self._findings.num_healthy_tokens += _NUM_TOKENS


class DraftSession:
    """One generation after the other; every proposal must be the draft's own continuation."""

    def __init__(self, stub: Any, truth: Truth, findings: Findings) -> None:
        self._stub = stub
        self._truth = truth
        self._findings = findings

    async def run(self, stopped: asyncio.Event) -> None:
        async with raw(self._stub.Propose()) as stream:
            for number in itertools.count(1):
                await self._follow(stream, number)
                closing = draft_pb2.DraftClose(generation_id=number)
                await stream.write(draft_pb2.ProposeRequest(closes=[closing]))
                if stopped.is_set():
                    return

    async def _follow(self, stream: Stream, number: int) -> None:
        opening = draft_open(
            number,
            _PROMPT,
            session_id="healthy",
            epoch=number,
            lookahead=1,
            fan_out=4,
            max_len=_DRAFT_MAX_LEN,
        )
        await stream.write(draft_pb2.ProposeRequest(opens=[opening]))
        following = Following(stream, number, list(_PROMPT), self._truth)
        for _ in range(_NUM_ROUNDS):
            await following.step()
            await asyncio.sleep(_PAUSE_S)
        self._findings.num_healthy_tokens += len(following.committed) - len(_PROMPT)


class CallerSession:
    """One greedy call after the other, with any gamma and verification."""

    def __init__(self, stub: Any, truth: Truth, findings: Findings) -> None:
        self._client = stub
        self._truth = truth
        self._findings = findings
        self._chance = random.Random(0)

    async def run(self, stopped: asyncio.Event) -> None:
        while True:
            await self._generate()
            if stopped.is_set():
                return
            await asyncio.sleep(_PAUSE_S)

    async def _generate(self) -> None:
        chance = self._chance
        prompt = [chance.randrange(200) for _ in range(chance.randint(1, 30))]
        num_tokens = chance.randint(1, 40)
        asked = request(
            prompt,
            {"temperature": 0, "ignore_eos": True, "max_tokens": num_tokens},
            verification=chance.randrange(4),
        )
        if (gamma := chance.choice((None, 0, 4))) is not None:
            asked.gamma = gamma
        output = Output()
        async for chunk in self._client.Generate(asked, timeout=120):
            output.add(chunk)
        assert output.token_ids == self._truth(prompt, num_tokens), asked
        assert output.result is not None, "the last chunk has the result"
        self._findings.num_healthy_tokens += num_tokens

"""Many calls at once, and what must hold of every output."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from outrider.v1 import orchestrator_pb2, sampling_pb2
from tests.stack import Output, Stack

REJECTION = sampling_pb2.VERIFICATION_REJECTION
COUPLED = sampling_pb2.VERIFICATION_COUPLED
BLOCK = sampling_pb2.VERIFICATION_BLOCK

ACCEPTED = orchestrator_pb2.TOKEN_ORIGIN_ACCEPTED
RECOVERED = orchestrator_pb2.TOKEN_ORIGIN_RECOVERED
BONUS = orchestrator_pb2.TOKEN_ORIGIN_BONUS
PLAIN = orchestrator_pb2.TOKEN_ORIGIN_PLAIN

STOP = orchestrator_pb2.FINISH_REASON_STOP
LENGTH = orchestrator_pb2.FINISH_REASON_LENGTH


async def generate_all(
    stack: Stack, calls: Iterable[dict[str, Any]], at_once: int = 64
) -> list[Output]:
    """The outputs in the order of the calls, each the keyword arguments of `Stack.generate`."""
    room = asyncio.Semaphore(at_once)

    async def one(call: dict[str, Any]) -> Output:
        async with room:
            return await stack.generate(**call)

    return await asyncio.gather(*(one(call) for call in calls))


def prompt_of(length: int, *, vocab_size: int = 256, seed: int = 0) -> list[int]:
    rng = np.random.default_rng((seed, length))
    tokens: list[int] = rng.integers(vocab_size - 1, size=length).tolist()
    return tokens


def num_drafted(outputs: Sequence[Output]) -> tuple[int, int]:
    """Draft tokens verified and accepted, of all outputs together."""
    stats = [output.speculation for output in outputs]
    return sum(s.num_draft_tokens for s in stats), sum(s.num_accepted_tokens for s in stats)


def assert_speculated(outputs: Sequence[Output]) -> None:
    """Drafts were used, and were rejected too: else nothing was tested."""
    drafted, accepted = num_drafted(outputs)
    assert 0 < accepted < drafted, f"{accepted} of {drafted} draft tokens accepted"

"""Plan of a load test: conversations, each one request or the turns of a session. Pure.

The same seed gives the same plan. Random prompts are a function of (seed, phase, index): phases
have prompts of the same lengths but not the same prompts, which would be in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from outrider_bench.loadtest.arrivals import arrival_times
from outrider_bench.loadtest.lengths import Lengths

# Block size of Mooncake's traces.
BLOCK_TOKENS = 512


@dataclass(frozen=True)
class Job:
    """One request. `text`: its prompt; None: `prompt_len` random token ids.

    `block_ids`: one id per BLOCK_TOKENS tokens; the same id means the same tokens, in any request.

    `not_before_s`: the trace's send time, from the start of the phase. The request is sent then, or
    when the previous turn has ended if that is later.
    """

    index: int
    prompt_len: int
    max_tokens: int
    text: str | None = None
    priority: int | None = None
    not_before_s: float = 0.0
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Turns of one session, in order, or one request without a session.

    `at_s`: intended send time of the first, from the start of the phase; None in a closed loop.
    """

    jobs: tuple[Job, ...]
    at_s: float | None = None
    is_session: bool = False


@dataclass(frozen=True)
class Workload:
    """Distribution of requests. `num_turns` above 1 creates sessions."""

    input_len: Lengths
    output_len: Lengths
    num_turns: Lengths
    texts: Sequence[str] = ()
    priority: int | None = None
    seed: int = 0

    def conversations(self, num_requests: int) -> list[Conversation]:
        """Conversations with `num_requests` requests in all; without times."""
        generator = np.random.default_rng((self.seed, 0))
        inputs = self.input_len.draw(num_requests, generator)
        outputs = self.output_len.draw(num_requests, generator)
        turns = self.num_turns.draw(num_requests, generator)
        conversations: list[Conversation] = []
        index = 0
        while index < num_requests:
            num = min(turns[len(conversations)], num_requests - index)
            jobs = tuple(self._job(i, inputs[i], outputs[i]) for i in range(index, index + num))
            conversations.append(Conversation(jobs, is_session=self.num_turns.most > 1))
            index += num
        return conversations

    def _job(self, index: int, input_len: int, output_len: int) -> Job:
        text = self.texts[index % len(self.texts)] if self.texts else None
        return Job(index, input_len, output_len, text, self.priority)


def timed(
    conversations: Sequence[Conversation], rate: float, burstiness: float, seed: int
) -> list[Conversation]:
    """Conversations with arrival times of an open loop of `rate` requests per second.

    First turns arrive at random times; later turns are sent when the previous one has ended. Times
    of a trace are dropped. Raises ConfigError.
    """
    num_requests = sum(len(conversation.jobs) for conversation in conversations)
    conversation_rate = rate * len(conversations) / max(1, num_requests)
    generator = np.random.default_rng((seed, 1))
    times = arrival_times(conversation_rate, len(conversations), generator, burstiness=burstiness)
    return [
        replace(conversation, at_s=float(at))
        for conversation, at in zip(without_times(conversations), times, strict=True)
    ]


def without_times(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Conversations without times, for a closed loop or other arrivals."""
    return [
        Conversation(
            tuple(replace(job, not_before_s=0.0) for job in conversation.jobs),
            None,
            conversation.is_session,
        )
        for conversation in conversations
    ]


def slices(conversations: Sequence[Conversation], num: int) -> list[list[Conversation]]:
    """Consecutive slices of nearly equal size. Times, if any, start at 0 in each."""
    bounds = [round(i * len(conversations) / num) for i in range(num + 1)]
    return [_from_zero(conversations[a:b]) for a, b in pairwise(bounds) if b > a]


def _from_zero(conversations: Sequence[Conversation]) -> list[Conversation]:
    first = conversations[0].at_s
    if first is None:
        return list(conversations)
    return [
        replace(
            conversation,
            at_s=conversation.at_s - first,
            jobs=tuple(
                replace(job, not_before_s=max(0.0, job.not_before_s - first))
                for job in conversation.jobs
            ),
        )
        for conversation in conversations
        if conversation.at_s is not None
    ]


def endless(conversations: Sequence[Conversation]) -> Iterator[Conversation]:
    """Repeats the conversations with new indices, for phases limited by time."""
    assert conversations, "there are no conversations"
    num_requests = sum(len(conversation.jobs) for conversation in conversations)
    offset = 0
    while True:
        for conversation in conversations:
            jobs = tuple(replace(job, index=job.index + offset) for job in conversation.jobs)
            yield replace(conversation, jobs=jobs)
        offset += num_requests


def prompt_ids(job: Job, ordinary_ids: npt.NDArray[np.int64], seed: int, phase: int) -> list[int]:
    """Token ids of the prompt, [prompt_len], sampled from `ordinary_ids`."""
    if job.block_ids:
        blocks = [
            _random_ids((seed, 3, phase, b), BLOCK_TOKENS, ordinary_ids) for b in job.block_ids
        ]
        return [token_id for block in blocks for token_id in block][: job.prompt_len]
    return _random_ids((seed, 2, phase, job.index), job.prompt_len, ordinary_ids)


def _random_ids(key: tuple[int, ...], num: int, ordinary_ids: npt.NDArray[np.int64]) -> list[int]:
    places = np.random.default_rng(key).integers(0, len(ordinary_ids), num)
    ids: list[int] = ordinary_ids[places].tolist()
    return ids

"""The load generator: requests run one after the other or many at once, each a sample.

Owns the order of runs and the clock; what samples mean is for `summary`. One event loop drives
thousands of streams.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from outrider.cli.plain import plain
from outrider.v1 import orchestrator_pb2
from outrider_bench.measuring.system import System
from outrider_bench.measuring.workload import Variant

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """One output. `tokens_per_s` is from the first message on; times in seconds, of this process.

    `stats` is the orchestrator's word; None for a peer, who says nothing.
    """

    variant: str
    prompt: int
    repetition: int
    token_ids: list[int]
    tokens_per_s: float
    first_s: float
    wall_s: float
    stats: orchestrator_pb2.SpeculationStats | None = None

    def to_dict(self) -> dict[str, Any]:
        """For the JSON document; outputs as a digest, to be compared."""
        digest = hashlib.sha256(",".join(map(str, self.token_ids)).encode()).hexdigest()[:16]
        told = None
        if self.stats is not None:
            told = plain(self.stats)
            del told["decision"]  # as long as all the rest; `bench explain-gamma` shows it
        return {
            "variant": self.variant,
            "prompt": self.prompt,
            "repetition": self.repetition,
            "num_tokens": len(self.token_ids),
            "output_digest": digest,
            "tokens_per_s": self.tokens_per_s,
            "first_s": self.first_s,
            "wall_s": self.wall_s,
            "speculation": told,
        }


@dataclass(frozen=True)
class Block:
    """Outputs of many streams at once. `tokens_per_s`: of all, while every stream was busy."""

    variant: str
    num_streams: int
    repetition: int
    tokens_per_s: float
    window_s: float
    samples: list[Sample]

    def to_dict(self) -> dict[str, Any]:
        told = dict(vars(self))
        return told | {"samples": [sample.to_dict() for sample in self.samples]}


def in_turn(items: Sequence[Item], repetitions: int) -> Iterator[tuple[int, Item]]:
    """All items in every repetition, backwards in every other: what drifts hurts all alike."""
    for repetition in range(repetitions):
        for item in items if repetition % 2 == 0 else reversed(items):
            yield repetition, item


@dataclass(frozen=True)
class Work:
    """One output to be had."""

    variant: Variant
    prompt: int
    prompt_ids: list[int]
    max_tokens: int
    repetition: int = 0
    seed: int = 0


def one_output(
    system: System, variant: Variant, prompt: int, max_tokens: int, repetition: int = 0
) -> Work:
    """Of one of the system's prompts, which is its sample's seed too."""
    ids = system.prompts.ids(prompt)
    return Work(variant, prompt, ids, max_tokens, repetition, seed=prompt)


class _Arrivals:
    """Tokens of all streams by time, and when each stream was busy first and idle first."""

    def __init__(self, num_streams: int) -> None:
        self._times: list[tuple[float, int]] = []
        self._num_to_begin = num_streams
        self._begin = self._end = 0.0

    def add(self, num_tokens: int, is_first_of_stream: bool) -> None:
        now = time.monotonic()
        self._times.append((now, num_tokens))
        if is_first_of_stream:
            self._num_to_begin -= 1
            if self._num_to_begin == 0:
                self._begin = now

    def end(self) -> None:
        self._end = self._end or time.monotonic()

    def rate(self) -> tuple[float, float]:
        """Tokens per second and the seconds that it is of.

        Where streams ended before the last had begun: of all the time there was.
        """
        begin, end = self._begin, self._end
        if not begin < end:
            begin, end = self._times[0][0], self._times[-1][0]
        num_tokens = sum(num for at, num in self._times if begin < at <= end)
        return num_tokens / max(end - begin, 1e-9), end - begin


async def run(system: System, work: Work) -> Sample:
    """One output alone. Raises CallFailed."""
    return await _run(system, work, None, is_first=True)


async def _run(system: System, work: Work, arrivals: _Arrivals | None, is_first: bool) -> Sample:
    request = work.variant.request(work.prompt_ids, work.max_tokens, work.seed)
    begin = time.monotonic()
    first_s: list[float] = []

    def show(chunk: orchestrator_pb2.GenerateResponse) -> None:
        is_first_chunk = not first_s
        if is_first_chunk:
            first_s.append(time.monotonic() - begin)
        if arrivals is not None:
            arrivals.add(len(chunk.token_ids), is_first and is_first_chunk)

    output = await system.client.generate(request, show=show)
    stats = output.result.speculation
    return Sample(
        variant=work.variant.name,
        prompt=work.prompt,
        repetition=work.repetition,
        token_ids=output.token_ids,
        tokens_per_s=stats.tokens_per_s,
        first_s=first_s[0],
        wall_s=time.monotonic() - begin,
        stats=stats,
    )


async def run_block(system: System, works: Sequence[Work], num_streams: int) -> Block:
    """A closed loop: every stream takes the next output when it has finished one.

    Raises CallFailed.
    """
    assert works, "nothing to run"
    num_streams = min(num_streams, len(works))
    waiting = iter(works)
    arrivals = _Arrivals(num_streams)
    samples: list[Sample] = []

    async def stream() -> None:
        is_first = True
        for work in waiting:  # one iterator for all: nobody waits for the slowest stream's share
            samples.append(await _run(system, work, arrivals, is_first))
            is_first = False
        arrivals.end()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_streams):
            tasks.create_task(stream())
    rate, window_s = arrivals.rate()
    first = works[0]
    return Block(first.variant.name, num_streams, first.repetition, rate, window_s, samples)

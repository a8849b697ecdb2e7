"""Load generator: runs requests one after another or concurrently and returns a sample of each.

Owns the order of runs and the time measurement; `summary` computes statistics. One event loop
drives thousands of streams.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from outrider.client import SpeculationStats
from outrider_bench.measuring.system import System
from outrider_bench.measuring.workload import Variant

Item = TypeVar("Item")


@dataclass(frozen=True)
class Sample:
    """Measurement of one output. Times are in seconds, measured in this process.

    `tokens_per_s` counts from the first message on. `stats` is reported by the orchestrator; None
    for a peer.
    """

    variant: str
    prompt: int
    repetition: int
    token_ids: list[int]
    tokens_per_s: float
    first_s: float
    wall_s: float
    stats: SpeculationStats | None = None

    def to_dict(self) -> dict[str, Any]:
        """Entry of the JSON document. The output is a digest: enough to compare outputs."""
        digest = hashlib.sha256(",".join(map(str, self.token_ids)).encode()).hexdigest()[:16]
        speculation = None
        if self.stats is not None:
            speculation = asdict(self.stats)
            del speculation["decision"]  # long; `bench explain-gamma` shows it
        return {
            "variant": self.variant,
            "prompt": self.prompt,
            "repetition": self.repetition,
            "num_tokens": len(self.token_ids),
            "output_digest": digest,
            "tokens_per_s": self.tokens_per_s,
            "first_s": self.first_s,
            "wall_s": self.wall_s,
            "speculation": speculation,
        }


@dataclass(frozen=True)
class Block:
    """Outputs of concurrent streams.

    `tokens_per_s` is the total over all streams, in the window in which every stream was busy.
    """

    variant: str
    num_streams: int
    repetition: int
    tokens_per_s: float
    window_s: float
    samples: list[Sample]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self)) | {"samples": [sample.to_dict() for sample in self.samples]}


def interleaved(items: Sequence[Item], repetitions: int) -> Iterator[tuple[int, Item]]:
    """(repetition, item) for all items in every repetition, in reverse order in every second one.

    Reversing makes a slow drift of the machine affect all items equally.
    """
    for repetition in range(repetitions):
        for item in items if repetition % 2 == 0 else reversed(items):
            yield repetition, item


@dataclass(frozen=True)
class Work:
    """One output to generate."""

    variant: Variant
    prompt: int
    prompt_ids: list[int]
    max_tokens: int
    repetition: int = 0
    seed: int = 0


def one_output(
    system: System, variant: Variant, prompt: int, max_tokens: int, repetition: int = 0
) -> Work:
    """Work for the system's prompt number `prompt`, which is also the sampling seed."""
    ids = system.prompts.ids(prompt)
    return Work(variant, prompt, ids, max_tokens, repetition, seed=prompt)


class _Arrivals:
    """Token arrivals of all streams, and the window in which every stream was busy.

    The window begins when the last stream has its first tokens and ends when the first stream ends.
    """

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
        """Tokens per second in the window, and the window in seconds.

        If a stream ended before the last one began: from the first to the last message.
        """
        begin, end = self._begin, self._end
        if not begin < end:
            begin, end = self._times[0][0], self._times[-1][0]
        num_tokens = sum(num for at, num in self._times if begin < at <= end)
        return num_tokens / max(end - begin, 1e-9), end - begin


async def run(system: System, work: Work) -> Sample:
    """Generates one output alone. Raises CallFailed."""
    return await _run(system, work, None, is_first=True)


async def _run(system: System, work: Work, arrivals: _Arrivals | None, is_first: bool) -> Sample:
    request = work.variant.request(work.prompt_ids, work.max_tokens, work.seed)
    begin = time.monotonic()
    first_s: float | None = None
    stream = system.client.stream(request)
    async for chunk in stream:
        if arrivals is not None:
            arrivals.add(len(chunk.token_ids), is_first and first_s is None)
        if first_s is None:
            first_s = time.monotonic() - begin
    output = await stream.result()
    assert first_s is not None, "an output has at least one token"
    stats = output.speculation
    return Sample(
        variant=work.variant.name,
        prompt=work.prompt,
        repetition=work.repetition,
        token_ids=output.token_ids,
        tokens_per_s=stats.tokens_per_s or 0.0,
        first_s=first_s,
        wall_s=time.monotonic() - begin,
        stats=stats,
    )


async def run_block(system: System, works: Sequence[Work], num_streams: int) -> Block:
    """Runs a closed loop: every stream starts the next output when it has finished one.

    Raises CallFailed.
    """
    assert works, "nothing to run"
    num_streams = min(num_streams, len(works))
    waiting = iter(works)
    arrivals = _Arrivals(num_streams)
    samples: list[Sample] = []

    async def stream() -> None:
        is_first = True
        for work in waiting:  # shared by all streams, so that none idles while work is left
            samples.append(await _run(system, work, arrivals, is_first))
            is_first = False
        arrivals.end()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_streams):
            tasks.create_task(stream())
    rate, window_s = arrivals.rate()
    first = works[0]
    return Block(first.variant.name, num_streams, first.repetition, rate, window_s, samples)

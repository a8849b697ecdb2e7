"""What is asked for, and when: visits of callers, one request or the turns of a conversation.

Pure: the same seed gives the same plan. Prompts of random token ids are a function of (seed, phase,
index): two phases have prompts of the same lengths but not the same prompts, or the second would
find the first one's in the prefix cache. Sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from outrider_bench.loadtest.arrivals import arrival_times
from outrider_bench.loadtest.lengths import Lengths

# As in the traces of Mooncake.
BLOCK_TOKENS = 512


@dataclass(frozen=True)
class Job:
    """One request. `text`: its prompt; None: `prompt_len` random token ids.

    `block_ids`: of each BLOCK_TOKENS of these; the same id is the same tokens, in any request.

    `not_before_s`: when a trace has it, from the begin of the phase; sent then, or when the turn
    before it has ended, if that is later.
    """

    index: int
    prompt_len: int
    max_tokens: int
    text: str | None = None
    priority: int | None = None
    not_before_s: float = 0.0
    block_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Visit:
    """The turns of one session, in order; or one request without a session.

    `at_s`: when the first is meant to be sent, from the begin of the phase; None in a closed loop.
    """

    jobs: tuple[Job, ...]
    at_s: float | None = None
    is_session: bool = False


@dataclass(frozen=True)
class Workload:
    """What requests look like, whenever they come. `num_turns` above 1 makes sessions."""

    input_len: Lengths
    output_len: Lengths
    num_turns: Lengths
    texts: Sequence[str] = ()
    priority: int | None = None
    seed: int = 0

    def visits(self, num_requests: int) -> list[Visit]:
        """As many as have so many requests in all; without times."""
        generator = np.random.default_rng((self.seed, 0))
        inputs = self.input_len.draw(num_requests, generator)
        outputs = self.output_len.draw(num_requests, generator)
        turns = self.num_turns.draw(num_requests, generator)
        visits: list[Visit] = []
        index = 0
        while index < num_requests:
            num = min(turns[len(visits)], num_requests - index)
            jobs = tuple(self._job(i, inputs[i], outputs[i]) for i in range(index, index + num))
            visits.append(Visit(jobs, is_session=self.num_turns.most > 1))
            index += num
        return visits

    def _job(self, index: int, input_len: int, output_len: int) -> Job:
        text = self.texts[index % len(self.texts)] if self.texts else None
        return Job(index, input_len, output_len, text, self.priority)


def timed(visits: Sequence[Visit], rate: float, burstiness: float, seed: int) -> list[Visit]:
    """Open loop: `rate` requests per second, so the fewer visits the more turns they have.

    Only first turns come at random; later ones when the one before has ended, whatever a trace
    said of their times. Raises ConfigError.
    """
    num_requests = sum(len(visit.jobs) for visit in visits)
    visit_rate = rate * len(visits) / max(1, num_requests)
    generator = np.random.default_rng((seed, 1))
    times = arrival_times(visit_rate, len(visits), generator, burstiness=burstiness)
    return [
        replace(visit, at_s=float(at))
        for visit, at in zip(without_times(visits), times, strict=True)
    ]


def without_times(visits: Sequence[Visit]) -> list[Visit]:
    """For a closed loop, and for arrivals of another kind."""
    return [
        Visit(tuple(replace(job, not_before_s=0.0) for job in visit.jobs), None, visit.is_session)
        for visit in visits
    ]


def slices(visits: Sequence[Visit], num: int) -> list[list[Visit]]:
    """One after the other, as equal as can be; times, where there are any, begin anew in each."""
    bounds = [round(i * len(visits) / num) for i in range(num + 1)]
    return [_begun_anew(visits[a:b]) for a, b in pairwise(bounds) if b > a]


def _begun_anew(visits: Sequence[Visit]) -> list[Visit]:
    first = visits[0].at_s
    if first is None:
        return list(visits)
    return [
        replace(
            visit,
            at_s=visit.at_s - first,
            jobs=tuple(
                replace(job, not_before_s=max(0.0, job.not_before_s - first)) for job in visit.jobs
            ),
        )
        for visit in visits
        if visit.at_s is not None
    ]


def endless(visits: Sequence[Visit]) -> Iterator[Visit]:
    """The same again and again, under new indices: for phases that last so many seconds."""
    assert visits, "nothing to ask for"
    num_requests = sum(len(visit.jobs) for visit in visits)
    offset = 0
    while True:
        for visit in visits:
            jobs = tuple(replace(job, index=job.index + offset) for job in visit.jobs)
            yield replace(visit, jobs=jobs)
        offset += num_requests


def prompt_ids(job: Job, ordinary_ids: npt.NDArray[np.int64], seed: int, phase: int) -> list[int]:
    """[prompt_len], of `ordinary_ids`: without those that end, pad or mark something."""
    if job.block_ids:
        blocks = [_drawn((seed, 3, phase, b), BLOCK_TOKENS, ordinary_ids) for b in job.block_ids]
        return [token_id for block in blocks for token_id in block][: job.prompt_len]
    return _drawn((seed, 2, phase, job.index), job.prompt_len, ordinary_ids)


def _drawn(key: tuple[int, ...], num: int, ordinary_ids: npt.NDArray[np.int64]) -> list[int]:
    places = np.random.default_rng(key).integers(0, len(ordinary_ids), num)
    drawn: list[int] = ordinary_ids[places].tolist()
    return drawn

"""Batching of sample and score requests by what their rows need, across generations.

Owns the mapping from many requests to few tensors and back: which rows, after which logits
processors, at which positions, and which request an error belongs to. What is computed for a group
is in `sampler.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from outrider.engine.interface import Ids, SampleRequest, ScoreRequest
from outrider.engine.sampling.logits_processors import GenerationSampler, PositionSpan, adjust
from outrider.errors import NonFiniteLogits
from outrider.sampling.params import SamplingParams
from outrider.sampling.random import Purpose, stream_key, stream_keys

Request = TypeVar("Request", SampleRequest, ScoreRequest)
Result = TypeVar("Result")
Kind = TypeVar("Kind", bound=Hashable)


class RequestGroup(NamedTuple):
    """Requests computed together: their `indices` in the list and their `rows` of logits.

    The k-th request's rows within the group are [starts[k], starts[k + 1]), for positions[k]
    onward.
    """

    samplers: Sequence[GenerationSampler]
    indices: Sequence[int]
    rows: Ids
    starts: Ids
    positions: Ids

    @property
    def sizes(self) -> Ids:
        """Rows per request, int64."""
        return np.diff(self.starts)

    @property
    def params(self) -> list[SamplingParams]:
        """Sampling parameters of each row."""
        sizes = self.sizes.tolist()
        return [s.params for s, n in zip(self.samplers, sizes, strict=True) for _ in range(n)]

    def keys(self) -> Ids:
        """Keys of the target's noise, int64, one per row."""
        if len(self.rows) == 1:  # one draft token of one session: six times faster
            seed, position = self.samplers[0].params.seed, int(self.positions[0])
            return np.array([stream_key(seed, Purpose.TARGET, position)])
        sizes = self.sizes
        seeds = np.array([s.params.seed for s in self.samplers], np.uint64)
        steps = np.arange(len(self.rows)) - np.repeat(self.starts[:-1], sizes)
        positions = np.repeat(self.positions, sizes) + steps
        return stream_keys(np.repeat(seeds, sizes), Purpose.TARGET, positions)

    def raw(self, logits: torch.Tensor) -> torch.Tensor:
        """The group's rows of `logits`, cut to its vocabulary; a view if they are consecutive.

        Forbidden tokens get -inf, in `logits` itself.
        """
        first, last = int(self.rows[0]), int(self.rows[-1])
        if last - first + 1 == len(self.rows):
            logits = logits[first : last + 1]
        else:
            logits = logits.index_select(0, torch.from_numpy(self.rows).to(logits.device))
        logits = logits[:, : self.samplers[0].vocab_size]
        if (forbidden := self.samplers[0].forbidden_ids) is not None:
            logits.index_fill_(1, torch.from_numpy(forbidden).to(logits.device), -torch.inf)
        return logits

    def adjusted(
        self,
        raw: torch.Tensor,
        histories: Sequence[Callable[[], Ids]],
        forbidden: Sequence[Ids | None],
    ) -> torch.Tensor:
        """`raw` after the logits processors; `raw` itself without any.

        Per request: `histories` and the masks of `forbidden` tokens.
        """
        starts, positions = self.starts.tolist(), self.positions.tolist()
        spans = [
            PositionSpan(
                sampler, starts[k], starts[k + 1], positions[k], histories[k](), forbidden[k]
            )
            for k, sampler in enumerate(self.samplers)
            if sampler.adjusts
        ]
        if not spans:
            return raw
        logits = raw.clone(memory_format=torch.contiguous_format)
        adjust(logits, spans)
        return logits


# Texts of allocation failures that are not torch.OutOfMemoryError: torch's allocator on CPU.
_ALLOCATION_FAILURES = ("DefaultCPUAllocator: can't allocate memory", "not enough memory")


def grouped(
    requests: Sequence[Request], sizes: Sequence[int], kind: Callable[[Request], Kind]
) -> Mapping[Kind, Sequence[RequestGroup]]:
    """Groups by kind and vocabulary, in request order. `sizes`: rows per request."""
    members: dict[tuple[Kind, tuple[int, int]], list[int]] = {}
    for index, request in enumerate(requests):
        sampler = sampler_of(request)
        vocabulary = (sampler.vocab_size, id(sampler.forbidden_ids))
        members.setdefault((kind(request), vocabulary), []).append(index)
    stops = list(itertools.accumulate(sizes))
    groups: dict[Kind, list[RequestGroup]] = {}
    for (name, _), member_indices in members.items():
        indices: list[int] = member_indices
        rows: list[int] = []
        for i in indices:
            rows.extend(range(stops[i] - sizes[i], stops[i]))
        starts = [0, *itertools.accumulate(sizes[i] for i in indices)]
        groups.setdefault(name, []).append(
            RequestGroup(
                [sampler_of(requests[i]) for i in indices],
                indices,
                np.array(rows, np.int64),
                np.array(starts, np.int64),
                np.array([requests[i].position for i in indices], np.int64),
            )
        )
    return groups


def is_allocation_failure(error: Exception) -> bool:
    """Whether an allocator of torch or Python had no memory."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _ALLOCATION_FAILURES)
    )


def isolated(
    compute: Callable[[Sequence[Request], torch.Tensor], list[Result | Exception]],
    requests: Sequence[Request],
    logits: torch.Tensor,
    sizes: Sequence[int],
) -> list[Result | Exception]:
    """Results of all requests computed together; if that fails, of each alone.

    So an error belongs to one request and the others are not affected. A request with NaN or
    infinite logits gets NonFiniteLogits; the others are computed without it. Raises if memory runs
    out, which is the fault of all.
    """
    # NaN and +inf show in the maximum of a row. -inf is allowed: models use it to forbid tokens.
    peaks = logits.amax(-1)
    if not bool(torch.isfinite(peaks).all()):
        return _without_bad_rows(compute, requests, logits, sizes, torch.isfinite(peaks))
    try:
        return compute(requests, logits)
    except Exception as error:
        if is_allocation_failure(error):
            raise
        if len(requests) == 1:
            return [error]
    parts = zip(requests, torch.split(logits, list(sizes)), sizes, strict=True)
    return [isolated(compute, [request], rows, [size])[0] for request, rows, size in parts]


def _without_bad_rows(
    compute: Callable[[Sequence[Request], torch.Tensor], list[Result | Exception]],
    requests: Sequence[Request],
    logits: torch.Tensor,
    sizes: Sequence[int],
    is_finite: torch.Tensor,
) -> list[Result | Exception]:
    """`isolated` for the requests with finite logits; NonFiniteLogits for the others."""
    is_good = [bool(rows.all()) for rows in torch.split(is_finite, list(sizes))]
    good = [index for index, fine in enumerate(is_good) if fine]
    parts = torch.split(logits, list(sizes))
    results: list[Result | Exception] = [NonFiniteLogits() for _ in requests]
    if good:
        rows = torch.cat([parts[index] for index in good])
        some = isolated(compute, [requests[i] for i in good], rows, [sizes[i] for i in good])
        for index, result in zip(good, some, strict=True):
            results[index] = result
    return results


def sampler_of(request: SampleRequest | ScoreRequest) -> GenerationSampler:
    """The request's sampler, as this engine made it."""
    assert isinstance(request.sampler, GenerationSampler), "made by this engine"
    return request.sampler

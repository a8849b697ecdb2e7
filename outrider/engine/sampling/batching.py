"""Asks of a step taken together by what their rows need, whichever generation they are of.

Owns the way from many asks to few tensors and back: which rows, after which processors, at which
positions, and whose failure is whose. Knows nothing of distributions or answers.
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

Ask = TypeVar("Ask", SampleRequest, ScoreRequest)
Answer = TypeVar("Answer")
Kind = TypeVar("Kind", bound=Hashable)


class RequestGroup(NamedTuple):
    """Some asks, and where they stand: `places` among all asks, `rows` among all rows.

    The k-th one's rows within the group are [starts[k], starts[k + 1]), for positions[k] and on.
    """

    samplers: Sequence[GenerationSampler]
    places: Sequence[int]
    rows: Ids
    starts: Ids
    positions: Ids

    @property
    def sizes(self) -> Ids:
        """Rows of each ask, int64."""
        return np.diff(self.starts)

    @property
    def params(self) -> list[SamplingParams]:
        """For each row."""
        sizes = self.sizes.tolist()
        return [s.params for s, n in zip(self.samplers, sizes, strict=True) for _ in range(n)]

    def keys(self) -> Ids:
        """Of the target's noise, int64 for each row."""
        if len(self.rows) == 1:  # one session's draft: six times faster
            seed, position = self.samplers[0].params.seed, int(self.positions[0])
            return np.array([stream_key(seed, Purpose.TARGET, position)])
        sizes = self.sizes
        seeds = np.array([s.params.seed for s in self.samplers], np.uint64)
        steps = np.arange(len(self.rows)) - np.repeat(self.starts[:-1], sizes)
        positions = np.repeat(self.positions, sizes) + steps
        return stream_keys(np.repeat(seeds, sizes), Purpose.TARGET, positions)

    def raw(self, logits: torch.Tensor) -> torch.Tensor:
        """Its rows of all, cut to its vocabulary; a view where they stand side by side."""
        first, last = int(self.rows[0]), int(self.rows[-1])
        if last - first + 1 == len(self.rows):
            logits = logits[first : last + 1]
        else:
            logits = logits.index_select(0, torch.from_numpy(self.rows).to(logits.device))
        return logits[:, : self.samplers[0].vocab_size]

    def adjusted(self, raw: torch.Tensor, histories: Sequence[Callable[[], Ids]]) -> torch.Tensor:
        """After the processors; `raw` itself where there are none. `histories` of the asks."""
        starts, positions = self.starts.tolist(), self.positions.tolist()
        spans = [
            PositionSpan(sampler, starts[k], starts[k + 1], positions[k], histories[k]())
            for k, sampler in enumerate(self.samplers)
            if sampler.adjusts
        ]
        if not spans:
            return raw
        logits = raw.clone(memory_format=torch.contiguous_format)
        adjust(logits, spans)
        return logits


def grouped(
    asks: Sequence[Ask], sizes: Sequence[int], kind: Callable[[Ask], Kind]
) -> Mapping[Kind, Sequence[RequestGroup]]:
    """By kind, and within it by vocabulary; each in the order of the asks, of `sizes` rows."""
    members: dict[tuple[Kind, int], list[int]] = {}
    for place, ask in enumerate(asks):
        members.setdefault((kind(ask), sampler_of(ask).vocab_size), []).append(place)
    stops = list(itertools.accumulate(sizes))
    groups: dict[Kind, list[RequestGroup]] = {}
    for (name, _), standing in members.items():
        places: list[int] = standing
        rows: list[int] = []
        for p in places:
            rows.extend(range(stops[p] - sizes[p], stops[p]))
        starts = [0, *itertools.accumulate(sizes[p] for p in places)]
        groups.setdefault(name, []).append(
            RequestGroup(
                [sampler_of(asks[p]) for p in places],
                places,
                np.array(rows, np.int64),
                np.array(starts, np.int64),
                np.array([asks[p].position for p in places], np.int64),
            )
        )
    return groups


def isolated(
    answer: Callable[[Sequence[Ask], torch.Tensor], list[Answer | Exception]],
    asks: Sequence[Ask],
    logits: torch.Tensor,
    sizes: Sequence[int],
) -> list[Answer | Exception]:
    """All together; if that fails, each alone, so that a failure is its own ask's.

    An ask with NaN or infinite logits gets NonFiniteLogits; the others are answered without it.
    """
    # NaN and infinity show in a row's largest logit; minus infinity is how models forbid tokens.
    peaks = logits.amax(-1)
    if not bool(torch.isfinite(peaks).all()):
        return _without_bad_rows(answer, asks, logits, sizes, torch.isfinite(peaks))
    try:
        return answer(asks, logits)
    except Exception as error:
        if len(asks) == 1:
            return [error]
    parts = zip(asks, torch.split(logits, list(sizes)), sizes, strict=True)
    return [isolated(answer, [ask], rows, [size])[0] for ask, rows, size in parts]


def _without_bad_rows(
    answer: Callable[[Sequence[Ask], torch.Tensor], list[Answer | Exception]],
    asks: Sequence[Ask],
    logits: torch.Tensor,
    sizes: Sequence[int],
    is_finite: torch.Tensor,
) -> list[Answer | Exception]:
    is_good = [bool(rows.all()) for rows in torch.split(is_finite, list(sizes))]
    good = [place for place, fine in enumerate(is_good) if fine]
    parts = torch.split(logits, list(sizes))
    answers: list[Answer | Exception] = [NonFiniteLogits() for _ in asks]
    if good:
        rows = torch.cat([parts[place] for place in good])
        some = isolated(answer, [asks[p] for p in good], rows, [sizes[p] for p in good])
        for place, each in zip(good, some, strict=True):
            answers[place] = each
    return answers


def sampler_of(ask: SampleRequest | ScoreRequest) -> GenerationSampler:
    assert isinstance(ask.sampler, GenerationSampler), "made by this engine"
    return ask.sampler

"""From a step's logits to tokens, all generations together, on the engine's device.

The draft's half draws one token of each row and the support it was drawn from (`sample_all`), the
target's half answers blocks by support (`score_all`). Rows that need the same are taken together:
an argmax costs an argmax, however others are sampled, and no row is influenced by those beside it.
Knows nothing of KV, sessions or the wire. Called on the device thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from outrider.engine.interface import (
    NUM_CANDIDATES,
    BlockScores,
    Floats,
    Ids,
    Logprobs,
    SampledToken,
    SampleRequest,
    ScoreRequest,
)
from outrider.engine.sampling.batching import RequestGroup, grouped, isolated, sampler_of
from outrider.engine.sampling.distributions import Distributions, with_noise
from outrider.engine.sampling.gumbel_max import Excluded, best, first_max
from outrider.engine.sampling.logits_processors import GenerationSampler
from outrider.errors import InvalidRequest
from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.random import Purpose, stream_key, uniform
from outrider.sampling.support import MAX_SUPPORT_SIZE, Support, truncate

__all__ = ["GenerationSampler", "sample_all", "score_all"]

# Tokens among which a row's race is decided. Bounds are close to scores where it matters: that
# these were too few, which costs time and nothing else, happened in none of 16,000 rows tried.
_SAMPLE_WIDTH = 8
_CANDIDATES_WIDTH = 4 * NUM_CANDIDATES
# Likeliest tokens among which a rejection's recovered token is foreseen. With three candidates a
# race of all would find it in 0 to 0.1 more of rejections, twice that where the law is all but
# flat, and a draw of 32,768 tokens would take 0.7 instead of 0.25 ms of a core.
_FORESEEN_AMONG = 128

# What float32 holds; a temperature of next to nothing gives less.
_LEAST_SCORE = float(np.finfo(np.float32).min)

_RAW = SamplingParams()
_NOTHING: Floats = np.zeros(0, np.float32)


class _Need(Enum):
    ARGMAX = 1
    ADJUSTED_ARGMAX = 2
    SUPPORT = 3
    SAMPLE = 4


@torch.inference_mode()
def sample_all(
    asks: Sequence[SampleRequest], logits: torch.Tensor
) -> list[SampledToken | Exception]:
    """As `ServedEngine.draw`; the asks' samplers are `GenerationSampler`s."""
    return isolated(_draw, asks, logits, [1] * len(asks))


@torch.inference_mode()
def score_all(asks: Sequence[ScoreRequest], logits: torch.Tensor) -> list[BlockScores | Exception]:
    """As `ServedEngine.reply`; the asks' samplers are `GenerationSampler`s."""
    return isolated(_reply, asks, logits, [ask.num_rows for ask in asks])


def _need(sampler: GenerationSampler) -> _Need:
    if not sampler.params.greedy:
        return _Need.SAMPLE
    return _Need.ADJUSTED_ARGMAX if sampler.adjusts else _Need.ARGMAX


# Draws.


def _draw_need(ask: SampleRequest) -> _Need:
    need = _need(sampler_of(ask))
    if need is _Need.SAMPLE and not (ask.is_guess or ask.verification is Verification.COUPLED):
        return _Need.SUPPORT
    return need


def _draw(asks: Sequence[SampleRequest], logits: torch.Tensor) -> list[SampledToken | Exception]:
    placed: dict[int, SampledToken | Exception] = {}
    for need, groups in grouped(asks, [1] * len(asks), _draw_need).items():
        for group in groups:
            some = [asks[place] for place in group.places]
            rows = group.adjusted(group.raw(logits), [ask.history for ask in some])
            if need is _Need.SUPPORT:
                sampled = _draw_from_supports(some, group, Distributions(rows, group.params))
            elif need is _Need.SAMPLE:
                sampled = _draw_as_target(group, Distributions(rows, group.params))
            else:
                sampled = _draw_greatest(rows)
            placed.update(zip(group.places, sampled, strict=True))
    return [placed[place] for place in range(len(asks))]


def _draw_greatest(rows: torch.Tensor) -> list[SampledToken | Exception]:
    token_ids = first_max(rows)
    values, ids = (part.cpu().numpy() for part in best(rows, NUM_CANDIDATES))
    # At ties the argmax may stand elsewhere among the best, or not at all: it goes first.
    for row in np.flatnonzero(ids[:, 0] != token_ids):
        where = np.flatnonzero(ids[row] == token_ids[row])
        ids[row, where[0] if len(where) else -1] = ids[row, 0]
        ids[row, 0] = token_ids[row]
    return [
        _sampled(token_id, None, ids[row], values[row])
        for row, token_id in enumerate(token_ids.tolist())
    ]


def _draw_as_target(group: RequestGroup, laws: Distributions) -> list[SampledToken | Exception]:
    """With the target's noise: what it would emit itself if it were the draft."""
    ranking = laws.race(group.keys(), NUM_CANDIDATES, _CANDIDATES_WIDTH)
    return [
        _sampled(int(ids[0]), None, ids, scores) if scores[0] > -np.inf else _nothing_allowed()
        for ids, scores in zip(*ranking, strict=True)
    ]


def _draw_from_supports(
    asks: Sequence[SampleRequest], group: RequestGroup, laws: Distributions
) -> list[SampledToken | Exception]:
    likeliest = laws.likeliest(_FORESEEN_AMONG)
    foreseen = with_noise(likeliest, group.keys())
    ids, probs = likeliest.ids[:, :MAX_SUPPORT_SIZE], np.exp(likeliest.scores[:, :MAX_SUPPORT_SIZE])
    sampled: list[SampledToken | Exception] = []
    for row, ask in enumerate(asks):
        if not probs[row, 0] > 0:
            sampled.append(_nothing_allowed())
            continue
        support_ids, weights = truncate(ids[row], probs[row])
        key = stream_key(ask.sampler.params.seed, Purpose.DRAFT, ask.position, ask.base_len)
        token_id = Support.normalised(support_ids, weights).sample(uniform(key))
        best_ids, scores = (part[row, :NUM_CANDIDATES] for part in foreseen)
        sampled.append(_sampled(token_id, (support_ids, weights), best_ids, scores))
    return sampled


def _sampled(
    token_id: int, support: tuple[Ids, Floats] | None, ids: Ids, scores: npt.NDArray[np.floating]
) -> SampledToken:
    """Candidates are the finite ones, at least one."""
    num_finite = max(1, int(np.isfinite(scores).sum()))
    scores = np.maximum(scores[:num_finite], _LEAST_SCORE)
    return SampledToken(token_id, support, ids[:num_finite], scores.astype(np.float32))


def _nothing_allowed() -> InvalidRequest:
    return InvalidRequest("allowed_token_ids", "none of them is in the draft's vocabulary")


# Replies.


class _Supports:
    """The supports of a group's asks, flattened: entries (row in the group, token id)."""

    def __init__(self, group: RequestGroup, asks: Sequence[ScoreRequest]) -> None:
        starts = group.starts.tolist()
        ids = [ids for ask in asks for ids in ask.supports or ()]
        rows = [start + i for ask, start in zip(asks, starts, strict=False) for i in _range(ask)]
        sizes = [len(part) for part in ids]
        self.rows: npt.NDArray[np.int64] = np.repeat(np.array(rows, np.int64), sizes)
        self.columns: npt.NDArray[np.int64] = (
            np.concatenate(ids).astype(np.int64) if ids else np.zeros(0, np.int64)
        )
        self._starts = np.searchsorted(self.rows, group.starts).tolist()

    def split(self, values: Floats) -> list[Floats]:
        """Each ask's part of one value an entry."""
        return [values[a:b] for a, b in zip(self._starts, self._starts[1:], strict=False)]


def _history(ask: ScoreRequest) -> Ids:
    return ask.history


def _range(ask: ScoreRequest) -> range:
    return range(len(ask.supports or ()))


def _reply(asks: Sequence[ScoreRequest], logits: torch.Tensor) -> list[BlockScores | Exception]:
    placed: dict[int, BlockScores | Exception] = {}
    sizes = [ask.num_rows for ask in asks]
    for need, groups in grouped(asks, sizes, lambda ask: _need(sampler_of(ask))).items():
        for group in groups:
            some = [asks[place] for place in group.places]
            raw = group.raw(logits)
            rows = group.adjusted(raw, [partial(_history, ask) for ask in some])
            supports = _Supports(group, some)
            answer = _scores_sampled if need is _Need.SAMPLE else _scores_greedy
            samples, probs, tails, tail_logprobs = answer(group, supports, rows)
            logprobs = _logprobs(group, supports, raw, samples)
            parts = zip(some, group.starts.tolist(), supports.split(probs), logprobs, strict=False)
            for place, (ask, start, on_support, told) in zip(group.places, parts, strict=True):
                stop = start + ask.num_rows
                tail, of_tail = _NOTHING, _NOTHING
                if ask.supports is not None:
                    last = start + len(ask.supports)
                    tail, of_tail = (part[start:last] for part in (tails, tail_logprobs))
                placed[place] = BlockScores(samples[start:stop], on_support, tail, of_tail, told)
    return [placed[place] for place in range(len(asks))]


# Of each row the sample, the mass outside its support, and the sample's log-probability where it
# is outside; in between, the probabilities on the supports.
_Answer = tuple[Ids, Floats, Floats, Floats]


def _scores_greedy(group: RequestGroup, supports: _Supports, rows: torch.Tensor) -> _Answer:
    """A greedy target is a one-hot distribution, on its argmax."""
    samples = first_max(rows)
    hits = (samples[supports.rows] == supports.columns).astype(np.float32)
    num_hits = np.bincount(supports.rows, hits, minlength=len(samples))
    is_outside = num_hits == 0
    logprobs = np.where(is_outside, 0.0, -np.inf)
    return samples, hits, is_outside.astype(np.float32), logprobs.astype(np.float32)


def _scores_sampled(group: RequestGroup, supports: _Supports, rows: torch.Tensor) -> _Answer:
    laws = Distributions(rows, group.params, Excluded(supports.rows, supports.columns))
    ids, scores = laws.race(group.keys(), 1, _SAMPLE_WIDTH)
    # Nothing outside the support: a token must be named, and is never used.
    is_outside = scores[:, 0] > -np.inf
    samples = np.where(is_outside, ids[:, 0], 0)
    num, rows_of_samples = len(supports.rows), np.arange(len(samples))
    logprobs = laws.logprobs_at(
        np.concatenate((supports.rows, rows_of_samples)),
        np.concatenate((supports.columns, samples)),
    )
    probs, tails = (part.astype(np.float32) for part in (np.exp(logprobs[:num]), laws.tails))
    # Where the mass outside is nothing in float32, the sample may not win by the log of it.
    tail_logprobs = np.where(is_outside & (tails > 0), logprobs[num:], -np.inf)
    return samples, probs, tails, tail_logprobs.astype(np.float32)


def _logprobs(
    group: RequestGroup, supports: _Supports, raw: torch.Tensor, samples: Ids
) -> list[Logprobs | None]:
    """Of the raw logits, for the asks that want them."""
    numbers = [sampler.params.logprobs for sampler in group.samplers]
    told: list[Logprobs | None] = [None] * len(numbers)
    if all(number is None for number in numbers):
        return told
    wanted = np.repeat([number is not None for number in numbers], group.sizes)
    picked = np.flatnonzero(wanted)
    place = np.cumsum(wanted) - 1  # of a row among the picked ones
    laws = Distributions(raw[torch.from_numpy(picked).to(raw.device)], [_RAW] * len(picked))
    top_ids, top = laws.likeliest(max(number or 0 for number in numbers) or 1)
    of_samples = laws.logprobs_at(np.arange(len(picked)), samples[picked]).astype(np.float32)
    is_told = wanted[supports.rows]
    on_support = np.zeros(len(supports.rows), np.float32)
    on_support[is_told] = laws.logprobs_at(place[supports.rows[is_told]], supports.columns[is_told])
    split = supports.split(on_support)
    for k, number in enumerate(numbers):
        if number is not None:
            first = int(place[group.starts[k]])
            rows = slice(first, first + int(group.sizes[k]))
            best_ids, best_logprobs = top_ids[rows, :number], top[rows, :number]
            told[k] = Logprobs(
                split[k], of_samples[rows], best_ids, best_logprobs.astype(np.float32)
            )
    return told

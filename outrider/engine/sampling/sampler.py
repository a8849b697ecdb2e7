"""Sampler: tokens and block scores from a step's logits, for all generations together.

`sample_all` samples one token per row and returns the support it was sampled from (draft tier).
`score_all` scores blocks on the supports of their draft tokens (target tier). Rows with the same
needs are computed together, so a greedy row costs an argmax whatever the others need. A row's
result does not depend on other rows. Runs on the engine's device; call it on the device thread
only.
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

# Race candidates per row scored exactly. If they do not suffice, the whole row is scored: only
# slower. That happened in none of 16,000 rows tried.
_SAMPLE_WIDTH = 8
_CANDIDATES_WIDTH = 4 * NUM_CANDIDATES
# Recovered tokens are predicted among this many most likely tokens. Of all tokens, three candidates
# would contain it in 0 to 10 % more of the rejections (twice that if the distribution is almost
# flat), but sampling from a vocabulary of 32,768 would take 0.7 instead of 0.25 ms of one core.
_RECOVERED_AMONG = 128

# Lowest finite float32; very low temperatures give lower scores.
_MIN_SCORE = float(np.finfo(np.float32).min)

_RAW = SamplingParams()
_EMPTY: Floats = np.zeros(0, np.float32)


class _Need(Enum):
    """What a row needs computed."""

    ARGMAX = 1
    ADJUSTED_ARGMAX = 2
    SUPPORT = 3
    SAMPLE = 4


@torch.inference_mode()
def sample_all(
    requests: Sequence[SampleRequest], logits: torch.Tensor
) -> list[SampledToken | Exception]:
    """Implements `ServedEngine.sample`; the samplers of the requests are `GenerationSampler`s."""
    return isolated(_sample, requests, logits, [1] * len(requests))


@torch.inference_mode()
def score_all(
    requests: Sequence[ScoreRequest], logits: torch.Tensor
) -> list[BlockScores | Exception]:
    """Implements `ServedEngine.score`; the samplers of the requests are `GenerationSampler`s."""
    sizes = [request.num_rows for request in requests]
    return isolated(_score, requests, logits[: sum(sizes)], sizes)


def _need(sampler: GenerationSampler) -> _Need:
    if not sampler.params.greedy:
        return _Need.SAMPLE
    return _Need.ADJUSTED_ARGMAX if sampler.adjusts else _Need.ARGMAX


# Sampling.


def _sample_need(request: SampleRequest) -> _Need:
    need = _need(sampler_of(request))
    if need is _Need.SAMPLE and not (
        request.is_guess or request.verification is Verification.COUPLED
    ):
        return _Need.SUPPORT
    return need


def _sample(
    requests: Sequence[SampleRequest], logits: torch.Tensor
) -> list[SampledToken | Exception]:
    results: dict[int, SampledToken | Exception] = {}
    for need, groups in grouped(requests, [1] * len(requests), _sample_need).items():
        for group in groups:
            some = [requests[i] for i in group.indices]
            histories, forbidden = [r.history for r in some], [r.forbidden for r in some]
            rows = group.adjusted(group.raw(logits), histories, forbidden)
            if need is _Need.SUPPORT:
                sampled = _sample_from_supports(some, group, Distributions(rows, group.params))
            elif need is _Need.SAMPLE:
                sampled = _sample_as_target(group, Distributions(rows, group.params))
            else:
                sampled = _sample_greedy(rows)
            results.update(zip(group.indices, sampled, strict=True))
    return [results[i] for i in range(len(requests))]


def _sample_greedy(rows: torch.Tensor) -> list[SampledToken | Exception]:
    token_ids = first_max(rows)
    values, ids = (part.cpu().numpy() for part in best(rows, NUM_CANDIDATES))
    # At ties the argmax may be elsewhere among the best, or missing: put it first.
    for row in np.flatnonzero(ids[:, 0] != token_ids):
        where = np.flatnonzero(ids[row] == token_ids[row])
        ids[row, where[0] if len(where) else -1] = ids[row, 0]
        ids[row, 0] = token_ids[row]
    return [
        _sampled_token(token_id, None, ids[row], values[row])
        for row, token_id in enumerate(token_ids.tolist())
    ]


def _sample_as_target(
    group: RequestGroup, distributions: Distributions
) -> list[SampledToken | Exception]:
    """Sample with the target's noise: the token it would emit itself with this distribution."""
    ranking = distributions.race(group.keys(), NUM_CANDIDATES, _CANDIDATES_WIDTH)
    return [
        _sampled_token(int(ids[0]), None, ids, scores)
        if scores[0] > -np.inf
        else _no_allowed_token()
        for ids, scores in zip(*ranking, strict=True)
    ]


def _sample_from_supports(
    requests: Sequence[SampleRequest], group: RequestGroup, distributions: Distributions
) -> list[SampledToken | Exception]:
    """Sample draft tokens from their truncated distributions; rank candidates with target noise."""
    top = distributions.top(_RECOVERED_AMONG)
    with_target_noise = with_noise(top, group.keys())
    ids, probs = top.ids[:, :MAX_SUPPORT_SIZE], np.exp(top.scores[:, :MAX_SUPPORT_SIZE])
    sampled: list[SampledToken | Exception] = []
    for row, request in enumerate(requests):
        if not probs[row, 0] > 0:
            sampled.append(_no_allowed_token())
            continue
        support_ids, weights = truncate(ids[row], probs[row])
        key = stream_key(
            request.sampler.params.seed, Purpose.DRAFT, request.position, request.base_len
        )
        token_id = Support.normalised(support_ids, weights).sample(uniform(key))
        best_ids, scores = (part[row, :NUM_CANDIDATES] for part in with_target_noise)
        sampled.append(_sampled_token(token_id, (support_ids, weights), best_ids, scores))
    return sampled


def _sampled_token(
    token_id: int, support: tuple[Ids, Floats] | None, ids: Ids, scores: npt.NDArray[np.floating]
) -> SampledToken:
    """Keeps candidates with finite scores, at least one."""
    num_finite = max(1, int(np.isfinite(scores).sum()))
    scores = np.maximum(scores[:num_finite], _MIN_SCORE)
    return SampledToken(token_id, support, ids[:num_finite], scores.astype(np.float32))


def _no_allowed_token() -> InvalidRequest:
    return InvalidRequest("allowed_token_ids", "none of them is in the draft's vocabulary")


# Scoring.


class _Supports:
    """Supports of a group's requests, flattened: entries (row in the group, token id)."""

    def __init__(self, group: RequestGroup, requests: Sequence[ScoreRequest]) -> None:
        starts = group.starts.tolist()
        ids = [ids for request in requests for ids in request.supports or ()]
        rows = [
            start + i
            for request, start in zip(requests, starts, strict=False)
            for i in _range(request)
        ]
        sizes = [len(part) for part in ids]
        self.rows: npt.NDArray[np.int64] = np.repeat(np.array(rows, np.int64), sizes)
        self.columns: npt.NDArray[np.int64] = (
            np.concatenate(ids).astype(np.int64) if ids else np.zeros(0, np.int64)
        )
        self._starts = np.searchsorted(self.rows, group.starts).tolist()

    def split(self, values: Floats) -> list[Floats]:
        """Split one value per entry into each request's part."""
        return [values[a:b] for a, b in zip(self._starts, self._starts[1:], strict=False)]


def _history(request: ScoreRequest) -> Ids:
    return request.history


def _range(request: ScoreRequest) -> range:
    return range(len(request.supports or ()))


def _score(requests: Sequence[ScoreRequest], logits: torch.Tensor) -> list[BlockScores | Exception]:
    results: dict[int, BlockScores | Exception] = {}
    sizes = [request.num_rows for request in requests]
    for need, groups in grouped(
        requests, sizes, lambda request: _need(sampler_of(request))
    ).items():
        for group in groups:
            some = [requests[i] for i in group.indices]
            raw = group.raw(logits)
            histories = [partial(_history, request) for request in some]
            rows = group.adjusted(raw, histories, [request.forbidden for request in some])
            supports = _Supports(group, some)
            compute = _scores_sampled if need is _Need.SAMPLE else _scores_greedy
            samples, probs, tails, tail_logprobs = compute(group, supports, rows)
            logprobs = _logprobs(group, supports, raw, samples)
            parts = zip(some, group.starts.tolist(), supports.split(probs), logprobs, strict=False)
            for i, (request, start, on_support, of_raw) in zip(group.indices, parts, strict=True):
                stop = start + request.num_rows
                tail, of_tail = _EMPTY, _EMPTY
                if request.supports is not None:
                    last = start + len(request.supports)
                    tail, of_tail = (part[start:last] for part in (tails, tail_logprobs))
                results[i] = BlockScores(samples[start:stop], on_support, tail, of_tail, of_raw)
    return [results[i] for i in range(len(requests))]


# Per row: the sample; flattened: the probabilities on the supports; per row: the tail mass (outside
# the support) and the log-probability of the sample if it is outside.
_Scores = tuple[Ids, Floats, Floats, Floats]


def _scores_greedy(group: RequestGroup, supports: _Supports, rows: torch.Tensor) -> _Scores:
    """Scores of greedy rows: the distribution is one-hot, on the argmax."""
    samples = first_max(rows)
    hits = (samples[supports.rows] == supports.columns).astype(np.float32)
    num_hits = np.bincount(supports.rows, hits, minlength=len(samples))
    is_outside = num_hits == 0
    logprobs = np.where(is_outside, 0.0, -np.inf)
    return samples, hits, is_outside.astype(np.float32), logprobs.astype(np.float32)


def _scores_sampled(group: RequestGroup, supports: _Supports, rows: torch.Tensor) -> _Scores:
    """Scores of sampled rows, with the target's noise."""
    distributions = Distributions(rows, group.params, Excluded(supports.rows, supports.columns))
    ids, scores = distributions.race(group.keys(), 1, _SAMPLE_WIDTH)
    # If the tail is empty, any token id will do: it is never used.
    is_outside = scores[:, 0] > -np.inf
    samples = np.where(is_outside, ids[:, 0], 0)
    num, rows_of_samples = len(supports.rows), np.arange(len(samples))
    logprobs = distributions.logprobs_at(
        np.concatenate((supports.rows, rows_of_samples)),
        np.concatenate((supports.columns, samples)),
    )
    probs, tails = (
        part.astype(np.float32) for part in (np.exp(logprobs[:num]), distributions.tails)
    )
    # If the tail mass is zero in float32, the sample must not win by its logarithm.
    tail_logprobs = np.where(is_outside & (tails > 0), logprobs[num:], -np.inf)
    return samples, probs, tails, tail_logprobs.astype(np.float32)


def _logprobs(
    group: RequestGroup, supports: _Supports, raw: torch.Tensor, samples: Ids
) -> list[Logprobs | None]:
    """Log-probabilities of the raw logits, for the requests that want them."""
    limits = [sampler.params.logprobs for sampler in group.samplers]
    results: list[Logprobs | None] = [None] * len(limits)
    if all(limit is None for limit in limits):
        return results
    wanted = np.repeat([limit is not None for limit in limits], group.sizes)
    picked = np.flatnonzero(wanted)
    row_of = np.cumsum(wanted) - 1  # index of a row among the picked ones
    distributions = Distributions(
        raw[torch.from_numpy(picked).to(raw.device)], [_RAW] * len(picked)
    )
    top_ids, top = distributions.top(max(limit or 0 for limit in limits) or 1)
    of_samples = distributions.logprobs_at(np.arange(len(picked)), samples[picked]).astype(
        np.float32
    )
    is_wanted = wanted[supports.rows]
    on_support = np.zeros(len(supports.rows), np.float32)
    on_support[is_wanted] = distributions.logprobs_at(
        row_of[supports.rows[is_wanted]], supports.columns[is_wanted]
    )
    split = supports.split(on_support)
    for k, limit in enumerate(limits):
        if limit is not None:
            first = int(row_of[group.starts[k]])
            rows = slice(first, first + int(group.sizes[k]))
            best_ids, best_logprobs = top_ids[rows, :limit], top[rows, :limit]
            results[k] = Logprobs(
                split[k], of_samples[rows], best_ids, best_logprobs.astype(np.float32)
            )
    return results

"""Samples and scores of many generations at once, against each one alone and plain formulas.

The reference is `warp` and `token_gumbels` in numpy: whole rows in double precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from outrider.engine.interface import NUM_CANDIDATES, BlockScores, SampledToken, SampleRequest
from outrider.engine.sampling.gumbel_max import first_max
from outrider.engine.sampling.sampler import GenerationSampler, sample_all, score_all
from outrider.errors import InvalidRequest
from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.random import Purpose, stream_key, uniform
from outrider.sampling.support import Support
from outrider.sampling.warp import log_softmax

from .all_kinds import EOS, GAMMA, KINDS, PROMPT_LEN, Case, make_case

_SIZES = [5, 259, 1500, 8192]
_RECOVERED_AMONG = 128


def flat(result: SampledToken | BlockScores | Exception) -> list[Any]:
    """All values of a result, for bit-for-bit comparison."""
    assert not isinstance(result, Exception), result
    fields = result if isinstance(result, tuple) else vars(result).values()
    return [vars(part) if hasattr(part, "top_ids") else part for part in fields if part is not None]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(np.array_equal(one, other))


@pytest.mark.parametrize("vocab_size", _SIZES)
@pytest.mark.parametrize("is_guess", [False, True])
@pytest.mark.parametrize("verification", list(Verification))
def test_a_sample_does_not_depend_on_the_batch(
    verification: Verification, is_guess: bool, vocab_size: int
) -> None:
    """Bit for bit: all kinds together, in reverse order, and each alone."""
    case = make_case(vocab_size)
    requests = case.sample_requests(verification, is_guess=is_guess)
    together = [flat(d) for d in sample_all(requests, case.sample_logits)]
    reverse = [flat(d) for d in sample_all(requests[::-1], case.sample_logits.flip(0))][::-1]
    alone = [
        flat(sample_all([a], row[None])[0])
        for a, row in zip(requests, case.sample_logits, strict=True)
    ]
    assert same(together, reverse)
    assert same(together, alone)


@pytest.mark.parametrize("vocab_size", _SIZES)
def test_scores_do_not_depend_on_the_batch(vocab_size: int) -> None:
    """Bit for bit, as for samples."""
    case = make_case(vocab_size)
    requests, rows = case.score_requests(), case.score_logits
    blocks = rows.split(GAMMA + 1)
    together = [flat(r) for r in score_all(requests, rows)]
    reverse = [flat(r) for r in score_all(requests[::-1], torch.cat(blocks[::-1]))][::-1]
    alone = [flat(score_all([a], block)[0]) for a, block in zip(requests, blocks, strict=True)]
    assert same(together, reverse)
    assert same(together, alone)


@pytest.mark.parametrize("vocab_size", _SIZES)
def test_samples_equal_the_formulas(vocab_size: int) -> None:
    """Token, support and candidates of every kind, computed from whole rows."""
    case = make_case(vocab_size, seed=1)
    num = min(NUM_CANDIDATES, vocab_size)
    for is_guess in (False, True):
        sampled = sample_all(
            case.sample_requests(Verification.REJECTION, is_guess=is_guess), case.sample_logits
        )
        for k, d in enumerate(sampled):
            assert isinstance(d, SampledToken)
            row = case.adjusted(case.sample_logits[k], k, 12)
            if case.params[k].greedy:
                scores = row.astype(np.float64)
                assert d.token_id == row.argmax()
            else:
                logprobs, scores = case.scores(row, k, 12)
            if d.support is None:
                assert d.token_id == scores.argmax()
            else:
                ids, weights = d.support
                assert weights == pytest.approx(np.exp(logprobs[ids]), rel=1e-6)
                key = stream_key(case.params[k].seed, Purpose.DRAFT, 12, 11)
                assert d.token_id == Support.normalised(ids, weights).sample(uniform(key))
                # Candidates are chosen among the most likely tokens only.
                scores[np.argsort(-logprobs)[_RECOVERED_AMONG:]] = -np.inf
            order = np.argsort(-scores)[:num]
            order = order[np.isfinite(scores[order])]
            assert d.candidate_ids.tolist() == order.tolist(), KINDS[k]
            assert d.candidate_scores == pytest.approx(scores[order], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("vocab_size", _SIZES)
def test_scores_equal_the_formulas(vocab_size: int) -> None:
    """Samples, support and tail of every kind, position by position, from whole rows."""
    case = make_case(vocab_size, seed=2)
    for k, scored in enumerate(score_all(case.score_requests(), case.score_logits)):
        assert isinstance(scored, BlockScores)
        supports, start = case.supports[k], 0
        assert len(scored.tail_mass) == (0 if supports is None else GAMMA)
        assert len(scored.tail_logprobs) == len(scored.tail_mass)
        for i in range(GAMMA + 1):
            row = case.adjusted(case.score_logits[k * (GAMMA + 1) + i], k, 12 + i)
            if case.params[k].greedy:
                probs = np.eye(vocab_size)[row.argmax()]
                scores = row.astype(np.float64)
                logprobs = np.where(probs > 0, 0.0, -np.inf)
            else:
                logprobs, scores = case.scores(row, k, 12 + i)
                probs = np.exp(logprobs)
            if supports is not None and i < GAMMA:
                on_support = scored.support_probs[start : start + len(supports[i])]
                start += len(supports[i])
                assert on_support == pytest.approx(probs[supports[i]], rel=1e-6)
                outside = np.delete(probs, supports[i]).sum()
                assert scored.tail_mass[i] == pytest.approx(outside, rel=1e-6, abs=1e-12)
                if not case.params[k].greedy:
                    scores[supports[i]] = -np.inf
            expected = scores.argmax() if scores.max() > -np.inf else 0
            assert scored.sample_ids[i] == expected, KINDS[k]
            if supports is not None and i < GAMMA:
                of_sample = logprobs[expected] if scored.tail_mass[i] > 0 else -np.inf
                assert scored.tail_logprobs[i] == pytest.approx(of_sample, rel=1e-6), KINDS[k]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    """For requests with logprobs: the top tokens, the samples and the support."""
    case = make_case(259, seed=3)
    expected = log_softmax(case.score_logits.numpy()).reshape(len(KINDS), GAMMA + 1, -1)
    for k, scored in enumerate(score_all(case.score_requests(), case.score_logits)):
        assert isinstance(scored, BlockScores)
        number = case.params[k].logprobs
        if number is None:
            assert scored.logprobs is None
            continue
        logprobs, rows = scored.logprobs, expected[k]
        assert logprobs is not None
        assert logprobs.top_ids.tolist() == np.argsort(-rows, -1)[:, :number].tolist()
        assert logprobs.top == pytest.approx(-np.sort(-rows, -1)[:, :number], rel=1e-6)
        chosen = np.take_along_axis(rows, scored.sample_ids[:, None], -1)[:, 0]
        assert logprobs.samples == pytest.approx(chosen, rel=1e-6)
        supports = case.supports[k] or []
        wanted = [v for row, ids in zip(rows, supports, strict=False) for v in row[ids]]
        assert logprobs.support.tolist() == pytest.approx(wanted, rel=1e-6)


def test_an_invalid_request_fails_alone() -> None:
    """No allowed token in the draft's vocabulary: only that request fails, naming the field."""
    case = make_case(259)
    params = SamplingParams(allowed_token_ids=(300,))
    sampler = GenerationSampler(
        params, prompt_len=2, vocab_size=259, eos_token_ids=[], device="cpu"
    )
    broken = SampleRequest(
        sampler, lambda: case.history, 12, 11, Verification.REJECTION, is_guess=False
    )
    requests = case.sample_requests(Verification.REJECTION, is_guess=False)
    expected = [flat(d) for d in sample_all(requests, case.sample_logits)]
    rows = torch.cat([case.sample_logits[:2], case.sample_logits[:1], case.sample_logits[2:]])
    sampled = sample_all([*requests[:2], broken, *requests[2:]], rows)
    assert isinstance(sampled[2], InvalidRequest)
    assert same([flat(d) for d in sampled[:2] + sampled[3:]], expected)


def test_an_unexpected_error_fails_its_request_alone() -> None:
    """A history that cannot be read fails its request, not the step."""

    def unreadable() -> Any:
        raise RuntimeError("gone")

    case = make_case(259)
    requests = case.sample_requests(Verification.COUPLED, is_guess=False)
    bad = SampleRequest(
        requests[9].sampler, unreadable, 12, 11, Verification.COUPLED, is_guess=False
    )
    expected = [flat(d) for d in sample_all(requests, case.sample_logits)]
    sampled = sample_all([*requests[:9], bad, *requests[10:]], case.sample_logits)
    assert isinstance(sampled[9], RuntimeError)
    others = [d for k, d in enumerate(sampled) if k != 9]
    assert same([flat(d) for d in others], expected[:9] + expected[10:])


def test_tokens_beyond_a_vocabulary_are_never_sampled() -> None:
    """Each generation has its own vocabulary size, whatever the others' are."""
    logits = torch.zeros(3, 2000)
    logits[:, 1999] = 50.0
    samplers = [
        GenerationSampler(
            SamplingParams(temperature=t),
            prompt_len=1,
            vocab_size=v,
            eos_token_ids=[],
            device="cpu",
        )
        for t, v in ((0, 2000), (0, 1500), (1, 1500))
    ]
    requests = [
        SampleRequest(s, lambda: np.zeros(9, np.int64), 3, 2, Verification.COUPLED, is_guess=False)
        for s in samplers
    ]
    first, *others = [d for d in sample_all(requests, logits) if isinstance(d, SampledToken)]
    assert first.token_id == 1999
    assert all(d.candidate_ids.max() < 1500 for d in others)


def test_ties_are_won_by_the_first_token() -> None:
    """The sampled token is torch's argmax even with many ties (frequent in half precision)."""
    rng = np.random.default_rng(4)
    for size in (7, 1024, 5003):
        rows = torch.from_numpy(rng.integers(0, 3, (40, size)).astype(np.float32))
        rows[0] = 0.0
        greedy = GenerationSampler(
            SamplingParams(temperature=0),
            prompt_len=1,
            vocab_size=size,
            eos_token_ids=[],
            device="cpu",
        )
        requests = [
            SampleRequest(
                greedy, lambda: np.zeros(9, np.int64), 3, 2, Verification.BLOCK, is_guess=False
            )
        ] * len(rows)
        tokens = rows.argmax(-1).tolist()
        assert first_max(rows).tolist() == tokens
        for token_id, sampled in zip(tokens, sample_all(requests, rows), strict=True):
            assert isinstance(sampled, SampledToken)
            assert sampled.token_id == sampled.candidate_ids[0] == token_id
            assert len(set(sampled.candidate_ids.tolist())) == min(NUM_CANDIDATES, size)
            assert (np.diff(sampled.candidate_scores) <= 0).all()


def test_samples_do_not_depend_on_the_number_of_threads() -> None:
    """One thread hashes with numpy, several with torch."""
    case = make_case(8192)
    requests = case.sample_requests(Verification.COUPLED, is_guess=True)
    num_threads = torch.get_num_threads()
    results: list[Sequence[Any]] = []
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            results.append([d.token_id for d in sample_all(requests, case.sample_logits)])  # type: ignore[union-attr]
    finally:
        torch.set_num_threads(num_threads)
    assert results[0] == results[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_samples_the_same_tokens() -> None:
    """From the same logits, for every kind."""
    case = make_case(8192)
    on_cuda = [
        GenerationSampler(
            p, prompt_len=PROMPT_LEN, vocab_size=8192, eos_token_ids=[EOS], device="cuda"
        )
        for p in case.params
    ]
    there = Case(
        case.params,
        on_cuda,
        case.history,
        case.supports,
        *(rows.cuda() for rows in (case.sample_logits, case.score_logits)),
    )
    for verification in Verification:
        here_sampled, there_sampled = (
            sample_all(c.sample_requests(verification, is_guess=False), c.sample_logits)
            for c in (case, there)
        )
        assert [flat(d)[0] for d in here_sampled] == [flat(d)[0] for d in there_sampled]
    score_lists = [score_all(c.score_requests(), c.score_logits) for c in (case, there)]
    for here, remote in zip(*score_lists, strict=True):
        assert same(flat(here)[0], flat(remote)[0])

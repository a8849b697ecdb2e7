"""Draws and replies of many generations at once: what each would be alone, and by plain formulas.

The reference is `warp` and `token_gumbels` in numpy, whole rows in double precision.
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
_FORESEEN_AMONG = 128


def flat(result: SampledToken | BlockScores | Exception) -> list[Any]:
    """All numbers of a result, for comparison bit for bit."""
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
def test_a_draw_is_the_same_in_any_company(
    verification: Verification, is_guess: bool, vocab_size: int
) -> None:
    """Bit for bit: all kinds together, in the opposite order, and each alone."""
    case = make_case(vocab_size)
    asks = case.draw_asks(verification, is_guess=is_guess)
    together = [flat(d) for d in sample_all(asks, case.draw_logits)]
    reverse = [flat(d) for d in sample_all(asks[::-1], case.draw_logits.flip(0))][::-1]
    alone = [
        flat(sample_all([a], row[None])[0]) for a, row in zip(asks, case.draw_logits, strict=True)
    ]
    assert same(together, reverse)
    assert same(together, alone)


@pytest.mark.parametrize("vocab_size", _SIZES)
def test_a_reply_is_the_same_in_any_company(vocab_size: int) -> None:
    """As for draws."""
    case = make_case(vocab_size)
    asks, rows = case.reply_asks(), case.reply_logits
    blocks = rows.split(GAMMA + 1)
    together = [flat(r) for r in score_all(asks, rows)]
    reverse = [flat(r) for r in score_all(asks[::-1], torch.cat(blocks[::-1]))][::-1]
    alone = [flat(score_all([a], block)[0]) for a, block in zip(asks, blocks, strict=True)]
    assert same(together, reverse)
    assert same(together, alone)


@pytest.mark.parametrize("vocab_size", _SIZES)
def test_draws_are_what_the_formulas_say(vocab_size: int) -> None:
    """Token, support and candidates of every kind, from whole rows."""
    case = make_case(vocab_size, seed=1)
    num = min(NUM_CANDIDATES, vocab_size)
    for is_guess in (False, True):
        drawn = sample_all(
            case.draw_asks(Verification.REJECTION, is_guess=is_guess), case.draw_logits
        )
        for k, d in enumerate(drawn):
            assert isinstance(d, SampledToken)
            row = case.adjusted(case.draw_logits[k], k, 12)
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
                # What it foresees is among its likeliest.
                scores[np.argsort(-logprobs)[_FORESEEN_AMONG:]] = -np.inf
            order = np.argsort(-scores)[:num]
            order = order[np.isfinite(scores[order])]
            assert d.candidate_ids.tolist() == order.tolist(), KINDS[k]
            assert d.candidate_scores == pytest.approx(scores[order], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("vocab_size", _SIZES)
def test_replies_are_what_the_formulas_say(vocab_size: int) -> None:
    """Samples, support and tail of every kind, position by position, from whole rows."""
    case = make_case(vocab_size, seed=2)
    for k, reply in enumerate(score_all(case.reply_asks(), case.reply_logits)):
        assert isinstance(reply, BlockScores)
        supports, start = case.supports[k], 0
        assert len(reply.tail_mass) == (0 if supports is None else GAMMA)
        assert len(reply.tail_logprobs) == len(reply.tail_mass)
        for i in range(GAMMA + 1):
            row = case.adjusted(case.reply_logits[k * (GAMMA + 1) + i], k, 12 + i)
            if case.params[k].greedy:
                probs = np.eye(vocab_size)[row.argmax()]
                scores = row.astype(np.float64)
                logprobs = np.where(probs > 0, 0.0, -np.inf)
            else:
                logprobs, scores = case.scores(row, k, 12 + i)
                probs = np.exp(logprobs)
            if supports is not None and i < GAMMA:
                told = reply.support_probs[start : start + len(supports[i])]
                start += len(supports[i])
                assert told == pytest.approx(probs[supports[i]], rel=1e-6)
                outside = np.delete(probs, supports[i]).sum()
                assert reply.tail_mass[i] == pytest.approx(outside, rel=1e-6, abs=1e-12)
                if not case.params[k].greedy:
                    scores[supports[i]] = -np.inf
            expected = scores.argmax() if scores.max() > -np.inf else 0
            assert reply.sample_ids[i] == expected, KINDS[k]
            if supports is not None and i < GAMMA:
                of_sample = logprobs[expected] if reply.tail_mass[i] > 0 else -np.inf
                assert reply.tail_logprobs[i] == pytest.approx(of_sample, rel=1e-6), KINDS[k]


def test_logprobs_are_of_the_raw_logits() -> None:
    """For those who ask: the likeliest, the samples and the support."""
    case = make_case(259, seed=3)
    expected = log_softmax(case.reply_logits.numpy()).reshape(len(KINDS), GAMMA + 1, -1)
    for k, reply in enumerate(score_all(case.reply_asks(), case.reply_logits)):
        assert isinstance(reply, BlockScores)
        number = case.params[k].logprobs
        if number is None:
            assert reply.logprobs is None
            continue
        told, rows = reply.logprobs, expected[k]
        assert told is not None
        assert told.top_ids.tolist() == np.argsort(-rows, -1)[:, :number].tolist()
        assert told.top == pytest.approx(-np.sort(-rows, -1)[:, :number], rel=1e-6)
        chosen = np.take_along_axis(rows, reply.sample_ids[:, None], -1)[:, 0]
        assert told.samples == pytest.approx(chosen, rel=1e-6)
        supports = case.supports[k] or []
        wanted = [v for row, ids in zip(rows, supports, strict=False) for v in row[ids]]
        assert told.support.tolist() == pytest.approx(wanted, rel=1e-6)


def test_one_asks_error_is_its_own() -> None:
    """No allowed token within the draft's vocabulary: that draw alone fails, by name."""
    case = make_case(259)
    params = SamplingParams(allowed_token_ids=(300,))
    stray = GenerationSampler(params, prompt_len=2, vocab_size=259, eos_token_ids=[], device="cpu")
    broken = SampleRequest(
        stray, lambda: case.history, 12, 11, Verification.REJECTION, is_guess=False
    )
    asks = case.draw_asks(Verification.REJECTION, is_guess=False)
    expected = [flat(d) for d in sample_all(asks, case.draw_logits)]
    rows = torch.cat([case.draw_logits[:2], case.draw_logits[:1], case.draw_logits[2:]])
    drawn = sample_all([*asks[:2], broken, *asks[2:]], rows)
    assert isinstance(drawn[2], InvalidRequest)
    assert same([flat(d) for d in drawn[:2] + drawn[3:]], expected)


def test_an_unforeseen_error_is_its_own() -> None:
    """A history that cannot be read fails its own ask, not the step."""

    def unreadable() -> Any:
        raise RuntimeError("gone")

    case = make_case(259)
    asks = case.draw_asks(Verification.COUPLED, is_guess=False)
    bad = SampleRequest(asks[9].sampler, unreadable, 12, 11, Verification.COUPLED, is_guess=False)
    expected = [flat(d) for d in sample_all(asks, case.draw_logits)]
    drawn = sample_all([*asks[:9], bad, *asks[10:]], case.draw_logits)
    assert isinstance(drawn[9], RuntimeError)
    others = [d for k, d in enumerate(drawn) if k != 9]
    assert same([flat(d) for d in others], expected[:9] + expected[10:])


def test_a_vocabulary_of_its_own() -> None:
    """Tokens beyond a generation's vocabulary are never drawn, whoever shares the step."""
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
    asks = [
        SampleRequest(s, lambda: np.zeros(9, np.int64), 3, 2, Verification.COUPLED, is_guess=False)
        for s in samplers
    ]
    first, *others = [d for d in sample_all(asks, logits) if isinstance(d, SampledToken)]
    assert first.token_id == 1999
    assert all(d.candidate_ids.max() < 1500 for d in others)


def test_ties_go_to_the_first() -> None:
    """The drawn token is torch's own argmax, however many are its equals (half precision ties)."""
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
        asks = [
            SampleRequest(
                greedy, lambda: np.zeros(9, np.int64), 3, 2, Verification.BLOCK, is_guess=False
            )
        ] * len(rows)
        tokens = rows.argmax(-1).tolist()
        assert first_max(rows).tolist() == tokens
        for token_id, drawn in zip(tokens, sample_all(asks, rows), strict=True):
            assert isinstance(drawn, SampledToken)
            assert drawn.token_id == drawn.candidate_ids[0] == token_id
            assert len(set(drawn.candidate_ids.tolist())) == min(NUM_CANDIDATES, size)
            assert (np.diff(drawn.candidate_scores) <= 0).all()


def test_threads_do_not_matter() -> None:
    """One thread hashes with numpy, several with torch: the same draws."""
    case = make_case(8192)
    asks = case.draw_asks(Verification.COUPLED, is_guess=True)
    num_threads = torch.get_num_threads()
    results: list[Sequence[Any]] = []
    try:
        for num in (1, 2):
            torch.set_num_threads(num)
            results.append([d.token_id for d in sample_all(asks, case.draw_logits)])  # type: ignore[union-attr]
    finally:
        torch.set_num_threads(num_threads)
    assert results[0] == results[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_tokens() -> None:
    """From the same logits, every kind."""
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
        *(rows.cuda() for rows in (case.draw_logits, case.reply_logits)),
    )
    for verification in Verification:
        here_drawn, there_drawn = (
            sample_all(c.draw_asks(verification, is_guess=False), c.draw_logits)
            for c in (case, there)
        )
        assert [flat(d)[0] for d in here_drawn] == [flat(d)[0] for d in there_drawn]
    replies = [score_all(c.reply_asks(), c.reply_logits) for c in (case, there)]
    for here, remote in zip(*replies, strict=True):
        assert same(flat(here)[0], flat(remote)[0])

"""Counter-based uniforms: same bits in Python, numpy and torch; statistical quality.

Statistical tests use fixed seeds, so they are deterministic. Their docstrings give the probability
that a perfect source would fail them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from outrider.sampling import random
from outrider.sampling.random import (
    Purpose,
    stream_key,
    token_bounds,
    token_gumbels,
    token_offsets,
    token_uniforms,
    uniform,
    uniforms,
)

from .keys import mix, stream_keys

_FALSE_ALARM = 1e-6
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

_seeds = st.integers(0, _MASK)
_positions = st.integers(0, 2**40)
_purposes = st.sampled_from(list(Purpose))
_tokens = st.lists(st.integers(0, 2**32), min_size=1, max_size=5)

Floats = npt.NDArray[np.float64]


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _key_of_bits(bits: int) -> int:
    """The key whose first 64 bits are `bits`: the inverse of SplitMix64."""
    for shift, factor in ((31, None), (27, 0x94D049BB133111EB), (30, 0xBF58476D1CE4E5B9)):
        if factor is None:
            bits = bits ^ (bits >> shift) ^ (bits >> 2 * shift)
            continue
        bits = bits * pow(factor, -1, 1 << 64) & _MASK
        bits = bits ^ (bits >> shift) ^ (bits >> 2 * shift)
    return _signed(bits - _GOLDEN)


@pytest.mark.parametrize(
    ("token_id", "bits"),
    [(0, 0xE220A8397B1DCDAF), (1, 0x6E789E6AA1B965F4), (2, 0x06C45D188009454F)],
)
def test_known_answers_of_splitmix64(token_id: int, bits: int) -> None:
    """The first outputs of SplitMix64 at seed 0, as published with its reference code."""
    (value,) = token_uniforms(np.zeros(1, np.int64), np.array([token_id]))[0]
    assert value == pytest.approx(bits / 2**64, abs=2.0**-52)


@given(_seeds, _purposes, _positions, _positions, _tokens)
@settings(deadline=None)
def test_python_numpy_and_torch_agree_bit_for_bit(
    seed: int, purpose: Purpose, position: int, base_len: int, tokens: list[int]
) -> None:
    """The same number from every library; token 0's is that of `uniform`."""
    key = stream_key(seed, purpose, position, base_len)
    tokens = [0, *tokens]
    by_numpy = token_uniforms(np.array([key, ~key]), np.array(tokens))
    by_torch = token_uniforms(torch.tensor([key, ~key]), torch.tensor(tokens))
    assert by_torch.dtype == torch.float64
    assert by_numpy.dtype == np.float64
    assert by_torch.tolist() == by_numpy.tolist()
    assert by_numpy[0, 0] == uniform(key)
    # A token's uniform is the first of the key that is shifted by it.
    shifted = [uniform(_signed(key + _GOLDEN * token)) for token in tokens]
    assert by_numpy[0].tolist() == shifted
    assert uniforms(seed, purpose, [position], base_len).tolist() == [uniform(key)]


def test_bounds_are_below_the_exponentials_and_close() -> None:
    """0 < v <= -log u for 2 million tokens, and -log v is close to the noise where it is large."""
    keys, offsets = stream_keys(6, Purpose.TARGET, np.arange(20)), token_offsets(np.arange(100_000))
    bounds = token_bounds(keys, offsets).astype(np.float64)
    values = token_uniforms(keys, np.arange(100_000))
    assert bounds.min() > 0
    assert (bounds <= -np.log(values)).all()
    rare = (values > 0.9) & (values < 1 - 1e-5)
    assert (-np.log(values[rare]) < bounds[rare] * 1.06).all()


@given(_seeds, _positions, _tokens)
@settings(deadline=None)
def test_bounds_agree_bit_for_bit(seed: int, position: int, tokens: list[int]) -> None:
    """numpy uses unsigned, torch signed integers; the arguments are unchanged."""
    key = stream_key(seed, Purpose.TARGET, position)
    keys, offsets = np.array([key, ~key]), token_offsets(np.array(tokens))
    by_numpy = token_bounds(keys, offsets)
    by_torch = token_bounds(torch.from_numpy(keys), torch.from_numpy(offsets))
    assert by_numpy.dtype == np.float32
    assert by_torch.dtype == torch.float32
    assert by_torch.tolist() == by_numpy.tolist()
    assert keys.tolist() == [key, ~key]


@pytest.mark.parametrize("bits", [_MASK, _MASK - 1, 0, 1, 1 << 63, (1 << 63) - 1, _MASK ^ 0x1FFFF])
def test_extreme_bits_are_bounded(bits: int) -> None:
    """1 - u close to 0, to 1 and to a half."""
    key = np.array([_key_of_bits(bits)])
    value = uniform(int(key[0]))
    bound = float(token_bounds(key, token_offsets(np.zeros(1, np.int64)))[0, 0])
    assert 0 < bound <= -np.log(value)


def test_each_key_can_have_its_own_tokens() -> None:
    """A table of token ids, one row per key: the same uniforms as in full rows."""
    keys = stream_keys(6, Purpose.TARGET, np.arange(5))
    ids = np.random.default_rng(0).integers(0, 300, (5, 9))
    whole = token_uniforms(keys, np.arange(300))
    assert token_uniforms(keys, ids).tolist() == np.take_along_axis(whole, ids, 1).tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_bit_for_bit() -> None:
    """The same numbers on the accelerator."""
    keys = torch.tensor([stream_key(s, Purpose.TARGET, 7) for s in range(64)])
    tokens = torch.arange(50_000)
    on_cuda = token_uniforms(keys.cuda(), tokens.cuda()).cpu()
    assert torch.equal(on_cuda, token_uniforms(keys, tokens))


@given(_seeds, _purposes, _positions, _positions)
def test_keys_match_an_independent_splitmix64(
    seed: int, purpose: Purpose, position: int, base_len: int
) -> None:
    """`stream_key` is three rounds of SplitMix64's finaliser, a signed 64-bit integer."""
    key = stream_key(seed, purpose, position, base_len)
    assert -(2**63) <= key < 2**63
    expected = stream_keys(
        np.array([seed], np.uint64), purpose, np.array([position]), np.array([base_len])
    )
    assert key == expected[0]
    assert random.stream_keys([seed] * 2, purpose, [position] * 2, base_len).tolist() == [key] * 2


@pytest.mark.parametrize("bits", [_MASK, 0, 1 << 63, _MASK >> 1, _MASK ^ 0x7FF, _MASK ^ 0xFFF])
def test_extreme_bits_stay_inside_the_open_interval(bits: int) -> None:
    """No bits give 0 or 1, so that Gumbel noise is finite (guards a rounding up to exactly 1)."""
    key = _key_of_bits(bits)
    assert mix(np.array([(key + _GOLDEN) & _MASK], np.uint64))[0] == bits
    by_numpy = token_uniforms(np.array([key]), np.zeros(1, np.int64))
    by_torch = token_uniforms(torch.tensor([key]), torch.zeros(1, dtype=torch.int64))
    for value in (uniform(key), float(by_numpy[0, 0]), float(by_torch[0, 0])):
        assert 0 < value < 1
        assert value == pytest.approx(bits / 2**64, abs=2.0**-51)
    assert np.isfinite(token_gumbels(np.array([key]), np.zeros(1, np.int64))).all()


_N = 1_000_000


def _first(keys: npt.NDArray[np.int64]) -> Floats:
    values: Floats = token_uniforms(keys, np.zeros(1, np.int64))[:, 0]
    return values


def _along(axis: str) -> Floats:
    counter = np.arange(_N)
    if axis == "tokens":
        key = stream_key(12, Purpose.TARGET, 34)
        along_tokens: Floats = token_uniforms(np.array([key]), counter)[0]
        return along_tokens
    if axis == "positions":
        return _first(stream_keys(12, Purpose.ACCEPT, counter, 34))
    if axis == "seeds":
        return _first(stream_keys(counter, Purpose.DRAFT, 12, 34))
    if axis == "seeds, high bits":
        return _first(stream_keys(counter.astype(np.uint64) << np.uint64(44), Purpose.TARGET, 1))
    if axis == "base_len":
        return _first(stream_keys(12, Purpose.DRAFT, 34, counter))
    assert axis == "position and base_len"  # as in rounds of single tokens
    return _first(stream_keys(12, Purpose.ACCEPT, counter, counter))


_AXES = ["tokens", "positions", "seeds", "seeds, high bits", "base_len", "position and base_len"]


@pytest.mark.parametrize("axis", _AXES)
def test_uniforms_along_each_axis_are_uniform(axis: str) -> None:
    """Mean, variance, Kolmogorov-Smirnov, lags 1 to 3 over 10^6; false alarm 6e-6 an axis."""
    values = _along(axis)
    assert values.min() > 0
    assert values.max() < 1
    limit = stats.norm.isf(_FALSE_ALARM / 2)
    centred = values - 0.5
    assert abs(centred.mean()) < limit * np.sqrt(1 / 12 / _N)
    # The variance of (U - 1/2)² is 1/180.
    assert abs((centred**2).mean() - 1 / 12) < limit * np.sqrt(1 / 180 / _N)
    assert stats.kstest(values, "uniform").pvalue > _FALSE_ALARM
    for lag in (1, 2, 3):
        product = centred[:-lag] * centred[lag:]
        assert abs(product.mean()) < limit / 12 / np.sqrt(len(product))


def test_low_bits_are_random_too() -> None:
    """The last eight bits of the 52, as bytes: χ² over 256 cells; false alarm 1e-6."""
    mantissas = (_along("tokens") * 2.0**52).astype(np.int64)
    counts = np.bincount(mantissas & 0xFF, minlength=256)
    assert stats.chisquare(counts).pvalue > _FALSE_ALARM


def test_purposes_are_independent() -> None:
    """Uniforms of two purposes at the same position: uncorrelated, and uniform on the square.

    Over 10^5 places, 8 x 8 cells, three pairs; false alarm 6e-6.
    """
    num = 100_000
    columns = {p: _first(stream_keys(5, p, np.arange(num), np.arange(num))) for p in Purpose}
    limit = stats.norm.isf(_FALSE_ALARM / 2) / 12 / np.sqrt(num)
    for first in Purpose:
        for second in Purpose:
            if first < second:
                x, y = columns[first], columns[second]
                assert abs(((x - 0.5) * (y - 0.5)).mean()) < limit
                counts = np.histogram2d(x, y, bins=8, range=[[0, 1], [0, 1]])[0]
                assert stats.chisquare(counts.reshape(-1)).pvalue > _FALSE_ALARM


def test_noise_of_a_token_at_adjacent_positions_is_uncorrelated() -> None:
    """Correlations over 10^5 pairs, across positions, seeds and tokens; false alarm 3e-6."""
    num, tokens = 100_000, np.array([0, 1, 17])
    limit = stats.norm.isf(_FALSE_ALARM / 2) / np.sqrt(num)
    here = token_gumbels(stream_keys(5, Purpose.TARGET, np.arange(num)), tokens)
    seeds = token_gumbels(stream_keys(np.arange(num + 1), Purpose.TARGET, 9), tokens)
    for x, y in (
        (here[:-1, 2], here[1:, 2]),
        (seeds[:-1, 2], seeds[1:, 2]),
        (here[:, 0], here[:, 1]),
    ):
        # Standard Gumbel noise has all moments, so that the coefficient is close to normal.
        assert abs(np.corrcoef(x, y)[0, 1]) < limit


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_gumbel_max_samples_the_distribution(library: str) -> None:
    """argmax(log p + noise) over 200,000 positions: χ² with four tokens; false alarm 1e-6.

    A fifth token with probability zero is never sampled.
    """
    probs = np.array([0.05, 0.5, 0.0, 0.15, 0.3])
    num = 200_000
    keys, tokens = stream_keys(3, Purpose.TARGET, np.arange(num)), np.arange(5)
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs)
    if library == "torch":
        noise = token_gumbels(torch.from_numpy(keys), torch.from_numpy(tokens))
        drawn = (torch.from_numpy(log_probs) + noise).argmax(-1).numpy()
    else:
        drawn = (log_probs + token_gumbels(keys, tokens)).argmax(-1)
    counts = np.bincount(drawn, minlength=5)
    assert counts[2] == 0
    kept = probs > 0
    assert stats.chisquare(counts[kept], num * probs[kept]).pvalue > _FALSE_ALARM


def test_gumbel_noise_restricted_outside_a_support() -> None:
    """The argmax outside a support is a sample of the renormalised rest; false alarm 1e-6."""
    probs = np.array([0.4, 0.1, 0.2, 0.3])
    num = 100_000
    noise = token_gumbels(stream_keys(4, Purpose.TARGET, np.arange(num)), np.arange(4))
    scores = np.log(probs) + noise
    scores[:, [0, 3]] = -np.inf
    counts = np.bincount(scores.argmax(-1), minlength=4)
    assert counts[[0, 3]].sum() == 0
    assert stats.chisquare(counts[[1, 2]], num * np.array([1, 2]) / 3).pvalue > _FALSE_ALARM


def test_keys_do_not_collide() -> None:
    """All purposes, 30 positions, 30 base lengths, 30 seeds: distinct keys; false alarm 2e-10."""
    seeds = np.arange(30)[:, None, None]
    positions, bases = np.arange(30)[None, :, None], np.arange(30)[None, None, :]
    keys = [stream_keys(seeds, purpose, positions, bases).reshape(-1) for purpose in Purpose]
    assert len(np.unique(np.concatenate(keys))) == len(Purpose) * 30**3

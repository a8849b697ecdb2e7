"""Logits to distribution, compared with a slow reference in vLLM's order; numpy and torch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.sampling.params import SamplingParams
from outrider.sampling.warp import (
    Cuts,
    limit_floor,
    log_softmax,
    needs_adjustment,
    nucleus_floor,
    penalise,
    scale,
    warp,
)

Floats = npt.NDArray[Any]


def _softmax(row: Floats) -> Floats:
    weights = np.exp(row - row.max())
    return np.asarray(weights / weights.sum())


def reference_warp(logits: Floats, params: SamplingParams) -> Floats:
    """Probabilities, row by row as vLLM's sampler: temperature, min_p, top_k, top_p ascending."""
    result = []
    for row in logits.astype(np.float64):
        row = row / params.temperature
        probs = _softmax(row)
        row = np.where(probs >= params.min_p * probs.max(), row, -np.inf)
        if 0 < params.top_k < len(row):
            row = np.where(row >= np.sort(row)[-params.top_k], row, -np.inf)
        if params.top_p < 1:
            order = np.argsort(row, kind="stable")
            cumulative = np.cumsum(_softmax(row)[order])
            dropped = order[:-1][cumulative[:-1] <= 1 - params.top_p]
            row = row.copy()
            row[dropped] = -np.inf
        result.append(_softmax(row))
    return np.array(result)


_SETTINGS = [
    SamplingParams(temperature=t, min_p=m, top_k=k, top_p=p)
    for t, m, k, p in itertools.product(
        (0.3, 1.0, 2.5), (0.0, 0.05, 0.5), (0, 1, 7, 50), (1.0, 0.9, 0.3)
    )
]


def test_all_combinations_match_the_reference() -> None:
    """108 settings on random float32 logits: the same tokens kept, the same probabilities."""
    logits = np.random.default_rng(0).normal(0, 3, (6, 50)).astype(np.float32)
    for params in _SETTINGS:
        probs = np.exp(warp(logits, params))
        expected = reference_warp(logits, params)
        assert np.array_equal(probs > 0, expected > 0), params
        assert np.abs(probs - expected).max() < 1e-13, params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numpy_and_torch_agree(dtype: torch.dtype) -> None:
    """The same float64 result from the same logits, half precision included."""
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 3, (6, 50))).to(dtype)
    for params in _SETTINGS:
        by_torch = warp(logits, params)
        by_numpy = warp(logits.to(torch.float64).numpy(), params)
        assert by_torch.dtype == torch.float64
        assert np.array_equal(np.isinf(by_torch.numpy()), np.isinf(by_numpy)), params
        kept = np.isfinite(by_numpy)
        assert np.abs(by_torch.numpy()[kept] - by_numpy[kept]).max() < 1e-12, params


_rows = st.integers(1, 12).flatmap(
    lambda size: st.lists(
        st.lists(st.floats(-60, 60, width=32), min_size=size, max_size=size),
        min_size=1,
        max_size=3,
    )
)


@given(
    _rows,
    st.floats(1e-4, 100),
    st.floats(0, 1),
    st.integers(-1, 15),
    st.floats(0, 1, exclude_min=True),
)
@settings(deadline=None)
def test_invariants(
    rows: list[list[float]], temperature: float, min_p: float, top_k: int, top_p: float
) -> None:
    """Rows sum to 1, nothing is NaN, the most likely token remains, and the order is the same."""
    logits = np.array(rows)
    params = SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    log_probs = warp(logits, params)
    assert log_probs.shape == logits.shape
    assert not np.isnan(log_probs).any()
    assert np.abs(np.exp(log_probs).sum(-1) - 1).max() < 1e-12
    for row, log_prob in zip(logits, log_probs, strict=True):
        assert np.isfinite(log_prob[row.argmax()])
        order = np.argsort(row)
        assert (log_prob[order[1:]] >= log_prob[order[:-1]]).all()
        if 0 < top_k < len(row):
            # Ties are ties after the arithmetic: 0 - 1 and 5e-42 - 1 are one number.
            scaled = row / temperature
            scaled = scaled - scaled.max()
            assert np.isfinite(log_prob).sum() <= (scaled >= np.sort(scaled)[-top_k]).sum()


@given(_rows, st.floats(0.01, 10))
@settings(deadline=None)
def test_one_token_is_the_argmax(rows: list[list[float]], temperature: float) -> None:
    """top_k = 1, min_p = 1 or a tiny top_p leave the most likely token, and ties."""
    logits = np.array(rows)
    likeliest = logits == logits.max(-1, keepdims=True)
    scaled = logits / temperature  # division may round two logits into one
    likeliest |= scaled == scaled.max(-1, keepdims=True)
    for limit in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}):
        log_probs = warp(logits, SamplingParams(temperature=temperature, **limit))
        kept = np.isfinite(log_probs)
        assert kept.tolist() == likeliest.tolist(), limit


@pytest.mark.parametrize("top_k", [-1, 0, 4, 100])
def test_a_top_k_of_all_tokens_keeps_all(top_k: int) -> None:
    """-1, 0, and the vocabulary's size or more, exclude nothing."""
    logits = np.array([[3.0, 1.0, 2.0, 0.0]])
    assert np.abs(warp(logits, SamplingParams(top_k=top_k)) - log_softmax(logits)).max() < 1e-15


def test_the_head_of_a_row_gives_its_floor_or_reports_that_it_cannot() -> None:
    """From the greatest m logits alone: the whole row's floor, if it is among them."""
    logits = scale(np.random.default_rng(2).normal(0, 3, (200, 40)).round(1), 1.0)
    ordered = -np.sort(-logits, -1)
    rng = np.random.default_rng(3)
    cuts = Cuts(
        np.log(rng.choice([1e-9, 0.05, 0.5], (200, 1))),
        rng.choice([0, 1, 4, 20, 99], (200, 1)),
        rng.choice([0.3, 0.9, 0.999, 1.0], (200, 1)),
    )
    limits = limit_floor(ordered, cuts)
    mass = np.where(logits >= limits, np.exp(logits), 0.0).sum(-1, keepdims=True)
    floors, is_told = nucleus_floor(ordered, limits, mass, cuts)
    for num in (4, 10, 30):
        head = ordered[:, :num]
        told_rows = (cuts.top_k <= num) | (cuts.top_k > 40)
        head_limits = limit_floor(head, cuts)
        assert (head_limits == limits)[told_rows].all()
        head_floors, is_told = nucleus_floor(head, head_limits, mass, cuts)
        assert (head_floors == floors)[is_told & told_rows].all()
        assert is_told.mean() > 0.3
        missing = (cuts.top_p < 1) & (floors < head[:, -1:]) & told_rows
        assert not is_told[missing].any()


def test_ties_are_kept_together() -> None:
    """Each of the cuts keeps all tokens with equal logits."""
    logits = np.array([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for limit in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}):
        kept = np.isfinite(warp(logits, SamplingParams(**limit)))
        assert kept.tolist() == [[True, True, True, True, False]], limit


def test_top_p_counts_the_ties_that_top_k_keeps() -> None:
    """With a tie at the k-th logit, vLLM's nucleus is computed over all tokens that top_k keeps.

    Logits of half precision often tie.
    """
    logits = np.array([[3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    params = SamplingParams(top_k=3, top_p=0.8)
    kept = np.isfinite(warp(logits, params))[0]
    # e^3, e^2 and five e: the first two have 0.67 of the mass, so the tie is in the nucleus.
    assert kept.tolist() == [True] * 7 + [False]


def test_top_p_keeps_the_token_that_crosses() -> None:
    """The nucleus is the shortest head with at least top_p."""
    logits = np.log(np.array([[0.5, 0.3, 0.2]]))
    for top_p, num_kept in ((0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 3)):
        kept = np.isfinite(warp(logits, SamplingParams(top_p=top_p)))
        assert kept.sum() == num_kept, top_p


def test_forbidden_tokens_stay_forbidden() -> None:
    """Logits of -inf (allowed tokens, min_tokens) have no probability under any limit."""
    logits = np.array([[1.0, -np.inf, 0.5, -np.inf, 0.1]])
    for params in _SETTINGS:
        probs = np.exp(warp(logits, params))
        assert probs[0, [1, 3]].tolist() == [0, 0]
        assert probs.sum() == pytest.approx(1)


def test_log_softmax() -> None:
    """float64 log-probabilities, stable at large logits, the same in torch."""
    logits = np.array([[1000.0, 999.0, -1000.0], [0.0, 0.0, 0.0]], np.float32)
    result = log_softmax(logits)
    assert result.dtype == np.float64
    expected = [_softmax(row.astype(np.float64)) for row in logits]
    assert np.abs(np.exp(result) - expected).max() < 1e-15
    assert log_softmax(torch.from_numpy(logits)).tolist() == pytest.approx(result, abs=1e-12)


def reference_penalise(
    logits: Floats, prompt: list[list[int]], output: list[list[int]], params: SamplingParams
) -> Floats:
    """Token by token: repetition over prompt and output, the others over the output."""
    result = logits.astype(np.float64).copy()
    for row, (before, after) in enumerate(zip(prompt, output, strict=True)):
        for token in set(before + after):
            value = result[row, token]
            scale = params.repetition_penalty
            result[row, token] = value / scale if value > 0 else value * scale
        for token in set(after):
            result[row, token] -= params.frequency_penalty * after.count(token)
            result[row, token] -= params.presence_penalty
    return result


_token_lists = st.lists(st.lists(st.integers(0, 5), max_size=8), min_size=2, max_size=2)


@given(
    st.lists(st.lists(st.floats(-9, 9), min_size=6, max_size=6), min_size=2, max_size=2),
    _token_lists,
    _token_lists,
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(0.1, 10),
)
@settings(deadline=None)
def test_penalties_match_the_reference(
    rows: list[list[float]],
    prompt: list[list[int]],
    output: list[list[int]],
    presence: float,
    frequency: float,
    repetition: float,
) -> None:
    """In numpy and torch, on logits of both signs; the arguments are unchanged."""
    params = SamplingParams(
        presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition
    )
    logits = np.array(rows)
    counts = np.array([np.bincount(np.array(t, int), minlength=6) for t in output])
    seen = np.array([[t in p + o for t in range(6)] for p, o in zip(prompt, output, strict=True)])
    expected = reference_penalise(logits, prompt, output, params)
    assert np.abs(penalise(logits, counts, seen, params) - expected).max() < 1e-12
    arguments = [torch.from_numpy(array) for array in (logits, counts, seen)]
    assert np.abs(penalise(*arguments, params).numpy() - expected).max() < 1e-12
    assert logits.tolist() == rows


def test_no_penalty_changes_nothing() -> None:
    """Neutral values leave the logits alone, bit for bit, and keep their type."""
    logits = np.array([[1.5, -2.5]], np.float32)
    result = penalise(logits, np.array([[3, 1]]), np.array([[True, True]]), SamplingParams())
    assert result.tolist() == logits.tolist()
    assert result.dtype == np.float32


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(temperature=0.1, top_k=3, min_tokens=1, max_tokens=2), False),
        (SamplingParams(presence_penalty=0.1), True),
        (SamplingParams(frequency_penalty=-0.1), True),
        (SamplingParams(repetition_penalty=1.1), True),
        (SamplingParams(logit_bias={1: 2.0}), True),
        (SamplingParams(allowed_token_ids=(1,)), True),
    ],
)
def test_needs_adjustment(params: SamplingParams, expected: bool) -> None:
    """Only parameters that act on raw logits count, not temperature or the cuts."""
    assert needs_adjustment(params) is expected

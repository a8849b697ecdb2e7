"""Is a sequence of tokens drawn from the laws it should be drawn from? p-values, exact or nearly.

Two ways. The joint law of short outputs, by enumeration. And for outputs of any length Rosenblatt's
transformation (1952): a token's place in its own law given those before it, its own share of that
law spread by a further uniform, is uniform on [0, 1) and independent of all places before it if,
and only if, the outputs have the joint law. Outputs that stop early are set one behind the other,
and the places cut to a number fixed beforehand: so the end of an output, which does depend on its
tokens, selects nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from tests.e2e.reference import Floats, Reference, Sampling

_NUM_BINS = 8
_NUM_PAIR_BINS = 6
# Cells of fewer expected counts are put together, that the chi-squared law may hold.
_MIN_EXPECTED = 5.0


def places(laws: Floats, tokens: Sequence[int], preference: Floats, seed: int) -> Floats:
    """Where each token stands in its law [n, vocab], those with the highest `preference` first.

    A token of no probability is an AssertionError.
    """
    spread = np.random.default_rng((seed, 1)).random(len(tokens))
    at = np.empty(len(tokens))
    for i, (probs, token) in enumerate(zip(laws, tokens, strict=True)):
        assert probs[token] > 0, f"token {i}, {token}, must not be emitted: {probs}"
        before = preference[i] > preference[i, token]
        before |= (preference[i] == preference[i, token]) & (np.arange(len(probs)) < token)
        at[i] = probs[before].sum() + spread[i] * probs[token]
    return np.clip(at, 0.0, 1.0 - 1e-12)


def p_values(outputs: Iterable[Floats], num_places: int) -> dict[str, float]:
    """Of the first `num_places` places: that each is uniform, and independent of its neighbour."""
    joined = np.concatenate(list(outputs))
    assert len(joined) >= num_places, f"only {len(joined)} tokens"
    joined = joined[: num_places // 2 * 2]
    singly = np.bincount((joined * _NUM_BINS).astype(int), minlength=_NUM_BINS)
    halves = (joined * _NUM_PAIR_BINS).astype(int).reshape(-1, 2)
    pairs = np.bincount(halves @ [_NUM_PAIR_BINS, 1], minlength=_NUM_PAIR_BINS**2)
    return {
        "places": float(stats.chisquare(singly).pvalue),
        "pairs": float(stats.chisquare(pairs).pvalue),
    }


def joint_law(
    reference: Reference, prompt: Sequence[int], num_tokens: int, sampling: Sampling
) -> dict[tuple[int, ...], float]:
    """Probability of every output of `num_tokens` tokens."""
    vocab_size = reference.model.config.vocab_size
    joint = {}
    heads = list(itertools.product(range(vocab_size), repeat=num_tokens - 1))
    found = reference.laws_of(prompt, [(*head, 0) for head in heads], sampling)
    for head, laws in zip(heads, found, strict=True):
        chance = np.prod([laws[i, token] for i, token in enumerate(head)])
        for token in range(vocab_size):
            joint[*head, token] = float(chance * laws[-1, token])
    return joint


def joint_p_value(joint: dict[tuple[int, ...], float], outputs: Sequence[Sequence[int]]) -> float:
    """Chi-squared of the outputs' counts; an output of no probability is an AssertionError."""
    counts = Counter(tuple(output) for output in outputs)
    assert all(joint[output] > 0 for output in counts)
    observed, expected = [], []
    rest_observed = rest_expected = 0.0
    for output, chance in sorted(joint.items(), key=lambda item: -item[1]):
        rest_observed += counts[output]
        rest_expected += len(outputs) * chance
        if rest_expected >= _MIN_EXPECTED:
            observed.append(rest_observed)
            expected.append(rest_expected)
            rest_observed = rest_expected = 0.0
    observed[-1] += rest_observed
    expected[-1] += rest_expected
    return float(stats.chisquare(observed, expected).pvalue)

"""The law of several rounds in a row, with the uniforms that the services will use.

A generation is rounds of: draft γ tokens, judge them, go on behind what stands. Uniforms come from
`stream_key` with the seed, the purpose, the position and the block's start; the target's samples
from Gumbel noise keyed by the position alone. Across seeds the first four tokens must have the
target's joint law, whatever was accepted where.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from outrider.sampling.random import (
    Purpose,
    stream_key,
    token_gumbels,
    token_uniforms,
    uniform,
    uniforms,
)
from outrider.sampling.support import Support
from outrider.sampling.verify import Evidence, verify_block, verify_tokens

from .keys import stream_keys
from .laws import Verify

_FALSE_ALARM = 1e-6
_NUM_SEEDS = 15_000
_NUM_TOKENS = 4
_PROMPT_LEN = 11
_VOCAB = 3
_GAMMA = 3

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Markov models: row t of `target` [vocab, vocab] follows token t, and so does `draft[t]`."""

    target: Floats
    draft: tuple[Support, ...]

    @cached_property
    def on_support(self) -> list[Floats]:
        rows = zip(self.target, self.draft, strict=True)
        return [row[kept.token_ids] for row, kept in rows]

    @cached_property
    def tail(self) -> list[float]:
        rows = zip(self.target, self.draft, strict=True)
        return [float(np.delete(row, kept.token_ids).sum()) for row, kept in rows]


def support(token_ids: list[int], weights: list[float]) -> Support:
    return Support.normalised(np.array(token_ids), np.array(weights, np.float32))


_TRUNCATED = Pair(
    np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.3, 0.2, 0.5]]),
    (support([1, 0], [0.7, 0.3]), support([1, 2], [0.6, 0.4]), support([0, 1, 2], [0.1, 0.3, 0.6])),
)
# Far apart, full supports: much is decided by the later tokens of a block.
_FAR_APART = Pair(
    np.array([[0.60, 0.25, 0.15], [0.15, 0.25, 0.60], [0.55, 0.15, 0.30]]),
    (
        support([0, 1, 2], [0.2, 0.2, 0.6]),
        support([0, 1, 2], [0.6, 0.2, 0.2]),
        support([0, 1, 2], [0.1, 0.6, 0.3]),
    ),
)


class Randomness:
    """All uniforms of seeds 0 … n-1; `keyed_by_base` False plants the bug of leaving it out."""

    def __init__(self, num_seeds: int, pair: Pair, *, keyed_by_base: bool = True) -> None:
        seeds = np.arange(num_seeds)[:, None, None]
        length = _NUM_TOKENS + _GAMMA + 1
        positions = _PROMPT_LEN + np.arange(length)[None, :, None]
        bases = _PROMPT_LEN + np.arange(_NUM_TOKENS)[None, None, :]
        self.draft, self.accept, self.recover = (
            _firsts(stream_keys(seeds, purpose, positions, bases if by_base else 0 * bases))
            for purpose, by_base in (
                (Purpose.DRAFT, keyed_by_base),
                (Purpose.ACCEPT, keyed_by_base),
                (Purpose.RECOVER, True),
            )
        )
        keys = stream_keys(seeds, Purpose.TARGET, positions)
        noise = token_gumbels(keys.reshape(-1), np.arange(_VOCAB)).reshape(num_seeds, length, -1)
        # [seed, position, token before]: the target's sample, from all or outside the support
        with np.errstate(divide="ignore"):
            log_probs = np.log(pair.target)
        outside = log_probs.copy()
        for before, kept in enumerate(pair.draft):
            outside[before, kept.token_ids] = -np.inf
        self.samples = (noise[:, :, None, :] + log_probs).argmax(-1)
        self.samples_outside = (noise[:, :, None, :] + outside).argmax(-1)


def _firsts(keys: npt.NDArray[np.int64]) -> Floats:
    values: Floats = token_uniforms(keys.reshape(-1), np.zeros(1, np.int64))
    return values.reshape(keys.shape)


def generate(verify: Verify, pair: Pair, randomness: Randomness, seed: int) -> tuple[int, ...]:
    """The first tokens after a prompt that ends with token 0."""
    draft, accept, recover = (
        table[seed] for table in (randomness.draft, randomness.accept, randomness.recover)
    )
    samples, outside = randomness.samples[seed], randomness.samples_outside[seed]
    output: list[int] = []
    while len(output) < _NUM_TOKENS:
        base = len(output)
        befores = [output[-1] if output else 0]
        for i in range(_GAMMA):
            befores.append(pair.draft[befores[i]].draw(draft[base + i, base]))
        drafted, supports = befores[1:], [pair.draft[before] for before in befores[:-1]]
        evidence = Evidence(
            [pair.on_support[before] for before in befores[:-1]],
            np.array([pair.tail[before] for before in befores[:-1]]),
            [int(outside[base + i, befores[i]]) for i in range(_GAMMA)]
            + [int(samples[base + _GAMMA, befores[_GAMMA]])],
        )
        block = slice(base, base + _GAMMA)
        verdict = verify(drafted, supports, evidence, accept[block, base], recover[block, base])
        output += [*drafted[: verdict.num_accepted], verdict.next_token]
    return tuple(output[:_NUM_TOKENS])


def chi_squared(verify: Verify, pair: Pair, randomness: Randomness) -> float:
    """The p-value of the outputs under the target's joint law, over all 81 outcomes."""
    counts = np.zeros((_VOCAB,) * _NUM_TOKENS)
    for seed in range(_NUM_SEEDS):
        counts[generate(verify, pair, randomness, seed)] += 1
    law = np.einsum("a,ab,bc,cd->abcd", pair.target[0], *[pair.target] * (_NUM_TOKENS - 1))
    expected = _NUM_SEEDS * law.reshape(-1)
    assert expected.min() > 5, "too few seeds for the rarest outcome"
    return float(stats.chisquare(counts.reshape(-1), expected).pvalue)


def test_the_tables_are_the_services_uniforms() -> None:
    """What this file tabulates is what `stream_key` and `uniform` give, value for value."""
    randomness = Randomness(20, _TRUNCATED)
    tables = {
        Purpose.DRAFT: randomness.draft,
        Purpose.ACCEPT: randomness.accept,
        Purpose.RECOVER: randomness.recover,
    }
    for purpose, table in tables.items():
        for seed, position, base in ((0, 0, 0), (7, 3, 2), (19, 6, 3)):
            key = stream_key(seed, purpose, _PROMPT_LEN + position, _PROMPT_LEN + base)
            assert table[seed, position, base] == uniform(key)
        block = uniforms(7, purpose, range(_PROMPT_LEN + 1, _PROMPT_LEN + 4), _PROMPT_LEN + 1)
        assert table[7, 1:4, 1].tolist() == block.tolist()


@pytest.mark.parametrize("pair", [_TRUNCATED, _FAR_APART], ids=["truncated", "far apart"])
@pytest.mark.parametrize("verify", [verify_tokens, verify_block], ids=["tokens", "block"])
def test_generations_have_the_targets_law(verify: Verify, pair: Pair) -> None:
    """χ² of the first four tokens over 15,000 seeds; p > 1e-6, the chance of a false alarm."""
    assert chi_squared(verify, pair, Randomness(_NUM_SEEDS, pair)) > _FALSE_ALARM


def test_blocks_must_not_share_uniforms() -> None:
    """Block verification with DRAFT and ACCEPT keyed by position alone is wrong, and seen to be.

    The planted bug: how much of a block stands depends on all its tokens, so a block that covers
    their positions again must not see their uniforms again.
    """
    randomness = Randomness(_NUM_SEEDS, _TRUNCATED, keyed_by_base=False)
    assert chi_squared(verify_block, _TRUNCATED, randomness) < _FALSE_ALARM

"""Output distribution of several rounds, with the services' uniforms.

Each round of a generation drafts γ tokens, verifies them and continues after the accepted ones.
Uniforms come from `stream_key` with seed, purpose, position and the block's start; the target's
samples and the recovered tokens use Gumbel noise keyed by the position alone. Across seeds the
first tokens must have the target's joint distribution, whatever was accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from outrider.sampling.random import (
    Purpose,
    stream_key,
    target_gumbels,
    token_gumbels,
    token_uniforms,
    uniform,
    uniforms,
)
from outrider.sampling.support import Support
from outrider.sampling.verify import Noise, VerifyInput, verify_block, verify_tokens

from .keys import stream_keys
from .laws import Verify

_FALSE_ALARM = 1e-6
_NUM_SEEDS = 15_000
_NUM_TOKENS = 4
_PROMPT_LEN = 11
_GAMMA = 3

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Markov models: row t of `target` [vocab, vocab] follows token t, and so does `draft[t]`.

    `num_compared`: number of first tokens whose joint distribution is compared.
    """

    target: Floats
    draft: tuple[Support, ...]
    num_compared: int = _NUM_TOKENS

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
# Several tokens outside every support, and something left on it after a rejection.
_TAILS = Pair(
    np.array(
        [
            [0.40, 0.20, 0.25, 0.15],
            [0.15, 0.35, 0.20, 0.30],
            [0.25, 0.15, 0.30, 0.30],
            [0.20, 0.30, 0.20, 0.30],
        ]
    ),
    (
        support([1, 0], [0.7, 0.3]),
        support([0, 1], [0.75, 0.25]),
        support([1, 2], [0.8, 0.2]),
        support([0, 3], [0.9, 0.1]),
    ),
    num_compared=3,
)


class Bug(Enum):
    """The planted bug."""

    NONE = "none"
    NOT_KEYED_BY_BASE = "draft and accept uniforms are keyed by the position alone"
    NEXT_POSITION = "recovered tokens see the noise of the position after"
    BLOCK_START = "recovered tokens see the noise of the block's first position"
    ACCEPT_NOISE = "recovered tokens see noise of the keys of acceptance"
    NO_LOGPROB = "the sample counts as certain"
    MASS_FOR_LOGPROB = "the sample counts with all the mass outside"


class Randomness:
    """All uniforms and noise of seeds 0 … n-1."""

    def __init__(self, num_seeds: int, pair: Pair, bug: Bug = Bug.NONE) -> None:
        self.bug, keyed_by_base = bug, bug is not Bug.NOT_KEYED_BY_BASE
        seeds = np.arange(num_seeds)[:, None, None]
        length = _NUM_TOKENS + _GAMMA + 1
        positions = _PROMPT_LEN + np.arange(length)[None, :, None]
        bases = _PROMPT_LEN + np.arange(_NUM_TOKENS)[None, None, :]
        self.draft, self.accept = (
            _firsts(stream_keys(seeds, purpose, positions, bases if keyed_by_base else 0 * bases))
            for purpose in (Purpose.DRAFT, Purpose.ACCEPT)
        )
        keys = stream_keys(seeds, Purpose.TARGET, positions)
        noise = token_gumbels(keys.reshape(-1), np.arange(len(pair.target))).reshape(
            num_seeds, length, -1
        )
        # [seed, position, token before]: the target's sample, from all or outside the support
        with np.errstate(divide="ignore"):
            log_probs = np.log(pair.target)
        outside = log_probs.copy()
        for before, kept in enumerate(pair.draft):
            outside[before, kept.token_ids] = -np.inf
        self.noise = noise
        self.samples = (noise[:, :, None, :] + log_probs).argmax(-1)
        self.samples_outside = (noise[:, :, None, :] + outside).argmax(-1)
        # [token before, sample]: of the sample outside the support, as the target tells it
        mass = np.exp(outside).sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            if bug is Bug.NO_LOGPROB:
                outside = np.where(np.isfinite(outside), 0.0, outside)
            elif bug is Bug.MASS_FOR_LOGPROB:
                outside = np.where(np.isfinite(outside), np.log(mass), outside)
        self.tail_logprobs = outside

    def noise_of(self, seed: int, base: int) -> Noise:
        """Of the block that starts at `base`."""

        def noise(i: int, token_ids: npt.NDArray[np.int64]) -> Floats:
            if self.bug is Bug.ACCEPT_NOISE:
                start = _PROMPT_LEN + base
                key = stream_key(seed, Purpose.ACCEPT, start + i, start)
                accept: Floats = token_gumbels(np.array([key]), token_ids)[0]
                return accept
            at = {Bug.NEXT_POSITION: base + i + 1, Bug.BLOCK_START: base}.get(self.bug, base + i)
            of_tokens: Floats = self.noise[seed, at, token_ids]
            return of_tokens

        return noise


def _firsts(keys: npt.NDArray[np.int64]) -> Floats:
    values: Floats = token_uniforms(keys.reshape(-1), np.zeros(1, np.int64))
    return values.reshape(keys.shape)


def generate(verify: Verify, pair: Pair, randomness: Randomness, seed: int) -> tuple[int, ...]:
    """The first tokens after a prompt that ends with token 0."""
    draft, accept = randomness.draft[seed], randomness.accept[seed]
    samples, outside = randomness.samples[seed], randomness.samples_outside[seed]
    output: list[int] = []
    while len(output) < _NUM_TOKENS:
        base = len(output)
        befores = [output[-1] if output else 0]
        for i in range(_GAMMA):
            befores.append(pair.draft[befores[i]].sample(draft[base + i, base]))
        drafted, supports = befores[1:], [pair.draft[before] for before in befores[:-1]]
        drawn = [int(outside[base + i, befores[i]]) for i in range(_GAMMA)]
        evidence = VerifyInput(
            [pair.on_support[before] for before in befores[:-1]],
            np.array([pair.tail[before] for before in befores[:-1]]),
            randomness.tail_logprobs[befores[:-1], drawn],
            [*drawn, int(samples[base + _GAMMA, befores[_GAMMA]])],
        )
        noise = randomness.noise_of(seed, base)
        outcome = verify(drafted, supports, evidence, accept[base : base + _GAMMA, base], noise)
        output += [*drafted[: outcome.num_accepted], outcome.next_token]
    return tuple(output[:_NUM_TOKENS])


def chi_squared(verify: Verify, pair: Pair, randomness: Randomness) -> float:
    """The p-value of the outputs under the target's joint distribution, over all outcomes."""
    shape = (len(pair.target),) * pair.num_compared
    counts, law = np.zeros(shape), pair.target[0]
    for seed in range(_NUM_SEEDS):
        counts[generate(verify, pair, randomness, seed)[: pair.num_compared]] += 1
    for _ in range(pair.num_compared - 1):
        law = law[..., None] * pair.target
    expected = _NUM_SEEDS * law.reshape(-1)
    assert expected.min() > 5, "too few seeds for the rarest outcome"
    return float(stats.chisquare(counts.reshape(-1), expected).pvalue)


def test_the_tables_are_the_services_uniforms() -> None:
    """This file's tables have exactly the values of `stream_key` and `uniform`."""
    randomness = Randomness(20, _TRUNCATED)
    tables = {
        Purpose.DRAFT: randomness.draft,
        Purpose.ACCEPT: randomness.accept,
    }
    for purpose, table in tables.items():
        for seed, position, base in ((0, 0, 0), (7, 3, 2), (19, 6, 3)):
            key = stream_key(seed, purpose, _PROMPT_LEN + position, _PROMPT_LEN + base)
            assert table[seed, position, base] == uniform(key)
        block = uniforms(7, purpose, range(_PROMPT_LEN + 1, _PROMPT_LEN + 4), _PROMPT_LEN + 1)
        assert table[7, 1:4, 1].tolist() == block.tolist()
    for seed, position in ((0, 0), (7, 3), (19, 6)):
        noise = target_gumbels(seed, _PROMPT_LEN + position, np.arange(3))
        assert randomness.noise[seed, position].tolist() == noise.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "pair", [_TRUNCATED, _FAR_APART, _TAILS], ids=["truncated", "far apart", "tails"]
)
@pytest.mark.parametrize("verify", [verify_tokens, verify_block], ids=["tokens", "block"])
def test_generations_have_the_targets_distribution(verify: Verify, pair: Pair) -> None:
    """χ² of the first tokens over 15,000 seeds; p > 1e-6, the false-alarm probability."""
    assert chi_squared(verify, pair, Randomness(_NUM_SEEDS, pair)) > _FALSE_ALARM


def test_blocks_must_not_share_uniforms() -> None:
    """Block verification with DRAFT and ACCEPT keyed by position only is wrong, and detected.

    How many tokens of a block are accepted depends on all of its uniforms. So a block that covers
    the same positions must not use them again.
    """
    randomness = Randomness(_NUM_SEEDS, _TRUNCATED, Bug.NOT_KEYED_BY_BASE)
    assert chi_squared(verify_block, _TRUNCATED, randomness) < _FALSE_ALARM


_NOISE_BUGS = [bug for bug in Bug if bug not in (Bug.NONE, Bug.NOT_KEYED_BY_BASE)]


@pytest.mark.slow
@pytest.mark.parametrize("bug", _NOISE_BUGS, ids=lambda bug: bug.name)
def test_a_bug_in_recovered_tokens_is_caught(bug: Bug) -> None:
    """By the check above, at its own size."""
    assert chi_squared(verify_tokens, _TAILS, Randomness(_NUM_SEEDS, _TAILS, bug)) < _FALSE_ALARM

"""Output distributions of small models by exhaustive enumeration, for any verification function.

A case is a pair of tables, context -> distribution. `emitted_distribution` runs the function under
test at a point of every cell of its accept uniforms, and finds the cells by bisecting its results.
Its use of Gumbel noise is measured the same way: where its results flip gives the weights that it
adds the noise to. By the Gumbel-max theorem they are the distribution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from outrider.sampling.support import Support
from outrider.sampling.verify import Noise, VerifyInput, VerifyOutcome

from .cells import cells

Floats = npt.NDArray[np.float64]
Context = tuple[int, ...]
Verify = Callable[
    [Sequence[int], Sequence[Support], VerifyInput, Sequence[float], Noise], VerifyOutcome
]

# Stands for a draw outside a support that leaves nothing outside: must never be emitted.
NO_TOKEN = -1

# Noise of tokens that are to lose, and more than the log of any ratio of two weights that occur.
_LOST, _WIDEST = -1e6, 1e3
_GUMBELS = np.random.default_rng(3).gumbel(size=(3, 16))


def up_to_the_bad_one(block: Context, bad: int) -> Context:
    """The tokens up to the first bad one: its own position has logits."""
    return block[: block.index(bad) + 1]


@dataclass(frozen=True)
class Case:
    """`target[context]` float64 [vocab]; `draft[context]`; contexts up to length γ.

    `bad`: a token that the target cannot run; it has no logits for any position after it.
    `verified(block, bad)`: the verified tokens of a block that contains the bad one.
    """

    vocab_size: int
    gamma: int
    target: Mapping[Context, Floats]
    draft: Mapping[Context, Support]
    bad: int | None = None
    verified: Callable[[Context, int], Context] = up_to_the_bad_one

    def block(self, draft_tokens: Context) -> Context:
        """The verified ones among the draft tokens."""
        if self.bad is None or self.bad not in draft_tokens:
            return draft_tokens
        return self.verified(draft_tokens, self.bad)

    def has_bonus(self, block: Context) -> bool:
        return self.bad not in block and len(block) in (0, self.gamma)


def contexts(vocab_size: int, longest: int) -> Iterator[Context]:
    for length in range(longest + 1):
        yield from itertools.product(range(vocab_size), repeat=length)


def random_case(
    seed: int,
    vocab_size: int,
    gamma: int,
    *,
    full_support: bool = False,
    target_zeros: float = 0.0,
    no_tail: bool = False,
    concentration: float = 1.0,
) -> Case:
    """Dirichlet rows for every context; `target_zeros`: probability that a token is excluded."""
    rng = np.random.default_rng(seed)
    target, draft = {}, {}
    for context in contexts(vocab_size, gamma):
        size = vocab_size if full_support else int(rng.integers(1, vocab_size + 1))
        token_ids = rng.permutation(vocab_size)[:size]
        weights = rng.dirichlet(np.full(size, concentration)).astype(np.float32)
        draft[context] = Support.normalised(token_ids, weights + np.float32(1e-3))
        target[context] = _target_row(rng, vocab_size, token_ids, target_zeros, no_tail)
    return Case(vocab_size, gamma, target, draft)


def _target_row(
    rng: np.random.Generator,
    vocab_size: int,
    support: npt.NDArray[np.int64],
    zeros: float,
    no_tail: bool,
) -> Floats:
    allowed = rng.random(vocab_size) >= zeros
    if no_tail:
        allowed &= np.isin(np.arange(vocab_size), support)
    if not allowed.any():
        allowed[support[0]] = True
    row = np.where(allowed, rng.dirichlet(np.ones(vocab_size)) + 1e-6, 0.0)
    return np.asarray(row / row.sum())


def target_distribution(case: Case) -> Floats:
    """The target's joint distribution of γ + 1 tokens, [vocab] * (γ + 1)."""
    law = np.zeros((case.vocab_size,) * (case.gamma + 1))
    for sequence in itertools.product(range(case.vocab_size), repeat=case.gamma + 1):
        law[sequence] = _continuation(case, sequence, 0)
    return law


def _continuation(case: Case, sequence: Context, start: int) -> float:
    """The target's probability of sequence[start:] after sequence[:start]."""
    return float(
        np.prod([case.target[sequence[:i]][sequence[i]] for i in range(start, len(sequence))])
    )


def emitted_distribution(verify: Verify, case: Case) -> tuple[Floats, float]:
    """Distribution of γ + 1 tokens: accepted, next, then the target's own; and mean accepted."""
    law = np.zeros((case.vocab_size,) * (case.gamma + 1))
    mean_accepted = 0.0
    prefixes: dict[Context, float] = {}
    for draft_tokens, chance in _drafts(case):
        for outcome, share in _outcomes(verify, case, case.block(draft_tokens)).items():
            following = () if outcome.next_token is None else (outcome.next_token,)
            prefix = (*draft_tokens[: outcome.num_accepted], *following)
            assert NO_TOKEN not in prefix, f"emitted a token from nowhere at {draft_tokens}"
            prefixes[prefix] = prefixes.get(prefix, 0.0) + chance * share
            mean_accepted += chance * share * outcome.num_accepted
    for prefix, chance in prefixes.items():
        missing = case.gamma + 1 - len(prefix)
        for rest in itertools.product(range(case.vocab_size), repeat=missing):
            law[prefix + rest] += chance * _continuation(case, prefix + rest, len(prefix))
    return law, mean_accepted


def distribution_error(verify: Verify, case: Case) -> float:
    """Largest difference to the target's distribution over all sequences of γ + 1 tokens."""
    law, _ = emitted_distribution(verify, case)
    return float(np.abs(law - target_distribution(case)).max())


def mean_accepted(verify: Verify, case: Case) -> float:
    """The mean number of accepted draft tokens, over drafts and accept uniforms only."""
    mean = 0.0
    for draft_tokens, chance in _drafts(case):
        supports, evidence = _evidence(case, draft_tokens, [0] * (case.gamma + 1))

        block = (draft_tokens, supports, evidence)

        def count(point: Sequence[float], block: Any = block) -> int:
            return verify(*block, point, silence).num_accepted

        for volume, point in cells(count, case.gamma):
            mean += chance * volume * count(point)
    return mean


def _drafts(case: Case) -> Iterator[tuple[Context, float]]:
    paths: list[tuple[Context, float]] = [((), 1.0)]
    for _ in range(case.gamma):
        paths = [
            ((*path, int(token)), chance * prob)
            for path, chance in paths
            for token, prob in zip(case.draft[path].token_ids, case.draft[path].probs, strict=True)
        ]
    yield from paths


def silence(position: int, token_ids: npt.NDArray[np.int64]) -> Floats:
    """No noise: for tests in which the recovered token does not matter."""
    return np.zeros(len(token_ids))


def _evidence(
    case: Case, draft_tokens: Context, samples: Sequence[int]
) -> tuple[list[Support], VerifyInput]:
    supports = [case.draft[draft_tokens[:i]] for i in range(len(draft_tokens))]
    rows = [case.target[draft_tokens[:i]] for i in range(len(draft_tokens))]
    on_support = [row[s.token_ids] for row, s in zip(rows, supports, strict=True)]
    tail = [np.delete(row, s.token_ids).sum() for row, s in zip(rows, supports, strict=True)]
    with np.errstate(divide="ignore"):
        of_samples = [
            -math.inf if mass == 0 else float(np.log(row[sample]))
            for row, mass, sample in zip(rows, tail, samples, strict=False)
        ]
    return supports, VerifyInput(on_support, np.array(tail), np.array(of_samples), samples)


def _sample_distributions(case: Case, draft_tokens: Context) -> list[list[tuple[int, float]]]:
    """Each sample's tokens and probabilities: outside the support at i < γ, everywhere at γ."""
    laws, gamma = [], len(draft_tokens)
    for i in range(gamma + case.has_bonus(draft_tokens)):
        row = case.target[draft_tokens[:i]].copy()
        if i < gamma:
            row[case.draft[draft_tokens[:i]].token_ids] = 0.0
        mass = row.sum()
        laws.append(
            [(int(t), float(row[t] / mass)) for t in np.flatnonzero(row)]
            if mass > 0
            else [(NO_TOKEN, 1.0)]
        )
    return laws


def _outcomes(verify: Verify, case: Case, draft_tokens: Context) -> dict[VerifyOutcome, float]:
    laws = _sample_distributions(case, draft_tokens)
    first = [draws[0][0] for draws in laws]
    block = (draft_tokens, *_evidence(case, draft_tokens, first))
    verdicts: dict[VerifyOutcome, float] = {}
    gamma = len(draft_tokens)
    for volume, point in cells(lambda u: verify(*block, u, silence).num_accepted, gamma):
        at = verify(*block, point, silence).num_accepted
        for sample, chance in laws[at] if at < len(laws) else [(NO_TOKEN, 1.0)]:
            samples = [*first[:at], sample, *first[at + 1 :]][: len(laws)]
            told = (draft_tokens, *_evidence(case, draft_tokens, samples), point)
            if at == gamma:
                found = {verify(*told, silence): 1.0}
            else:
                outside = math.fsum(
                    case.target[draft_tokens[:at]][t] for t, _ in laws[at] if t >= 0
                )
                found = _recovered(verify, told, at, outside)
            for outcome, share in found.items():
                assert outcome.num_accepted == at, "noise must not decide what is accepted"
                verdicts[outcome] = verdicts.get(outcome, 0.0) + volume * chance * share
    return verdicts


def _recovered(verify: Verify, told: Any, at: int, outside: float) -> dict[VerifyOutcome, float]:
    """Distribution of the outcome over the noise, given the sample of position `at`.

    On the support the noise is standard Gumbel. The sample's is not, because it is a maximum: its
    log p + noise is a Gumbel variable shifted by the log of all the mass `outside`.
    """
    support, evidence = told[1][at], told[2]
    sample, logprob = evidence.samples[at], evidence.tail_logprobs[at]
    weights = _weights(verify, told, at, [*support.token_ids.tolist(), sample])
    if sample in weights:
        weights[sample] *= outside / math.exp(logprob)
    total = math.fsum(weights.values())
    return {VerifyOutcome(at, token): weight / total for token, weight in weights.items()}


def _weights(verify: Verify, told: Any, at: int, tokens: Sequence[int]) -> dict[int, float]:
    """Weights that the function adds the noise of position `at` to, up to a factor; without zeros.

    Tokens a and b with noise 0 and d swap where d is the log of the ratio of their weights.
    """

    def winner(noise: Mapping[int, float]) -> int:
        def of(position: int, token_ids: npt.NDArray[np.int64]) -> Floats:
            if position != at:
                return np.zeros(len(token_ids))
            return np.array([noise.get(token, _LOST) for token in token_ids.tolist()])

        return verify(*told, of).next_token

    possible = [token for token in tokens if winner({token: 0.0}) == token]
    assert possible, "the noise of the position does not decide"
    weights = {possible[0]: 1.0}
    for token in possible[1:]:
        low, high = -_WIDEST, _WIDEST
        while low < (middle := (low + high) / 2) < high:
            if winner({possible[0]: 0.0, token: middle}) == token:
                high = middle
            else:
                low = middle
        weights[token] = math.exp(-high)
    for draw in _GUMBELS[:, : len(weights)]:  # and all of them together
        noise = dict(zip(weights, draw.tolist(), strict=True))
        scores = {token: math.log(weight) + noise[token] for token, weight in weights.items()}
        assert winner(noise) == max(scores, key=lambda token: scores[token])
    return weights

"""Laws of small models by exhaustive enumeration: nothing here knows how verification decides.

A case is a pair of tables, context -> distribution. `emitted_law` runs the function under test at
a representative of every cell of its uniforms, and finds the cells by bisecting its answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from outrider.sampling.support import Support
from outrider.sampling.verify import Evidence, Verdict

Floats = npt.NDArray[np.float64]
Context = tuple[int, ...]
Verify = Callable[
    [Sequence[int], Sequence[Support], Evidence, Sequence[float], Sequence[float]], Verdict
]

# Stands for a draw outside a support that leaves nothing outside: must never be emitted.
NO_TOKEN = -1

_GRID = np.linspace(0.0, 1.0 - 2.0**-53, 6).tolist()
_NARROWEST = 2.0**-58


@dataclass(frozen=True)
class Case:
    """`target[context]` float64 [vocab]; `draft[context]`; contexts up to length γ."""

    vocab_size: int
    gamma: int
    target: Mapping[Context, Floats]
    draft: Mapping[Context, Support]


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
    """Dirichlet rows for every context; `target_zeros` is the chance that a token is ruled out."""
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


def target_law(case: Case) -> Floats:
    """The joint law of γ + 1 tokens, [vocab] * (γ + 1)."""
    law = np.zeros((case.vocab_size,) * (case.gamma + 1))
    for sequence in itertools.product(range(case.vocab_size), repeat=case.gamma + 1):
        law[sequence] = _continuation(case, sequence, 0)
    return law


def _continuation(case: Case, sequence: Context, start: int) -> float:
    """The target's probability of sequence[start:] after sequence[:start]."""
    return float(
        np.prod([case.target[sequence[:i]][sequence[i]] for i in range(start, len(sequence))])
    )


def emitted_law(verify: Verify, case: Case) -> tuple[Floats, float]:
    """The law of accepted, next and then the target's own tokens, γ + 1 in all; mean accepted."""
    law = np.zeros((case.vocab_size,) * (case.gamma + 1))
    mean_accepted = 0.0
    prefixes: dict[Context, float] = {}
    for draft_tokens, chance in _drafts(case):
        for verdict, share in _verdicts(verify, case, draft_tokens).items():
            prefix = (*draft_tokens[: verdict.num_accepted], verdict.next_token)
            assert NO_TOKEN not in prefix, f"emitted a token from nowhere at {draft_tokens}"
            prefixes[prefix] = prefixes.get(prefix, 0.0) + chance * share
            mean_accepted += chance * share * verdict.num_accepted
    for prefix, chance in prefixes.items():
        missing = case.gamma + 1 - len(prefix)
        for rest in itertools.product(range(case.vocab_size), repeat=missing):
            law[prefix + rest] += chance * _continuation(case, prefix + rest, len(prefix))
    return law, mean_accepted


def mean_accepted(verify: Verify, case: Case) -> float:
    """The mean number of accepted draft tokens, over drafts and accept uniforms only."""
    mean = 0.0
    recover = [0.5] * case.gamma
    for draft_tokens, chance in _drafts(case):
        supports, evidence = _evidence(case, draft_tokens, [0] * (case.gamma + 1))

        block = (draft_tokens, supports, evidence)

        def count(point: Sequence[float], block: Any = block) -> int:
            return verify(*block, point, recover).num_accepted

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


def _evidence(
    case: Case, draft_tokens: Context, samples: Sequence[int]
) -> tuple[list[Support], Evidence]:
    supports = [case.draft[draft_tokens[:i]] for i in range(case.gamma)]
    rows = [case.target[draft_tokens[:i]] for i in range(case.gamma)]
    on_support = [row[s.token_ids] for row, s in zip(rows, supports, strict=True)]
    tail = [np.delete(row, s.token_ids).sum() for row, s in zip(rows, supports, strict=True)]
    return supports, Evidence(on_support, np.array(tail), samples)


def _sample_laws(case: Case, draft_tokens: Context) -> list[list[tuple[int, float]]]:
    """Each sample's tokens and chances: outside the support at i < γ, everywhere at γ."""
    laws = []
    for i in range(case.gamma + 1):
        row = case.target[draft_tokens[:i]].copy()
        if i < case.gamma:
            row[case.draft[draft_tokens[:i]].token_ids] = 0.0
        mass = row.sum()
        laws.append(
            [(int(t), float(row[t] / mass)) for t in np.flatnonzero(row)]
            if mass > 0
            else [(NO_TOKEN, 1.0)]
        )
    return laws


def _verdicts(verify: Verify, case: Case, draft_tokens: Context) -> dict[Verdict, float]:
    laws = _sample_laws(case, draft_tokens)
    assignments = [
        (tuple(token for token, _ in draws), float(np.prod([chance for _, chance in draws])))
        for draws in itertools.product(*laws)
    ]

    def with_samples(samples: Sequence[int]) -> Callable[[Sequence[float]], Verdict]:
        supports, evidence = _evidence(case, draft_tokens, samples)
        gamma = case.gamma
        return lambda u: verify(draft_tokens, supports, evidence, u[:gamma], u[gamma:])

    boxes = cells(with_samples(assignments[0][0]), 2 * case.gamma)
    verdicts: dict[Verdict, float] = {}
    for samples, chance in assignments:
        decide = with_samples(samples)
        for volume, point in boxes:
            verdict = decide(point)
            verdicts[verdict] = verdicts.get(verdict, 0.0) + volume * chance
    return verdicts


def cells(
    decide: Callable[[Sequence[float]], Any], num_uniforms: int
) -> list[tuple[float, list[float]]]:
    """Boxes of the unit cube on which `decide` is constant: their volume and a point of each.

    One uniform after the other is cut where the answers change, given the cells of those before.
    """
    boxes: list[tuple[float, list[float]]] = [(1.0, [])]
    for i in range(num_uniforms):
        num_left = num_uniforms - i - 1
        boxes = [
            (volume * (high - low), [*head, (low + high) / 2])
            for volume, head in boxes
            for low, high in _intervals(decide, head, num_left)
        ]
    return boxes


def _intervals(
    decide: Callable[[Sequence[float]], Any], head: list[float], num_left: int
) -> list[tuple[float, float]]:
    """Where [0, 1) must be cut, judged at several settings of the uniforms still to come."""
    probes = _probes(num_left)

    def answer(value: float, probe: list[float]) -> Any:
        return decide([*head, value, *probe])

    def cuts(low: float, high: float, at_low: list[Any], at_high: list[Any]) -> list[float]:
        differing = [j for j in range(len(probes)) if at_low[j] != at_high[j]]
        if not differing:
            return []
        j = differing[0]
        a, b = low, high
        while b - a > _NARROWEST:
            middle = (a + b) / 2
            if not a < middle < b:
                break
            if answer(middle, probes[j]) == at_low[j]:
                a = middle
            else:
                b = middle
        at_a = [answer(a, probe) for probe in probes]
        at_b = [answer(b, probe) for probe in probes]
        return [*cuts(low, a, at_low, at_a), b, *cuts(b, high, at_b, at_high)]

    answers = [[answer(value, probe) for probe in probes] for value in _GRID]
    points = [0.0]
    for i in range(len(_GRID) - 1):
        points += cuts(_GRID[i], _GRID[i + 1], answers[i], answers[i + 1])
    points.append(1.0)
    return list(itertools.pairwise(points))


def _probes(num_left: int) -> list[list[float]]:
    if num_left == 0:
        return [[]]
    rng = np.random.default_rng(num_left)
    edges = [[0.0] * num_left, [1.0 - 2.0**-53] * num_left]
    return edges + rng.random((2, num_left)).tolist()

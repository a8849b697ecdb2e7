"""Acceptance along the target's own text ("teacher-forced"), measured with both engines.

Runs as a child process, which needs torch: `python -m outrider_bench.check.acceptance` reads a Job
as JSON from standard input and prints a line of JSON per batch. No speculation runs: at every
position of a text that the target wrote, both models' distributions are compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from outrider.sampling.params import SamplingParams
from outrider.sampling.support import MAX_SUPPORT_SIZE, truncate
from outrider.sampling.warp import warp
from outrider_bench.measuring.child import print_lines, run_child

if TYPE_CHECKING:
    from rich.console import Console

    from outrider_bench.measuring.show import Report

# Sequences per forward pass.
BATCH_SIZE = 64
_PAGE = 16

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Job:
    """Models and prompts. `temperatures`: each prompt is continued at each of them.

    `draft` None: only the target's texts are wanted. `num_threads` 0: the engine's default.
    `ignore_eos`: texts go on after an EOS token.
    """

    target: str
    draft: str | None
    dtype: str
    device: str
    draft_device: str
    prompts: list[tuple[str, list[int]]]
    temperatures: list[float]
    max_tokens: int
    seed: int = 0
    num_threads: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class Comparison:
    """One text of the target. Lists have one entry per generated token; empty without a draft.

    `prompt`: its index in the job. `overlap`: Σ min(target_probs, draft_probs), the acceptance rate
    of rejection sampling there (Leviathan et al. 2023, Corollary 3.6); at temperature 0 whether the
    argmaxes are equal.
    `accepted`: probability that the emitted token was a draft token that was accepted, with the
    draft's distribution cut off as the draft service does. `agrees`: whether both models' most
    likely tokens are equal. `rank`: of the emitted token at the draft; 0 is its most likely token.
    """

    task: str
    temperature: float
    prompt: int
    token_ids: list[int]
    overlap: list[float]
    accepted: list[float]
    agrees: list[bool]
    rank: list[int]


def batches(job: Job) -> list[tuple[float, list[int]]]:
    """(temperature, indices of prompts) of each batch, in order."""
    indices = list(range(len(job.prompts)))
    return [
        (temperature, indices[start : start + BATCH_SIZE])
        for temperature in job.temperatures
        for start in range(0, len(indices), BATCH_SIZE)
    ]


def compared(job: Job) -> Iterator[list[Comparison]]:
    """Loads both models, then yields the comparisons of each batch. Raises ConfigError."""
    from outrider.engine import EngineOptions, load_engine

    longest = max(len(ids) for _, ids in job.prompts) + job.max_tokens
    pages = -(-longest // _PAGE) + 1
    kv_tokens = pages * _PAGE * min(BATCH_SIZE, len(job.prompts))
    engines = [
        load_engine(
            EngineOptions(
                model,
                dtype=job.dtype,
                device=device,
                kv_cache_tokens=kv_tokens,
                num_threads=job.num_threads or None,
            )
        )
        for model, device in ((job.target, job.device), (job.draft, job.draft_device))
        if model is not None
    ]
    for number, (temperature, indices) in enumerate(batches(job)):
        batch = _Batch(engines, job, temperature, indices)
        generator = np.random.default_rng((job.seed, number))
        for _ in range(job.max_tokens):
            if not batch.step(generator):
                break
        yield batch.close()


class _Batch:
    """Texts that the target writes, one token per step, with the draft reading along."""

    def __init__(
        self, engines: Sequence[Any], job: Job, temperature: float, indices: Sequence[int]
    ) -> None:
        self._engines = engines
        self._params = SamplingParams(temperature=temperature)
        self._eos = () if job.ignore_eos else engines[0].info.eos_token_ids
        self._vocab_size = engines[0].info.vocab_size
        self.comparisons = [
            Comparison(job.prompts[i][0], temperature, i, [], [], [], [], []) for i in indices
        ]
        prompts = [job.prompts[i][1] for i in indices]
        # Tokens of each text that the models have not seen; empty: the text has ended.
        self._new = [list(ids) for ids in prompts]
        self._sequences = [
            [engine.store.open(len(ids) + job.max_tokens) for ids in prompts] for engine in engines
        ]

    def step(self, generator: np.random.Generator) -> bool:
        """Adds a token to every open text. False once all have ended."""
        open_rows = [row for row, ids in enumerate(self._new) if ids]
        if not open_rows:
            return False
        target, *drafts = (self._logits(tier, open_rows) for tier in range(len(self._engines)))
        token_ids = self._emitted(target, generator)
        for draft in drafts:
            self._compare(open_rows, token_ids, target, draft)
        for row, token_id in zip(open_rows, token_ids.tolist(), strict=True):
            self.comparisons[row].token_ids.append(token_id)
            self._new[row] = [] if token_id in self._eos else [token_id]
        return True

    def _logits(self, tier: int, rows: Sequence[int]) -> Floats:
        """Logits after the new tokens, float64 [rows, vocab of the target]; -inf: no such token."""
        from outrider.engine import Append

        engine, sequences = self._engines[tier], self._sequences[tier]
        num_known = engine.info.vocab_size
        # As the draft service does: token 0 replaces ids that the draft does not have.
        known = ([token if token < num_known else 0 for token in self._new[row]] for row in rows)
        appends = [Append(sequences[row], ids, 1) for row, ids in zip(rows, known, strict=True)]
        logits = engine.forward(appends).cpu().numpy().astype(np.float64)
        missing = self._vocab_size - logits.shape[1]
        logits = np.pad(logits, ((0, 0), (0, max(0, missing))), constant_values=-np.inf)
        return np.asarray(logits[:, : self._vocab_size])

    def _emitted(self, target: Floats, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """The target's next token of each row."""
        if self._params.greedy:
            return np.asarray(target.argmax(-1), np.int64)
        probs = np.exp(warp(target, self._params))
        # Inverse CDF; the last token catches rounding.
        levels = generator.random((len(probs), 1)) * probs.sum(-1, keepdims=True)
        found: npt.NDArray[np.int64] = (np.cumsum(probs, -1) <= levels).sum(-1)
        return found.clip(max=target.shape[1] - 1)

    def _compare(
        self,
        rows: Sequence[int],
        token_ids: npt.NDArray[np.int64],
        target: Floats,
        draft: Floats,
    ) -> None:
        """Adds overlap, acceptance probability, agreement and rank of each row."""
        every = np.arange(len(rows))
        agrees = target.argmax(-1) == draft.argmax(-1)
        overlap = accepted = agrees.astype(float)
        if not self._params.greedy:
            target_probs, draft_probs = (np.exp(warp(x, self._params)) for x in (target, draft))
            overlap = np.minimum(target_probs, draft_probs).sum(-1)
            sent = np.array([_sent(q, t) for q, t in zip(draft_probs, token_ids, strict=True)])
            accepted = np.minimum(1.0, sent / np.maximum(target_probs[every, token_ids], 1e-300))
        rank = (draft > draft[every, token_ids][:, None]).sum(-1)
        for place, row in enumerate(rows):
            comparison = self.comparisons[row]
            comparison.overlap.append(float(overlap[place]))
            comparison.accepted.append(float(accepted[place]))
            comparison.agrees.append(bool(agrees[place]))
            comparison.rank.append(int(rank[place]))

    def close(self) -> list[Comparison]:
        """Frees the memory; returns the comparisons."""
        for engine, sequences in zip(self._engines, self._sequences, strict=True):
            for sequence in sequences:
                engine.store.free(sequence)
        return self.comparisons


def _sent(probs: Floats, token_id: int) -> float:
    """Probability of the token in the truncated distribution that the draft service sends."""
    size = min(MAX_SUPPORT_SIZE, len(probs))
    top = np.argpartition(-probs, size - 1)[:size]
    top = top[np.argsort(-probs[top], kind="stable")]
    ids, weights = truncate(top, probs[top])
    where = np.flatnonzero(ids == token_id)
    return float(weights[where[0]] / weights.sum()) if where.size else 0.0


async def measure_acceptance(
    job: Job, found: list[Comparison], console: Console, report: Report
) -> None:
    """Runs the job in a child process and adds its comparisons to `found`.

    After a signal it returns with those there are (`report.stopped`). Raises ConfigError.
    """
    from outrider_bench.measuring.show import progress

    steps = [f"text at T = {t:g}, {len(indices)} prompts" for t, indices in batches(job)]
    num_done = 0
    with progress(console, len(steps), report, found) as step:

        def on_batch(batch: list[dict[str, Any]]) -> None:
            nonlocal num_done
            found.extend(Comparison(**one) for one in batch)
            num_done += 1
            if num_done < len(steps):
                step(steps[num_done])

        step(steps[0])
        await run_child(__name__, [], on_batch, json.dumps(asdict(job)))


def main() -> int:
    """Exit status 2: invalid arguments; the last line of standard error is the message."""
    job = Job(**json.load(sys.stdin))
    return print_lines([asdict(one) for one in batch] for batch in compared(job))


if __name__ == "__main__":
    sys.exit(main())

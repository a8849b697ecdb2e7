"""Re-run of a finished generation at γ = 0: the target computes each position of the output again.

The output is fed to a target one token a pass, as plain decoding does. At each position the
target's own result is compared with what the generation emitted:

- a token that is a function of context and seed (greedy, coupled, bonus and plain tokens) with the
  target's token;
- where a draft token was verified by its support, the target's probabilities on that support.

A re-run has the lowest priority at the target, never preempts another generation, and ends as soon
as users' requests wait. It uses neither Redis nor a draft. The KV of the prompt may come from the
prefix cache, the KV of the output is computed anew.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from orchestrator.audit.observed import ObservedGeneration, VerifiedPosition
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.target_client import TargetHandle, TargetLink, TargetRequest
from orchestrator.speculation.verification import Proposal, VerifyResult
from outrider.errors import OutriderError
from outrider.sampling.params import SamplingParams
from outrider.sampling.random import target_gumbels
from outrider.sampling.support import Support
from outrider.sampling.warp import cuts_off

# The largest number of the field: every other generation is more urgent.
LOWEST_PRIORITY = (1 << 31) - 1
# Longest wait for one verify result. Below `verify_timeout_s`, after which a replica would count as
# unresponsive: under load a prompt of the lowest priority may wait long.
_ROW_TIMEOUT_S = 20.0
# Differing positions of a generation after which the rest is not compared.
_MAX_DIVERGENCES = 16
# Probabilities below this are not compared: their logits are far from the others.
_LEAST_PROB = 1e-6


class AuditDropped(Exception):
    """The re-run was given up; `reason` is a label of the metric."""

    def __init__(self, reason: str, why: str = "") -> None:
        super().__init__(why or reason)
        self.reason = reason


@dataclass(frozen=True)
class Divergence:
    """A position at which the re-run differs. `gap`: difference of the deciding scores, in logits.

    `index`: of the token in the context. `expected_id`: the re-run's token; None: probabilities
    differ.
    """

    index: int
    gap: float
    token_id: int
    expected_id: int | None = None


@dataclass
class Comparison:
    """Result of a re-run. `max_gap`: greatest gap of all divergences, in logits."""

    replica: str
    num_positions: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    max_gap: float = 0.0


class Rerun:
    """Re-run of one generation. `tolerance`: gap up to which probabilities count as equal."""

    def __init__(
        self,
        pool: ReplicaPool[TargetLink],
        generation: ObservedGeneration,
        is_busy: Callable[[], bool],
        tolerance: float,
    ) -> None:
        self._generation = generation
        self._is_busy = is_busy
        self._tolerance = tolerance
        self._max_len = len(generation.token_ids)
        link = pool.pick(max_len=self._max_len)
        if link is None:
            raise AuditDropped("no_target")
        self._link = link

    async def run(self) -> Comparison:
        """Compares every position. Raises AuditDropped."""
        generation = self._generation
        comparison = Comparison(self._link.endpoint)
        try:
            with self._opened(generation.params) as handle:
                for index in range(generation.prompt_len, self._max_len):
                    if len(comparison.divergences) >= _MAX_DIVERGENCES:
                        break
                    divergence = await self._compare(handle, index)
                    comparison.num_positions += 1
                    if divergence is not None:
                        comparison.divergences.append(divergence)
                        comparison.max_gap = max(comparison.max_gap, divergence.gap)
        except TimeoutError as error:
            raise AuditDropped("busy", f"no result within {_ROW_TIMEOUT_S:g} s") from error
        except OutriderError as error:
            raise AuditDropped("failed", str(error)) from error
        return comparison

    async def _compare(self, handle: TargetHandle, index: int) -> Divergence | None:
        generation = self._generation
        token_id = generation.token_ids[index]
        keep_len = index - 1 if index > generation.prompt_len else 0
        position = generation.positions.get(index)
        if position is not None:
            proposal = Proposal(index, (token_id,), (position.support,))
            result = await self._row(handle, keep_len, index, proposal)
            gap = _gap_of_probs(position, result, generation.params)
            return Divergence(index, gap, token_id) if gap > self._tolerance else None
        result = await self._row(handle, keep_len, index, None)
        expected_id = result.sample_ids[0]
        if expected_id == token_id:
            return None
        return Divergence(index, await self._gap(index, expected_id), token_id, expected_id)

    async def _gap(self, index: int, expected_id: int) -> float:
        """By how much the target prefers `expected_id` to the emitted token, in logits.

        Another pass over the whole context computes it: inf if the emitted token has probability 0.
        """
        generation, params = self._generation, self._generation.params
        if params.greedy:  # the probabilities at temperature 1 have the same logits
            params = replace(params, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
        ids = np.array([generation.token_ids[index], expected_id])
        proposal = Proposal(index, (int(ids[0]),), (Support(ids, np.array([0.5, 0.5])),))
        with self._opened(params) as handle:
            result = await self._row(handle, 0, index, proposal)
        with np.errstate(divide="ignore"):
            scores = np.log(result.support_probs[0])
        if not generation.params.greedy:
            scores = scores + target_gumbels(params.seed, index, ids)
        if not np.isfinite(scores).all():
            return math.inf
        return abs(float(scores[1] - scores[0])) * params.temperature

    @contextmanager
    def _opened(self, params: SamplingParams) -> Iterator[TargetHandle]:
        request = TargetRequest(
            session_id=f"audit-{secrets.token_hex(8)}",
            epoch=1,
            prompt_len=self._generation.prompt_len,
            max_len=self._max_len,
            params=replace(params, logprobs=None),
            priority=LOWEST_PRIORITY,
        )
        handle = self._link.open(request, kept_epoch=0, preempts=False, age_s=0.0)
        try:
            yield handle
        finally:
            handle.close(keep=False)

    async def _row(
        self, handle: TargetHandle, keep_len: int, context_len: int, proposal: Proposal | None
    ) -> VerifyResult:
        """The result after the first `context_len` tokens. Raises AuditDropped if users wait."""
        if self._is_busy():
            raise AuditDropped("busy")
        handle.send_verify(keep_len, self._generation.token_ids[keep_len:context_len], proposal)
        async with asyncio.timeout(_ROW_TIMEOUT_S):
            return await handle.reply(proposal, 2 * _ROW_TIMEOUT_S)


def _gap_of_probs(
    position: VerifiedPosition, result: VerifyResult, params: SamplingParams
) -> float:
    """Greatest difference of logits between two results for one position.

    The spread of the log-ratios of their probabilities, times the temperature. It ignores a common
    factor: with top_p a token at the cut may be kept in one of them, and all others be scaled.
    """
    before = np.append(position.target_probs, position.tail_mass)
    after = np.append(result.support_probs[0], result.tail_mass[0])
    if cuts_off(params):
        before, after = before[:-1], after[:-1]
    is_compared = (before > _LEAST_PROB) & (after > _LEAST_PROB)
    if not is_compared.any():
        return 0.0 if cuts_off(params) else math.inf
    log_ratios = np.log(before[is_compared]) - np.log(after[is_compared])
    return float(log_ratios.max() - log_ratios.min()) * params.temperature

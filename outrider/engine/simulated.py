"""An engine without a model: passes that take the time they are told to, draws that agree as often.

For studying other hardware, loads and networks with the services as they are. What the target
emits after token t at position n is a pure function of (seed, n, t), which both tiers know; the
draft's ranking puts it first, second, ... or nowhere, by chance. It imitates costs and acceptance,
not laws: at any temperature the target emits its truth. Knows nothing of rows, trees or the wire.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from outrider.engine.engine import Append
from outrider.engine.interface import (
    NUM_CANDIDATES,
    BlockScores,
    Ids,
    SampledToken,
    SampleRequest,
    ScoreRequest,
)
from outrider.engine.kv.store import PAGE_SIZE, KVStore
from outrider.engine.options import EngineInfo
from outrider.errors import InvalidRequest
from outrider.sampling.params import SamplingParams
from outrider.sampling.random import Purpose, stream_key, uniform
from outrider.settings.simulation import Simulation

# Chance left for tokens that are in a ranking only to fill it.
_FILLER_CHANCE = 1e-4
# What a simulated tier has room for unless it is told: nothing is held, so it may be much.
_KV_TOKENS = 4_194_304


@dataclass(frozen=True)
class SimulatedSampler:
    params: SamplingParams


class SimulatedEngine:
    """As `ServedEngine`. `store` counts up to `kv_cache_tokens` tokens and holds none."""

    def __init__(self, simulation: Simulation, kv_cache_tokens: int | None = None) -> None:
        self._simulation = simulation
        self._costs = simulation.costs
        self._fails_at = time.monotonic() + simulation.fails_after_s
        self.store = KVStore([], (kv_cache_tokens or _KV_TOKENS) // PAGE_SIZE)
        self.info = EngineInfo(
            name="simulated",
            architecture="simulated",
            vocab_size=simulation.vocab_size,
            max_context_len=simulation.context_len,
            eos_token_ids=(),
            dtype="none",
            device="simulated",
            num_parameters=0,
            kv_capacity_tokens=self.store.capacity_tokens,
            model_fingerprint=f"simulated-{simulation.vocab_size}-{simulation.seed}",
            attention_backend="none",
            probe_max_difference=0.0,
        )

    def forward(self, appends: Sequence[Append]) -> None:
        """Takes the pass's time; lengths change after it. Raises like a real one."""
        if not appends:
            return
        started_at = time.perf_counter()
        for sequence, token_ids, num_logits in appends:
            room = min(sequence.max_len, self.info.max_context_len) - sequence.length
            if not self.store.owns(sequence):
                raise ValueError(f"{sequence} is not open in this engine's store")
            if not 0 < len(token_ids) <= room or not 0 <= num_logits <= len(token_ids):
                raise ValueError(
                    f"{len(token_ids)} tokens, {num_logits} logits: not for {sequence}"
                )
        if time.monotonic() >= self._fails_at:
            raise RuntimeError("a simulated pass failed")
        num_tokens = sum(len(append.token_ids) for append in appends)
        pass_s = self._costs.pass_s(num_tokens, len(appends))
        time.sleep(max(0.0, started_at + pass_s - time.perf_counter()))
        for sequence, token_ids, _ in appends:
            sequence.length += len(token_ids)

    def sampler(self, params: SamplingParams, prompt_len: int, vocab_size: int) -> SimulatedSampler:
        """Raises InvalidRequest, by name, for what a simulation does not imitate."""
        for name, is_asked in (
            ("logprobs", params.logprobs is not None),
            ("presence_penalty", params.presence_penalty != 0),
            ("frequency_penalty", params.frequency_penalty != 0),
            ("repetition_penalty", params.repetition_penalty != 1),
            ("logit_bias", bool(params.logit_bias)),
            ("allowed_token_ids", bool(params.allowed_token_ids)),
            ("min_tokens", params.min_tokens > 0 and bool(params.stop_token_ids)),
        ):
            if is_asked:
                raise InvalidRequest(f"sampling.{name}", "a simulated tier does not imitate it")
        return SimulatedSampler(params)

    def truth(self, position: int, previous: int) -> int:
        """What the target emits at `position` after token `previous`."""
        key = stream_key(self._simulation.seed, Purpose.TARGET, position, previous)
        return int(uniform(key) * self._simulation.vocab_size)

    def sample(self, asks: Sequence[SampleRequest], logits: None) -> list[SampledToken | Exception]:
        return [self._sampled(ask) for ask in asks]

    def _sampled(self, ask: SampleRequest) -> SampledToken:
        survival, ranks = self._simulation.survival, self._simulation.ranks
        previous = int(ask.history()[ask.position - 1])
        truth = self.truth(ask.position, previous)
        index = min(ask.position - ask.base_len, len(survival) - 1)
        stands = survival[index]
        chances = [stands, *((1 - stands) * chance for chance in ranks)]
        # Of this position in this block, whatever else is drawn.
        seed = self._simulation.seed
        key = stream_key(seed, Purpose.DRAFT, ask.position, previous * 64 + index)
        rank, level = 0, uniform(key)
        while rank < len(chances) and level >= chances[rank]:
            level -= chances[rank]
            rank += 1
        size = self._simulation.vocab_size
        ids = [(truth + 1 + filler) % size for filler in range(NUM_CANDIDATES)]
        if rank < len(chances):
            ids[rank] = truth
        chances += [_FILLER_CHANCE] * (NUM_CANDIDATES - len(chances))
        scores = np.array([math.log(max(c, 1e-9)) for c in chances], np.float32)
        order = np.argsort(-scores, kind="stable")
        has_support = not ask.is_guess and ask.sampler.params.needs_supports(ask.verification)
        support = (np.array(ids[:1]), np.ones(1, np.float32)) if has_support else None
        return SampledToken(ids[0], support, np.array(ids)[order], scores[order])

    def score(self, asks: Sequence[ScoreRequest], logits: None) -> list[BlockScores | Exception]:
        return [self._replied(ask) for ask in asks]

    def _replied(self, ask: ScoreRequest) -> BlockScores:
        history = ask.history[ask.position - 1 : ask.position - 1 + ask.num_rows].tolist()
        truths = [self.truth(ask.position + i, previous) for i, previous in enumerate(history)]
        if ask.supports is None:
            empty = np.zeros(0, np.float32)
            return BlockScores(np.array(truths), empty, empty, empty, None)
        hits = [ids == truth for ids, truth in zip(ask.supports, truths, strict=False)]
        tail = np.array([float(not hit.any()) for hit in hits], np.float32)
        samples = [self._outside(t, ids) for t, ids in zip(truths, ask.supports, strict=False)]
        probs = np.concatenate(hits).astype(np.float32) if hits else np.zeros(0, np.float32)
        of_samples = np.where(tail > 0, 0.0, -np.inf).astype(np.float32)
        samples += truths[len(samples) :]  # the bonus, where the block has one
        return BlockScores(np.array(samples), probs, tail, of_samples, None)

    def _outside(self, truth: int, support: Ids) -> int:
        token_id = truth
        while token_id in support:  # all the mass is inside: any token will do
            token_id = (token_id + 1) % self._simulation.vocab_size
        return token_id

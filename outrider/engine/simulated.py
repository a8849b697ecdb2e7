"""Simulated engine: passes take a configured time, draft tokens match at a configured rate.

Used to study other hardware, loads and networks with the real services. The target's token at
position n after token t is a pure function of (seed, n, t), or that of a given text; both tiers
know it. The draft ranks it first, second, … or not at all, at random. The engine imitates costs
and acceptance, not distributions: at any temperature the target emits its fixed token.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from outrider.engine.interface import (
    NUM_CANDIDATES,
    Append,
    BlockScores,
    Ids,
    PromptRequest,
    PromptScores,
    SampledToken,
    SampleRequest,
    ScoreRequest,
)
from outrider.engine.kv.store import PAGE_SIZE, KVStore
from outrider.engine.options import EngineInfo
from outrider.errors import ConfigError, InvalidRequest
from outrider.sampling.params import SamplingParams
from outrider.sampling.random import Purpose, stream_key, uniform
from outrider.settings.simulation import Simulation

# Probability given to candidates that only fill up the list.
_FILLER_PROB = 1e-4
# Default KV capacity. A simulation stores no keys or values, so it costs nothing.
_DEFAULT_KV_TOKENS = 4_194_304
# Tokens at the begin of a context that identify its text.
_HEAD_LEN = 16


@dataclass(frozen=True)
class SimulatedSampler:
    """Sampling state of one simulated generation."""

    params: SamplingParams


class SimulatedEngine:
    """Implements `ServedEngine`. `store` counts up to `kv_cache_tokens` tokens and stores none."""

    def __init__(self, simulation: Simulation, kv_cache_tokens: int | None = None) -> None:
        self._simulation = simulation
        self._costs = simulation.costs
        self._fails_at = time.monotonic() + simulation.fails_after_s
        self._texts = _load_texts(simulation.texts)
        self.store = KVStore([], (kv_cache_tokens or _DEFAULT_KV_TOKENS) // PAGE_SIZE)
        self.info = EngineInfo(
            name=simulation.name,
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
            self_test_max_difference=0.0,
        )

    def forward(self, appends: Sequence[Append]) -> None:
        """Take the configured time of a pass, then change lengths. Raises as `Engine.forward`."""
        if not appends:
            return
        started_at = time.perf_counter()
        for sequence, token_ids, num_logits in appends:
            room = min(sequence.max_len, self.info.max_context_len) - sequence.length
            if not self.store.owns(sequence):
                raise ValueError(f"{sequence} is not open in this engine's store")
            if not 0 < len(token_ids) <= room or not 0 <= num_logits <= len(token_ids):
                raise ValueError(
                    f"{len(token_ids)} tokens and {num_logits} logits do not fit {sequence}"
                )
        if time.monotonic() >= self._fails_at:
            raise RuntimeError("a simulated pass failed")
        num_tokens = sum(len(append.token_ids) for append in appends)
        pass_s = self._costs.pass_s(num_tokens, len(appends))
        time.sleep(max(0.0, started_at + pass_s - time.perf_counter()))
        for sequence, token_ids, _ in appends:
            sequence.length += len(token_ids)

    def sampler(
        self,
        params: SamplingParams,
        prompt_len: int,
        vocab_size: int,
        forbidden_ids: Ids | None = None,
    ) -> SimulatedSampler:
        """Raises InvalidRequest naming the field if a parameter cannot be simulated."""
        for name, is_set in (
            ("logprobs", params.logprobs is not None),
            ("presence_penalty", params.presence_penalty != 0),
            ("frequency_penalty", params.frequency_penalty != 0),
            ("repetition_penalty", params.repetition_penalty != 1),
            ("logit_bias", bool(params.logit_bias)),
            ("allowed_token_ids", bool(params.allowed_token_ids)),
            ("structured_outputs", params.structured_outputs is not None),
            ("bad_words_token_ids", bool(params.bad_words_token_ids)),
            ("prompt_logprobs", params.prompt_logprobs is not None),
            ("min_tokens", params.min_tokens > 0 and bool(params.stop_token_ids)),
        ):
            if is_set:
                raise InvalidRequest(f"sampling.{name}", "a simulated tier does not support it")
        return SimulatedSampler(params)

    def truth(self, position: int, previous: int) -> int:
        """The target's token at `position` after token `previous`, outside given texts."""
        key = stream_key(self._simulation.seed, Purpose.TARGET, position, previous)
        return int(uniform(key) * self._simulation.vocab_size)

    def _next(self, position: int, history: Ids) -> int:
        """The target's token at `position` of a context that begins with `history`."""
        text = self._texts.get(tuple(history[:_HEAD_LEN].tolist())) if self._texts else None
        if text is not None and position < len(text):
            return text[position]
        return self.truth(position, int(history[position - 1]))

    def sample(
        self, requests: Sequence[SampleRequest], logits: None
    ) -> list[SampledToken | Exception]:
        return [self._sampled(request) for request in requests]

    def _sampled(self, request: SampleRequest) -> SampledToken:
        survival, ranks = self._simulation.survival, self._simulation.ranks
        history = request.history()
        previous = int(history[request.position - 1])
        truth = self._next(request.position, history)
        index = min(request.position - request.base_len, len(survival) - 1)
        accepted = survival[index]
        probs = [accepted, *((1 - accepted) * prob for prob in ranks)]
        # Keyed by position and block, so that the result does not depend on other samples.
        seed = self._simulation.seed
        key = stream_key(seed, Purpose.DRAFT, request.position, previous * 64 + index)
        rank, level = 0, uniform(key)
        while rank < len(probs) and level >= probs[rank]:
            level -= probs[rank]
            rank += 1
        size = self._simulation.vocab_size
        ids = [(truth + 1 + filler) % size for filler in range(NUM_CANDIDATES)]
        if rank < len(probs):
            ids[rank] = truth
        probs += [_FILLER_PROB] * (NUM_CANDIDATES - len(probs))
        scores = np.array([math.log(max(c, 1e-9)) for c in probs], np.float32)
        order = np.argsort(-scores, kind="stable")
        has_support = not request.is_guess and request.sampler.params.needs_supports(
            request.verification
        )
        support = (np.array(ids[:1]), np.ones(1, np.float32)) if has_support else None
        return SampledToken(ids[0], support, np.array(ids)[order], scores[order])

    def score(
        self, requests: Sequence[ScoreRequest], logits: None
    ) -> list[BlockScores | Exception]:
        return [self._scored(request) for request in requests]

    def score_prompts(
        self, requests: Sequence[PromptRequest], logits: None
    ) -> list[PromptScores | Exception]:
        """Never called: `sampler` refuses prompt_logprobs."""
        raise NotImplementedError("log-probabilities of prompts are not simulated")

    def _scored(self, request: ScoreRequest) -> BlockScores:
        positions = range(request.position, request.position + request.num_rows)
        truths = [self._next(position, request.history) for position in positions]
        if request.supports is None:
            empty = np.zeros(0, np.float32)
            return BlockScores(np.array(truths), empty, empty, empty, None)
        hits = [ids == truth for ids, truth in zip(request.supports, truths, strict=False)]
        tail = np.array([float(not hit.any()) for hit in hits], np.float32)
        samples = [self._outside(t, ids) for t, ids in zip(truths, request.supports, strict=False)]
        on_support = np.concatenate(hits).astype(np.float32) if hits else np.zeros(0, np.float32)
        tail_logprobs = np.where(tail > 0, 0.0, -np.inf).astype(np.float32)
        samples += truths[len(samples) :]  # the bonus, where the block has one
        return BlockScores(np.array(samples), on_support, tail, tail_logprobs, None)

    def _outside(self, truth: int, support: Ids) -> int:
        token_id = truth
        while token_id in support:  # all mass is inside the support: any token outside it
            token_id = (token_id + 1) % self._simulation.vocab_size
        return token_id


def _load_texts(path: str) -> dict[tuple[int, ...], list[int]]:
    """Texts by their first tokens. Raises ConfigError."""
    if not path:
        return {}
    try:
        texts = json.loads(Path(path).read_text())
        return {tuple(map(int, text[:_HEAD_LEN])): list(map(int, text)) for text in texts}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"simulate: texts: {path}: {error}") from error

"""Test case with one generation of every kind of sampling, shared by the sampler tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from outrider.engine.interface import SampleRequest, ScoreRequest
from outrider.engine.sampling.sampler import GenerationSampler
from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.random import Purpose, stream_key, token_gumbels
from outrider.sampling.warp import penalise, warp

PROMPT_LEN = 6
EOS = 1
GAMMA = 3

# Every kind of row; its result must not depend on the others.
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.05},
    {"temperature": 3.0, "logprobs": 3},
    {"top_k": 4},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 5.0},
    {"min_p": 0.1, "top_k": 20, "top_p": 0.8},
    {"temperature": 0, "repetition_penalty": 1.4, "presence_penalty": 0.5},
    {"frequency_penalty": 0.7, "logprobs": 0},
    {"logit_bias": {2: 4.0, 3: -100.0}},
    {"temperature": 0, "allowed_token_ids": (0, 3, 4)},
    {"allowed_token_ids": (2, 4)},
    {"min_tokens": 20, "stop_token_ids": (2, 3)},
    {"temperature": 0, "logprobs": 5},
]


@dataclass(frozen=True)
class Case:
    """One generation of each kind, with one row of logits to sample from and one block to score."""

    params: list[SamplingParams]
    samplers: list[GenerationSampler]
    history: npt.NDArray[np.int64]
    supports: list[list[npt.NDArray[np.int64]] | None]
    sample_logits: torch.Tensor
    score_logits: torch.Tensor

    def sample_requests(self, verification: Verification, *, is_guess: bool) -> list[SampleRequest]:
        return [
            SampleRequest(s, lambda: self.history, 12, 11, verification, is_guess=is_guess)
            for s in self.samplers
        ]

    def score_requests(self) -> list[ScoreRequest]:
        return [
            ScoreRequest(s, self.history, 12, GAMMA + 1, supports)
            for s, supports in zip(self.samplers, self.supports, strict=True)
        ]

    def adjusted(self, logits: torch.Tensor, k: int, position: int) -> npt.NDArray[np.float32]:
        """One row of generation k at `position` after its logits processors, token by token."""
        p, size = self.params[k], logits.shape[-1]
        row = logits.numpy().copy()
        if p.allowed_token_ids:
            row[np.setdiff1d(np.arange(size), p.allowed_token_ids)] = -np.inf
        for token_id, bias in p.logit_bias.items():
            row[token_id] += np.float32(bias)
        if position - PROMPT_LEN < p.min_tokens:
            row[[EOS, *p.stop_token_ids]] = -np.inf
        output = np.bincount(self.history[PROMPT_LEN:position], minlength=size)
        seen = np.bincount(self.history[:position], minlength=size) > 0
        return np.asarray(penalise(row[None], output[None], seen[None], p)[0])

    def scores(self, row: npt.NDArray[np.float32], k: int, position: int) -> Any:
        """Log-probabilities without and with the target's noise."""
        logprobs = warp(row[None], self.params[k])[0]
        key = stream_key(self.params[k].seed, Purpose.TARGET, position)
        return logprobs, logprobs + token_gumbels(np.array([key]), np.arange(len(row)))[0]


def make_case(vocab_size: int, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    params = [
        SamplingParams(max_tokens=50, seed=int(rng.integers(2**63)), **kind) for kind in KINDS
    ]
    samplers = [
        GenerationSampler(
            p, prompt_len=PROMPT_LEN, vocab_size=vocab_size, eos_token_ids=[EOS], device="cpu"
        )
        for p in params
    ]
    num = len(params)
    size = min(vocab_size - 1, 32)
    supports: list[Any] = [
        [rng.choice(vocab_size, size, replace=False) for _ in range(GAMMA)] for _ in params
    ]
    supports[3] = supports[5] = None
    return Case(
        params,
        samplers,
        rng.integers(0, vocab_size, 40),
        supports,
        torch.from_numpy(rng.normal(0, 3, (num, vocab_size)).astype(np.float32)),
        torch.from_numpy(rng.normal(0, 3, (num * (GAMMA + 1), vocab_size)).astype(np.float32)),
    )

"""One generation's way from logits to tokens, on the engine's device: processors, draws, replies.

The target's half answers a block by support (`reply`), the draft's half draws one token and the
support it was drawn from (`draft`). Both apply every processor to the tokens before the position.
Knows nothing of KV, batches or the wire. Called on the device thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from outrider.errors import InvalidRequest
from outrider.sampling import warp
from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.random import Purpose, stream_key, token_gumbels, uniform
from outrider.sampling.support import MAX_SUPPORT_SIZE, Support, truncate

Ids = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
# What the engine's forward pass returns; services pass it on without knowing its type.
Logits = torch.Tensor


@dataclass(frozen=True)
class Logprobs:
    """Of the model's own logits, before any processor; float32.

    `support` [sum of sizes]; `samples` [γ + 1]; `top_ids` uint32 and `top` [γ + 1, n].
    """

    support: Floats
    samples: Floats
    top_ids: Ids
    top: Floats


@dataclass(frozen=True)
class Reply:
    """What the target says of one block; shapes as in target.proto's VerifyResult."""

    sample_ids: Ids
    support_probs: Floats
    tail_mass: Floats
    logprobs: Logprobs | None


class GenerationSampler:
    """Sampling state of one generation: fixed parameters and cached device vectors.

    `vocab_size` cuts the logits: tokens at or beyond it are never drawn or drafted.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_len: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        device: str,
    ) -> None:
        self.params = params
        self._prompt_len = prompt_len
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._token_ids = torch.arange(vocab_size, device=self._device)
        self._bias = self._bias_vector()
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        self._stop_ids = torch.tensor(
            sorted(i for i in stops if i < vocab_size), dtype=torch.int64, device=self._device
        )

    @property
    def is_plain_greedy(self) -> bool:
        """The token is the argmax of the raw logits, at any position."""
        return self.params.greedy and not (
            warp.needs_adjustment(self.params) or self.params.min_tokens
        )

    def _bias_vector(self) -> torch.Tensor | None:
        params, size = self.params, self._vocab_size
        if not (params.logit_bias or params.allowed_token_ids):
            return None
        bias = np.zeros(size, np.float32)
        if params.allowed_token_ids:
            bias[:] = -np.inf
            bias[[i for i in params.allowed_token_ids if i < size]] = 0.0
        for token_id, value in params.logit_bias.items():
            if token_id < size:
                bias[token_id] += value
        return torch.from_numpy(bias).to(self._device)

    def _adjust(self, logits: torch.Tensor, history: Ids, position: int) -> torch.Tensor:
        """Bias, min_tokens, penalties; row i is for position + i, after history[:position + i]."""
        if self._bias is not None:
            logits = logits + self._bias
        num_forbidden = self.params.min_tokens - (position - self._prompt_len)
        if num_forbidden > 0 and len(self._stop_ids):
            logits = logits.clone()
            logits[:num_forbidden, self._stop_ids] = -torch.inf
        if self.params.penalises:
            logits = self._penalise(logits, history, position)
        return logits

    def _penalise(self, logits: torch.Tensor, history: Ids, position: int) -> torch.Tensor:
        num_rows, size = logits.shape
        counts = np.zeros((num_rows, size), np.int32)
        seen = np.zeros((num_rows, size), np.bool_)
        for row in range(num_rows):
            before = history[: position + row]
            before = before[before < size]
            output = history[self._prompt_len : position + row]
            counts[row] = np.bincount(output[output < size], minlength=size)
            seen[row, before] = True
        penalised: torch.Tensor = warp.penalise(
            logits,
            torch.from_numpy(counts).to(self._device),
            torch.from_numpy(seen).to(self._device),
            self.params,
        )
        return penalised

    def _noise(self, position: int, num_rows: int) -> torch.Tensor:
        keys = [
            stream_key(self.params.seed, Purpose.TARGET, position + row) for row in range(num_rows)
        ]
        noise: torch.Tensor = token_gumbels(
            torch.tensor(keys, dtype=torch.int64, device=self._device), self._token_ids
        )
        return noise

    @torch.inference_mode()
    def reply(
        self,
        logits: torch.Tensor,
        history: Ids,
        position: int,
        supports: Sequence[Ids] | None,
        argmax: torch.Tensor | None = None,
    ) -> Reply:
        """The target's answer to a block.

        `logits` float32 [γ + 1, vocab], raw; `history` the context with all draft tokens;
        `position` of the first row's token; `supports` γ arrays of ids, or None for none anywhere;
        `argmax` int64 [γ + 1] of the raw logits where the caller has it already.
        """
        raw = logits[:, : self._vocab_size]
        support_probs = tail_mass = np.zeros(0, np.float32)
        rows, columns = _flat_support(supports, self._device)
        if self.params.greedy:
            if argmax is None or not self.is_plain_greedy:
                argmax = self._adjust(raw, history, position).argmax(-1)
            samples = argmax
            if supports is not None:  # a greedy target is a one-hot distribution
                hits = (samples[rows] == columns).to(torch.float32)
                support_probs = hits.cpu().numpy()
                tail = torch.ones(len(raw), device=self._device).index_add_(0, rows, -hits)
                tail_mass = tail[:-1].cpu().numpy()
        else:
            logprobs = warp.warp(self._adjust(raw, history, position), self.params)
            if supports is not None:
                support_probs = logprobs[rows, columns].exp().to(torch.float32).cpu().numpy()
                logprobs[rows, columns] = -torch.inf
                tail_mass = logprobs[:-1].exp().sum(-1).to(torch.float32).cpu().numpy()
            samples = (logprobs + self._noise(position, len(raw))).argmax(-1)
        return Reply(
            sample_ids=samples.cpu().numpy(),
            support_probs=support_probs,
            tail_mass=tail_mass,
            logprobs=self._logprobs(raw, rows, columns, samples),
        )

    def _logprobs(
        self, raw: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, samples: torch.Tensor
    ) -> Logprobs | None:
        if self.params.logprobs is None:
            return None
        logprobs = warp.log_softmax(raw).to(torch.float32)
        top = logprobs.topk(min(self.params.logprobs, logprobs.shape[-1]), dim=-1)
        return Logprobs(
            support=logprobs[rows, columns].cpu().numpy(),
            samples=logprobs.gather(-1, samples[:, None])[:, 0].cpu().numpy(),
            top_ids=top.indices.cpu().numpy(),
            top=top.values.cpu().numpy(),
        )

    @torch.inference_mode()
    def draft(
        self,
        logits: torch.Tensor,
        history: Ids,
        position: int,
        *,
        base_len: int,
        verification: Verification,
    ) -> tuple[int, tuple[Ids, Floats] | None]:
        """One draft token and, for rejection and block verification, the support it was drawn from.

        `logits` float32 [vocab], raw; `position` of the drawn token, whose block starts at
        `base_len`.
        """
        if self.params.greedy or verification is Verification.COUPLED:
            return self.guess(logits, history, position), None
        logprobs = warp.warp(self._adjust(self._cut(logits), history, position), self.params)[0]
        size = min(MAX_SUPPORT_SIZE, len(logprobs))
        top = logprobs.topk(size)
        if not bool(top.values[0].isfinite()):
            raise InvalidRequest("allowed_token_ids", "none of them is in the draft's vocabulary")
        ids, weights = truncate(top.indices.cpu().numpy(), top.values.exp().cpu().numpy())
        key = stream_key(self.params.seed, Purpose.DRAFT, position, base_len)
        token_id = Support.normalised(ids, weights).draw(uniform(key))
        return token_id, (ids, weights)

    @torch.inference_mode()
    def guess(self, logits: torch.Tensor, history: Ids, position: int) -> int:
        """What the target would emit here were its logits these: its own noise, or the argmax."""
        row = self._cut(logits)
        if self.is_plain_greedy:
            return int(row.argmax())
        row = self._adjust(row, history, position)
        if not self.params.greedy:
            row = warp.warp(row, self.params) + self._noise(position, 1)
        return int(row.argmax())

    def _cut(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[None, : self._vocab_size]


def _flat_support(
    supports: Sequence[Ids] | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    if not supports:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return empty, empty
    sizes = [len(ids) for ids in supports]
    rows = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(device)
    columns = torch.from_numpy(np.concatenate(supports).astype(np.int64)).to(device)
    return rows, columns

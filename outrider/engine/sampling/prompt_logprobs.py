"""Log-probabilities of prompt tokens from the logits of a prompt's pass. Device thread only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from outrider.engine.interface import Ids, PromptRequest, PromptScores
from outrider.engine.sampling.distributions import Distributions
from outrider.errors import NonFiniteLogits
from outrider.sampling.params import SamplingParams

_RAW = SamplingParams()
# Rows that a GPU compares at a time: bounds memory.
_NUM_COMPARED_ROWS = 256


@torch.inference_mode()
def score_prompts(
    requests: Sequence[PromptRequest], logits: torch.Tensor
) -> list[PromptScores | Exception]:
    """Implements `ServedEngine.score_prompts`, each request alone: its rows take much memory."""
    sizes = [len(request.next_token_ids) for request in requests]
    parts = torch.split(logits[len(logits) - sum(sizes) :], sizes)
    return [_scored(request, rows) for request, rows in zip(requests, parts, strict=True)]


def _scored(request: PromptRequest, rows: torch.Tensor) -> PromptScores | Exception:
    if not bool(torch.isfinite(rows.amax(-1)).all()):
        return NonFiniteLogits()
    num = len(rows)
    distributions = Distributions(rows, [_RAW] * num)
    logprobs = distributions.logprobs_at(np.arange(num), request.next_token_ids)
    top_ids, top = distributions.top(max(1, request.num_top))
    return PromptScores(
        logprobs.astype(np.float32),
        top_ids[:, : request.num_top],
        top[:, : request.num_top].astype(np.float32),
        _ranks(rows, request.next_token_ids),
    )


def _ranks(rows: torch.Tensor, token_ids: Ids) -> Ids:
    """1 plus the number of greater logits, of each row's token."""
    own = rows.gather(-1, torch.from_numpy(token_ids).to(rows.device)[:, None])
    # A CPU counts a whole tensor 12 times as fast as along a dimension; a GPU counts many rows.
    num_rows = 1 if rows.device.type == "cpu" else _NUM_COMPARED_ROWS
    parts = (torch.split(each, num_rows) for each in (rows, own))
    counts = [
        torch.count_nonzero(some > one, dim=None if num_rows == 1 else -1).reshape(-1)
        for some, one in zip(*parts, strict=True)
    ]
    return np.asarray(torch.cat(counts).cpu()) + 1

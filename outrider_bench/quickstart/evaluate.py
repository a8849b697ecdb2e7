"""Evaluation of a pair on disk: loss on held-out files, and acceptance rates.

Defines the pair's acceptance rates. Measures the saved models in float32, one position at a time
along the target's own text. Runs no speculation: the acceptance rate of a service also depends on
its supports and its logits processors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from outrider_bench.distill.losses import acceptance
from outrider_bench.quickstart.architecture import num_parameters
from outrider_bench.quickstart.corpus import Corpus, encode_documents, load_corpus
from outrider_bench.quickstart.rollout import continue_rows
from outrider_bench.quickstart.storage import load, load_tokenizer

_LOSS_WINDOW = 512
_LOSS_ROWS_AT_ONCE = 8
_EARLY_TOKENS = 32


@dataclass(frozen=True)
class EvaluationConfig:
    """Number and length of held-out prompts, and length of their continuations."""

    num_prompts: int = 96
    num_prompt_tokens: int = 64
    num_new_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True)
class PairReport:
    """Measurements for the card. Losses are in nats per token, on held-out files."""

    greedy_alpha: float
    early_greedy_alpha: float  # over the first 32 new tokens, before greedy text repeats itself
    sampled_alpha: float
    held_out_loss: float
    draft_held_out_loss: float
    num_target_parameters: int
    num_draft_parameters: int
    num_prompts: int


def evaluate(
    pair_dir: Path, config: EvaluationConfig | None = None, *, corpus: Corpus | None = None
) -> PairReport:
    """Loads the pair in `pair_dir` in float32 and measures it on the held-out files."""
    config = config or EvaluationConfig()
    corpus = corpus or load_corpus()
    target = load(pair_dir / "target")
    draft = load(pair_dir / "draft")
    tokenizer = load_tokenizer(pair_dir / "target")
    stream = encode_documents(tokenizer, corpus.held_out)
    prompts = held_out_prompts(stream, config)
    length = config.num_new_tokens
    return PairReport(
        greedy_alpha=greedy_alpha(target, draft, prompts, num_new_tokens=length),
        early_greedy_alpha=greedy_alpha(
            target, draft, prompts, num_new_tokens=min(length, _EARLY_TOKENS)
        ),
        sampled_alpha=sampled_alpha(
            target, draft, prompts, num_new_tokens=length, seed=config.seed
        ),
        held_out_loss=held_out_loss(target, stream),
        draft_held_out_loss=held_out_loss(draft, stream),
        num_target_parameters=num_parameters(target),
        num_draft_parameters=num_parameters(draft),
        num_prompts=config.num_prompts,
    )


def held_out_prompts(stream: torch.Tensor, config: EvaluationConfig) -> torch.Tensor:
    """Evenly spaced windows of the stream: int64 [num_prompts, num_prompt_tokens]."""
    last = len(stream) - config.num_prompt_tokens
    starts = torch.linspace(0, last, config.num_prompts).long()
    return stream[starts[:, None] + torch.arange(config.num_prompt_tokens)]


@torch.inference_mode()
def greedy_alpha(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    prompts: torch.Tensor,
    *,
    num_new_tokens: int,
) -> float:
    """Share of positions with equal argmaxes, along the target's greedy continuations."""
    rows = continue_rows(
        target,
        prompts,
        num_new_tokens=num_new_tokens,
        temperatures=torch.zeros(len(prompts)),
        generator=torch.Generator(),
    )
    written = rows[:, prompts.shape[1] :]
    predicted = _logits_before(draft, rows, num_new_tokens).argmax(-1)
    return (predicted == written).float().mean().item()


@torch.inference_mode()
def sampled_alpha(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    prompts: torch.Tensor,
    *,
    num_new_tokens: int,
    seed: int,
) -> float:
    """Mean 1 - TV(target, draft) at temperature 1, along text sampled from the target."""
    rows = continue_rows(
        target,
        prompts,
        num_new_tokens=num_new_tokens,
        temperatures=torch.ones(len(prompts)),
        generator=torch.Generator().manual_seed(seed),
    )
    target_log_probs, draft_log_probs = (
        _logits_before(model, rows, num_new_tokens).log_softmax(-1) for model in (target, draft)
    )
    return acceptance(target_log_probs, draft_log_probs).mean().item()


def _logits_before(
    model: LlamaForCausalLM, rows: torch.Tensor, num_new_tokens: int
) -> torch.Tensor:
    """Logits that each of the last tokens is sampled from: [rows, num_new_tokens, vocab]."""
    logits = model(input_ids=rows[:, :-1], use_cache=False, logits_to_keep=num_new_tokens).logits
    assert isinstance(logits, torch.Tensor)
    return logits


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean cross-entropy of the whole stream, in windows of 512 tokens without overlap.

    Raises ValueError if the stream is shorter.
    """
    num_windows = (len(stream) - 1) // _LOSS_WINDOW
    if num_windows == 0:
        raise ValueError(f"the held-out text is shorter than {_LOSS_WINDOW} tokens")
    num_used = num_windows * _LOSS_WINDOW
    inputs = stream[:num_used].view(num_windows, _LOSS_WINDOW)
    labels = stream[1 : num_used + 1].view(num_windows, _LOSS_WINDOW)
    total = 0.0
    for row in range(0, num_windows, _LOSS_ROWS_AT_ONCE):
        chosen = slice(row, row + _LOSS_ROWS_AT_ONCE)
        logits = model(input_ids=inputs[chosen], use_cache=False).logits.flatten(0, 1)
        total += F.cross_entropy(logits, labels[chosen].flatten(), reduction="sum").item()
    return total / num_used

"""From logits to the distribution that is sampled, in vLLM's order.

allowed tokens · logit bias · min_tokens · penalties (`adjust`), then temperature · min_p · top_k ·
top_p (`warp`). Array-API functions: numpy or torch, any device. Knows nothing of sampling, drafts
or sessions: a row is a row.
"""

from __future__ import annotations

from array_api_compat import array_namespace

from outrider.sampling.params import SamplingParams
from outrider.sampling.random import Array


def needs_adjustment(params: SamplingParams) -> bool:
    """Whether `adjust` would change anything (min_tokens is the caller's, by position)."""
    return bool(params.penalises or params.logit_bias or params.allowed_token_ids)


def penalise(logits: Array, output_counts: Array, seen: Array, params: SamplingParams) -> Array:
    """Penalties for repetition, frequency and presence.

    `logits` [n, vocab]; `output_counts` [n, vocab], how often each token stands in the output
    before the row's position; `seen` bool [n, vocab], whether it stands in prompt or output.
    Repetition: Keskar et al. 2019 (arXiv 1909.05858); the others as OpenAI defines them.
    """
    xp = array_namespace(logits)
    repetition = params.repetition_penalty
    if repetition != 1.0:
        weakened = xp.where(logits > 0, logits / repetition, logits * repetition)
        logits = xp.where(seen, weakened, logits)
    counts = xp.astype(output_counts, logits.dtype)
    logits = logits - params.frequency_penalty * counts
    return logits - params.presence_penalty * xp.astype(output_counts > 0, logits.dtype)


def log_softmax(logits: Array) -> Array:
    """float64 [n, vocab]."""
    xp = array_namespace(logits)
    shifted = xp.astype(logits, xp.float64)
    shifted = shifted - xp.max(shifted, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def warp(logits: Array, params: SamplingParams) -> Array:
    """Log-probabilities float64 [n, vocab] after temperature, min_p, top_k and top_p.

    Tokens cut off have -inf. At equal logits a cut keeps all of them. Temperature must be > 0.
    """
    xp = array_namespace(logits)
    minus_inf = xp.asarray(-float("inf"), dtype=xp.float64)
    if hasattr(logits, "device") and minus_inf.device != logits.device:
        minus_inf = xp.asarray(minus_inf, device=logits.device)
    logits = xp.astype(logits, xp.float64) / params.temperature
    logits = logits - xp.max(logits, axis=-1, keepdims=True)
    if params.min_p > 0:
        floor = xp.log(xp.asarray(params.min_p, dtype=xp.float64))
        logits = xp.where(logits >= float(floor), logits, minus_inf)
    vocab_size = logits.shape[-1]
    limits_k = 0 < params.top_k < vocab_size
    if limits_k or params.top_p < 1:
        ordered = xp.sort(logits, axis=-1, descending=True)
        last = ordered[:, params.top_k - 1 : params.top_k] if limits_k else ordered[:, -1:]
        if params.top_p < 1:
            probs = xp.exp(xp.where(ordered >= last, ordered, minus_inf))
            probs = probs / xp.sum(probs, axis=-1, keepdims=True)
            before = xp.cumulative_sum(probs, axis=-1) - probs
            num_kept = xp.sum(xp.astype(before < params.top_p, xp.int64), axis=-1, keepdims=True)
            last = xp.take_along_axis(ordered, num_kept - 1, axis=-1)
        logits = xp.where(logits >= last, logits, minus_inf)
    return logits - xp.log(xp.sum(xp.exp(logits), axis=-1, keepdims=True))

"""Converts logits to the sampling distribution; the steps are in vLLM's order.

Allowed tokens, bad words, logit bias, min_tokens and penalties, then temperature, min_p, top_k and
top_p (`warp`). A cut is represented by its floor, the least logit kept. Array-API functions: numpy
or torch, any device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

from array_api_compat import array_namespace

from outrider.sampling.params import SamplingParams
from outrider.sampling.random import Array


class Penalties(Protocol):
    """Penalties as numbers, like `SamplingParams`, or as arrays."""

    @property
    def presence_penalty(self) -> Any: ...

    @property
    def frequency_penalty(self) -> Any: ...

    @property
    def repetition_penalty(self) -> Any: ...


class Cuts(NamedTuple):
    """Cuts of each row, arrays [n, 1]. `top_k` int64: 0 or less keeps all tokens."""

    log_min_p: Array
    top_k: Array
    top_p: Array


def needs_adjustment(params: SamplingParams) -> bool:
    """Whether logits change before `warp`. Ignores `min_tokens`, which depends on the position."""
    changes = (
        params.logit_bias,
        params.allowed_token_ids,
        params.bad_words_token_ids,
        params.structured_outputs,
    )
    return params.penalises or any(changes)


def penalise(logits: Array, output_counts: Array, seen: Array, penalties: Penalties) -> Array:
    """Logits with the penalties for repetition, frequency and presence applied.

    `output_counts`: occurrences of each token in the output before the row's position. `seen`,
    bool: whether it occurs in prompt or output. Both have the shape of `logits`, which `penalties`
    broadcast to. Repetition: Keskar et al. 2019 (arXiv 1909.05858); others: as defined by OpenAI.
    """
    xp = array_namespace(logits)
    repetition = penalties.repetition_penalty
    weakened = xp.where(logits > 0, logits / repetition, logits * repetition)
    logits = xp.where(seen, weakened, logits)
    counts = xp.astype(output_counts, logits.dtype)
    logits = logits - penalties.frequency_penalty * counts
    return logits - penalties.presence_penalty * xp.astype(output_counts > 0, logits.dtype)


def log_softmax(logits: Array) -> Array:
    """Log-probabilities, float64 [n, vocab]."""
    xp = array_namespace(logits)
    shifted = xp.astype(logits, xp.float64)
    shifted = shifted - xp.max(shifted, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def cuts_off(params: SamplingParams) -> bool:
    """Whether min_p, top_k or top_p may exclude tokens."""
    return params.min_p > 0 or params.top_k > 0 or params.top_p < 1


def log_min_p(params: SamplingParams) -> float:
    """min_p as a floor of scaled logits; -inf if unset."""
    return math.log(params.min_p) if params.min_p > 0 else -math.inf


def limit_floor(ordered: Array, cuts: Cuts) -> Array:
    """The least logit that min_p and top_k keep, float64 [n, 1]; -inf: all are kept.

    `ordered` float64 [n, m]: each row's greatest m scaled logits (`scale`), descending. m must
    be at least the largest top_k that is below the vocabulary's size.
    """
    xp = array_namespace(ordered)
    column = xp.clip(cuts.top_k, 1, ordered.shape[-1]) - 1
    kth = xp.take_along_axis(ordered, column, axis=-1)
    is_limited = (cuts.top_k > 0) & (cuts.top_k <= ordered.shape[-1])
    return xp.where(is_limited, xp.maximum(kth, cuts.log_min_p), cuts.log_min_p)


def nucleus_floor(ordered: Array, floor: Array, mass: Array, cuts: Cuts) -> tuple[Array, Array]:
    """(floor, ends): lowest logit kept by min_p, top_k and top_p, float64 [n, 1]; whether final.

    `floor` from `limit_floor`. `mass` float64 [n, 1]: sum of exp of the row's logits >= floor.
    `ends`, bool: False if the nucleus does not end within `ordered`; then more logits are needed.
    """
    xp = array_namespace(ordered)
    kept = ordered >= floor
    probs = xp.where(kept, xp.exp(ordered), xp.zeros_like(ordered)) / mass
    through = xp.cumulative_sum(probs, axis=-1)
    is_inside = (through - probs < cuts.top_p) & kept
    num_inside = xp.sum(xp.astype(is_inside, xp.int64), axis=-1, keepdims=True)
    last = xp.take_along_axis(ordered, xp.clip(num_inside - 1, 0, ordered.shape[-1]), axis=-1)
    ends = (through[:, -1:] >= cuts.top_p) | (ordered[:, -1:] <= floor)
    limits = cuts.top_p < 1
    return xp.where(limits, xp.maximum(last, floor), floor), ends | ~limits


def scale(logits: Array, temperature: Array) -> Array:
    """Logits / `temperature` (number or [n, 1], > 0), shifted to a maximum of 0; float64."""
    xp = array_namespace(logits)
    scaled = xp.astype(logits, xp.float64) / temperature
    return scaled - xp.max(scaled, axis=-1, keepdims=True)


def warp(logits: Array, params: SamplingParams) -> Array:
    """Log-probabilities float64 [n, vocab] after temperature, min_p, top_k and top_p.

    Excluded tokens have -inf. Tokens tied with the last kept one are kept. Temperature must be > 0.
    """
    xp = array_namespace(logits)
    logits = scale(logits, params.temperature)
    if cuts_off(params):
        ordered = xp.sort(logits, axis=-1, descending=True)
        like = ordered[:, :1]
        cuts = Cuts(
            xp.full_like(like, log_min_p(params)),
            xp.full_like(like, params.top_k, dtype=xp.int64),
            xp.full_like(like, params.top_p),
        )
        floor = limit_floor(ordered, cuts)
        kept = xp.where(ordered >= floor, xp.exp(ordered), xp.zeros_like(ordered))
        floor, _ = nucleus_floor(ordered, floor, xp.sum(kept, axis=-1, keepdims=True), cuts)
        logits = xp.where(logits >= floor, logits, xp.full_like(logits, -math.inf))
    return logits - xp.log(xp.sum(xp.exp(logits), axis=-1, keepdims=True))

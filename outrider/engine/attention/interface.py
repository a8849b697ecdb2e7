"""Attention of one layer over paged keys and values: transformers' entry point and the mathematics.

Owns the function registered with transformers. A context variable, set by `Engine.forward` only,
tells which engine's step a call belongs to, so a process can run any number of engines.

Two implementations: `attend_fused` (torch's kernel) and `attend_explicit` (scores, softmax,
product), for features no torch kernel has: soft-capped scores (Gemma 2) and attention sinks
(gpt-oss). Both take folded queries: the query heads that share a KV head are consecutive rows of
that head. Each key is then read once per group, which was the fastest on CPU for every length from
1 to 512 (`enable_gqa` is up to 6 times slower). `attend_part` computes either over part of the
keys; `merge_parts` combines parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers import AttentionInterface

from outrider.errors import InternalError

ATTENTION_NAME = "outrider"

HIDDEN = -1e30
"""Mask value in parts: a part may hide all keys from a row, and -inf would give NaN there."""

# Internal to torch, but the only CPU kernel that also returns log-sum-exp.
_flash_cpu: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@dataclass(frozen=True, slots=True)
class LayerCall:
    """Arguments of one attention call besides the tensors."""

    scaling: float | None
    window: int | None
    """Sliding window: token i attends to tokens j > i - window."""
    softcap: float | None
    sinks: torch.Tensor | None
    """Attention sinks: one logit per head that takes part in the softmax and is then dropped."""
    others: dict[str, Any]


class Step(Protocol):
    """Attention of one forward pass, called once per layer."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        """query [1, heads, T, D], key/value [1, kv_heads, T, D] → [1, T, heads, value D]."""
        ...


_current_step: ContextVar[Step] = ContextVar("outrider_attention_step")


@contextmanager
def attending(step: Step) -> Iterator[None]:
    """Route the attention calls made in this context to `step`."""
    token = _current_step.set(step)
    try:
        yield
    finally:
        _current_step.reset(token)


def registered_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function that transformers calls for every layer (its AttentionInterface).

    Raises InternalError outside `attending`, or if the model passes a mask.
    """
    try:
        step = _current_step.get()
    except LookupError:
        raise InternalError("an engine's model was called outside Engine.forward") from None
    if attention_mask is not None:
        raise InternalError("the model passed its own attention mask")
    call = LayerCall(scaling, sliding_window, softcap, s_aux, others)
    return step.attend(module, query, key, value, call), None


# No mask function is registered under this name, so transformers creates no mask.
AttentionInterface.register(ATTENTION_NAME, registered_attention)


class AttentionStub:
    """Stub step for a discovery pass: reports every layer's call and returns zeros."""

    def __init__(
        self,
        on_call: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, LayerCall], None],
    ) -> None:
        """`on_call(module, key, value, call)` may raise to refuse the model."""
        self._on_call = on_call

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: LayerCall,
    ) -> torch.Tensor:
        self._on_call(module, key, value, call)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


@dataclass(frozen=True, slots=True)
class QueryBlock:
    """Consecutive new tokens of one sequence, and the range of keys they may attend to.

    Queries are positions [first, last], keys [first_key, last].
    """

    first: int
    last: int
    first_key: int
    window: int | None

    @classmethod
    def of(cls, first: int, last: int, window: int | None) -> QueryBlock:
        return cls(first, last, 0 if window is None else max(0, first + 1 - window), window)

    def mask(self, group: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """0 for visible keys, -inf otherwise: [group * queries, keys]; None: all keys are visible.

        Rows repeat for each of the `group` query heads that share a KV head.
        """
        if self.first == self.last:
            return None
        rows = torch.arange(self.first, self.last + 1, device=device)[:, None]
        columns = torch.arange(self.first_key, self.last + 1, device=device)[None, :]
        hidden = columns > rows
        if self.window is not None:
            hidden |= columns <= rows - self.window
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return mask.masked_fill_(hidden, float("-inf")).repeat(group, 1)


def attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Attention by torch's kernel.

    query [Hkv, rows, D], key [Hkv, keys, D], value [Hkv, keys, Dv] → [Hkv, rows, Dv].
    """
    return functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=scaling
    )[0]


def attend_explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: LayerCall,
) -> torch.Tensor:
    """`attend_fused` with soft-capped scores and sinks; computed in float32."""
    scores = _scores(query, key, call)
    if mask is not None:
        scores += mask.float()
    if call.sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        num_kv_heads, rows, _ = scores.shape
        sinks = call.sinks.float().reshape(num_kv_heads, -1, 1)  # [Hkv, group, 1]
        sinks = sinks.expand(-1, -1, rows // sinks.shape[1]).reshape(num_kv_heads, rows, 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    return torch.matmul(weights, value.float()).to(value.dtype)


def attend_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: LayerCall,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over part of the keys, without sinks, for `merge_parts`.

    query [B, Hkv, rows, D], key [B, Hkv, keys, D], value [B, Hkv, keys, Dv], mask float32 [B, 1,
    rows, keys] of 0 and HIDDEN → ([B, Hkv, rows, Dv], float32 log-sum-exp of the scores [B, Hkv,
    rows]).
    """
    fused = _flash_cpu is not None and query.device.type == "cpu" and call.softcap is None
    if fused and key.shape[-1] == value.shape[-1]:
        out, log_sum = _flash_cpu(query, key, value, attn_mask=mask, scale=call.scaling)
        return out, log_sum
    scores = _scores(query, key, call)
    if mask is not None:
        scores += mask
    log_sum = torch.logsumexp(scores, dim=-1)
    weights = scores.sub_(log_sum[..., None]).exp_()
    return torch.matmul(weights, value.float()).to(value.dtype), log_sum


def merge_parts(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of two disjoint parts; any shapes [..., Dv] and [...]."""
    share = torch.sigmoid(first[1] - second[1])[..., None]
    out = torch.lerp(second[0].float(), first[0].float(), share).to(second[0].dtype)
    return out, torch.logaddexp(first[1], second[1])


def _scores(query: torch.Tensor, key: torch.Tensor, call: LayerCall) -> torch.Tensor:
    """Scores float32 [..., rows, keys], scaled and soft-capped."""
    scaling = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    scores = torch.matmul(query.float() * scaling, key.float().transpose(-1, -2))
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    return scores

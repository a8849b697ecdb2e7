"""JSON of outputs in the shapes of OpenAI's endpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator.generation.counts import SpeculationCounts
from orchestrator.generation.output import Result
from orchestrator.generation.state import EmittedToken, Finish, FinishReason
from outrider.tokenizer import Tokenizer

# JSON has no infinity; vLLM reports this log-probability for it.
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Piece:
    """Part of the output of choice `index`, or all of it; `finish` None: more follows.

    `text_offset`: number of characters of the tokens before it.
    """

    index: int
    text: str
    tokens: Sequence[EmittedToken]
    finish: Finish | None
    text_offset: int = 0

    @property
    def ending(self) -> dict[str, Any]:
        """`finish_reason`, and vLLM's `stop_reason`: the stop string or token that matched."""
        if self.finish is None:
            return {"finish_reason": None}
        stop = self.finish.stop_text
        return {
            "finish_reason": self.finish.reason.value,
            "stop_reason": self.finish.stop_token_id if stop is None else stop,
        }


class TokenTexts:
    """Texts of single tokens, for log-probabilities. `tokenizer` None: the model has none."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """The token's text, as vLLM shows it; a part of a character becomes U+FFFD."""
        return self.content(token_id).decode(errors="replace")

    def content(self, token_id: int) -> bytes:
        """The token's bytes; `token_id:N` without a tokenizer."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            return f"token_id:{token_id}".encode()
        special = tokenizer.special_text(token_id)
        if special is not None:
            return special.encode()
        if tokenizer.token_bytes is not None:
            return tokenizer.token_bytes[token_id]
        return tokenizer.decode([token_id]).encode()


class Format(Protocol):
    """Shape of one endpoint's responses."""

    id_prefix: str
    object: str
    chunk_object: str

    def num_chars(self, piece: Piece) -> int:
        """Number of characters of the piece's tokens, if `Piece.text_offset` is used."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice of the first chunk of a stream, before its output; None: there is none."""

    def delta(self, piece: Piece) -> dict[str, Any]:
        """The choice in a chunk of a stream."""

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The choice in a response that is not streamed."""


class CompletionFormat:
    """`/v1/completions`. `num_logprobs` None: without log-probabilities."""

    id_prefix = "cmpl"
    object = chunk_object = "text_completion"

    def __init__(self, texts: TokenTexts, num_logprobs: int | None) -> None:
        self._texts = texts
        self._num_logprobs = num_logprobs

    def num_chars(self, piece: Piece) -> int:
        if self._num_logprobs is None:
            return 0
        return sum(len(self._texts.text(token.token_id)) for token in piece.tokens)

    def opening(self, index: int) -> None:
        return None

    def delta(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": None if self._num_logprobs is None else self._logprobs(piece),
            **piece.ending,
        }

    whole = delta

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        names = [self._texts.text(token.token_id) for token in piece.tokens]
        offsets, at = [], piece.text_offset
        for name in names:
            offsets.append(at)
            at += len(name)
        return {
            "tokens": names,
            "token_logprobs": [_logprob(token) for token in piece.tokens],
            "top_logprobs": [
                self._top(token, name) for token, name in zip(piece.tokens, names, strict=True)
            ]
            if self._num_logprobs
            else None,
            "text_offset": offsets,
        }

    def _top(self, token: EmittedToken, name: str) -> dict[str, float] | None:
        """The most likely tokens, and the token itself."""
        if token.logprobs is None:
            return None
        top = zip(token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True)
        found: dict[str, float] = {}
        for token_id, logprob in top:  # of two with one text, the more likely
            found.setdefault(self._texts.text(token_id), max(logprob, _LEAST_LOGPROB))
        found.setdefault(name, max(token.logprobs.logprob, _LEAST_LOGPROB))
        return found


class ChatFormat:
    """`/v1/chat/completions`. `num_logprobs` None: without log-probabilities."""

    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, num_logprobs: int | None) -> None:
        self._texts = texts
        self._num_logprobs = num_logprobs

    def num_chars(self, piece: Piece) -> int:
        return 0

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece, "delta", {"content": piece.text})

    def whole(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece, "message", {"role": "assistant", "content": piece.text})

    def _choice(self, piece: Piece, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
        logprobs = None
        if self._num_logprobs is not None:
            logprobs = {"content": [self._logprobs(token) for token in piece.tokens]}
        return {"index": piece.index, name: content, "logprobs": logprobs, **piece.ending}

    def _logprobs(self, token: EmittedToken) -> dict[str, Any]:
        top = []
        if token.logprobs is not None:
            pairs = zip(token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True)
            top = [self._entry(token_id, logprob) for token_id, logprob in pairs]
        return {**self._entry(token.token_id, _logprob(token)), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        content = self._texts.content(token_id)
        return {
            "token": content.decode(errors="replace"),
            "logprob": None if logprob is None else max(logprob, _LEAST_LOGPROB),
            "bytes": list(content),
        }


def _logprob(token: EmittedToken) -> float | None:
    return None if token.logprobs is None else max(token.logprobs.logprob, _LEAST_LOGPROB)


class Envelope:
    """What surrounds the choices: id, model, usage, metrics."""

    def __init__(self, form: Format, request_id: str, model: str) -> None:
        common = {"id": f"{form.id_prefix}-{request_id}", "created": int(time.time())}
        self._whole = {**common, "object": form.object, "model": model}
        self._chunk = {**common, "object": form.chunk_object, "model": model}

    def chunk(self, *choices: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
        """A chunk of a stream."""
        return {**self._chunk, "choices": choices, **fields}

    def whole(self, choices: Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
        """A response that is not streamed."""
        return {**self._whole, "choices": choices, **fields}


def usage(results: Sequence[Result], n: int) -> dict[str, Any]:
    """Token counts of all choices; each prompt is counted once. `n`: choices per prompt."""
    num_prompt = sum(result.num_prompt_tokens for result in results[::n])
    num_output = sum(result.num_completion_tokens for result in results)
    num_cached = sum(result.num_cached_tokens for result in results[::n])
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def metrics(results: Sequence[Result], gamma: int | None) -> dict[str, Any]:
    """Statistics of speculation over all choices, by vLLM's names.

    `draft_acceptance_rate` is accepted / drafted, as vLLM's; `acceptance_rate` is α, as gRPC's: the
    draft tokens after the first rejection are not counted. `acceptance_histogram[j]`: rounds that
    accepted exactly j draft tokens. `gamma`: of the request; None: adaptive.
    """
    total = SpeculationCounts()
    for result in results:
        _add(total, result.counts)
    per_pos = [*total.num_accepted_per_pos, 0]
    at_least = [total.num_drafts, *per_pos]
    num_drafted = total.num_draft_tokens
    return {
        "speculative_decoding": {
            "mean_acceptance_length": total.mean_acceptance_length,
            "draft_acceptance_rate": total.num_accepted_tokens / num_drafted
            if num_drafted
            else None,
            "acceptance_histogram": [
                more - fewer for more, fewer in zip(at_least, per_pos, strict=False)
            ]
            if total.num_drafts
            else [],
            "num_spec_steps": total.num_drafts,
            "num_accepted_draft_tokens": total.num_accepted_tokens,
            "num_draft_tokens": num_drafted,
            "num_spec_tokens": gamma,
            "num_rejected_draft_tokens": total.num_rejected_tokens,
            "acceptance_rate": total.acceptance_rate,
            "num_rounds": total.num_rounds,
        }
    }


def _add(total: SpeculationCounts, counts: SpeculationCounts) -> None:
    total.num_rounds += counts.num_rounds
    total.num_drafts += counts.num_drafts
    total.num_draft_tokens += counts.num_draft_tokens
    total.num_accepted_tokens += counts.num_accepted_tokens
    total.num_rejected_tokens += counts.num_rejected_tokens
    missing = len(counts.num_accepted_per_pos) - len(total.num_accepted_per_pos)
    total.num_accepted_per_pos += [0] * missing
    for position, num in enumerate(counts.num_accepted_per_pos):
        total.num_accepted_per_pos[position] += num


def is_cut_off(finish: Finish | None) -> bool:
    """Whether the output ended because the server stops."""
    return finish is not None and finish.reason is FinishReason.CANCELLED

"""JSON of outputs in the shapes of OpenAI's endpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.generation.output import Chunk
from orchestrator.generation.state import EmittedToken, Finish, FinishReason, TokenOrigin
from orchestrator.http.requests import Plan
from orchestrator.http.tool_calls import ToolCalls
from orchestrator.speculation.verification import PromptLogprobs, TokenLogprobs
from outrider.tokenizer import Tokenizer

# JSON has no infinity; vLLM reports this log-probability for it.
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Piece:
    """Part of the output of choice `index`, or all of it.

    `tokens`: with those of the prompt before them, if they are reported. `finish` None: more
    follows. `text_offset`: number of characters of the tokens before. `extra`: further fields.
    """

    index: int
    text: str
    tokens: Sequence[EmittedToken]
    finish: Finish | None
    text_offset: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ending(self) -> dict[str, Any]:
        """`finish_reason`, vLLM's `stop_reason` (the stop string or token), and `extra`."""
        if self.finish is None:
            return {"finish_reason": None, **self.extra}
        stop = self.finish.stop_text
        return {
            "finish_reason": self.finish.reason.value,
            "stop_reason": self.finish.stop_token_id if stop is None else stop,
            **self.extra,
        }


class TokenTexts:
    """Texts of single tokens, for log-probabilities. `tokenizer` None: the model has none."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """The token's text, as vLLM shows it; a part of a character becomes U+FFFD."""
        return self.content(token_id).decode(errors="replace")

    def name(self, token_id: int) -> str:
        """The token's text; `bytes:` and its bytes in hexadecimal if it is no text by itself.

        OpenAI's way: names of different tokens differ.
        """
        content = self.content(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

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

    def prompt_logprobs(self, found: PromptLogprobs) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: for each token after the first, itself and the most likely."""
        entries: list[dict[str, Any] | None] = [None]
        ranks = found.ranks.tolist() or [None] * len(found.logprobs)
        for token, own_rank in zip(prompt_tokens(found)[1:], ranks, strict=True):
            assert token.logprobs is not None, "only the first token has none"
            top = zip(token.logprobs.top_ids, token.logprobs.top_logprobs, strict=True)
            entry = {
                token_id: self._with_rank(token_id, logprob, rank)
                for rank, (token_id, logprob) in enumerate(top, 1)
            }
            own = self._with_rank(token.token_id, token.logprobs.logprob, own_rank)
            entry = {token.token_id: own} | entry
            entries.append({str(token_id): value for token_id, value in entry.items()})
        return entries

    def _with_rank(self, token_id: int, logprob: float, rank: int | None) -> dict[str, Any]:
        shown = max(logprob, _LEAST_LOGPROB)
        return {"logprob": shown, "rank": rank, "decoded_token": self.text(token_id)}


def prompt_tokens(found: PromptLogprobs) -> list[EmittedToken]:
    """The prompt's tokens with their log-probabilities; the first has none."""
    logprobs: list[TokenLogprobs | None] = [None]
    for logprob, ids, tops in zip(
        found.logprobs.tolist(), found.top_ids.tolist(), found.top_logprobs.tolist(), strict=True
    ):
        logprobs.append(TokenLogprobs(logprob, tuple(ids), tuple(tops)))
    return [
        EmittedToken(token_id, TokenOrigin.REPLAYED, one)
        for token_id, one in zip(found.token_ids, logprobs, strict=True)
    ]


def token_details(chunk: Chunk, num_rounds: int) -> list[dict[str, Any]]:
    """Each token's id, text and origin, and its round; `num_rounds`: rounds before the chunk.

    The texts add up to the chunk's, except for text that a stop string cuts off.
    """
    rounds = [
        {
            "round": number,
            "num_draft_tokens": commitment.num_draft_tokens,
            "draft_source": commitment.source.value,
        }
        for number, commitment in enumerate(chunk.rounds, num_rounds)
        for _ in commitment.tokens
    ]
    details, start = [], 0
    for token, end, its_round in zip(chunk.tokens, chunk.text_ends, rounds, strict=True):
        text, start = chunk.text[start:end], end
        details.append(
            {"id": token.token_id, "text": text, "origin": token.origin.value, **its_round}
        )
    return details


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
    """`/v1/completions`."""

    id_prefix = "cmpl"
    object = chunk_object = "text_completion"

    def __init__(self, texts: TokenTexts, plan: Plan) -> None:
        self._texts = texts
        self._num_logprobs = plan.num_logprobs

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
        names = [self._texts.name(token.token_id) for token in piece.tokens]
        offsets, at = [], piece.text_offset
        for token in piece.tokens:
            offsets.append(at)
            at += len(self._texts.text(token.token_id))
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
            found.setdefault(self._texts.name(token_id), max(logprob, _LEAST_LOGPROB))
        found.setdefault(name, max(token.logprobs.logprob, _LEAST_LOGPROB))
        return found


class ChatFormat:
    """`/v1/chat/completions`. For one request: it reads the tool calls of its choices."""

    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, plan: Plan) -> None:
        self._texts = texts
        self._num_logprobs = plan.num_logprobs
        self._tools = plan.tools
        self._calls: dict[int, ToolCalls] = {}

    def num_chars(self, piece: Piece) -> int:
        return 0

    def opening(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, piece: Piece) -> dict[str, Any]:
        if self._tools is None:
            return self._choice(piece, "delta", {"content": piece.text})
        calls = self._calls.setdefault(piece.index, ToolCalls(self._tools))
        said = calls.push(piece.text, is_end=piece.finish is not None)
        delta: dict[str, Any] = {"content": said.content}
        if said.calls:
            delta["tool_calls"] = said.calls
        return self._choice(piece, "delta", delta, is_call=said.is_call)

    def whole(self, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text}
        if self._tools is None:
            return self._choice(piece, "message", message)
        said = ToolCalls(self._tools).push(piece.text, is_end=True)
        message["content"] = said.content or None
        if said.calls:
            own = ("id", "type", "function")
            message["tool_calls"] = [{name: call[name] for name in own} for call in said.calls]
        return self._choice(piece, "message", message, is_call=said.is_call)

    def _choice(
        self, piece: Piece, name: str, content: Mapping[str, Any], *, is_call: bool = False
    ) -> dict[str, Any]:
        logprobs = None
        if self._num_logprobs is not None:
            logprobs = {"content": [self._logprobs(token) for token in piece.tokens]}
        choice = {"index": piece.index, name: content, "logprobs": logprobs, **piece.ending}
        if is_call and choice["finish_reason"] == FinishReason.STOP.value:
            choice["finish_reason"] = "tool_calls"
        return choice

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


def is_cut_off(finish: Finish | None) -> bool:
    """Whether the output ended because the server stops."""
    return finish is not None and finish.reason is FinishReason.CANCELLED

"""What a turn's prompt is: the session's committed tokens and the new input. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.generation.request import GenerationRequest, Message
from orchestrator.sessions import SessionRecord
from outrider.errors import InvalidRequest
from outrider.tokenizer import Tokenizer

# A text of more characters than these per token of the context is probably too long.
_CHARS_PER_TOKEN = 8
# Tokens at the end of a cut text that may differ from those of the whole text.
_CUT_TOKENS = 256


@dataclass(frozen=True)
class Turn:
    """`token_ids` is the whole context; its first `keep_len` are the session's as committed.

    `messages` is the chat so far with this turn's, empty unless the session is a chat.
    `num_interrupted_tokens`: of the answer before this turn, where its call ended early and what
    was recorded of it became the assistant's message; else None.
    """

    token_ids: list[int]
    keep_len: int
    messages: tuple[Message, ...]
    num_interrupted_tokens: int | None = None


class PromptTooLong(InvalidRequest):
    """Encoding was stopped after `num_tokens`, which are more than fit."""

    def __init__(self, field: str, num_tokens: int, max_tokens: int) -> None:
        super().__init__(field, f"more than {max_tokens} tokens, the most that fit with an output")
        self.num_tokens = num_tokens


def num_chars(request: GenerationRequest, record: SessionRecord) -> int:
    """Characters that `build_turn` has to encode."""
    if request.messages is not None:
        messages = (*record.messages, *request.messages)
        return sum(len(message["content"]) for message in messages)
    return len(request.text or "")


def build_turn(
    request: GenerationRequest,
    record: SessionRecord,
    tokenizer: Tokenizer | None,
    max_context_len: int,
) -> Turn:
    """Takes seconds for the longest texts: call it in a thread. Raises InvalidRequest.

    PromptTooLong where a part of the prompt alone exceeds the context.
    """
    held = record.token_ids
    is_chat = bool(record.messages)
    if len(held) and is_chat != (request.messages is not None):
        kind = "chat messages" if is_chat else "text or token ids"
        raise InvalidRequest(
            "session_id", f"session {record.session_id} was begun with {kind}; continue it so"
        )
    if request.messages is not None:
        assert tokenizer is not None, "chat without a tokenizer was refused"
        messages = (*record.messages, *request.messages)
        text = tokenizer.render_chat(messages)
        token_ids = _encoded(tokenizer, text, "chat", max_context_len, add_special_tokens=False)
        _refuse_empty(token_ids, "chat")
        # Templates may render the past anew; what comes out the same keeps its keys and values.
        return Turn(token_ids, _num_same(held, token_ids), messages)
    if request.token_ids is not None:
        added = list(request.token_ids)
    else:
        assert tokenizer is not None, "text without a tokenizer was refused"
        assert request.text is not None, "a request has one input"
        added = _encoded(
            tokenizer, request.text, "text", max_context_len, add_special_tokens=not len(held)
        )
        _refuse_empty(added, "text")
    return Turn([*held.tolist(), *added], len(held), ())


def _encoded(
    tokenizer: Tokenizer, text: str, field: str, max_tokens: int, *, add_special_tokens: bool
) -> list[int]:
    """The ids. A text that is far too long is not encoded to its end.

    The tokens of a text's beginning differ from the whole text's only close to the cut.
    """
    part = text[: _CHARS_PER_TOKEN * (max_tokens + _CUT_TOKENS)]
    token_ids = tokenizer.encode(part, add_special_tokens=add_special_tokens)
    if len(part) == len(text):
        return token_ids
    if len(token_ids) > max_tokens + _CUT_TOKENS:
        raise PromptTooLong(field, len(token_ids), max_tokens)
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _refuse_empty(token_ids: Sequence[int], field: str) -> None:
    if not token_ids:
        raise InvalidRequest(field, "the prompt has no tokens")


def _num_same(held: np.ndarray, token_ids: Sequence[int]) -> int:
    size = min(len(held), len(token_ids))
    differing = np.flatnonzero(held[:size] != np.asarray(token_ids[:size], held.dtype))
    return int(differing[0]) if len(differing) else size

"""Builds the prompt of a turn: the session's committed tokens and the new input. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from orchestrator.generation.chat import content_text, num_chat_chars, num_message_chars
from orchestrator.generation.request import GenerationRequest, Message
from orchestrator.sessions import SessionRecord
from outrider.errors import InvalidRequest
from outrider.tokenizer import Tokenizer

# A text with more characters per token of the context is probably too long.
_CHARS_PER_TOKEN = 8
# Tokens at the end of a truncated text that may differ from those of the whole text.
_CUT_TOKENS = 256


# Start of an answer that continues no message.
NEW_ANSWER: Message = {"role": "assistant", "content": ""}


@dataclass(frozen=True)
class Turn:
    """Prompt of one turn.

    `token_ids`: the whole context. Its first `keep_len` tokens are committed in the session.
    `messages`: all messages of a chat, with this turn's; empty if the session is no chat. A message
    that is continued is not among them: it is `answer_start`, to which the output is appended.
    `num_interrupted_tokens`: length of the previous answer, if its request ended early and the
    recorded part became the assistant's message; None otherwise.
    """

    token_ids: list[int]
    keep_len: int
    messages: tuple[Message, ...]
    num_interrupted_tokens: int | None = None
    answer_start: Message = field(default_factory=lambda: NEW_ANSWER)

    @property
    def is_chat(self) -> bool:
        return bool(self.messages) or self.answer_start != NEW_ANSWER

    def answer(self, text: str) -> Message:
        """The message that this turn adds to a chat, if its output is `text`."""
        return {**self.answer_start, "content": content_text(self.answer_start) + text}


class PromptTooLong(InvalidRequest):
    """The prompt exceeds the context. Encoding stopped after `num_tokens`."""

    def __init__(self, field: str, num_tokens: int, max_tokens: int) -> None:
        super().__init__(field, f"more than {max_tokens} tokens, the longest context")
        self.num_tokens = num_tokens


def num_chars(request: GenerationRequest, record: SessionRecord) -> int:
    """Number of characters that `build_turn` encodes."""
    if request.messages is not None:
        return sum(map(num_message_chars, record.messages)) + num_chat_chars(request)
    return len(request.text or "")


def build_turn(
    request: GenerationRequest,
    record: SessionRecord,
    tokenizer: Tokenizer | None,
    max_context_len: int,
) -> Turn:
    """Encodes the input and appends it to the session. Call it in a thread: it may take seconds.

    Raises InvalidRequest; PromptTooLong if a part of the prompt alone exceeds the context.
    """
    committed = record.token_ids
    is_chat = bool(record.messages)
    if len(committed) and is_chat != (request.messages is not None):
        kind = "chat messages" if is_chat else "text or token ids"
        raise InvalidRequest(
            "session_id",
            f"session {record.session_id} was started with {kind}; continue it with the same",
        )
    if request.messages is not None:
        assert tokenizer is not None, "chat without a tokenizer was refused"
        return _chat_turn(request, record, tokenizer, max_context_len)
    if request.token_ids is not None:
        added = list(request.token_ids)
    else:
        assert tokenizer is not None, "text without a tokenizer was refused"
        assert request.text is not None, "a request has one input"
        added = _encoded(
            tokenizer, request.text, "text", max_context_len, add_special_tokens=not len(committed)
        )
        _refuse_empty(added, "text")
    return Turn([*committed.tolist(), *added], len(committed), ())


def _chat_turn(
    request: GenerationRequest, record: SessionRecord, tokenizer: Tokenizer, max_context_len: int
) -> Turn:
    messages = (*record.messages, *(request.messages or ()))
    continues, adds_prompt = request.continue_final_message, request.add_generation_prompt
    text = tokenizer.render_chat(
        messages,
        tools=request.tools,
        kwargs=request.chat_template_kwargs,
        add_generation_prompt=not continues if adds_prompt is None else adds_prompt,
        continue_final_message=continues,
    )
    token_ids = _encoded(tokenizer, text, "chat", max_context_len, add_special_tokens=False)
    _refuse_empty(token_ids, "chat")
    # A template may render earlier messages differently: only a common prefix keeps its KV.
    turn = Turn(token_ids, _common_prefix_len(record.token_ids, token_ids), messages)
    if continues:
        turn = replace(turn, messages=messages[:-1], answer_start=messages[-1])
    return turn


def _encoded(
    tokenizer: Tokenizer, text: str, field: str, max_tokens: int, *, add_special_tokens: bool
) -> list[int]:
    """Returns the token ids. Encodes only a prefix of a text that is far too long.

    The prefix has the same tokens as the whole text, except close to its end.
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


def _common_prefix_len(committed: np.ndarray, token_ids: Sequence[int]) -> int:
    size = min(len(committed), len(token_ids))
    differing = np.flatnonzero(committed[:size] != np.asarray(token_ids[:size], committed.dtype))
    return int(differing[0]) if len(differing) else size

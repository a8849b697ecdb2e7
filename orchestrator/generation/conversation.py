"""Builds the prompt of a turn: the session's committed tokens and the new input. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from orchestrator.generation.chat import content_text, num_message_chars, text_size
from orchestrator.generation.request import GenerationRequest, Message
from orchestrator.sessions import SessionRecord
from outrider.errors import InvalidRequest
from outrider.tokenizer import Tokenizer

# More characters of tools than this need not be counted: the request is a long one.
_LONG_TOOLS = 65_536
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
    """Number of characters that `build_turn` encodes. Of long tools, only that they are long."""
    if request.messages is not None:
        messages = (*record.messages, *request.messages)
        variables = (request.tools, request.chat_template_kwargs)
        return sum(map(num_message_chars, messages)) + text_size(variables, _LONG_TOOLS)
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
    keep_last = _num_kept(request, max_context_len)
    if request.token_ids is not None:
        added = list(request.token_ids)
    else:
        assert tokenizer is not None, "text without a tokenizer was refused"
        assert request.text is not None, "a request has one input"
        adds, is_first = request.add_special_tokens, not len(committed)
        encoding = _Encoding(tokenizer, "text", max_context_len, keep_last)
        added = encoding.run(request.text, add_special_tokens=is_first if adds is None else adds)
    token_ids = [*committed.tolist(), *added]
    if keep_last is not None and len(token_ids) > keep_last:
        token_ids = token_ids[-keep_last:]
        return Turn(token_ids, _common_prefix_len(committed, token_ids), ())
    return Turn(token_ids, len(committed), ())


def _num_kept(request: GenerationRequest, max_context_len: int) -> int | None:
    """Maximum tokens of the prompt, of which the last ones are kept; None: all are."""
    num = request.truncate_prompt_tokens
    if num != -1:
        return num
    room = request.max_tokens or max(1, request.params.min_tokens)
    return max(1, max_context_len - room)


def _chat_turn(
    request: GenerationRequest, record: SessionRecord, tokenizer: Tokenizer, max_context_len: int
) -> Turn:
    messages = (*record.messages, *(request.messages or ()))
    continues, adds_prompt = request.continue_final_message, request.add_generation_prompt
    prompt = tokenizer.render_chat(
        messages,
        tools=request.tools,
        kwargs=request.chat_template_kwargs,
        add_generation_prompt=not continues if adds_prompt is None else adds_prompt,
        continue_final_message=continues,
    )
    encoding = _Encoding(tokenizer, "chat", max_context_len, _num_kept(request, max_context_len))
    token_ids = encoding.run(prompt, add_special_tokens=bool(request.add_special_tokens))
    # A template may render earlier messages differently: only a common prefix keeps its KV.
    turn = Turn(token_ids, _common_prefix_len(record.token_ids, token_ids), messages)
    if continues:
        turn = replace(turn, messages=messages[:-1], answer_start=messages[-1])
    return turn


@dataclass(frozen=True)
class _Encoding:
    """Encoding of the prompt in `field`. `keep_last`: number of its last tokens to keep; None: all.

    A text that is far too long is encoded in part only. The part has the same tokens as the whole
    text, except close to where it is cut.
    """

    tokenizer: Tokenizer
    field: str
    max_tokens: int
    keep_last: int | None

    def run(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Raises PromptTooLong, and InvalidRequest for a prompt without tokens."""
        if self.keep_last is not None:
            end = self._end(text, self.keep_last)
            token_ids = self.tokenizer.encode(
                end, add_special_tokens=add_special_tokens, keep_last=self.keep_last
            )
        else:
            token_ids = self._whole(text, add_special_tokens=add_special_tokens)
        if not token_ids:
            raise InvalidRequest(self.field, "the prompt has no tokens")
        return token_ids

    def _whole(self, text: str, *, add_special_tokens: bool) -> list[int]:
        part = text[: _CHARS_PER_TOKEN * (self.max_tokens + _CUT_TOKENS)]
        token_ids = self.tokenizer.encode(part, add_special_tokens=add_special_tokens)
        if len(part) == len(text):
            return token_ids
        if len(token_ids) > self.max_tokens + _CUT_TOKENS:
            raise PromptTooLong(self.field, len(token_ids), self.max_tokens)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _end(self, text: str, num_tokens: int) -> str:
        """An end of the text that is long enough for its last `num_tokens` tokens."""
        part = text[-_CHARS_PER_TOKEN * (num_tokens + _CUT_TOKENS) :]
        if len(part) == len(text):
            return text
        num_found = len(self.tokenizer.encode(part, add_special_tokens=False))
        return part if num_found >= num_tokens + _CUT_TOKENS else text


def _common_prefix_len(committed: np.ndarray, token_ids: Sequence[int]) -> int:
    size = min(len(committed), len(token_ids))
    differing = np.flatnonzero(committed[:size] != np.asarray(token_ids[:size], committed.dtype))
    return int(differing[0]) if len(differing) else size

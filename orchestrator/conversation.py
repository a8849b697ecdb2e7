"""What a turn's prompt is: the session's committed tokens and the new input. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.request import GenerationRequest, Message
from orchestrator.store import SessionRecord
from outrider.errors import InvalidRequest
from outrider.tokenizer import Tokenizer


@dataclass(frozen=True)
class Turn:
    """`token_ids` is the whole context; its first `keep_len` are the session's as committed.

    `messages` is the chat so far with this turn's, empty unless the session is a chat.
    """

    token_ids: list[int]
    keep_len: int
    messages: tuple[Message, ...]


def build_turn(
    request: GenerationRequest, record: SessionRecord, tokenizer: Tokenizer | None
) -> Turn:
    """Takes milliseconds for long texts: call it in a thread. Raises InvalidRequest."""
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
        token_ids = tokenizer.render_chat(messages)
        _refuse_empty(token_ids, "chat")
        # Templates may render the past anew; what comes out the same keeps its keys and values.
        return Turn(token_ids, _num_same(held, token_ids), messages)
    if request.token_ids is not None:
        added = list(request.token_ids)
    else:
        assert tokenizer is not None, "text without a tokenizer was refused"
        assert request.text is not None, "a request has one input"
        added = tokenizer.encode(request.text, add_special_tokens=not len(held))
        _refuse_empty(added, "text")
    return Turn([*held.tolist(), *added], len(held), ())


def _refuse_empty(token_ids: Sequence[int], field: str) -> None:
    if not token_ids:
        raise InvalidRequest(field, "the prompt has no tokens")


def _num_same(held: np.ndarray, token_ids: Sequence[int]) -> int:
    size = min(len(held), len(token_ids))
    differing = np.flatnonzero(held[:size] != np.asarray(token_ids[:size], held.dtype))
    return int(differing[0]) if len(differing) else size

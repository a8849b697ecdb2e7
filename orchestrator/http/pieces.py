"""Pieces of an answer's choices, made of the chunks of their generations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from orchestrator.generation.output import Chunk
from orchestrator.generation.validation import ValidRequest
from orchestrator.http.output import (
    Format,
    Piece,
    TokenTexts,
    is_cut_off,
    prompt_tokens,
    token_details,
)
from orchestrator.http.requests import Plan
from outrider.tokenizer import Tokenizer


class Choice:
    """One choice of an answer. `tokenizer` None: the model has none."""

    def __init__(
        self,
        index: int,
        request: ValidRequest,
        plan: Plan,
        form: Format,
        texts: TokenTexts,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.index = index
        self.request = request
        self.has_begun = False
        self.num_prompt_tokens = self.num_tokens = 0
        self._plan = plan
        self._form = form
        self._texts = texts
        self._tokenizer = tokenizer
        self._num_chars = self._num_rounds = 0

    def piece(self, chunk: Chunk) -> Piece:
        """The next piece. A choice that was cut off has no end: an error follows."""
        finish = None if is_cut_off(chunk.finish) else chunk.finish
        piece = Piece(self.index, chunk.text, chunk.tokens, finish, self._num_chars)
        self.num_tokens += len(chunk.tokens)
        extra: dict[str, Any] = {}
        if self._plan.has_details:
            extra["token_details"] = token_details(chunk, self._num_rounds)
            self._num_rounds += len(chunk.rounds)
        if not self.has_begun:
            self.has_begun = True
            if self._plan.echo:
                piece = replace(piece, text=self._prompt() + piece.text)
            if chunk.prompt_logprobs is not None and self._plan.echo:
                piece = replace(
                    piece, tokens=[*prompt_tokens(chunk.prompt_logprobs), *piece.tokens]
                )
            elif chunk.prompt_logprobs is not None:
                extra["prompt_logprobs"] = self._texts.prompt_logprobs(chunk.prompt_logprobs)
        self._num_chars += self._form.num_chars(piece)
        return replace(piece, extra=extra) if extra else piece

    def _prompt(self) -> str:
        """Text of the prompt, for `echo`."""
        if self.request.text is not None:
            return self.request.text
        assert self._tokenizer is not None, "echo without a tokenizer was refused"
        return self._tokenizer.decode(self.request.token_ids or ())


def joined(pieces: Sequence[Piece]) -> Piece:
    """The pieces of one choice as one."""
    extra = dict(pieces[0].extra)
    if "token_details" in extra:
        parts = (piece.extra["token_details"] for piece in pieces)
        extra["token_details"] = list(chain.from_iterable(parts))
    return Piece(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        list(chain.from_iterable(piece.tokens for piece in pieces)),
        pieces[-1].finish,
        extra=extra,
    )

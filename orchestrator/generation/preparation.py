"""Preparation of a turn before its first round: all work that grows with the size of the request.

Runs in a thread of `prompt_encoder`, so that a request does not block the event loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.generation.conversation import PromptTooLong, Turn, build_turn, num_chars
from orchestrator.generation.request import GenerationRequest
from orchestrator.generation.resume import (
    ResumedTurn,
    interrupted_turn,
    resume_turn,
    turn_json,
)
from orchestrator.generation.state import Commitment, FinishReason, GenerationState
from orchestrator.generation.stop_strings import OutputText
from orchestrator.generation.validation import (
    check_prompt_logprobs,
    check_some_token_is_left,
    resolve_max_tokens,
)
from orchestrator.replicas.models import Limits
from orchestrator.sessions import SessionRecord
from outrider.errors import InvalidRequest
from outrider.grammar import Grammar
from outrider.sampling.params import SamplingParams
from outrider.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreparedTurn:
    """A turn that is ready for its first round.

    `turn_json`: recorded with the turn. `resumed`: set if the request resumes a recorded turn;
    `replayed` is then the return value of `state.replay`.
    """

    request: GenerationRequest
    turn: Turn
    state: GenerationState
    turn_json: str
    resumed: ResumedTurn | None = None
    replayed: tuple[str, Commitment | None] = ("", None)
    # Of the output's format; None: free text.
    grammar: Grammar | None = None

    @property
    def num_unrecorded(self) -> int:
        """Number of tokens that the client has received and that are not recorded."""
        if self.resumed is None:
            return 0
        return max(0, self.resumed.num_received - len(self.resumed.output_ids))


class Preparation:
    """Prepares one turn. Call `run` once, in a thread."""

    def __init__(
        self,
        request: GenerationRequest,
        record: SessionRecord,
        limits: Limits,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._request = request
        self._record = record
        self._limits = limits
        self._tokenizer = tokenizer
        # Number of encoded prompt tokens, set even if the prompt is then refused.
        self.num_encoded_tokens = 0

    @property
    def num_chars(self) -> int:
        """Number of characters to encode."""
        return num_chars(self._request, self._record)

    def run(self) -> PreparedTurn:
        """Returns the prepared turn. Raises InvalidRequest, and the errors of `resume_turn`."""
        if self._request.resume_from is not None:
            return self._resume(self._request.resume_from)
        try:
            turn = self._build_turn()
        except PromptTooLong as error:
            self.num_encoded_tokens = error.num_tokens
            raise
        self.num_encoded_tokens = len(turn.token_ids) - turn.keep_len
        request = resolve_max_tokens(self._request, len(turn.token_ids), self._limits)
        check_prompt_logprobs(request.params, len(turn.token_ids))
        request = replace(request, params=self._with_encoded_bad_words(request.params))
        return PreparedTurn(request, turn, self._state(request, turn), turn_json(request, turn))

    def _with_encoded_bad_words(self, params: SamplingParams) -> SamplingParams:
        if not params.bad_words:
            return params
        assert self._tokenizer is not None, "bad words without a tokenizer were refused"
        sequences = list(params.bad_words_token_ids)
        for word in params.bad_words:
            sequences += _bad_word_sequences(word, self._tokenizer)
        encoded = replace(params, bad_words=(), bad_words_token_ids=tuple(sequences))
        check_some_token_is_left(encoded, self._limits)
        return encoded

    def _resume(self, num_received: int) -> PreparedTurn:
        resumed = resume_turn(self._record, num_received)
        request, turn = self._capped(resumed.request), resumed.turn
        state = self._state(request, turn)
        replayed = state.replay(resumed.output_ids, num_received)
        return PreparedTurn(request, turn, state, turn_json(request, turn), resumed, replayed)

    def _capped(self, request: GenerationRequest) -> GenerationRequest:
        """Caps γ: the orchestrator that began the turn may have had a larger max_gamma."""
        most = self._limits.max_gamma
        gamma = None if request.gamma is None else min(request.gamma, most)
        return replace(request, gamma=gamma, max_gamma=min(request.max_gamma, most))

    def _build_turn(self) -> Turn:
        """Builds the prompt; an interrupted answer of a chat becomes the assistant's message."""
        request, record = self._request, self._record
        tokenizer, max_len = self._tokenizer, self._limits.max_context_len
        interrupted = interrupted_turn(record) if request.messages is not None else None
        if interrupted is None:
            return build_turn(request, record, tokenizer, max_len)
        state = self._state(interrupted.request, interrupted.turn)
        text = state.replayed_text(interrupted.output_ids)
        if state.finish is not None:
            text = text.removesuffix(state.finish.included_stop)
        answer = interrupted.turn.answer(text)
        record = replace(record, messages=(*record.messages, answer))
        turn = build_turn(request, record, tokenizer, max_len)
        if state.finish is not None and state.finish.reason is not FinishReason.CANCELLED:
            return turn  # the answer was complete: only its last write is missing
        return replace(turn, num_interrupted_tokens=len(interrupted.output_ids))

    def _state(self, request: GenerationRequest, turn: Turn) -> GenerationState:
        return GenerationState(
            turn.token_ids,
            request.params,
            request.verification,
            self._limits.eos_token_ids,
            OutputText(
                self._tokenizer,
                turn.token_ids,
                request.params.stop,
                skips_special=request.params.skip_special_tokens,
                includes_stop=request.params.include_stop_str_in_output,
            ),
        )


def _bad_word_sequences(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Token sequences that spell a bad word, as vLLM's: at the start of a text and after a space.

    The second only if it has as many tokens and begins with another one.
    """
    plain = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
    if not plain:
        raise InvalidRequest("sampling.bad_words", f"{word!r} has no tokens")
    spaced = tuple(tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False))
    is_other = len(spaced) == len(plain) and spaced[0] != plain[0]
    return [plain, spaced] if is_other else [plain]

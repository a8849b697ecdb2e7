"""Preparation of a turn before its first round: all work that grows with the size of the request.

Runs in a thread of `prompt_encoder`, so that no request holds up the event loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.generation.conversation import PromptTooLong, Turn, build_turn, num_chars
from orchestrator.generation.request import GenerationRequest
from orchestrator.generation.resume import ResumedTurn, resumed, turn_json, unanswered
from orchestrator.generation.state import Commitment, FinishReason, GenerationState
from orchestrator.generation.stop_strings import OutputText
from orchestrator.generation.validation import resolve_max_tokens
from orchestrator.replicas.models import Limits
from orchestrator.sessions import SessionRecord
from outrider.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreparedTurn:
    """A turn that is ready for its first round.

    `turn_json`: recorded with the turn. `earlier`: the turn was begun at another orchestrator;
    `replayed` is then what `state.replay` returned.
    """

    request: GenerationRequest
    turn: Turn
    state: GenerationState
    turn_json: str
    earlier: ResumedTurn | None = None
    replayed: tuple[str, Commitment | None] = ("", None)

    @property
    def num_unshown(self) -> int:
        """Tokens that the client holds and that were not recorded."""
        if self.earlier is None:
            return 0
        return max(0, self.earlier.num_held - len(self.earlier.output_ids))


class Preparation:
    """Prepares one turn: `run` once, in a thread."""

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
        # Tokens of the prompt that were encoded, also where it is then refused.
        self.num_encoded_tokens = 0

    @property
    def num_chars(self) -> int:
        """Characters to encode."""
        return num_chars(self._request, self._record)

    def run(self) -> PreparedTurn:
        """Raises InvalidRequest, and what `resume` raises for a resumed turn."""
        if self._request.resume_from is not None:
            return self._resume(self._request.resume_from)
        try:
            turn = self._build_turn()
        except PromptTooLong as error:
            self.num_encoded_tokens = error.num_tokens
            raise
        self.num_encoded_tokens = len(turn.token_ids) - turn.keep_len
        request = resolve_max_tokens(self._request, len(turn.token_ids), self._limits)
        return PreparedTurn(request, turn, self._state(request, turn), turn_json(request, turn))

    def _resume(self, num_held: int) -> PreparedTurn:
        earlier = resumed(self._record, num_held)
        request, turn = self._fitted(earlier.request), earlier.turn
        state = self._state(request, turn)
        replayed = state.replay(earlier.output_ids, num_held)
        return PreparedTurn(request, turn, state, turn_json(request, turn), earlier, replayed)

    def _fitted(self, request: GenerationRequest) -> GenerationRequest:
        """The orchestrator it was begun at may have taken more draft tokens a round."""
        most = self._limits.max_gamma
        gamma = None if request.gamma is None else min(request.gamma, most)
        return replace(request, gamma=gamma, max_gamma=min(request.max_gamma, most))

    def _build_turn(self) -> Turn:
        """A chat's answer that was interrupted becomes the assistant's message first."""
        request, record = self._request, self._record
        tokenizer, max_len = self._tokenizer, self._limits.max_context_len
        last = unanswered(record) if request.messages is not None else None
        if last is None:
            return build_turn(request, record, tokenizer, max_len)
        state = self._state(last.request, last.turn)
        answer = {"role": "assistant", "content": state.replayed_text(last.output_ids)}
        record = replace(record, messages=(*record.messages, answer))
        turn = build_turn(request, record, tokenizer, max_len)
        if state.finish is not None and state.finish.reason is not FinishReason.CANCELLED:
            return turn  # the answer had ended: only its last write is missing
        return replace(turn, num_interrupted_tokens=len(last.output_ids))

    def _state(self, request: GenerationRequest, turn: Turn) -> GenerationState:
        return GenerationState(
            turn.token_ids,
            request.params,
            request.verification,
            self._limits.eos_token_ids,
            OutputText(self._tokenizer, turn.token_ids, request.params.stop),
        )

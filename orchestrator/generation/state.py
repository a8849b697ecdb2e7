"""State of one generation: committed tokens, text and counts. Pure: no I/O and no clock.

A commit verifies a round's draft tokens and cuts them at EOS, stop token, stop string and
max_tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from orchestrator.generation.counts import SpeculationCounts
from orchestrator.generation.stop_strings import OutputText
from orchestrator.speculation.verification import (
    PromptLogprobs,
    Proposal,
    SourceName,
    TokenLogprobs,
    VerifyResult,
    logprobs_of,
    verify_proposal,
)
from outrider.errors import InternalError
from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.verify import VerifyOutcome


class TokenOrigin(Enum):
    """How an emitted token was produced."""

    ACCEPTED = "accepted"
    RECOVERED = "recovered"
    BONUS = "bonus"
    PLAIN = "plain"
    # Read from Redis in a resumed turn, which does not record how it was produced.
    REPLAYED = "replayed"


class FinishReason(Enum):
    """Why an output ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Finish:
    """End of an output. For STOP, the one of the other fields that matched is set.

    `included_stop`: end of the output's text that belongs to the stop; "" unless it is included.
    """

    reason: FinishReason
    stop_text: str | None = None
    stop_token_id: int | None = None
    eos_token_id: int | None = None
    included_stop: str = ""


@dataclass(frozen=True)
class EmittedToken:
    """Token of the output. `logprobs` None: not requested, or replayed."""

    token_id: int
    origin: TokenOrigin
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Commitment:
    """Tokens and text that one round added.

    `text_ends[i]`: number of characters of `text` that are final after token i. `source`: where the
    draft tokens came from; NONE without draft tokens.
    """

    tokens: tuple[EmittedToken, ...]
    text: str
    text_ends: tuple[int, ...]
    num_draft_tokens: int
    num_accepted_tokens: int
    is_rejected: bool
    finish: Finish | None
    source: SourceName = SourceName.NONE
    prompt_logprobs: PromptLogprobs | None = None

    def parts(self, num_tokens: int) -> Iterator[Commitment]:
        """Splits a replayed output, which has no draft tokens, into parts of `num_tokens`."""
        for start in range(0, max(1, len(self.tokens)), num_tokens):
            end = start + num_tokens
            is_last = end >= len(self.tokens)
            text_start = self.text_ends[start - 1] if start else 0
            text_end = len(self.text) if is_last else self.text_ends[end - 1]
            yield replace(
                self,
                tokens=self.tokens[start:end],
                text=self.text[text_start:text_end],
                text_ends=tuple(at - text_start for at in self.text_ends[start:end]),
                finish=self.finish if is_last else None,
            )


class GenerationState:
    """State machine of one generation.

    `token_ids`: the committed context; its first `prompt_len` tokens are the prompt.
    """

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        verification: Verification,
        eos_token_ids: Sequence[int],
        text: OutputText,
    ) -> None:
        self.token_ids = list(prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        self.params = params
        self.verification = verification
        self.counts = SpeculationCounts()
        self.finish: Finish | None = None
        # Of the last round, before it was cut at a stop.
        self.outcome: VerifyOutcome | None = None
        # See `verify_proposal`.
        self.planted_bias = 0.0
        self._eos_token_ids = frozenset(eos_token_ids)
        self._text = text

    @property
    def max_len(self) -> int:
        """Length of the prompt and the longest output, in tokens."""
        return self.prompt_len + self.params.max_tokens

    @property
    def committed_len(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return self.committed_len - self.prompt_len

    @property
    def max_draft_tokens(self) -> int:
        """Draft tokens that can still be emitted; the round's own token takes one of the rest."""
        return self.params.max_tokens - self.num_output_tokens - 1

    def commit(self, proposal: Proposal | None, reply: VerifyResult) -> Commitment:
        """Verifies the round's proposal (None: no draft tokens); commits tokens up to a stop.

        Raises InternalError if the output has already ended.
        """
        if self.finish is not None:
            raise InternalError("the generation has already ended")
        base_len = self.committed_len
        outcome = verify_proposal(
            proposal, reply, self.params, self.verification, base_len, self.planted_bias
        )
        self.outcome = outcome
        drafts = proposal.token_ids if proposal is not None else ()
        tokens: list[EmittedToken] = []
        text_ends: list[int] = []
        own_token = () if outcome.next_token is None else (outcome.next_token,)
        for position, token_id in enumerate((*drafts[: outcome.num_accepted], *own_token)):
            origin = _origin(position, outcome.num_accepted, len(drafts))
            logprobs = logprobs_of(token_id, position, proposal, reply, self.params.logprobs)
            tokens.append(EmittedToken(token_id, origin, logprobs))
            self.token_ids.append(token_id)
            self.finish = self._finish_at(token_id)
            text_ends.append(self._text.num_ready)
            if self.finish is not None:
                break
        num_accepted = sum(token.origin is TokenOrigin.ACCEPTED for token in tokens)
        is_rejected = tokens[-1].origin is TokenOrigin.RECOVERED
        source = proposal.source if proposal is not None else SourceName.NONE
        self.counts.add(len(drafts), num_accepted, is_rejected=is_rejected, source=source)
        if self.finish is not None and self.finish.stop_text is None:
            self._text.finish()
            text_ends[-1] = self._text.num_ready
        return Commitment(
            tokens=tuple(tokens),
            text=self._text.take(),
            text_ends=tuple(text_ends),
            num_draft_tokens=len(drafts),
            num_accepted_tokens=num_accepted,
            is_rejected=is_rejected,
            finish=self.finish,
            source=source,
        )

    def replay(self, output_ids: Sequence[int], num_received: int) -> tuple[str, Commitment | None]:
        """Commits the recorded output of a resumed turn. Call it once, before any `commit`.

        `num_received`: number of tokens that the client has. Returns their text, and the tokens
        after them as a round; None: there are none, and the output has not ended.
        """
        received_text, tokens, text_ends = "", [], []
        for index, token_id in enumerate(output_ids):
            if index == num_received:
                received_text = self._text.take()
            self.token_ids.append(token_id)
            self.finish = self._finish_at(token_id)
            if index >= num_received:
                tokens.append(EmittedToken(token_id, TokenOrigin.REPLAYED, None))
                text_ends.append(self._text.num_ready)
            if self.finish is not None:
                break
        if self.finish is not None and self.finish.stop_text is None:
            self._text.finish()
            text_ends = [*text_ends[:-1], self._text.num_ready] if text_ends else []
        if not tokens:  # the text of the end came with the last received token
            received_text = self._text.take()
            if self.finish is None:
                return received_text, None
        text = self._text.take()
        rest = Commitment(tuple(tokens), text, tuple(text_ends), 0, 0, False, self.finish)
        return received_text, rest

    def replayed_text(self, output_ids: Sequence[int]) -> str:
        """Replays a recorded output, as `replay` does, and returns its whole text."""
        _, rest = self.replay(output_ids, 0)
        if rest is None:
            return ""
        return (self.cancel(rest) if rest.finish is None else rest).text

    def cancel(self, commitment: Commitment) -> Commitment:
        """Makes the round just committed the last one.

        Text that was held back is added after the last of `text_ends`. It is not final: a resumed
        output may continue with other text.
        """
        self.finish = Finish(FinishReason.CANCELLED)
        self._text.finish()
        text = commitment.text + self._text.take()
        return replace(commitment, text=text, finish=self.finish)

    def _finish_at(self, token_id: int) -> Finish | None:
        params = self.params
        may_stop = self.num_output_tokens > params.min_tokens
        if may_stop and token_id in self._eos_token_ids and not params.ignore_eos:
            included = self._text.push_stop(token_id)
            return Finish(FinishReason.STOP, eos_token_id=token_id, included_stop=included)
        if may_stop and token_id in params.stop_token_ids:
            included = self._text.push_stop(token_id)
            return Finish(FinishReason.STOP, stop_token_id=token_id, included_stop=included)
        stop_text = self._text.push(token_id, check_stop=may_stop)
        if stop_text is not None:
            included = self._text.included_stop
            return Finish(FinishReason.STOP, stop_text=stop_text, included_stop=included)
        if self.num_output_tokens >= params.max_tokens:
            return Finish(FinishReason.LENGTH)
        return None


def _origin(position: int, num_accepted: int, gamma: int) -> TokenOrigin:
    if position < num_accepted:
        return TokenOrigin.ACCEPTED
    if not gamma:
        return TokenOrigin.PLAIN
    return TokenOrigin.BONUS if num_accepted == gamma else TokenOrigin.RECOVERED

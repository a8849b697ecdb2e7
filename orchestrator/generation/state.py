"""State of one generation: committed tokens, text and counts. Pure: no I/O and no clock.

A commit verifies a round's draft tokens and cuts them at EOS, stop token, stop string and
max_tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from orchestrator.generation.stop_strings import OutputText
from orchestrator.speculation.verification import (
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
    """End of an output. The other fields are set for STOP: the one that matched."""

    reason: FinishReason
    stop_text: str | None = None
    stop_token_id: int | None = None
    eos_token_id: int | None = None


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


@dataclass
class DraftCounts:
    """Counts of draft tokens; `num_drafts`: rounds with draft tokens."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Acceptance rate α = accepted / (accepted + rejected); None without draft tokens.

        Draft tokens after the first rejection are not counted, as in Leviathan et al. 2023, where
        τ follows from α. Accepted / drafted would fall as γ grows.
        """
        num_verified = self.num_accepted_tokens + self.num_rejected_tokens
        return self.num_accepted_tokens / num_verified if num_verified else None

    def add_draft(self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool) -> None:
        """Counts a round with draft tokens."""
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted
        self.num_rejected_tokens += is_rejected


@dataclass
class SpeculationCounts(DraftCounts):
    """Counts of rounds and draft tokens of one generation.

    `num_accepted_per_pos[i]`: rounds in which draft token i was accepted.
    `num_rounds_per_gamma[g]`: rounds with g draft tokens, without the prompt's round.
    """

    num_rounds: int = 0
    num_accepted_per_pos: list[int] = field(default_factory=list)
    num_rounds_per_gamma: list[int] = field(default_factory=list)
    by_source: dict[SourceName, DraftCounts] = field(default_factory=dict)

    @property
    def mean_acceptance_length(self) -> float | None:
        """Mean acceptance length τ: tokens per round with drafts; None without such rounds."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None

    def add(
        self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool, source: SourceName
    ) -> None:
        """Counts a round. `is_rejected`: its last token replaces a rejected draft token."""
        self.num_rounds += 1
        if self.num_rounds > 1:
            missing = num_draft_tokens + 1 - len(self.num_rounds_per_gamma)
            self.num_rounds_per_gamma += [0] * missing
            self.num_rounds_per_gamma[num_draft_tokens] += 1
        if not num_draft_tokens:
            return
        self.add_draft(num_draft_tokens, num_accepted, is_rejected=is_rejected)
        own = self.by_source.setdefault(source, DraftCounts())
        own.add_draft(num_draft_tokens, num_accepted, is_rejected=is_rejected)
        missing = num_draft_tokens - len(self.num_accepted_per_pos)
        self.num_accepted_per_pos += [0] * missing
        for position in range(num_accepted):
            self.num_accepted_per_pos[position] += 1


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
            return Finish(FinishReason.STOP, eos_token_id=token_id)
        if may_stop and token_id in params.stop_token_ids:
            return Finish(FinishReason.STOP, stop_token_id=token_id)
        stop_text = self._text.push(token_id, check_stop=may_stop)
        if stop_text is not None:
            return Finish(FinishReason.STOP, stop_text=stop_text)
        if self.num_output_tokens >= params.max_tokens:
            return Finish(FinishReason.LENGTH)
        return None


def _origin(position: int, num_accepted: int, gamma: int) -> TokenOrigin:
    if position < num_accepted:
        return TokenOrigin.ACCEPTED
    if not gamma:
        return TokenOrigin.PLAIN
    return TokenOrigin.BONUS if num_accepted == gamma else TokenOrigin.RECOVERED

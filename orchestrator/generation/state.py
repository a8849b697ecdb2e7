"""One generation as a pure state machine: what is committed, and what a verdict makes of it.

Cuts at EOS, stop token, stop string and max_tokens inside a block, before anything is committed.
No I/O, no clock, no knowledge of links, Redis or the wire.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from orchestrator.generation.stop_strings import OutputText
from orchestrator.speculation.verification import (
    Proposal,
    TokenLogprobs,
    VerifyResult,
    logprobs_of,
    verify_proposal,
)
from outrider.errors import InternalError
from outrider.sampling.params import SamplingParams, Verification


class TokenOrigin(Enum):
    """Where an emitted token came from."""

    ACCEPTED = "accepted"
    RECOVERED = "recovered"
    BONUS = "bonus"
    PLAIN = "plain"
    # Emitted before the turn was resumed here; how is not recorded.
    EARLIER = "earlier"


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Finish:
    """Why an output ended, and what matched where it was a stop."""

    reason: FinishReason
    stop_text: str | None = None
    stop_token_id: int | None = None
    eos_token_id: int | None = None


@dataclass(frozen=True)
class EmittedToken:
    token_id: int
    origin: TokenOrigin
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Commitment:
    """What one round added.

    `text_ends[i]`: how many characters of `text` are certain after token i.
    """

    tokens: tuple[EmittedToken, ...]
    text: str
    text_ends: tuple[int, ...]
    num_draft_tokens: int
    num_accepted_tokens: int
    is_rejected: bool
    finish: Finish | None

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
class SpeculationCounts:
    """Of one generation. `num_accepted_per_pos[i]`: rounds in which draft token i was accepted."""

    num_rounds: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0
    num_accepted_per_pos: list[int] = field(default_factory=list)
    # [g]: rounds after the prompt's that were verified with g draft tokens.
    num_rounds_per_gamma: list[int] = field(default_factory=list)

    @property
    def acceptance_rate(self) -> float | None:
        """α: the share accepted of the draft tokens that were judged; None without any.

        Those behind a rejection were not. So it is the α of Leviathan et al. 2023, from which
        τ follows; accepted over drafted falls with γ and says little.
        """
        num_judged = self.num_accepted_tokens + self.num_rejected_tokens
        return self.num_accepted_tokens / num_judged if num_judged else None

    @property
    def mean_acceptance_length(self) -> float | None:
        """τ, tokens per round with drafts; None without any."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None

    def add(self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool) -> None:
        """Counts a round; `is_rejected` where its last token stands for a rejected one."""
        self.num_rounds += 1
        if self.num_rounds > 1:
            missing = num_draft_tokens + 1 - len(self.num_rounds_per_gamma)
            self.num_rounds_per_gamma += [0] * missing
            self.num_rounds_per_gamma[num_draft_tokens] += 1
        if not num_draft_tokens:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted
        self.num_rejected_tokens += is_rejected
        missing = num_draft_tokens - len(self.num_accepted_per_pos)
        self.num_accepted_per_pos += [0] * missing
        for position in range(num_accepted):
            self.num_accepted_per_pos[position] += 1


class GenerationState:
    """`token_ids` is the committed context; its first `prompt_len` tokens are the prompt."""

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
        self._eos_token_ids = frozenset(eos_token_ids)
        self._text = text

    @property
    def max_len(self) -> int:
        """Tokens of the prompt and of the longest output."""
        return self.prompt_len + self.params.max_tokens

    @property
    def committed_len(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return self.committed_len - self.prompt_len

    @property
    def max_draft_tokens(self) -> int:
        """More could not be emitted: the round's own token is one of those that are left."""
        return self.params.max_tokens - self.num_output_tokens - 1

    def commit(self, proposal: Proposal | None, reply: VerifyResult) -> Commitment:
        """Judges the round's proposal (None: it had none) and commits what stands, up to a stop."""
        if self.finish is not None:
            raise InternalError("the generation has ended already")
        base_len = self.committed_len
        verdict = verify_proposal(proposal, reply, self.params, self.verification, base_len)
        drafts = proposal.token_ids if proposal is not None else ()
        tokens: list[EmittedToken] = []
        text_ends: list[int] = []
        following = () if verdict.next_token is None else (verdict.next_token,)
        for position, token_id in enumerate((*drafts[: verdict.num_accepted], *following)):
            origin = _origin(position, verdict.num_accepted, len(drafts))
            logprobs = logprobs_of(token_id, position, proposal, reply)
            tokens.append(EmittedToken(token_id, origin, logprobs))
            self.token_ids.append(token_id)
            self.finish = self._finish_at(token_id)
            text_ends.append(self._text.num_ready)
            if self.finish is not None:
                break
        num_accepted = sum(token.origin is TokenOrigin.ACCEPTED for token in tokens)
        is_rejected = tokens[-1].origin is TokenOrigin.RECOVERED
        self.counts.add(len(drafts), num_accepted, is_rejected=is_rejected)
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
        )

    def replay(self, output_ids: Sequence[int], num_held: int) -> tuple[str, Commitment | None]:
        """Commits what was recorded of the output elsewhere; once, before anything else.

        The text of the `num_held` tokens that the caller holds, and what comes after them as a
        round; None: nothing, and the output has not ended.
        """
        held_text, tokens, text_ends = "", [], []
        for index, token_id in enumerate(output_ids):
            if index == num_held:
                held_text = self._text.take()
            self.token_ids.append(token_id)
            self.finish = self._finish_at(token_id)
            if index >= num_held:
                tokens.append(EmittedToken(token_id, TokenOrigin.EARLIER, None))
                text_ends.append(self._text.num_ready)
            if self.finish is not None:
                break
        if self.finish is not None and self.finish.stop_text is None:
            self._text.finish()
            text_ends = [*text_ends[:-1], self._text.num_ready] if text_ends else []
        if not tokens:  # the end's text came with the last of them
            held_text = self._text.take()
            if self.finish is None:
                return held_text, None
        text = self._text.take()
        rest = Commitment(tuple(tokens), text, tuple(text_ends), 0, 0, False, self.finish)
        return held_text, rest

    def replayed_text(self, output_ids: Sequence[int]) -> str:
        """Of an output that was recorded elsewhere, all of it; once, before anything else."""
        _, rest = self.replay(output_ids, 0)
        if rest is None:
            return ""
        return (self.cancel(rest) if rest.finish is None else rest).text

    def cancel(self, commitment: Commitment) -> Commitment:
        """Makes the round just committed the last one.

        What was held back of the text becomes part of it, and stays uncertain: it is behind the
        last of `text_ends`, and an output that goes on elsewhere has its own in its place.
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

"""The pure half of a generation: any verdicts, cut at any stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from orchestrator.generation import recorder
from orchestrator.generation.state import (
    Commitment,
    Finish,
    FinishReason,
    GenerationState,
    TokenOrigin,
)
from orchestrator.generation.stop_strings import OutputText
from orchestrator.speculation.verification import Proposal, VerifyResult
from outrider.errors import InternalError
from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.support import Support
from outrider.tokenizer import Tokenizer

EOS, STOP = 8, 9
PROMPT = [1, 2, 3]
LETTERS = "abc"


@dataclass(frozen=True)
class Round:
    """Draft tokens, and how the target's samples follow them."""

    drafts: tuple[int, ...]
    num_right: int
    samples: tuple[int, ...]
    with_supports: bool


def rounds(tokens: st.SearchStrategy[int], max_gamma: int = 5) -> st.SearchStrategy[list[Round]]:
    def one(gamma: int) -> st.SearchStrategy[Round]:
        some = st.lists(tokens, min_size=gamma, max_size=gamma).map(tuple)
        more = st.lists(tokens, min_size=gamma + 1, max_size=gamma + 1).map(tuple)
        return st.builds(Round, some, st.integers(0, gamma), more, st.booleans())

    return st.lists(st.integers(0, max_gamma).flatmap(one), min_size=1, max_size=12)


def proposal_and_reply(
    made: Round, base_len: int
) -> tuple[Proposal | None, VerifyResult, list[int]]:
    """And the tokens that the round is bound to bring, stops apart."""
    gamma, num_right = len(made.drafts), made.num_right
    samples = list(made.samples)
    nothing = np.zeros(0)
    if not gamma:
        return None, VerifyResult(samples, [nothing], nothing, nothing), samples[:1]
    if made.with_supports:  # p(x) of a right one is 1, of a wrong one 0: all is outside
        supports = tuple(Support(np.array([d], np.int64), np.ones(1)) for d in made.drafts)
        probs = [np.array([float(i < num_right)]) for i in range(gamma)]
        tail = np.array([float(i >= num_right) for i in range(gamma)])
        for i in range(num_right, gamma):  # drawn from outside the support
            samples[i] = samples[i] if samples[i] != made.drafts[i] else (samples[i] + 1) % 8
        with np.errstate(divide="ignore"):
            reply = VerifyResult(samples, probs, tail, np.log(tail))
        proposal = Proposal(base_len, made.drafts, supports)
        return proposal, reply, [*made.drafts[:num_right], samples[num_right]]
    samples[:num_right] = made.drafts[:num_right]
    while num_right < gamma and samples[num_right] == made.drafts[num_right]:
        num_right += 1
    proposal = Proposal(base_len, made.drafts, None)
    reply = VerifyResult(samples, [nothing], nothing, nothing)
    return proposal, reply, [*made.drafts[:num_right], samples[num_right]]


def stop_of(output: Sequence[int], params: SamplingParams) -> Finish | None:
    """Whether an output ends with its last token; in one place, token by token."""
    if len(output) > params.min_tokens:
        if output[-1] == EOS and not params.ignore_eos:
            return Finish(FinishReason.STOP, eos_token_id=EOS)
        if output[-1] in params.stop_token_ids:
            return Finish(FinishReason.STOP, stop_token_id=output[-1])
    if len(output) == params.max_tokens:
        return Finish(FinishReason.LENGTH)
    return None


def state_of(params: SamplingParams, text: OutputText | None = None) -> GenerationState:
    text = text or OutputText(None, PROMPT, ())
    return GenerationState(PROMPT, params, Verification.REJECTION, [EOS], text)


@given(
    made=rounds(st.integers(0, 9)),
    max_tokens=st.integers(1, 30),
    min_tokens=st.integers(0, 30),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (STOP,), (STOP, 7)]),
    greedy=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_outputs_end_where_a_reading_token_by_token_would(
    made: list[Round],
    max_tokens: int,
    min_tokens: int,
    ignore_eos: bool,
    stop_token_ids: tuple[int, ...],
    greedy: bool,
) -> None:
    params = SamplingParams(
        temperature=0.0 if greedy else 1.0,
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens),
        ignore_eos=ignore_eos,
        stop_token_ids=stop_token_ids,
    )
    state = state_of(params)
    output: list[int] = []
    commitments: list[Commitment] = []
    for one in made:
        room = state.max_draft_tokens
        assert room == max_tokens - len(output) - 1 >= 0
        base_len = state.committed_len
        proposal, reply, brought = proposal_and_reply(_cut(one, room), base_len)
        finish = None
        emitted: list[int] = []
        for token_id in brought:
            emitted.append(token_id)
            output.append(token_id)
            finish = stop_of(output, params)
            if finish is not None:
                break
        commitment = state.commit(proposal, reply)
        commitments.append(commitment)
        assert [token.token_id for token in commitment.tokens] == emitted
        assert commitment.finish == state.finish == finish
        assert state.token_ids == PROMPT + output
        drafts = proposal.token_ids if proposal else ()
        assert tuple(emitted[:-1]) == drafts[: len(emitted) - 1], "of the proposal"
        assert base_len + len(emitted) == state.committed_len
        # The target holds the keys and values of so many more tokens that stand.
        assert commitment.num_accepted_tokens in (len(emitted) - 1, len(emitted))
        assert commitment.is_rejected == (commitment.tokens[-1].origin is TokenOrigin.RECOVERED)
        _check_origins(commitment, drafts, brought)
        if finish is not None:
            with pytest.raises(InternalError):
                state.commit(proposal, reply)
            break
    _check_counts(state, commitments)


def _cut(made: Round, room: int) -> Round:
    """As Proposal.head does: no more draft tokens than could be emitted."""
    gamma = min(len(made.drafts), room)
    return Round(
        made.drafts[:gamma],
        min(made.num_right, gamma),
        made.samples[: gamma + 1],
        made.with_supports,
    )


def _check_origins(commitment: Commitment, drafts: Sequence[int], brought: list[int]) -> None:
    origins = [token.origin for token in commitment.tokens]
    num_accepted = len(brought) - 1
    last = TokenOrigin.BONUS if num_accepted == len(drafts) else TokenOrigin.RECOVERED
    expected = [TokenOrigin.ACCEPTED] * num_accepted + [last if drafts else TokenOrigin.PLAIN]
    assert origins == expected[: len(origins)]
    assert commitment.num_accepted_tokens == origins.count(TokenOrigin.ACCEPTED)
    assert commitment.num_draft_tokens == len(drafts)


def _check_counts(state: GenerationState, commitments: list[Commitment]) -> None:
    counts, drafted = state.counts, [c for c in commitments if c.num_draft_tokens]
    assert counts.num_rounds == len(commitments)
    assert counts.num_drafts == len(drafted)
    assert counts.num_draft_tokens == sum(c.num_draft_tokens for c in drafted)
    assert counts.num_accepted_tokens == sum(c.num_accepted_tokens for c in drafted)
    assert counts.num_accepted_tokens == sum(counts.num_accepted_per_pos)
    assert counts.num_accepted_per_pos == sorted(counts.num_accepted_per_pos, reverse=True)
    assert len(counts.num_accepted_per_pos) == max((c.num_draft_tokens for c in drafted), default=0)
    by_gamma = [c.num_draft_tokens for c in commitments[1:]]
    expected = [by_gamma.count(gamma) for gamma in range(max(by_gamma, default=-1) + 1)]
    assert counts.num_rounds_per_gamma == expected, "the prompt's round is not among them"
    emitted = [token for c in commitments for token in c.tokens]
    assert state.num_output_tokens == len(emitted)
    others = sum(token.origin is not TokenOrigin.ACCEPTED for token in emitted)
    assert counts.num_accepted_tokens + others == len(emitted)
    assert (counts.acceptance_rate is None) == (counts.mean_acceptance_length is None)
    assert (counts.acceptance_rate is None) == (not drafted)


@given(
    made=rounds(st.integers(0, 2)),
    stop=st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=2).map(tuple),
    max_tokens=st.integers(1, 30),
    cancelled_after=st.integers(1, 12),
)
@settings(deadline=None, max_examples=300)
def test_text_is_cut_at_stop_strings(
    made: list[Round],
    stop: tuple[str, ...],
    max_tokens: int,
    cancelled_after: int,
    tokenizer: Tokenizer,
) -> None:
    """One letter a token; the reference looks at the whole text after every token."""
    letters = [tokenizer.encode(letter)[0] for letter in LETTERS]
    prompt = tokenizer.encode("the")
    params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=stop)
    state = GenerationState(
        prompt, params, Verification.REJECTION, [], OutputText(tokenizer, prompt, stop)
    )
    shown = ""
    for number, one in enumerate(made, start=1):
        named = Round(
            tuple(letters[i] for i in one.drafts),
            one.num_right,
            tuple(letters[i] for i in one.samples),
            False,
        )
        proposal, reply, _ = proposal_and_reply(
            _cut(named, state.max_draft_tokens), state.committed_len
        )
        commitment = state.commit(proposal, reply)
        assert commitment.text_ends[-1] == len(commitment.text), "all that is shown is certain"
        if commitment.finish is None and number == cancelled_after:
            certain, commitment = commitment.text, state.cancel(commitment)
            assert commitment.text[: commitment.text_ends[-1]] == certain
        assert len(commitment.text_ends) == len(commitment.tokens)
        assert list(commitment.text_ends) == sorted(commitment.text_ends)
        shown += commitment.text
        if commitment.finish is not None:
            break
    full = tokenizer.decode(state.token_ids)[len("the") :]
    finish = state.finish
    if finish is not None and finish.stop_text is not None:
        assert finish.stop_text in stop
        assert full == shown + finish.stop_text
        assert not any(text in shown for text in stop)
        assert not any(text in full[:-1] for text in stop), "at the first token that completes one"
    else:
        assert not any(text in full for text in stop)
        if finish is not None:
            assert shown == full
        else:
            held = full.removeprefix(shown)
            assert shown + held == full
            assert not held or any(text.startswith(held) for text in stop), "no more than needed"


@given(
    made=rounds(st.integers(0, 2)),
    num_tokens=st.integers(1, 7),
    num_held=st.integers(0, 5),
    has_ended=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_a_replayed_output_in_parts_is_the_same_output(
    made: list[Round], num_tokens: int, num_held: int, has_ended: bool, tokenizer: Tokenizer
) -> None:
    letters = [tokenizer.encode(letter)[0] for letter in LETTERS]
    output = [letters[i] for one in made for i in one.samples]
    prompt = tokenizer.encode("the")
    params = SamplingParams(max_tokens=len(output) + 1 - has_ended)
    text = OutputText(tokenizer, prompt, ("zz",))
    state = GenerationState(prompt, params, Verification.REJECTION, [], text)
    _, rest = state.replay(output, num_held)
    if rest is None:
        return
    parts = list(rest.parts(num_tokens))
    assert all(len(part.tokens) <= num_tokens for part in parts)
    assert all(part.text_ends[-1] == len(part.text) for part in parts[:-1])
    shown = recorder._joined(parts, recorded=True)
    assert (shown.tokens, shown.text, shown.finish) == (rest.tokens, rest.text, rest.finish)
    assert shown.text_ends == rest.text_ends
    assert [part.finish for part in parts[:-1]] == [None] * (len(parts) - 1)

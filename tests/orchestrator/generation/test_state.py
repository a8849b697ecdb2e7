"""State of a generation: any verify results, cut at any stop."""

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
    """Draft tokens of a round, and the target's samples after them."""

    drafts: tuple[int, ...]
    num_accepted: int
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
    """Returns the tokens that the round emits without any stop, too."""
    gamma, num_accepted = len(made.drafts), made.num_accepted
    samples = list(made.samples)
    nothing = np.zeros(0)
    if not gamma:
        return None, VerifyResult(samples, [nothing], nothing, nothing), samples[:1]
    if made.with_supports:  # p(x) is 1 for an accepted token, 0 for a rejected one
        supports = tuple(Support(np.array([d], np.int64), np.ones(1)) for d in made.drafts)
        probs = [np.array([float(i < num_accepted)]) for i in range(gamma)]
        tail = np.array([float(i >= num_accepted) for i in range(gamma)])
        for i in range(num_accepted, gamma):  # sampled outside the support
            samples[i] = samples[i] if samples[i] != made.drafts[i] else (samples[i] + 1) % 8
        with np.errstate(divide="ignore"):
            reply = VerifyResult(samples, probs, tail, np.log(tail))
        proposal = Proposal(base_len, made.drafts, supports)
        return proposal, reply, [*made.drafts[:num_accepted], samples[num_accepted]]
    samples[:num_accepted] = made.drafts[:num_accepted]
    while num_accepted < gamma and samples[num_accepted] == made.drafts[num_accepted]:
        num_accepted += 1
    proposal = Proposal(base_len, made.drafts, None)
    reply = VerifyResult(samples, [nothing], nothing, nothing)
    return proposal, reply, [*made.drafts[:num_accepted], samples[num_accepted]]


def stop_of(output: Sequence[int], params: SamplingParams) -> Finish | None:
    """Whether the output ends with its last token; the plain definition."""
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
def test_output_ends_at_the_same_token_as_without_drafts(
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
    for round_ in made:
        room = state.max_draft_tokens
        assert room == max_tokens - len(output) - 1 >= 0
        base_len = state.committed_len
        proposal, reply, uncut = proposal_and_reply(_cut(round_, room), base_len)
        finish = None
        emitted: list[int] = []
        for token_id in uncut:
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
        # Number of accepted tokens, whose KV the target has.
        assert commitment.num_accepted_tokens in (len(emitted) - 1, len(emitted))
        assert commitment.is_rejected == (commitment.tokens[-1].origin is TokenOrigin.RECOVERED)
        _check_origins(commitment, drafts, uncut)
        if finish is not None:
            with pytest.raises(InternalError):
                state.commit(proposal, reply)
            break
    _check_counts(state, commitments)


def _cut(made: Round, room: int) -> Round:
    """Cuts the draft tokens to those that can be emitted, as Proposal.head does."""
    gamma = min(len(made.drafts), room)
    return Round(
        made.drafts[:gamma],
        min(made.num_accepted, gamma),
        made.samples[: gamma + 1],
        made.with_supports,
    )


def _check_origins(commitment: Commitment, drafts: Sequence[int], uncut: list[int]) -> None:
    origins = [token.origin for token in commitment.tokens]
    num_accepted = len(uncut) - 1
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
    assert counts.num_rounds_per_gamma == expected, "without the prompt's round"
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
    """Each token is one letter; the reference searches the whole text after every token."""
    letters = [tokenizer.encode(letter)[0] for letter in LETTERS]
    prompt = tokenizer.encode("the")
    params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=stop)
    state = GenerationState(
        prompt, params, Verification.REJECTION, [], OutputText(tokenizer, prompt, stop)
    )
    sent = ""
    for number, round_ in enumerate(made, start=1):
        spelled = Round(
            tuple(letters[i] for i in round_.drafts),
            round_.num_accepted,
            tuple(letters[i] for i in round_.samples),
            False,
        )
        proposal, reply, _ = proposal_and_reply(
            _cut(spelled, state.max_draft_tokens), state.committed_len
        )
        commitment = state.commit(proposal, reply)
        assert commitment.text_ends[-1] == len(commitment.text), "all sent text is final"
        if commitment.finish is None and number == cancelled_after:
            final, commitment = commitment.text, state.cancel(commitment)
            assert commitment.text[: commitment.text_ends[-1]] == final
        assert len(commitment.text_ends) == len(commitment.tokens)
        assert list(commitment.text_ends) == sorted(commitment.text_ends)
        sent += commitment.text
        if commitment.finish is not None:
            break
    full = tokenizer.decode(state.token_ids)[len("the") :]
    finish = state.finish
    if finish is not None and finish.stop_text is not None:
        assert finish.stop_text in stop
        assert full == sent + finish.stop_text
        assert not any(text in sent for text in stop)
        assert not any(text in full[:-1] for text in stop), "at the first token that completes one"
    else:
        assert not any(text in full for text in stop)
        if finish is not None:
            assert sent == full
        else:
            pending = full.removeprefix(sent)
            assert sent + pending == full
            assert not pending or any(text.startswith(pending) for text in stop)


@given(
    made=rounds(st.integers(0, 2)),
    num_tokens=st.integers(1, 7),
    num_received=st.integers(0, 5),
    has_ended=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_replayed_output_split_into_parts_is_unchanged(
    made: list[Round], num_tokens: int, num_received: int, has_ended: bool, tokenizer: Tokenizer
) -> None:
    letters = [tokenizer.encode(letter)[0] for letter in LETTERS]
    output = [letters[i] for round_ in made for i in round_.samples]
    prompt = tokenizer.encode("the")
    params = SamplingParams(max_tokens=len(output) + 1 - has_ended)
    text = OutputText(tokenizer, prompt, ("zz",))
    state = GenerationState(prompt, params, Verification.REJECTION, [], text)
    _, rest = state.replay(output, num_received)
    if rest is None:
        return
    parts = list(rest.parts(num_tokens))
    assert all(len(part.tokens) <= num_tokens for part in parts)
    assert all(part.text_ends[-1] == len(part.text) for part in parts[:-1])
    joined = recorder._joined(parts, recorded=True)
    assert (joined.tokens, joined.text, joined.finish) == (rest.tokens, rest.text, rest.finish)
    assert joined.text_ends == rest.text_ends
    assert [part.finish for part in parts[:-1]] == [None] * (len(parts) - 1)

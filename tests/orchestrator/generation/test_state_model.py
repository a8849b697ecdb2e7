"""State of a generation against a model that reads the whole output again after every token.

Any proposals and verify results, incomplete characters, stop strings across tokens, EOS, stop
tokens, min_tokens and max_tokens together, resumed by another orchestrator after any round.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from orchestrator.generation.state import (
    Commitment,
    Finish,
    FinishReason,
    GenerationState,
    TokenOrigin,
)
from orchestrator.generation.stop_strings import OutputText
from orchestrator.speculation.verification import VerifyResult
from outrider.errors import InternalError
from outrider.sampling.params import SamplingParams, Verification
from outrider.tokenizer import Tokenizer
from tests.e2e.byte_tokenizer import EOS, bytes_of, load_byte_tokenizer, text_of
from tests.orchestrator.generation.test_state import Round, proposal_and_reply

PROMPT = list(b"say: ")
# Marks the special token, which a stop string may contain and the text does not.
EOS_MARK = "\ue000"
# Letters, spaces, bytes of "é" and "你", an invalid byte, longer tokens, and EOS.
TOKENS = st.sampled_from([*b"abct ", 0xC3, 0xA9, 0xE4, 0xBD, 0xA0, 0xFF, *range(256, EOS), EOS])
STOPS = st.lists(
    st.sampled_from(
        [
            "ab",
            "abc",
            "b",
            "c c",
            "the",
            " t",
            "é",
            "你",
            "a你",
            "caé",
            "aaab",
            "aa",
            "</s>",
            "a</s>b",
        ]
    ),
    max_size=3,
).map(tuple)


@dataclass(frozen=True)
class Resumed:
    """Resumption by another orchestrator; the client has received this share of the output."""

    received: float


def _rounds(gamma: int) -> st.SearchStrategy[Round]:
    some = st.lists(TOKENS, min_size=gamma, max_size=gamma).map(tuple)
    more = st.lists(TOKENS, min_size=gamma + 1, max_size=gamma + 1).map(tuple)
    return st.builds(Round, some, st.integers(0, gamma), more, st.booleans())


ROUNDS = st.integers(0, 4).flatmap(_rounds)
STEPS = st.lists(st.one_of(ROUNDS, ROUNDS, st.builds(Resumed, st.floats(0, 1))), max_size=14)


@dataclass
class Model:
    """Reference implementation: follows the definition, however slowly."""

    params: SamplingParams
    output: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def symbols(self, num_tokens: int) -> str:
        """The text that no later token can change, with a mark for each EOS."""
        decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
        for token_id in self.output[:num_tokens]:
            text += EOS_MARK if token_id == EOS else decoder.decode(bytes_of(token_id))
        return text

    def _found(self) -> tuple[int, int, str] | None:
        """End, negative length and text of the first stop string completed after min_tokens.

        The longest if several end there. The end counts symbols, the length characters of text.
        """
        text = self.symbols(len(self.output))
        searched_len = len(self.symbols(self.params.min_tokens))
        visible_at = [i for i, symbol in enumerate(text) if symbol != EOS_MARK]
        visible = "".join(text[i] for i in visible_at)
        found = [
            (visible_at[at + len(stop) - 1] + 1, -len(stop), stop)
            for stop in self.params.stop
            for at in range(len(visible))
            if visible.startswith(stop, at)
        ]
        for stop in self.params.stop:
            spelled = stop.replace("</s>", EOS_MARK)
            if spelled != stop:
                num_chars = len(spelled) - spelled.count(EOS_MARK)
                starts = [at for at in range(len(text)) if text.startswith(spelled, at)]
                found += [(at + len(spelled), -num_chars, stop) for at in starts]
        return min((match for match in found if match[0] > searched_len), default=None)

    def push(self, token_id: int) -> None:
        params = self.params
        self.output.append(token_id)
        if len(self.output) > params.min_tokens:
            if token_id == EOS and not params.ignore_eos:
                self.finish = Finish(FinishReason.STOP, eos_token_id=EOS)
                return
            if token_id in params.stop_token_ids:
                self.finish = Finish(FinishReason.STOP, stop_token_id=token_id)
                return
            if found := self._found():
                self.finish = Finish(FinishReason.STOP, stop_text=found[2])
                return
        if len(self.output) >= params.max_tokens:
            self.finish = Finish(FinishReason.LENGTH)

    @property
    def sent(self) -> str:
        """All text that was sent to the client."""
        finish, size = self.finish, len(self.output)
        if finish is not None and finish.stop_text is not None:
            found = self._found()
            assert found is not None
            end, negative_len, _ = found
            text = self.symbols(size)[:end].replace(EOS_MARK, "")
            return text[: len(text) + negative_len]
        if finish is not None:
            is_length = finish.reason is FinishReason.LENGTH
            return text_of(self.output if is_length else self.output[:-1])
        text = self.symbols(size)
        return text.replace(EOS_MARK, "")[: -_num_partial_chars(text, self.params.stop) or None]


def _num_partial_chars(text: str, stops: tuple[str, ...]) -> int:
    """Number of characters at the end that are a proper prefix of a stop string."""
    visible = text.replace(EOS_MARK, "")
    spelled = [stop.replace("</s>", EOS_MARK) for stop in stops if "</s>" in stop]
    ends = [n for n in range(1, len(visible) + 1) if _begins(visible[-n:], stops)]
    for n in range(1, len(text) + 1):
        if _begins(text[-n:], spelled):
            ends.append(n - text[-n:].count(EOS_MARK))
    return max(ends, default=0)


def _begins(end: str, stops: Sequence[str]) -> bool:
    return any(stop.startswith(end) and len(stop) > len(end) for stop in stops)


@dataclass
class ClientView:
    """A generation's state, and what its client received: text, and its length after each token."""

    params: SamplingParams
    tokenizer: Tokenizer
    text: str = ""
    ends: list[int] = field(default_factory=list)
    commitments: list[Commitment] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = self._fresh()

    def _fresh(self) -> GenerationState:
        text = OutputText(self.tokenizer, PROMPT, self.params.stop)
        return GenerationState(PROMPT, self.params, Verification.REJECTION, [EOS], text)

    def resume(self, output: list[int], num_received: int) -> None:
        """Replaces the state by a new one that is given only the tokens."""
        self.state, self.commitments = self._fresh(), []
        received_text, rest = self.state.replay(output, num_received)
        received_len = self.ends[num_received - 1] if num_received else 0
        assert received_text == self.text[:received_len]
        rest_text = rest.text if rest is not None else ""
        assert received_text + rest_text == self.text
        assert [t.token_id for t in rest.tokens] == output[num_received:] if rest else True
        assert rest is not None or num_received == len(output)

    def round(self, made: Round) -> tuple[Commitment, list[int]]:
        """Returns the commitment, and the tokens that the round emits without any stop."""
        gamma = min(len(made.drafts), self.state.max_draft_tokens)
        cut = Round(
            made.drafts[:gamma],
            min(made.num_accepted, gamma),
            made.samples[: gamma + 1],
            made.with_supports,
        )
        proposal, reply, uncut = proposal_and_reply(cut, self.state.committed_len)
        commitment = self.state.commit(proposal, reply)
        self.commitments.append(commitment)
        self.ends += [len(self.text) + end for end in commitment.text_ends]
        self.text += commitment.text
        return commitment, uncut


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    return load_byte_tokenizer(directory)


PARAMS = st.builds(
    lambda max_tokens, min_share, ignore_eos, stop_token_ids, stop: SamplingParams(
        max_tokens=max_tokens,
        min_tokens=int(min_share * max_tokens),
        ignore_eos=ignore_eos,
        stop_token_ids=stop_token_ids,
        stop=stop,
    ),
    st.integers(1, 24),
    st.sampled_from([0, 0, 0.2, 0.5, 1]),
    st.booleans(),
    st.sampled_from([(), (ord("t"),), (0xA9, 258)]),
    STOPS,
)


@pytest.mark.slow
@given(params=PARAMS, steps=STEPS)
@settings(deadline=None, max_examples=400)
def test_any_output_equals_the_models(
    params: SamplingParams, steps: list[Round | Resumed], tokenizer: Tokenizer
) -> None:
    model, client = Model(params), ClientView(params, tokenizer)
    for step in steps:
        if isinstance(step, Resumed):
            client.resume(model.output, round(step.received * len(model.output)))
            continue
        commitment, uncut = client.round(step)
        for token_id in uncut:
            model.push(token_id)
            if model.finish is not None:
                break
        assert client.state.finish == commitment.finish == model.finish
        assert client.state.token_ids == PROMPT + model.output
        assert len(model.output) <= params.max_tokens
        assert client.text == model.sent
        assert client.ends == sorted(client.ends)
        assert len(client.ends) == len(model.output)
        assert client.ends[-1] == len(client.text), "all sent text is final"
        _check_counts(client)
        if model.finish is not None:
            with pytest.raises(InternalError):
                client.state.commit(None, VerifyResult([1], (), np.zeros(0), np.zeros(0)))
            break


@given(params=PARAMS, made=st.lists(ROUNDS, min_size=1, max_size=4), received=st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_end_of_a_finished_output_can_be_replayed(
    params: SamplingParams, made: list[Round], received: float, tokenizer: Tokenizer
) -> None:
    """A client that lost the end of a finished output gets it from another orchestrator."""
    client = ClientView(params, tokenizer)
    for round_ in itertools.cycle(made):
        client.round(round_)
        if client.state.finish is not None:
            break
    output, finish = client.state.token_ids[len(PROMPT) :], client.state.finish
    client.resume(output, round(received * len(output)))
    assert client.state.finish == finish


def _check_counts(client: ClientView) -> None:
    """The counts are those of this state's rounds, and agree with its tokens."""
    counts, drafted = client.state.counts, [c for c in client.commitments if c.num_draft_tokens]
    tokens = [token for commitment in client.commitments for token in commitment.tokens]
    accepted = [token for token in tokens if token.origin is TokenOrigin.ACCEPTED]
    recovered = [token for token in tokens if token.origin is TokenOrigin.RECOVERED]
    assert counts.num_rounds == len(client.commitments)
    assert counts.num_drafts == len(drafted)
    assert counts.num_draft_tokens == sum(c.num_draft_tokens for c in drafted)
    assert counts.num_accepted_tokens == len(accepted) == sum(counts.num_accepted_per_pos)
    assert counts.num_rejected_tokens == len(recovered)
    assert counts.num_accepted_tokens + counts.num_rejected_tokens <= counts.num_draft_tokens
    assert sum(counts.num_rounds_per_gamma) == max(0, counts.num_rounds - 1)
    assert (counts.acceptance_rate or 0) <= 1

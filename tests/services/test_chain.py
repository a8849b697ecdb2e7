"""The draft's chain against a model of it: any outcomes, any look-ahead, any room."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from draft_service.chain import Block, Chain
from draft_service.messages import Outcome
from outrider.errors import InvalidRequest

VOCAB_SIZE = 3  # small, so that guesses are often right by chance
tokens = st.integers(0, VOCAB_SIZE - 1)


class ChainMachine(RuleBasedStateMachine):
    """Plays the model that draws tokens and the orchestrator that commits outcomes.

    `num_seen` stands for the KV: how many tokens of the buffer the model has run.
    """

    @initialize(
        prompt=st.lists(tokens, min_size=1, max_size=4),
        room=st.integers(2, 30),
        gamma=st.integers(0, 4),
        lookahead=st.integers(0, 3),
    )
    def open(self, prompt: list[int], room: int, gamma: int, lookahead: int) -> None:
        buffer = np.full(len(prompt) + room, -1, np.int64)
        buffer[: len(prompt)] = prompt
        self.chain = Chain(buffer, len(prompt), gamma, lookahead)
        self.gamma, self.lookahead = gamma, lookahead
        self.committed = list(prompt)
        self.current: tuple[int, tuple[int, ...]] = (0, ())  # under verification: id, tokens
        self.proposals: dict[int, tuple[Outcome, int, tuple[int, ...]]] = {}
        self.ids: list[int] = []
        self.expected: Outcome | None = None
        self.seen: list[int] = []

    @precondition(lambda self: self.chain.wants_token)
    @rule(token=tokens)
    def draw(self, token: int) -> None:
        """One model step: the pending tokens are run, one is drawn."""
        chain = self.chain
        assert len(self.seen) < chain.length, "there is something to run"
        self.seen = chain.token_ids[: chain.length].tolist()
        was_guess, position = chain.next_is_guess, chain.length
        block = chain.add(token, None)
        assert chain.token_ids[position] == token
        assert chain.length == position + 1
        if block is not None:
            assert not was_guess
            self._proposed(block)

    def _proposed(self, block: Block) -> None:
        drafted = tuple(self.chain.token_ids[block.base_len : block.end].tolist())
        assert 1 <= len(drafted) == block.gamma <= 4
        assert block.id not in self.proposals, "an id is used once"
        assert not self.ids or block.id > self.ids[-1]
        outcome, base_len = block.outcome, block.base_len
        if base_len == len(self.committed):
            assert outcome.next_token == self.committed[-1]
        else:  # ahead: of everything in its parent, which is out already or under verification
            parents = {self.current[0]: (len(self.committed), self.current[1])} | {
                number: (start, held) for number, (_, start, held) in self.proposals.items()
            }
            start, held = parents[outcome.parent]
            assert outcome.num_accepted == len(held)
            assert base_len == start + len(held) + 1
        before = self.chain.token_ids[:base_len].tolist()
        assert before[: len(self.committed)] == self.committed
        assert before[-1] == outcome.next_token
        self.proposals[block.id] = (outcome, base_len, drafted)
        self.ids.append(block.id)

    def _commit(self, outcome: Outcome, accepted: tuple[int, ...], gamma: int) -> None:
        before = self.committed
        self.committed = [*before, *accepted, outcome.next_token]
        num_right = self.chain.commit(outcome, len(self.committed), gamma)
        self.gamma = gamma
        self.seen = self.seen[: min(len(self.seen), num_right)]
        buffer = self.chain.token_ids[: self.chain.length].tolist()
        assert self.seen == buffer[: len(self.seen)], "the KV that stays is of the buffer"
        assert len(self.seen) < len(buffer)
        chosen = [
            (number, held)
            for number, (named, base_len, held) in self.proposals.items()
            if (named, base_len) == (outcome, len(self.committed))
        ]
        assert len(chosen) <= 1, "one proposal an outcome"
        self.current = (0, ())
        self.expected = outcome
        if chosen and gamma > 0:
            self.current = chosen[0]
            assert self.chain.current_block.id >= chosen[0][0], "kept"

    def _room(self) -> int:
        return len(self.chain.token_ids) - len(self.committed)

    def _in_hand(self) -> tuple[int, tuple[int, ...]]:
        """The proposal for what is committed: it may have come since the commit.

        None is taken where the commit asked for none (gamma 0).
        """
        if not self.gamma:
            return 0, ()
        for number, (named, base_len, held) in self.proposals.items():
            if (named, base_len) == (self.expected, len(self.committed)):
                return number, held
        return self.current

    @precondition(lambda self: self._room() >= 1)
    @rule(data=st.data(), gamma=st.integers(0, 4))
    def commit_a_verdict(self, data: st.DataObject, gamma: int) -> None:
        """Any number of the proposal's tokens, any next token."""
        number, held = self._in_hand()
        num_accepted = data.draw(st.integers(0, min(len(held), self._room() - 1)))
        token = data.draw(tokens)
        self._commit(Outcome(number, num_accepted, token), held[:num_accepted], gamma)

    @precondition(lambda self: self._room() >= 1)
    @rule(token=tokens, gamma=st.integers(0, 4))
    def commit_a_round_without_drafts(self, token: int, gamma: int) -> None:
        """The orchestrator did not wait for the proposal."""
        self._commit(Outcome(0, 0, token), (), gamma)

    @precondition(lambda self: self._room() >= 1)
    @rule(parent=st.integers(0, 40), num_accepted=st.integers(0, 6), shift=st.integers(-2, 2))
    def contradict(self, parent: int, num_accepted: int, shift: int) -> None:
        """What does not follow is refused and changes nothing."""
        length = len(self.committed) + num_accepted + 1 + shift
        number, held = self._in_hand()
        if shift == 0 and (parent, num_accepted <= len(held)) in ((number, True),):
            return
        if shift == 0 and parent == 0 and num_accepted == 0:
            return
        block = self.chain._blocks[0]
        if shift == 0 and parent == block.id and num_accepted <= block.num_tokens:
            return  # of a proposal half drafted: no peer can know of it
        before = (self.chain.token_ids.tolist(), self.chain.length, self.chain.wants_token)
        with pytest.raises(InvalidRequest):
            self.chain.commit(Outcome(parent, num_accepted, 0), length, 2)
        assert before == (
            self.chain.token_ids.tolist(), self.chain.length, self.chain.wants_token,
        )  # fmt: skip

    @rule()
    def wait(self) -> None:
        """There is nothing to do once the room is filled."""

    @invariant()
    def the_buffer_begins_with_what_is_committed(self) -> None:
        if not hasattr(self, "chain"):
            return
        chain = self.chain
        assert chain.committed_len == len(self.committed)
        assert chain.token_ids[: len(self.committed)].tolist() == self.committed
        assert len(self.committed) <= chain.length <= len(chain.token_ids)
        if chain.wants_token:
            assert chain.length < len(chain.token_ids), "a wanted token fits"

    @invariant()
    def it_drafts_no_further_than_asked(self) -> None:
        if hasattr(self, "chain"):
            assert len(self.chain._blocks) <= 1 + self.lookahead


TestChain = ChainMachine.TestCase
TestChain.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

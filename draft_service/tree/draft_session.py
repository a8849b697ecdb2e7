"""One generation at the draft: its session's keys and values, its tree, and the rows of a step.

Keeps tree (what is foreseen) and strands (what is held of it) together. Knows neither budgets nor
other generations. Device thread only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from draft_service.messages import Commit, OpenDraft, Proposed
from draft_service.tree.block import DraftBlock, Extension
from draft_service.tree.kv_branches import Branch, KVBranches
from draft_service.tree.tree import SpeculationTree, Walk
from outrider.engine import Append, KVStore, Sampler, SampleRequest, Sequence
from outrider.errors import KVFull
from outrider.model_server.scheduler import GenerationKey
from outrider.model_server.session_table import LiveGeneration
from outrider.sampling.params import Verification


@dataclass(eq=False)
class DraftGeneration:
    key: GenerationKey
    sampler: Sampler
    verification: Verification
    # The target's: what may be committed.
    vocab_size: int

    @property
    def has_supports(self) -> bool:
        return self.sampler.params.needs_supports(self.verification)


class DraftSession:
    """`live` is the session as opened, with the committed context in its buffer."""

    def __init__(
        self, store: KVStore, live: LiveGeneration[DraftGeneration], command: OpenDraft
    ) -> None:
        self._store = store
        self.live = live
        self.committed_at = time.monotonic()
        # A row of it has been in a pass.
        self.is_begun = False
        self._branches = KVBranches(store, live.sequence)
        self.tree = SpeculationTree(
            live.token_ids,
            len(command.token_ids),
            self._branches.trunk,
            gamma=command.gamma,
            ahead_gamma=command.ahead_gamma,
            lookahead=command.lookahead,
            fan_out=command.fan_out,
            tells_unlikely=command.tells_unlikely,
        )

    @property
    def key(self) -> GenerationKey:
        return self.live.state.key

    def commit(self, command: Commit) -> Walk:
        """As Tree.commit; frees what is not foreseen any more."""
        walk = self.tree.commit(
            command.token_ids, command.committed_len, command.gamma, command.ahead_gamma
        )
        winner = walk.source.branch
        self._branches.keep({winner, *(block.branch for block in self.tree.blocks())})
        self._branches.settle(winner, walk.num_right)
        return walk

    def opened(self, extension: Extension) -> DraftBlock | None:
        """The child for the block's likeliest alternative; None where there is no room for it."""
        block, tree = extension.block, self.tree
        if not block.alternatives:  # dropped meanwhile for the room of another session
            return None
        position = block.alternatives[0].position
        fork_len, branch = block.base_len + position, block.branch
        if branch.sequence.length < fork_len:  # cut, for want of room, when it became the trunk
            tree.give_up(block)
            return None
        longest = len(self.live.token_ids)
        # The likeliest outcome of a whole block goes on where the block ends, if it fits: blocks
        # may have become longer since the strand was forked.
        is_at_end = block.has_guess and position == len(block.token_ids)
        is_last = is_at_end and not block.is_continued and branch.sequence.length == fork_len
        if is_last and self._extended(branch, min(fork_len + tree.room_for_child, longest)):
            block.is_continued = True
            return tree.open(block, branch)
        max_len = min(fork_len + tree.room_for_branch, longest)
        try:
            fork = self._branches.fork(branch, fork_len, max_len)
        except KVFull:
            tree.give_up(block)
            return None
        return tree.open(block, fork)

    def has_room(self, block: DraftBlock) -> bool:
        """Whether the block's next token can be run; nobody makes room for it."""
        return self._extended(block.branch, block.end)

    def _extended(self, branch: Branch, max_len: int) -> bool:
        try:
            self._store.extend(branch.sequence, max_len)
        except KVFull:
            return False
        return True

    @property
    def branch_sequences(self) -> list[Sequence]:
        """Of what is drafted ahead, all that `prune` frees."""
        return self._branches.fork_sequences

    def prune(self) -> None:
        """Frees what is drafted ahead, until the next commit."""
        self.tree.prune()
        self._branches.keep({self.tree.root.branch})

    def proposed(self, block: DraftBlock) -> Proposed:
        """The block, for the orchestrator, which has then been told all its tokens."""
        block.num_sent = len(block.token_ids)
        return Proposed(
            key=self.key,
            assumed_token_ids=self.tree.assumed(block),
            base_len=block.base_len,
            token_ids=tuple(block.token_ids),
            supports=list(block.supports) if block.supports else None,
        )

    def end(self) -> None:
        """Leaves the session's sequence with committed tokens only."""
        self._branches.keep(set())
        sequence = self.live.sequence
        self._store.truncate(sequence, min(sequence.length, self.tree.committed_len))


@dataclass(frozen=True)
class DraftRow:
    """A token to draw: the block's next, or the guess after it."""

    drafting: DraftSession
    block: DraftBlock

    @property
    def key(self) -> GenerationKey:
        return self.drafting.key

    @property
    def num_pending(self) -> int:
        """Tokens of the path that the model has not seen; the last one's logits draw the next."""
        return self.block.end - self.block.branch.sequence.length

    def append(self, num_tokens: int, num_known: int) -> Append:
        """The first of them; a padded target vocabulary may name tokens the draft has no row for.

        Any will do there: `num_known` is the draft's vocabulary.
        """
        sequence = self.block.branch.sequence
        pending = self.drafting.tree.tokens(self.block, sequence.length)
        known = [token if token < num_known else 0 for token in pending[:num_tokens]]
        return Append(sequence, known, int(num_tokens == len(pending)))

    def ask(self) -> SampleRequest:
        block, tree, generation = self.block, self.drafting.tree, self.drafting.live.state
        return SampleRequest(
            generation.sampler,
            lambda: tree.context(block),
            block.end,
            block.base_len,
            generation.verification,
            is_guess=block.is_complete,
        )

"""Block of draft tokens in a speculation tree, and the tokens that may follow it. Plain data.

A block knows its parent and children; what is committed is `tree`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from draft_service.messages import SupportWeights
from draft_service.tree.kv_branches import Branch

# A support takes 64 times the bytes of its token, and most blocks are never used. Less likely
# blocks with supports are sent only when a commit asks for them: a hop later, cheap on short links.
_MIN_SENT_PROB = 0.02
_MIN_HALF_SENT_PROB = 0.1


class Alternative(NamedTuple):
    """A token that the target may emit after the block's first `position` tokens.

    `prob` is conditional: given that the target emits the block's own context.
    """

    prob: float
    position: int
    token_id: int


@dataclass(eq=False)
class DraftBlock:
    """Up to `gamma` draft tokens that start at length `base_len`; continues `parent`.

    It follows the parent's first `position` tokens and `next_token`. `reach[j]`: probability that
    the first j tokens are accepted. `alternatives`: not opened yet, most likely first. `children`:
    by (position, token). `has_guess`: the token after the complete block has been sampled.
    """

    id: int
    base_len: int
    gamma: int
    branch: Branch
    parent: DraftBlock | None = None
    position: int = 0
    next_token: int = 0
    prob: float = 1.0
    token_ids: list[int] = field(default_factory=list)
    supports: list[SupportWeights] = field(default_factory=list)
    # Tokens already sent to the orchestrator.
    num_sent: int = 0
    reach: list[float] = field(default_factory=lambda: [1.0])
    has_guess: bool = False
    # Whether a child uses the same KV branch; only one can.
    is_continued: bool = False
    alternatives: list[Alternative] = field(default_factory=list)
    children: dict[tuple[int, int], DraftBlock] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return len(self.token_ids) >= self.gamma

    @property
    def has_unsent(self) -> bool:
        return self.num_sent < len(self.token_ids)

    @property
    def is_half(self) -> bool:
        """Whether half is sampled: it is sent then, too, in case the verify result comes early."""
        return self.gamma > 2 and len(self.token_ids) == (self.gamma + 1) // 2

    @property
    def is_likely(self) -> bool:
        """Whether it is likely enough to send before a commit asks; always without supports."""
        least = _MIN_SENT_PROB if self.is_complete else _MIN_HALF_SENT_PROB
        return not self.supports or self.prob >= least

    @property
    def last_len(self) -> int:
        """Context length with all of its tokens, sampled or not."""
        return self.base_len + max(self.gamma, len(self.token_ids))

    @property
    def end(self) -> int:
        return self.base_len + len(self.token_ids)

    def is_in(self, root: DraftBlock) -> bool:
        """Whether it is `root` or one of its descendants; False after it was dropped."""
        block = self
        while block is not root:
            above = block.parent
            if above is None or above.children.get((block.position, block.next_token)) is not block:
                return False
            block = above
        return True

    def descendants(self) -> Iterator[DraftBlock]:
        """Yields the block itself and all blocks below it."""
        yield self
        for child in self.children.values():
            yield from child.descendants()


class Extension(NamedTuple):
    """A token to sample ahead for `block`, or (`opens`) its most likely alternative to open."""

    prob: float
    block: DraftBlock
    opens: bool

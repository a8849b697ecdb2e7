"""A block of draft tokens in the tree of one generation, and what may follow it. Plain data.

Knows its parent and children; nothing of what is committed, which the tree does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from draft_service.messages import SupportWeights
from draft_service.tree.kv_branches import Branch

# A support has 64 times the bytes of its token, and most blocks are drafted in vain: those with
# supports that are less likely stay here until a commit asks for them, and come a hop later, which
# costs little where hops are short.
_MIN_SENT_PROB = 0.02
_MIN_HALF_SENT_PROB = 0.1


class Alternative(NamedTuple):
    """The target may emit `token_id` after the block's first `position` tokens.

    `prob`: given that the block's own context comes about.
    """

    prob: float
    position: int
    token_id: int


@dataclass(eq=False)
class DraftBlock:
    """`gamma` draft tokens from `base_len` on, some of them drawn; continues `parent`.

    `reach[j]`: chance that the first j tokens stand. `alternatives`: not opened yet, likeliest
    first. `children` by (position, token).
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
    # How many of its tokens the orchestrator has been sent.
    num_sent: int = 0
    reach: list[float] = field(default_factory=lambda: [1.0])
    has_guess: bool = False
    # The line of the likeliest guesses goes on in its parent's strand; only one child can.
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
        """Drafted ahead it is told half way, too, for a verdict that comes early."""
        return self.gamma > 2 and len(self.token_ids) == (self.gamma + 1) // 2

    @property
    def is_likely(self) -> bool:
        """Likely enough for its bytes; without supports these are few."""
        least = _MIN_SENT_PROB if self.is_complete else _MIN_HALF_SENT_PROB
        return not self.supports or self.prob >= least

    @property
    def last_len(self) -> int:
        """Length of the context with all of its tokens, drawn or not."""
        return self.base_len + max(self.gamma, len(self.token_ids))

    @property
    def end(self) -> int:
        return self.base_len + len(self.token_ids)

    def is_in(self, root: DraftBlock) -> bool:
        """Whether it is the root of a tree, or hangs in it still."""
        block = self
        while block is not root:
            above = block.parent
            if above is None or above.children.get((block.position, block.next_token)) is not block:
                return False
            block = above
        return True

    def descendants(self) -> Iterator[DraftBlock]:
        """The block itself and all below it."""
        yield self
        for child in self.children.values():
            yield from child.descendants()


class Extension(NamedTuple):
    """A token to draw for `block`; or (`opens`) its likeliest alternative, to be opened first."""

    prob: float
    block: DraftBlock
    opens: bool

"""Pool of past outputs, into which prompt lookup looks: each owner's own, within a memory bound.

An output is visible to later generations of the same owner only: an API key with a model. Outputs
are stored in segments. The segments of all owners together are bounded; the least recently used one
is emptied, even if a running generation looks into it. A token of the bound takes about 16 bytes.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

from orchestrator.speculation.lookup import SEPARATOR, TokenIndex

# Tokens of a segment. Choice: a whole segment is freed at once.
SEGMENT_TOKENS = 16_384
# Segments of one owner, which each of its searches looks into. Choice.
_MAX_OWNER_SEGMENTS = 4
# Tokens of an output that are stored; adding them takes about 3 ms.
_MAX_OUTPUT_TOKENS = 8_192


class OutputPool:
    """Past outputs by owner. `max_tokens`: of all owners together; at least one segment.

    Used on the event loop only.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_segments = max_tokens // SEGMENT_TOKENS
        # By owner and number, the least recently used first.
        self._segments: OrderedDict[tuple[str, int], TokenIndex] = OrderedDict()
        # Numbers of the segments of each owner, the oldest first.
        self._numbers: dict[str, list[int]] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens in the pool, including one separator for each output."""
        return sum(len(segment.text) for segment in self._segments.values())

    def indexes(self, owner: str) -> list[TokenIndex]:
        """The owner's past outputs, the newest segment first."""
        keys = [(owner, number) for number in reversed(self._numbers.get(owner, []))]
        for key in reversed(keys):
            self._segments.move_to_end(key)
        return [self._segments[key] for key in keys]

    def add(self, owner: str, token_ids: Sequence[int]) -> None:
        """Adds an output of the owner, cut to `_MAX_OUTPUT_TOKENS`."""
        output = [*token_ids[:_MAX_OUTPUT_TOKENS], SEPARATOR]
        segment = self._segment(owner, len(output))
        assert isinstance(segment.text, array), "the pool's own text"
        segment.text.extend(output)
        segment.extend(len(segment.text))

    def _segment(self, owner: str, num_tokens: int) -> TokenIndex:
        """The owner's newest segment with room for the tokens; a new one if there is none."""
        numbers = self._numbers.setdefault(owner, [])
        if numbers:
            key = owner, numbers[-1]
            self._segments.move_to_end(key)
            if len(self._segments[key].text) + num_tokens <= SEGMENT_TOKENS:
                return self._segments[key]
        number = numbers[-1] + 1 if numbers else 0
        if len(numbers) == _MAX_OWNER_SEGMENTS:
            self._drop(owner, numbers[0])
        if len(self._segments) == self._max_segments:
            self._drop(*next(iter(self._segments)))
        self._numbers.setdefault(owner, []).append(number)
        segment = TokenIndex(array("i"), SEGMENT_TOKENS - 1)
        self._segments[owner, number] = segment
        return segment

    def _drop(self, owner: str, number: int) -> None:
        segment = self._segments.pop((owner, number))
        assert isinstance(segment.text, array), "the pool's own text"
        del segment.text[:]
        segment.clear()
        self._numbers[owner].remove(number)
        if not self._numbers[owner]:
            del self._numbers[owner]

"""Token sequences that an output must not contain: which token each position must not have.

As vLLM's `bad_words`: the last token of a sequence is banned where the output ends with the tokens
before it. The prompt does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

Ids = Sequence[int] | npt.NDArray[Any]


class BannedSequences:
    """Banned token sequences of one generation whose prompt has `prompt_len` tokens. Immutable."""

    def __init__(self, sequences: Sequence[Sequence[int]], prompt_len: int) -> None:
        self._prompt_len = prompt_len
        # Banned everywhere; and, by the token before, sequences with their other tokens.
        self._always = [sequence[-1] for sequence in sequences if len(sequence) == 1]
        self._after: dict[int, list[tuple[list[int], int]]] = {}
        for sequence in sequences:
            if len(sequence) > 1:
                entry = (list(sequence[:-1]), sequence[-1])
                self._after.setdefault(sequence[-2], []).append(entry)

    def __bool__(self) -> bool:
        return bool(self._always or self._after)

    def at(self, position: int, context: Ids) -> list[int]:
        """Tokens banned at `position` after `context[:position]`."""
        if not self._after or position <= self._prompt_len:
            return self._always
        banned = list(self._always)
        for before, last in self._after.get(int(context[position - 1]), ()):
            start = position - len(before)
            if start >= self._prompt_len and list(context[start:position]) == before:
                banned.append(last)
        return banned

    def cut(self, context: Sequence[int], token_ids: Sequence[int]) -> tuple[int, ...]:
        """Draft tokens that continue the context, up to the first that is banned."""
        extended = [*context, *token_ids] if self else []
        for index, token_id in enumerate(token_ids):
            if self and token_id in self.at(len(context) + index, extended):
                return tuple(token_ids[:index])
        return tuple(token_ids)

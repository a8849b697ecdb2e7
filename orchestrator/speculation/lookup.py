"""Prompt lookup: draft tokens from earlier text of the same context, without a model. Pure.

`PromptLookup` finds the longest suffix of the context that occurred before, and proposes the tokens
that followed it there (prompt lookup decoding, Saxena 2023; vLLM's n-gram speculation). It may look
into past outputs too (`output_pool`).
`LookupDrafts` is the `DraftSource` of them; `acceptance.MatchAcceptance` predicts whether they are
right.

The index is that of LZ77 compressors (Deflate, RFC 1951, section 4): the last occurrence of every
token pair, and a chain to earlier ones. It takes constant time and 9 bytes a token. A suffix
automaton takes 490 bytes a token and several times the time in Python (ADR 25).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np

from orchestrator.speculation.acceptance import MatchAcceptance
from orchestrator.speculation.draft_source import DraftRequest
from orchestrator.speculation.verification import Proposal, SourceName
from outrider.sampling.bad_words import BannedSequences
from outrider.sampling.support import Support

# Tokens that `update` adds to the index per call: about 3 ms. Longer prompts take several rounds.
_MAX_INDEXED = 8192
# Slots of the table: the next power of 2 above the context's length, within these bounds.
_MIN_SLOTS, _MAX_SLOTS = 1 << 8, 1 << 17
# Of the hash of a token pair. Choice: an odd prime.
_MULTIPLIER = 31_013
# Earlier occurrences of the last pair that are compared, the most recent ones. Choice: 4 and 64
# gave the same rate on Python source.
_MAX_CANDIDATES = 8
# Tokens that are compared at most. Choice: the highest level of `MatchAcceptance`.
_MAX_COMPARED = 33
# A match of this length is followed without looking for a longer one. Choice.
_GOOD_MATCH = 16
# Ends each output in a text of several; no token.
SEPARATOR = -1


class TokenIndex:
    """Index of the token pairs of a text: a list of token ids that its owner extends.

    `max_len`: expected final length of the text.
    """

    def __init__(self, text: Sequence[int], max_len: int) -> None:
        self.text = text
        num_slots = min(max(1 << max_len.bit_length(), _MIN_SLOTS), _MAX_SLOTS)
        self._mask = num_slots - 1
        # By hash of two tokens: position after their last occurrence; 0: none.
        self._last = array("i", [0]) * num_slots
        # By position: the one after the occurrence before.
        self._before = array("i")

    @property
    def num_indexed(self) -> int:
        """Tokens of the text that the index has."""
        return len(self._before)

    def extend(self, end: int) -> None:
        """Adds the tokens of the text before position `end`."""
        text, before, last, mask = self.text, self._before, self._last, self._mask
        for position in range(len(before), end):
            if position < 2:
                before.append(0)
                continue
            slot = (text[position - 2] * _MULTIPLIER + text[position - 1]) & mask
            before.append(last[slot])
            last[slot] = position

    def clear(self) -> None:
        """Empties the index, which then finds nothing; for a text that its owner has emptied."""
        self._mask, self._last, self._before = 0, array("i", [0]), array("i")

    def longest_match(self, context: Sequence[int]) -> tuple[int, int]:
        """The longest suffix of the context that the text has: (length, position after it).

        The length is 0, or from 2 to `_MAX_COMPARED`. Of equal ones the last.
        """
        text, best, found = self.text, 0, 0
        previous, newest = context[-2], context[-1]
        candidate = self._last[(previous * _MULTIPLIER + newest) & self._mask]
        for _ in range(_MAX_CANDIDATES):
            if not candidate:
                break
            if text[candidate - 1] == newest and text[candidate - 2] == previous:
                length, longest = 2, min(candidate, len(context), _MAX_COMPARED)
                while length < longest and text[candidate - length - 1] == context[-length - 1]:
                    length += 1
                if length > best:
                    best, found = length, candidate
            candidate = self._before[candidate]
        return best, found


class PromptLookup:
    """Lookup in one context, a list of token ids that its owner extends. Used by one task.

    Call `update` after the context has grown, then `propose`. `observe` is called with the match
    length and whether the next token of the context was the one after the match: for every token
    that could have been proposed, used or not. `max_len`: expected final length of the context.
    `others`: further texts to look into.
    """

    def __init__(
        self,
        context: Sequence[int],
        max_len: int,
        observe: Callable[[int, bool], None] = lambda match_len, is_right: None,
        others: Sequence[TokenIndex] = (),
    ) -> None:
        self._context = context
        self._observe = observe
        self._index = TokenIndex(context, max_len)
        self._others = others
        # Text of the match, and the position after it there, if `match_len` is not 0.
        self._text, self._source = context, 0
        # Length of the match: the last tokens of the context that equal those before the source.
        self.match_len = 0

    @property
    def num_indexed(self) -> int:
        """Tokens of the context that can be found."""
        return self._index.num_indexed

    def update(self) -> None:
        """Adds new tokens of the context to the index, then looks for the longest match."""
        context, begin = self._context, self._index.num_indexed
        end = min(len(context), begin + _MAX_INDEXED)
        if begin == end:
            return
        for position in range(begin, end):
            if not self.match_len:
                break
            self._follow(context[position])
        self._index.extend(end)
        if end < len(context):
            self.match_len = 0
        elif self.match_len < _GOOD_MATCH and end >= 2:
            self._search()

    def propose(self, num_tokens: int) -> tuple[int, ...]:
        """At most `num_tokens` tokens after the match; empty without a match.

        A copy that reaches the end of the context goes on with its own tokens, as in LZ77. One from
        another text ends with it.
        """
        if not self.match_len:
            return ()
        found = list(self._text[self._source : self._source + num_tokens])
        if self._text is not self._context:
            return tuple(found[: found.index(SEPARATOR)] if SEPARATOR in found else found)
        period = len(self._context) - self._source
        while len(found) < num_tokens:
            found.append(found[-period])
        return tuple(found)

    def _follow(self, token_id: int) -> None:
        """Compares a new token of the context with the one after the match."""
        is_there = self._source < len(self._text)
        is_right = is_there and self._text[self._source] == token_id
        self._observe(self.match_len, is_right)
        self._source += 1
        self.match_len = self.match_len + 1 if is_right else 0

    def _search(self) -> None:
        """Takes the longest match that is longer than the current one."""
        for index in (self._index, *self._others):
            length, source = index.longest_match(self._context)
            if length > self.match_len:
                self.match_len, self._text, self._source = length, index.text, source


class LookupDrafts:
    """`DraftSource` of prompt lookup. Its proposals are ready at once, so it never waits.

    A proposal is a function of the committed tokens and `others`: the distribution of each draft
    token has all its mass on that token, so verification is exact as for any other draft. `others`
    must not depend on this generation's seed.
    """

    replica: str | None = None
    revision = ""
    cached_len = wire_bytes = 0

    def __init__(
        self,
        request: DraftRequest,
        shared: MatchAcceptance,
        others: Sequence[TokenIndex] = (),
    ) -> None:
        self.acceptance = MatchAcceptance(shared)
        self._context = request.token_ids
        self._has_supports = request.params.needs_supports(request.verification)
        self._lookup = PromptLookup(
            request.token_ids, request.max_len, self.acceptance.observe, others
        )
        self._banned = BannedSequences(request.params.bad_words_token_ids, request.prompt_len)
        self._gamma = 0
        self.may_open, self.is_open = True, False

    @property
    def num_behind(self) -> int:
        return len(self._context) - self._lookup.num_indexed if self.is_open else 0

    @property
    def match_len(self) -> int:
        """Length of the match that `propose` continues; 0: there is none."""
        return self._lookup.match_len

    def open(self, gamma: int, lookahead: int) -> bool:
        self._gamma, self.is_open = gamma, gamma > 0 and self.may_open
        return self.is_open

    def refresh(self) -> None:
        pass

    def propose(self, min_tokens: int = 1) -> Proposal | None:
        if not self.is_open or self._gamma < min_tokens:
            return None
        self._lookup.update()
        # The target would reject what follows a banned token.
        token_ids = self._banned.cut(self._context, self._lookup.propose(self._gamma))
        if not token_ids:
            return None
        supports = tuple(map(certain, token_ids)) if self._has_supports else None
        return Proposal(len(self._context), token_ids, supports, source=SourceName.LOOKUP)

    def commit(self, gamma: int, ahead_gamma: int) -> None:
        if self.is_open:
            self._gamma = max(gamma, ahead_gamma)

    async def wait(self, timeout_s: float, min_tokens: int = 1) -> Proposal | None:
        return self.propose(min_tokens)

    def observe_round(self, num_draft_tokens: int, num_accepted: int, *, is_rejected: bool) -> None:
        pass  # `propose` compares all committed tokens

    def suspend(self) -> None:
        self.may_open = self.is_open = False

    def close(self, *, keep: bool) -> None:
        self.is_open = False


def certain(token_id: int) -> Support:
    return Support(np.array([token_id], np.int64), np.ones(1))

"""Text of one output: detokenized, cut at a stop string, released as soon as it is certain."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from outrider.tokenizer import Tokenizer

# A character of the text, or the id of a special token: a stop string may name one.
Symbol = str | int


class StopString:
    """Searches a stream of symbols for one stop string (Knuth, Morris and Pratt 1977).

    Special tokens are skipped, as they are in the text, unless the stop string names one. The
    table of fallbacks grows with the longest match so far: a stop string of any length costs
    nothing until the output begins to match it.
    """

    def __init__(self, text: str, symbols: Sequence[Symbol]) -> None:
        self.text = text
        self._symbols = symbols
        self._names_special = symbols is not text
        # [n]: characters among the first n symbols; all of them where no symbol is an id.
        self._num_chars: Sequence[int] = range(len(symbols) + 1)
        if self._names_special:
            self._num_chars = [0, *itertools.accumulate(isinstance(s, str) for s in symbols)]
        self._fallback = [0]
        self._num_matched = 0

    @property
    def num_chars(self) -> int:
        """Characters of the text that a match takes."""
        return self._num_chars[-1]

    @property
    def num_suspect(self) -> int:
        """Length of the longest end of the text that may become part of a match."""
        is_whole = self._num_matched == len(self._symbols)
        return self._num_chars[self._fallback[-1] if is_whole else self._num_matched]

    def feed(self, symbol: Symbol) -> bool:
        """Whether the stream now ends with the stop string."""
        if isinstance(symbol, int) and not self._names_special:
            return False
        self._num_matched = self._next(self._num_matched, symbol)
        if self._num_matched > len(self._fallback):  # by one: a match grows by one symbol
            last = self._symbols[self._num_matched - 1]
            self._fallback.append(self._next(self._fallback[-1], last))
        return self._num_matched == len(self._symbols)

    def _next(self, num_matched: int, symbol: Symbol) -> int:
        if num_matched == len(self._symbols):
            num_matched = self._fallback[-1]
        while num_matched and self._symbols[num_matched] != symbol:
            num_matched = self._fallback[num_matched - 1]
        return num_matched + (self._symbols[num_matched] == symbol)


class OutputText:
    """The text of one output. `push` each token, `take` what may be sent, `finish` at the end.

    Without a tokenizer it has no text.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(prompt_token_ids) if tokenizer else None
        self._stops = [one for text in stop for one in _searches(text, tokenizer)]
        # Text that may begin a stop string, and text that may be sent.
        self._held = ""
        self._ready: list[str] = []
        self._num_ready = 0

    def push(self, token_id: int, *, check_stop: bool = True) -> str | None:
        """Adds a token; returns the stop string that its text completes, if any.

        Text from the stop string's first character on is dropped. Without `check_stop` a stop
        string that is complete with this token does not count.
        """
        if self._tokenizer is None or self._detokenizer is None:
            return None
        text = self._detokenizer.push(token_id)
        if not self._stops:
            self._release_text(text)
            return None
        special = self._tokenizer.special_text(token_id)
        for symbol in text if special is None else (token_id,):
            self._held += symbol if isinstance(symbol, str) else ""
            found = [stop for stop in self._stops if stop.feed(symbol)]
            if found and check_stop:
                longest = max(found, key=lambda stop: stop.num_chars)
                self._release(longest.num_chars)
                self._held = ""
                return longest.text
        self._release(max(stop.num_suspect for stop in self._stops))
        return None

    def _release(self, num_kept: int) -> None:
        num_released = len(self._held) - num_kept
        self._release_text(self._held[:num_released])
        self._held = self._held[num_released:]

    def _release_text(self, text: str) -> None:
        self._ready.append(text)
        self._num_ready += len(text)

    @property
    def num_ready(self) -> int:
        """Number of characters that `take` would return."""
        return self._num_ready

    def take(self) -> str:
        """The text that has become certain since the last call."""
        ready = "".join(self._ready)
        self._ready, self._num_ready = [], 0
        return ready

    def finish(self) -> None:
        """No more tokens follow: releases what was held back, incomplete characters included."""
        self._release(0)
        if self._detokenizer is not None:
            self._release_text(self._detokenizer.finish())


def _searches(text: str, tokenizer: Tokenizer | None) -> list[StopString]:
    """A special token in a stop string matches the token, and its text spelled by other tokens."""
    searches = [StopString(text, text)]
    if tokenizer is not None and len(symbols := tokenizer.split_at_special_tokens(text)) < len(
        text
    ):
        searches.append(StopString(text, symbols))
    return searches

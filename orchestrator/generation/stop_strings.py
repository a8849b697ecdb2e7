"""Text of one output: detokenized, cut at stop strings, released as soon as it is final."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from outrider.detokenizer import Detokenizer
from outrider.tokenizer import Tokenizer

# A character of the text, or the id of a special token, which a stop string may contain.
Symbol = str | int


class StopString:
    """Searches a stream of symbols for one stop string (Knuth, Morris and Pratt 1977).

    Special tokens are skipped, as in the text, unless the stop string contains one. The fallback
    table grows with the longest match so far, so a long stop string costs nothing before the
    output begins to match it.
    """

    def __init__(self, text: str, symbols: Sequence[Symbol]) -> None:
        self.text = text
        self._symbols = symbols
        self._has_special = symbols is not text
        # [n]: number of characters among the first n symbols.
        self._num_chars: Sequence[int] = range(len(symbols) + 1)
        if self._has_special:
            self._num_chars = [0, *itertools.accumulate(isinstance(s, str) for s in symbols)]
        self._fallback = [0]
        self._num_matched = 0

    @property
    def num_chars(self) -> int:
        """Number of characters of the text that a match covers."""
        return self._num_chars[-1]

    @property
    def num_partial_chars(self) -> int:
        """Length of the longest suffix of the text that may become part of a match."""
        is_complete = self._num_matched == len(self._symbols)
        return self._num_chars[self._fallback[-1] if is_complete else self._num_matched]

    def feed(self, symbol: Symbol) -> bool:
        """Adds a symbol. Returns whether the stream now ends with the stop string."""
        if isinstance(symbol, int) and not self._has_special:
            return False
        self._num_matched = self._next(self._num_matched, symbol)
        if self._num_matched > len(self._fallback):  # by one, as a match grows symbol by symbol
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
    """Text of one output: `push` each token, `take` final text, `finish` at the end.

    `skips_special`: special tokens have no text. `includes_stop`: the text ends with what stops it.
    Without a tokenizer the text is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str],
        *,
        skips_special: bool = True,
        includes_stop: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skips_special = skips_special
        self._includes_stop = includes_stop
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None:
            self._detokenizer = tokenizer.detokenizer(
                prompt_token_ids, skip_special_tokens=skips_special
            )
        # Special tokens that have text are searched as text.
        special = tokenizer if skips_special else None
        self._stops = [one for text in stop for one in _searches(text, special)]
        # The stop string that ends the text, if it is included.
        self.included_stop = ""
        # Text that may begin a stop string, and final text.
        self._pending = ""
        self._ready: list[str] = []
        self._num_ready = 0

    def push(self, token_id: int, *, check_stop: bool = True) -> str | None:
        """Adds a token. Returns the stop string that its text completes, or None.

        The text after the stop string is dropped, and unless it is included, the stop string too.
        `check_stop` False: a stop string that this token completes is ignored.
        """
        if self._tokenizer is None or self._detokenizer is None:
            return None
        text = self._detokenizer.push(token_id)
        if not self._stops:
            self._release_text(text)
            return None
        special = self._tokenizer.special_text(token_id) if self._skips_special else None
        for symbol in text if special is None else (token_id,):
            self._pending += symbol if isinstance(symbol, str) else ""
            found = [stop for stop in self._stops if stop.feed(symbol)]
            if found and check_stop:
                longest = max(found, key=lambda stop: stop.num_chars)
                self._release(0 if self._includes_stop else longest.num_chars)
                self._pending = ""
                self.included_stop = longest.text if self._includes_stop else ""
                return longest.text
        # Text before an included stop string is final in any case.
        is_final = self._includes_stop
        self._release(0 if is_final else max(stop.num_partial_chars for stop in self._stops))
        return None

    def push_stop(self, token_id: int) -> str:
        """Adds the EOS or stop token that ends the output. Returns its text if it is included."""
        if not self._includes_stop or self._detokenizer is None:
            return ""
        text = self._detokenizer.push(token_id)
        self._release(0)
        self._release_text(text)
        return text

    def _release(self, num_kept: int) -> None:
        num_released = len(self._pending) - num_kept
        self._release_text(self._pending[:num_released])
        self._pending = self._pending[num_released:]

    def _release_text(self, text: str) -> None:
        self._ready.append(text)
        self._num_ready += len(text)

    @property
    def num_ready(self) -> int:
        """Number of characters that `take` would return."""
        return self._num_ready

    def take(self) -> str:
        """Returns the text that has become final since the last call."""
        ready = "".join(self._ready)
        self._ready, self._num_ready = [], 0
        return ready

    def finish(self) -> None:
        """Ends the text: releases what was held back, incomplete characters included."""
        self._release(0)
        if self._detokenizer is not None:
            self._release_text(self._detokenizer.finish())


def _searches(text: str, tokenizer: Tokenizer | None) -> list[StopString]:
    """Searches for one stop string.

    A special token in it matches that token, and also its text spelled by other tokens.
    """
    searches = [StopString(text, text)]
    if tokenizer is not None and len(symbols := tokenizer.split_at_special_tokens(text)) < len(
        text
    ):
        searches.append(StopString(text, symbols))
    return searches

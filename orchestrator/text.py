"""From tokens to text that is certain: never half a character, never part of a stop string.

Pure but for the tokenizer it is given. Knows nothing of sessions, rounds or the wire.
"""

from __future__ import annotations

from collections.abc import Sequence

from outrider.tokenizer import Tokenizer

# What a decoder shows for bytes that are not (yet) a character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Some decoders strip the space of the first token: the prompt's last tokens give the context.
_NUM_CONTEXT_TOKENS = 6


class TextStream:
    """The text of one output. `push` each token, `take` what may be shown, `finish` at the end."""

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        # Decoded together: the text of [prefix:read] is known, of [prefix:] it is news.
        self._token_ids = list(prompt_token_ids[-_NUM_CONTEXT_TOKENS:])
        self._known_text = tokenizer.decode(self._token_ids) if tokenizer else ""
        self._num_known = len(self._token_ids)
        self._held = ""
        self._ready = ""

    def push(self, token_id: int, *, check_stop: bool = True) -> str | None:
        """Adds a token; returns the stop string that its text completes, if any.

        Text from the stop string's first character on is dropped.
        """
        if self._tokenizer is None:
            return None
        self._token_ids.append(token_id)
        text = self._tokenizer.decode(self._token_ids)
        certain = text.rstrip(_INCOMPLETE)
        if len(certain) <= len(self._known_text):
            return None
        self._held += certain[len(self._known_text) :]
        if certain == text:
            self._token_ids = self._token_ids[self._num_known :]
            self._num_known = len(self._token_ids)
            self._known_text = self._tokenizer.decode(self._token_ids)
        else:  # the token's last bytes begin a character: what is before it is certain
            self._known_text = certain
        return self._release(check_stop)

    def _release(self, check_stop: bool) -> str | None:
        if not check_stop:
            self._ready, self._held = self._ready + self._held, ""
            return None
        found = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        if found:
            start, stop = min(found)
            self._ready += self._held[:start]
            self._held = ""
            return stop
        num_certain = len(self._held) - self._num_suspect()
        self._ready += self._held[:num_certain]
        self._held = self._held[num_certain:]
        return None

    def _num_suspect(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0

    @property
    def num_ready(self) -> int:
        """Characters that `take` would give."""
        return len(self._ready)

    def take(self) -> str:
        """The text that has become certain since the last call."""
        ready, self._ready = self._ready, ""
        return ready

    def finish(self) -> None:
        """No more tokens: what was held back is text after all, half characters included."""
        if self._tokenizer is not None:
            self._held += self._tokenizer.decode(self._token_ids)[len(self._known_text) :]
        self._ready, self._held = self._ready + self._held, ""

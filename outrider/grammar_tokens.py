"""A tokenizer's tokens for llguidance: bytes of each token, tokenization of texts.

The bytes are the detokenizer's own: a format is one of the text that clients get. llguidance itself
would read added tokens in angle brackets, such as Qwen's `<tool_call>`, as special tokens, which no
text contains, and it knows fewer decoders.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any, cast

from llguidance import LLTokenizer

from outrider.tokenizer import Tokenizer

# Texts whose tokens are cached, and their longest.
_MAX_CACHED, _MAX_CACHED_CHARS = 4_096, 256


class GrammarTokens:
    """Implements llguidance's `TokenizerWrapper`. Any thread may use it.

    `covers_all_bytes`: every text can be tokenized. `special`: texts of special tokens by id.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        """`vocab_size`: the model's, which may exceed the tokenizer's.

        Raises ValueError if the tokenizer's decoder does not map tokens to bytes, or none of
        `eos_token_ids` is one of its tokens. Without any, no token of the tokenizer ends an output.
        """
        token_bytes = tokenizer.token_bytes
        if token_bytes is None:
            raise ValueError("the tokenizer's decoder does not map tokens to bytes")
        num_ids = tokenizer.max_token_id + 1
        self.eos_token_ids = sorted(i for i in eos_token_ids if i < num_ids)
        if eos_token_ids and not self.eos_token_ids:
            raise ValueError(f"the tokenizer has none of the EOS tokens {sorted(eos_token_ids)}")
        self.tokens = [token_bytes[token_id] for token_id in range(num_ids)]
        special = {i: text.encode() for text, i in tokenizer.special_ids.items()}
        if not self.eos_token_ids:  # llguidance needs one
            special[num_ids] = b"<|end of a structured output|>"
            self.eos_token_ids, num_ids = [num_ids], num_ids + 1
        self.tokens += [b""] * (max(vocab_size, num_ids) - len(self.tokens))
        for token_id, text in special.items():
            self.tokens[token_id] = text
        self.special = {i: text.decode(errors="replace") for i, text in special.items()}
        self.eos_token_id = self.eos_token_ids[0]
        self._special_ids = frozenset({*special, *self.eos_token_ids})
        self.special_token_ids = sorted(self._special_ids)
        self._tokenizer = tokenizer
        text_ids = (i for i in reversed(range(num_ids)) if i not in self._special_ids)
        self._ids = {self.tokens[i]: i for i in text_ids if self.tokens[i]}
        self._longest = max(map(len, self._ids), default=1)
        self.covers_all_bytes = all(bytes([byte]) in self._ids for byte in range(256))
        self._cached = functools.lru_cache(_MAX_CACHED)(self._encoded)

    def ll_tokenizer(self) -> LLTokenizer:
        """llguidance's tokenizer."""
        return LLTokenizer(cast(Any, self), eos_token=self.eos_token_ids)

    def __call__(self, text: str) -> tuple[int, ...]:
        """Token ids with the bytes of the text, without those that no token has. For llguidance."""
        return self._cached(text) if len(text) <= _MAX_CACHED_CHARS else self._encoded(text)

    def _encoded(self, text: str) -> tuple[int, ...]:
        content = text.encode()
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        is_text = not self._special_ids.intersection(token_ids)
        if is_text and b"".join(self.tokens[i] for i in token_ids) == content:
            return tuple(token_ids)
        # It normalizes, adds a space, or takes the text of a special token for the token.
        return self._longest_first(content)

    def _longest_first(self, content: bytes) -> tuple[int, ...]:
        """The longest token at each place; bytes of no token are left out."""
        token_ids, at = [], 0
        while at < len(content):
            for end in range(min(len(content), at + self._longest), at, -1):
                if (token_id := self._ids.get(content[at:end])) is not None:
                    token_ids.append(token_id)
                    break
            at = max(end, at + 1)
        return tuple(token_ids)

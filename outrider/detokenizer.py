"""Incremental detokenizer: token ids to text; the cost per token does not grow with the text.

Most tokenizers' decoders map each token to bytes: byte-level BPE (GPT-2, Llama 3, Qwen),
SentencePiece with byte fallback (Llama 2, Mistral, Gemma, Phi-3), Metaspace. Their tokens are
decoded as bytes: a character may be split over any number of tokens. With other decoders, the last
few tokens are decoded again with each new token.

`tokenizers.decoders.DecodeStream` (0.23.3) fails 7 of the 24 cases in tests/test_detokenizer.py: it
repeats a prompt that ends inside a character, and never emits an incomplete or invalid character.
It takes 0.5 to 1.1 us per token, this module 0.3 us (WordPiece: 0.4 against 2.4). After 4,000
invalid bytes it takes 360 us per token, because it decodes all of them again.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import tokenizers

# For decoders that do not map tokens to bytes: tokens that the text of the next one may depend on.
_NUM_WINDOW_TOKENS = 6
_MAX_CHARACTER_BYTES = 4
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = ord(" ")


class Detokenizer(Protocol):
    """Detokenizer of one output; for one task or thread at a time."""

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that it completes, which may be empty."""

    def finish(self) -> str:
        """Ends the output; returns U+FFFD for an incomplete last character, otherwise ""."""


class TokenBytes:
    """Bytes of each token of one tokenizer. Any thread may use it.

    `num_stripped`: spaces that the decoder removes at the start of a text. `joins_first`: instead,
    it removes all spaces of the first token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: frozenset[int]) -> None:
        """Raises NotImplementedError if the decoder does not map tokens to bytes."""
        self._backend = backend
        self._special_ids = special_ids
        self._bytes: dict[int, bytes] = {}
        self._convert, self.num_stripped, self.joins_first = _converter(backend)

    def __getitem__(self, token_id: int) -> bytes:
        """The token's bytes; empty for special tokens and unknown ids."""
        cached = self._bytes.get(token_id)
        if cached is None:
            token = None if token_id in self._special_ids else self._backend.id_to_token(token_id)
            cached = self._bytes[token_id] = b"" if token is None else self._convert(token)
        return cached

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """Detokenizer of an output after this prompt."""
        return _ByteDetokenizer(self, prompt_ids)


class _ByteDetokenizer:
    """Decodes the bytes of tokens as UTF-8."""

    def __init__(self, token_bytes: TokenBytes, prompt_ids: Sequence[int]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_to_strip = self._remaining_to_strip(prompt_ids)
        for part in self._last_bytes(prompt_ids):
            self._decoder.decode(part)

    def _remaining_to_strip(self, prompt_ids: Sequence[int]) -> int:
        """Number of leading spaces still to strip after the prompt."""
        remaining = self._token_bytes.num_stripped
        joins_first = self._token_bytes.joins_first
        for token_id in prompt_ids:
            if remaining == 0:
                break
            for byte in self._token_bytes[token_id]:
                remaining = remaining - 1 if byte == _SPACE and not joins_first else 0
                if remaining == 0:
                    break
        return remaining

    def _last_bytes(self, prompt_ids: Sequence[int]) -> Iterable[bytes]:
        """The prompt's last bytes, enough to hold an incomplete character at its end."""
        parts: deque[bytes] = deque()
        num_bytes = 0
        for token_id in reversed(prompt_ids):
            if num_bytes >= _MAX_CHARACTER_BYTES:
                break
            parts.appendleft(self._token_bytes[token_id])
            num_bytes += len(parts[0])
        return parts

    def push(self, token_id: int) -> str:
        text = self._decoder.decode(self._token_bytes[token_id])
        return self._stripped(text) if self._num_to_strip and text else text

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)

    def _stripped(self, text: str) -> str:
        rest = text.lstrip(" ")
        num_spaces = len(text) - len(rest)
        num_stripped = min(num_spaces, self._num_to_strip)
        if self._token_bytes.joins_first:
            self._num_to_strip = 0
            return text.replace(" ", "")
        self._num_to_strip = 0 if rest else self._num_to_strip - num_stripped
        return text[num_stripped:]


class WindowDetokenizer:
    """Decodes the last tokens as one, for decoders that do not map tokens to bytes.

    `decode`: text of token ids. `has_text`: whether a token has text at all.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], has_text: Callable[[int], bool],
        prompt_ids: Sequence[int],
    ) -> None:  # fmt: skip
        self._decode = decode
        self._has_text = has_text
        tail = (i for i in reversed(prompt_ids) if has_text(i))
        self._token_ids = [i for i, _ in zip(tail, range(_NUM_WINDOW_TOKENS), strict=False)][::-1]
        self._window_text = decode(self._token_ids)

    def push(self, token_id: int) -> str:
        if not self._has_text(token_id):
            return ""
        text = self._decode([*self._token_ids, token_id])
        new_text = text[len(self._window_text) :]
        self._token_ids = [*self._token_ids, token_id][-_NUM_WINDOW_TOKENS:]
        self._window_text = self._decode(self._token_ids)
        return new_text

    def finish(self) -> str:
        return ""


def _converter(backend: tokenizers.Tokenizer) -> tuple[Callable[[str], bytes], int, bool]:
    """Function from token to bytes; `num_stripped` and `joins_first` as in TokenBytes.

    Raises NotImplementedError if the decoder does not map tokens to bytes.
    """
    steps = _steps(backend)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, 0, False
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        strips = steps[0].get("prepend_scheme", "always") != "never"
        return (lambda token: token.replace(mark, " ").encode()), int(strips), strips
    num_stripped = 0
    if kinds and kinds[-1] == "Strip":
        strip = steps.pop()
        if kinds[-2:-1] != ["Fuse"] or strip["content"] != " " or strip["stop"]:
            raise NotImplementedError("Strip of single tokens")
        num_stripped = strip["start"]
    if not steps or {step["type"] for step in steps} - {"Replace", "ByteFallback", "Fuse"}:
        raise NotImplementedError(", ".join(kinds) or "no decoder")
    replaced = [_replacement(step) for step in steps if step["type"] == "Replace"]
    if "Fuse" in kinds and "Replace" in kinds[kinds.index("Fuse") :]:
        raise NotImplementedError("Replace over several tokens")
    has_byte_tokens = "ByteFallback" in kinds

    def convert(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        if has_byte_tokens and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.encode()

    return convert, num_stripped, False


def _steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The tokenizer's decoders in the order of their application."""

    def flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
        if decoder["type"] == "Sequence":
            return [step for inner in decoder["decoders"] for step in flat(inner)]
        return [decoder]

    if backend.decoder is None:
        return []
    return flat(json.loads(backend.decoder.__getstate__()))


def _replacement(step: dict[str, Any]) -> tuple[str, str]:
    if "String" not in step["pattern"]:
        raise NotImplementedError("Replace of a regular expression")
    return step["pattern"]["String"], step["content"]


def _byte_characters() -> dict[str, int]:
    """Byte of each character of byte-level BPE: the inverse of GPT-2's `bytes_to_unicode`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    unchanged = {chr(byte): byte for byte in printable}
    return unchanged | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_characters()


def _byte_level(token: str) -> bytes:
    """Bytes of a token. With any other character it is plain text: added tokens are not encoded."""
    values = [_BYTE_OF_CHARACTER.get(character) for character in token]
    known = [value for value in values if value is not None]
    return bytes(known) if len(known) == len(values) else token.encode()

"""Re-encoding between the tokenizers of a target and a draft of another family, by their text.

The common text of both is bytes. A special token has the text of the target's token; those with the
same text, or the same role (BOS, EOS), are each other's counterpart. Special tokens of the target
without a counterpart have no text. Pure; a failure to encode costs draft tokens, never exactness.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence

from outrider.errors import ConfigError
from outrider.tokenizer import Tokenizer

# Tokens before a place in the text that are encoded again with the text after it: more than any
# rule for splitting words looks back.
WINDOW = 16
# A text is encoded after one of these, because some tokenizers put a space before a first word.
_ANCHORS = ("\n", "a", ".")
# A window may begin inside a character of at most this many bytes.
_MAX_CHARACTER_BYTES = 4


def complete_text(data: bytes) -> tuple[str, bytes]:
    """The text of whole characters, and the bytes of an incomplete one at the end."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return text, decoder.getstate()[0]


class _Side:
    """One of the two tokenizers. `special_texts`: common text of special tokens, by id.

    `renamed`: texts of special tokens in the common text and in this tokenizer, where they differ.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        special_texts: Mapping[int, bytes],
        renamed: Mapping[str, str],
    ) -> None:
        self.tokenizer = tokenizer
        if tokenizer.token_bytes is None:
            raise ConfigError(
                f"target_tokenizer: the {name}'s tokens are no bytes of the text; only byte-level "
                "and SentencePiece tokenizers can be re-encoded"
            )
        self._token_bytes = tokenizer.token_bytes
        self._special_texts = special_texts
        self._renamed = renamed
        self._anchor_ids = {anchor: self._ids(anchor) for anchor in _ANCHORS}

    def is_special(self, token_id: int) -> bool:
        return self.tokenizer.special_text(token_id) is not None

    def text(self, token_id: int) -> bytes:
        """Common text of the token; empty for an unknown id, or without a counterpart."""
        special = self._special_texts.get(token_id)
        return self._token_bytes[token_id] if special is None else special

    def joined(self, token_ids: Iterable[int]) -> bytes:
        return b"".join(map(self.text, token_ids))

    def start_text(self, token_ids: Sequence[int]) -> bytes:
        """Common text of a context, without the space that its tokenizer puts before it."""
        num_special = 0
        while num_special < len(token_ids) and self.is_special(token_ids[num_special]):
            num_special += 1
        first, rest = self.joined(token_ids[:num_special]), self.joined(token_ids[num_special:])
        return first + (rest.removeprefix(b" ") if self._token_bytes.num_stripped else rest)

    def _ids(self, text: str, *, adds_special: bool = False) -> list[int]:
        for common, own in self._renamed.items():
            text = text.replace(common, own)
        return self.tokenizer.encode(text, add_special_tokens=adds_special)

    def encode_start(self, text: str) -> list[int]:
        """Ids of a whole context, with BOS if the tokenizer adds it."""
        without = self._ids(text)
        has_bos = bool(without) and self.is_special(without[0])
        return without if has_bos else self._ids(text, adds_special=True)

    def encode(self, text: str) -> list[int] | None:
        """Ids of a text within another; None if no ids have exactly this text."""
        data = text.encode()
        candidates = self._candidates(text)
        return next((ids for ids in candidates if self.joined(ids) == data), None)

    def encode_nearly(self, text: str) -> list[int]:
        """As `encode`, but of the nearest text that the tokenizer can encode."""
        return next(self._candidates(text))

    def _candidates(self, text: str) -> Iterator[list[int]]:
        for anchor, prefix in self._anchor_ids.items():
            ids = self._ids(anchor + text)
            if ids[: len(prefix)] == prefix:
                yield ids[len(prefix) :]
        yield self._ids(text)

    def encode_after(self, before: Sequence[int], data: bytes) -> tuple[int, list[int]] | None:
        """Ids of a text after `before`: how many of those stay, and the ids after them.

        The last tokens before a text may be other ones with it. Both may end inside a character;
        `data` is encoded up to its last whole one. None as in `encode`.
        """
        for start in range(min(len(before), _MAX_CHARACTER_BYTES)):
            text = _whole_text(self.joined(before[start:]) + data)
            if text is not None and (ids := self.encode(text)) is not None:
                num_same = _num_same(before[start:], ids)
                return start + num_same, ids[num_same:]
        text = _whole_text(data)
        alone = None if text is None else self.encode(text)
        return None if alone is None else (len(before), alone)


def _whole_text(data: bytes) -> str | None:
    """The text of the whole characters; None if any bytes but the last are none."""
    text, rest = complete_text(data)
    return text if text.encode() + rest == data else None


class Reencoder:
    """Re-encodes for one pair of tokenizers. Immutable; any thread may use it."""

    def __init__(self, target: Tokenizer, draft: Tokenizer) -> None:
        """Raises ConfigError if a tokenizer's tokens are not bytes of the text."""
        of_draft: dict[int, bytes] = {}
        renamed: dict[str, str] = {}
        for target_text, draft_id in _counterparts(target, draft).items():
            of_draft[draft_id] = target_text.encode()
            if (own := draft.special_text(draft_id)) is not None and own != target_text:
                renamed[target_text] = own
        shared = {text.decode() for text in of_draft.values()}
        of_target = {
            token_id: text.encode() if text in shared else b""
            for text, token_id in target.special_ids.items()
        }
        self.vocab_size = draft.vocab_size
        self._target = _Side("target", target, of_target, {})
        self._draft = _Side("draft", draft, of_draft, renamed)
        self._default_id = draft.eos_token_id or 0

    def target_text(self, token_ids: Iterable[int]) -> bytes:
        """Text of target tokens within a context."""
        return self._target.joined(token_ids)

    def draft_text(self, token_id: int) -> bytes:
        """Text of a draft token; empty if nothing can be drafted after it."""
        return self._draft.text(token_id)

    def is_last(self, token_id: int) -> bool:
        """Whether nothing is drafted after the draft token: it is special."""
        return self._draft.is_special(token_id)

    def draft_context(self, target_ids: Sequence[int]) -> tuple[list[int], bytes]:
        """Draft tokens of a whole context, at least one; bytes at its end that they do not have."""
        text, rest = complete_text(self._target.start_text(target_ids))
        return self._draft.encode_start(text) or [self._default_id], rest

    def extended_draft(self, before: Sequence[int], data: bytes) -> tuple[int, list[int], bytes]:
        """Draft tokens of a text after the tokens `before`.

        How many of those stay, the tokens after them, and bytes at the end that they do not have.
        """
        found = self._draft.encode_after(before, data)
        text, rest = complete_text(data)
        if found is None:  # invalid, normalised or unknown characters: as near as can be
            return len(before), self._draft.encode_nearly(text), rest
        return *found, rest

    def target_tokens(self, before: Sequence[int], data: bytes) -> list[int]:
        """Target tokens of a text after the tokens `before`; empty if it cannot be encoded.

        As the target's tokenizer splits the text, if it leaves the tokens before as they are.
        """
        found = self._target.encode_after(before, data)
        if found is not None and found[0] < len(before):
            text = _whole_text(data)
            alone = None if text is None else self._target.encode(text)
            found = None if alone is None else (len(before), alone)
        return [] if found is None else found[1]


def load_reencoders(draft: str, targets: Sequence[str]) -> dict[str, Reencoder]:
    """A re-encoder for each target tokenizer, by its fingerprint. Takes about a second each.

    `draft`, `targets`: directories or Hub names. Those with the draft's own tokenizer need none.
    Raises ConfigError.
    """
    if not targets:
        return {}
    own = Tokenizer.load(draft)
    if own is None:
        raise ConfigError(f"target_tokenizer: the draft {draft} has no tokenizer itself")
    found: dict[str, Reencoder] = {}
    for name in targets:
        tokenizer = Tokenizer.load(name)
        if tokenizer is None:
            raise ConfigError(f"target_tokenizer: {name} has no tokenizer")
        if tokenizer.fingerprint != own.fingerprint:
            found[tokenizer.fingerprint] = Reencoder(tokenizer, own)
    return found


def _counterparts(target: Tokenizer, draft: Tokenizer) -> dict[str, int]:
    """The draft's special token for the text of each of the target's that has a counterpart."""
    found = {t: i for t, i in draft.special_ids.items() if t in target.special_ids}
    for role in ("bos_token", "eos_token"):
        text, token_id = (
            target.special_token(role),
            draft.special_ids.get(draft.special_token(role)),
        )
        if text in target.special_ids and token_id is not None and text not in found:
            found[text] = token_id
    return found


def _num_same(first: Sequence[int], second: Sequence[int]) -> int:
    for number, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return number
    return min(len(first), len(second))

"""A tokenizer whose tokens are single bytes, and some that begin or end inside a character."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from outrider.tokenizer import Tokenizer

# Ids 0 to 255 are the bytes. What follows spans characters, their halves, and stop strings.
LONGER = (
    b"ab",
    b"abc",
    b"the ",
    b" th",
    b"\xe4\xbd",
    b"\xbd\xa0",
    b"\xa0a",
    b"c\xe4",
    "é".encode(),
    "你a".encode(),
)
EOS = 256 + len(LONGER)
VOCAB_SIZE = EOS + 1


def bytes_of(token_id: int) -> bytes:
    """Empty for EOS."""
    if token_id < 256:
        return bytes([token_id])
    return LONGER[token_id - 256] if token_id < EOS else b""


def add_byte_tokenizer(directory: Path) -> Path:
    """Writes `tokenizer.json`; the last token, EOS, is special."""
    directory.mkdir(exist_ok=True)
    shown = _shown_bytes()
    names = ["".join(shown[byte] for byte in bytes_of(i)) for i in range(EOS)]
    vocab = {name: i for i, name in enumerate([*names, "</s>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def load_byte_tokenizer(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(str(add_byte_tokenizer(directory)))
    assert tokenizer is not None
    return tokenizer


def _shown_bytes() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(hidden)
    }


def text_of(token_ids: Sequence[int], special: bytes = b"") -> str:
    """By Python's own decoder. `special`: text of EOS."""
    parts = (special if token_id == EOS else bytes_of(token_id) for token_id in token_ids)
    return b"".join(parts).decode(errors="replace")


def certain_text_of(token_ids: Sequence[int]) -> str:
    """Without the bytes at its end that may become a character."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(
        b"".join(map(bytes_of, token_ids))
    )

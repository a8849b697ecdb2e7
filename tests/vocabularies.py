"""Tokenizers with real and synthetic vocabularies, as files of a model. No network."""

from __future__ import annotations

import base64
import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

MISTRAL_DATA = Path(str(files("mistral_common") / "data"))


def write_config(directory: Path, **settings: Any) -> None:
    """Writes tokenizer_config.json."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def write_sentencepiece(directory: Path, vocabulary: str = "tokenizer.model.v1") -> Path:
    """Mistral's SentencePiece vocabulary (32,000 tokens, byte fallback), not converted."""
    directory.mkdir(exist_ok=True)
    shutil.copy(MISTRAL_DATA / vocabulary, directory / "tokenizer.model")
    write_config(directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return directory


def tekken() -> tokenizers.Tokenizer:
    """Mistral's byte-level vocabulary (131,072 tokens, 1,000 of them special), without merges."""
    told = json.loads((MISTRAL_DATA / "tekken_240911.json").read_text("utf-8"))
    num_special = told["config"]["default_num_special_tokens"]
    size = told["config"]["default_vocab_size"]
    shown = [bytes_to_unicode()[byte] for byte in range(256)]
    pieces = [
        "".join(shown[byte] for byte in base64.b64decode(entry["token_bytes"]))
        for entry in told["vocab"][: size - num_special]
    ]
    special = [f"<SPECIAL_{index}>" for index in range(num_special)]
    vocab = {piece: index for index, piece in enumerate([*special, *pieces])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """Every byte and some pieces, decoded as Gemma does: nothing is stripped."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "c", "x", "▁a", "▁▁", "é", "A", "B", "C", "ab"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "a"), ("▁", "▁"), ("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return backend


def metaspace() -> tokenizers.Tokenizer:
    """Decoded as T5 does: the first token's space is dropped."""
    backend = tokenizers.Tokenizer(models.WordLevel(
        {word: i for i, word in enumerate(["<unk>", "▁a", "▁", "b", "▁▁c", "a▁b", "é"])}, "<unk>"
    ))  # fmt: skip
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    return backend


def unigram() -> tokenizers.Tokenizer:
    """ASCII and some pieces, decoded as T5 does; it has no tokens for most characters."""
    pieces = [
        "<unk>",
        *map(chr, range(33, 127)),
        "▁",
        "\n",
        "é",
        "\u0301",
        "▁{",
        '":',
        "▁the",
        "two",
        "ab",
    ]
    backend = tokenizers.Tokenizer(
        models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0)
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>"])
    return backend


def word_piece() -> tokenizers.Tokenizer:
    """A decoder that is no map from tokens to bytes."""
    words = ["[UNK]", "the", "cat", "##s", "##é", "a", "b", "##b", "你"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[SEP]"])
    return backend


def save(backend: tokenizers.Tokenizer, directory: Path, **settings: Any) -> Path:
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    write_config(directory, **settings)
    return directory

"""Pairs of tiny models that several files use, and every way of sampling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.e2e import byte_tokenizer
from tests.e2e.reference import Reference, Sampling
from tests.tiny_models import make_tiny_draft, make_tiny_model

# Of SpreadPair.
VOCAB_SIZE = 8  # the last is EOS
PROMPT = [1, 4, 2, 0, 3]

# EOS is ignored where nothing else is said.
CASES: dict[str, Sampling] = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.15},
    "penalties": {
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.3,
    },
    "rewards": {"presence_penalty": -0.3, "frequency_penalty": -0.05, "repetition_penalty": 0.9},
    "logit_bias": {"logit_bias": {0: 1.5, 3: -2.0, 6: 0.7}},
    "allowed": {
        "allowed_token_ids": [0, 2, 3, 5, 6],
        "bad_words_token_ids": [{"ids": [5]}, {"ids": [2, 3]}, {"ids": [0, 6, 0]}],
    },
    "stops": {"min_tokens": 14, "stop_token_ids": [2, 5], "ignore_eos": False},
    "all": {
        "temperature": 0.9,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.02,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "repetition_penalty": 1.1,
        "logit_bias": {1: 0.5},
        "allowed_token_ids": [0, 1, 2, 3, 4, 6, 7],
        "min_tokens": 15,
        "stop_token_ids": [6],
        "ignore_eos": False,
        "bad_words_token_ids": [{"ids": [2, 2]}, {"ids": [4, 3]}, {"ids": [3, 0]}],
    },
}


class TinyPair:
    """256 tokens, a draft that mostly agrees, and laws so spread that the seed matters."""

    def __init__(self, directory: Path) -> None:
        self.target = make_tiny_model(
            "llama", directory / "target", scale=0.5, max_position_embeddings=2048
        )
        self.draft = make_tiny_draft(self.target, directory / "draft", noise=0.05)
        self.reference = Reference(self.target)


class SpreadPair:
    """8 tokens, that laws can be enumerated; the draft often disagrees, and is surer."""

    def __init__(self, directory: Path) -> None:
        self.target = make_tiny_model(
            "llama", directory / "target", vocab_size=VOCAB_SIZE, scale=0.25, num_layers=1
        )
        self.draft = sharpened(make_tiny_draft(self.target, directory / "draft", noise=0.2))
        self.reference = Reference(self.target)
        self.draft_reference = Reference(self.draft)


class TextPair:
    """With a byte-level tokenizer, whose EOS is the last token."""

    def __init__(self, directory: Path) -> None:
        self.target = make_tiny_model(
            "llama", directory / "target", scale=0.5, vocab_size=byte_tokenizer.VOCAB_SIZE
        )
        self.draft = make_tiny_draft(self.target, directory / "draft", noise=0.05)
        for model in (self.target, self.draft):
            byte_tokenizer.add_byte_tokenizer(model)
        self.reference = Reference(self.target)


def sharpened(directory: Path, factor: float = 2.0) -> Path:
    """Multiplies the logits: surer than the target, its supports leave much outside."""
    path = directory / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["model.norm.weight"] *= factor
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    return directory


class OtherTokenizerPair:
    """As SpreadPair, with tokenizers of different ids and tokens, all of letters a to d.

    The draft's rows of the letters are the target's, so it often agrees in the text.
    """

    TARGET_TOKENS = ("a", "b", "c", "d", "ab", "cd", "da", "</s>")
    DRAFT_TOKENS = ("</s>", "dc", "d", "bc", "c", "b", "a", "aa")

    def __init__(self, directory: Path) -> None:
        self.target = make_tiny_model(
            "llama", directory / "target", vocab_size=VOCAB_SIZE, scale=0.25, num_layers=1
        )
        self.draft = sharpened(make_tiny_draft(self.target, directory / "draft", noise=0.1))
        _write_letter_tokenizer(self.target, self.TARGET_TOKENS)
        _write_letter_tokenizer(self.draft, self.DRAFT_TOKENS)
        path = self.draft / "model.safetensors"
        weights = safetensors.torch.load_file(path)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = weights[name]
            ids = [
                self.TARGET_TOKENS.index(token if token in self.TARGET_TOKENS else token[-1])
                for token in self.DRAFT_TOKENS
            ]
            weights[name] = rows[ids].clone()
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
        self.reference = Reference(self.target)


def _write_letter_tokenizer(directory: Path, tokens: Sequence[str]) -> None:
    merges = [(token[0], token[1]) for token in tokens if len(token) == 2]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")

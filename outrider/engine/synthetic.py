"""Random model pairs of any vocabulary, for measuring what depends on nothing but its size.

Owns their shape. The draft is the target with a little noise, so that it mostly agrees; logits are
peaked alike whatever the vocabulary, so that acceptance is alike too. Without tokenizer: prompts
are token ids. `python -m outrider.engine.synthetic DIRECTORY VOCAB_SIZE` makes one.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Random logits of deviation sqrt(2 ln V) hold their mass in a few tokens at any V (the random
# energy model's freezing point); half above it they are about as peaked as a real model's.
_PEAKEDNESS = 1.5
# Of each weight's own deviation: accepts about half of the draft at temperature 1.
_NOISE = 0.02


def make_pair(directory: Path, vocab_size: int, *, seed: int = 0) -> tuple[Path, Path]:
    """Writes `directory/target` and `directory/draft`, and returns them."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(vocab_size)).train(False)
        sample = torch.randint(0, vocab_size, (1, 64))
        std = float(model(input_ids=sample, use_cache=False).logits.std())
        model.model.norm.weight.mul_(_PEAKEDNESS * math.sqrt(2 * math.log(vocab_size)) / std)
        model.save_pretrained(directory / "target")
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn_like(weight) * _NOISE * weight.std())
        model.save_pretrained(directory / "draft")
    return directory / "target", directory / "draft"


def _config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=vocab_size - 1,
    )


if __name__ == "__main__":
    make_pair(Path(sys.argv[1]), int(sys.argv[2]))

"""The pair on disk: bfloat16 safetensors, the tokenizer beside them, read back as float32.

Owns the format, so that whoever trains, measures or tests the pair sees the same weights.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes a copy of the model in bfloat16, and the tokenizer beside it."""
    rounded = copy.deepcopy(model)
    rounded.bfloat16()
    rounded.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load(directory: Path) -> LlamaForCausalLM:
    """Reads a model in float32, in evaluation mode."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    model.train(False)
    return model


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Reads the tokenizer as anybody does, through `AutoTokenizer`."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer

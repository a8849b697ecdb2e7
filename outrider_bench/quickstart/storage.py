"""Files of the pair: bfloat16 safetensors with the tokenizer, loaded as float32.

Training, evaluation and tests use these functions, so they see the same weights.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes a copy of the model in bfloat16, and the tokenizer to the same directory."""
    rounded = copy.deepcopy(model)
    rounded.bfloat16()
    rounded.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load(directory: Path) -> LlamaForCausalLM:
    """Loads a model in float32, in evaluation mode."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    model.train(False)
    return model


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer through `AutoTokenizer`."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer

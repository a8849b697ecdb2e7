"""Shapes of the quickstart pair: two Llama configurations, and their initialisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    # 64 is the smallest head size that every CUDA attention backend (FlashInfer among them)
    # accepts.
    head_dim: int = 64


MAX_POSITIONS = 2048
TARGET_SHAPE = ModelShape(256, 6, 4, 2, 768)
DRAFT_SHAPE = ModelShape(128, 2, 2, 1, 512)


def llama_config(
    shape: ModelShape, *, vocab_size: int, end_of_text_id: int, end_of_turn_id: int
) -> LlamaConfig:
    """A Llama configuration with tied embeddings and plain rotary positions.

    Either end token ends a generation. There is no padding token: its embedding would not be
    trained, and nothing here pads.
    """
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=end_of_text_id,
        eos_token_id=[end_of_text_id, end_of_turn_id],
    )


def new_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A randomly initialised model; the same seed gives the same one. Restores the global RNG."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def num_parameters(model: torch.nn.Module) -> int:
    """Number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())

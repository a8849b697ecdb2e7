"""Tiny random models of the families in `outrider.engine.loading.families`, by model type.

Those of `tests/tiny_models.py` are not repeated here: other tests use them, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_GROUPED = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 255,
}
_PLAIN = {k: v for k, v in _GROUPED.items() if k != "num_key_value_heads"}
_NO_RANGE = {k: v for k, v in _PLAIN.items() if k not in ("initializer_range", "intermediate_size")}
_HEADS = {**_GROUPED, "head_dim": 16}
_WINDOW = {"sliding_window": 13}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {
    "vocab_size": 256,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 255,
}
# Keys are longer than values.
_LATENT = {
    **_PLAIN,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 256}
_LAYER_TYPES = ["sliding_attention", "full_attention"] * 2

# Configuration class and its fields.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", _GROUPED),
    "arcee": ("Arcee", _GROUPED),
    "codegen": ("CodeGen", {**_GPT2, "rotary_dim": 8}),
    "cohere": ("Cohere", _GROUPED),
    "cohere2": ("Cohere2", {**_GROUPED, **_WINDOW}),
    "deepseek_v2": ("DeepseekV2", _LATENT),
    "deepseek_v3": ("DeepseekV3", _LATENT),
    "ernie4_5": ("Ernie4_5", _HEADS),
    "exaone4": ("Exaone4", {**_GROUPED, **_WINDOW}),
    "gemma": ("Gemma", {**_GROUPED, "head_dim": 24, "tie_word_embeddings": False}),
    # The last two layers attend to keys and values of the first two.
    "gemma3n_text": ("Gemma3nText", {
        **_HEADS, **_WINDOW, **_PER_LAYER, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "laurel_rank": 8, "altup_num_inputs": 2, "intermediate_size": [96] * 4,
        "layer_types": _LAYER_TYPES, "activation_sparsity_pattern": [0.0] * 4,
        "tie_word_embeddings": False}),
    "gemma4_text": ("Gemma4Text", {
        **_HEADS, **_WINDOW, **_PER_LAYER, "num_hidden_layers": 4, "global_head_dim": 32,
        "layer_types": _LAYER_TYPES, "num_kv_shared_layers": 0, "tie_word_embeddings": False}),
    "glm": ("Glm", _HEADS),
    "glm4": ("Glm4", _HEADS),
    "glm4_moe": ("Glm4Moe", {**_HEADS, "moe_intermediate_size": 32, "n_routed_experts": 4,
                             "num_experts_per_tok": 2, "first_k_dense_replace": 1}),
    "gpt_bigcode": ("GPTBigCode", _GPT2),
    "gpt_neox": ("GPTNeoX", _PLAIN),
    # Attention sinks and sliding windows: no fused kernel supports both.
    "gpt_oss": ("GptOss", {**_HEADS, **_WINDOW, **_EXPERTS}),
    "gptj": ("GPTJ", {**_GPT2, "rotary_dim": 8}),
    "granite": ("Granite", _GROUPED),
    "granitemoe": ("GraniteMoe", {**_GROUPED, **_EXPERTS}),
    "helium": ("Helium", _HEADS),
    "hunyuan_v1_dense": ("HunYuanDenseV1", _HEADS),
    "ministral": ("Ministral", {**_HEADS, **_WINDOW}),
    "mixtral": ("Mixtral", {**_GROUPED, **_WINDOW, **_EXPERTS}),
    "nemotron": ("Nemotron", _GROUPED),
    "olmo": ("Olmo", _GROUPED),
    "olmo2": ("Olmo2", _GROUPED),
    "olmo3": ("Olmo3", {**_GROUPED, **_WINDOW}),
    "olmoe": ("Olmoe", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPT", {**_NO_RANGE, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "persimmon": ("Persimmon", _PLAIN),
    "phi": ("Phi", _GROUPED),
    "phimoe": ("Phimoe", {**_GROUPED, **_EXPERTS}),
    # Does not pass the window to attention.
    "qwen2_moe": ("Qwen2Moe", {
        **_GROUPED, **_WINDOW, "use_sliding_window": True, "max_window_layers": 1,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {**_GROUPED, "head_dim": 24, "moe_intermediate_size": 32,
                               "num_experts": 4, "num_experts_per_tok": 2}),
    "seed_oss": ("SeedOss", _HEADS),
    "smollm3": ("SmolLM3", _GROUPED),
    "stablelm": ("StableLm", _GROUPED),
    "starcoder2": ("Starcoder2", {**_GROUPED, **_WINDOW}),
}  # fmt: skip


def save_family(model_type: str, directory: Path) -> Any:
    """Saves a random model, and returns it."""
    name, fields = MODELS[model_type]
    config = getattr(transformers, f"{name}Config")(**fields)
    auto: Any = transformers.AutoModelForCausalLM
    logs: Any = transformers.utils.logging
    logs.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config)
        for name, weight in model.named_parameters():
            if "sinks" in name:  # left uninitialised
                torch.nn.init.normal_(weight)
    model.save_pretrained(directory)
    return model

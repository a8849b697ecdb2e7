"""Further model families, for what they add: sinks, latent attention, experts, other positions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from outrider.engine import Append, EngineOptions, load_engine
from outrider.errors import ModelError
from tests.engine.reference import Reference, Shadow

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
_WINDOW = {"sliding_window": 13}

_MODELS: dict[str, dict[str, Any]] = {
    # These two got transformers' attention interface after 5.17: refused by name before.
    "CodeGen": {"vocab_size": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8,
                "n_positions": 512, "initializer_range": 0.2, "bos_token_id": 0,
                "eos_token_id": 255},
    "GPTJ": {"vocab_size": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8,
             "n_positions": 512, "initializer_range": 0.2, "bos_token_id": 0,
             "eos_token_id": 255},
    # Attention sinks and sliding windows: no fused kernel supports both.
    "GptOss": {**_GROUPED, **_WINDOW, "head_dim": 16, "num_local_experts": 4,
               "num_experts_per_tok": 2},
    # Keys are longer than values.
    "DeepseekV3": {**_PLAIN, "num_key_value_heads": 4, "moe_intermediate_size": 32,
                   "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                   "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
                   "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
                   "v_head_dim": 12},
    "Mixtral": {**_GROUPED, **_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    # Does not pass the window to attention.
    "Qwen2Moe": {**_GROUPED, **_WINDOW, "use_sliding_window": True, "max_window_layers": 1,
                 "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
                 "num_experts": 4, "num_experts_per_tok": 2},
    "Cohere2": {**_GROUPED, **_WINDOW},
    "Gemma": {**_GROUPED, "head_dim": 24, "tie_word_embeddings": False},
    "GPTNeoX": _PLAIN,
    "Granite": _GROUPED,
    "OPT": {**_PLAIN, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "Olmo2": _GROUPED,
    "Phi": _GROUPED,
    "SmolLM3": _GROUPED,
    "StableLm": _GROUPED,
    "Starcoder2": {**_GROUPED, **_WINDOW},
}  # fmt: skip


_LATE_FAMILIES = ("CodeGen", "GPTJ")


def _uses_attention_interface(model: torch.nn.Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(model).__module__])


@pytest.mark.parametrize("family", _MODELS)
def test_equals_eager(family: str, tmp_path: Path) -> None:
    fields = dict(_MODELS[family])
    if family == "OPT":
        del fields["initializer_range"], fields["intermediate_size"]
    config = getattr(transformers, f"{family}Config")(**fields)
    auto: Any = transformers.AutoModelForCausalLM
    logs: Any = transformers.utils.logging
    logs.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config)
        for name, weight in model.named_parameters():
            if "sinks" in name:  # left uninitialised
                torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    if family in _LATE_FAMILIES and not _uses_attention_interface(model):
        with pytest.raises(ModelError, match="does not use transformers' attention interface"):
            load_engine(EngineOptions(str(tmp_path), kv_cache_tokens=256))
        return

    engine = load_engine(EngineOptions(str(tmp_path), kv_cache_tokens=256))
    shadow = Shadow(Reference(tmp_path), seed=0)
    first, second = engine.store.open(60), engine.store.open(60)
    tokens: list[list[int]] = [[], []]
    for counts, cut in [((21, 40), 0), ((5, 1), 3), ((1, 5), 1), ((7, 6), 0)]:
        new = [shadow.random_tokens(count) for count in counts]
        logits = engine.forward([Append(first, new[0], counts[0]), Append(second, new[1], 1)])
        for appended, ids in zip(tokens, new, strict=True):
            appended += ids
        shadow.assert_rows(logits[: counts[0]], tokens[0], f"{family}, first")
        shadow.assert_rows(logits[counts[0] :], tokens[1], f"{family}, second")
        engine.store.truncate(first, first.length - cut)
        del tokens[0][first.length :]
    engine.store.check_integrity()

"""Table of model families that tests compare with transformers, and of those that are refused.

`scripts/reference.py` writes docs/reference/supported-models.md from it. Tests run a small random
model of each family, and check that each refusal has the reason given here. A family that is not
listed may serve too: every model is compared with its own eager logits when it is loaded.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

_log = logging.getLogger(__name__)


class Family(NamedTuple):
    """Models of one `model_type` of transformers.

    `examples`: published models. `features`: what the tests cover beyond plain attention.
    """

    model_type: str
    examples: str
    features: str = ""


class Refusal(NamedTuple):
    """A family that is refused when it is loaded. `reason`: part of the error message."""

    model_type: str
    examples: str
    reason: str


FAMILIES = (
    Family("apertus", "Apertus"),
    Family("arcee", "AFM"),
    Family("codegen", "CodeGen (transformers 5.18 or newer)"),
    Family("cohere", "Command R"),
    Family("cohere2", "Command R7B, Command A", "sliding windows, layers without positions"),
    Family("deepseek_v2", "DeepSeek V2", "experts, latent attention"),
    Family("deepseek_v3", "DeepSeek V3, R1", "experts, latent attention"),
    Family("ernie4_5", "ERNIE 4.5"),
    Family("exaone4", "EXAONE 4", "sliding windows"),
    Family("gemma", "Gemma 1"),
    Family("gemma2", "Gemma 2", "sliding windows, soft-capped scores and logits"),
    Family("gemma3_text", "Gemma 3 (text)", "sliding windows, a rope for each layer type"),
    Family("gemma3n_text", "Gemma 3n (text)", "sliding windows, layers that share keys and values"),
    Family("gemma4_text", "Gemma 4 (text)", "sliding windows, layers of two shapes"),
    Family("glm", "GLM 4 9B (2024)"),
    Family("glm4", "GLM 4 (2025)"),
    Family("glm4_moe", "GLM 4.5", "experts"),
    Family("gpt2", "GPT-2"),
    Family("gpt_bigcode", "StarCoder 1", "one head of keys and values"),
    Family("gpt_neox", "Pythia, GPT-NeoX"),
    Family("gpt_oss", "gpt-oss", "experts, sliding windows, attention sinks"),
    Family("gptj", "GPT-J (transformers 5.18 or newer)"),
    Family("granite", "Granite 3"),
    Family("granitemoe", "Granite 3 MoE", "experts"),
    Family("helium", "Helium"),
    Family("hunyuan_v1_dense", "Hunyuan (dense)"),
    Family("llama", "Llama 2, 3, SmolLM 2, Yi, DeepSeek distilled",
           "ropes llama3, yarn, linear, dynamic, longrope"),
    Family("ministral", "Ministral", "sliding windows"),
    Family("mistral", "Mistral 7B, Nemo, Small", "sliding windows"),
    Family("mixtral", "Mixtral", "experts, sliding windows"),
    Family("nemotron", "Nemotron 3, Minitron"),
    Family("olmo", "OLMo 1"),
    Family("olmo2", "OLMo 2"),
    Family("olmo3", "OLMo 3", "sliding windows"),
    Family("olmoe", "OLMoE", "experts"),
    Family("opt", "OPT", "learned positions"),
    Family("persimmon", "Persimmon"),
    Family("phi", "Phi 1, 1.5, 2"),
    Family("phi3", "Phi 3, 3.5, 4", "sliding windows, rope longrope"),
    Family("phimoe", "Phi 3.5 MoE", "experts; its rope longrope is refused"),
    Family("qwen2", "Qwen 1.5, 2, 2.5, QwQ", "sliding windows, ropes yarn and linear"),
    Family("qwen2_moe", "Qwen 1.5 and 2 MoE", "experts, sliding windows"),
    Family("qwen3", "Qwen 3", "ropes yarn and linear"),
    Family("qwen3_moe", "Qwen 3 MoE", "experts"),
    Family("seed_oss", "Seed-OSS"),
    Family("smollm3", "SmolLM 3", "layers without positions"),
    Family("stablelm", "StableLM 2"),
    Family("starcoder2", "StarCoder 2", "sliding windows"),
)  # fmt: skip

_NO_INTERFACE = "does not use transformers' attention interface"
_LINEAR = "linear_attention layers"

REFUSALS = (
    Refusal("bert", "BERT and other models that read in both directions", "is not causal"),
    Refusal("bloom", "BLOOM", _NO_INTERFACE),
    Refusal("falcon", "Falcon 7B, 40B", _NO_INTERFACE),
    Refusal("falcon_h1", "Falcon H1", "hybrid layers"),
    Refusal("gpt_neo", "GPT-Neo", _NO_INTERFACE),
    Refusal("granitemoehybrid", "Granite 4 hybrid", _LINEAR),
    Refusal("jamba", "Jamba", _LINEAR),
    Refusal("lfm2", "LFM 2", "conv layers"),
    Refusal("llama4_text", "Llama 4", "chunked_attention layers"),
    Refusal("mamba", "Mamba", _LINEAR),
    Refusal("minimax", "MiniMax 01", _LINEAR),
    Refusal("mpt", "MPT", _NO_INTERFACE),
    Refusal("qwen3_5_text", "Qwen 3.5", _LINEAR),
    Refusal("qwen3_next", "Qwen3-Next", _LINEAR),
    Refusal("recurrent_gemma", "RecurrentGemma", _LINEAR),
)

_TESTED = frozenset(family.model_type for family in FAMILIES)


def log_untested(name: str, model_type: str) -> None:
    """Logs a warning for a model whose family no test compares with transformers."""
    if model_type not in _TESTED:
        _log.warning(
            "%s: %s is not among the families that are tested with every release "
            "(docs/reference/supported-models.md); it passed the self-test",
            name, model_type,
        )  # fmt: skip

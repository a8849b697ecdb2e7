"""Checks, before any rank is started, that a model can be sharded over the ranks asked for."""

from __future__ import annotations

from typing import Any

from outrider.engine.loading import quantized
from outrider.errors import ModelError

# Projections whose output features are attention heads, as transformers' plans name them.
_HEAD_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def check_plan(name: str, config: Any, size: int) -> None:
    """Raises ModelError if transformers has no plan for the model or `size` does not divide it."""
    text = config.get_text_config()
    if (used := quantized.method(config)) is not None:
        raise ModelError(
            f"{name}: tensor_parallel_size: {size} cannot be served; checkpoints quantised with "
            f"{used} are not sharded"
        )
    plan = getattr(text, "base_model_tp_plan", None) or {}
    if not any("layers." in rule for rule in plan):
        raise ModelError(
            f"{name}: tensor_parallel_size: {size} cannot be served; transformers has no "
            f"tensor-parallel plan for the layers of {text.model_type}"
        )
    for field in _DIVIDED if shards_heads(plan) else _DIVIDED[2:]:
        count = getattr(text, field, None)
        if isinstance(count, int) and count % size:
            raise ModelError(
                f"{name}: tensor_parallel_size: {size} does not divide {field} ({count})"
            )


def shards_heads(plan: dict[str, str]) -> bool:
    """Whether each rank computes only its share of the attention heads."""
    return any(
        rule.rsplit(".", 1)[-1] in _HEAD_PROJECTIONS and style == "colwise"
        for rule, style in plan.items()
    )

"""Models that this engine would serve incorrectly are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from outrider.engine import Engine, EngineOptions, load_engine
from outrider.engine.attention import interface as attention
from outrider.errors import InternalError, ModelError


def load(path: Path) -> Engine:
    return load_engine(EngineOptions(str(path), kv_cache_tokens=256))


def test_self_test_refuses_wrong_attention(
    model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models whose logits differ from eager attention are not served, whatever the reason."""
    monkeypatch.setattr(
        "outrider.engine.attention.torch_backend.attend_fused",
        lambda query, key, value, mask, scaling: attention.attend_fused(
            query, key, value, None, scaling
        ),
    )
    with pytest.raises(ModelError, match="not served correctly"):
        load(model_dir("llama"))


def test_a_model_call_outside_forward_is_refused(engine_of: Callable[[str], Engine]) -> None:
    module = engine_of("llama")._model.module
    with pytest.raises(InternalError, match=r"outside Engine\.forward"):
        module(torch.tensor([[1, 2]]), use_cache=False)

"""Rotary embeddings whose frequencies depend on length: fixed at load.

transformers chooses the frequencies of rope types `dynamic` and `longrope` by the longest sequence
of a batch. So sequences of one batch would change each other, and a growing sequence its own past.
Here every sequence has the frequencies of the longest one that the model serves (`max_model_len`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from outrider.engine.loading import supported
from outrider.errors import ModelError

BY_LENGTH = frozenset({"dynamic", "longrope"})
"""Rope types whose frequencies depend on the length of a sequence."""

# Any type that transformers does not recompute in a forward pass.
_FIXED = "fixed"


def rope_types(parameters: Any) -> Iterator[str]:
    """Rope types in a configuration's `rope_parameters`: one set, or one set per layer type."""
    if isinstance(parameters, dict):
        if isinstance(parameters.get("rope_type"), str):
            yield parameters["rope_type"]
        for value in parameters.values():
            yield from rope_types(value)


def fix_frequencies(name: str, model: Any, max_model_len: int | None = None) -> None:
    """Gives every sequence the frequencies of the longest one: `supported.context_len`.

    Raises ModelError if the model computes them in a way that cannot be fixed.
    """
    text = model.config.get_text_config()
    by_length = BY_LENGTH.intersection(rope_types(getattr(text, "rope_parameters", None)))
    if not by_length:
        return
    context_len = supported.context_len(name, model.config, max_model_len)
    embeddings = [each for each in model.modules() if hasattr(each, "rope_type")]
    for embedding in embeddings:
        _fix(embedding, context_len)
    if not embeddings or any(_depends_on_batch(each, context_len) for each in embeddings):
        raise ModelError(
            f"{name}: rope type {', '.join(sorted(by_length))!r} of {text.model_type} depends on "
            "the longest sequence of a batch, so sequences would affect each other"
        )


def fixed_frequencies(model: Any) -> bytes:
    """The frequencies that `fix_frequencies` has chosen: a part of what the model computes."""
    found = b""
    for _, module in sorted(model.named_modules()):
        kinds = getattr(module, "rope_type", None)
        if kinds == _FIXED or (isinstance(kinds, dict) and _FIXED in kinds.values()):
            for name, values in sorted(module.named_buffers()):
                if name.endswith("inv_freq") and "original" not in name:
                    found += values.float().cpu().numpy().tobytes()
            scalings = {n: v for n, v in vars(module).items() if n.endswith("attention_scaling")}
            found += repr(sorted(scalings.items())).encode()
    return found


def _fix(embedding: Any, context_len: int) -> None:
    kinds = embedding.rope_type
    if isinstance(kinds, str):
        if kinds in BY_LENGTH:
            _set(embedding, kinds, "", context_len)
            embedding.rope_type = _FIXED
        return
    for layer_type, kind in kinds.items():
        if kind in BY_LENGTH:
            _set(embedding, kind, f"{layer_type}_", context_len, layer_type=layer_type)
            kinds[layer_type] = _FIXED


def _set(embedding: Any, kind: str, prefix: str, context_len: int, **layer: str) -> None:
    former = getattr(embedding, f"{prefix}inv_freq")
    initialise: Any = ROPE_INIT_FUNCTIONS[kind]
    frequencies, scaling = initialise(embedding.config, former.device, seq_len=context_len, **layer)
    embedding.register_buffer(f"{prefix}inv_freq", frequencies, persistent=False)
    setattr(embedding, f"{prefix}attention_scaling", scaling)


@torch.inference_mode()
def _depends_on_batch(embedding: Any, context_len: int) -> bool:
    """Whether the angles of a position change with a longer sequence beside it."""
    kinds = embedding.rope_type
    layers = [{}] if isinstance(kinds, str) else [{"layer_type": kind} for kind in kinds]
    device = next(embedding.buffers()).device
    x = torch.zeros(1, device=device)
    for layer in layers:
        angles = [
            embedding(x, torch.tensor([[1, last]], device=device), **layer)[0][0, 0]
            for last in (1, context_len - 1)
        ]
        if not torch.equal(*angles):
            return True
    return False

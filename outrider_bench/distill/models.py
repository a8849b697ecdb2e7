"""Models of a distillation: loading, a draft from the target's first layers, writing the draft."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from outrider.engine.loading import checkpoint
from outrider.errors import ConfigError
from outrider.tokenizer import Tokenizer
from outrider.tokenizer_files import TOKENIZERS, TokenizerFiles

# transformers' annotations are partial.
_untyped: Any = transformers

_TOKENIZER_FILES = (
    *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def load_target(name: str, device: torch.device) -> Any:
    """The target as services load it: its checkpoint's dtype on CUDA, float32 on CPU."""
    return _load(name, device, torch.float32 if device.type == "cpu" else "auto")


def load_draft(name: str, device: torch.device) -> Any:
    """The draft in float32: small steps of a training would be lost in 16 bits."""
    return _load(name, device, torch.float32)


def _load(name: str, device: torch.device, dtype: torch.dtype | str) -> Any:
    """A causal language model in evaluation mode, without gradients. Raises ModelError.

    `name`: local directory, or name on the Hugging Face Hub.
    """
    config = checkpoint.load_config(name)
    model = checkpoint.load_weights(name, config, dtype=dtype, attention="sdpa", device_map=None)
    return model.to(device)


def check_context(model: Any, name: str, num_tokens: int) -> None:
    """Raises ConfigError if rows of this length exceed the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and num_tokens > context:
        raise ConfigError(
            f"--max-prompt-tokens, --max-tokens: {num_tokens} in all exceed the context of {name} "
            f"({context})"
        )


def first_layers(target: Any, num_layers: int) -> Any:
    """A model of the target's first layers with its embeddings, final norm and head.

    Raises ConfigError if the target has too few layers, or keeps them in an unknown place.
    """
    num_target_layers = getattr(target.config, "num_hidden_layers", 0)
    if not 1 <= num_layers < num_target_layers:
        raise ConfigError(
            f"--from-layers: {num_layers} is not possible for a target of {num_target_layers} "
            f"layers; allowed: 1 to {num_target_layers - 1}"
        )
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = list(config.layer_types)[:num_layers]
    with torch.random.fork_rng(devices=[]):
        draft = _untyped.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = target.state_dict()
    missing = [name for name in draft.state_dict() if name not in weights]
    if missing:
        raise ConfigError(
            f"--from-layers: {config.model_type} names its layers differently for a smaller model: "
            f"{missing[0]}; give a model with --draft"
        )
    draft.load_state_dict({name: weights[name] for name in draft.state_dict()})
    draft.generation_config = copy.deepcopy(target.generation_config)
    return draft.to(next(iter(target.parameters())).device).train(False)


def common_tokenizer(target: str, draft: str | None) -> Tokenizer | None:
    """The target's tokenizer; None if it has none. Raises ConfigError if the draft's differs."""
    tokenizer = Tokenizer.load(target)
    if draft is None:
        return tokenizer
    theirs = Tokenizer.load(draft)
    ours, other = (t.fingerprint if t else None for t in (tokenizer, theirs))
    if ours != other:
        raise ConfigError(
            f"--draft: the tokenizer of {draft} is not that of {target}; a draft must have its "
            "target's tokenizer"
        )
    return tokenizer


def common_vocab_size(target: Any, draft: Any) -> int:
    """Number of token ids that both models have: one may be padded."""
    sizes = (len(model.get_output_embeddings().weight) for model in (target, draft))
    return min(sizes)


def rounded(draft: Any, dtype: torch.dtype) -> Any:
    """A float32 copy of the draft with the weights that `dtype` can store."""
    return copy.deepcopy(draft).to(dtype).float()


def write_draft(draft: Any, directory: Path, *, target: str, dtype: torch.dtype) -> None:
    """Writes a Hugging Face directory: the draft, and the target's tokenizer files as they are."""
    with checkpoint.quiet():
        copy.deepcopy(draft).to(dtype).save_pretrained(directory)
    files = TokenizerFiles(target)
    for name in _TOKENIZER_FILES:
        path = files.find(name)
        if path is not None:
            shutil.copyfile(path, directory / name)


def stored_dtype(model: Any, name: str | None) -> torch.dtype:
    """The dtype that the checkpoint `name` is stored in; float32 if its configuration has none."""
    config = model.config if name is None else checkpoint.load_config(name)
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32

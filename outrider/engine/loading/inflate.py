"""Model inflation: a Llama enlarged to a given number of parameters with the same outputs.

Used by the quickstart: the small model's text at the cost of a large model, without a download. The
cost is real: every matrix is dense and as large as a real model's; the added parts are computed and
then multiplied by zeros. Only the vocabulary stays small, so the output head is cheaper than that
of a real model of the same size.

Why it is exact. The residual stream is `[x, 0]`: embeddings are padded with zeros. Every matrix
that writes to the stream (o_proj, down_proj) has zero rows in the added dimensions and zero columns
at the added heads and neurons. RMSNorm over the wider stream sees the mean square multiplied by
D/D', so eps is multiplied by D/D' and its weights by sqrt(D/D'). Added layers write nothing: they
are identities. Only the order of floating-point sums differs.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

DEFAULT_NUM_PARAMETERS = 300_000_000
# Llama, Qwen and SmolLM models of 100 M to 1 B parameters have 16 to 32 layers. Depth determines
# the overhead of a forward pass; remaining parameters go to the width.
_NUM_LAYERS = 20
_USUAL_DISTANCE = 4  # 16 to 24 layers count as usual
_FEED_FORWARD_RATIO = 3.0  # intermediate size over hidden size: 2.7 to 5.4 in those models
_ROUND_TO = 64
_STD = 0.02  # of added weights, which affect nothing: Llama's own initialisation


@dataclass(frozen=True)
class InflationReport:
    """Difference between an inflated model and its original on one batch of tokens."""

    max_logit_difference: float
    same_argmax: bool


@torch.no_grad()
def inflate(
    model: LlamaForCausalLM, num_parameters: int = DEFAULT_NUM_PARAMETERS, *, seed: int = 0
) -> LlamaForCausalLM:
    """Llama of about `num_parameters` that computes the same function as `model`.

    Keeps dtype, vocabulary, rotary positions and head size; `model` is not changed. Works on CPU
    tensors. Raises ValueError if `model` does not fit in `num_parameters`, has biases or untied
    embeddings.
    """
    small = model.config
    if small.attention_bias or small.mlp_bias or not small.tie_word_embeddings:
        raise ValueError("only a Llama without biases and with tied embeddings can be inflated")
    config = inflated_config(small, num_parameters)
    with torch.device("meta"):
        large = LlamaForCausalLM(config)
    source = model.state_dict()
    source_layer = _spread(small.num_hidden_layers, config.num_hidden_layers)
    norm_scale = math.sqrt(small.hidden_size / config.hidden_size)
    noise = _noise(config, model.dtype, seed)
    state: dict[str, torch.Tensor] = {}
    for name, parameter in large.named_parameters():
        original = source.get(_source_name(name, source_layer))
        state[name] = _enlarged(name, parameter.shape, original, norm_scale, noise)
    large.load_state_dict(state, strict=False, assign=True)
    # Not in the state dict; depends only on what inflation keeps.
    large.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    large.tie_weights()
    large.generation_config = copy.deepcopy(model.generation_config)
    large.train(False)
    return large


def inflated_config(config: LlamaConfig, num_parameters: int) -> LlamaConfig:
    """Configuration with about `num_parameters` that contains `config`, preferably 16 to 24 layers.

    Heads keep their size and their number of queries per KV head; hidden and intermediate sizes are
    multiples of 64. Raises ValueError if there is no such configuration.
    """
    head_dim, group = _heads(config)
    unit = math.lcm(head_dim * group, _ROUND_TO)
    shapes = [_config_of_width(config, width, num_parameters) for width in range(unit, 8193, unit)]
    fitting = [shape for shape in shapes if shape is not None]
    if not fitting:
        raise ValueError(f"no shape of {num_parameters} parameters contains this model")
    return min(fitting, key=lambda shape: _preference(shape, config))


def _heads(config: LlamaConfig) -> tuple[int, int]:
    """Head size, and the number of query heads per KV head."""
    assert config.head_dim is not None, "LlamaConfig fills in head_dim"
    assert config.num_key_value_heads is not None, "LlamaConfig fills in num_key_value_heads"
    return config.head_dim, config.num_attention_heads // config.num_key_value_heads


def _preference(shape: LlamaConfig, small: LlamaConfig) -> tuple[bool, bool, int]:
    """Sort key, best first: usual depth, exact norm scale, distance to 20 layers."""
    distance = abs(shape.num_hidden_layers - _NUM_LAYERS)
    # sqrt(D/D') is a power of two at 4, 16, ... times the width: exact in bfloat16 as well.
    is_exact = math.sqrt(shape.hidden_size / small.hidden_size) in (1.0, 2.0, 4.0, 8.0)
    return distance > _USUAL_DISTANCE, not is_exact, distance


def _config_of_width(
    config: LlamaConfig, hidden_size: int, num_parameters: int
) -> LlamaConfig | None:
    """Configuration with this hidden size; None if it does not contain `config`."""
    head_dim, group = _heads(config)
    num_heads = hidden_size // head_dim
    attention = 2 * hidden_size * hidden_size * (group + 1) // group
    in_layers = num_parameters - config.vocab_size * hidden_size
    num_layers = round(in_layers / (attention + 3 * _FEED_FORWARD_RATIO * hidden_size**2))
    if num_layers < config.num_hidden_layers or hidden_size < config.hidden_size:
        return None
    # The feed-forward size absorbs what rounding the number of layers left over.
    feed_forward = (in_layers / num_layers - attention) / (3 * hidden_size)
    intermediate_size = round(feed_forward / _ROUND_TO) * _ROUND_TO
    if intermediate_size < config.intermediate_size:
        return None
    enlarged = copy.deepcopy(config)
    enlarged.hidden_size = hidden_size
    enlarged.num_attention_heads = num_heads
    enlarged.num_key_value_heads = num_heads // group
    enlarged.num_hidden_layers = num_layers
    enlarged.intermediate_size = intermediate_size
    enlarged.rms_norm_eps = config.rms_norm_eps * config.hidden_size / hidden_size
    return enlarged


def _spread(num_small: int, num_large: int) -> dict[int, int]:
    """Map from large layers to the small layers they copy; the others are identity layers."""
    return {(index * num_large) // num_small: index for index in range(num_small)}


def _source_name(name: str, source_layer: dict[int, int]) -> str:
    """The small model's name of a large model's parameter; '' in an identity layer."""
    parts = name.split(".")
    if parts[1] != "layers":
        return name
    index = source_layer.get(int(parts[2]))
    return "" if index is None else ".".join([*parts[:2], str(index), *parts[3:]])


def _noise(config: LlamaConfig, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """One row of weights for all added parts: nothing reads them, and 300 M would be slow."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(config.hidden_size, config.intermediate_size)
    return (torch.randn(longest, generator=generator) * _STD).to(dtype)


def _enlarged(
    name: str,
    shape: torch.Size,
    original: torch.Tensor | None,
    norm_scale: float,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Parameter of the large model, made of the original and of values that affect nothing."""
    if name.endswith("norm.weight"):
        weight = torch.ones(shape, dtype=noise.dtype)
        if original is not None:
            weight[: len(original)] = original * norm_scale
        return weight
    if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
        # Added parts must not write to the residual stream.
        weight = torch.zeros(shape, dtype=noise.dtype)
    else:
        weight = noise[: shape[1]].repeat(shape[0], 1)
    if original is not None:
        weight[: original.shape[0], : original.shape[1]] = original
    return weight


@torch.inference_mode()
def compare(
    model: LlamaForCausalLM, inflated: LlamaForCausalLM, token_ids: torch.Tensor
) -> InflationReport:
    """Run both models on `token_ids` (int64 [rows, tokens]) and report the difference."""
    expected = model(input_ids=token_ids, use_cache=False).logits.float()
    actual = inflated(input_ids=token_ids, use_cache=False).logits.float()
    return InflationReport(
        max_logit_difference=(expected - actual).abs().max().item(),
        same_argmax=bool((expected.argmax(-1) == actual.argmax(-1)).all()),
    )

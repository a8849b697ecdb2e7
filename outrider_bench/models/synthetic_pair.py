"""Synthetic pair of models in memory: built, scaled, measured.

The target is a random Llama whose layers after the first are scaled by ε. The draft is that first
layer with the same embeddings, norm and head. `synthetic` searches the ε for a given α.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from outrider.engine.loading.loaded_model import cache_argument


@dataclass(frozen=True)
class PairSize:
    """Shape of a target. The draft is its first layer."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int


SIZES = {
    "tiny": PairSize(4, 64, 160, 4, 2, 512),
    "p1": PairSize(20, 640, 1792, 10, 5, 8192),  # 104M, draft 10 times cheaper
    "p2": PairSize(36, 1024, 2640, 16, 8, 16384),  # 439M, draft 15 times cheaper
}
NUM_DRAFT_LAYERS = 1
MAX_CONTEXT = 16_384

# Entropy of the target at T = 1, as of a real model on ordinary text.
_ENTROPY_NATS = 2.0
# Standard deviation of attention scores. It is large enough that a few context tokens dominate at
# any length. With the usual initialisation all tokens are averaged: greedy outputs soon repeat
# themselves, and α depends on the length.
_SCORE_DEVIATION = 3.0
_PROMPT_LEN = 16
_BATCH = 64  # prompts per forward pass


@dataclass(frozen=True)
class Sample:
    """Positions on which α is measured: the target's own continuations of random prompts."""

    num_prompts: int
    num_tokens: int


@dataclass(frozen=True)
class Agreement:
    """Means over a sample's positions, each given the target's own context.

    `alpha`: at temperature 0 the share of equal argmaxes; at 1 the mean of Σ min(target_probs,
    draft_probs), the acceptance rate of rejection sampling (Leviathan et al. 2023, Corollary 3.6).
    `entropy_nats`: the target's; None at temperature 0.
    """

    alpha: float
    entropy_nats: float | None


class SyntheticPair:
    """Both models of a pair in one: the draft consists of the target's first layers.

    Everything is computed in float32 on the CPU and depends on the arguments only: on `seed`, not
    on torch's global generator. Weights are rounded to `dtype`, that of the saved checkpoints.
    """

    def __init__(
        self, size: PairSize, *, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        self._seed = seed
        self._dtype = dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._target = LlamaForCausalLM(_config(size, size.num_layers)).train(False)
        self._size = size
        layers = self._target.model.layers
        output_weights = [
            linear.weight
            for layer in layers[NUM_DRAFT_LAYERS:]
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)
        ]
        # The originals: weights depend on ε only, not on the values tried before it.
        self._output_weights = [(weight, weight.detach().clone()) for weight in output_weights]
        with torch.no_grad():
            sharper = math.sqrt(_SCORE_DEVIATION / size.hidden_size) / _deviation(size)
            for layer in layers:
                layer.self_attn.q_proj.weight.mul_(sharper)
                layer.self_attn.k_proj.weight.mul_(sharper)
            # Its logit is 0 among peaked ones: the end of sequence is never the argmax, and at
            # temperature 1 rarer than one token in a million.
            self._target.lm_head.weight[_eos_id(size)] = 0
            for weight in self._target.parameters():
                weight.copy_(weight.to(dtype))
        self.scale(0.0)
        self._peak()

    @torch.no_grad()
    def scale(self, epsilon: float) -> None:
        """Scales the layers that the draft lacks by ε. 0 makes both models equal."""
        for weight, base in self._output_weights:
            weight.copy_((base * epsilon).to(self._dtype))

    @torch.inference_mode()
    def measure(self, temperature: float, sample: Sample) -> Agreement:
        """Agreement at temperature 0 or 1. The prompts are always the same: the same ε gives the
        same result.
        """
        generator = torch.Generator().manual_seed(self._seed)
        prompts = self._prompts(sample.num_prompts, generator)
        agreed: list[Tensor] = []
        entropies: list[Tensor] = []
        for ids in torch.split(prompts, _BATCH):
            cache = DynamicCache(config=self._target.config)
            for _ in range(sample.num_tokens):
                target_logits, draft_logits = self._logits(ids, cache)
                if temperature == 0:
                    ids = target_logits.argmax(-1, keepdim=True)
                    agreed.append((draft_logits.argmax(-1, keepdim=True) == ids).float().squeeze(1))
                else:
                    target_probs, draft_probs = target_logits.softmax(-1), draft_logits.softmax(-1)
                    ids = torch.multinomial(target_probs, 1, generator=generator)
                    agreed.append(torch.minimum(target_probs, draft_probs).sum(-1))
                    entropies.append(torch.special.entr(target_probs).sum(-1))
        entropy = float(torch.cat(entropies).mean()) if entropies else None
        return Agreement(float(torch.cat(agreed).mean()), entropy)

    def save(self, directory: Path) -> tuple[int, int]:
        """Writes `directory/target` and `directory/draft`. Returns the number of parameters of
        each.
        """
        with torch.random.fork_rng(devices=[]):
            draft = LlamaForCausalLM(_config(self._size, NUM_DRAFT_LAYERS))
        weights = self._target.state_dict()
        draft.load_state_dict({name: weights[name] for name in draft.state_dict()})
        models: dict[str, Any] = {"target": self._target, "draft": draft}
        for name, model in models.items():
            model.to(self._dtype).save_pretrained(directory / name)
            model.float()
        return self._target.num_parameters(), draft.num_parameters()

    def _logits(self, ids: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Next-token logits of target and draft after ids int64 [B, T]: both float32 [B, vocab]."""
        model = self._target
        argument: Any = {cache_argument(model): cache}
        out = model(input_ids=ids, output_hidden_states=True, logits_to_keep=1, **argument)
        drafted = model.model.norm(out.hidden_states[NUM_DRAFT_LAYERS][:, -1])
        return out.logits[:, -1], model.lm_head(drafted)

    def _prompts(self, num_prompts: int, generator: torch.Generator) -> Tensor:
        shape = (num_prompts, _PROMPT_LEN)
        return torch.randint(0, _eos_id(self._size), shape, generator=generator)

    @torch.no_grad()
    def _peak(self) -> None:
        """Sets the final norm so that the logits have a real model's entropy, by bisection.

        Runs at ε = 0: the norm makes the size of the logits independent of ε.
        """
        prompts = self._prompts(_BATCH, torch.Generator().manual_seed(self._seed))
        logits, _ = self._logits(prompts, DynamicCache(config=self._target.config))
        low, high = 0.0, 1000.0
        for _ in range(40):
            middle = (low + high) / 2
            entropy = float(torch.special.entr((logits * middle).softmax(-1)).sum(-1).mean())
            low, high = (middle, high) if entropy > _ENTROPY_NATS else (low, middle)
        norm = self._target.model.norm.weight
        norm.copy_(torch.full_like(norm, low).to(self._dtype))


def _eos_id(size: PairSize) -> int:
    return size.vocab_size - 1


def _deviation(size: PairSize) -> float:
    """Standard deviation of the initial weights.

    Half of what preserves a vector's length; at hidden size 640 that is Llama's.
    """
    return 0.5 / math.sqrt(size.hidden_size)


def _config(size: PairSize, num_layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        max_position_embeddings=MAX_CONTEXT,
        initializer_range=_deviation(size),
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=_eos_id(size),
    )


def linked_copy(model: Path, directory: Path) -> Path:
    """Directory with links to the model's files, to give the model another name."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for path in model.resolve().iterdir():
        (directory / path.name).symlink_to(path)
    return directory


def noisy_copy(model: Path, directory: Path, noise: float, seed: int = 0) -> Path:
    """Copy of a model of one weight file; `noise`: relative to each matrix' standard deviation."""
    linked_copy(model, directory)
    path = directory / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    generator = torch.Generator().manual_seed(seed)
    for weight in weights.values():
        if weight.dim() > 1:
            added = torch.randn(weight.shape, generator=generator) * weight.float().std() * noise
            weight.add_(added.to(weight.dtype))
    path.unlink()
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
    return directory

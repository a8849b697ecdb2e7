"""A synthetic pair of models, before it has files: built, scaled, measured.

Owns the shapes and the mathematics of agreement. The target is a random Llama whose layers after
the first add only ε times what they would; the draft is that first layer under the same
embeddings, norm and head. Knows nothing of the α that is wanted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from outrider.engine.loading.loaded_model import cache_argument


@dataclass(frozen=True)
class PairSize:
    """The shape of a target; the draft is its first layer."""

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

# At T = 1, of a real model on ordinary text.
_ENTROPY_NATS = 2.0
# Attention scores deviate by this much, so that a few tokens of the context are seen whatever its
# length. At the usual initialisation all tokens are averaged: greedy outputs soon go in circles,
# and α depends on the length.
_SCORE_DEVIATION = 3.0
_PROMPT_LEN = 16
_BATCH = 64  # prompts run together


@dataclass(frozen=True)
class Sample:
    """How many positions α is measured on: the target's own continuations of random prompts."""

    num_prompts: int
    num_tokens: int


@dataclass(frozen=True)
class Agreement:
    """Means over a sample's positions, each given the target's own context.

    `alpha`: at temperature 0 the share of equal argmaxes; at 1 of Σ min(target_probs,
    draft_probs), what rejection sampling accepts (Leviathan et al. 2023, Corollary 3.6).
    `entropy_nats` is the target's, at temperature 1 only.
    """

    alpha: float
    entropy_nats: float | None


class SyntheticPair:
    """Both models of a pair as one: the draft is read off the target's first layers.

    Everything is float32 on the CPU, and a function of the arguments alone: of `seed`, never of
    torch's global generator.
    """

    def __init__(self, size: PairSize, *, seed: int = 0) -> None:
        self._seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._target = LlamaForCausalLM(_config(size, size.num_layers)).train(False)
        self._size = size
        layers = self._target.model.layers
        outward = [
            linear.weight
            for layer in layers[NUM_DRAFT_LAYERS:]
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)
        ]
        # Kept, so that the weights are a function of ε and not of the search that found it.
        self._outward = [(weight, weight.detach().clone()) for weight in outward]
        with torch.no_grad():
            sharper = math.sqrt(_SCORE_DEVIATION / size.hidden_size) / _deviation(size)
            for layer in layers:
                layer.self_attn.q_proj.weight.mul_(sharper)
                layer.self_attn.k_proj.weight.mul_(sharper)
            # Logit 0 among peaked ones: the end of sequence is never the likeliest, and at
            # temperature 1 rarer than one token in a million.
            self._target.lm_head.weight[_eos_id(size)] = 0
        self.scale(0.0)
        self._peak()

    @torch.no_grad()
    def scale(self, epsilon: float) -> None:
        """Gives the layers that the draft lacks this weight; 0 makes both models the same."""
        for weight, base in self._outward:
            torch.mul(base, epsilon, out=weight)

    @torch.inference_mode()
    def measure(self, temperature: float, sample: Sample) -> Agreement:
        """At temperature 0 or 1. The same prompts each time: of one ε, the same result."""
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
        """Writes `directory/target` and `directory/draft`; the number of parameters of both."""
        with torch.random.fork_rng(devices=[]):
            draft = LlamaForCausalLM(_config(self._size, NUM_DRAFT_LAYERS))
        weights = self._target.state_dict()
        draft.load_state_dict({name: weights[name] for name in draft.state_dict()})
        self._target.save_pretrained(directory / "target")
        draft.save_pretrained(directory / "draft")
        return self._target.num_parameters(), draft.num_parameters()

    def _logits(self, ids: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Of target and draft behind `ids` int64 [B, T]: both float32 [B, vocab]."""
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
        """Sets the final norm so that logits have a real model's entropy; by bisection.

        At ε = 0: the norm makes their size the same at any ε.
        """
        prompts = self._prompts(_BATCH, torch.Generator().manual_seed(self._seed))
        logits, _ = self._logits(prompts, DynamicCache(config=self._target.config))
        low, high = 0.0, 1000.0
        for _ in range(40):
            middle = (low + high) / 2
            entropy = float(torch.special.entr((logits * middle).softmax(-1)).sum(-1).mean())
            low, high = (middle, high) if entropy > _ENTROPY_NATS else (low, middle)
        self._target.model.norm.weight.fill_(low)


def _eos_id(size: PairSize) -> int:
    return size.vocab_size - 1


def _deviation(size: PairSize) -> float:
    """Of the initial weights: half of what keeps a vector's length, which is Llama's at 640."""
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

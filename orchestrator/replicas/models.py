"""Common properties of the connected replicas: limits of requests, and settings that must agree.

Replicas may differ in max_gamma, context length and memory; limits follow the connected ones. They
must agree in everything that outputs depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.target_client import TargetLink
from outrider.errors import IncompatiblePair
from outrider.runtime.protobuf import shortest
from outrider.settings.services import OrchestratorConfig
from outrider.v1 import model_pb2, sampling_pb2

# Outputs depend on these besides weights and tokenizer. Values: what to set alike.
_SHARED = {
    "vocab_size": "the same model",
    "eos_token_ids": "the same model and --tokenizer-eos",
    "sampling_defaults": "the same model and --generation-config",
}


@dataclass(frozen=True)
class Limits:
    """Limits and defaults of requests."""

    vocab_size: int
    max_context_len: int
    eos_token_ids: tuple[int, ...]
    gamma: int | None
    max_gamma: int
    lookahead: int
    fan_out: int
    default_max_tokens: int
    # The model's own defaults by name, without max_tokens; fields of a request override them.
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    is_durable: bool = True
    waits_for_draft: bool = False
    has_draft_tier: bool = True
    has_lookup: bool = True
    # Whether `max_context_len` is the size of a target's KV cache, not the model's context.
    is_kv_bound: bool = False

    @property
    def bound(self) -> str:
        """Bound of prompt and output together, for error messages."""
        what = "the target's KV cache" if self.is_kv_bound else "the model's context"
        return f"{what} of {self.max_context_len} tokens"


def limits(
    config: OrchestratorConfig,
    targets: ReplicaPool[TargetLink],
    drafts: ReplicaPool[DraftLink] | None,
) -> Limits:
    """Limits of a new request: smallest max_gamma, longest context of the connected replicas."""
    model = targets.model
    assert model is not None, "a target was connected"
    max_gamma = min(config.max_gamma, model.max_gamma)
    if drafts is not None and drafts.model is not None:
        max_gamma = min(max_gamma, drafts.model.max_gamma)
    return Limits(
        vocab_size=model.vocab_size,
        max_context_len=targets.max_len,
        eos_token_ids=tuple(model.eos_token_ids),
        gamma=None if config.gamma is None else min(config.gamma, max_gamma),
        max_gamma=max_gamma,
        lookahead=config.lookahead,
        fan_out=config.fan_out,
        default_max_tokens=model.sampling_defaults.max_tokens or config.default_max_tokens,
        sampling_defaults=_sampling_defaults(model.sampling_defaults),
        is_durable=config.durability == "durable",
        is_kv_bound=targets.max_len < model.max_context_len,
        waits_for_draft=config.draft_wait == "always",
        has_draft_tier=drafts is not None,
        has_lookup=config.prompt_lookup,
    )


def _sampling_defaults(message: sampling_pb2.SamplingParams) -> dict[str, float]:
    given = {field.name: shortest(value) for field, value in message.ListFields()}
    given.pop("max_tokens", None)  # `default_max_tokens` includes it
    return given


def check_shared(model: model_pb2.ModelInfo, others: Sequence[model_pb2.ModelInfo]) -> None:
    """`others`: models of the connected targets. Raises IncompatiblePair if `model` differs."""
    for other in others:
        for name, needed in _SHARED.items():
            if getattr(model, name) != getattr(other, name):
                raise IncompatiblePair(
                    f"the target's {name} differ from those of the other targets: set up all "
                    f"targets with {needed}"
                )

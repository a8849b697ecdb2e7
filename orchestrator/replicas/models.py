"""What the replicas of a tier serve together: settings that must be equal, and requests' limits.

A replica may differ from the others in what bounds a request (draft tokens, context, memory):
limits follow the replicas that are connected. It may not differ in what outputs depend on.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.generation.request import Limits
from orchestrator.replicas.draft_client import DraftLink
from orchestrator.replicas.pool import ReplicaPool
from orchestrator.replicas.target_client import TargetLink
from outrider.errors import IncompatiblePair
from outrider.settings.services import OrchestratorConfig
from outrider.v1 import model_pb2

# What outputs depend on beside weights and tokenizer, and what must be the same for it.
_SHARED = {
    "vocab_size": "the same model",
    "eos_token_ids": "the same model and --tokenizer-eos",
    "sampling_defaults": "the same model and --generation-config",
}


def limits(
    config: OrchestratorConfig,
    targets: ReplicaPool[TargetLink],
    drafts: ReplicaPool[DraftLink] | None,
) -> Limits:
    """Of a request that comes now: the fewest draft tokens, the longest context of any replica."""
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
        sampling_defaults=model.sampling_defaults,
        is_durable=config.durability == "durable",
        is_kv_bound=targets.max_len < model.max_context_len,
        waits_for_draft=config.draft_wait == "always",
    )


def check_shared(model: model_pb2.ModelInfo, others: Sequence[model_pb2.ModelInfo]) -> None:
    """`others`: of the targets that are connected. Raises IncompatiblePair."""
    for other in others:
        for name, needed in _SHARED.items():
            if getattr(model, name) != getattr(other, name):
                raise IncompatiblePair(
                    f"the target's {name} differ from those of the other targets: all of them "
                    f"need {needed}"
                )

"""What the replicas of a tier serve together: who may join the others, and requests' limits.

A replica may differ from the others in what bounds a request (draft tokens, context, memory):
limits follow the replicas that are connected. It may not differ in what outputs depend on.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.draft_link import DraftLink
from orchestrator.pool import ReplicaPool
from orchestrator.request import Limits
from orchestrator.target_link import TargetLink
from outrider.config import OrchestratorConfig
from outrider.errors import IncompatiblePair
from outrider.tokenizer import Tokenizer
from outrider.v1 import model_pb2

# Raises ConfigError where a replica with this model cannot join.
ModelCheck = Callable[[model_pb2.ModelInfo], None]

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
    )


def target_check(
    tokenizer: Tokenizer | None, connected: Callable[[], list[model_pb2.ModelInfo]]
) -> ModelCheck:
    """`connected`: the models of the targets that are there now."""
    served: list[model_pb2.ModelInfo] = []

    def check(model: model_pb2.ModelInfo) -> None:
        if tokenizer is not None and model.tokenizer_fingerprint != tokenizer.fingerprint:
            raise IncompatiblePair(
                f"the target {model.name} has tokenizer {_short(model.tokenizer_fingerprint)}, "
                f"this orchestrator {_short(tokenizer.fingerprint)}"
            )
        if served and model.model_fingerprint != served[0].model_fingerprint:
            raise IncompatiblePair(
                f"the target is {model.name} {_short(model.model_fingerprint)} now, and was "
                f"{served[0].name} {_short(served[0].model_fingerprint)}: restart the orchestrator"
            )
        _check_shared(model, connected())
        served[:] = [model]

    return check


def _check_shared(model: model_pb2.ModelInfo, others: list[model_pb2.ModelInfo]) -> None:
    for other in others:
        for name, needed in _SHARED.items():
            if getattr(model, name) != getattr(other, name):
                raise IncompatiblePair(
                    f"the target's {name} differ from those of the other targets: all of them "
                    f"need {needed}"
                )


def draft_check(targets: ReplicaPool[TargetLink]) -> ModelCheck:
    def check(model: model_pb2.ModelInfo) -> None:
        theirs = targets.model.tokenizer_fingerprint if targets.model else ""
        if model.tokenizer_fingerprint != theirs:
            raise IncompatiblePair(
                f"draft and target do not share a tokenizer: the draft {model.name} has "
                f"{_short(model.tokenizer_fingerprint)}, the target {_short(theirs)}"
            )

    return check


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "none"

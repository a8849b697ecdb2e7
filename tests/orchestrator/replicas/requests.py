"""Requests of a greedy generation at both tiers, for tests of links."""

from __future__ import annotations

from orchestrator.replicas.target_client import TargetRequest
from orchestrator.speculation.draft_source import DraftRequest
from outrider.sampling.params import SamplingParams, Verification

ROOM = 64


def draft_request(token_ids: list[int]) -> DraftRequest:
    """`token_ids`: the committed tokens, which may grow."""
    return DraftRequest(
        session_id="session",
        epoch=1,
        token_ids=token_ids,
        prompt_len=len(token_ids),
        max_len=len(token_ids) + ROOM,
        params=SamplingParams(temperature=0.0, max_tokens=ROOM),
        verification=Verification.REJECTION,
        fan_out=1,
        vocab_size=256,
    )


def target_request(session_id: str, prompt_len: int, max_tokens: int = 8) -> TargetRequest:
    return TargetRequest(
        session_id=session_id,
        epoch=1,
        prompt_len=prompt_len,
        max_len=prompt_len + max_tokens,
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        priority=0,
    )

"""A generation request as plain values, whatever the transport, and what its length may be.

Transports parse their own form into it (`orchestrator.api`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.replicas.models import Limits
from outrider.errors import InvalidRequest
from outrider.sampling.params import SamplingParams, Verification

Message = dict[str, str]


@dataclass(frozen=True)
class GenerationRequest:
    """Exactly one of `text`, `token_ids`, `messages` is given; none where it resumes.

    `max_tokens` is None where the caller left it to the server; `params` has it resolved once the
    prompt's length is known (`resolve_max_tokens`). `gamma` None: chosen round by round.
    `is_durable`: tokens are recorded before they are sent. `waits_for_draft`: rounds wait for all
    their draft tokens, worth it or not. `resume_from`: how many tokens of the
    session's last turn the caller holds; the rest of the request is then what that turn's was, but
    for `priority`, the lower the more urgent.
    """

    text: str | None
    token_ids: tuple[int, ...] | None
    messages: tuple[Message, ...] | None
    params: SamplingParams
    max_tokens: int | None
    verification: Verification
    gamma: int | None
    max_gamma: int
    lookahead: int
    fan_out: int
    session_id: str | None
    create_session: bool
    is_durable: bool = True
    waits_for_draft: bool = False
    resume_from: int | None = None
    priority: int = 0

    @property
    def input_field(self) -> str:
        """The field of the request that holds the prompt."""
        if self.resume_from is not None:
            return "session_id"
        if self.text is not None:
            return "text"
        return "token_ids" if self.token_ids is not None else "chat"


def resolve_max_tokens(
    request: GenerationRequest, prompt_len: int, limits: Limits
) -> GenerationRequest:
    """Fits max_tokens to what there is: the caller's or refused, the server's default or cut."""
    params = request.params
    if request.max_tokens is not None:
        check_length(request, prompt_len, limits)
        return request
    room = max(0, limits.max_context_len - prompt_len)
    if params.min_tokens > room:
        raise InvalidRequest(
            "sampling.min_tokens",
            f"{params.min_tokens} after a prompt of {prompt_len} tokens exceeds {limits.bound}; "
            f"at most {room}",
        )
    max_tokens = min(room, max(limits.default_max_tokens, params.min_tokens))
    request = replace(request, params=replace(params, max_tokens=max(1, max_tokens)))
    check_length(request, prompt_len, limits)
    return request


def check_length(request: GenerationRequest, prompt_len: int, limits: Limits) -> None:
    """Raises InvalidRequest where prompt and `params.max_tokens` fit no target there is now."""
    room, max_tokens = limits.max_context_len - prompt_len, request.params.max_tokens
    if room < 1:
        raise InvalidRequest(
            request.input_field, f"{prompt_len} tokens leave no room in {limits.bound}"
        )
    if max_tokens > room:
        raise InvalidRequest(
            "sampling.max_tokens",
            f"{max_tokens} after a prompt of {prompt_len} tokens exceeds {limits.bound}; "
            f"at most {room}",
        )

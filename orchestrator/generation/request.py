"""Generation request as plain values, whatever the transport.

Transports translate their messages into it (`orchestrator.api`); `validation` checks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.speculation.verification import SourceName
from outrider.sampling.params import SamplingParams, Verification

# Chat message in OpenAI's form: `role`; `content`, a text or a list of text parts, such as
# {"type": "text", "text": "Hello"}; if there are any: `name`, `tool_calls`, `tool_call_id`,
# `reasoning_content`.
Message = dict[str, Any]


@dataclass(frozen=True)
class GenerationRequest:
    """One request with the server's defaults filled in.

    Exactly one of `text`, `token_ids`, `messages` is set; none of them in a resumption.
    """

    text: str | None
    token_ids: tuple[int, ...] | None
    messages: tuple[Message, ...] | None
    params: SamplingParams
    """Its `max_tokens` is final once the prompt's length is known (`resolve_max_tokens`)."""
    max_tokens: int | None
    """As the client set it; None: the server's default."""
    verification: Verification
    gamma: int | None
    """Draft tokens per round; None: chosen for each round."""
    max_gamma: int
    lookahead: int
    fan_out: int
    session_id: str | None
    """None: a one-off session, deleted at the end."""
    create_session: bool
    is_durable: bool = True
    """Whether tokens are recorded before they are sent."""
    waits_for_draft: bool = False
    """Whether each round waits for all its draft tokens, even if that costs time."""
    draft_source: SourceName = SourceName.AUTO
    """Where draft tokens come from; AUTO: chosen for each round."""
    resume_from: int | None = None
    """Number of tokens of the session's last turn that the client has received.

    All other fields but `priority` are then those of the recorded turn.
    """
    priority: int = 0
    """Lower runs first."""
    is_seeded: bool = False
    """Whether the seed is the client's or the model's default; otherwise it is random."""
    add_special_tokens: bool | None = None
    """None: for the text of a first turn only."""
    truncate_prompt_tokens: int | None = None
    """Number of the prompt's last tokens to keep; -1: as many as there is room for."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tools that the chat template renders, in OpenAI's form."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables for the chat template."""
    add_generation_prompt: bool | None = None
    """None: unless `continue_final_message`."""
    continue_final_message: bool = False

    @property
    def input_field(self) -> str:
        """Name of the request's field that contains the prompt, for error messages."""
        if self.resume_from is not None:
            return "session_id"
        if self.text is not None:
            return "text"
        return "token_ids" if self.token_ids is not None else "chat"

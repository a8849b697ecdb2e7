"""What Redis has to know of a turn for another orchestrator to go on with it, and the going on.

Pure. Knows the store's records and requests; nothing of rounds, links or the wire.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from orchestrator.conversation import Turn
from orchestrator.request import GenerationRequest
from orchestrator.store import SessionRecord
from outrider.errors import InternalError, InvalidRequest, SessionNotFound
from outrider.sampling.params import SamplingParams, Verification

# Of a request; its input is in the session's tokens.
_NAMES = ("gamma", "max_gamma", "lookahead", "fan_out", "session_id", "is_durable")


@dataclass(frozen=True)
class Resumed:
    """A turn that was begun elsewhere. `output_ids` is what it has recorded of its output.

    The caller holds the first `num_held` generated tokens.
    """

    request: GenerationRequest
    turn: Turn
    output_ids: tuple[int, ...]
    num_held: int


def turn_json(request: GenerationRequest, prompt_len: int) -> str:
    """To be recorded with the turn's prompt, which ends at `prompt_len`."""
    return json.dumps(
        {
            "prompt_len": prompt_len,
            "params": asdict(request.params),
            "verification": request.verification.value,
            **{name: getattr(request, name) for name in _NAMES},
        }
    )


def resumed(record: SessionRecord, num_held: int) -> Resumed:
    """The session's last turn as another orchestrator left it.

    Raises SessionNotFound where the last call had recorded nothing: it is to be sent again. A
    caller that holds tokens means the last turn that was begun: calls that ended having begun none,
    its own late ones for example, have shown none. Where one may have shown some while Redis was
    away, nobody knows whose tokens the caller holds.
    InvalidRequest where the caller cannot be given what is between.
    """
    is_later = record.turn_epoch != record.epoch
    if not record.turn_json or (is_later and not num_held) or record.has_lost_turn:
        raise SessionNotFound(
            f"session {record.session_id}: nothing of its last call was recorded; send it again"
        )
    try:
        request, prompt_len = _read(record.turn_json)
    except (KeyError, TypeError, ValueError) as error:
        raise InternalError(f"session {record.session_id}: its turn reads {error!r}") from error
    token_ids = record.token_ids.tolist()
    output_ids = tuple(token_ids[prompt_len:])
    if num_held > len(output_ids) and request.params.needs_supports(request.verification):
        raise InvalidRequest(
            "resume_from",
            f"{num_held}; {len(output_ids)} tokens were recorded, and those after them would be "
            "others now",
        )
    if num_held > request.params.max_tokens:
        raise InvalidRequest(
            "resume_from", f"{num_held} is more than max_tokens, {request.params.max_tokens}"
        )
    if request.params.logprobs is not None and num_held < len(output_ids):
        raise InvalidRequest(
            "resume_from",
            f"{num_held}; the log-probabilities of tokens {num_held} to {len(output_ids)} "
            "are not recorded; GetSession has the tokens",
        )
    turn = Turn(token_ids[:prompt_len], prompt_len, record.messages)
    return Resumed(request, turn, output_ids, num_held)


def _read(text: str) -> tuple[GenerationRequest, int]:
    told = json.loads(text)
    request = GenerationRequest(
        text=None,
        token_ids=None,
        messages=None,
        params=_params(told["params"]),
        max_tokens=told["params"]["max_tokens"],
        verification=Verification(told["verification"]),
        create_session=False,
        **{name: told[name] for name in _NAMES},
    )
    return request, int(told["prompt_len"])


def _params(told: dict[str, Any]) -> SamplingParams:
    """JSON has no tuples, and its keys are texts."""
    values = {entry.name: told[entry.name] for entry in fields(SamplingParams)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    values["logit_bias"] = {int(k): v for k, v in values["logit_bias"].items()}
    return SamplingParams(**values)

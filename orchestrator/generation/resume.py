"""What Redis has to know of a turn for another orchestrator to go on with it, and the going on.

Pure. Knows the store's records and requests; nothing of rounds, links or the wire.

Orchestrators of several versions share sessions while they are replaced one by one. A field that is
added here or to SamplingParams has a default that means "as before there was one", and is unknown
to those that are older: where a turn that has it must not go on without it, TURN_VERSION grows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from orchestrator.generation.conversation import Turn
from orchestrator.generation.request import GenerationRequest, Message
from orchestrator.sessions import SessionRecord
from outrider.errors import InvalidRequest, SessionNotFound, UnreadableRecord
from outrider.sampling.params import SamplingParams, Verification

TURN_VERSION = 1
# Of a request; its input is in the session's tokens. What they are where the turn has none.
_DEFAULTS: Mapping[str, Any] = {
    "gamma": None,
    "max_gamma": 16,
    "lookahead": 1,
    "fan_out": 1,
    "session_id": None,
    "is_durable": True,
    "waits_for_draft": False,
}
# There is no output that is right without them.
_NEEDED_PARAMS = ("temperature", "seed", "max_tokens")


@dataclass(frozen=True)
class ResumedTurn:
    """A turn that was begun elsewhere. `output_ids` is what it has recorded of its output.

    The caller holds the first `num_held` generated tokens.
    """

    request: GenerationRequest
    turn: Turn
    output_ids: tuple[int, ...]
    num_held: int


def turn_json(request: GenerationRequest, turn: Turn) -> str:
    """JSON to be recorded with the turn's prompt. Call it in a thread: lists may be long."""
    params = request.params
    return json.dumps(
        {
            "version": TURN_VERSION,
            "prompt_len": len(turn.token_ids),
            "num_messages": len(turn.messages),
            # Not dataclasses.asdict, which copies each entry of a list by itself.
            "params": {entry.name: getattr(params, entry.name) for entry in fields(params)},
            "verification": request.verification.value,
            **{name: getattr(request, name) for name in _DEFAULTS},
        }
    )


def resumed(record: SessionRecord, num_held: int) -> ResumedTurn:
    """The session's last turn as another orchestrator left it.

    Raises SessionNotFound where the last call had recorded nothing: it is to be sent again. A
    caller that holds tokens means the last turn that was begun: calls that ended having begun none,
    its own late ones for example, have shown none. Where one may have shown some while Redis was
    away, nobody knows whose tokens the caller holds.
    InvalidRequest where the caller cannot be given what is between. UnreadableRecord.
    """
    is_later = record.turn_epoch != record.epoch
    if not record.turn_json or (is_later and not num_held) or record.has_lost_turn:
        raise SessionNotFound(
            f"session {record.session_id}: nothing of its last call was recorded; send it again"
        )
    turn = _read(record)
    request, output_ids = turn.request, turn.output_ids
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
    return replace(turn, num_held=num_held)


def unanswered(record: SessionRecord) -> ResumedTurn | None:
    """The last turn of a chat whose answer is not among its messages: its call ended early.

    None: there is an answer, or it is no chat. Raises UnreadableRecord.
    """
    if not record.messages or not record.turn_json:
        return None
    turn = _read(record)
    return turn if len(turn.turn.messages) == len(record.messages) else None


def _read(record: SessionRecord) -> ResumedTurn:
    """As of a caller that holds nothing."""
    session = f"session {record.session_id}"
    try:
        told = _object(json.loads(record.turn_json), "turn")
        version = told.get("version", TURN_VERSION)
        if type(version) is not int or version > TURN_VERSION:
            raise UnreadableRecord(
                f"{session}: the stored request has version {version}; this orchestrator reads up "
                f"to {TURN_VERSION}: resume at a newer one"
            )
        request = _request(told)
        prompt_len, num_messages = int(told["prompt_len"]), told.get("num_messages")
        if not 0 < prompt_len <= len(record.token_ids):
            raise ValueError(f"prompt_len is {prompt_len} of {len(record.token_ids)} tokens")
    except KeyError as error:
        why = f"{session}: the stored request has no field {error}"
        raise UnreadableRecord(why) from error
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UnreadableRecord(f"{session}: the stored request is malformed: {error}") from error
    token_ids = record.token_ids.tolist()
    messages = _asked_messages(record.messages, num_messages)
    turn = Turn(token_ids[:prompt_len], prompt_len, messages)
    return ResumedTurn(request, turn, tuple(token_ids[prompt_len:]), num_held=0)


def _asked_messages(messages: tuple[Message, ...], num: int | None) -> tuple[Message, ...]:
    """Those before the answer. `num` None: recorded before they were counted."""
    if num is None:
        has_answer = bool(messages) and messages[-1]["role"] == "assistant"
        return messages[:-1] if has_answer else messages
    return messages[:num]


def _request(told: dict[str, Any]) -> GenerationRequest:
    params = _params(_object(told["params"], "params"))
    return GenerationRequest(
        text=None,
        token_ids=None,
        messages=None,
        params=params,
        max_tokens=params.max_tokens,
        verification=Verification(told.get("verification", Verification.REJECTION.value)),
        create_session=False,
        **{name: told.get(name, default) for name, default in _DEFAULTS.items()},
    )


def _params(told: dict[str, Any]) -> SamplingParams:
    """JSON has no tuples, and its keys are texts."""
    for name in _NEEDED_PARAMS:
        if name not in told:
            raise KeyError(f"params.{name}")
    values = {
        entry.name: told[entry.name] for entry in fields(SamplingParams) if entry.name in told
    }
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    values["logit_bias"] = {int(k): v for k, v in told.get("logit_bias", {}).items()}
    return SamplingParams(**values)


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no object")
    return value

"""Stored request of a turn, with which any orchestrator can resume the turn. Pure.

During a rolling update, orchestrators of several versions share sessions. A new field here or in
SamplingParams needs a default that means "as before the field existed". Older orchestrators ignore
the field: if a turn must not be resumed without it, increase TURN_VERSION.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

from orchestrator.generation.conversation import NEW_ANSWER, Turn
from orchestrator.generation.request import GenerationRequest, Message
from orchestrator.sessions import SessionRecord
from orchestrator.speculation.verification import SourceName
from outrider.errors import InvalidRequest, SessionNotFound, UnreadableRecord
from outrider.sampling.params import SamplingParams, Verification
from outrider.sampling.structured_outputs import StructuredOutputs

TURN_VERSION = 2
# Older orchestrators refuse turns of version 2, whose fields they would ignore. They can resume all
# others.
_PLAIN_VERSION = 1
# Stored fields of a request, and their values if the stored turn lacks them. The input is not
# stored here: it is among the session's tokens.
_DEFAULTS: Mapping[str, Any] = {
    "gamma": None,
    "max_gamma": 16,
    "lookahead": 1,
    "fan_out": 1,
    "session_id": None,
    "is_durable": True,
    "waits_for_draft": False,
}
# Without these the output cannot be continued correctly.
_NEEDED_PARAMS = ("temperature", "seed", "max_tokens")
_REQUEST_TYPES = get_type_hints(GenerationRequest)
_PARAM_TYPES = get_type_hints(SamplingParams)


@dataclass(frozen=True)
class ResumedTurn:
    """A recorded turn. `output_ids`: the recorded part of its output.

    `num_received`: number of generated tokens that the client has received.
    """

    request: GenerationRequest
    turn: Turn
    output_ids: tuple[int, ...]
    num_received: int


def turn_json(request: GenerationRequest, turn: Turn) -> str:
    """JSON to record with the turn's prompt. Call it in a thread: lists may be long."""
    params = request.params
    return json.dumps(
        {
            "version": TURN_VERSION if _needs_version_2(params, turn) else _PLAIN_VERSION,
            "prompt_len": len(turn.token_ids),
            "num_messages": len(turn.messages),
            "answer_start": turn.answer_start,
            # dataclasses.asdict would copy the lists entry by entry.
            "params": {entry.name: getattr(params, entry.name) for entry in fields(params)},
            "verification": request.verification.value,
            "draft_source": request.draft_source.value,
            **{name: getattr(request, name) for name in _DEFAULTS},
        },
        default=vars,
    )


def _needs_version_2(params: SamplingParams, turn: Turn) -> bool:
    return bool(
        params.structured_outputs is not None
        or params.bad_words_token_ids
        or params.include_stop_str_in_output
        or not params.skip_special_tokens
        or turn.answer_start != NEW_ANSWER
    )


def resume_turn(record: SessionRecord, num_received: int) -> ResumedTurn:
    """Reads the session's last turn in order to resume it.

    A client that has received tokens means the last turn that began. Requests after it that began
    no turn sent no tokens, unless Redis was unreachable: then the turn of the received tokens is
    unknown.

    Raises SessionNotFound if the last request recorded nothing, and has to be sent again;
    InvalidRequest if the tokens after the received ones cannot be sent; UnreadableRecord.
    """
    is_later = record.turn_epoch != record.epoch
    if not record.turn_json or (is_later and not num_received) or record.has_lost_turn:
        raise SessionNotFound(
            f"session {record.session_id}: its last request recorded nothing; send it again"
        )
    turn = _read(record)
    request, output_ids = turn.request, turn.output_ids
    if num_received > len(output_ids) and request.params.needs_supports(request.verification):
        raise InvalidRequest(
            "resume_from",
            f"{num_received} exceeds the {len(output_ids)} recorded tokens; with this verification "
            "the tokens after them would differ from those received",
        )
    if num_received > request.params.max_tokens:
        raise InvalidRequest(
            "resume_from", f"{num_received} exceeds max_tokens ({request.params.max_tokens})"
        )
    if request.params.prompt_logprobs is not None and not num_received:
        raise InvalidRequest(
            "resume_from",
            "0; the log-probabilities of the prompt are not recorded; send the request again",
        )
    if request.params.logprobs is not None and num_received < len(output_ids):
        raise InvalidRequest(
            "resume_from",
            f"{num_received}; the log-probabilities of tokens {num_received} to {len(output_ids)} "
            "are not recorded; GetSession returns the tokens",
        )
    return replace(turn, num_received=num_received)


def interrupted_turn(record: SessionRecord) -> ResumedTurn | None:
    """The last turn of a chat whose answer is not among its messages: its request ended early.

    None: the answer is there, or the session is no chat. Raises UnreadableRecord.
    """
    if not record.turn_json:
        return None
    turn = _read(record)
    has_answer = len(turn.turn.messages) != len(record.messages)
    return turn if turn.turn.is_chat and not has_answer else None


def _read(record: SessionRecord) -> ResumedTurn:
    """The last turn, as of a client that has received nothing."""
    session = f"session {record.session_id}"
    try:
        stored = _object(json.loads(record.turn_json), "turn")
        version = stored.get("version", _PLAIN_VERSION)
        if type(version) is not int or version > TURN_VERSION:
            raise UnreadableRecord(
                f"{session}: the stored request has version {version}; this orchestrator reads up "
                f"to {TURN_VERSION}: resume at a newer one"
            )
        request = _request(stored)
        prompt_len, num_messages = stored["prompt_len"], stored.get("num_messages")
        _check_type("prompt_len", prompt_len, int)
        _check_type("num_messages", num_messages, int | None)
        answer_start = _answer_start(stored)
        if not 0 < prompt_len <= len(record.token_ids):
            raise ValueError(f"prompt_len is {prompt_len} of {len(record.token_ids)} tokens")
    except KeyError as error:
        why = f"{session}: the stored request has no field {error}"
        raise UnreadableRecord(why) from error
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UnreadableRecord(f"{session}: the stored request is malformed: {error}") from error
    token_ids = record.token_ids.tolist()
    messages = _request_messages(record.messages, num_messages)
    turn = Turn(token_ids[:prompt_len], prompt_len, messages, answer_start=answer_start)
    return ResumedTurn(request, turn, tuple(token_ids[prompt_len:]), num_received=0)


def _request_messages(messages: tuple[Message, ...], num: int | None) -> tuple[Message, ...]:
    """The messages before the answer. `num` None: recorded by a version that did not count them."""
    if num is None:
        has_answer = bool(messages) and messages[-1]["role"] == "assistant"
        return messages[:-1] if has_answer else messages
    return messages[:num]


def _answer_start(stored: Mapping[str, Any]) -> Message:
    start = _object(stored.get("answer_start", NEW_ANSWER), "answer_start")
    if not (isinstance(start["role"], str) and isinstance(start["content"], str | list)):
        raise ValueError("answer_start is not a message")
    return start


def _request(stored: dict[str, Any]) -> GenerationRequest:
    params = _params(_object(stored["params"], "params"))
    values = {name: stored.get(name, default) for name, default in _DEFAULTS.items()}
    for name, value in values.items():
        _check_type(name, value, _REQUEST_TYPES[name])
    return GenerationRequest(
        text=None,
        token_ids=None,
        messages=None,
        params=params,
        max_tokens=params.max_tokens,
        verification=Verification(stored.get("verification", Verification.REJECTION.value)),
        draft_source=SourceName(stored.get("draft_source", SourceName.AUTO)),
        create_session=False,
        is_seeded=True,  # not recorded; it may be
        **values,
    )


def _params(stored: dict[str, Any]) -> SamplingParams:
    """Converts JSON's lists to tuples, and the keys of `logit_bias` to numbers."""
    for name in _NEEDED_PARAMS:
        if name not in stored:
            raise KeyError(f"params.{name}")
    values = {
        entry.name: stored[entry.name] for entry in fields(SamplingParams) if entry.name in stored
    }
    values = {k: _tupled(v) for k, v in values.items()}
    values["logit_bias"] = {int(k): v for k, v in stored.get("logit_bias", {}).items()}
    if structured := values.get("structured_outputs"):
        values["structured_outputs"] = StructuredOutputs.from_json(structured)
    for name, value in values.items():
        _check_type(f"params.{name}", value, _PARAM_TYPES[name])
    return SamplingParams(**values)


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError if a stored value does not have the type of its field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple and get_origin(arguments[0]) is tuple:
        is_right = type(value) is tuple
        for entry in value if is_right else ():
            _check_type(name, entry, arguments[0])
    elif origin is tuple:
        is_right = type(value) is tuple and _have_type(value, arguments[0])
    elif origin is Mapping:
        is_right = type(value) is dict and _have_type(value.values(), arguments[1])
    else:
        is_right = _have_type([value], hint)
    if not is_right:
        raise ValueError(f"{name} is not of type {getattr(hint, '__name__', hint)}")


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _have_type(values: Iterable[Any], hint: Any) -> bool:
    types = {int, float} if hint is float else set(get_args(hint)) or {hint}
    return set(map(type, values)) <= types


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not an object")
    return value

"""The client's plain values have every field of the contract."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from outrider.client import info, results
from outrider.client.messages import fill_message, read_message
from outrider.client.request import ChatFields, RequestFields, build_request
from outrider.errors import InvalidRequest
from outrider.v1 import model_pb2, orchestrator_pb2, sampling_pb2

# What `generate`, `chat` and `resume` set from their own arguments.
_ARGUMENTS = {"text", "token_ids", "chat", "sampling", "resume_from", "heartbeat_ms"}
_PAIRS: list[tuple[Any, Any]] = [
    (results.TokenLogprobs, orchestrator_pb2.TokenLogprobs),
    (results.PromptLogprobs, orchestrator_pb2.PromptLogprobs),
    (results.Usage, orchestrator_pb2.Usage),
    (results.SourceStats, orchestrator_pb2.SourceStats),
    (results.GammaDecision, orchestrator_pb2.GammaDecision),
    (results.SpeculationStats, orchestrator_pb2.SpeculationStats),
    (results.GenerationEnd, orchestrator_pb2.GenerateResult),
    (info.KvHandle, orchestrator_pb2.KvHandle),
    (info.Session, orchestrator_pb2.GetSessionResponse),
    (info.SessionSummary, orchestrator_pb2.SessionSummary),
    (info.ModelInfo, model_pb2.ModelInfo),
    (info.DraftPairing, orchestrator_pb2.DraftPairing),
    (info.DraftRevision, orchestrator_pb2.DraftRevision),
    (info.DraftRollout, orchestrator_pb2.DraftRollout),
    (info.Models, orchestrator_pb2.GetModelInfoResponse),
    (info.AuditTest, orchestrator_pb2.AuditTest),
    (info.AuditFailure, orchestrator_pb2.AuditFailure),
    (info.Audit, orchestrator_pb2.GetAuditResponse),
]


@pytest.mark.parametrize(("kind", "message"), _PAIRS, ids=lambda each: each.__name__)
def test_every_field_is_read(kind: Any, message: Any) -> None:
    """Add a missing field to outrider/client/results.py or outrider/client/info.py."""
    hashes = {"token_hashes"}  # sent only to services that compare vocabularies
    assert {f.name for f in dataclasses.fields(kind)} == set(fields(message)) - hashes
    if kind is not results.GenerationEnd:  # its usage is always sent
        assert read_message(kind, message()) == read_message(kind, message())


def test_every_field_of_a_request_can_be_set() -> None:
    """Add a missing field to RequestFields of outrider/client/request.py."""
    request = set(fields(orchestrator_pb2.GenerateRequest)) - _ARGUMENTS
    assert set(RequestFields.__annotations__) == request | set(fields(sampling_pb2.SamplingParams))


def test_every_field_of_a_chat_can_be_set() -> None:
    """Add a missing field to ChatFields of outrider/client/request.py."""
    chat = set(fields(orchestrator_pb2.ChatMessages)) - {"messages"}
    assert set(ChatFields.__annotations__) - set(RequestFields.__annotations__) == chat


def test_objects_become_json_and_messages_may_have_openais_form() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    schema = {"type": "object"}
    given = {"tools": [{"type": "function"}], "structured_outputs": {"json": schema}, "seed": 4}
    request = build_request(messages=messages, fields=given | {"bad_words_token_ids": [[1, 2]]})
    first, second, third = request.chat.messages
    assert [part.text for part in first.parts] == ["Hi"]
    assert (second.tool_calls[0].name, second.tool_calls[0].arguments) == ("add", '{"a": 1}')
    assert (third.role, third.tool_call_id) == ("tool", "1")
    assert list(request.chat.tools) == ['{"type": "function"}']
    assert request.sampling.structured_outputs.json == '{"type": "object"}'
    assert request.sampling.seed == 4
    assert list(request.sampling.bad_words_token_ids[0].ids) == [1, 2]


def fields(message: Any) -> Any:
    return message.DESCRIPTOR.fields_by_name


def test_floats_are_their_shortest_decimals() -> None:
    message = orchestrator_pb2.TokenLogprobs(logprob=-0.1, top_ids=[3], top_logprobs=[1e-7, 1 / 3])
    read = read_message(results.TokenLogprobs, message)
    assert (read.logprob, read.top_ids, read.top_logprobs) == (-0.1, [3], [1e-7, 0.33333334])


def test_enums_are_names_and_absent_fields_are_none() -> None:
    stats = orchestrator_pb2.SpeculationStats(verification=sampling_pb2.VERIFICATION_COUPLED)
    stats.sources.add(source=orchestrator_pb2.DRAFT_SOURCE_LOOKUP)
    stats.sources[0].num_rounds_by_reason["faster"] = 2
    read = read_message(results.SpeculationStats, stats)
    assert (read.verification, read.acceptance_rate, read.decision) == ("coupled", None, None)
    assert read.sources[0].source == "lookup"
    assert read.sources[0].num_rounds_by_reason == {"faster": 2}


def test_a_value_of_a_wrong_type_names_its_field() -> None:
    request = orchestrator_pb2.GenerateRequest()
    with pytest.raises(InvalidRequest, match=r"^gamma: 'x': "):
        fill_message(request, "gamma", "x", "gamma")
    with pytest.raises(InvalidRequest, match=r"^chat: 'x' is not a mapping"):
        fill_message(request, "chat", "x", "chat")
    with pytest.raises(InvalidRequest, match=r"^sampling\.logit_bias: "):
        fill_message(request.sampling, "logit_bias", {-1: 2.0}, "sampling.logit_bias")

"""One trace per request across the three services, received by a real OTLP collector."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from outrider.errors import ConfigError
from outrider.settings.services import OrchestratorConfig
from outrider.settings.telemetry import TelemetrySettings
from outrider.telemetry.tracing import FIRST_ROUNDS, Tracing, tracing
from outrider.v1 import orchestrator_pb2
from tests.stack import request
from tests.telemetry.otlp_receiver import Receiver, receiving
from tests.telemetry.parts import Services, prompt, services

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01"
NOT_SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"
NUM_TOKENS = 120


async def generate(system: Services, *metadata: tuple[str, str]) -> int:
    """Number of received tokens."""
    num = 0
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": NUM_TOKENS}
    asked = request(prompt(3), sampling, draft_wait=orchestrator_pb2.DRAFT_WAIT_ALWAYS)
    async for chunk in system.client.Generate(asked, timeout=50, metadata=metadata):
        num += len(chunk.token_ids)
    return num


def settings(receiver: Receiver, ratio: float) -> dict[str, Any]:
    return {"otlp_endpoint": receiver.endpoint, "trace_sample_ratio": ratio}


async def test_a_trace_has_spans_of_all_three_services(redis_url: str) -> None:
    """One trace id; the tiers' spans are children of the request's, rounds are theirs.

    Spans are sent when the services stop, at the latest.
    """
    async with receiving() as receiver:
        async with services(redis_url, settings(receiver, 1.0)) as system:
            assert await generate(system) == NUM_TOKENS
        (whole,) = receiver.named("orchestrator", "Generate")
        (target,) = receiver.named("target", "verify")
        (draft,) = receiver.named("draft", "draft")
        assert {span.trace_id for span in receiver.spans} == {whole.trace_id}
        assert whole.parent_id == ""
        assert target.parent_id == draft.parent_id == whole.span_id
        assert whole.attributes["outrider.num_tokens"] == NUM_TOKENS
        assert whole.attributes["outrider.status"] == "OK"
        assert whole.attributes["session.id"] == target.attributes["session.id"]
        asked = receiver.named("orchestrator", "verify")
        rounds = receiver.named("target", "verify round")
        assert {span.parent_id for span in asked} == {whole.span_id}
        assert {span.parent_id for span in rounds} == {target.span_id}
        assert len(asked) == len(rounds) >= FIRST_ROUNDS
        # γ is 4, which gives a minimum of rounds. Not all of them have spans.
        assert len(rounds) < NUM_TOKENS // 5
        assert all(0 < span.duration_ns <= whole.duration_ns for span in rounds)
        gammas = {span.attributes["outrider.round"]: span.attributes["gamma"] for span in rounds}
        first = [gammas[number] for number in range(1, FIRST_ROUNDS + 1)]
        assert first == [0] + [4] * (FIRST_ROUNDS - 1), "the prompt's round has no draft tokens"


async def test_the_clients_trace_is_continued(redis_url: str) -> None:
    """Its sampling decision is used, whatever the configured ratio."""
    async with receiving() as receiver:
        async with services(redis_url, settings(receiver, 0.0)) as system:
            await generate(system, ("traceparent", SAMPLED), ("x-request-id", "of-the-caller"))
            await generate(system, ("traceparent", NOT_SAMPLED))
            await generate(system)
            await generate(system, ("traceparent", "nonsense"))
        (whole,) = receiver.named("orchestrator", "Generate")
        assert (whole.trace_id, whole.parent_id) == (TRACE_ID, PARENT_ID)
        assert whole.attributes["request.id"] == "of-the-caller"
        assert {span.trace_id for span in receiver.spans} == {TRACE_ID}
        assert {span.service for span in receiver.spans} == {"orchestrator", "target", "draft"}


@pytest.mark.slow
async def test_requests_succeed_without_a_collector(redis_url: str) -> None:
    """Spans are dropped, and the services can still stop."""
    unreachable = {"otlp_endpoint": "http://127.0.0.1:1", "trace_sample_ratio": 1.0}
    async with services(redis_url, unreachable, has_draft=False, gamma=0) as system:
        assert await generate(system) == NUM_TOKENS


async def test_without_the_sdk_an_endpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the setting and what to install."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    asked = TelemetrySettings(otlp_endpoint="http://127.0.0.1:4317")
    with pytest.raises(ConfigError, match=r"otlp_endpoint: .*'\.\[otel\]'"):
        async with tracing("orchestrator", asked):
            pass


MALFORMED = {
    "empty": "",
    "no ids": "nonsense",
    "zero trace id": f"00-{'0' * 32}-{PARENT_ID}-01",
    "upper case": SAMPLED.upper(),
    "version ff": f"ff{SAMPLED[2:]}",
    "more fields": f"{SAMPLED}-more",
    "too long": f"{SAMPLED}-{'x' * 600}",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_traceparent_starts_a_new_trace(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A tier, which only joins traces, makes no span then. Nothing is logged: clients send it."""
    traces = Tracing(TracerProvider().get_tracer("test"))
    span = traces.request("Generate", MALFORMED[name])
    assert span is not None
    assert span.trace_id != TRACE_ID
    assert traces.part("verify", MALFORMED[name]) is None
    assert caplog.records == []


def test_a_span_joins_the_trace_of_its_traceparent() -> None:
    traces = Tracing(TracerProvider().get_tracer("test"))
    span = traces.request("Generate", SAMPLED)
    assert span is not None
    assert span.trace_id == TRACE_ID
    part = traces.part("verify", span.traceparent)
    assert part is not None
    assert part.trace_id == TRACE_ID
    assert traces.part("verify", NOT_SAMPLED) is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"otlp_endpoint": "collector:4317"}, "otlp_endpoint"),
        ({"trace_sample_ratio": 0.5}, "trace_sample_ratio"),
        ({"otlp_endpoint": "http://c:4317", "trace_sample_ratio": 1.5}, "trace_sample_ratio"),
        ({"metrics_port": 70_000}, "metrics_port"),
        ({"metrics_vllm_names": True}, "metrics_vllm_names"),
    ],
)
def test_inconsistent_settings_are_rejected(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}:"):
        OrchestratorConfig(**fields)

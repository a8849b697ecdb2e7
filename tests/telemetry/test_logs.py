"""Logs: JSON lines with the request's ids, without prompts or generated text."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import draft_service.app
import target_service.app
from outrider.settings.services import DraftConfig, TargetConfig
from outrider.telemetry.logs import HIDDEN, without_secrets
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.cli.processes import ROOT, environment
from tests.services.parts import Pair
from tests.services.tokenizer_files import write_tokenizer
from tests.stack import Output, eventually, request
from tests.telemetry.otlp_receiver import Receiver, receiving
from tests.tiny_models import make_tiny_draft, make_tiny_model

KEY, PROMPT, STOP, CHAT = "sk-hidden-key-81a7", "my prompt is mine", "stop at this", "chat of mine"
SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
METADATA = (
    ("authorization", f"Bearer {KEY}"),
    ("traceparent", SAMPLED),
    ("x-request-id", "request-7"),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair with a tokenizer, so that there is text that could be logged."""
    root = tmp_path_factory.mktemp("pair")
    target = make_tiny_model("llama", root / "target", vocab_size=300)
    made = Pair(target, make_tiny_draft(target, root / "draft"))
    for directory in made:
        write_tokenizer(directory)
    return made


@contextlib.asynccontextmanager
async def orchestrator_process(lines: list[str], *flags: str) -> AsyncIterator[str]:
    """host:port; the lines of its standard error are in `lines` at the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "orchestrator", "--port=0", "--log-json", "--log-level=debug"),
        *flags,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    reading = asyncio.create_task(process.stderr.read())
    try:
        line = (await process.stdout.readline()).decode().strip()
        yield line.removeprefix("listening on ")
        process.terminate()
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        lines += (await reading).decode().splitlines()


async def talk(endpoint: str) -> list[Output]:
    """With drafts: a call that succeeds, one with an invalid stop, and a chat."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        client = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)

        async def has_draft() -> bool:
            info = await client.GetModelInfo(orchestrator_pb2.GetModelInfoRequest())
            return bool(info.HasField("draft"))

        await eventually(has_draft)
        sampling: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
        chat = request("", sampling | {"stop": [STOP]})
        message = orchestrator_pb2.ChatMessage(role="user", content=CHAT)
        chat.chat.messages.append(message)
        outputs = []
        for asked in (request(PROMPT, sampling | {"stop": [STOP]}), chat):
            output = Output()
            async for chunk in client.Generate(asked, metadata=METADATA, timeout=150):
                output.add(chunk)
            outputs.append(output)
        refused = request(PROMPT, sampling | {"stop": [STOP, ""]})
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in client.Generate(refused, metadata=METADATA, timeout=150):
                pass
        return outputs


def assert_silent(text: bytes, outputs: list[Output]) -> None:
    """Asserts that it contains no prompt, no output and no API key."""
    for words in (KEY, PROMPT, STOP, CHAT):
        assert words.encode() not in text
    for output in outputs:
        assert len(output.text) > 6
        assert json.dumps(output.text).strip('"').encode() not in text
        assert output.text.encode() not in text


async def test_lines_are_json_with_ids_and_without_words(
    pair: Pair, redis_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """For an orchestrator process; the tiers' logs and all spans contain no text either."""
    lines: list[str] = []
    async with receiving() as receiver:
        outputs = await _served(pair, redis_url, receiver, lines)
    events = [json.loads(line) for line in lines]
    assert all(event["program"] == "orchestrator" and event["timestamp"] for event in events)
    calls = [event for event in events if event["event"] == "generate"]
    assert [line["status"] for line in calls] == ["OK", "OK", "INVALID_ARGUMENT"]
    assert {line["request_id"] for line in calls} == {"request-7"}
    assert {line["trace_id"] for line in calls} == {SAMPLED.split("-")[1]}
    (refused,) = (line for line in calls if line["status"] == "INVALID_ARGUMENT")
    assert (refused["reason"], refused["field"]) == ("InvalidRequest", "sampling.stop")
    assert refused["why"]
    session_ids = [call.get("session_id") for call in calls]
    assert session_ids == [*(output.session_id for output in outputs), None]
    assert [line["num_tokens"] for line in calls] == [24, 24, 0]
    written = capfd.readouterr()
    assert_silent("\n".join(lines).encode(), outputs)
    assert_silent((written.out + written.err).encode(), outputs)
    assert {span.service for span in receiver.spans} == {"orchestrator", "target", "draft"}
    assert_silent(b"".join(receiver.raw), outputs)


async def _served(pair: Pair, redis_url: str, receiver: Receiver, lines: list[str]) -> list[Output]:
    common: dict[str, Any] = {"port": 0, "kv_cache_tokens": 4_096, "calibration_s": 0.0}
    common["stuck_after_s"] = 60.0
    common["otlp_endpoint"] = receiver.endpoint
    target_config = TargetConfig(model=str(pair.target), **common)
    draft_config = DraftConfig(model=str(pair.draft), **common)
    async with (
        target_service.app.serving(target_config) as target,
        draft_service.app.serving(draft_config) as draft,
    ):
        flags = {
            "target-endpoint": f"127.0.0.1:{target.port}",
            "draft-endpoint": f"127.0.0.1:{draft.port}",
            "redis-url": redis_url,
            "tokenizer": str(pair.target),
            "otlp-endpoint": receiver.endpoint,
            "gamma": "3",
        }
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        async with orchestrator_process(lines, *arguments) as endpoint:
            return await talk(endpoint)


async def test_grpc_writes_no_lines_of_its_own(pair: Pair, redis_url: str) -> None:
    """gRPC would write plain text between the JSON lines when a replica disconnects."""
    lines: list[str] = []
    config = TargetConfig(model=str(pair.target), port=0, kv_cache_tokens=4_096, calibration_s=0.0)
    async with target_service.app.serving(config) as target:
        flags = (f"--target-endpoint=127.0.0.1:{target.port}", f"--redis-url={redis_url}")
        async with (
            orchestrator_process(lines, *flags) as endpoint,
            grpc.aio.insecure_channel(endpoint) as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            await target.grpc_server.stop(0)

            async def has_noticed() -> bool:
                answer = await health.Check(health_pb2.HealthCheckRequest())
                return bool(answer.status == health_pb2.HealthCheckResponse.NOT_SERVING)

            await eventually(has_noticed)
    events = [json.loads(line)["event"] for line in lines]
    assert "replica_lost" in events


def test_values_of_secret_names_are_hidden() -> None:
    """If they are logged by mistake."""
    event = {"event": "x", "password": "p", "token": "t", "num_tokens": 3}
    shown = without_secrets(None, "info", event)
    assert shown == {"event": "x", "password": HIDDEN, "token": HIDDEN, "num_tokens": 3}

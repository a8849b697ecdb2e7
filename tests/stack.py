"""The whole system in one process for tests: real gRPC on free ports, a real Redis, real models."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

import draft_service.app
import orchestrator.app
import target_service.app
from outrider.settings.services import DraftConfig, OrchestratorConfig, TargetConfig
from outrider.v1 import (
    draft_pb2,
    draft_pb2_grpc,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    sampling_pb2,
    target_pb2,
    target_pb2_grpc,
)

KV_TOKENS = 16_384
QUICK: dict[str, Any] = {"kv_cache_tokens": KV_TOKENS, "calibration_s": 0.0}


@dataclass
class Output:
    """All that one Generate call sent."""

    session_id: str = ""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    origins: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    # Per token: how many characters of `text` were certain after it.
    text_ends: list[int] = field(default_factory=list)
    result: orchestrator_pb2.GenerateResult | None = None

    @property
    def speculation(self) -> orchestrator_pb2.SpeculationStats:
        assert self.result is not None
        return self.result.speculation

    def add(self, chunk: orchestrator_pb2.GenerateResponse) -> None:
        self.session_id = chunk.session_id
        self.token_ids += chunk.token_ids
        self.text_ends += [len(self.text) + end for end in chunk.text_ends]
        self.text += chunk.text
        self.texts.append(chunk.text)
        self.origins += chunk.origins
        self.logprobs += chunk.logprobs
        if chunk.HasField("result"):
            self.result = chunk.result


class Stack:
    """Clients of the three services; `channel` and `endpoint` are the orchestrator's."""

    def __init__(
        self,
        channel: Any,
        target_channel: Any,
        draft_channel: Any | None,
        *,
        endpoint: str,
        http_port: int | None = None,
    ) -> None:
        self.channel = channel
        self.endpoint = endpoint
        # With http_port in the settings.
        self.http_endpoint = f"127.0.0.1:{http_port}"
        self.client = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        self.target = target_pb2_grpc.TargetServiceStub(target_channel)
        self.draft = draft_pb2_grpc.DraftServiceStub(draft_channel) if draft_channel else None

    async def generate(
        self, prompt: str | Sequence[int], *, sampling: dict[str, Any] | None = None, **fields: Any
    ) -> Output:
        output = Output()
        async for chunk in self.client.Generate(request(prompt, sampling, **fields), timeout=200):
            output.add(chunk)
        return output

    async def target_load(self) -> target_pb2.TargetLoad:
        return (await self.target.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest())).load

    async def draft_load(self) -> draft_pb2.DraftLoad:
        assert self.draft is not None
        return (await self.draft.GetModelInfo(draft_pb2.DraftServiceGetModelInfoRequest())).load


def request(
    prompt: str | Sequence[int], sampling: dict[str, Any] | None = None, **fields: Any
) -> orchestrator_pb2.GenerateRequest:
    made = orchestrator_pb2.GenerateRequest(
        sampling=sampling_pb2.SamplingParams(**(sampling or {})), **fields
    )
    if isinstance(prompt, str):
        made.text = prompt
    else:
        made.token_ids.ids.extend(prompt)
    return made


@contextlib.asynccontextmanager
async def running_stack(
    target: Path | None,
    draft: Path | None,
    redis_url: str,
    *,
    target_settings: dict[str, Any] | None = None,
    draft_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Stack]:
    """All services up and ready; `settings` are the orchestrator's. A patient one, unless told.

    A tier whose settings have `simulate` has no model.
    """
    settings.setdefault("draft_wait_ms", 20_000.0)
    # Three services share one process: wide trees would be most of the work. Who wants one asks.
    settings.setdefault("lookahead", 1)
    settings.setdefault("fan_out", 1)
    settings.setdefault("assume_same_vocabulary", True)  # most pairs here have no tokenizer
    target_fields: dict[str, Any] = {**QUICK, **(target_settings or {})}
    draft_fields: dict[str, Any] = {**QUICK, **(draft_settings or {})}
    target_fields |= {"model": str(target or ""), "port": 0}
    draft_fields |= {"model": str(draft or ""), "port": 0}
    async with contextlib.AsyncExitStack() as stack:
        target_server = await stack.enter_async_context(
            target_service.app.serving(TargetConfig(**target_fields))
        )
        draft_endpoint = None
        if draft is not None or "simulate" in draft_fields:
            draft_server = await stack.enter_async_context(
                draft_service.app.serving(DraftConfig(**draft_fields))
            )
            draft_endpoint = f"127.0.0.1:{draft_server.port}"
        settings.setdefault("draft_endpoint", draft_endpoint)
        server = await stack.enter_async_context(
            orchestrator.app.serving(
                OrchestratorConfig(
                    target_endpoint=f"127.0.0.1:{target_server.port}",
                    redis_url=redis_url,
                    port=0,
                    **settings,
                )
            )
        )
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(endpoint))
            if endpoint
            else None
            for endpoint in (
                f"127.0.0.1:{server.port}",
                f"127.0.0.1:{target_server.port}",
                draft_endpoint,
            )
        ]
        yield Stack(*channels, endpoint=f"127.0.0.1:{server.port}", http_port=server.http_port)


async def eventually(condition: Any, timeout_s: float = 60.0) -> None:
    """Waits until the async condition holds; the failing value is in the error.

    By default for as long as says that it will never come, on a machine of any speed.
    """
    value = None
    for _ in range(int(timeout_s / 0.02)):
        value = await condition()
        if value:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {value!r}")

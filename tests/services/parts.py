"""Helpers of the service tests: tiers with settings, a greedy reference, errors of calls."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import torch
import transformers
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

import draft_service.app
import orchestrator.app
import target_service.app
from outrider.runtime.grpc_server import Server
from outrider.settings.services import DraftConfig, OrchestratorConfig, TargetConfig
from tests.stack import Output, Stack

KV_TOKENS = 16_384
CONTEXT_LEN = 2_048
# Longer than any pass that is not stuck, on a busy machine too.
STUCK_AFTER_S = 60.0
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


class Pair(NamedTuple):
    target: Path
    draft: Path


class Tiers(NamedTuple):
    target: Server
    draft: Server | None

    @property
    def endpoints(self) -> tuple[str, str | None]:
        draft = f"127.0.0.1:{self.draft.port}" if self.draft else None
        return f"127.0.0.1:{self.target.port}", draft


class System(Stack):
    """Clients of all three services."""

    # Port of the orchestrator's metrics, if it has one.
    metrics_port: int | None = None


class Greedy:
    """Plain Hugging Face greedy decoding of a model directory."""

    def __init__(self, directory: Path) -> None:
        auto: Any = transformers.AutoModelForCausalLM
        self._model = auto.from_pretrained(directory, dtype=torch.float32).eval()
        self._model.generation_config.eos_token_id = None

    def __call__(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The tokens that follow the prompt."""
        ids = torch.tensor([list(token_ids)])
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            pad_token_id=0,
        )
        tokens: list[int] = output[0, len(token_ids) :].tolist()
        return tokens


class Brake:
    """Pauses generations of at least N tokens before their next verify result, until released.

    So a test can act on a generation that is certainly running.
    """

    def __init__(self) -> None:
        self._num_tokens = math.inf
        self._is_off = asyncio.Event()

    def set(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._is_off.clear()

    def release(self) -> None:
        self._num_tokens = math.inf
        self._is_off.set()

    async def passed(self, num_tokens: int) -> None:
        """Waits if a generation with this number of tokens is to be paused."""
        if num_tokens >= self._num_tokens:
            await self._is_off.wait()


@contextlib.asynccontextmanager
async def both_tiers(
    pair: Pair,
    *,
    target_kv: int = KV_TOKENS,
    draft_kv: int | None = KV_TOKENS,
    draft_settings: dict[str, Any] | None = None,
    **target_settings: Any,
) -> AsyncIterator[Tiers]:
    """Target and draft replica; draft_kv None: no draft."""
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(
            target_service.app.serving(
                TargetConfig(
                    model=str(pair.target),
                    port=0,
                    kv_cache_tokens=target_kv,
                    calibration_s=0.0,
                    **{"stuck_after_s": STUCK_AFTER_S, **target_settings},
                )
            )
        )
        draft = None
        if draft_kv is not None:
            draft = await stack.enter_async_context(
                draft_service.app.serving(
                    DraftConfig(
                        model=str(pair.draft),
                        port=0,
                        kv_cache_tokens=draft_kv,
                        calibration_s=0.0,
                        stuck_after_s=STUCK_AFTER_S,
                        **(draft_settings or {}),
                    )
                )
            )
        yield Tiers(target, draft)


@contextlib.asynccontextmanager
async def orchestrating(tiers: Tiers, redis_url: str, **settings: Any) -> AsyncIterator[System]:
    """An orchestrator for these tiers, and clients of all three services."""
    target, draft = tiers.endpoints
    settings.setdefault("draft_wait_ms", 20_000.0)
    settings.setdefault("target_endpoint", target)
    settings.setdefault("draft_endpoint", draft)
    settings.setdefault("assume_same_vocabulary", True)  # most pairs here have no tokenizer
    config = OrchestratorConfig(redis_url=redis_url, port=0, **settings)
    async with (
        orchestrator.app.serving(config) as server,
        clients(tiers, f"127.0.0.1:{server.port}") as system,
    ):
        system.metrics_port = server.metrics_port
        system.http_endpoint = f"127.0.0.1:{server.http_port}"
        yield system


@contextlib.asynccontextmanager
async def clients(tiers: Tiers, endpoint: str = "127.0.0.1:1") -> AsyncIterator[System]:
    """Clients of both tiers and of the orchestrator at `endpoint`."""
    target, draft = tiers.endpoints
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address))
            for address in (endpoint, target, draft)
            if address
        ]
        yield System(channels[0], channels[1], channels[2] if draft else None, endpoint=endpoint)


@contextlib.asynccontextmanager
async def whole(pair: Pair, redis_url: str, **settings: Any) -> AsyncIterator[System]:
    """The whole system with the default KV budgets."""
    async with both_tiers(pair) as tiers, orchestrating(tiers, redis_url, **settings) as stack:
        yield stack


class Refusal(NamedTuple):
    """A call's error as the client sees it."""

    code: grpc.StatusCode
    message: str
    status: status_pb2.Status | None

    @property
    def fields(self) -> list[str]:
        """Fields named by the BadRequest detail."""
        detail = error_details_pb2.BadRequest()
        for packed in self.status.details if self.status else ():
            if packed.Unpack(detail):
                return [violation.field for violation in detail.field_violations]
        return []

    @property
    def retry_after_s(self) -> float | None:
        """Delay of the RetryInfo detail."""
        detail = error_details_pb2.RetryInfo()
        for packed in self.status.details if self.status else ():
            if packed.Unpack(detail):
                return detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
        return None


async def refusal(call: Awaitable[Any]) -> Refusal:
    """The call's error; raises AssertionError if it succeeds."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    return Refusal(error.code(), error.details() or "", rpc_status.from_call(error))


async def nothing_held(stack: Stack) -> bool:
    """Whether neither tier has an open generation, nor cached or reserved KV."""
    loads: list[Any] = [await stack.target_load()]
    if stack.draft is not None:
        loads.append(await stack.draft_load())
    return all(
        load.num_open_generations == 0
        and load.num_opened_total == load.num_closed_total
        and load.num_idle_sessions == 0
        and load.kv_used_tokens == 0
        for load in loads
    )


async def disturbed(client: Any, brake: Brake, asked: Any, disturb: Any) -> Output:
    """An output; `disturb` is awaited after its first tokens and before most of it."""
    output, is_disturbed = Output(), False
    brake.set(60)
    async for chunk in client.Generate(asked, timeout=200):
        output.add(chunk)
        if not is_disturbed and len(output.token_ids) > 20:
            is_disturbed = True
            await disturb()
            brake.release()
    assert is_disturbed
    return output

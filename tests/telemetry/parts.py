"""Three services with telemetry enabled, and scrapes of their metrics."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

import draft_service.app
import orchestrator.app
import target_service.app
from outrider.runtime.grpc_server import Server
from outrider.settings.services import DraftConfig, OrchestratorConfig, TargetConfig
from outrider.v1 import orchestrator_pb2_grpc
from tests.stack import eventually

VOCAB_SIZE = 1_000
TARGET = f"step_ms=2,vocab_size={VOCAB_SIZE}"
DRAFT = f"step_ms=0.2,survival=0.8/0.6,vocab_size={VOCAB_SIZE}"
KV_TOKENS = 65_536


class Services(NamedTuple):
    """`draft` None: no draft service."""

    target: Server
    draft: Server | None
    orchestrator: Server
    client: orchestrator_pb2_grpc.OrchestratorServiceStub


@contextlib.asynccontextmanager
async def services(
    redis_url: str,
    telemetry: dict[str, Any],
    *,
    has_draft: bool = True,
    target: str = TARGET,
    **settings: Any,
) -> AsyncIterator[Services]:
    """Simulated tiers; `telemetry` are settings of all three, `settings` the orchestrator's."""
    settings.setdefault("draft_wait_ms", 20_000.0)
    settings.setdefault("gamma", 4)
    tier: dict[str, Any] = {"port": 0, "kv_cache_tokens": KV_TOKENS, "calibration_s": 0.0}
    tier["stuck_after_s"] = 60.0
    async with contextlib.AsyncExitStack() as stack:
        target_server = await stack.enter_async_context(
            target_service.app.serving(TargetConfig(simulate=target, **tier, **telemetry))
        )
        draft_server = None
        if has_draft:
            draft_server = await stack.enter_async_context(
                draft_service.app.serving(
                    DraftConfig(simulate=DRAFT, stop_grace_s=0.0, **tier, **telemetry)
                )
            )
        server = await stack.enter_async_context(
            orchestrator.app.serving(
                OrchestratorConfig(
                    target_endpoint=f"127.0.0.1:{target_server.port}",
                    draft_endpoint=f"127.0.0.1:{draft_server.port}" if draft_server else None,
                    redis_url=redis_url,
                    port=0,
                    **settings,
                    **telemetry,
                )
            )
        )
        channel = await stack.enter_async_context(
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
        )
        client = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
        yield Services(target_server, draft_server, server, client)


def prompt(number: int, length: int = 12) -> list[int]:
    """A different prompt for each number."""
    return [int(i) for i in np.random.default_rng(number).integers(0, VOCAB_SIZE, length)]


class Scrape:
    """What `/metrics` exposed at one moment."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.kinds: dict[str, str] = {}
        self._values: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
        for family in text_string_to_metric_families(text):
            self.kinds[family.name] = family.type
            for sample in family.samples:
                values = self._values.setdefault(sample.name, {})
                values[frozenset(sample.labels.items())] = sample.value

    @property
    def names(self) -> set[str]:
        """The names of all samples."""
        return set(self._values)

    def __call__(self, name: str, **labels: str) -> float:
        """The sample with exactly these labels; 0 if there is none."""
        return self._values.get(name, {}).get(frozenset(labels.items()), 0.0)

    def values(self, name: str) -> list[float]:
        """The values of all samples with this name."""
        return list(self._values.get(name, {}).values())

    def by(self, name: str, label: str) -> dict[str, float]:
        """All samples of the name, by this label's value, added up over the others."""
        found: dict[str, float] = {}
        for labels, value in self._values.get(name, {}).items():
            key = dict(labels)[label]
            found[key] = found.get(key, 0.0) + value
        return found

    def counted(self, name: str, label: str) -> dict[str, float]:
        """As `by`, without what is 0."""
        return {value: num for value, num in self.by(name, label).items() if num}


def _get(port: int | None, path: str, accept: str, body: bytes | None) -> str:
    assert port is not None, "it has a metrics port"
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", body, headers={"Accept": accept} if accept else {}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


async def get(
    port: int | None, path: str = "/metrics", accept: str = "", body: bytes | None = None
) -> str:
    """The response body; with a `body` the request is a POST. Raises HTTPError."""
    return await asyncio.to_thread(_get, port, path, accept, body)


async def scrape(server: Server) -> Scrape:
    return Scrape(await get(server.metrics_port))


async def at_rest(server: Server) -> Scrape:
    """A scrape after all generations have ended and their KV is free.

    A tier learns of a call's end slightly later than the client.
    """
    exposed: list[Scrape] = []

    async def is_at_rest() -> bool:
        exposed[:] = [await scrape(server)]
        in_use = [
            *exposed[0].by("outrider_open_generations", "tier").values(),
            *exposed[0].by("outrider_kv_cache_usage_perc", "tier").values(),
        ]
        return exposed[0]("outrider_num_requests_running") == 0 and not any(in_use)

    await eventually(is_at_rest)
    return exposed[0]


@contextlib.contextmanager
def unused_port() -> Iterator[int]:
    """A port that is bound but not listening, so that nobody else can listen on it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def positions(counts: Sequence[Sequence[int]]) -> dict[str, float]:
    """num_accepted_tokens_per_pos of several requests, as the counters have it."""
    total: dict[str, float] = {}
    for count in counts:
        for position, num in enumerate(count):
            if num:
                total[str(position)] = total.get(str(position), 0.0) + num
    return total

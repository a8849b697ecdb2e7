"""`/metrics` over HTTP: the whole catalogue, both sets of names, and nothing else."""

from __future__ import annotations

import contextlib
import socket
import urllib.error
from typing import Any

import grpc
import pytest

import orchestrator.app
import target_service.app
from outrider.errors import ConfigError
from outrider.runtime.grpc_status import STATUS_NAMES
from outrider.settings.services import OrchestratorConfig, TargetConfig
from outrider.telemetry.catalogue import (
    CATALOGUE,
    CERTIFICATE_EXPIRES_AT,
    DRAFT_REVISION_COMPARED_RATE,
    DRAFT_ROLLOUT_DECISIONS,
    NUM_ACCEPTED_PER_POS,
    ROUNDS,
)
from outrider.telemetry.distribution import Distribution
from outrider.telemetry.metric import MetricKind
from tests.stack import eventually, request
from tests.telemetry.parts import (
    TARGET,
    Scrape,
    Services,
    at_rest,
    get,
    prompt,
    scrape,
    services,
)

# Metrics whose label is a number or the name of a model, so their series cannot exist beforehand.
_OPEN_ENDED = (ROUNDS, NUM_ACCEPTED_PER_POS, DRAFT_ROLLOUT_DECISIONS)  # the last: a draft tier's
_OPEN_LABELS = {"revision", "fingerprint"}
# tests/telemetry/test_refused.py; tests/services/test_draft_swap.py
_ELSEWHERE = (CERTIFICATE_EXPIRES_AT, DRAFT_REVISION_COMPARED_RATE)
METERED = {"metrics_port": 0}
VLLM_LABELS = {"model_name": "simulated", "engine": "0"}


async def generate(system: Services, num_tokens: int = 40) -> None:
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": num_tokens}
    async for _ in system.client.Generate(request(prompt(1), sampling), timeout=150):
        pass


async def scrapes(system: Services) -> list[Scrape]:
    """Scrapes of the three services after the call's end is counted everywhere."""

    async def is_over() -> bool:
        exposed = await scrape(system.orchestrator)
        return exposed("outrider_requests_total", status="OK") >= 1

    await eventually(is_over)
    assert system.draft is not None
    servers = (system.orchestrator, system.target, system.draft)
    return [await at_rest(server) for server in servers]


async def test_every_metric_of_the_catalogue_is_exposed_by_some_service(redis_url: str) -> None:
    """Under its name and kind; no service exposes a metric outside the catalogue."""
    async with services(redis_url, METERED) as system:
        await generate(system)
        scraped = await scrapes(system)
    kinds: dict[str, str] = {}
    for exposed in scraped:
        kinds |= {
            name: kind for name, kind in exposed.kinds.items() if name.startswith("outrider_")
        }
    assert kinds == {f"outrider_{metric.name}": metric.kind.value for metric in CATALOGUE}
    samples = set().union(*(exposed.names for exposed in scraped))
    for metric in CATALOGUE:
        if metric in _ELSEWHERE:
            continue
        suffix = "_count" if metric.kind is MetricKind.HISTOGRAM else ""
        assert metric.exported_name + suffix in samples
    assert not any(name.startswith("vllm:") for exposed in scraped for name in exposed.names)


async def test_error_series_exist_before_the_first_error(redis_url: str) -> None:
    """A series that starts at 1 has no rate: the first error would be missed."""
    async with services(redis_url, METERED, has_draft=False, gamma=0) as system:
        scraped = [await scrape(system.orchestrator), await scrape(system.target)]
    for metric in CATALOGUE:
        is_open = metric in _OPEN_ENDED or not _OPEN_LABELS.isdisjoint(metric.labels)
        if metric.kind is not MetricKind.COUNTER or not metric.labels or is_open:
            continue
        values = [value for exposed in scraped for value in exposed.values(metric.exported_name)]
        assert values, metric.name
    statuses = scraped[0].by("outrider_requests_total", "status")
    assert statuses == dict.fromkeys(STATUS_NAMES, 0)
    assert {str(code.name) for code in grpc.StatusCode} - statuses.keys() == {
        "ALREADY_EXISTS", "OUT_OF_RANGE", "UNIMPLEMENTED", "DATA_LOSS",
    }  # fmt: skip


async def test_vllm_names_have_the_same_values(redis_url: str) -> None:
    """Each metric with a vLLM name is also exposed under it, by model and engine."""
    async with services(redis_url, METERED | {"metrics_vllm_names": True}) as system:
        await generate(system)
        orchestrator_metrics, target_metrics, draft_metrics = await scrapes(system)
    for metric in CATALOGUE:
        if metric.vllm is None:
            continue
        of_tier = metric.labels == ("tier",) or metric.name == "num_preemptions"
        exposed = target_metrics if of_tier else orchestrator_metrics
        name = f"vllm:{metric.vllm}"
        if metric.kind is MetricKind.HISTOGRAM:
            ours, name = f"outrider_{metric.name}_count", f"{name}_count"
        else:
            ours = metric.exported_name
            name += "_total" if metric.kind is MetricKind.COUNTER else ""
        if metric.labels in ((), ("tier",)):
            labels = {"tier": "target"} if metric.labels else {}
            assert exposed(name, **VLLM_LABELS, **labels) == exposed(ours, **labels)
            assert name in exposed.names
            continue
        (label,) = metric.labels
        assert exposed.by(name, label) == exposed.by(ours, label) != {}
    assert orchestrator_metrics("vllm:generation_tokens_total", **VLLM_LABELS) == 40
    assert draft_metrics("vllm:kv_cache_usage_perc", **VLLM_LABELS, tier="draft") == 0


async def test_a_model_service_counts_its_passes(redis_url: str) -> None:
    """The same counts as GetModelInfo; and its state, KV capacity and failures."""
    async with services(redis_url, METERED) as system:
        await generate(system, 200)
        _, target, draft = await scrapes(system)
        for exposed, tier in ((target, "target"), (draft, "draft")):
            assert exposed("outrider_replica_state", tier=tier, state="ready") == 1
            assert exposed("outrider_replica_state", tier=tier, state="draining") == 0
            assert exposed("outrider_kv_cache_capacity_tokens", tier=tier) > 0
            assert exposed("outrider_step_seconds_count", tier=tier) > 0
            assert exposed("outrider_batch_rows_count", tier=tier) == exposed(
                "outrider_batch_tokens_count", tier=tier
            )
            assert exposed("outrider_batch_tokens_sum", tier=tier) >= 200
            assert set(exposed.by("outrider_failures_total", "reason").values()) == {0.0}
    # Twelve tokens of prompt; the first verify request runs one of them.
    assert target("outrider_prefill_tokens_total", tier="target") == 11
    assert target("outrider_waiting_rows") == draft("outrider_draft_queue") == 0


async def test_nothing_but_metrics_is_served(redis_url: str) -> None:
    """Other paths and methods are rejected. OpenMetrics is sent if requested."""
    async with services(redis_url, METERED, has_draft=False, gamma=0) as system:
        port = system.target.metrics_port
        for path in ("/", "/metrics/", "/debug"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                await get(port, path)
            assert caught.value.code == 404
            caught.value.close()
        with pytest.raises(urllib.error.HTTPError) as caught:
            await get(port, body=b"x=1")
        assert caught.value.code == 501
        caught.value.close()
        assert "outrider_waiting_rows" in await get(port, "/metrics?name[]=all")
        newer = await get(port, accept="application/openmetrics-text; version=1.0.0")
        assert newer.endswith("# EOF\n")


async def test_idle_connections_do_not_block_scrapes(redis_url: str) -> None:
    """300 connections; half of them have sent part of a request."""
    async with services(redis_url, METERED, has_draft=False, gamma=0) as system:
        port = system.target.metrics_port
        assert port is not None
        with contextlib.ExitStack() as stack:
            for number in range(300):
                half_open = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                if number % 2:
                    half_open.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
            for _ in range(3):
                assert "outrider_waiting_rows" in await get(port)


async def test_no_metrics_without_a_metrics_port(redis_url: str) -> None:
    async with services(redis_url, {}, has_draft=False, gamma=0) as system:
        assert system.target.metrics_port is system.orchestrator.metrics_port is None


async def test_a_port_in_use_is_an_error_naming_the_setting(redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        target = TargetConfig(simulate=TARGET, port=0, metrics_port=port)
        with pytest.raises(ConfigError, match=r"^metrics_port: cannot listen"):
            async with target_service.app.serving(target):
                pass
        config = OrchestratorConfig(
            target_endpoint="127.0.0.1:1", redis_url=redis_url, port=0, metrics_port=port
        )
        with pytest.raises(ConfigError, match=r"^metrics_port: cannot listen"):
            async with orchestrator.app.serving(config):
                pass


@pytest.mark.parametrize(
    ("value", "at_most"), [(0.5, 1), (1.0, 1), (1.5, 2), (2.0, 2), (9.0, None), (-1.0, 1)]
)
def test_a_value_is_counted_in_the_first_bucket_with_bound_not_below_it(
    value: float, at_most: float | None
) -> None:
    """Prometheus' definition of `le`."""
    distribution = Distribution((1, 2))
    distribution.observe(value)
    counts = dict(distribution.cumulative())
    assert list(counts) == ["1.0", "2.0", "+Inf"]
    expected: dict[str, Any] = {"1.0": int(at_most == 1), "2.0": int(at_most is not None)}
    assert counts == expected | {"+Inf": 1}
    assert distribution.sum == value

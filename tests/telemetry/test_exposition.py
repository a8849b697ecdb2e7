"""`/metrics` as a scraper finds it: the whole catalogue, both sets of names, and nothing else."""

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
    NUM_ACCEPTED_PER_POS,
    ROUNDS,
    MetricKind,
)
from outrider.telemetry.distribution import Distribution
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

# Labels that are numbers: none of them is an error.
_OPEN_ENDED = (ROUNDS, NUM_ACCEPTED_PER_POS)
METERED = {"metrics_port": 0}
VLLM_LABELS = {"model_name": "simulated", "engine": "0"}


async def generate(system: Services, num_tokens: int = 40) -> None:
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": num_tokens}
    async for _ in system.client.Generate(request(prompt(1), sampling), timeout=150):
        pass


async def scrapes(system: Services) -> list[Scrape]:
    """Of the three services, once the call's end is counted, and the tiers know of it."""

    async def is_over() -> bool:
        said = await scrape(system.orchestrator)
        return said("outrider_requests_total", status="OK") >= 1

    await eventually(is_over)
    assert system.draft is not None
    servers = (system.orchestrator, system.target, system.draft)
    return [await at_rest(server) for server in servers]


async def test_every_metric_of_the_catalogue_is_told_by_some_service(redis_url: str) -> None:
    """Under its name, as what it is; and no service tells one that is not in it."""
    async with services(redis_url, METERED) as system:
        await generate(system)
        told = await scrapes(system)
    kinds: dict[str, str] = {}
    for said in told:
        kinds |= {name: kind for name, kind in said.kinds.items() if name.startswith("outrider_")}
    assert kinds == {f"outrider_{metric.name}": metric.kind.value for metric in CATALOGUE}
    samples = set().union(*(said.names for said in told))
    for metric in CATALOGUE:
        if metric is CERTIFICATE_EXPIRES_AT:  # tests/telemetry/test_refused.py
            continue
        suffix = "_count" if metric.kind is MetricKind.HISTOGRAM else ""
        assert metric.exported_name + suffix in samples
    assert not any(name.startswith("vllm:") for said in told for name in said.names)


async def test_errors_are_told_before_the_first(redis_url: str) -> None:
    """A series that begins with 1 has no rate: the first error would be seen by nobody."""
    async with services(redis_url, METERED, has_draft=False, gamma=0) as system:
        told = [await scrape(system.orchestrator), await scrape(system.target)]
    for metric in CATALOGUE:
        if metric.kind is not MetricKind.COUNTER or not metric.labels or metric in _OPEN_ENDED:
            continue
        values = [value for said in told for value in said.values(metric.exported_name)]
        assert values, metric.name
    statuses = told[0].by("outrider_requests_total", "status")
    assert statuses == dict.fromkeys(STATUS_NAMES, 0)
    assert {str(code.name) for code in grpc.StatusCode} - statuses.keys() == {
        "ALREADY_EXISTS", "OUT_OF_RANGE", "UNIMPLEMENTED", "DATA_LOSS",
    }  # fmt: skip


async def test_vllm_names_have_the_same_values(redis_url: str) -> None:
    """Each metric that has a vLLM name is told under it too, by model and engine."""
    async with services(redis_url, METERED | {"metrics_vllm_names": True}) as system:
        await generate(system)
        orchestrator_said, target_said, draft_said = await scrapes(system)
    for metric in CATALOGUE:
        if metric.vllm is None:
            continue
        of_tier = metric.labels == ("tier",) or metric.name == "num_preemptions"
        said = target_said if of_tier else orchestrator_said
        name = f"vllm:{metric.vllm}"
        if metric.kind is MetricKind.HISTOGRAM:
            ours, name = f"outrider_{metric.name}_count", f"{name}_count"
        else:
            ours = metric.exported_name
            name += "_total" if metric.kind is MetricKind.COUNTER else ""
        if metric.labels in ((), ("tier",)):
            labels = {"tier": "target"} if metric.labels else {}
            assert said(name, **VLLM_LABELS, **labels) == said(ours, **labels)
            assert name in said.names
            continue
        (label,) = metric.labels
        assert said.by(name, label) == said.by(ours, label) != {}
    assert orchestrator_said("vllm:generation_tokens_total", **VLLM_LABELS) == 40
    assert draft_said("vllm:kv_cache_usage_perc", **VLLM_LABELS, tier="draft") == 0


async def test_a_model_service_counts_its_passes(redis_url: str) -> None:
    """As GetModelInfo has them; and its state, room and failures."""
    async with services(redis_url, METERED) as system:
        await generate(system, 200)
        _, target, draft = await scrapes(system)
        for said, tier in ((target, "target"), (draft, "draft")):
            assert said("outrider_replica_state", tier=tier, state="ready") == 1
            assert said("outrider_replica_state", tier=tier, state="draining") == 0
            assert said("outrider_kv_cache_capacity_tokens", tier=tier) > 0
            assert said("outrider_step_seconds_count", tier=tier) > 0
            assert said("outrider_batch_rows_count", tier=tier) == said(
                "outrider_batch_tokens_count", tier=tier
            )
            assert said("outrider_batch_tokens_sum", tier=tier) >= 200
            assert set(said.by("outrider_failures_total", "reason").values()) == {0.0}
    # Twelve tokens of prompt, of which the first row needs one anyway.
    assert target("outrider_prefill_tokens_total", tier="target") == 11
    assert target("outrider_waiting_rows") == draft("outrider_draft_queue") == 0


async def test_nothing_but_metrics_is_served(redis_url: str) -> None:
    """Other paths and methods are refused; Prometheus' newer format is spoken where asked for."""
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


async def test_connections_that_ask_nothing_blind_nobody(redis_url: str) -> None:
    """300 of them, half of which have begun to ask."""
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


async def test_without_a_port_there_is_none(redis_url: str) -> None:
    async with services(redis_url, {}, has_draft=False, gamma=0) as system:
        assert system.target.metrics_port is system.orchestrator.metrics_port is None


async def test_a_port_that_is_taken_is_refused_by_name(redis_url: str) -> None:
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
def test_a_value_belongs_to_the_first_bound_that_is_not_below_it(
    value: float, at_most: float | None
) -> None:
    """As Prometheus defines `le`."""
    distribution = Distribution((1, 2))
    distribution.observe(value)
    counts = dict(distribution.cumulative())
    assert list(counts) == ["1.0", "2.0", "+Inf"]
    expected: dict[str, Any] = {"1.0": int(at_most == 1), "2.0": int(at_most is not None)}
    assert counts == expected | {"+Inf": 1}
    assert distribution.sum == value

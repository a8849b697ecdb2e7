"""TLS on every link: refused peers and their status, and changes of certificates."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from outrider.cli.relay import Relay
from outrider.client.channel import Access, TlsChannels
from outrider.errors import ConfigError
from outrider.security.pem import watched_pem
from outrider.v1 import orchestrator_pb2_grpc, target_pb2_grpc
from tests.security.parts import (
    GREEDY,
    Authority,
    asked_target,
    channels,
    client,
    generated,
    model_info,
    orchestrated,
    plain,
    replace,
    secured,
    tiers,
)
from tests.services.parts import refusal
from tests.stack import eventually, request

Status = health_pb2.HealthCheckResponse


async def asked_health(channel: Any, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int(
        (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=60)).status
    )


async def test_a_generation_with_tls_on_all_links(authority: Authority, redis_url: str) -> None:
    """A tier refuses every client but the orchestrator."""
    async with secured(authority, redis_url) as system:
        async with client(system.endpoint, Access(tls_ca=authority.ca)) as stub:
            output = await generated(stub, num_tokens=16, gamma=4)
            assert len(output.token_ids) == 16
            assert output.speculation.num_drafts > 0, "the draft's link works too"
        await _refused_by_a_tier(authority, f"127.0.0.1:{system.target.port}")


async def test_a_distant_client_connects(authority: Authority, redis_url: str) -> None:
    """A handshake may take seconds: here a round trip takes 300 ms."""
    async with (
        secured(authority, redis_url) as system,
        Relay("127.0.0.1", 0, "127.0.0.1", system.orchestrator.port, 0.15) as relay,
        client(f"127.0.0.1:{relay.port}", Access(tls_ca=authority.ca)) as stub,
    ):

        async def is_served() -> bool:
            with contextlib.suppress(grpc.aio.AioRpcError):  # a busy machine is slower still
                return len((await generated(stub, num_tokens=4)).token_ids) == 4
            return False

        await eventually(is_served)


async def _refused_by_a_tier(authority: Authority, endpoint: str) -> None:
    async with plain(endpoint) as channel:
        assert (await refusal(asked_target(channel))).code is grpc.StatusCode.UNAVAILABLE
    stranger = Authority(authority.folder / "stranger")
    refusals = {
        "another authority": channels(stranger, "orchestrator", ca=authority.ca),
        "no certificate": TlsChannels(
            watched_pem(ca=authority.ca, cert=None, key=None, ca_name="", cert_name=""), "tier"
        ),
        "another server name": channels(authority, "orchestrator", "draft.example"),
        "server of another authority": channels(stranger, "orchestrator"),
    }
    for why, opener in refusals.items():
        async with opener.open(endpoint) as channel:
            refused = await refusal(asked_target(channel))
            assert refused.code is grpc.StatusCode.UNAVAILABLE, why
    async with channels(authority, "mallory").open(endpoint) as channel:
        refused = await refusal(asked_target(channel))
        assert refused.code is grpc.StatusCode.PERMISSION_DENIED
        assert "mallory" in refused.message
        stream = target_pb2_grpc.TargetServiceStub(channel).Verify()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert await asked_health(channel) == Status.SERVING, "probes have no certificate"
    async with channels(authority, "orchestrator").open(endpoint) as channel:
        await asked_target(channel)


async def test_clients_need_a_certificate_of_tls_client_ca(
    authority: Authority, redis_url: str
) -> None:
    """Whatever its name is."""
    async with secured(authority, redis_url, tls_client_ca=authority.ca) as system:
        async with plain(system.endpoint) as channel:
            stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
            assert (await refusal(model_info(stub))).code is grpc.StatusCode.UNAVAILABLE
        stranger = Authority(authority.folder / "stranger")
        cert, key = authority.issue("somebody")
        other_cert, other_key = stranger.issue("somebody")
        for access in (
            Access(tls_ca=authority.ca),
            Access(tls_ca=stranger.ca, tls_cert=cert, tls_key=key),
            Access(tls_ca=authority.ca, tls_cert=other_cert, tls_key=other_key),
        ):
            async with client(system.endpoint, access) as stub:
                assert (await refusal(model_info(stub))).code is grpc.StatusCode.UNAVAILABLE
        async with client(
            system.endpoint, Access(tls_ca=authority.ca, tls_cert=cert, tls_key=key)
        ) as stub:
            await model_info(stub)


async def test_an_orchestrator_with_a_wrong_name_does_not_serve(
    authority: Authority, redis_url: str
) -> None:
    """The tier logs the refusal."""
    tier = authority.tier("tier", tls_client_names="orchestrator.outrider,orchestrator")
    cert, key = authority.issue("mallory")
    settings = {"tier_tls_ca": authority.ca, "tier_tls_cert": cert, "tier_tls_key": key}
    async with tiers(tier, tier) as servers:

        async def serve() -> None:
            async with orchestrated(servers, redis_url, tier_tls_name="tier", **settings):
                raise AssertionError("it serves")

        async def is_refused() -> bool:
            return any(entry["event"] == "caller_refused" for entry in logs)

        with capture_logs() as logs:
            serving = asyncio.create_task(serve())
            await eventually(is_refused)
        assert not serving.done()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


async def test_the_health_port(authority: Authority, redis_url: str) -> None:
    """Serves health in plain text, and nothing else."""
    tier = authority.tier("tier", health_port=0)
    async with tiers(tier) as (target, draft), plain(f"127.0.0.1:{target.health_port}") as channel:
        assert draft.health_port is None
        for service in ("", "liveness", "outrider.v1.TargetService"):
            assert await asked_health(channel, service) == Status.SERVING
        refused = await refusal(asked_target(channel))
        assert refused.code is grpc.StatusCode.UNIMPLEMENTED


async def test_certificates_change_under_load(authority: Authority, redis_url: str) -> None:
    """All certificates and the authority change at once while streams run.

    No stream is lost. Peers that have only the old ones are refused from then on.
    """
    async with secured(authority, redis_url) as system:
        old = Access(tls_ca=keep(authority.ca))
        before = channels_kept(authority, "orchestrator")
        with capture_logs() as logs:
            async with client(system.endpoint, old) as stub, asyncio.TaskGroup() as tasks:
                stop = asyncio.Event()
                # Streams that begin before and go on after, and others that come and go.
                witnesses = [await begun(stub) for _ in range(2)]
                others = [tasks.create_task(generating(stub, stop)) for _ in range(3)]
                authority.renew()
                for who in ("tier", "orchestrator"):
                    authority.issue(who)
                authority.issue("server", "127.0.0.1", "localhost")
                await eventually(lambda: is_served_with(authority, system.endpoint))
                await eventually(lambda: links_are_new(logs))
                async with client(system.endpoint, Access(tls_ca=authority.ca)) as renewed:
                    await generated(renewed)
                for stream in witnesses:
                    for _ in range(20):
                        assert (await stream.read()).token_ids
                    stream.cancel()
                stop.set()
        assert all(other.result() > 0 for other in others)
        async with client(system.endpoint, old) as stub:
            assert (await refusal(model_info(stub))).code is grpc.StatusCode.UNAVAILABLE
        async with before.open(f"127.0.0.1:{system.target.port}") as channel:
            assert (await refusal(asked_target(channel))).code is grpc.StatusCode.UNAVAILABLE


async def begun(stub: Any) -> Any:
    """A long stream."""
    asked = request([4, 5, 6], {**GREEDY, "max_tokens": 20_000})
    stream = stub.Generate(asked, timeout=150)
    assert (await stream.read()).token_ids
    return stream


async def generating(stub: Any, stop: asyncio.Event) -> int:
    """Generates until stopped; returns the number of outputs, all of them complete."""
    num = 0
    while not stop.is_set():
        assert len((await generated(stub, num_tokens=60)).token_ids) == 60
        num += 1
    return num


async def links_are_new(logs: Sequence[Any]) -> bool:
    """Whether both tiers were connected since `logs` began."""
    connected = [entry["tier"] for entry in logs if entry["event"] == "replica_connected"]
    return {*connected} == {"target", "draft"}


async def is_served_with(authority: Authority, endpoint: str) -> bool:
    """Whether a client that trusts only this authority gets a response."""
    async with client(endpoint, Access(tls_ca=authority.ca)) as stub:
        try:
            await model_info(stub)
        except grpc.aio.AioRpcError as error:
            return error.code() is not grpc.StatusCode.UNAVAILABLE
    return True


def keep(path: str) -> str:
    """A copy that does not change."""
    kept = Path(f"{path}.kept")
    kept.write_bytes(Path(path).read_bytes())
    return str(kept)


def channels_kept(authority: Authority, who: str) -> TlsChannels:
    cert, key = authority.issue(who)
    files = watched_pem(
        ca=keep(authority.ca), cert=keep(cert), key=keep(key), ca_name="ca", cert_name="cert"
    )
    return TlsChannels(files, "tier")


async def test_a_half_changed_pair_of_files_is_not_used(
    authority: Authority, redis_url: str
) -> None:
    """A certificate without its key: the former pair stays in use, and this is logged once."""
    async with tiers(authority.tier("tier")) as (target, _):
        authority.issue("other")
        with capture_logs() as logs:  # the first connection to read the files logs it
            copy(authority, "other", "tier")
            for _ in range(2):
                async with channels(authority, "orchestrator").open(
                    f"127.0.0.1:{target.port}"
                ) as channel:
                    await asked_target(channel)
        assert [entry["event"] for entry in logs].count("files_refused") == 1


def copy(authority: Authority, who: str, over: str) -> None:
    """Replaces only the certificate."""
    cert = (authority.folder / f"{who}.pem").read_bytes()
    replace(authority.folder / f"{over}.pem", cert)


@pytest.mark.slow
async def test_a_changed_certificate_renews_the_connections(
    authority: Authority, redis_url: str
) -> None:
    """The orchestrator opens new connections to the tiers; the former ones end."""
    async with secured(authority, redis_url) as system:
        with capture_logs() as logs:
            authority.issue("orchestrator")

            await eventually(lambda: links_are_new(logs))
            async with client(system.endpoint, Access(tls_ca=authority.ca)) as stub:
                await generated(stub)

            async def only_new() -> bool:
                names = [task.get_name() for task in asyncio.all_tasks()]
                return sum(name.startswith("link ") for name in names) == 2

            await eventually(only_new)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tls_cert": "missing.pem", "tls_key": "missing.key"}, "tls_cert: missing.pem"),
        ({"tls_cert": "a.pem"}, "tls_key"),
        ({"tls_client_ca": "ca.pem"}, "tls_client_ca"),
        ({"tls_client_names": "somebody"}, "tls_client_names"),
        ({"health_port": 65_536}, "health_port"),
        ({"redis_ca": "ca.pem", "redis_url": "redis://x"}, "redis_ca"),
        ({"redis_user": "u", "redis_url": "redis://x"}, "redis_user"),
        ({"redis_password_file": "f", "redis_url": "redis://u:p@x"}, "redis_password_file"),
    ],
)
async def test_invalid_settings_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        async with tiers(settings):
            raise AssertionError("it serves")

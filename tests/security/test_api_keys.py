"""API keys: authentication, sessions per client, quotas, and changes of the keys file."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from structlog.testing import capture_logs

from outrider.client.channel import Access, open_channel
from outrider.errors import ConfigError
from outrider.security.keys import KeyLimits, new_key, watched_keys
from outrider.v1 import orchestrator_pb2, orchestrator_pb2_grpc
from tests.redis_fixture import redis_command
from tests.security.parts import (
    GREEDY,
    Authority,
    Secured,
    client,
    generated,
    model_info,
    orchestrated,
    replace,
    secured,
    tiers,
    write_keys,
)
from tests.services.parts import refusal
from tests.stack import eventually, request

Code = grpc.StatusCode


@contextlib.asynccontextmanager
async def keyed(
    folder: Path, redis_url: str, **limits: KeyLimits
) -> AsyncIterator[tuple[Secured, dict[str, str]]]:
    """A system on loopback without TLS, and the clients' keys by name."""
    keys = write_keys(folder / "keys", **limits)
    async with (
        tiers() as servers,
        orchestrated(servers, redis_url, api_keys_file=str(folder / "keys")) as system,
    ):
        yield system, keys


def asked_session(stub: Any, session_id: str = "s") -> Any:
    return stub.GetSession(orchestrator_pb2.GetSessionRequest(session_id=session_id), timeout=60)


def deletion(stub: Any, session_id: str = "s") -> Any:
    asked = orchestrator_pb2.DeleteSessionRequest(session_id=session_id)
    return stub.DeleteSession(asked, timeout=60)


async def test_a_key_lists_its_own_sessions(tmp_path: Path, redis_url: str) -> None:
    async with keyed(tmp_path, redis_url, ada=KeyLimits(), bob=KeyLimits()) as (system, keys):
        for name in keys:
            async with client(system.endpoint, Access(api_key=keys[name])) as stub:
                await generated(stub, session_id=f"of-{name}", create_session=True)
        async with client(system.endpoint, Access(api_key=keys["ada"])) as stub:
            page = await stub.ListSessions(orchestrator_pb2.ListSessionsRequest(), timeout=60)
            assert [session.session_id for session in page.sessions] == ["of-ada"]
            assert not page.next_page_token
            for token in ("x", "-1", "9" * 21, "²"):
                asked = orchestrator_pb2.ListSessionsRequest(page_token=token)
                refused = await refusal(stub.ListSessions(asked, timeout=60))
                assert (refused.code, refused.fields) == (Code.INVALID_ARGUMENT, ["page_token"])


async def test_every_method_but_health_requires_a_known_key(
    authority: Authority, redis_url: str
) -> None:
    """Over TLS, in either header."""
    keys = write_keys(authority.folder / "keys", ada=KeyLimits())
    file = str(authority.folder / "keys")
    async with secured(authority, redis_url, api_keys_file=file) as system:
        async with client(system.endpoint, Access(authority.ca, api_key=keys["ada"])) as stub:
            assert len((await generated(stub)).token_ids) == 8
        async with client(system.endpoint, Access(authority.ca, api_key="guess")) as stub:
            refused = await refusal(model_info(stub))
            assert (refused.code, "guess" in refused.message) == (Code.UNAUTHENTICATED, False)
        async with open_channel(system.endpoint, Access(authority.ca)) as channel:
            await _without_a_key(channel, keys["ada"])


async def _without_a_key(channel: Any, key: str) -> None:
    stub = orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
    for call in (generated(stub), model_info(stub), asked_session(stub), deletion(stub)):
        assert (await refusal(call)).code is Code.UNAUTHENTICATED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _listed_services(channel)
    assert caught.value.code() is Code.UNAUTHENTICATED
    health = health_pb2_grpc.HealthStub(channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    asked = orchestrator_pb2.GetModelInfoRequest()
    for metadata, is_right in (
        ((("x-api-key", key),), True),
        ((("authorization", f"bearer {key} "),), True),
        ((("authorization", f"Bearer {key}"), ("x-api-key", key)), True),
        ((("authorization", "Bearer x"), ("x-api-key", key)), False),
        ((("authorization", f"Basic {key}"),), False),
        ((("authorization", key),), False),
        ((("x-api-key", key[:-1]),), False),
        ((("x-api-key", key * 20),), False),
        ((("x-api-key-bin", key.encode()),), False),
    ):
        call = stub.GetModelInfo(asked, timeout=60, metadata=metadata)
        if is_right:
            await call
        else:
            assert (await refusal(call)).code is Code.UNAUTHENTICATED, metadata


async def _listed_services(channel: Any) -> Any:
    """The reflection service's answer. A refusal is raised by `write` or by `read`."""
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    return await call.read()


async def test_a_session_exists_only_for_its_client(tmp_path: Path, redis_url: str) -> None:
    """Others cannot continue, read, delete or resume it, and may use the same session id."""
    async with keyed(tmp_path, redis_url, ada=KeyLimits(), bob=KeyLimits()) as (system, keys):
        async with (
            client(system.endpoint, Access(api_key=keys["ada"])) as ada,
            client(system.endpoint, Access(api_key=keys["bob"])) as bob,
        ):
            first = await generated(ada, session_id="s", create_session=True)
            resumption = orchestrator_pb2.GenerateRequest(session_id="s", resume_from=4)
            for call in (
                asked_session(bob),
                deletion(bob),
                generated(bob, session_id="s"),
                anext(aiter(bob.Generate(resumption, timeout=60))),
            ):
                refused = await refusal(call)
                assert refused.code is Code.NOT_FOUND
                assert "ada" not in refused.message
            other = await generated(bob, (7, 8, 9), session_id="s", create_session=True)
            await generated(ada, session_id="s")
            assert first.session_id == other.session_id == "s"
            held = await asked_session(ada)
            assert (held.session_id, held.num_turns) == ("s", 2)
            assert (await asked_session(bob)).token_ids[:3] == [7, 8, 9]
            resumed = [chunk async for chunk in ada.Generate(resumption, timeout=60)]
            assert sum(len(chunk.token_ids) for chunk in resumed) == 4
            await deletion(ada)
            assert (await asked_session(bob)).num_turns == 1
        assert b"outrider:session:{bob/s}" in redis_command(redis_url, "KEYS", "*")


async def test_streams_of_a_key_are_limited(tmp_path: Path, redis_url: str) -> None:
    """One more is refused with a retry hint until one ends. Other keys are not affected."""
    limits = KeyLimits(streams=2)
    async with keyed(tmp_path, redis_url, ada=limits, bob=KeyLimits()) as (system, keys):
        whom = (Access(api_key=keys["ada"]), Access(api_key=keys["bob"]))
        async with client(system.endpoint, whom[0]) as ada, client(system.endpoint, whom[1]) as bob:
            asked = request([1, 2], {**GREEDY, "max_tokens": 20_000})
            streams = [ada.Generate(asked, timeout=150) for _ in range(2)]
            for stream in streams:
                await stream.read()
            refused = await refusal(generated(ada))
            assert refused.code is Code.RESOURCE_EXHAUSTED
            assert refused.retry_after_s
            assert "2 streams" in refused.message
            await model_info(ada)
            await generated(bob)
            streams[0].cancel()

            async def is_accepted() -> bool:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    return bool(await generated(ada))
                return False

            await eventually(is_accepted)
            streams[1].cancel()


async def test_tokens_per_minute_of_a_key_are_limited(tmp_path: Path, redis_url: str) -> None:
    """A running output is not cut off; the next request is refused with a retry hint."""
    limits = KeyLimits(tokens_per_minute=60)
    async with keyed(tmp_path, redis_url, ada=limits) as (system, keys):
        access = Access(api_key=keys["ada"])
        async with client(system.endpoint, access) as ada:
            assert len((await generated(ada, num_tokens=400)).token_ids) == 400
            refused = await refusal(generated(ada))
            assert refused.code is Code.RESOURCE_EXHAUSTED
            assert "60 tokens a minute" in refused.message
            assert refused.retry_after_s is not None
            # 403 tokens at one a second, of which a minute's worth is free at once.
            assert 200 < refused.retry_after_s < 345
            await model_info(ada)


@pytest.mark.slow
async def test_a_changed_keys_file_is_reloaded(tmp_path: Path, redis_url: str) -> None:
    """Keys are added and removed without a restart. An invalid file changes nothing."""
    path = tmp_path / "keys"
    async with keyed(tmp_path, redis_url, ada=KeyLimits()) as (system, keys):

        async def is_accepted(key: str) -> bool:
            async with client(system.endpoint, Access(api_key=key)) as stub:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    return bool(await model_info(stub))
            return False

        async def is_rejected(key: str) -> bool:
            return not await is_accepted(key)

        async with client(system.endpoint, Access(api_key=keys["ada"])) as ada:
            await generated(ada, session_id="s", create_session=True)
        key, line = new_key("ada", KeyLimits())
        replace(path, f"{path.read_text()}\n# her next one\n{line}  # from today\n")
        await eventually(lambda: is_accepted(key))
        assert await is_accepted(keys["ada"]), "both, for the time of the change"
        with capture_logs() as logs:
            replace(path, "ada sha256:zz\n")

            async def is_refused() -> bool:
                return any(entry["event"] == "files_refused" for entry in logs)

            await eventually(is_refused)
        assert await is_accepted(key)
        replace(path, f"{line}\n")
        await eventually(lambda: is_rejected(keys["ada"]))
        async with client(system.endpoint, Access(api_key=key)) as ada:
            assert (await asked_session(ada)).num_turns == 1, "the name is the same"


async def test_no_secret_is_logged_or_returned(authority: Authority, redis_url: str) -> None:
    """Neither in the log nor in errors."""
    keys = write_keys(authority.folder / "keys", ada=KeyLimits(streams=1))
    file = str(authority.folder / "keys")
    with capture_logs() as logs:
        async with secured(authority, redis_url, api_keys_file=file) as system:
            for key in (keys["ada"], "a-guess-of-mine"):
                async with client(system.endpoint, Access(authority.ca, api_key=key)) as stub:
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        await generated(stub, session_id="s", create_session=True)
            replace(authority.folder / "keys", f"ada {keys['ada']}\n")

            async def is_refused() -> bool:
                return any(entry["event"] == "files_refused" for entry in logs)

            await eventually(is_refused)
    logged = repr(logs)
    assert "ada" in logged
    assert keys["ada"] not in logged
    assert "a-guess-of-mine" not in logged
    assert "PRIVATE KEY" not in logged


async def test_a_key_is_not_sent_in_plain_text() -> None:
    """Except to loopback addresses."""
    with pytest.raises(ConfigError, match="tls-ca"):
        open_channel("orchestrator.example:50051", Access(api_key="k"))
    with pytest.raises(ConfigError, match="tls-ca"):
        open_channel("127.example:50051", Access(api_key="k"))
    for endpoint in ("127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/x"):
        await open_channel(endpoint, Access(api_key="k")).close()
    assert "secret" not in repr(Access(api_key="secret"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "has no keys"),
        ("# nothing\n\n", "has no keys"),
        ("ada\n", "line 1"),
        ("\nada sha256:12\n", "line 2"),
        (f"ada md5:{'0' * 64}", "line 1"),
        (f"a/b sha256:{'0' * 64}", "line 1"),
        (f"ada sha256:{'0' * 64} streams=0", "streams"),
        (f"ada sha256:{'0' * 64} streams=many", "streams"),
        (f"ada sha256:{'0' * 64} speed=3", "only streams"),
        (f"ada sha256:{'0' * 64} streams=1 streams=2", "once"),
        (f"ada sha256:{'0' * 64} streams=1\nada sha256:{'1' * 64}", "line 2: .*other limits"),
        (f"ada sha256:{'0' * 64} min_priority=-2147483649", "min_priority"),
        (f"ada sha256:{'0' * 64} min_priority=--1", "min_priority"),
        ("ada outrider-secret", "line 1"),
    ],
)
def test_an_invalid_keys_file_is_refused_by_line(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=named) as caught:
        watched_keys(str(path))
    assert "outrider-secret" not in str(caught.value)

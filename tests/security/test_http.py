"""Access over HTTP: API keys with their limits, TLS by the same files as gRPC, CORS."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider.security.keys import KeyLimits
from tests.security.parts import Authority, Secured, orchestrated, secured, tiers, write_keys
from tests.services.http_client import Answer, asked
from tests.stack import eventually

BODY: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
LONG = {**BODY, "max_tokens": 100_000, "stream": True}


async def completed(system: Secured, key: str = "", **fields: Any) -> Answer:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return await asked(system.http_endpoint, "POST", "/v1/completions", {**BODY, **fields}, headers)


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


async def test_keys_and_their_limits(keys_file: Path, redis_url: str) -> None:
    """401 without a known key, 429 with Retry-After over a limit; sessions belong to their key."""
    keys = write_keys(
        keys_file,
        ada=KeyLimits(streams=2, sessions=1),
        bob=KeyLimits(tokens_per_minute=5),
    )
    settings: dict[str, Any] = {"api_keys_file": str(keys_file), "http_port": 0}
    async with tiers() as servers, orchestrated(servers, redis_url, **settings) as system:
        for key in ("", "outrider-unknown"):
            refused = await completed(system, key)
            assert (refused.status, refused.body["error"]["code"]) == (401, "invalid_api_key")
        for path in ("/v1/models", "/metrics", "/nothing"):
            assert (await asked(system.http_endpoint, "GET", path)).status == 401
        for path in ("/health", "/version"):
            assert (await asked(system.http_endpoint, "GET", path)).status == 200
        answer = await completed(system, keys["ada"], session_id="s", create_session=True)
        assert answer.status == 200
        named = {"x-api-key": keys["ada"]}
        assert (await asked(system.http_endpoint, "GET", "/v1/models", None, named)).status == 200
        assert (await completed(system, keys["bob"], session_id="s")).status == 404
        full = await completed(system, keys["ada"], session_id="t", create_session=True)
        assert full.status == 429
        # More choices than the key may have streams run one after the other.
        assert len((await completed(system, keys["ada"], n=5)).body["choices"]) == 5
        assert (await completed(system, keys["bob"])).status == 200
        refused = await completed(system, keys["bob"])
        assert (refused.status, refused.body["error"]["type"]) == (429, "rate_limit_error")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        metrics = await asked(system.http_endpoint, "GET", "/metrics", None, named)
        text = metrics.content.decode()
        assert 'outrider_calls_refused_total{reason="no_key"} 4.0' in text
        assert 'outrider_calls_refused_total{reason="over_limit"} 1.0' in text
        assert 'outrider_calls_refused_total{reason="over_sessions"} 1.0' in text


async def test_a_full_queue_is_429_with_retry_after(redis_url: str) -> None:
    settings: dict[str, Any] = {"http_port": 0, "max_generations": 1, "max_waiting": 0}
    async with tiers() as servers, orchestrated(servers, redis_url, **settings) as system:
        refused = await completed(system, n=2)
        assert (refused.status, refused.body["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await completed(system)).status == 200


async def test_tls_by_the_files_of_grpc(authority: Authority, redis_url: str) -> None:
    """A renewed certificate is used by the next connection; a client certificate is required."""
    async with secured(authority, redis_url, http_port=0, tls_client_ca=authority.ca) as system:

        async def status(context: ssl.SSLContext) -> int:
            answer = await asked(
                system.http_endpoint, "POST", "/v1/completions", BODY, context=context
            )
            return answer.status

        stranger = ssl.create_default_context(cafile=authority.ca)
        friend = ssl.create_default_context(cafile=authority.ca)
        friend.load_cert_chain(*authority.issue("friend"))
        assert await status(friend) == 200
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await status(stranger)
        authority.renew()
        authority.issue("server", "127.0.0.1", "localhost")
        renewed = ssl.create_default_context(cafile=authority.ca)
        renewed.load_cert_chain(*authority.issue("friend"))

        async def is_renewed() -> bool:
            try:
                return await status(renewed) == 200
            except (ssl.SSLError, ConnectionError):
                return False

        await eventually(is_renewed)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await status(friend)


async def test_origins_that_may_call_from_web_pages(redis_url: str) -> None:
    """Errors have the header, too. Without the setting no other origin may, its own always."""
    async with tiers() as servers:
        for allowed, origin, expected in (
            ("https://a.example, https://b.example", "https://b.example", "https://b.example"),
            ("https://a.example", "https://c.example", None),
            ("*", "https://c.example", "*"),
            ("", "https://a.example", None),
        ):
            settings: dict[str, Any] = {"http_port": 0, "http_allowed_origins": allowed}
            async with orchestrated(servers, redis_url, **settings) as system:
                headers = {"Origin": origin}
                for body in (BODY, {}):
                    answer = await asked(
                        system.http_endpoint, "POST", "/v1/completions", body, headers
                    )
                    assert answer.headers.get("access-control-allow-origin") == expected
                    assert (answer.status == 403) == (expected is None)
                own = {"Origin": f"http://{system.http_endpoint}"}
                answer = await asked(system.http_endpoint, "POST", "/v1/completions", BODY, own)
                assert answer.status == 200, "its own page"
                preflight = await asked(
                    system.http_endpoint, "OPTIONS", "/v1/completions", None,
                    {**headers, "Access-Control-Request-Method": "POST",
                     "Access-Control-Request-Headers": "authorization"},
                )  # fmt: skip
                assert (preflight.status == 200) == (expected is not None)


async def test_a_port_in_use_is_named(redis_url: str) -> None:
    async with tiers() as servers, orchestrated(servers, redis_url, http_port=0) as system:
        with pytest.raises(ConfigError, match=r"http_port: cannot listen on 127\.0\.0\.1:"):
            async with orchestrated(servers, redis_url, http_port=system.orchestrator.http_port):
                pass

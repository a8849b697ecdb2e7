"""The client with TLS, with a certificate of its own and with an API key."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider.client import Access, AsyncClient, CallFailed
from outrider.errors import ConfigError
from outrider.security.keys import KeyLimits
from tests.security.parts import Authority, secured, write_keys


async def test_mutual_tls_and_a_key(tmp_path: Path, redis_url: str) -> None:
    """Sessions are the key's own; without certificate or key the reason is named."""
    authority = Authority(tmp_path / "pki")
    keys = write_keys(tmp_path / "keys", ada=KeyLimits(), bob=KeyLimits())
    settings = {"api_keys_file": str(tmp_path / "keys"), "tls_client_ca": authority.ca}
    cert, key = authority.issue("client")
    mutual = {"tls_ca": authority.ca, "tls_cert": cert, "tls_key": key}
    async with secured(authority, redis_url, **settings) as system:
        async with (
            AsyncClient(system.endpoint, access=Access(**mutual, api_key=keys["ada"])) as ada,
            AsyncClient(system.endpoint, access=Access(**mutual, api_key=keys["bob"])) as bob,
        ):
            result = await ada.generate([5, 6, 7], session_id="own", max_tokens=4).result()
            assert result.usage.completion_tokens == 4
            assert [each.session_id for each in (await ada.list_sessions()).sessions] == ["own"]
            assert (await bob.list_sessions()).sessions == []
        async with AsyncClient(system.endpoint, access=Access(**mutual, api_key="guess")) as client:
            with pytest.raises(CallFailed, match=r"^UNAUTHENTICATED: ") as caught:
                await client.generate([5], max_tokens=1).result()
            assert caught.value.code == "UNAUTHENTICATED"
        async with AsyncClient(system.endpoint, access=Access(authority.ca)) as client:
            with pytest.raises(CallFailed, match="it requires a client certificate"):
                await client.models()


def test_a_key_is_not_sent_in_plain_text() -> None:
    """Files are read when the client is made."""
    with pytest.raises(ConfigError, match="would be sent to far:1 in plain text"):
        AsyncClient("far:1", access=Access(api_key="secret"))
    with pytest.raises(ConfigError, match=r"absent\.pem"):
        AsyncClient("far:1", access=Access(tls_ca="absent.pem"))
    assert "secret" not in repr(Access(api_key="secret"))

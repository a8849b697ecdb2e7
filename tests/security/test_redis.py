"""Redis behind TLS with an ACL: login, refusals, changes of certificates and password."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider.redis.embedded import RedisServer
from outrider.settings.loader import load
from outrider.settings.redis_address import RedisAddress
from outrider.settings.services import OrchestratorConfig
from tests.redis_fixture import redis_command
from tests.security.parts import (
    Authority,
    as_openssl_has_it,
    client,
    generated,
    orchestrated,
    replace,
    tiers,
)
from tests.security.tls_front import TlsFront
from tests.stack import eventually
from tests.telemetry.parts import scrape

EXPIRES_AT = "outrider_certificate_expires_at_seconds"
PASSWORD = "correct-horse"
DOCS = Path(__file__).parents[2] / "docs/how-to/secure.md"


def documented_rules() -> str:
    """What docs/how-to/secure.md lists as enough."""
    found = re.search(r"^user outrider on >PASSWORD (.*)$", DOCS.read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


class Guarded:
    """A real Redis behind TLS, for the user `outrider` only."""

    def __init__(self, authority: Authority, server: RedisServer, front: TlsFront) -> None:
        self.server, self.front, self._authority = server, front, authority
        self.password_file = authority.folder / "password"
        self._command(f"ACL SETUSER outrider on {documented_rules()}")
        self.change_password(PASSWORD)
        self._command("ACL SETUSER default -@all +acl +client")
        self.renew()

    def _command(self, words: str) -> None:
        assert redis_command(self.server.url, words).startswith((b"+", b":")), words

    def change_password(self, password: str) -> None:
        self._command(f"ACL SETUSER outrider resetpass >{password}")
        replace(self.password_file, f"{password}\n")

    def renew(self) -> None:
        """New certificates of both ends, signed by the current authority."""
        self._authority.issue("redis-client")
        self.front.use(self._authority.ca, *self._authority.issue("localhost"))

    def settings(self, **others: Any) -> dict[str, Any]:
        folder = self._authority.folder
        return {
            "redis_url": f"rediss://localhost:{self.front.port}/0",
            "redis_ca": self._authority.ca,
            "redis_cert": str(folder / "redis-client.pem"),
            "redis_key": str(folder / "redis-client.key"),
            "redis_user": "outrider",
            "redis_password_file": str(self.password_file),
            **others,
        }


@contextlib.asynccontextmanager
async def guarded(authority: Authority) -> AsyncIterator[Guarded]:
    with RedisServer() as server:
        async with TlsFront(server.url.removeprefix("unix://")).listening() as front:
            yield Guarded(authority, server, front)


async def test_all_services_log_in_and_reload_changed_secrets(authority: Authority) -> None:
    """For the registry and for sessions, without a restart."""
    async with guarded(authority) as redis:
        settings = redis.settings()
        more = {name: value for name, value in settings.items() if name != "redis_url"}
        async with (
            tiers(settings, settings) as servers,
            orchestrated(servers, settings["redis_url"], **more) as system,
            client(system.endpoint) as stub,
        ):
            await generated(stub, session_id="s", create_session=True)
            for change in (redis.change_password, renewal(authority, redis)):
                change("another-one")
                redis.front.drop()

                async def is_recorded() -> bool:
                    output = await generated(stub, session_id="s")
                    return output.result is not None and output.result.recorded

                async def is_back() -> bool:
                    with contextlib.suppress(Exception):
                        return await is_recorded()
                    return False

                await eventually(is_back)


async def test_the_expiry_of_redis_certificate_is_exported(
    authority: Authority,
) -> None:
    """Of the last connection: a renewed certificate counts from the next one."""
    async with guarded(authority) as redis, tiers() as servers:
        settings = redis.settings(metrics_port=0)
        url = settings.pop("redis_url")
        async with orchestrated(servers, url, **settings) as system:

            async def exported() -> dict[str, float]:
                return (await scrape(system.orchestrator)).by(EXPIRES_AT, "use")

            assert await exported() == {"redis": as_openssl_has_it(authority, "localhost")}
            authority.issue_until("localhost", datetime(2051, 2, 3, 4, 5, 6, tzinfo=UTC))
            folder = authority.folder
            redis.front.use(
                authority.ca, str(folder / "localhost.pem"), str(folder / "localhost.key")
            )
            renewed = {"redis": as_openssl_has_it(authority, "localhost")}
            assert await exported() != renewed
            redis.front.drop()

            async def is_seen() -> bool:
                return await exported() == renewed

            await eventually(is_seen)


async def test_without_tls_no_certificate_of_redis_is_exported(redis_url: str) -> None:
    async with tiers() as servers, orchestrated(servers, redis_url, metrics_port=0) as system:
        assert (await scrape(system.orchestrator)).by(EXPIRES_AT, "use") == {}


def renewal(authority: Authority, redis: Guarded) -> Any:
    def change(_: str) -> None:
        authority.renew()
        redis.renew()

    return change


async def test_a_failed_login_is_a_config_error(authority: Authority) -> None:
    """It names the setting and contains no secret."""
    async with guarded(authority) as redis, tiers() as servers:
        stranger = Authority(authority.folder / "stranger")
        wrong = authority.folder / "wrong"
        replace(wrong, "battery-staple")
        for change, named in (
            ({"redis_password_file": str(wrong)}, "redis_url: .*invalid username-password"),
            ({"redis_ca": stranger.ca}, "redis_url: .*CERTIFICATE_VERIFY_FAILED"),
            ({"redis_cert": None, "redis_key": None}, "redis_url: "),
            ({"redis_ca": str(wrong)}, "redis_ca"),
            ({"redis_password_file": "/nowhere"}, "redis_password_file: /nowhere"),
        ):
            settings = redis.settings(**change)
            url = settings.pop("redis_url")
            with pytest.raises(ConfigError, match=named) as caught:
                async with orchestrated(servers, url, **settings):
                    raise AssertionError("it serves")
            assert "battery-staple" not in str(caught.value)


def test_a_password_on_the_command_line_is_refused(tmp_path: Path) -> None:
    """Other users can list processes. In the environment it is accepted, and never printed."""
    url = "rediss://ada:secret@redis.example:6379/0"
    with pytest.raises(ConfigError, match="environment") as caught:
        load(OrchestratorConfig, "orchestrator", [f"--redis-url={url}"], {})
    assert "secret" not in str(caught.value)
    config = load(OrchestratorConfig, "orchestrator", [], {"REDIS_URL": url})
    assert config.redis.url == url
    assert "secret" not in f"{config} {config.redis!r} {config.redis}"


@pytest.mark.parametrize(
    "url",
    [
        "redis://redis.example:6379/0?password=secret",
        "redis://redis.example:6379/0?username=ada&password=secret",
        "redis://ada:a/secret@redis.example:6379/0",
        "redis://ada:12/secret@redis.example:6379/0",
        "redis://ada:a?secret@redis.example:6379/0",
        "redis://ada:a#secret@redis.example:6379/0",
        "unix:///run/redis.sock?password=secret",
    ],
)
def test_a_password_elsewhere_in_the_url_is_refused_and_not_printed(url: str) -> None:
    """redis-py would accept some of these; the others parse in unexpected ways."""
    for argv, environ in (([f"--redis-url={url}"], {}), ([], {"REDIS_URL": url})):
        with pytest.raises(ConfigError, match=r"redis.password.file") as caught:
            load(OrchestratorConfig, "orchestrator", argv, environ)
        assert "secret" not in str(caught.value)
    assert "secret" not in str(RedisAddress(url))


def test_an_at_sign_in_a_socket_path_is_not_a_password() -> None:
    url = "unix:///run/a@b/redis.sock"
    config = load(OrchestratorConfig, "orchestrator", [f"--redis-url={url}"], {})
    assert str(config.redis) == url


def test_an_invalid_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="redis_url: not a URL"):
        load(OrchestratorConfig, "orchestrator", [], {"REDIS_URL": "redis://[ada:secret"})

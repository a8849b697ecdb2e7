"""Malformed addresses are refused by flag or setting, before anything is resolved or connected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from outrider.cli.request import endpoints_of
from outrider.cli.stack import Stack
from outrider.cli.stack_options import StackOptions
from outrider.client import AsyncClient
from outrider.client.diagnosis import Diagnosis, probe
from outrider.errors import ConfigError
from outrider.settings.addresses import require_endpoint, require_host
from outrider.settings.loader import load
from outrider.settings.services import DraftConfig, OrchestratorConfig, TargetConfig
from tests.cli.processes import run

# A malformed host, and the start of what is wrong with it.
BAD_HOSTS = {
    "nobody..invalid": "has an empty label",
    ".nobody.invalid": "has an empty label",
    "a" * 64 + ".invalid": "has a label of 64 characters; at most 63",
    ".".join(["a" * 60] * 5): "has 304 characters; at most 253",
    "no body": "has the character ' ', which no host name has",
    "nobody\0": r"has the character '\x00', which no host name has",
    "user@nobody": "has the character '@', which no host name has",
    "nöbody.invalid": "is not ASCII; use its ASCII form: xn--nbody-jua.invalid",
    "nöbody..invalid": "is not ASCII, and has no ASCII form",
    "nobody\udcff": "is not ASCII, and has no ASCII form",
}
GOOD_HOSTS = (
    "localhost", "LOCALHOST.", "127.0.0.1", "[::1]", "[fe80::1%eth0]", "my_host-1", "a" * 63,
)  # fmt: skip
BAD_PORTS = ("", "0", "65536", "-1", "5x", "1e3", "\N{ARABIC-INDIC DIGIT THREE}")
each_bad_host = pytest.mark.parametrize(("host", "fault"), BAD_HOSTS.items(), ids=ascii)
each_scheme = pytest.mark.parametrize("scheme", ["", "dns:", "dns:///", "dns://8.8.8.8/", "ipv4:"])


def refusal(check: Callable[[], Any]) -> str:
    """The message of the ConfigError that `check` raises."""
    with pytest.raises(ConfigError) as caught:
        check()
    return str(caught.value)


@each_bad_host
def test_a_malformed_host_is_refused(host: str, fault: str) -> None:
    message = refusal(lambda: require_host(host, "--host"))
    assert message.startswith(f"--host: host {host!r} {fault}")


@each_bad_host
@each_scheme
def test_an_endpoint_with_a_malformed_host_is_refused(scheme: str, host: str, fault: str) -> None:
    message = refusal(lambda: endpoints_of(f"localhost:1,{scheme}{host}:50051"))
    assert message.startswith(f"--endpoint: host {host!r} {fault}")


@each_scheme
@pytest.mark.parametrize("port", BAD_PORTS, ids=ascii)
def test_an_endpoint_with_a_bad_port_is_refused(scheme: str, port: str) -> None:
    message = refusal(lambda: endpoints_of(f"{scheme}localhost:{port}"))
    assert message.startswith("--endpoint: ")
    assert f"'localhost:{port}' is not host:port" in message


@pytest.mark.parametrize("endpoint", ["dns:", "dns:///", "unix:/run/\0", "unix:/run/\udcff"])
def test_other_malformed_endpoints_are_refused(endpoint: str) -> None:
    assert refusal(lambda: endpoints_of(endpoint)).startswith("--endpoint: ")


@pytest.mark.parametrize("host", GOOD_HOSTS)
def test_a_host_is_allowed(host: str) -> None:
    require_host(host, "host")
    for endpoint in (f"{host}:1", f"dns:///{host}", f"dns:{host}:65535", "unix:/run/my socket"):
        require_endpoint(endpoint, "--endpoint")


@each_bad_host
def test_a_client_refuses_a_malformed_host(host: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=r"^endpoint: host "):
        AsyncClient(f"{host}:50051")


@pytest.mark.parametrize("host", ["nobody..invalid", "a" * 64, "nöbody..invalid"], ids=ascii)
def test_the_probe_finds_no_host_of_a_malformed_name(host: str) -> None:
    """Also for unchecked addresses, such as those in the registry."""
    assert probe(f"{host}:1") is Diagnosis.NO_HOST


@each_bad_host
@pytest.mark.parametrize(
    ("kind", "program", "name", "value"),
    [
        (TargetConfig, "target", "host", "{}"),
        (TargetConfig, "target", "advertise", "{}:50052"),
        (TargetConfig, "target", "redis_url", "redis://{}:6379/0"),
        (DraftConfig, "draft", "otlp_endpoint", "http://{}:4317"),
        (OrchestratorConfig, "orchestrator", "host", "{}"),
        (OrchestratorConfig, "orchestrator", "target_endpoint", "localhost:1,{}:50052"),
        (OrchestratorConfig, "orchestrator", "draft_endpoint", "{}:50053"),
        (OrchestratorConfig, "orchestrator", "redis_url", "rediss://{}/0"),
        (OrchestratorConfig, "orchestrator", "otlp_endpoint", "https://{}"),
    ],
)
def test_a_setting_with_a_malformed_host_is_refused(
    host: str, fault: str, kind: type[Any], program: str, name: str, value: str
) -> None:
    """By flag and by variable, with the setting's name."""
    if "@" in host and name in ("redis_url", "otlp_endpoint"):
        return  # in a URL it separates the login from the host
    given, required = value.format(host), [] if program == "orchestrator" else ["--model=m"]
    flag, variable = f"--{name.replace('_', '-')}", f"OUTRIDER_{program.upper()}_{name.upper()}"
    by_flag = refusal(lambda: load(kind, program, [*required, f"{flag}={given}"], {}))
    by_variable = refusal(lambda: load(kind, program, required, {variable: given}))
    assert by_flag == by_variable
    assert by_flag.startswith(f"{name}: ")
    assert fault in by_flag


@pytest.mark.parametrize("port", ["65536", "x", "-1"])
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--redis-url", "redis://localhost:{}/0"),
        ("--otlp-endpoint", "http://localhost:{}"),
        ("--target-endpoint", "localhost:{}"),
        ("--draft-endpoint", "localhost:{}"),
    ],
)
def test_a_setting_with_a_bad_port_is_refused(flag: str, value: str, port: str) -> None:
    argv = [f"{flag}={value.format(port)}"]
    message = refusal(lambda: load(OrchestratorConfig, "orchestrator", argv, {}))
    assert message.startswith(f"{flag[2:].replace('-', '_')}: ")


@pytest.mark.parametrize(
    "url",
    ["redis://:secret@nobody..invalid", "redis://:sec/ret@nobody", "redis://ada:secret@h:x/0"],
)
def test_a_refused_redis_url_is_not_shown(url: str) -> None:
    """It may have a password."""
    variable = {"REDIS_URL": url}
    message = refusal(lambda: load(OrchestratorConfig, "orchestrator", [], variable))
    assert message.startswith("redis_url: ")
    assert "sec" not in message


@pytest.mark.parametrize("path", ["cache", "0/1", "-1", "0;x"])
def test_a_redis_database_is_a_number(path: str) -> None:
    """redis-py would use database 0 without a word."""
    argv = [f"--redis-url=redis://localhost:6379/{path}"]
    message = refusal(lambda: load(OrchestratorConfig, "orchestrator", argv, {}))
    assert message.startswith("redis_url: the part after the last / must be the number")


@pytest.mark.parametrize("path", ["", "/", "/0", "/15", "/0/"])
def test_a_redis_database_may_be_left_out(path: str) -> None:
    url = f"redis://localhost:6379{path}"
    config = load(OrchestratorConfig, "orchestrator", [f"--redis-url={url}"], {})
    assert config.redis_url == url


@each_bad_host
async def test_outrider_up_refuses_a_malformed_host(host: str, fault: str) -> None:
    stack = Stack(StackOptions(simulate_target="step_ms=1", host=host), lambda event: None)
    try:
        with pytest.raises(ConfigError, match=r"^host: host "):
            await stack.start()
    finally:
        await stack.stop()


def test_commands_exit_with_2_and_name_the_flag() -> None:
    for words, message in (
        (("generate", "x", "--endpoint=nobody..invalid:1"), "--endpoint: host 'nobody..invalid' "),
        (("model", "--endpoint=nöbody.invalid:1"), "--endpoint: host 'nöbody.invalid' is not "),
        (("top", "--once", "no body:1"), "HOST:PORT: host 'no body' has the character ' '"),
        (("top", "--once", "localhost:65536"), "HOST:PORT: 'localhost:65536' is not host:port"),
        (("up", "--simulate-target=step_ms=1", "--host=a..b"), "host: host 'a..b' has an empty"),
    ):
        ended = run(*words)
        assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1), ended
        assert ended.stderr.startswith(f"outrider: {message}")

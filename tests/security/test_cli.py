"""The command line: creates and uses keys and certificates, and exposes no secret."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from outrider.cli.access import AccessOptions
from outrider.cli.keys import keys as keys_command
from outrider.cli.stack import Stack, orchestrator_arguments
from outrider.cli.stack_options import StackOptions
from outrider.client.channel import Access, open_channel
from outrider.errors import ConfigError
from outrider.security.keys import KeyLimits, watched_keys
from tests.cli.processes import ROOT, command, environment
from tests.security.parts import Authority, orchestrated, replace, tiers

URL = "redis://ada:secret@redis.example:6379/0"


async def outrider(*arguments: str, **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    process = await asyncio.create_subprocess_exec(
        *command(*arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=environment() | variables,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """By the script that docs/how-to/secure.md names."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    folder = tmp_path / "pki"
    script = ROOT / "scripts" / "make_certs.sh"
    for _ in range(2):  # the second time renews what is there
        subprocess.run([script, folder, "my-host.example"], check=True, timeout=60)
    return folder


def tier_settings(pki: Path) -> dict[str, Any]:
    return {
        "tls_cert": str(pki / "tier.pem"),
        "tls_key": str(pki / "tier.key"),
        "tls_client_ca": str(pki / "ca.pem"),
    }


def orchestrator_settings(pki: Path) -> dict[str, Any]:
    return {
        "tls_cert": str(pki / "server.pem"),
        "tls_key": str(pki / "server.key"),
        "tier_tls_ca": str(pki / "ca.pem"),
        "tier_tls_cert": str(pki / "orchestrator.pem"),
        "tier_tls_key": str(pki / "orchestrator.key"),
        "tier_tls_name": "tier",
    }


def test_a_key_is_added_to_a_file_that_stays_readable(tmp_path: Path) -> None:
    """With or without a final newline. A key that would make the file invalid is refused."""
    path = tmp_path / "keys"

    def make(*words: str) -> Result:
        return CliRunner().invoke(keys_command, ["new", *words, f"--file={path}"])

    made = [make("ada", "--streams=8")]
    path.write_text(path.read_text().rstrip())
    made.append(make("ben"))
    ring = watched_keys(str(path)).current
    for done, name in zip(made, ("ada", "ben"), strict=True):
        found = ring.find(done.stdout.strip())
        assert found is not None
        assert found.name == name
    before = path.read_text()
    for words in (("b a",), ("ada", "--streams=9"), ("cleo", "--streams=1" + "0" * 15)):
        assert isinstance(make(*words).exception, ConfigError)
    assert path.read_text() == before
    path.write_text("no key\n")
    assert isinstance(make("dan").exception, ConfigError)
    assert path.read_text() == "no key\n"


@pytest.mark.slow
async def test_from_the_first_key_to_the_last_command(
    pki: Path, tmp_path: Path, redis_url: str
) -> None:
    """As docs/how-to/secure.md walks through it."""
    words = [
        "new",
        "ada",
        "--streams=8",
        "--tokens-per-minute=60000",
        "--min-priority=-5",
        "--sessions=9",
    ]
    made = CliRunner().invoke(keys_command, words)
    key, line = made.stdout.strip(), made.stderr
    assert made.exit_code == 0
    assert key not in line
    keys, key_file = tmp_path / "keys", tmp_path / "ada.key"
    replace(keys, line)
    replace(key_file, f"{key}\n")
    ring = watched_keys(str(keys)).current
    found = ring.find(key)
    assert found is not None
    assert (found.name, found.limits) == ("ada", KeyLimits(8, 60_000, sessions=9, min_priority=-5))
    tier = tier_settings(pki)
    async with (
        tiers(tier, tier) as servers,
        orchestrated(
            servers, redis_url, api_keys_file=str(keys), **orchestrator_settings(pki)
        ) as system,
    ):
        await _commands(
            f"--endpoint={system.endpoint}", f"--tls-ca={pki / 'ca.pem'}", key_file, key
        )


async def _commands(endpoint: str, ca: str, key_file: Path, key: str) -> None:
    generate = ("generate", "--token-ids=1,2,3", "--max-tokens=6", "--session=s", "--json")
    by_file = f"--api-key-file={key_file}"
    code, out, _ = await outrider(*generate, endpoint, ca, by_file)
    assert (code, len(json.loads(out)["token_ids"])) == (0, 6)
    session, model, no_key = await asyncio.gather(
        outrider("session", "get", "s", "--json", endpoint, ca, by_file),
        outrider("model", "--json", endpoint, ca, OUTRIDER_API_KEY=key),
        outrider("model", endpoint, ca),
    )
    assert json.loads(session[1])["num_turns"] == 1
    assert json.loads(model[1])["target"]["vocab_size"] == 1_000
    assert (no_key[0], "UNAUTHENTICATED" in no_key[2]) == (1, True)


@pytest.mark.slow
async def test_a_failed_connection_is_explained(pki: Path, tmp_path: Path, redis_url: str) -> None:
    """In terms of the command line's flags."""
    tier, stranger = tier_settings(pki), Authority(tmp_path / "stranger")
    async with (
        tiers(tier, tier) as servers,
        orchestrated(servers, redis_url, **orchestrator_settings(pki)) as system,
    ):
        to, ca = f"--endpoint={system.endpoint}", f"--tls-ca={pki / 'ca.pem'}"
        target = f"127.0.0.1:{system.target.port}"
        plain, wrong, nowhere, of_target = await asyncio.gather(
            outrider("model", to),
            outrider("model", to, f"--tls-ca={stranger.ca}"),
            outrider("model", "--endpoint=[::zz]:1", ca),
            outrider("bench", "serve", to, ca, f"--target-endpoint={target}", f"--out={tmp_path}"),
        )
    assert f"{system.endpoint} does not answer without TLS: give --tls-ca" in plain[2]
    assert f"no TLS with {system.endpoint}: its certificate is not signed by" in wrong[2]
    assert "nothing answers at [::zz]:1: no host is called" in nowhere[2]
    assert f"--target-endpoint: UNAVAILABLE: {target} does not answer without TLS" in of_target[2]
    for said in (plain, wrong, nowhere, of_target):
        assert len(said[2].splitlines()) == 1, "no text of gRPC"
    assert [said[0] for said in (plain, wrong, nowhere, of_target)] == [1, 1, 1, 2]


def test_unusable_files_are_named_by_their_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"--api-key-file: .*none"):
        assert AccessOptions(api_key_file=str(tmp_path / "none")).access
    empty = tmp_path / "empty"
    empty.write_text(" \n")
    with pytest.raises(ConfigError, match=r"--api-key-file: .*is empty"):
        assert AccessOptions(api_key_file=str(empty)).access
    empty.write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match=r"--api-key-file: not a key"):
        assert AccessOptions(api_key_file=str(empty)).access
    monkeypatch.setenv("OUTRIDER_API_KEY", "schlüssel")
    with pytest.raises(ConfigError, match=r"OUTRIDER_API_KEY: not a key"):
        assert AccessOptions().access
    for access, named in (
        (Access(tls_ca=str(empty)), "--tls-ca"),
        (Access(tls_cert="a.pem", tls_key="a.key"), "need --tls-ca"),
        (Access(tls_ca=str(empty), tls_key="a.key"), "--tls-cert"),
    ):
        with pytest.raises(ConfigError, match=named):
            open_channel("127.0.0.1:1", access)


async def test_no_password_on_the_command_line_of_a_child_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`outrider up` passes a URL with a password in the environment, or refuses the flag."""
    options = StackOptions(redis_url=URL, port=0)
    arguments = orchestrator_arguments(options, "127.0.0.1:1", None, URL)
    assert not any("secret" in argument for argument in arguments)
    monkeypatch.delenv("REDIS_URL", raising=False)
    with pytest.raises(ConfigError, match="REDIS_URL") as caught:
        await Stack(options, lambda event: None).start()
    assert "secret" not in str(caught.value)

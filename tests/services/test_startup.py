"""Programs that cannot start print one line and exit with status 2; others stop cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.redis.embedded import RedisServer
from outrider.runtime.main import LISTENING_PREFIX
from tests.services.parts import Pair, both_tiers
from tests.services.programs import END_TIMEOUT_S, ended, program
from tests.services.tokenizer_files import write_tokenizer

pytestmark = pytest.mark.slow

PATIENT = "tests.services.patient_orchestrator"


async def refused(*words: str, **environ: str) -> str:
    """The only line of output of a program that does not start."""
    async with program(*words, **environ) as process:
        end = await ended(process)
    assert end.status == 2, end
    assert end.stdout == "", "it must not print that it listens"
    assert len(end.said) == 1, end.stderr
    return end.said[0]


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


async def test_invalid_settings() -> None:
    """The flag or variable is named; no model is read."""
    for words, environ, message in (
        (("orchestrator", "--gama", "3"), {}, "--gama"),
        (("orchestrator", "--gamma", "three"), {}, "gamma"),
        (("orchestrator", "--gamma", "17"), {}, "gamma"),
        (("orchestrator",), {"OUTRIDER_ORCHESTRATOR_PORT": "x"}, "OUTRIDER_ORCHESTRATOR_PORT"),
        (("orchestrator",), {"OUTRIDER_ORCHESTRATOR_GAMA": "1"}, "OUTRIDER_ORCHESTRATOR_GAMA"),
        (("orchestrator", "--log-level", "loud"), {}, "log_level"),
        (("orchestrator", "--redis-url", "http://x"), {}, "redis"),
    ):
        line = await refused(*words, **environ)
        assert line.startswith("orchestrator: "), line
        assert message in line.lower() or message in line, line


async def test_invalid_settings_of_the_tiers(tmp_path: Path) -> None:
    """Reported before torch is imported; importing it would fail here."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')\n")
    for words, environ, message in (
        (("target_service",), {}, "target: model"),
        (("target_service", "--model", "x", "--port", "65536"), {}, "target: port"),
        (("draft_service", "--modle", "x"), {}, "--modle"),
        (("draft_service",), {"OUTRIDER_DRAFT_PREPACK": "maybe"}, "OUTRIDER_DRAFT_PREPACK"),
    ):
        line = await refused(*words, PYTHONPATH=str(tmp_path), **environ)
        assert message in line


@pytest.mark.parametrize("way", ["absent", "broken weights"])
async def test_models_that_cannot_be_loaded(way: str, pair: Pair, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    if way == "broken weights":
        shutil.copytree(pair.target, directory)
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    line = await refused("target_service", "--model", str(directory), "--port", "0")
    beginning = f"'{directory}' is neither" if way == "absent" else f"{directory}: "
    assert line.startswith(f"target: {beginning}"), line


async def test_a_port_in_use(pair: Pair, taken_port: str, redis_url: str) -> None:
    lines = await asyncio.gather(
        refused("target_service", "--model", str(pair.target), "--port", taken_port),
        refused("orchestrator", "--redis-url", redis_url, "--port", taken_port),
    )
    for line in lines:
        assert taken_port in line
        assert "in use" in line


async def test_tokenizers_that_differ(chat_pair: Pair, tmp_path: Path, redis_url: str) -> None:
    """The orchestrator's tokenizer is rejected with both fingerprints; drafts: test_pairing."""
    other = tmp_path / "other"
    other.mkdir()
    write_tokenizer(other, corpus="zebras quiz quotes")
    async with both_tiers(chat_pair, draft_kv=None) as tiers:
        words = (PATIENT, "--port", "0", "--redis-url", redis_url, "--redis-wait-s", "60")
        words += ("--target-endpoint", tiers.endpoints[0], "--draft-endpoint", "")
        line = await refused(*words, "--tokenizer", str(other))
        assert "token ids differ" in line
        assert len(set(re.findall(r"\b[0-9a-f]{12}\b", line))) == 2, "both fingerprints"
        assert "no tokenizer.json" in await refused(*words, "--tokenizer", str(tmp_path))


async def test_no_redis(pair: Pair) -> None:
    """Not necessarily an invalid setting, but also one line without a traceback."""
    async with both_tiers(pair, draft_kv=None) as tiers:
        words = ("orchestrator", "--port", "0", "--redis-url", "redis://127.0.0.1:1/0")
        words += ("--target-endpoint", tiers.endpoints[0], "--draft-endpoint", "")
        async with program(*words) as process:
            end = await ended(process)
    assert end.status not in (0, None)
    assert len(end.said) == 1, end.stderr
    assert "redis" in end.said[0]


async def test_redis_that_starts_later(pair: Pair) -> None:
    """The program waits for it. SIGTERM ends it meanwhile, even as a container's first process."""
    with RedisServer() as redis:
        redis.stop()
        async with contextlib.AsyncExitStack() as stack:
            tiers = await stack.enter_async_context(both_tiers(pair, draft_kv=None))
            words = ("orchestrator", "--port", "0", "--redis-url", redis.url)
            words += ("--redis-wait-s", "600")
            words += ("--target-endpoint", tiers.endpoints[0], "--draft-endpoint", "")
            served, stopped = [await stack.enter_async_context(program(*words)) for _ in range(2)]
            for process in (served, stopped):
                assert process.stderr is not None
                async with asyncio.timeout(END_TIMEOUT_S):
                    while b"waiting_for_redis" not in await process.stderr.readline():
                        pass
            stopped.send_signal(signal.SIGTERM)
            end = await ended(stopped)
            assert (end.status, end.said, end.stdout) == (128 + signal.SIGTERM, [], "")
            redis.start()
            await _port(served)


async def test_programs_stop_cleanly(pair: Pair, redis_url: str) -> None:
    """SIGTERM: status 0, only logs on standard error."""
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(
            program("target_service", "--model", str(pair.target), "--port", "0",
                    "--kv-cache-tokens", "1024")
        )  # fmt: skip
        port = await _port(target)
        orchestrator = await stack.enter_async_context(
            program("orchestrator", "--port", "0", "--redis-url", redis_url,
                    "--redis-wait-s", "60",
                    "--target-endpoint", f"127.0.0.1:{port}", "--draft-endpoint", "")
        )  # fmt: skip
        await _port(orchestrator)
        for process in (orchestrator, target):
            process.send_signal(signal.SIGTERM)
            end = await ended(process)
            assert (end.status, end.said) == (0, []), end


async def _port(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(END_TIMEOUT_S):
        line = (await process.stdout.readline()).decode()
    assert line.startswith(LISTENING_PREFIX), line
    return line.strip().rpartition(":")[2]

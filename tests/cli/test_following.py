"""`outrider generate` interrupted by its user or by the end of its orchestrator.

With several orchestrators the output continues at the next one. Tests that kill an orchestrator
run it as a process; in the others everything is in this process. The first orchestrator's link to
the target is slow, so that it fails in the middle of the output.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import shlex
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

import orchestrator.app
import outrider.client.resume
import target_service.app
from outrider.cli.relay import Relay
from outrider.cli.request import GenerateOptions, Method, build_request, endpoints_of
from outrider.cli.supervisor import Program
from outrider.client import AsyncClient, Generation
from outrider.errors import CallFailed, ConfigError, ResumeFailed
from outrider.redis.embedded import RedisServer
from outrider.settings.services import OrchestratorConfig, TargetConfig
from tests import redis_fixture
from tests.cli.processes import ROOT, TIMEOUT_S, command, environment
from tests.stack import eventually

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(400)]
redis_server = redis_fixture.redis_server

# Delay of the slow link in each direction: an output takes at least 24 seconds.
DELAY_S = 0.05
NUM_TOKENS = 240
UNUSED = "127.0.0.1:1"
ASKED = GenerateOptions(
    prompt="the quick", max_tokens=NUM_TOKENS, seed=5, verification=Method.coupled,
    ignore_eos=True, gamma=0,
)  # fmt: skip
WITH_LOGPROBS = dataclasses.replace(ASKED, logprobs=2)
FLAGS = ("the quick", f"--max-tokens={NUM_TOKENS}", "--seed=5", "--verification=coupled",
         "--ignore-eos", "--gamma=0")  # fmt: skip


@dataclass
class Place:
    """Arguments for orchestrators, and the address of one that stays up."""

    target: str
    tokenizer: Path
    redis_url: str
    log_dir: Path
    steady: str = ""
    whole: Generation = field(init=False)

    @contextlib.asynccontextmanager
    async def slow_target(self) -> AsyncIterator[str]:
        async with Relay("127.0.0.1", 0, *address(self.target), DELAY_S) as relay:
            yield relay.address

    @contextlib.asynccontextmanager
    async def serving(self, target: str) -> AsyncIterator[str]:
        """An orchestrator in this process that stops without a grace period."""
        config = OrchestratorConfig(
            target_endpoint=target,
            redis_url=self.redis_url,
            tokenizer=str(self.tokenizer),
            port=0,
            stop_grace_s=0.0,
        )
        async with orchestrator.app.serving(config) as server:
            yield f"127.0.0.1:{server.port}"

    async def start(self, target: str) -> tuple[str, Program]:
        """An orchestrator in a process of its own."""
        arguments = ["orchestrator", f"--target-endpoint={target}", f"--redis-url={self.redis_url}"]
        arguments += ["--port=0", f"--tokenizer={self.tokenizer}"]
        program = await Program.start("orchestrator", arguments, self.log_dir)
        return await program.listening(), program


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def place(
    target: Path, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Place]:
    config = TargetConfig(model=str(target), port=0, kv_cache_tokens=4_096, calibration_s=0.0)
    async with target_service.app.serving(config) as server:
        log_dir = tmp_path_factory.mktemp("following")
        place = Place(f"127.0.0.1:{server.port}", target, redis_server.url, log_dir)
        async with place.serving(place.target) as place.steady, AsyncClient(place.steady) as client:
            place.whole = await client.stream(build_request(ASKED)).result()
            yield place


@dataclass
class Following:
    """A follower in this process. `started` is set at its first text."""

    text: str = ""
    messages: list[str] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(
        self,
        endpoints: Sequence[str],
        session_id: str,
        *,
        resume_for_s: float = 60.0,
        asked: GenerateOptions = ASKED,
    ) -> Generation:
        request = build_request(asked)
        request.session_id, request.create_session = session_id, True
        async with AsyncClient(
            endpoints, resume_for_s=resume_for_s, report=self.messages.append
        ) as client:
            stream = client.stream(request)
            async for chunk in stream:
                self.text += chunk.text
                self.started.set()
            return await stream.result()


def check(output: Generation, following: Following, place: Place) -> None:
    """The output equals that of an uninterrupted generation."""
    assert len(output.logprobs) in (0, NUM_TOKENS)
    assert output.token_ids == place.whole.token_ids
    assert output.text == following.text == place.whole.text
    assert output.usage.completion_tokens == NUM_TOKENS
    broken, resumed = following.messages
    assert re.match(r"the stream broke after \d+ tokens: UNAVAILABLE: ", broken)
    assert resumed == f"resumed at {place.steady}"


async def test_orchestrator_killed(place: Place) -> None:
    """Standard output has the text alone; the temporary session is deleted."""
    num_before = num_sessions(place)
    async with place.slow_target() as slow:
        endpoint, program = await place.start(slow)
        process, started = await begin(f"{endpoint},{place.steady}")
        program.kill()
        ended = await end(process, started)
    assert ended.status == 0, ended.stderr
    assert ended.text == place.whole.text
    assert "outrider: the stream broke after " in ended.stderr
    assert f"outrider: resumed at {place.steady}\n" in ended.stderr
    assert f"{NUM_TOKENS} after a prompt of" in ended.stderr
    assert num_sessions(place) == num_before


async def test_orchestrator_frozen(place: Place) -> None:
    """The connection stays open, but nothing arrives, not even heartbeats."""
    async with (
        place.slow_target() as slow,
        place.serving(slow) as first,
        Relay("127.0.0.1", 0, *address(first), 0.0) as relay,
    ):
        following = Following()
        running = asyncio.create_task(following.run([relay.address, place.steady], "frozen"))
        await following.started.wait()
        relay.hold()
        check(await running, following, place)


async def test_orchestrator_stopped(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends its outputs after their rounds: the last text may be an incomplete character."""
    monkeypatch.setattr(orchestrator.app, "STOP_GRACE_S", 60.0)  # no stream is broken before
    following = Following()
    async with place.slow_target() as slow:
        async with place.serving(slow) as first:
            running = asyncio.create_task(following.run([first, place.steady], "stopped"))
            await following.started.wait()
        check(await running, following, place)


async def test_orchestrator_stopped_with_logprobs(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities of the first orchestrator are kept; the second continues after them."""
    monkeypatch.setattr(orchestrator.app, "STOP_GRACE_S", 60.0)  # no stream is broken before
    following = Following()
    async with AsyncClient(place.steady) as client:
        whole = await client.stream(build_request(WITH_LOGPROBS)).result()
    async with place.slow_target() as slow:
        async with place.serving(slow) as first:
            running = asyncio.create_task(
                following.run([first, place.steady], "stopped-l", asked=WITH_LOGPROBS)
            )
            await following.started.wait()
        output = await running
    check(output, following, place)
    for had, should in zip(output.logprobs, whole.logprobs, strict=True):
        assert had.logprob == pytest.approx(should.logprob, abs=1e-3)
        assert had.top_ids == should.top_ids


async def test_orchestrator_killed_with_logprobs(place: Place) -> None:
    """Tokens recorded but not received have no log-probabilities: the error shows the session."""
    async with (
        place.slow_target() as slow,
        place.serving(slow) as first,
        Relay("127.0.0.1", 0, *address(first), 0.0) as relay,
        AsyncClient(place.steady) as client,
    ):
        endpoints = f"{relay.address},{place.steady}"
        process, started = await begin(endpoints, "--session=killed-l", "--logprobs=2")
        relay.hold()  # the next tokens are recorded and not received
        num_held = len((await client.get_session("killed-l")).token_ids)

        async def has_more() -> bool:
            return len((await client.get_session("killed-l")).token_ids) >= num_held + 2

        await eventually(has_more)
        relay.refuses = True
        relay.reset()
        ended = await end(process, started)
        assert ended.status == 1
        assert "log-probabilities of tokens" in ended.stderr
        assert "outrider session get killed-l" in ended.stderr
        assert (await client.get_session("killed-l")).token_ids


def hide(place: Place, name: str) -> None:
    """Hides the session from all orchestrators, as while Redis fails over."""
    words = ("RENAME", f"outrider:session:{{{name}}}", f"hidden:{{{name}}}")
    assert redis_fixture.redis_command(place.redis_url, *words) == b"+OK"


def unhide(place: Place, name: str) -> None:
    words = ("RENAME", f"hidden:{{{name}}}", f"outrider:session:{{{name}}}")
    assert redis_fixture.redis_command(place.redis_url, *words) == b"+OK"


async def test_session_missing_for_a_while(place: Place) -> None:
    """The follower retries: after a failover Redis may not have the session yet."""
    following = Following()
    async with (
        place.slow_target() as slow,
        place.serving(slow) as first,
        Relay("127.0.0.1", 0, *address(first), 0.0) as relay,
    ):
        running = asyncio.create_task(following.run([relay.address, place.steady], "unknown"))
        await following.started.wait()
        relay.refuses = True
        relay.reset()
        hide(place, "unknown")

        async def is_reported() -> bool:
            return any("NOT_FOUND" in message for message in following.messages)

        await eventually(is_reported)
        unhide(place, "unknown")
        output = await running
    assert output.token_ids == place.whole.token_ids
    assert output.text == following.text == place.whole.text
    assert sum("NOT_FOUND" in message for message in following.messages) == 1, "once"


async def test_session_missing_for_good(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The follower gives up before `resume_for_s`; the error has what resuming needs."""
    monkeypatch.setattr(outrider.client.resume, "UNKNOWN_SESSION_TIMEOUT_S", 0.5)
    following = Following()
    async with (
        place.slow_target() as slow,
        place.serving(slow) as first,
        Relay("127.0.0.1", 0, *address(first), 0.0) as relay,
    ):
        running = asyncio.create_task(
            following.run([relay.address, place.steady], "lost", resume_for_s=600.0)
        )
        await following.started.wait()
        relay.refuses = True
        relay.reset()
        hide(place, "lost")
        with pytest.raises(ResumeFailed, match=r"^NOT_FOUND: ") as caught:
            await asyncio.wait_for(running, TIMEOUT_S)
        assert caught.value.session_id == "lost"
        assert caught.value.can_resume
        assert 0 < caught.value.num_received < NUM_TOKENS
        assert f"{caught.value.num_received} tokens were received" in str(caught.value)


async def test_second_turn_interrupted_before_its_first_token(place: Place) -> None:
    """The turn is not sent twice, and the first turn is not repeated."""
    async with AsyncClient(place.steady) as client:
        request = build_request(ASKED)
        request.session_id, request.create_session, request.sampling.max_tokens = "two", True, 3
        await client.stream(request).result()
        async with (
            Relay("127.0.0.1", 0, *address(place.target), 0.0) as to_target,
            place.serving(to_target.address) as first,
            Relay("127.0.0.1", 0, *address(first), 0.0) as relay,
        ):
            to_target.hold()
            endpoints = [relay.address, place.steady]
            running = asyncio.create_task(Following().run(endpoints, "two"))

            async def is_in_use() -> bool:
                return (await client.get_session("two")).in_use

            await eventually(is_in_use)
            relay.refuses = True
            relay.reset()
            output = await running
        assert len(output.token_ids) == NUM_TOKENS
        assert (await client.get_session("two")).num_turns == 2


async def test_failure_prints_the_command_that_resumes(place: Place) -> None:
    async with (
        place.slow_target() as slow,
        place.serving(slow) as first,
        Relay("127.0.0.1", 0, *address(first), 0.0) as relay,
    ):
        endpoints = f"{relay.address},{UNUSED}"
        process, started = await begin(endpoints, "--resume-for=1")
        relay.refuses = True
        relay.reset()
        ended = await end(process, started)
    assert ended.status == 1
    assert "no orchestrator resumed the stream within" in ended.stderr
    by_hand = shlex.split(ended.stderr.rpartition("Resume with: ")[2])
    assert by_hand[:3] == ["outrider", "generate", f"--endpoint={endpoints}"]
    rest = await end(await start(*by_hand[1:], f"--endpoint={place.steady}"))
    assert rest.status == 0, rest.stderr
    assert ended.text + rest.text == place.whole.text


async def test_ctrl_c(place: Place) -> None:
    """Exit status 130; the request is cancelled, and the session is free again."""
    async with (
        place.slow_target() as slow,
        place.serving(slow) as only,
        AsyncClient(only) as client,
    ):
        process, started = await begin(only, "--session=c")
        process.send_signal(signal.SIGINT)
        assert (await end(process, started)).status == 130

        async def is_free() -> bool:
            return not (await client.get_session("c")).in_use

        await eventually(is_free)
        assert (await client.get_session("c")).num_emitted_tokens < NUM_TOKENS


async def test_first_endpoint_unreachable(place: Place) -> None:
    """The next one is tried at once."""
    following = Following()
    output = await following.run([UNUSED, place.steady], "away")
    assert output.token_ids == place.whole.token_ids
    (message,) = following.messages
    assert f"nothing answers at {UNUSED}" in message


async def test_request_cancelled_by_a_stopping_server(place: Place) -> None:
    """gRPC's core ends a request with CANCELLED that arrives as the server stops."""

    async def cancel(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")

    async def not_found(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no such session")

    stopping = grpc.aio.server()
    handlers = {
        "Generate": grpc.unary_stream_rpc_method_handler(cancel),
        "GetSession": grpc.unary_unary_rpc_method_handler(not_found),
    }
    stopping.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("outrider.v1.OrchestratorService", handlers),)
    )
    port = stopping.add_insecure_port("127.0.0.1:0")
    await stopping.start()
    following = Following()
    try:
        output = await following.run([f"127.0.0.1:{port}", place.steady], "stopping")
    finally:
        await stopping.stop(0)
    assert output.token_ids == place.whole.token_ids
    assert any("is stopping" in message for message in following.messages)


async def test_all_endpoints_unreachable() -> None:
    """Each is tried once, without waiting."""
    with pytest.raises(CallFailed, match=r"^UNAVAILABLE: nothing answers at") as caught:
        await Following().run([UNUSED, "127.0.0.1:2"], "nobody")
    assert not isinstance(caught.value, ResumeFailed)


async def test_invalid_request_is_not_retried(place: Place) -> None:
    following = Following()
    with pytest.raises(CallFailed, match=r"^INVALID_ARGUMENT: session_id: "):
        await following.run([place.steady, place.steady], "x" * 200)
    assert following.messages == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GenerateOptions(prompt="x", session="s", resume_from=1), "not with PROMPT"),
        (GenerateOptions(token_ids="1", session="s", resume_from=1), "not with --token-ids"),
        (GenerateOptions(session="s", resume_from=1, chat=True), "not with --chat"),
        (GenerateOptions(resume_from=1), "needs --session"),
    ],
)
async def test_resume_from_excludes_a_prompt(options: GenerateOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--resume-from: {message}"):
        build_request(options)


async def test_lists_of_endpoints() -> None:
    assert endpoints_of("a:1, b:1") == ["a:1", "b:1"]
    with pytest.raises(ConfigError, match=r"^--endpoint: 'a:1,,b:1'"):
        endpoints_of("a:1,,b:1")
    with pytest.raises(ConfigError, match=r"^endpoint: the list is empty"):
        AsyncClient([])


@dataclass
class Ended:
    """A command's exit status, standard output and standard error."""

    status: int | None
    text: str
    stderr: str


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command(*arguments), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, cwd=ROOT, env=environment(),
    )  # fmt: skip


async def begin(endpoints: str, *more: str) -> tuple[asyncio.subprocess.Process, bytes]:
    """A command that has written its first byte."""
    process = await start("generate", *FLAGS, "--endpoint", endpoints, *more)
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT_S):
        return process, await process.stdout.read(1)


async def end(process: asyncio.subprocess.Process, started: bytes = b"") -> Ended:
    async with asyncio.timeout(TIMEOUT_S):
        out, err = await process.communicate()
    return Ended(process.returncode, (started + out).decode(), err.decode())


def num_sessions(place: Place) -> int:
    keys = redis_fixture.redis_command(place.redis_url, "KEYS", "outrider:session:client-*")
    return int(keys.partition(b"\r\n")[0].removeprefix(b"*"))


def address(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host, int(port)

"""The attacks of `outrider bench attacks`. Each runs against a separate system."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from outrider.cli.relay import Relay
from outrider.redis.embedded import RedisServer
from outrider_bench.measuring.cores import CoreUse, core_per_tier

if TYPE_CHECKING:
    from outrider.v1 import orchestrator_pb2
    from outrider_bench.chaos.system import System
    from outrider_bench.commands.attacks import AttackOptions

_NUM_LONG_CLIENTS = 8
# Pause between two requests of a client; without it the clients would use all cores.
_LONG_GAP_S = 0.25
# Upper limit on the characters of a request; the model's context allows far fewer.
_MAX_CHARS = 4_000_000
_NUM_CONNECTIONS = 20
# Flow-control windows that a few messages fill.
_SMALL_WINDOWS = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
_CALL_TIMEOUT_S = 120.0
# Longer than the write time-out of the orchestrator.
_UNREAD_S = 60.0
# Time that a sentinel needs to detect a failed primary and to promote a replica.
_ELECTION_S = 5.0
_REPLICATES_S = 60.0

# Time from the start of the target until its passes fail: long enough to start.
_FAILS_AFTER_S = 3.0

Statuses = Counter[str]


@dataclass(frozen=True)
class Attack:
    """One attack. `run` lasts about `options.seconds`; it returns the responses by status.

    Resources that must outlive `run` go to its last argument, an exit stack.
    """

    name: str
    run: Callable[[AttackOptions, System, AsyncExitStack], Awaitable[Statuses]]
    num_targets: int = 1
    # Needs a tokenizer: runs the quickstart pair instead of simulated tiers.
    has_text: bool = False
    # Minimum duration in seconds; ignored with --quick.
    least_s: float = 0.0


@contextlib.asynccontextmanager
async def attacked_system(options: AttackOptions, attack: Attack) -> AsyncIterator[System]:
    """Starts a system for the attack and stops all its processes at the end."""
    from outrider_bench.chaos.system import Size, System

    changes: dict[str, Any] = {"inflate": "0"} if attack.has_text else {}
    if attack.has_text:
        options = replace(options, simulate_target=None, simulate_draft=None)
    stack = options.stack_options(core_per_tier(CoreUse.shared), target_threads=1, **changes)
    size = Size(num_replicas=attack.num_targets, num_orchestrators=1)
    log_dir = options.out / "logs" / attack.name
    async with System(stack, size, log_dir, lambda reason: None) as system:
        yield system


def generate_request(num_tokens: int, seed: int, **fields: Any) -> orchestrator_pb2.GenerateRequest:
    """GenerateRequest whose token ids are in every vocabulary, unless `fields` have a prompt."""
    from outrider.v1 import orchestrator_pb2

    request = orchestrator_pb2.GenerateRequest(**fields)
    if not fields.keys() & {"text", "chat"}:
        request.token_ids.ids[:] = [3 + (seed + i) * 7919 % 200 for i in range(16)]
    request.sampling.max_tokens = num_tokens
    request.sampling.ignore_eos = True
    return request


async def first_token(stub: Any, request: orchestrator_pb2.GenerateRequest) -> tuple[str, float]:
    """Status of a `Generate` call, and seconds until its first token or its failure."""
    import grpc

    sent_at = time.monotonic()
    call: Any = stub.Generate(request, timeout=_CALL_TIMEOUT_S)
    first_s = None
    try:
        async for _ in call:
            first_s = first_s or time.monotonic() - sent_at
        status = "OK"
    except grpc.aio.AioRpcError as error:
        status = error.code().name
    finally:
        call.cancel()
    return status, first_s or time.monotonic() - sent_at


async def _long_prompts(options: AttackOptions, system: System, until: AsyncExitStack) -> Statuses:
    """Half of the clients send prompts that are too long, the others the longest allowed."""
    statuses: Statuses = Counter()
    async with _connected(system, 1) as (stub,):
        allowed = await _max_allowed_chars(stub)
        ends_at = time.monotonic() + options.seconds

        async def client(number: int) -> None:
            text = "the cats " * ((_MAX_CHARS if number % 2 else allowed) // 9)
            while time.monotonic() < ends_at:
                status, _ = await first_token(stub, generate_request(1, number, text=text))
                statuses[status] += 1
                await asyncio.sleep(_LONG_GAP_S)

        async with asyncio.TaskGroup() as tasks:
            for number in range(_NUM_LONG_CLIENTS):
                tasks.create_task(client(number))
    return statuses


async def _max_allowed_chars(stub: Any) -> int:
    """Maximum prompt length, taken from the error message for a prompt that is too long."""
    import grpc

    try:
        await anext(aiter(stub.Generate(generate_request(1, 0, text="x" * _MAX_CHARS), timeout=60)))
    except grpc.aio.AioRpcError as error:
        return int((error.details() or "").partition("at most ")[2].split()[0])
    return _MAX_CHARS


async def _unread(options: AttackOptions, system: System, until: AsyncExitStack) -> Statuses:
    """Streams whose client reads one message and no more."""
    statuses: Statuses = Counter()
    async with _connected(system, _NUM_CONNECTIONS, _SMALL_WINDOWS) as stubs:
        calls = [
            stubs[number % len(stubs)].Generate(
                generate_request(50_000, number), timeout=options.seconds + _CALL_TIMEOUT_S
            )
            for number in range(options.clients)
        ]
        reads = [asyncio.ensure_future(call.read()) for call in calls]
        await asyncio.sleep(options.seconds)
        for call in calls:
            # The status of an ended stream is queued behind its unread messages.
            statuses[(await call.code()).name if call.done() else "unread"] += 1
            call.cancel()
        await asyncio.gather(*reads, return_exceptions=True)
    return statuses


async def _burst(options: AttackOptions, system: System, until: AsyncExitStack) -> Statuses:
    """All clients send one request at the same time and read the response."""
    began = time.monotonic()
    async with _connected(system, _NUM_CONNECTIONS) as stubs:
        ended = await asyncio.gather(
            *(
                first_token(stubs[number % len(stubs)], generate_request(16, number))
                for number in range(options.clients)
            )
        )
    await asyncio.sleep(max(0.0, began + options.seconds - time.monotonic()))
    return Counter(status for status, _ in ended)


async def _failing(options: AttackOptions, system: System, until: AsyncExitStack) -> Statuses:
    """Replaces one of two targets by a target whose every pass fails."""
    from outrider.cli.stack import simulated_arguments
    from outrider_bench.chaos.faults import Tier
    from outrider_bench.chaos.nodes import Node
    from outrider_bench.chaos.system import Place

    statuses: Statuses = Counter()
    stack = options.stack_options(core_per_tier(CoreUse.shared))
    simulation = f"{options.simulate_target},fails_after_s={_FAILS_AFTER_S}"
    links = system.links_to(Place(Tier.TARGET, 0))

    def died(reason: str) -> None:
        statuses["died"] += 1

    node = Node(
        "failing-target",
        [*simulated_arguments(stack, "target_service", simulation), "--calibration-s=0.2"],
        options.out / "logs" / "failing",
        links,
        died,
    )
    until.push_async_callback(node.close)
    ends_at = time.monotonic() + options.seconds
    await node.start()
    for link in links:
        link.reset()
    await asyncio.sleep(ends_at - time.monotonic())
    return statuses


async def _fail_over(options: AttackOptions, system: System, until: AsyncExitStack) -> Statuses:
    """Kills Redis; a replica with all its data is promoted and takes over its address."""
    from outrider_bench.chaos.faults import Tier
    from outrider_bench.chaos.system import Place

    ends_at = time.monotonic() + options.seconds
    to_primary = await until.enter_async_context(
        Relay("127.0.0.1", 0, _socket(system.redis), 0, 0.0)
    )
    replica = RedisServer()
    until.callback(replica.stop)
    replica.launch()
    await asyncio.to_thread(replica.wait_until_up)  # the loop times the healthy stream
    # By default the primary waits 5 s for more replicas.
    _redis(system.redis, "CONFIG", "SET", "repl-diskless-sync-delay", "0")
    _redis(replica, "REPLICAOF", "127.0.0.1", str(to_primary.port))
    async with asyncio.timeout(_REPLICATES_S):
        while "master_link_status:up" not in _redis(replica, "INFO", "replication"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    system.redis.kill()
    await asyncio.sleep(min(_ELECTION_S, options.seconds / 2))
    _redis(replica, "REPLICAOF", "NO", "ONE")
    for link in system.links_to(Place(Tier.REDIS, 0)):
        link.retarget(_socket(replica), 0)
    await asyncio.sleep(ends_at - time.monotonic())
    return Counter()


ATTACKS = {
    attack.name: attack
    for attack in (
        Attack("long-prompts", _long_prompts, has_text=True),
        Attack("unread", _unread, least_s=_UNREAD_S),
        Attack("burst", _burst),
        Attack("failing", _failing, num_targets=2),
        Attack("fail-over", _fail_over),
    )
}


def _socket(redis: RedisServer) -> str:
    return redis.url.removeprefix("unix://")


def _redis(redis: RedisServer, *arguments: str) -> str:
    """Runs a Redis command and returns the raw reply. Blocks briefly."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_REPLICATES_S)
        client.connect(_socket(redis))
        client.sendall(" ".join(arguments).encode() + b"\r\n")
        return client.recv(65_536).decode()


@contextlib.asynccontextmanager
async def _connected(
    system: System, num: int, options: Sequence[tuple[str, int]] = ()
) -> AsyncIterator[list[Any]]:
    """`num` stubs, each with a separate connection."""
    import grpc

    from outrider.v1 import orchestrator_pb2_grpc

    async with contextlib.AsyncExitStack() as channels:
        stubs = []
        for number in range(num):
            # Channels with equal options would share a connection.
            own = [*options, ("outrider.connection", number)]
            channel = grpc.aio.insecure_channel(system.endpoints[0], options=own)
            await channels.enter_async_context(channel)
            stubs.append(orchestrator_pb2_grpc.OrchestratorServiceStub(channel))
        yield stubs

"""Measures the HTTP transport: CPU time per chunk beside gRPC, many streams, many aborts.

    .venv/bin/python scripts/measure_http.py                 minutes; prints JSON lines
    .venv/bin/python scripts/measure_http.py --quick         seconds; a smoke test

Starts a simulated target and an orchestrator without drafts: each round is one chunk of one token.
CPU time is the orchestrator's own, from the system, so the clients' share is not part of it. HTTP
and gRPC alternate; the figures are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from outrider.cli.stack import Stack
from outrider.cli.stack_options import StackOptions
from outrider.client import AsyncClient
from outrider.v1 import target_pb2, target_pb2_grpc

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PROMPT = [1, 2, 3, 4]
Streams = Callable[[int, int], Awaitable[int]]


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS_PER_S


def metric(stack: Stack, name: str) -> float:
    """Sum of a metric's values at the orchestrator."""
    with urllib.request.urlopen(f"http://{stack.http}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


async def http_stream(endpoint: str, max_tokens: int, num_bytes: int | None = None) -> int:
    """Number of chunks of a stream; `num_bytes`: closes the connection after these."""
    host, _, port = endpoint.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = {"prompt": PROMPT, "max_tokens": max_tokens, "stream": True, "temperature": 0}
    content = json.dumps({**body, "ignore_eos": True, "durability": "fast"}).encode()
    head = f"host: x\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + content)
    try:
        if num_bytes is not None:
            await reader.read(num_bytes) if num_bytes else await asyncio.sleep(0)
            return 0
        received = await reader.read()
        assert b"[DONE]" in received
        return received.count(b"data: ") - 1
    finally:
        writer.transport.abort()


async def cost_per_chunk(
    stack: Stack, kind: str, streams: Streams, num: int, max_tokens: int
) -> dict[str, Any]:
    pid = stack.pid("orchestrator")
    before, began = cpu_s(pid), time.monotonic()
    num_chunks = await streams(num, max_tokens)
    used_s, took_s = cpu_s(pid) - before, time.monotonic() - began
    return {
        "transport": kind, "streams": num, "chunks": num_chunks,
        "cpu_ms_per_chunk": round(1e3 * used_s / num_chunks, 4), "took_s": round(took_s, 2),
    }  # fmt: skip


async def compare(stack: Stack, args: argparse.Namespace) -> None:
    async with AsyncClient(stack.endpoint) as client:

        async def grpc_stream(max_tokens: int) -> int:
            chunks = client.generate(
                PROMPT, max_tokens=max_tokens, temperature=0, ignore_eos=True, durability="fast"
            )
            return sum([1 async for _ in chunks])

        async def over_grpc(num: int, max_tokens: int) -> int:
            return sum(await asyncio.gather(*(grpc_stream(max_tokens) for _ in range(num))))

        async def over_http(num: int, max_tokens: int) -> int:
            endpoint = stack.http or ""
            return sum(
                await asyncio.gather(*(http_stream(endpoint, max_tokens) for _ in range(num)))
            )

        ways: dict[str, Streams] = {"grpc": over_grpc, "http": over_http}
        costs: dict[str, list[float]] = {name: [] for name in ways}
        for repetition in range(-1, args.repetitions):  # the first is a warm-up
            for name in ways if repetition % 2 else reversed(ways):
                found = await cost_per_chunk(stack, name, ways[name], args.streams, args.tokens)
                if repetition >= 0:
                    costs[name].append(found["cpu_ms_per_chunk"])
                    print(json.dumps(found), flush=True)
        medians = {name: statistics.median(values) for name, values in costs.items()}
        added = round(medians["http"] - medians["grpc"], 4)
        print(json.dumps({"medians_ms": medians, "http_adds_ms": added, "goal_ms": 0.3}))


async def many_streams(stack: Stack, args: argparse.Namespace) -> None:
    endpoint = stack.http or ""
    began = time.monotonic()
    calls = [asyncio.create_task(http_stream(endpoint, args.tokens)) for _ in range(args.many)]
    most = 0.0
    while not all(call.done() for call in calls):
        await asyncio.sleep(0.5)
        running = await asyncio.to_thread(metric, stack, "outrider_num_requests_running")
        most = max(most, running)
    chunks = [call.result() for call in calls]
    path = Path(f"/proc/{stack.pid('orchestrator')}/status")
    status = await asyncio.to_thread(path.read_text)
    rss = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({
        "concurrent_streams": args.many, "most_running_at_once": most,
        "chunks": sum(chunks), "fewest_chunks_of_a_stream": min(chunks),
        "took_s": round(time.monotonic() - began, 2), "peak_rss_mib": round(int(rss) / 1024),
    }), flush=True)  # fmt: skip


async def many_aborts(stack: Stack, args: argparse.Namespace) -> None:
    endpoint, rng, room = stack.http or "", random.Random(1), asyncio.Semaphore(64)

    async def one(num_bytes: int) -> None:
        async with room:
            await http_stream(endpoint, 10_000, num_bytes)

    counted = "outrider_requests_total"
    before, began = metric(stack, counted), time.monotonic()
    await asyncio.gather(*(one(rng.choice((0, 1, 1_000, 5_000))) for _ in range(args.aborts)))
    for _ in range(600):
        running = await asyncio.to_thread(metric, stack, "outrider_num_requests_running")
        if not running:
            break
        await asyncio.sleep(0.1)
    async with grpc.aio.insecure_channel(stack.addresses["target"]) as channel:
        stub = target_pb2_grpc.TargetServiceStub(channel)
        load = (await stub.GetModelInfo(target_pb2.TargetServiceGetModelInfoRequest())).load
    print(json.dumps({
        "aborts": args.aborts, "counted_requests": metric(stack, counted) - before,
        "running_afterwards": running,
        "waiting_afterwards": metric(stack, "outrider_num_requests_waiting"),
        "opened_at_target": load.num_opened_total, "closed_at_target": load.num_closed_total,
        "kv_used_tokens": load.kv_used_tokens,
        "took_s": round(time.monotonic() - began, 2),
    }), flush=True)  # fmt: skip


async def measure(args: argparse.Namespace) -> None:
    options = StackOptions(
        simulate_target=f"step_ms={args.step_ms},row_ms=0,vocab_size=1000", draft="none",
        port=0, http_port="0", kv_cache_tokens=4_000_000, max_generations=2_048, max_waiting=2_048,
        log_dir=Path("bench-results/logs"),
    )  # fmt: skip
    stack = Stack(options, lambda event: None)
    try:
        await stack.start()
        print(json.dumps({"machine": os.uname().machine, "cores": os.cpu_count(),
                          "python": sys.version.split()[0]}))  # fmt: skip
        await compare(stack, args)
        await many_streams(stack, args)
        await many_aborts(stack, args)
    finally:
        await stack.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--many", type=int, default=1_000)
    parser.add_argument("--aborts", type=int, default=10_000)
    parser.add_argument("--step-ms", type=float, default=25.0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.repetitions, args.many, args.aborts = 10, 1, 8, 20
    asyncio.run(measure(args))


if __name__ == "__main__":
    main()

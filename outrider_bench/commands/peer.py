"""Peers to compare with (Hugging Face `generate`), each in a child process.

Owns the child process, its cores and the line protocol. The peer itself is in
`outrider_bench.peers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.errors import ConfigError, InternalError
from outrider.runtime.child_process import tied_to_this_process
from outrider_bench.measuring.cores import CoreLayout

if TYPE_CHECKING:
    from outrider_bench.commands.speed import SpeedOptions, Way
    from outrider_bench.measuring.load import Sample
    from outrider_bench.measuring.system import System

_MODULE = "outrider_bench.peers.huggingface_baseline"
_DTYPES = ("float32", "bfloat16")
# Enough to load two models on a busy machine, or for one long output of the slowest variant.
_REPLY_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 10.0
_MAX_LINE_BYTES = 1 << 22


class PeerName(StrEnum):
    """Values of `--peer`."""

    huggingface = "huggingface"


@dataclass(frozen=True)
class PeerWay:
    """Arguments of `generate`. `schedule` None: the defaults of Hugging Face."""

    name: str
    variant: str
    num_assistant_tokens: int | None = None
    schedule: str | None = None


WAYS = (
    PeerWay("plain", "plain"),
    PeerWay("assisted 5", "assisted", 5, "constant"),
    PeerWay("assisted 10", "assisted", 10, "constant"),
    PeerWay("assisted heuristic", "assisted", 5, "heuristic"),
    PeerWay("assisted default", "assisted"),
)


class Peer:
    """Child process that answers each request line with one response line of JSON."""

    def __init__(self, process: asyncio.subprocess.Process, log_path: Path) -> None:
        self._process = process
        self._log_path = log_path

    async def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends a request and returns the response. Raises InternalError without a response."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # the child has ended: reading reports the error
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await self._process.stdin.drain()
        return await self.response()

    async def response(self) -> dict[str, Any]:
        """Reads the next line. The first line, sent unprompted, means that the models are loaded.

        Raises InternalError, with the end of the child's log, without a valid line.
        """
        assert self._process.stdout is not None
        line = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REPLY_TIMEOUT_S):
                line = await self._process.stdout.readline()
        try:
            response: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            log = self._log_path.read_text(errors="replace")[-2000:]
            raise InternalError(
                f"{_MODULE} sent no valid response: {line[:200]!r}\n{log}"
            ) from None
        if "error" in response:
            raise InternalError(f"{_MODULE}: {response['error']}")
        return response

    async def stop(self) -> None:
        """Stops the child by closing its input; kills it after a time-out."""
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_STOP_TIMEOUT_S):
                        await self._process.wait()
            finally:
                if self._process.returncode is None:
                    self._process.kill()
                    await self._process.wait()


def check_peer(options: SpeedOptions) -> None:
    """Validates the options for a peer before anything starts. Raises ConfigError."""
    if options.is_simulated or options.stack_options(CoreLayout()).inflate_parameters:
        raise ConfigError("--peer: needs --target and --draft with real models, and no --inflate")
    if options.dtype not in _DTYPES:
        raise ConfigError(f"--peer: needs --dtype {' or '.join(_DTYPES)}")


@contextlib.asynccontextmanager
async def peers(
    options: SpeedOptions, system: System, num_threads: list[int]
) -> AsyncIterator[list[Way]]:
    """Starts a child for each number of cores; yields all variants of the peer on each child.

    A child uses the first cores of the machine. The target shares them, but is idle meanwhile.
    """
    from outrider_bench.commands.speed import Way

    ways: list[Way] = []
    async with contextlib.AsyncExitStack() as resources:
        for num in num_threads:
            peer = await _started(options, num)
            resources.push_async_callback(peer.stop)
            await peer.response()
            plain = _name(WAYS[0], num)
            for way in WAYS:
                run = _Run(peer, way, system, options.seed, _name(way, num))
                ways.append(Way(run.name, plain, run, is_peer=True))
        yield ways


def _name(way: PeerWay, num_threads: int) -> str:
    cores = "1 core" if num_threads == 1 else f"{num_threads} cores"
    return f"HF {way.name}, {cores}"


@dataclass(frozen=True)
class _Run:
    """Generates one output; called like the variants of Outrider."""

    peer: Peer
    way: PeerWay
    system: System
    seed: int
    name: str

    async def __call__(self, prompt: int, max_tokens: int, repetition: int) -> Sample:
        from outrider_bench.measuring.load import Sample

        begin = time.monotonic()
        response = await self.peer.request(
            {
                "variant": self.way.variant,
                "num_assistant_tokens": self.way.num_assistant_tokens,
                "schedule": self.way.schedule,
                "prompt": self.system.prompts.ids(prompt),
                "max_new_tokens": max_tokens,
                "temperature": 0.0,
                "seed": self.seed,
            }
        )
        return Sample(
            variant=self.name,
            prompt=prompt,
            repetition=repetition,
            token_ids=response["token_ids"],
            tokens_per_s=response["tokens_per_s"] or 0.0,
            first_s=response["seconds_to_first"],
            wall_s=time.monotonic() - begin,
        )


async def _started(options: SpeedOptions, num_threads: int) -> Peer:
    cores = range(os.cpu_count() or 1)
    if num_threads > len(cores):
        raise ConfigError(
            f"--peer-threads: {num_threads} exceeds the {len(cores)} cores of this machine"
        )
    models = options.stack_options(CoreLayout())
    arguments = ["--target", models.target_model, "--draft", str(models.draft_model)]
    arguments += ["--dtype", options.dtype, "--num-threads", str(num_threads)]
    log_path = options.out / f"peer-{num_threads}.log"
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *tied_to_this_process([sys.executable, "-m", _MODULE, *arguments], cores[:num_threads]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            limit=_MAX_LINE_BYTES,
            start_new_session=True,
        )
    return Peer(process, log_path)

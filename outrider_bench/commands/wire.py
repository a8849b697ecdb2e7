"""`outrider bench wire`: bytes per token on the internal connections, by verification method.

The orchestrator counts the bytes of each connection.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import parse_count, takes
from outrider.cli.request import Method
from outrider.cli.stack_options import StackOptions, private_stack
from outrider.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider.client import AsyncClient
    from outrider.client.info import ModelInfo
    from outrider.v1.orchestrator_pb2 import GenerateRequest
    from outrider_bench.measuring.show import Step

TEXT_PROMPT = "def read_lines(path):\n    with open(path) as file:\n"
_NUM_PROMPT_IDS = 16
_TEMPERATURES = (0.0, 1.0)
# Bytes depend on the vocabulary and on α, not on the cost of a pass.
_PAIR_SIZE = "tiny"
# Fixed, to skip the search; α is about the same at every vocabulary.
_EPSILON = 0.2
_KV_TOKENS = 16_384
# Long, so that every round has its draft: bytes are measured, not time.
_DRAFT_WAIT_MS = 20_000.0
# float32, for comparison with sending the whole distribution of each draft token.
_BYTES_PER_PROBABILITY = 4


@dataclass(frozen=True)
class WireOptions:
    """Flags of `outrider bench wire`."""

    endpoint: Annotated[
        str | None,
        typer.Option(help="host:port of a running orchestrator. Default: start a system."),
    ] = None
    vocab_sizes: Annotated[
        str | None,
        typer.Option(help="Vocabulary sizes of random model pairs: 4096,32768,131072."),
    ] = None
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens per output.")] = 128
    runs: Annotated[int, typer.Option(min=1, help="Outputs per table row.")] = 3
    gamma: Annotated[int, typer.Option(min=1, help="Draft tokens per round.")] = 5
    lookahead: Annotated[
        int | None,
        typer.Option(min=0, help="Rounds drafted ahead. Default: the server's."),
    ] = None
    fan_out: Annotated[
        int | None,
        typer.Option(min=1, help="Branches drafted ahead. Default: the server's."),
    ] = None
    json: Annotated[bool, typer.Option("--json", help="Print only a JSON object.")] = False


@dataclass(frozen=True)
class WireCost:
    """Bytes per emitted token on each connection, both ways, including prompts and framing."""

    vocab_size: int
    method: str
    temperature: float
    gamma: int
    num_tokens: int
    acceptance_rate: float | None
    draft_bytes_per_token: float
    target_bytes_per_token: float


@dataclass
class WireCosts:
    """Results so far. `stopped`: see `Report`."""

    costs: list[WireCost] = field(default_factory=list)
    stopped: Exception | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON report, with the keys of the other benchmarks."""
        results = [asdict(cost) for cost in self.costs]
        return {"benchmark": "wire", "is_cut": self.stopped is not None, "results": results}


@takes(WireOptions)
def wire(options: WireOptions) -> None:
    """Measure bytes per token between orchestrator, draft and target, by verification method."""
    from rich.console import Console

    from outrider.cli.running import run

    if options.endpoint and options.vocab_sizes:
        raise ConfigError("--vocab-sizes: cannot be combined with --endpoint")
    console, found = Console(stderr=options.json), WireCosts()
    run(_wire(options, console, found))
    if options.json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        console.print(_table(found.costs))
    if found.stopped is not None:
        raise found.stopped


async def _wire(options: WireOptions, console: Console, found: WireCosts) -> None:
    from outrider_bench.measuring.show import progress

    texts = options.vocab_sizes.split(",") if options.vocab_sizes else []
    sizes: list[int | None] = [parse_count(text, "--vocab-sizes") for text in texts]
    sizes = sizes or [None]
    num_steps = len(sizes) * len(_TEMPERATURES) * len(Method)
    with progress(console, num_steps, found, found.costs) as step:
        for size in sizes:
            async with _served(options, size, console) as client:
                await _measure_all(client, options, found.costs, step)


@contextlib.asynccontextmanager
async def _served(
    options: WireOptions, vocab_size: int | None, console: Console
) -> AsyncIterator[AsyncClient]:
    """Client of the measured orchestrator. `vocab_size`: makes a random pair; None: no pair."""
    from outrider.cli.up import described_models, shown_stack
    from outrider.cli.view import StackView
    from outrider.client import AsyncClient
    from outrider_bench.measuring.system import settled_info

    if options.endpoint:
        async with AsyncClient(options.endpoint, resume_for_s=0.0) as client:
            yield client
        return
    with tempfile.TemporaryDirectory(prefix="outrider-bench-") as directory:
        models = (
            await _random_pair(Path(directory), vocab_size, console)
            if vocab_size is not None
            else {}
        )
        stack_options = private_stack(
            StackOptions(**models, inflate="0", draft_wait_ms=_DRAFT_WAIT_MS)
        )
        view = StackView(console, models=described_models(stack_options), stays=False)
        async with (
            shown_stack(stack_options, view) as stack,
            AsyncClient(stack.endpoint, resume_for_s=0.0) as client,
        ):
            await settled_info(client, stack)
            yield client


async def _random_pair(directory: Path, vocab_size: int, console: Console) -> dict[str, Any]:
    from outrider_bench.commands.pair import PairOptions, made_pair

    with console.status(f"making a random pair with {vocab_size} tokens"):
        await made_pair(
            PairOptions(directory, size=_PAIR_SIZE, epsilon=_EPSILON, vocab_size=vocab_size)
        )
    models = {name: str(directory / name) for name in ("target", "draft")}
    return {**models, "kv_cache_tokens": _KV_TOKENS, "log_dir": directory}


async def _measure_all(
    client: AsyncClient, options: WireOptions, costs: list[WireCost], step: Step
) -> None:
    """Measures every verification method at every temperature. Appends to `costs`."""
    info = await client.models()
    if info.draft is None:
        raise ConfigError("bench wire: no draft is connected; this benchmark needs one")
    for temperature in _TEMPERATURES:
        for method in Method:
            step(f"{info.target.vocab_size:,} tokens: {method} at temperature {temperature:g}")
            costs.append(await _measure(client, info.target, method, temperature, options))


async def _measure(
    client: AsyncClient, target: ModelInfo, method: Method, temperature: float, options: WireOptions
) -> WireCost:
    outputs = [
        await client.stream(_request(target, method, temperature, seed, options)).result()
        for seed in range(options.runs)
    ]
    stats = [output.speculation for output in outputs]
    num_tokens = sum(len(output.token_ids) for output in outputs)
    num_rejected = sum(s.num_rejected_tokens for s in stats)
    num_accepted = sum(s.num_accepted_tokens for s in stats)
    num_compared = num_accepted + num_rejected
    return WireCost(
        vocab_size=target.vocab_size,
        method=method.value,
        temperature=temperature,
        gamma=options.gamma,
        num_tokens=num_tokens,
        acceptance_rate=num_accepted / num_compared if num_compared else None,
        draft_bytes_per_token=sum(s.draft_wire_bytes for s in stats) / num_tokens,
        target_bytes_per_token=sum(s.target_wire_bytes for s in stats) / num_tokens,
    )


def _request(
    target: ModelInfo, method: Method, temperature: float, seed: int, options: WireOptions
) -> GenerateRequest:
    from outrider.runtime.protobuf import verification_to_proto
    from outrider.sampling.params import Verification
    from outrider.v1 import orchestrator_pb2

    request = orchestrator_pb2.GenerateRequest(
        gamma=options.gamma, lookahead=options.lookahead, fan_out=options.fan_out
    )
    request.verification = verification_to_proto(Verification(method.value))
    request.sampling.temperature = temperature
    request.sampling.seed = seed
    request.sampling.max_tokens = options.max_tokens
    request.sampling.ignore_eos = True
    if target.tokenizer_fingerprint and target.architecture != "simulated":
        request.text = TEXT_PROMPT
    else:  # 7919 is prime: the ids are spread over the vocabulary and reproducible
        ids = [(1 + i + seed) * 7919 % target.vocab_size for i in range(_NUM_PROMPT_IDS)]
        request.token_ids.ids.extend(ids)
    return request


def _table(costs: list[WireCost]) -> Table:
    from rich.table import Table

    table = Table(title="bytes per emitted token on the internal connections", show_edge=False)
    for name in ("vocabulary", "temp.", "verification", "α", "draft", "target"):
        table.add_column(name, justify="left" if name == "verification" else "right")
    table.add_column("full distribution", justify="right", style="dim")
    previous = None
    for cost in costs:
        if previous not in (None, cost.vocab_size):
            table.add_section()
        previous = cost.vocab_size
        table.add_row(
            f"{cost.vocab_size:,}",
            "greedy" if cost.temperature == 0 else f"{cost.temperature:g}",
            cost.method,
            "none" if cost.acceptance_rate is None else f"{cost.acceptance_rate:.2f}",
            f"{cost.draft_bytes_per_token:.0f}",
            f"{cost.target_bytes_per_token:.0f}",
            f"{cost.vocab_size * _BYTES_PER_PROBABILITY:,}",
        )
    return table

"""`outrider bench structured`: structured output under speculation, with faults, and its cost.

Random schemas × seeds × temperatures × γ × verification methods, while targets and drafts are
killed: every output that ends by itself must validate, one that ends by length must be a valid
beginning, and greedy and coupled outputs must equal those without drafts. And tokens/s against
free text, and the time of the masks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import takes
from outrider_bench.measuring.system import BenchOptions

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider.client import AsyncClient
    from outrider.client.results import Generation
    from outrider.v1 import orchestrator_pb2
    from outrider_bench.chaos.system import System
    from outrider_bench.measuring.document import Document, Goal
    from outrider_bench.measuring.show import Step
    from outrider_bench.structured.cases import Case, CaseResult

_PROMPT = "# The record as JSON:\n"
_TIMEOUT_S = 300.0
# Between two kills; a replica is down for the time of its start.
_FAULT_GAP_S = 4.0
# Ends by itself after 150 to 250 tokens.
_RECORDS = {
    "type": "array",
    "minItems": 6,
    "maxItems": 6,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 4, "maxLength": 30},
            "size": {"type": "integer", "minimum": 0, "maximum": 100000},
            "kind": {"enum": ["file", "directory", "link"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        },
        "required": ["name", "size", "kind", "tags"],
        "additionalProperties": False,
    },
    "x-guidance": {"whitespace_flexible": False},
}
_VARIANTS = ("free, γ = 0", "free", "structured, γ = 0", "structured")
_RATE_STREAMS = (1, 8)


@dataclass(frozen=True)
class StructuredOptions(BenchOptions):
    """Flags of `outrider bench structured`."""

    schemas: Annotated[int, typer.Option(min=4, help="Number of random schemas.")] = 1000
    faults: Annotated[bool, typer.Option(help="Kill and restart targets and drafts meanwhile.")] = (
        True
    )
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per output at most.")] = 300
    name: Annotated[str, typer.Option(help="Name of the files.")] = "structured"


@takes(StructuredOptions)
def structured(options: StructuredOptions) -> None:
    """Check structured outputs of random schemas under faults; measure their cost."""
    from outrider.cli.running import run
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.show import bench_console, finish, reporting
    from outrider_bench.structured.masks import replayed

    options = options.with_quick_defaults(schemas=8, faults=False)
    console, document = bench_console(), Document(options.name, options)
    results, rates, kills = run(_measure(options, console, document))
    with reporting(console, document):
        results, masks = replayed(options.target, results)
        document.samples += [result.to_dict() for result in results]
        summary = _summary(results, kills)
        document.results += [summary, *rates, masks]
        document.add_goals(lambda: _goals(summary, rates))
        document.write()
        finish(console, document, _tables(summary, rates, masks))


async def _measure(
    options: StructuredOptions, console: Console, document: Document
) -> tuple[list[CaseResult], list[dict[str, Any]], list[str]]:
    from outrider.client import AsyncClient
    from outrider_bench.chaos.system import Size, System
    from outrider_bench.measuring.cores import CoreUse, core_per_tier
    from outrider_bench.measuring.show import progress
    from outrider_bench.structured.cases import random_cases

    results: list[CaseResult] = []
    rates: list[dict[str, Any]] = []
    kills: list[str] = []
    cases = list(random_cases(options.schemas, options.seed))
    stack = options.stack_options(core_per_tier(CoreUse.shared))
    num_rates = len(_VARIANTS) * len(_RATE_STREAMS) * options.repetitions
    deaths: list[str] = []
    async with (
        System(stack, Size(2, 1), options.out / "logs", deaths.append) as system,
        AsyncClient(system.endpoints, resume_for_s=60.0) as client,
    ):
        with progress(console, len(cases) + num_rates, document, results) as step:
            rates += await _rates(options, client, step)
            async with _faults(system, kills) if options.faults else contextlib.nullcontext():
                for _, group in itertools.groupby(cases, lambda case: case.num_streams):
                    await _run_group(options, client, list(group), results, step)
    assert not deaths, deaths
    return results, rates, kills


async def _run_group(
    options: StructuredOptions,
    client: AsyncClient,
    cases: Sequence[Case],
    results: list[CaseResult],
    step: Step,
) -> None:
    slots = asyncio.Semaphore(cases[0].num_streams)

    async def one(case: Case) -> None:
        async with slots:
            step(f"{case.num_streams} streams")
            results.append(await _checked(case, client, options.max_tokens))

    async with asyncio.TaskGroup() as tasks:
        for case in cases:
            tasks.create_task(one(case))


async def _checked(case: Case, client: AsyncClient, max_tokens: int) -> CaseResult:
    from outrider.errors import OutriderError
    from outrider_bench.structured.cases import CaseResult, problem_of

    try:
        output = await _generate(client, case.request(_PROMPT, max_tokens))
        problem = problem_of(case, output.finish_reason, output.text)
        if case.is_repeatable and not problem:
            plain = await _generate(client, case.without_drafts().request(_PROMPT, max_tokens))
            if plain.token_ids != output.token_ids:
                problem = "differs from the output without drafts"
    except OutriderError as error:
        return CaseResult(case, "error", "", [], 0, 0, str(error))
    stats = output.speculation
    return CaseResult(
        case, output.finish_reason, output.text, output.token_ids,
        stats.num_draft_tokens, stats.num_accepted_tokens, problem,
    )  # fmt: skip


async def _generate(client: AsyncClient, request: orchestrator_pb2.GenerateRequest) -> Generation:
    return await client.stream(request, timeout_s=_TIMEOUT_S).result()


@contextlib.asynccontextmanager
async def _faults(system: System, kills: list[str]) -> AsyncIterator[None]:
    """Kills a replica after the other, targets and drafts in turn, and starts it again."""
    from outrider_bench.chaos.faults import Tier
    from outrider_bench.chaos.system import Place

    async def kill_in_turn() -> None:
        for number in itertools.count():
            tier = (Tier.DRAFT, Tier.TARGET)[number % 2]
            place = Place(tier, number // 2 % 2)
            await asyncio.sleep(_FAULT_GAP_S)
            await system.nodes[place].kill()
            kills.append(f"{tier}{place.replica}")
            await system.nodes[place].start()
            await system.connected(place)

    killing = asyncio.create_task(kill_in_turn(), name="faults")
    try:
        yield
    finally:
        killing.cancel()
        await asyncio.gather(killing, return_exceptions=True)


async def _rates(
    options: StructuredOptions, client: AsyncClient, step: Step
) -> list[dict[str, Any]]:
    """tokens/s by variant and number of streams; variants in turn, medians of repetitions."""
    samples: dict[tuple[str, int], list[float]] = {}
    alphas: dict[tuple[str, int], list[float]] = {}
    for variant in _VARIANTS:  # warm-up: grammars are compiled, costs are learnt
        await _block(options, client, variant, 2, 0)
    for repetition in range(options.repetitions):
        for num_streams, variant in itertools.product(_RATE_STREAMS, _VARIANTS):
            step(f"{variant}: {num_streams} streams")
            rate, alpha = await _block(options, client, variant, num_streams, repetition)
            samples.setdefault((variant, num_streams), []).append(rate)
            alphas.setdefault((variant, num_streams), []).append(alpha)
    return [
        {
            "variant": variant,
            "num_streams": num_streams,
            "tokens_per_s": statistics.median(rates),
            "alpha": statistics.median(alphas[variant, num_streams]),
            "all": rates,
        }
        for (variant, num_streams), rates in samples.items()
    ]


async def _block(
    options: StructuredOptions, client: AsyncClient, variant: str, num_streams: int, repetition: int
) -> tuple[float, float]:
    """(tokens/s of all streams together, acceptance rate), coupled, at temperature 0.7."""
    from outrider.v1 import orchestrator_pb2, sampling_pb2

    requests = []
    for stream in range(num_streams):
        request = orchestrator_pb2.GenerateRequest(
            text=_PROMPT, verification=sampling_pb2.VERIFICATION_COUPLED
        )
        sampling = request.sampling
        sampling.temperature, sampling.seed = 0.7, 1000 * repetition + stream
        sampling.max_tokens = options.max_tokens if "structured" in variant else 200
        if "structured" in variant:
            sampling.structured_outputs.json = json.dumps(_RECORDS)
        else:
            sampling.ignore_eos = True
        if "γ = 0" in variant:
            request.gamma = 0
        requests.append(request)
    began_at = time.monotonic()
    outputs = await asyncio.gather(*(_generate(client, request) for request in requests))
    seconds = time.monotonic() - began_at
    num_drafts = sum(output.speculation.num_draft_tokens for output in outputs)
    accepted = sum(output.speculation.num_accepted_tokens for output in outputs)
    return sum(len(o.token_ids) for o in outputs) / seconds, accepted / max(1, num_drafts)


def _summary(results: Sequence[CaseResult], kills: Sequence[str]) -> dict[str, Any]:
    return {
        "num_cases": len(results),
        "num_stop": sum(result.finish_reason == "stop" for result in results),
        "num_length": sum(result.finish_reason == "length" for result in results),
        "num_repeatable": sum(result.case.is_repeatable for result in results),
        "num_draft_tokens": sum(result.num_draft_tokens for result in results),
        "num_accepted_tokens": sum(result.num_accepted_tokens for result in results),
        "num_kills": len(kills),
        "problems": [f"{r.case.number}: {r.problem}" for r in results if r.problem],
    }


def _goals(summary: dict[str, Any], rates: Sequence[dict[str, Any]]) -> list[Goal]:
    from outrider_bench.measuring.document import Goal

    num_right = summary["num_cases"] - len(summary["problems"])
    rate = {(row["variant"], row["num_streams"]): row["tokens_per_s"] for row in rates}
    drafted, plain = rate["structured", 1], rate["structured, γ = 0", 1]
    return [
        Goal("cases without a problem", summary["num_cases"], num_right),
        Goal("structured with drafts over γ = 0, 1 stream", 1.0, drafted / plain),
    ]


def _tables(
    summary: dict[str, Any], rates: Sequence[dict[str, Any]], masks: dict[str, Any]
) -> list[Table]:
    from outrider_bench.measuring.show import number, table

    counted = table("Outputs of random schemas", ("", "number"))
    for name, value in summary.items():
        shown = "; ".join(value) or "none" if name == "problems" else str(value)
        counted.add_row(name.removeprefix("num_").replace("_", " "), shown)
    speed = table("tokens/s of all streams together", ("variant", "streams", "tokens/s", "α"))
    for row in rates:
        alpha = None if "γ = 0" in row["variant"] else row["alpha"]
        speed.add_row(
            row["variant"], str(row["num_streams"]), number(row["tokens_per_s"], 1), number(alpha)
        )
    times = table("Masks and compilations in this process", ("", ""))
    for name, value in masks.items():
        times.add_row(name.replace("_", " "), number(value, 1))
    return [counted, speed, times]

"""`outrider bench sources`: tokens/s by task and draft source, without a draft tier or beside one.

By default both tiers are simulated, and the target writes real texts (`tasks`): the acceptance of
prompt lookup is that of these texts, that of the draft tier is given.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.cli.options import takes
from outrider.errors import ConfigError
from outrider.settings.simulation import Simulation
from outrider_bench.measuring.system import BenchOptions, System, measured_system

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider_bench.measuring.document import Document, Goal
    from outrider_bench.measuring.load import Sample
    from outrider_bench.measuring.tasks import TaskText
    from outrider_bench.measuring.workload import Variant

# Like two GPUs: passes bound by memory up to some tokens, a draft ten times faster.
_TARGET = "step_ms=1:25/64:25/256:50"
_DRAFT = "step_ms=1:2.5/16:2.5/64:5,survival=0.6"
_NUM_WARM_UP_TOKENS = 32
_ALL = "all tasks"


@dataclass(frozen=True)
class SourcesOptions(BenchOptions):
    """Flags of `outrider bench sources`."""

    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per output.")] = 256
    prompt_len: Annotated[int, typer.Option(min=16, help="Tokens per prompt.")] = 1024
    alone: Annotated[
        bool, typer.Option("--alone", help="Without a draft tier: prompt lookup alone.")
    ] = False
    name: Annotated[str, typer.Option(help="Name of the files.")] = "sources"


@dataclass(frozen=True)
class TaskResult:
    """A table row. `tokens_per_s`: as in `_rate`.

    `over_better`: of the router, over the better of lookup and draft tier alone. `lookup_share`:
    share of rounds with draft tokens of lookup; `lookup_alpha`: their acceptance rate.
    """

    task: str
    variant: str
    tokens_per_s: float
    over_plain: float
    over_better: float | None
    lookup_share: float
    lookup_alpha: float | None
    num_different: int


@takes(SourcesOptions)
def sources(options: SourcesOptions) -> None:
    """Measure tokens/s by task: plain, prompt lookup, the draft tier, and the router among them."""
    from outrider.cli.running import run
    from outrider_bench.measuring.document import Document
    from outrider_bench.measuring.plots import Bar, draw_bars, require_matplotlib
    from outrider_bench.measuring.show import bench_console, finish, reporting

    options = options.with_quick_defaults(prompt_len=64)
    require_matplotlib()
    console, document = bench_console(), Document(options.name, options)
    measured = run(_measure(options, console, document))
    document.samples += [{"task": text.task} | sample.to_dict() for text, sample in measured]
    with reporting(console, document):
        rows = results(measured)
        document.results += [asdict(row) for row in rows]
        document.add_goals(lambda: _goals(rows))
        document.write()
        bars = [
            Bar(f"{r.task}: {r.variant}", r.over_plain, r.over_plain, r.over_plain)
            for r in rows
            if r.variant != "plain"
        ]
        draw_bars(document.plot_path, "Draft sources", "tokens/s over plain decoding", bars)
        finish(console, document, [_table(rows)])


def variants(options: SourcesOptions) -> list[Variant]:
    """Plain decoding, each source alone, and the router."""
    from outrider.cli.request import DraftSource
    from outrider_bench.measuring.workload import Variant, plain

    ways = [plain(), Variant("lookup", draft_source=DraftSource.lookup)]
    if not options.alone:
        ways.append(Variant("model", draft_source=DraftSource.model))
        ways.append(Variant("router", draft_source=DraftSource.auto))
    return ways


def _simulated(options: SourcesOptions, texts: list[TaskText], vocab_size: int) -> SourcesOptions:
    """Options whose target writes the texts; unchanged with real models."""
    if options.target is not None:
        return options
    path = (options.out / "texts.json").absolute()
    if "," in str(path):
        raise ConfigError(f"--out: {path}: must not contain a comma")
    path.write_text(json.dumps([[*text.prompt_ids, *text.output_ids] for text in texts]))
    changes: dict[str, Any] = {"texts": str(path), "vocab_size": vocab_size}
    target = Simulation.parse(options.simulate_target or _TARGET, is_draft=False)
    draft = Simulation.parse(options.simulate_draft or _DRAFT)
    return replace(
        options,
        simulate_target=str(replace(target, **changes)),
        simulate_draft=None if options.alone else str(replace(draft, **changes)),
    )


async def _measure(
    options: SourcesOptions, console: Console, document: Document
) -> list[tuple[TaskText, Sample]]:
    from outrider.quickstart_pair import TARGET_PATH
    from outrider.tokenizer import Tokenizer
    from outrider_bench.measuring.load import Work, interleaved, run
    from outrider_bench.measuring.show import progress
    from outrider_bench.measuring.tasks import TaskTexts

    tokenizer = Tokenizer.load(options.target or str(TARGET_PATH))
    if tokenizer is None:
        raise ConfigError("--target: has no tokenizer; the tasks are texts")
    made = TaskTexts(tokenizer, options.prompt_len, options.max_tokens)
    texts = list(made.of(options.prompts))
    ways = variants(options)
    measured: list[tuple[TaskText, Sample]] = []
    work = [(text, way) for text in texts for way in ways]
    given = _simulated(options, texts, tokenizer.vocab_size)
    changes: dict[str, Any] = {"draft": "none"} if options.alone else {}
    async with measured_system(given, console, prompt_lookup=True, **changes) as system:
        _require_draft(system, options)
        document.about(system)
        num_steps = len(ways) + len(work) * options.repetitions
        warm_up = (len(ways), options.max_tokens / _NUM_WARM_UP_TOKENS)

        async def one(text: TaskText, way: Variant, num_tokens: int, repetition: int) -> Sample:
            made = Work(way, text.number, text.prompt_ids, num_tokens, repetition, text.number)
            return await run(system, made)

        with progress(console, num_steps, document, measured, warm_up=warm_up) as step:
            for way in ways:
                step(f"warm-up: {way.name}")
                await one(texts[-1], way, _NUM_WARM_UP_TOKENS, -1)
            for repetition, (text, way) in interleaved(work, options.repetitions):
                step(f"{text.task}: {way.name}")
                measured.append((text, await one(text, way, options.max_tokens, repetition)))
    return measured


def _require_draft(system: System, options: SourcesOptions) -> None:
    if not options.alone:
        system.require_draft()


def results(measured: list[tuple[TaskText, Sample]]) -> list[TaskResult]:
    """Rows by task, then all tasks together; within them by variant."""
    tasks = list(dict.fromkeys(text.task for text, _ in measured))
    rows = []
    for task in (*tasks, _ALL):
        own = [sample for text, sample in measured if task in (text.task, _ALL)]
        rates = {name: _rate(own, name) for name in dict.fromkeys(s.variant for s in own)}
        better = max((rates[name] for name in ("lookup", "model") if name in rates), default=None)
        for name, rate in rates.items():
            is_router = name == "router" and better is not None
            over_better = rate / better if is_router and better is not None else None
            rows.append(_row(task, name, own, rate, over_better))
    return rows


def _rate(samples: list[Sample], variant: str) -> float:
    """Tokens per second of all prompts one after the other, each at its median rate.

    All outputs have the same number of tokens.
    """
    by_prompt: dict[int, list[float]] = {}
    for sample in samples:
        if sample.variant == variant:
            by_prompt.setdefault(sample.prompt, []).append(sample.tokens_per_s)
    return statistics.harmonic_mean(statistics.median(rates) for rates in by_prompt.values())


def _row(
    task: str, variant: str, samples: list[Sample], rate: float, over_better: float | None
) -> TaskResult:
    own = [sample for sample in samples if sample.variant == variant]
    truth = {s.prompt: s.token_ids for s in samples if s.variant == "plain"}
    stats = [sample.stats for sample in own if sample.stats is not None]
    lookup = [source for entry in stats for source in entry.sources if source.source == "lookup"]
    accepted = sum(source.num_accepted_tokens for source in lookup)
    verified = accepted + sum(source.num_rejected_tokens for source in lookup)
    return TaskResult(
        task=task,
        variant=variant,
        tokens_per_s=rate,
        over_plain=rate / _rate(samples, "plain"),
        over_better=over_better,
        lookup_share=sum(s.num_drafts for s in lookup) / max(1, sum(s.num_rounds for s in stats)),
        lookup_alpha=accepted / verified if verified else None,
        num_different=sum(s.token_ids != truth.get(s.prompt, s.token_ids) for s in own),
    )


def _goals(rows: list[TaskResult]) -> list[Goal]:
    from outrider_bench.measuring.document import Goal

    goals = []
    for row in rows:
        if row.variant == "lookup" and row.task in ("quoting", "editing"):
            goals.append(Goal(f"{row.task}: lookup over plain", 1.5, row.over_plain))
        if row.variant == "lookup" and row.task in ("code", "prose"):
            goals.append(Goal(f"{row.task}: lookup over plain", 0.98, row.over_plain))
        if row.variant == "router":
            asked = 1.0 if row.task in ("mixed", _ALL) else 0.97
            text = f"{row.task}: router over the better source alone"
            goals.append(Goal(text, asked, row.over_better))
    return goals


def _table(rows: list[TaskResult]) -> Table:
    from outrider_bench.measuring.show import number, share, table, times

    columns = ("task", "source", "tokens/s", "over plain", "over the better source")
    shown = table("tokens/s of one stream", (*columns, "rounds of lookup", "its α", "outputs"))
    for row in rows:
        shown.add_row(
            row.task, row.variant, number(row.tokens_per_s, 1), times(row.over_plain),
            times(row.over_better), share(row.lookup_share), number(row.lookup_alpha),
            "same" if not row.num_different else f"{row.num_different} differ",
        )  # fmt: skip
    return shown

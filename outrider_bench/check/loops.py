"""Real loops: speed-up and acceptance measured through the real services on this machine.

Starts target, draft and orchestrator as `outrider up` does. Plain decoding (γ 0) and the server's
defaults alternate on the same prompts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.cli.stack_options import NO_DRAFT
from outrider.replica import CostReport
from outrider_bench.check.options import CheckOptions
from outrider_bench.check.prediction import PairCost
from outrider_bench.check.prompts import Prompt, Workload
from outrider_bench.measuring.system import BenchOptions, System, measured_system

if TYPE_CHECKING:
    from rich.console import Console

    from outrider_bench.measuring.load import Block, Sample, Work
    from outrider_bench.measuring.show import Report, Step
    from outrider_bench.measuring.workload import Variant

_NUM_WARM_UP_TOKENS = 24
_LOG_DIR = Path(".outrider/logs")
# Draft tokens per round where acceptance is counted in the real loop.
_COUNTED_GAMMA = 4


@dataclass(frozen=True)
class Pass:
    """One measurement: the same prompts without drafts and as served."""

    temperature: float
    num_streams: int
    plain: Block
    served: Block

    @property
    def has_rates(self) -> bool:
        """False if there was no time in which every stream was busy: nothing was measured."""
        return min(self.served.tokens_per_s, self.plain.tokens_per_s) > 0

    @property
    def speed_up(self) -> float:
        """Only with rates."""
        return self.served.tokens_per_s / self.plain.tokens_per_s


@dataclass
class Loops:
    """Measurements so far. `cost`: passes as reported after the warm-up; None: not known yet.

    `counted`: outputs with a fixed γ by temperature, of a draft that re-encodes the text: the
    server's own γ may be 0.
    """

    cost: PairCost | None = None
    passes: list[Pass] = field(default_factory=list)
    counted: dict[float, list[Sample]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.passes)

    def at(self, temperature: float, num_streams: int | None = None) -> list[Pass]:
        """Passes at this temperature and number of streams; None: any number."""
        return [
            one
            for one in self.passes
            if one.temperature == temperature and num_streams in (None, one.num_streams)
        ]


async def measure_loops(
    options: CheckOptions,
    draft: str | None,
    workload: Workload,
    loops: Loops,
    console: Console,
    report: Report,
    *,
    reencodes: bool = False,
) -> None:
    """Fills `loops`. After a signal it returns with the measurements so far (`report.stopped`).

    `draft` None: prompt lookup alone. `reencodes`: the draft has another tokenizer.
    """
    from outrider_bench.measuring.load import interleaved
    from outrider_bench.measuring.show import progress

    bench = BenchOptions(
        target=options.target,
        draft=draft or NO_DRAFT,
        dtype=options.dtype,
        device=options.device,
        draft_device=options.draft_device,
        cores=options.cores,
    )
    changes: dict[str, Any] = {
        "log_dir": _LOG_DIR,
        "max_generations": max(256, *options.stream_list),
        "assume_same_vocabulary": options.assume_same_vocabulary,
        "draft_delay_ms": options.rtt_ms / 2 or None,
        "prompt_lookup": draft is None,
        "target_tokenizer": options.target if reencodes else None,
    }
    points = [(t, num) for t in options.temperature_list for num in options.stream_list]
    async with measured_system(bench, console, **changes) as system:
        if draft is not None:
            system.require_draft()
        counted = options.temperature_list if reencodes else []
        # Twice: plain and as served.
        num_steps = 2 + len(counted) + 2 * options.repetitions * len(points)
        with progress(console, num_steps, report, loops) as step:
            await _warm_up(system, options, workload, loops, step)
            for temperature in counted:
                step(f"acceptance, T = {temperature:g}")
                way = replace(_variant("full", temperature, workload), gamma=_COUNTED_GAMMA)
                works = _works(options, workload.prompts, 1, 0)
                loops.counted[temperature] = (await _block(system, works, way, 1)).samples
            for repetition, (temperature, num) in interleaved(points, options.repetitions):
                works = _works(options, workload.prompts, num, repetition)
                ways = [_variant(name, temperature, workload) for name in ("plain", "full")]
                blocks = {}
                for way in ways if repetition % 2 == 0 else reversed(ways):
                    step(f"{way.name}, T = {temperature:g}, {num} streams")
                    blocks[way.name] = await _block(system, works, way, num)
                loops.passes.append(Pass(temperature, num, blocks["plain"], blocks["full"]))


async def _warm_up(
    system: System, options: CheckOptions, workload: Workload, loops: Loops, step: Step
) -> None:
    """Runs two short outputs each way, then reads the costs that the services report."""
    from outrider.runtime.protobuf import costs_from_proto
    from outrider_bench.measuring.summary import Rounds
    from outrider_bench.measuring.tiers import draft_info, target_info

    temperature = options.temperature_list[0]
    works = [
        replace(work, max_tokens=min(work.max_tokens, _NUM_WARM_UP_TOKENS))
        for work in _works(replace(options, outputs=2), workload.prompts, 1, 0)
    ]
    samples: dict[str, list[Sample]] = {}
    for name in ("full", "plain"):
        step(f"warm-up: {name}")
        variant = _variant(name, temperature, workload)
        samples[name] = (await _block(system, works, variant, 1)).samples
    rounds = Rounds.of(samples["plain"])
    assert rounds is not None, "the orchestrator reports statistics of every output"
    overhead_s = max(0.0, rounds.verify_s - rounds.target_step_s)
    addresses = system.stack.addresses
    has_draft = "draft" in addresses
    loops.cost = PairCost(
        target=costs_from_proto((await target_info(addresses["target"])).costs),
        draft=costs_from_proto((await draft_info(addresses["draft"])).costs)
        if has_draft
        else CostReport(),
        overhead_s=overhead_s,
        draft_overhead_s=overhead_s,
    )


def _variant(name: str, temperature: float, workload: Workload) -> Variant:
    from outrider_bench.measuring.workload import Variant

    return Variant(
        name,
        gamma=0 if name == "plain" else None,
        temperature=temperature,
        ignores_eos=workload.ignores_eos,
        is_plain_sampling=True,
    )


def _works(
    options: CheckOptions, prompts: Sequence[Prompt], num_streams: int, repetition: int
) -> list[Work]:
    """Outputs of one measurement: other prompts in every repetition, until all had their turn."""
    from outrider_bench.measuring.load import Work
    from outrider_bench.measuring.workload import plain

    num = max(options.outputs, num_streams)
    works = []
    for place in range(repetition * num, (repetition + 1) * num):
        # A step that has no divisor in common with most numbers takes prompts of all tasks.
        index = place * 7 % len(prompts) if len(prompts) % 7 else place % len(prompts)
        ids = list(prompts[index].token_ids)
        works.append(Work(plain(), index, ids, options.max_tokens, repetition, seed=place))
    return works


async def _block(
    system: System, works: Sequence[Work], variant: Variant, num_streams: int
) -> Block:
    from outrider_bench.measuring.load import run_block

    own = [replace(work, variant=variant) for work in works]
    return await run_block(system, own, num_streams)


def median_speed_up(passes: Sequence[Pass]) -> float:
    """Median over the passes, which have rates; there must be one."""
    return statistics.median(one.speed_up for one in passes)

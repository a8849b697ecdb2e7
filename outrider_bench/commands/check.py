"""`outrider check TARGET [DRAFT…]`: is this pair of models worth it, here?"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from outrider.cli.failures import require_engine
from outrider.cli.options import takes
from outrider.cli.stack_options import StackOptions
from outrider.errors import ConfigError
from outrider_bench.check.options import CheckOptions

if TYPE_CHECKING:
    from rich.console import Console

    from outrider_bench.check.prompts import Workload
    from outrider_bench.check.report import CheckReport, DraftCheck

# 1 and 2 are the statuses of failed commands.
NOT_WORTH_IT_STATUS = 3


@takes(CheckOptions)
def check(options: CheckOptions) -> None:
    """Check whether speculation pays for this pair of models on this machine.

    Exit status: 0 if it does, 3 if it does not, 2 for a wrong argument or a model that cannot be
    read.
    """
    require_engine()
    options.check()
    from outrider.cli.running import run
    from outrider_bench.check.report import CheckReport, print_verdicts, write_files
    from outrider_bench.measuring.show import bench_console

    console, report = bench_console(is_stderr=options.json), CheckReport(options)
    run(_check(report, console))
    if options.json:
        typer.echo(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        print_verdicts(console, report)
    if options.out is not None:
        write_files(options.out, report, console)
    if report.stopped is not None:
        raise report.stopped
    raise typer.Exit(0 if report.is_worth_it else NOT_WORTH_IT_STATUS)


async def _check(report: CheckReport, console: Console) -> None:
    from outrider_bench.check.inspection import InspectOptions, inspect_pair
    from outrider_bench.check.report import DraftCheck
    from outrider_bench.check.self_test import run_self_test, wants_self_test
    from outrider_bench.check.tables import print_inspection, self_test_table

    drafts: list[str | None] = [*(report.options.drafts or ())] or [None]
    for draft in drafts:
        options = _with_vocabulary(report.options, draft)
        how = InspectOptions(
            options.dtype, options.device, options.draft_device, options.assume_same_vocabulary
        )
        inspection = await inspect_pair(options.target, draft, how)
        print_inspection(console, inspection)
        check = DraftCheck(draft, inspection, options)
        report.checks.append(check)
        if inspection.refused:
            continue
        if wants_self_test(options):
            await run_self_test(options, draft, check.self_test, console, report)
            console.print(self_test_table(check.self_test))
            console.print()
        if not (options.files_only or check.refused or report.stopped):
            await _measure(check, report, console)
        if report.stopped is not None:
            break


def _with_vocabulary(options: CheckOptions, draft: str | None) -> CheckOptions:
    """The options for this draft: synthetic pairs have one vocabulary by construction."""
    stack = StackOptions(
        target=options.target,
        draft=draft,
        assume_same_vocabulary=options.assume_same_vocabulary,
    )
    return replace(options, assume_same_vocabulary=stack.has_same_vocabulary)


async def _measure(check: DraftCheck, report: CheckReport, console: Console) -> None:
    """Acceptance along the target's text, then the real loop; prints the tables."""
    from outrider_bench.check import tables
    from outrider_bench.check.acceptance import Job, measure_acceptance
    from outrider_bench.check.loops import measure_loops
    from outrider_bench.check.results import pass_costs

    options, draft, workload = check.options, check.draft, _workload(check)
    check.prompts = workload.prompts
    job = Job(
        target=options.target,
        draft=draft,
        dtype=options.dtype,
        device=options.device,
        draft_device=options.draft_device or options.device,
        prompts=[(prompt.task, list(prompt.token_ids)) for prompt in workload.prompts],
        temperatures=options.temperature_list,
        max_tokens=options.max_tokens,
        seed=options.seed,
        ignore_eos=workload.ignores_eos,
    )
    reencodes = check.inspection.is_reencoded
    if not reencodes:
        await measure_acceptance(job, check.comparisons, console, report)
    if report.stopped is None:
        await measure_loops(
            options, draft, workload, check.loops, console, report, reencodes=reencodes
        )
    overall = check.acceptances()
    for shown in (
        tables.acceptance_table(check.acceptances(by_task=True), overall),
        tables.lookup_table(check.lookup_uses),
        tables.survival_table(overall),
        tables.cost_table(pass_costs(check.loops)),
        tables.speed_table(check.speed_ups, options.rtt_ms),
        tables.token_cost_table(check.token_costs),
    ):
        if shown.row_count:
            console.print(shown)
            console.print()


def _workload(check: DraftCheck) -> Workload:
    """Prompts of the check. Raises ConfigError if they do not fit the models."""
    from outrider.tokenizer import Tokenizer
    from outrider_bench.check import prompts

    options, shape = check.options, check.inspection.target
    tokenizer = Tokenizer.load(options.target)
    if tokenizer is None:
        if options.prompts is not None or options.task:
            raise ConfigError("--prompts, --task: the target has no tokenizer to read text with")
        own = prompts.random_prompts(shape.vocab_size, options.num_prompts, options.seed)
        workload = prompts.Workload(own, ignores_eos=True)
    else:
        chat = tokenizer.has_chat_template if options.chat is None else options.chat
        if options.prompts is not None:
            own = prompts.from_file(options.prompts, tokenizer, chat=chat)
        else:
            own = prompts.built_in(tokenizer, options.task or list(prompts.Task), chat=chat)
        workload = prompts.Workload(own)
    draft = check.inspection.draft
    longest = max(len(prompt.token_ids) for prompt in workload.prompts)
    room = min(one.max_context_len for one in (shape, draft) if one is not None)
    if longest + options.max_tokens > room:
        raise ConfigError(
            f"--max-tokens: the longest prompt has {longest} tokens, the context {room}; at most "
            f"{room - longest}"
        )
    return workload

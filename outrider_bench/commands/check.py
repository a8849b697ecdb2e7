"""`outrider check TARGET [DRAFT…]`: is this pair of models worth it, here?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.failures import require_engine
from outrider.cli.options import takes
from outrider.cli.stack_options import StackOptions

if TYPE_CHECKING:
    from rich.console import Console

    from outrider_bench.check.report import CheckReport

# 1 and 2 are the statuses of failed commands.
NOT_WORTH_IT_STATUS = 3


@dataclass(frozen=True)
class CheckOptions:
    """Flags of `outrider check`."""

    target: Annotated[str, typer.Argument(help="Target model: local directory or Hub name.")]
    drafts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DRAFT]...", help="Drafts to check with it; several are ranked."),
    ] = None
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Check the files; load no model. Takes seconds.")
    ] = False
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    draft_device: Annotated[
        str | None, typer.Option(help="Device of the draft. Default: --device.")
    ] = None
    assume_same_vocabulary: Annotated[
        bool,
        typer.Option(
            "--assume-same-vocabulary",
            help="Check the pair although one of the models has no tokenizer to compare.",
        ),
    ] = False
    json: Annotated[bool, typer.Option("--json", help="Print only the report, as JSON.")] = False


@takes(CheckOptions)
def check(options: CheckOptions) -> None:
    """Check whether speculation pays for this pair of models on this machine.

    Exit status: 0 if it does, 3 if it does not, 2 for a wrong argument or a model that cannot be
    read.
    """
    require_engine()
    from rich.console import Console

    from outrider.cli.running import run
    from outrider_bench.check.report import print_verdicts

    console = Console(stderr=options.json, highlight=False)
    report = run(_check(options, console))
    if options.json:
        typer.echo(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        print_verdicts(console, report)
    raise typer.Exit(0 if report.is_worth_it else NOT_WORTH_IT_STATUS)


async def _check(options: CheckOptions, console: Console) -> CheckReport:
    from outrider_bench.check.inspection import InspectOptions, inspect_pair
    from outrider_bench.check.report import CheckReport, DraftCheck, print_inspection

    report = CheckReport(options.target)
    drafts: list[str | None] = [*(options.drafts or ())] or [None]
    for draft in drafts:
        assumes_same = StackOptions(
            target=options.target,
            draft=draft,
            assume_same_vocabulary=options.assume_same_vocabulary,
        ).has_same_vocabulary
        how = InspectOptions(options.dtype, options.device, options.draft_device, assumes_same)
        inspection = await inspect_pair(options.target, draft, how)
        print_inspection(console, inspection)
        report.checks.append(DraftCheck(draft, inspection))
    return report

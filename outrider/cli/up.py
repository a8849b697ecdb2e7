"""`outrider up`: runs the whole system on this machine until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import typer

from outrider.cli.options import takes
from outrider.cli.stack_options import StackOptions
from outrider.quickstart_pair import PAIR_PATH

if TYPE_CHECKING:
    from outrider.cli.stack import Stack
    from outrider.cli.view import StackView

# Delay between two requests for the pairing of a draft that has not connected yet.
_POLL_INTERVAL_S = 0.5


@takes(StackOptions)
def up(options: StackOptions) -> None:
    """Run draft, target, orchestrator and Redis on this machine until Ctrl-C.

    Without options it serves the quickstart pair, a small target and draft included in Outrider.
    """
    from rich.console import Console

    from outrider.cli.failures import Signalled
    from outrider.cli.running import run
    from outrider.cli.view import StackView

    view = StackView(Console(), models=described_models(options), shows_end=True)
    served: list[str] = []  # not empty once it has served: a stop is then a success
    try:
        status = run(_up(options, view, served))
    except Signalled as error:
        status = 0 if served else error.exit_code
    raise typer.Exit(status)


async def _up(options: StackOptions, view: StackView, served: list[str]) -> int:
    async with shown_stack(options, view) as stack:
        served.append(stack.endpoint)
        _print_hints(stack, options, view)
        async with asyncio.TaskGroup() as tasks:
            warning = tasks.create_task(_warn_of_pairing(stack, view))
            try:
                return await _until_death(stack, view)
            finally:
                warning.cancel()


@contextlib.asynccontextmanager
async def shown_stack(
    options: StackOptions, view: StackView, target: str | None = None
) -> AsyncIterator[Stack]:
    """Context manager: a running system whose start the view shows; leaves no process.

    `target` as for Stack. Raises ConfigError or ProgramFailed.
    """
    from outrider.cli.stack import Stack

    stack = Stack(options, view.report, target)
    try:
        with view:
            await stack.start()
        yield stack
    finally:
        await stack.stop()


async def _warn_of_pairing(stack: Stack, view: StackView) -> None:
    """Prints a warning if the draft is refused or some of its token ids differ."""
    from outrider.client import AsyncClient
    from outrider.errors import CallFailed

    if "draft" not in stack.addresses:
        return
    with contextlib.suppress(CallFailed):  # our environment may require TLS or keys
        async with AsyncClient(stack.endpoint) as client:
            while (pairing := (await client.models()).draft_pairing) is None:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(_POLL_INTERVAL_S)
        if pairing.refused:
            warning = f"the draft is not used: {pairing.refused}"
        elif pairing.is_reencoded:
            warning = "the draft has another tokenizer and re-encodes the text: same output"
        elif pairing.num_differing_ids:
            num = pairing.num_differing_ids
            warning = f"draft and target differ in {num} token ids: same output, slower"
        else:
            return
        view.console.print(f"! {warning}", style="yellow", highlight=False, soft_wrap=True)


async def _until_death(stack: Stack, view: StackView) -> int:
    """Returns the exit status once the system no longer serves."""
    while True:
        death, still_serves = await stack.next_death()
        view.console.print(f"✘ {death}", style="bold red", highlight=False, soft_wrap=True)
        if not still_serves:
            return 1
        view.console.print(
            "  Generations continue without a draft: same output, slower.", style="red"
        )


def _print_hints(stack: Stack, options: StackOptions, view: StackView) -> None:
    from outrider.runtime.main import HTTP_PREFIX, LISTENING_PREFIX, METRICS_PREFIX

    console = view.console
    if not console.is_terminal:
        for name, address in stack.metrics.items():
            console.print(f"{name}: {METRICS_PREFIX}{address}", highlight=False, soft_wrap=True)
        if stack.http is not None:
            console.print(f"{HTTP_PREFIX}{stack.http}", highlight=False, soft_wrap=True)
        console.print(f"{LISTENING_PREFIX}{stack.endpoint}", highlight=False, soft_wrap=True)
        return
    port = stack.endpoint.rpartition(":")[2]
    endpoint_flag = "" if port == "50051" else f" --endpoint {stack.endpoint}"
    console.print(f"\n[bold green]Outrider is up[/] at [bold]{stack.endpoint}[/]", highlight=False)
    prompt = '"def fibonacci(n):"' if options.has_tokenizer else "--token-ids 1,2,3"
    console.print(f"  try    outrider generate {prompt}{endpoint_flag}", highlight=False)
    if stack.http is not None:
        console.print(f"  page   http://{stack.http}/", highlight=False)
        console.print(f"  http   OPENAI_BASE_URL=http://{stack.http}/v1", highlight=False)
    if stack.metrics:
        watched = " ".join(stack.metrics.values())
        console.print(f"  watch  outrider top {watched}", highlight=False, soft_wrap=True)
    console.print(f"  logs   {options.log_dir}", highlight=False, soft_wrap=True)
    console.print("  stop   Ctrl-C\n", highlight=False)


def described_models(options: StackOptions) -> dict[str, str]:
    """What to show beside each model service, by its name."""
    descriptions = {}
    for name, simulation in (
        ("target", options.simulate_target),
        ("draft", options.simulate_draft),
    ):
        if simulation is not None:
            descriptions[name] = f"simulated: {simulation}"
    for name, model in (("target", options.target_model), ("draft", options.draft_model)):
        if model is not None and name not in descriptions:
            descriptions[name] = "quickstart pair" if model.startswith(str(PAIR_PATH)) else model
    if options.inflate_parameters and options.simulate_target is None:
        descriptions["target"] += (
            f", at the cost of {options.inflate_parameters / 1e6:.0f} M parameters"
        )
    return descriptions

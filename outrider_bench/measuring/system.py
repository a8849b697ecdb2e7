"""Measured system: the flags common to all benchmarks, and the start of the system.

Owns the translation of these flags to `StackOptions`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from outrider.cli.stack_options import StackOptions, private_stack
from outrider.errors import ConfigError
from outrider_bench.measuring.cores import CoreLayout, CoreUse, core_per_tier

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.cli.stack import Stack
    from outrider.client import AsyncClient, Models
    from outrider_bench.measuring.workload import Prompts

# With --quick the quickstart target keeps its own size: it then costs no more than its draft.
_QUICK_INFLATE = "0"
# The orchestrator serves without a draft until the draft service answers.
_DRAFT_TIMEOUT_S = 60.0
_POLL_INTERVAL_S = 0.02


@dataclass(frozen=True)
class BenchOptions:
    """Flags common to all benchmarks."""

    target: Annotated[
        str | None,
        typer.Option(
            help="Directory or name on the Hugging Face Hub. Default: the quickstart target."
        ),
    ] = None
    draft: Annotated[
        str | None, typer.Option(help="Same for the draft. Default: the quickstart draft.")
    ] = None
    inflate: Annotated[
        str | None,
        typer.Option(help="Cost of the quickstart target in parameters; as in `outrider up`."),
    ] = None
    simulate_target: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Simulate the target; as in `outrider up`."),
    ] = None
    simulate_draft: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Simulate the draft; as in `outrider up`.")
    ] = None
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    draft_device: Annotated[
        str | None, typer.Option(help="Device of the draft. Default: --device.")
    ] = None
    cores: Annotated[
        CoreUse,
        typer.Option(help="pinned: one core each for target and draft; shared: no pinning."),
    ] = CoreUse.pinned
    kv_cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens of KV cache in each model service.")
    ] = None
    prompts: Annotated[int, typer.Option(min=1, help="Number of different prompts.")] = 4
    prompt_len: Annotated[
        int, typer.Option(min=1, help="Tokens per prompt, for models without a tokenizer.")
    ] = 32
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per output.")] = 128
    repetitions: Annotated[int, typer.Option(min=1, help="Repetitions of every measurement.")] = 3
    seed: Annotated[int, typer.Option(help="Seed of prompts and sampling.")] = 0
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the plot.")] = Path(
        "bench-results"
    )
    quick: Annotated[
        bool, typer.Option("--quick", help="Smoke test in seconds; its results are meaningless.")
    ] = False

    @property
    def is_simulated(self) -> bool:
        return self.simulate_target is not None

    def refuse_models(self) -> None:
        """Raises ConfigError for options of models: the command simulates the tiers."""
        for name in ("target", "draft", "inflate", "simulate_target", "simulate_draft"):
            if getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag}: not allowed: this command simulates the tiers")

    def with_quick_defaults(self, **small: Any) -> Self:
        """With `--quick`: `small` values for all options that still have their defaults."""
        if not self.quick:
            return self
        small |= {"prompts": 1, "max_tokens": 16, "repetitions": 1}
        if self.target is None:
            small["inflate"] = _QUICK_INFLATE
        defaults = {field.name: field.default for field in fields(self)}
        changes = {k: v for k, v in small.items() if getattr(self, k) == defaults[k]}
        return replace(self, **changes)

    def stack_options(self, layout: CoreLayout, **changes: Any) -> StackOptions:
        """StackOptions of a separate system on free ports. `changes` override options."""
        given: dict[str, Any] = {
            "target_cpus": layout.target,
            "draft_cpus": layout.draft,
            "orchestrator_cpus": layout.orchestrator,
        }
        for name in ("simulate_target", "simulate_draft"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        shared = ("target", "draft", "inflate", "dtype", "device", "draft_device")
        given |= {name: getattr(self, name) for name in (*shared, "kv_cache_tokens")}
        return private_stack(StackOptions(**(given | changes)))


@dataclass(frozen=True)
class System:
    """Running system with no other clients than the benchmark."""

    client: AsyncClient
    stack: Stack
    info: Models
    prompts: Prompts
    layout: CoreLayout

    def require_draft(self) -> None:
        """Raises ConfigError unless a draft is connected and paired."""
        pairing = self.info.draft_pairing
        if pairing is not None and pairing.refused:
            raise ConfigError(f"--draft: {pairing.refused}")
        if self.info.draft is None:
            raise ConfigError("--draft: no draft is connected; this benchmark needs one")


async def wait_for_draft(client: AsyncClient, has_draft: bool) -> Models:
    """Waits until the orchestrator has a draft, or until it has none; returns its model info."""
    while True:
        info = await client.models()
        if (info.draft is not None) == has_draft:
            return info
        await asyncio.sleep(_POLL_INTERVAL_S)


async def settled_info(client: AsyncClient, stack: Stack) -> Models:
    """Model info after the draft has joined.

    After a time-out, or if the system has no draft, the info is without one.
    """
    if "draft" in stack.addresses:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAFT_TIMEOUT_S):
                return await wait_for_draft(client, True)
    return await client.models()


@contextlib.asynccontextmanager
async def measured_system(
    options: BenchOptions,
    console: Console,
    layout: Callable[[CoreUse], CoreLayout] = core_per_tier,
    **changes: Any,
) -> AsyncIterator[System]:
    """Starts a system and stops all its processes at the end. `changes` override StackOptions.

    Raises ConfigError or ProgramFailed.
    """
    from outrider.cli.up import described_models, shown_stack
    from outrider.cli.view import StackView
    from outrider.client import AsyncClient
    from outrider_bench.measuring.workload import Prompts

    cores = layout(options.cores)
    changes = {"log_dir": options.out / "logs"} | changes
    stack_options = options.stack_options(cores, **changes)
    view = StackView(console, models=described_models(stack_options), stays=False)
    with cores.pins_this_process():
        async with (
            shown_stack(stack_options, view) as stack,
            AsyncClient(stack.endpoint, resume_for_s=0.0) as client,
        ):
            info = await settled_info(client, stack)
            model = stack_options.target_model if stack_options.has_tokenizer else None
            prompts = Prompts(
                info.target.vocab_size,
                tokenizer=None if options.is_simulated else model,
                seed=options.seed,
                length=options.prompt_len,
            )
            yield System(client, stack, info, prompts, cores)

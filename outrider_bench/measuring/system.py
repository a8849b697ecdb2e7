"""The system that is measured: the flags that every benchmark has, and its start.

Owns the translation of those flags to `StackOptions`. Knows no benchmark.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from outrider.cli.stack_options import StackOptions, kept_to_itself
from outrider.errors import ConfigError
from outrider_bench.measuring.cores import CoreLayout, CoreUse, apart

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.cli.stack import Stack
    from outrider.client.client import Client
    from outrider.v1.orchestrator_pb2 import GetModelInfoResponse
    from outrider_bench.measuring.workload import Prompts

# In the quickstart pair's own size its target is no dearer than its draft.
_QUICK_INFLATE = "0"
# An orchestrator serves without a draft that is slow to answer; it joins when it does.
_DRAFT_JOINS_S = 60.0
_LOOK_S = 0.02


@dataclass(frozen=True)
class BenchOptions:
    """What all benchmarks share."""

    target: Annotated[
        str | None, typer.Option(help="Directory or hub name. Default: the quickstart target.")
    ] = None
    draft: Annotated[str | None, typer.Option(help="Likewise.")] = None
    inflate: Annotated[
        str | None, typer.Option(help="As in `outrider up`: of the quickstart target.")
    ] = None
    simulate_target: Annotated[
        str | None, typer.Option(metavar="SPEC", help="As in `outrider up`: no model, its times.")
    ] = None
    simulate_draft: Annotated[str | None, typer.Option(metavar="SPEC", help="Likewise.")] = None
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    draft_device: Annotated[str | None, typer.Option(help="The draft's, where it is another.")] = (
        None
    )
    cores: Annotated[CoreUse, typer.Option(help="pinned: target and draft have one core each.")] = (
        CoreUse.pinned
    )
    kv_cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens of KV cache in each model service.")
    ] = None
    prompts: Annotated[int, typer.Option(min=1, help="Different prompts.")] = 4
    prompt_len: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt, without a tokenizer.")
    ] = 32
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each output.")] = 128
    repetitions: Annotated[int, typer.Option(min=1, help="Times that all is measured.")] = 3
    seed: Annotated[int, typer.Option(help="Of prompts and samples.")] = 0
    out: Annotated[Path, typer.Option(help="Where the JSON and the plot go.")] = Path(
        "bench-results"
    )
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke test in seconds; its figures mean nothing.")
    ] = False

    @property
    def is_simulated(self) -> bool:
        return self.simulate_target is not None

    def quickened(self, **least: Any) -> Self:
        """With `--quick`: as little as says that it works, of all that was not given otherwise."""
        if not self.quick:
            return self
        least |= {"prompts": 1, "max_tokens": 16, "repetitions": 1}
        if self.target is None:
            least["inflate"] = _QUICK_INFLATE
        defaults = {field.name: field.default for field in fields(self)}
        changes = {k: v for k, v in least.items() if getattr(self, k) == defaults[k]}
        return replace(self, **changes)

    def stack_options(self, layout: CoreLayout, **changes: Any) -> StackOptions:
        """A system of its own on free ports."""
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
        return kept_to_itself(StackOptions(**(given | changes)))


@dataclass(frozen=True)
class System:
    """Running, and idle but for what the benchmark asks of it."""

    client: Client
    stack: Stack
    info: GetModelInfoResponse
    prompts: Prompts
    layout: CoreLayout

    def require_draft(self) -> None:
        if self.info.draft_pairing.refused:
            raise ConfigError(f"--draft: {self.info.draft_pairing.refused}")
        if not self.info.HasField("draft"):
            raise ConfigError("--draft: is required; without one there is nothing to compare")


async def until_draft(client: Client, has_draft: bool) -> GetModelInfoResponse:
    """Returns once the orchestrator has a draft, or has none; what it reports then."""
    while True:
        info = await client.model_info()
        if info.HasField("draft") == has_draft:
            return info
        await asyncio.sleep(_LOOK_S)


async def settled_info(client: Client, stack: Stack) -> GetModelInfoResponse:
    """What the system reports once its draft, if it has one, has joined; at last without it."""
    if "draft" in stack.addresses:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAFT_JOINS_S):
                return await until_draft(client, True)
    return await client.model_info()


@contextlib.asynccontextmanager
async def measured_system(
    options: BenchOptions,
    console: Console,
    layout: Callable[[CoreUse], CoreLayout] = apart,
    **changes: Any,
) -> AsyncIterator[System]:
    """Serves on entering; leaves no process. `changes`: of the StackOptions.

    Raises ConfigError or ProgramFailed.
    """
    from outrider.cli.up import described_models, shown_stack
    from outrider.cli.view import StackView
    from outrider.client.client import connected
    from outrider_bench.measuring.workload import Prompts

    cores = layout(options.cores)
    changes = {"log_dir": options.out / "logs"} | changes
    stack_options = options.stack_options(cores, **changes)
    view = StackView(console, models=described_models(stack_options), stays=False)
    with cores.pins_this_process():
        async with (
            shown_stack(stack_options, view) as stack,
            connected(stack.endpoint) as client,
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

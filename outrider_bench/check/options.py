"""Flags of `outrider check`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from outrider.cli.options import parse_list
from outrider.errors import ConfigError
from outrider_bench.check.prompts import Task
from outrider_bench.measuring.cores import CoreUse

_MAX_GAMMA = 64


@dataclass(frozen=True)
class CheckOptions:
    """Flags of `outrider check`."""

    target: Annotated[str, typer.Argument(help="Target model: local directory or Hub name.")]
    drafts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DRAFT]...",
            help="Drafts to check with it; several are ranked. None: prompt lookup alone.",
        ),
    ] = None
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Check the files; load no model.")
    ] = False
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts: one per line, or .jsonl with prompt, text or messages, and "
            "task. Default: built-in ones of each --task."
        ),
    ] = None
    task: Annotated[
        list[Task] | None, typer.Option(help="Built-in prompts of this task only; repeatable.")
    ] = None
    chat: Annotated[
        bool | None,
        typer.Option(help="Put prompts into the chat template. Default: if the target has one."),
    ] = None
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Random prompts, for models without a tokenizer.")
    ] = 64
    temperatures: Annotated[str, typer.Option(help="Sampling temperatures; 0 is greedy.")] = (
        "0,0.7,1"
    )
    max_tokens: Annotated[int, typer.Option(min=4, help="Tokens per output.")] = 64
    max_gamma: Annotated[
        int, typer.Option(min=1, max=_MAX_GAMMA, help="Largest γ of the predictions.")
    ] = 16
    streams: Annotated[str, typer.Option(help="Numbers of concurrent streams.")] = "1,4,16"
    rtt_ms: Annotated[
        float, typer.Option(min=0, help="Network to the draft and back, in milliseconds.")
    ] = 0.0
    repetitions: Annotated[
        int,
        typer.Option(min=0, help="Measurements of every speed-up; 0: predict without measuring."),
    ] = 2
    outputs: Annotated[
        int, typer.Option(min=1, help="Outputs per measurement; at least one per stream.")
    ] = 6
    target_cost: Annotated[
        float | None,
        typer.Option(min=0, help="Cost of a target replica per hour, in any currency."),
    ] = None
    draft_cost: Annotated[
        float | None, typer.Option(min=0, help="Cost of a draft replica per hour.")
    ] = None
    min_speed_up: Annotated[
        float, typer.Option(min=1, help="Speed-up from which on a draft is worth it.")
    ] = 1.1
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    draft_device: Annotated[
        str | None, typer.Option(help="Device of the draft. Default: --device.")
    ] = None
    cores: Annotated[
        CoreUse,
        typer.Option(help="pinned: one core each for target and draft; shared: no pinning."),
    ] = CoreUse.shared
    self_test: Annotated[
        bool | None,
        typer.Option(
            "--self-test/--no-self-test",
            help="First compare the engine's logits with plain attention. Default: on a GPU.",
        ),
    ] = None
    assume_same_vocabulary: Annotated[
        bool,
        typer.Option(
            "--assume-same-vocabulary",
            help="Check the pair although one of the models has no tokenizer to compare.",
        ),
    ] = False
    seed: Annotated[int, typer.Option(help="Seed of sampling and of random prompts.")] = 0
    json: Annotated[bool, typer.Option("--json", help="Print only the report, as JSON.")] = False
    out: Annotated[
        Path | None, typer.Option(help="Folder for check.json and the plot. Default: no files.")
    ] = None

    def check(self) -> None:
        """Raises ConfigError for a list that cannot be read."""
        if self.draft_cost is not None and self.target_cost is None:
            raise ConfigError("--draft-cost: needs --target-cost")
        if not self.temperature_list or not self.stream_list or min(self.stream_list) < 1:
            raise ConfigError("--streams: must be 1 or more")

    @property
    def temperature_list(self) -> list[float]:
        return sorted(set(parse_list(self.temperatures, "--temperatures", float)))

    @property
    def stream_list(self) -> list[int]:
        return sorted(set(parse_list(self.streams, "--streams", int)))

"""What the operator chooses about a system on this machine: the flags of `outrider up`.

Plain data, light to import. Knows nothing of processes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from outrider.cli.options import parse_count, parse_cpus
from outrider.quickstart_pair import DRAFT_PATH, TARGET_PATH
from outrider.settings.loader import require_plain_programs

DEFAULT_INFLATE = "300M"
NO_DRAFT = "none"
# As `outrider_bench.models.synthetic` names it; that imports torch (a test compares).
MADE_PAIR = "pair.json"


@dataclass(frozen=True)
class StackOptions:
    """The flags of `outrider up`; None leaves a program's own default."""

    target: Annotated[
        str | None, typer.Option(help="Directory or hub name. Default: the quickstart target.")
    ] = None
    draft: Annotated[
        str | None,
        typer.Option(
            help="Directory or hub name; 'none': no draft. Default: the quickstart draft "
            "with the quickstart target, else none."
        ),
    ] = None
    inflate: Annotated[
        str | None,
        typer.Option(
            help="Pad the quickstart target to the cost of so many parameters (300M); 0: off. "
            f"Default: {DEFAULT_INFLATE}."
        ),
    ] = None
    simulate_target: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="No model: passes that cost step_ms=25,row_ms=0.5."),
    ] = None
    simulate_draft: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Likewise, with survival=0.8/0.75 and ranks=0.5/0.2."),
    ] = None
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    draft_device: Annotated[str | None, typer.Option(help="The draft's, where it is another.")] = (
        None
    )
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 50051
    redis_url: Annotated[
        str | None,
        typer.Option(envvar="REDIS_URL", help="Default: a server of our own, without persistence."),
    ] = None
    gamma: Annotated[
        int | None, typer.Option(help="Draft tokens per round. Default: what they are worth.")
    ] = None
    max_gamma: Annotated[
        int | None, typer.Option(help="Most draft tokens per round a request may ask for.")
    ] = None
    lookahead: Annotated[
        int | None, typer.Option(help="Rounds drafted ahead of the verdict; 0: none.")
    ] = None
    fan_out: Annotated[
        int | None, typer.Option(help="Most outcomes of a round that are drafted ahead.")
    ] = None
    draft_wait_ms: Annotated[
        float | None,
        typer.Option(help="Longest wait for a proposal. Default: as long as it is worth."),
    ] = None
    kv_cache_tokens: Annotated[
        int | None, typer.Option(help="Tokens of KV cache in each model service.")
    ] = None
    target_threads: Annotated[
        int | None, typer.Option(help="CPU threads. Default: all cores but one.")
    ] = None
    draft_threads: Annotated[int | None, typer.Option(help="CPU threads. Default: 1.")] = None
    target_cpus: Annotated[
        str | None, typer.Option(help="Cores of its own, as taskset names them: 0 or 0-3,6.")
    ] = None
    draft_cpus: Annotated[str | None, typer.Option(help="Likewise the draft's.")] = None
    orchestrator_cpus: Annotated[str | None, typer.Option(help="Likewise the orchestrator's.")] = (
        None
    )
    draft_delay_ms: Annotated[
        float | None,
        typer.Option(min=0, help="Delay the draft's link by so much, each way: a network to try."),
    ] = None
    assume_same_vocabulary: Annotated[
        bool,
        typer.Option(
            "--assume-same-vocabulary",
            help="Use a draft although one of the models has no tokenizer to compare.",
        ),
    ] = False
    max_generations: Annotated[int | None, typer.Option(help="Generations at a time.")] = None
    max_waiting: Annotated[
        int | None, typer.Option(help="Requests that may wait for their turn; more are refused.")
    ] = None
    metrics: Annotated[
        bool, typer.Option(help="Serve each program's metrics on a free port, for `outrider top`.")
    ] = False
    log_dir: Annotated[Path, typer.Option(help="One log file for each program.")] = Path(
        ".outrider/logs"
    )

    @property
    def target_model(self) -> str:
        return self.target or str(TARGET_PATH)

    @property
    def draft_model(self) -> str | None:
        """None: no draft, or a simulated one."""
        if self.draft == NO_DRAFT or self.simulate_target is not None:
            return None
        return self.draft or (None if self.target else str(DRAFT_PATH))

    def cpus(self, program: str) -> frozenset[int]:
        """The cores that are kept for `target`, `draft` or `orchestrator`; empty: any."""
        cores = getattr(self, f"{program}_cpus")
        return parse_cpus(cores, f"--{program}-cpus") if cores else frozenset()

    @property
    def inflate_parameters(self) -> int:
        """0: off."""
        if self.inflate is None:
            return 0 if self.target else parse_count(DEFAULT_INFLATE, "--inflate")
        return parse_count(self.inflate, "--inflate")

    @property
    def has_tokenizer(self) -> bool:
        """A directory without one is served by token ids; a hub name is for the program to see."""
        if self.simulate_target is not None:
            return False
        from outrider.tokenizer_files import TOKENIZERS

        directory = Path(self.target_model).expanduser()
        return not directory.is_dir() or any((directory / name).is_file() for name in TOKENIZERS)

    @property
    def has_same_vocabulary(self) -> bool:
        """Known without tokenizers to compare: of the models that `bench pair` has made."""
        if self.assume_same_vocabulary or self.draft_model is None:
            return self.assume_same_vocabulary
        home, other = (Path(model).expanduser().resolve().parent
                       for model in (self.target_model, self.draft_model))  # fmt: skip
        return home == other and (home / MADE_PAIR).is_file()


def kept_to_itself(options: StackOptions) -> StackOptions:
    """For a system that one command keeps to itself: on a free port.

    Raises ConfigError where our environment would have it ask for TLS or keys.
    """
    require_plain_programs()
    return replace(options, host="127.0.0.1", port=0)

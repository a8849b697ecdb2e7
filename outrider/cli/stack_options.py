"""Flags of `outrider up` and of other commands that run a system. Imports no heavy package."""

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
NO_HTTP = "none"
# As vLLM's.
DEFAULT_HTTP_PORT = 8000
# Named as in `outrider_bench.models.synthetic`, which imports torch; a test compares the names.
MADE_PAIR = "pair.json"


@dataclass(frozen=True)
class StackOptions:
    """Flags of `outrider up`; None leaves the program's own default."""

    target: Annotated[
        str | None,
        typer.Option(
            help="Target model: local directory or Hub name. Default: the quickstart target."
        ),
    ] = None
    draft: Annotated[
        str | None,
        typer.Option(
            help="Draft model: local directory or Hub name; none: no draft. Default: the "
            "quickstart draft with the quickstart target, otherwise none."
        ),
    ] = None
    inflate: Annotated[
        str | None,
        typer.Option(
            help="Pad the quickstart target to the cost of a model with this many parameters; "
            f"0: off. Default: {DEFAULT_INFLATE}."
        ),
    ] = None
    simulate_target: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Simulate the target: cost of its passes, for instance step_ms=25,row_ms=0.5.",
        ),
    ] = None
    simulate_draft: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Simulate the draft: cost and acceptance, for instance "
            "step_ms=2,survival=0.8/0.75.",
        ),
    ] = None
    dtype: Annotated[str, typer.Option(help="Weights: auto, float32, bfloat16 or float16.")] = (
        "auto"
    )
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")] = "auto"
    draft_device: Annotated[
        str | None, typer.Option(help="Device of the draft. Default: that of --device.")
    ] = None
    host: Annotated[str, typer.Option(help="Host name or IP address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 50051
    http_port: Annotated[
        str | None,
        typer.Option(
            help="Port of OpenAI-compatible HTTP; 0 picks a free one; none: no HTTP. Default: "
            f"{DEFAULT_HTTP_PORT}, or a free one if that is in use."
        ),
    ] = None
    redis_url: Annotated[
        str | None,
        typer.Option(
            envvar="REDIS_URL",
            help="Redis for the sessions. Default: an embedded server without persistence.",
        ),
    ] = None
    gamma: Annotated[
        int | None,
        typer.Option(
            help="Draft tokens per round (γ) of requests that set none. Default: adaptive."
        ),
    ] = None
    max_gamma: Annotated[
        int | None, typer.Option(help="Maximum draft tokens per round that a request may set.")
    ] = None
    lookahead: Annotated[
        int | None, typer.Option(help="Maximum rounds drafted ahead of verification; 0: none.")
    ] = None
    fan_out: Annotated[
        int | None, typer.Option(help="Maximum verify outcomes per round that are drafted ahead.")
    ] = None
    draft_wait_ms: Annotated[
        float | None,
        typer.Option(help="Longest wait for draft tokens in milliseconds. Default: adaptive."),
    ] = None
    prompt_lookup: Annotated[
        bool | None, typer.Option(help="Draft tokens from earlier text, where that is faster.")
    ] = None
    kv_cache_tokens: Annotated[
        int | None, typer.Option(help="KV cache size of each model service, in tokens.")
    ] = None
    target_threads: Annotated[
        int | None, typer.Option(help="CPU threads of the target. Default: all cores but one.")
    ] = None
    draft_threads: Annotated[
        int | None, typer.Option(help="CPU threads of the draft. Default: 1.")
    ] = None
    target_cpus: Annotated[
        str | None, typer.Option(help="CPUs to pin the target to, as for taskset: 0 or 0-3,6.")
    ] = None
    draft_cpus: Annotated[str | None, typer.Option(help="CPUs to pin the draft to.")] = None
    orchestrator_cpus: Annotated[
        str | None, typer.Option(help="CPUs to pin the orchestrator to.")
    ] = None
    draft_delay_ms: Annotated[
        float | None,
        typer.Option(
            min=0, help="Delay added to the draft's link in each direction, to simulate a network."
        ),
    ] = None
    assume_same_vocabulary: Annotated[
        bool,
        typer.Option(
            "--assume-same-vocabulary",
            help="Use the draft although one of the models has no tokenizer to compare.",
        ),
    ] = False
    chat_template: Annotated[
        Path | None,
        typer.Option(help="File with a chat template (Jinja) to use instead of the target's."),
    ] = None
    target_tokenizer: Annotated[
        str | None,
        typer.Option(
            help="For a draft with another tokenizer: the target's, usually --target again. The "
            "draft re-encodes the text."
        ),
    ] = None
    max_generations: Annotated[
        int | None, typer.Option(help="Maximum generations that run at a time.")
    ] = None
    max_waiting: Annotated[
        int | None, typer.Option(help="Maximum queued requests; further ones are rejected.")
    ] = None
    audit_share: Annotated[
        float | None,
        typer.Option(help="Share of the generations to audit: see `outrider audit`. Default: 0."),
    ] = None
    audit_planted_bias: Annotated[
        float | None,
        typer.Option(
            help="Plant a defect to try the audit, for instance 0.01: sampled outputs are WRONG."
        ),
    ] = None
    metrics: Annotated[
        bool, typer.Option(help="Serve each program's metrics on a free port, for `outrider top`.")
    ] = False
    log_dir: Annotated[Path, typer.Option(help="Directory of the log files, one per program.")] = (
        Path(".outrider/logs")
    )

    @property
    def target_model(self) -> str:
        return self.target or str(TARGET_PATH)

    @property
    def draft_model(self) -> str | None:
        """Directory or Hub name of the draft; None: no draft, or a simulated one."""
        if self.draft == NO_DRAFT or self.simulate_target is not None:
            return None
        return self.draft or (None if self.target else str(DRAFT_PATH))

    def cpus(self, program: str) -> frozenset[int]:
        """CPUs of `target`, `draft` or `orchestrator`; empty: any. Raises ConfigError."""
        cores = getattr(self, f"{program}_cpus")
        return parse_cpus(cores, f"--{program}-cpus") if cores else frozenset()

    @property
    def inflate_parameters(self) -> int:
        """Number of parameters to pad the target to; 0: off. Raises ConfigError."""
        if self.inflate is None:
            return 0 if self.target else parse_count(DEFAULT_INFLATE, "--inflate")
        return parse_count(self.inflate, "--inflate")

    @property
    def has_tokenizer(self) -> bool:
        """Whether the target has a tokenizer; otherwise requests use token ids.

        Assumed for a Hub name: its files are not looked up here.
        """
        if self.simulate_target is not None:
            return False
        from outrider.tokenizer_files import TOKENIZERS

        directory = Path(self.target_model).expanduser()
        return not directory.is_dir() or any((directory / name).is_file() for name in TOKENIZERS)

    @property
    def has_same_vocabulary(self) -> bool:
        """Whether to pair the models without comparing tokenizers.

        True for models that `outrider bench pair` has made, which have none.
        """
        if self.assume_same_vocabulary or self.draft_model is None:
            return self.assume_same_vocabulary
        home, other = (Path(model).expanduser().resolve().parent
                       for model in (self.target_model, self.draft_model))  # fmt: skip
        return home == other and (home / MADE_PAIR).is_file()


def private_stack(options: StackOptions) -> StackOptions:
    """Options of a system for one command's own use: it listens on a free local port, without HTTP.

    Raises ConfigError if an environment variable would make the system require TLS or API keys.
    """
    require_plain_programs()
    return replace(options, host="127.0.0.1", port=0, http_port=NO_HTTP)

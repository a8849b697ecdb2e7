"""Flags of `outrider bench serve`, and their translation to a load."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outrider.cli.access import AccessOptions
from outrider.cli.request import DEFAULT_ENDPOINT, Method
from outrider.errors import ConfigError

if TYPE_CHECKING:
    from outrider_bench.loadtest.campaign import LoadPattern, Variant
    from outrider_bench.loadtest.plan import Conversation
    from outrider_bench.loadtest.slo import Slo

ON, OFF = "speculation", "off"

_DEFAULT_CALLERS = 8
_DEFAULT_REQUESTS = 200
# Maximum of 32-bit request fields.
_MAX_INT32 = 2**31 - 1
_LENGTHS = "Tokens: 128, uniform:64:256, or lognormal:MEDIAN:SIGMA[:MAX]."
# Options that a trace defines itself.
_DEFINED_BY_TRACE = ("input_len", "output_len", "turns", "texts", "priority")


@dataclass(frozen=True)
class ServeOptions(AccessOptions):
    """Flags of `outrider bench serve`. None: the server's default, unless the help differs."""

    endpoint: Annotated[
        str,
        typer.Option(
            envvar="OUTRIDER_ENDPOINT",
            help="host:port of the orchestrator, or a comma-separated list. Connections are spread "
            "over all addresses of a name.",
        ),
    ] = DEFAULT_ENDPOINT
    http: Annotated[
        str | None,
        typer.Option(
            help="Send requests over OpenAI's HTTP, to this URL or comma-separated list of URLs, "
            "such as http://127.0.0.1:8000, instead of gRPC to --endpoint."
        ),
    ] = None
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Send prompts as a user's messages, with the chat template."),
    ] = False
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="The model's folder or Hub name, for random prompts over HTTP or in chats."
        ),
    ] = None
    connections: Annotated[
        int,
        typer.Option(
            min=1,
            max=256,
            help="gRPC connections per address, to spread load behind a load balancer.",
        ),
    ] = 8
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Requests per variant. Default: 200, or the whole trace."),
    ] = None
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Closed loop: number of clients. Default: 8 without --rate. With --rate: the most "
            "requests that run at a time; others wait.",
        ),
    ] = None
    rate: Annotated[
        float | None, typer.Option(help="Open loop: requests per second, independent of responses.")
    ] = None
    burstiness: Annotated[
        float,
        typer.Option(
            help="Of --rate: 1 is a Poisson process, less is more bursty, inf: constant gaps."
        ),
    ] = 1.0
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Trace file, replayed at its own times unless --rate or --concurrency is given."
        ),
    ] = None
    trace_format: Annotated[
        str | None,
        typer.Option(
            help="outrider, mooncake, azure, burstgpt or sharegpt. Default: detected by its fields."
        ),
    ] = None
    trace_speed: Annotated[
        float,
        typer.Option(help="Divides the times of the trace; 1000 if they are in milliseconds."),
    ] = 1.0
    input_len: Annotated[str, typer.Option(help=f"Length of prompts. {_LENGTHS}")] = "128"
    output_len: Annotated[str, typer.Option(help=f"Length of outputs. {_LENGTHS}")] = "128"
    turns: Annotated[str, typer.Option(help="Turns per session; more than 1 uses sessions.")] = "1"
    texts: Annotated[
        Path | None,
        typer.Option(help="File with one prompt per line. Default: random token ids."),
    ] = None
    stop_at_eos: Annotated[
        bool,
        typer.Option("--stop-at-eos", help="End outputs at EOS. Default: --output-len tokens."),
    ] = False
    warm_up: Annotated[int, typer.Option(min=0, help="Warm-up requests per variant.")] = 8
    repetitions: Annotated[
        int, typer.Option(min=1, help="Parts of the load, each run with and without speculation.")
    ] = 2
    slo: Annotated[
        str, typer.Option(help="Service-level objective: ttft=200ms,tpot=30ms,e2e=2s.")
    ] = ""
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Find the highest rate that meets --slo; starts at --rate."),
    ] = False
    attain: Annotated[
        float,
        typer.Option(min=0, max=1, help="Of --sweep: share of requests that must meet --slo."),
    ] = 0.99
    precision: Annotated[
        float, typer.Option(min=0.01, help="Of --sweep: relative precision of the rate.")
    ] = 0.1
    gamma: Annotated[
        int | None,
        typer.Option(min=1, max=_MAX_INT32, help="Fixed number of draft tokens per round."),
    ] = None
    lookahead: Annotated[
        int | None, typer.Option(min=0, max=_MAX_INT32, help="Look-ahead: rounds drafted ahead.")
    ] = None
    fan_out: Annotated[
        int | None, typer.Option(min=0, max=_MAX_INT32, help="Fan-out: branches drafted ahead.")
    ] = None
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0
    verification: Annotated[Method | None, typer.Option(help="Verification method.")] = None
    fast: Annotated[bool, typer.Option("--fast", help="Send tokens before they are recorded.")] = (
        False
    )
    priority: Annotated[
        int | None,
        typer.Option(min=-_MAX_INT32, max=_MAX_INT32, help="Lower runs first."),
    ] = None
    timeout: Annotated[
        float | None, typer.Option(help="Deadline of each request, seconds. Default: none.")
    ] = None
    target_endpoint: Annotated[
        str | None,
        typer.Option(
            help="host:port of all target replicas (comma-separated, no TLS), to count passes."
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Seed of prompts, lengths and arrivals.")
    ] = 0
    label: Annotated[str | None, typer.Option(help="Label in the result.")] = None
    detailed: Annotated[
        bool, typer.Option("--detailed", help="Include all times of every request in the JSON.")
    ] = False
    html: Annotated[bool, typer.Option(help="Write the HTML report with plots.")] = True
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the report.")] = Path(
        "bench-results"
    )
    name: Annotated[str, typer.Option(help="Name of the files.")] = "serve"

    def check(self) -> None:
        """Raises ConfigError naming the flag."""
        if self.rate is None and self.burstiness != 1.0:
            raise ConfigError("--burstiness: requires --rate")
        if self.trace is None and self.trace_speed != 1.0:
            raise ConfigError("--trace-speed: requires --trace")
        if self.trace is None and self.trace_format is not None:
            raise ConfigError("--trace-format: requires --trace")
        if self.trace is not None:
            defaults = ServeOptions()
            for name in _DEFINED_BY_TRACE:
                if getattr(self, name) != getattr(defaults, name):
                    raise ConfigError(
                        f"--{name.replace('_', '-')}: cannot be combined with --trace"
                    )
        if self.texts is not None and self.input_len != ServeOptions.input_len:
            raise ConfigError("--input-len: cannot be combined with --texts")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise ConfigError(f"--timeout: {self.timeout:g} is out of range: above 0 and finite")
        if not self.name or self.name != Path(self.name).name:
            raise ConfigError(f"--name: {self.name!r} is not a file name")
        if self.http is not None:
            # --endpoint may be set in the environment, for other commands.
            if self.connections != ServeOptions.connections:
                raise ConfigError("--connections: is for gRPC; cannot be combined with --http")
        elif self.tokenizer is not None and not self.chat:
            raise ConfigError("--tokenizer: only with --http or --chat")
        if self.sweep:
            self._check_sweep()
        elif (self.attain, self.precision) != (ServeOptions.attain, ServeOptions.precision):
            raise ConfigError("--attain, --precision: require --sweep")

    def _check_sweep(self) -> None:
        if not self.slo:
            raise ConfigError("--sweep: requires --slo")
        if self.rate is None:
            raise ConfigError("--sweep: requires --rate, the first rate to try")
        if self.concurrency is not None:
            raise ConfigError("--concurrency: cannot be combined with --sweep")

    @property
    def is_trace_replay(self) -> bool:
        """Whether requests are sent at the times of the trace."""
        return self.trace is not None and self.rate is None and self.concurrency is None


def parse_slo(options: ServeOptions) -> Slo | None:
    """Objective of --slo; None without it. Raises ConfigError."""
    from outrider_bench.loadtest.slo import Slo

    return Slo.parse(options.slo) or None


def load_pattern(options: ServeOptions) -> LoadPattern:
    """Arrivals of visits: open loop, trace replay or closed loop."""
    from outrider_bench.loadtest.campaign import LoadPattern

    if options.rate is not None:
        return LoadPattern(options.concurrency, options.rate, options.burstiness)
    if options.is_trace_replay:
        return LoadPattern()
    return LoadPattern(num_clients=options.concurrency or _DEFAULT_CALLERS)


def planned_visits(
    options: ServeOptions, note: Callable[[str], None] = lambda text: None
) -> list[Conversation]:
    """Visits to run. `note` receives a message about skipped requests of a trace.

    Raises ConfigError.
    """
    from outrider_bench.loadtest.arrivals import arrival_times
    from outrider_bench.loadtest.lengths import Lengths
    from outrider_bench.loadtest.plan import Workload
    from outrider_bench.loadtest.trace import read_trace

    if options.rate is not None:  # checked before anything is sent
        import numpy as np

        arrival_times(options.rate, 1, np.random.default_rng(0), burstiness=options.burstiness)
    if options.trace is not None:
        trace = read_trace(
            options.trace,
            name=options.trace_format,
            speed=options.trace_speed,
            num_requests=options.requests,
        )
        if trace.num_left_out:
            note(f"{trace.num_left_out} requests of the trace have no output and are skipped")
        if options.is_trace_replay and trace.conversations[0].at_s is None:
            raise ConfigError(f"--trace: {options.trace} has no times; add --rate or --concurrency")
        return trace.conversations
    workload = Workload(
        input_len=Lengths.parse(options.input_len, "--input-len"),
        output_len=Lengths.parse(options.output_len, "--output-len"),
        num_turns=Lengths.parse(options.turns, "--turns"),
        texts=_texts(options.texts) if options.texts else (),
        priority=options.priority,
        seed=options.seed,
    )
    return workload.conversations(options.requests or _DEFAULT_REQUESTS)


def _texts(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--texts: {path}: {error}") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise ConfigError(f"--texts: {path} has no prompts")
    return texts


def variants(options: ServeOptions) -> list[Variant]:
    """The requests with speculation, and the same requests without."""
    from dataclasses import replace

    from outrider.sampling.params import Verification
    from outrider_bench.loadtest.campaign import Variant
    from outrider_bench.loadtest.requests import RequestOptions

    method = options.verification
    request_options = RequestOptions(
        gamma=options.gamma,
        lookahead=options.lookahead,
        fan_out=options.fan_out,
        temperature=options.temperature,
        verification=None if method is None else Verification(method.value),
        is_fast=options.fast,
        ignores_eos=not options.stop_at_eos,
        timeout_s=options.timeout,
        is_chat=options.chat,
    )
    off = replace(request_options, gamma=0, lookahead=None, fan_out=None)
    return [Variant(ON, request_options), Variant(OFF, off)]

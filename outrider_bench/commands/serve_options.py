"""The flags of `outrider bench serve`, and the load they mean. Sends nothing."""

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
    from outrider_bench.loadtest.campaign import Manner, Variant
    from outrider_bench.loadtest.plan import Visit
    from outrider_bench.loadtest.slo import Slo

ON, OFF = "speculation", "off"

_DEFAULT_CALLERS = 8
_DEFAULT_REQUESTS = 200
# That the fields of a request hold.
_MOST = 2**31 - 1
_LENGTHS = "Tokens: 128, uniform:64:256, or lognormal:MEDIAN:SIGMA[:MOST]."
# What a trace says itself.
_OF_TRACES = ("input_len", "output_len", "turns", "texts", "priority")


@dataclass(frozen=True)
class ServeOptions(AccessOptions):
    """None: the server's default, unless said."""

    endpoint: Annotated[
        str,
        typer.Option(
            envvar="OUTRIDER_ENDPOINT",
            help="host:port of the orchestrator, or several with commas. All addresses of a name "
            "are asked in turn.",
        ),
    ] = DEFAULT_ENDPOINT
    connections: Annotated[
        int,
        typer.Option(
            min=1, max=256, help="To each address: a balancer leads each to an orchestrator."
        ),
    ] = 8
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Of each variant. Default: 200, or the whole trace."),
    ] = None
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Closed loop: so many callers. Default: 8 without --rate."),
    ] = None
    rate: Annotated[
        float | None, typer.Option(help="Open loop: requests per second, whatever is answered.")
    ] = None
    burstiness: Annotated[
        float,
        typer.Option(help="Of --rate: 1 is a Poisson process, less comes in bursts, inf: a clock."),
    ] = 1.0
    trace: Annotated[
        Path | None,
        typer.Option(help="File of requests, sent at its times unless --rate is given."),
    ] = None
    trace_format: Annotated[
        str | None,
        typer.Option(
            help="outrider, mooncake, azure, burstgpt or sharegpt. Default: found by its fields."
        ),
    ] = None
    trace_speed: Annotated[
        float, typer.Option(help="Divides the trace's times; 1000 if they are milliseconds.")
    ] = 1.0
    input_len: Annotated[str, typer.Option(help=f"Of prompts. {_LENGTHS}")] = "128"
    output_len: Annotated[str, typer.Option(help=f"Of outputs. {_LENGTHS}")] = "128"
    turns: Annotated[str, typer.Option(help="Of a session; more than 1 makes sessions.")] = "1"
    texts: Annotated[
        Path | None,
        typer.Option(help="Prompts, one in a line. Default: random token ids, no tokenizer."),
    ] = None
    stop_at_eos: Annotated[
        bool, typer.Option("--stop-at-eos", help="Else outputs are as long as they were drawn.")
    ] = False
    warm_up: Annotated[int, typer.Option(min=0, help="Requests of each variant, not counted.")] = 8
    repetitions: Annotated[
        int, typer.Option(min=1, help="Slices that are run with speculation and without, in turn.")
    ] = 2
    slo: Annotated[str, typer.Option(help="What is promised: ttft=200ms,tpot=30ms,e2e=2s.")] = ""
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Find the highest rate that keeps --slo; starts at --rate."),
    ] = False
    attain: Annotated[
        float, typer.Option(min=0, max=1, help="Of --sweep: share of requests that must keep it.")
    ] = 0.99
    precision: Annotated[
        float, typer.Option(min=0.01, help="Of --sweep: ends when it is known this closely.")
    ] = 0.1
    gamma: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="Draft tokens per round, fixed.")
    ] = None
    lookahead: Annotated[
        int | None, typer.Option(min=0, max=_MOST, help="Rounds drafted ahead.")
    ] = None
    fan_out: Annotated[
        int | None, typer.Option(min=0, max=_MOST, help="Outcomes drafted ahead.")
    ] = None
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0
    verification: Annotated[Method | None, typer.Option(help="How drafts are judged.")] = None
    fast: Annotated[bool, typer.Option("--fast", help="Tokens sent before recorded.")] = False
    priority: Annotated[
        int | None,
        typer.Option(min=-_MOST, max=_MOST, help="Lower is more urgent."),
    ] = None
    timeout: Annotated[
        float | None, typer.Option(help="Deadline of each request, seconds. Default: none.")
    ] = None
    target_endpoint: Annotated[
        str | None,
        typer.Option(
            help="host:port of each target replica without TLS, with commas: counts their passes."
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of prompts, lengths, arrivals.")
    ] = 0
    label: Annotated[str | None, typer.Option(help="Stands in the result.")] = None
    detailed: Annotated[
        bool, typer.Option("--detailed", help="Every time of every request in the JSON.")
    ] = False
    html: Annotated[bool, typer.Option(help="Write the report with plots.")] = True
    out: Annotated[Path, typer.Option(help="Where the JSON and the report go.")] = Path(
        "bench-results"
    )
    name: Annotated[str, typer.Option(help="Of the files.")] = "serve"

    def check(self) -> None:
        """Raises ConfigError that names the flag."""
        if self.rate is not None and self.concurrency is not None:
            raise ConfigError("--concurrency: not together with --rate: a loop is open or closed")
        if self.rate is None and self.burstiness != 1.0:
            raise ConfigError("--burstiness: only with --rate")
        if self.trace is None and self.trace_speed != 1.0:
            raise ConfigError("--trace-speed: only with --trace")
        if self.trace is None and self.trace_format is not None:
            raise ConfigError("--trace-format: only with --trace")
        if self.trace is not None:
            defaults = ServeOptions()
            for name in _OF_TRACES:
                if getattr(self, name) != getattr(defaults, name):
                    raise ConfigError(f"--{name.replace('_', '-')}: the trace says it itself")
        if self.texts is not None and self.input_len != ServeOptions.input_len:
            raise ConfigError("--input-len: not together with --texts")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise ConfigError("--timeout: above 0, and finite")
        if not self.name or self.name != Path(self.name).name:
            raise ConfigError(f"--name: {self.name!r} is no name of a file in --out")
        if self.sweep:
            self._check_sweep()
        elif (self.attain, self.precision) != (ServeOptions.attain, ServeOptions.precision):
            raise ConfigError("--attain, --precision: only with --sweep")

    def _check_sweep(self) -> None:
        if not self.slo:
            raise ConfigError("--sweep: needs --slo, what is to be kept")
        if self.rate is None:
            raise ConfigError("--sweep: needs --rate, the first rate to try")

    @property
    def is_trace_replay(self) -> bool:
        return self.trace is not None and self.rate is None and self.concurrency is None


def promised(options: ServeOptions) -> Slo | None:
    """Raises ConfigError."""
    from outrider_bench.loadtest.slo import Slo

    return Slo.parse(options.slo) or None


def manner(options: ServeOptions) -> Manner:
    """How visits come."""
    from outrider_bench.loadtest.campaign import Manner

    if options.rate is not None:
        return Manner(rate=options.rate, burstiness=options.burstiness)
    if options.is_trace_replay:
        return Manner()
    return Manner(num_callers=options.concurrency or _DEFAULT_CALLERS)


def visits(options: ServeOptions, say: Callable[[str], None] = lambda said: None) -> list[Visit]:
    """What is asked for; says what of a trace is not. Raises ConfigError."""
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
            say(f"{trace.num_left_out} requests of the trace without output are left out")
        if options.is_trace_replay and trace.visits[0].at_s is None:
            raise ConfigError(
                f"--trace: {options.trace} has no times: give --rate or --concurrency"
            )
        return trace.visits
    workload = Workload(
        input_len=Lengths.parse(options.input_len, "--input-len"),
        output_len=Lengths.parse(options.output_len, "--output-len"),
        num_turns=Lengths.parse(options.turns, "--turns"),
        texts=_texts(options.texts) if options.texts else (),
        priority=options.priority,
        seed=options.seed,
    )
    return workload.visits(options.requests or _DEFAULT_REQUESTS)


def _texts(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--texts: {path}: {error}") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise ConfigError(f"--texts: {path}: no prompts in it")
    return texts


def variants(options: ServeOptions) -> list[Variant]:
    """With speculation, and the same without."""
    from dataclasses import replace

    from outrider.sampling.params import Verification
    from outrider_bench.loadtest.asking import Ask
    from outrider_bench.loadtest.campaign import Variant

    method = options.verification
    ask = Ask(
        gamma=options.gamma,
        lookahead=options.lookahead,
        fan_out=options.fan_out,
        temperature=options.temperature,
        verification=None if method is None else Verification(method.value),
        is_fast=options.fast,
        ignores_eos=not options.stop_at_eos,
        timeout_s=options.timeout,
    )
    off = replace(ask, gamma=0, lookahead=None, fan_out=None)
    return [Variant(ON, ask), Variant(OFF, off)]

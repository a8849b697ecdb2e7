"""Runs outside load tools against Outrider's HTTP, unchanged, beside `outrider bench serve --http`.

    .venv/bin/python scripts/outside_tools.py --vllm V/bin/vllm --guidellm G/bin/guidellm \
        --aiperf A/bin/aiperf

The quickstart pair is served as `outrider up` does. All get the same load in turn, with drafts and
without. Their figures are printed side by side, each beside the orchestrator's own of the same
requests, so that they can be compared on a machine that is not quiet: half a minute to a minute per
tool, variant and repetition.

Each tool has a virtual environment of its own (docs/how-to/measure.md), is given the pair's
tokenizer, and needs no network.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.cli.stack import Stack
from outrider.cli.stack_options import StackOptions
from outrider.quickstart_pair import TARGET_PATH

MODEL = "quickstart"
VARIANTS: list[tuple[str, dict[str, Any]]] = [("with", {}), ("without", {"gamma": 0})]
HEADER = (
    "| tool | drafts | requests | TTFT, ms: tool · served | TPOT, ms: tool · served | tokens/s |"
)


@dataclass(frozen=True)
class Load:
    """The load that every tool is given: a closed loop of `concurrency` clients, no warm-up."""

    url: str
    requests: int
    concurrency: int
    input_len: int
    output_len: int


@dataclass(frozen=True)
class Figures:
    """Means of a run; `tpot_ms` is what the tool calls TPOT or inter-token latency."""

    completed: int
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float


def ours(load: Load, out: Path) -> list[str]:
    return [
        str(Path(sys.executable).parent / "outrider"), "bench", "serve", f"--http={load.url}",
        f"--tokenizer={TARGET_PATH}", f"--requests={load.requests}",
        f"--concurrency={load.concurrency}", f"--input-len={load.input_len}",
        f"--output-len={load.output_len}", "--warm-up=0", "--repetitions=1",
        "--no-html", f"--out={out}", "--name=ours",
    ]  # fmt: skip


def our_figures(out: Path) -> Figures:
    """Means over both halves, with drafts and without: a run of ours measures both."""
    document = json.loads((out / "ours.json").read_text())
    halves = [_vllm_figures(document), _vllm_figures(document["outrider"]["speculation_off"])]
    ttft_ms, tpot_ms, tokens_per_s = (
        statistics.mean(getattr(half, name) for half in halves)
        for name in ("ttft_ms", "tpot_ms", "tokens_per_s")
    )
    return Figures(sum(half.completed for half in halves), ttft_ms, tpot_ms, tokens_per_s)


def _vllm_figures(found: dict[str, Any]) -> Figures:
    names = ("completed", "mean_ttft_ms", "mean_tpot_ms", "output_throughput")
    return Figures(*(found[name] for name in names))


def vllm(program: str, load: Load, extra: dict[str, Any], out: Path) -> list[str]:
    return [
        program, "bench", "serve", "--backend=openai", f"--base-url={load.url}",
        f"--model={MODEL}", f"--tokenizer={TARGET_PATH}", "--dataset-name=random",
        f"--random-input-len={load.input_len}", f"--random-output-len={load.output_len}",
        f"--num-prompts={load.requests}", f"--max-concurrency={load.concurrency}",
        "--temperature=0", "--ignore-eos", "--disable-tqdm",
        "--save-result", f"--result-dir={out}", "--result-filename=result.json",
        *([f"--extra-body={json.dumps(extra)}"] if extra else []),
    ]  # fmt: skip


def vllm_figures(out: Path) -> Figures:
    return _vllm_figures(json.loads((out / "result.json").read_text()))


def guidellm(program: str, load: Load, extra: dict[str, Any], out: Path) -> list[str]:
    backend = {
        "kind": "openai_http", "target": load.url, "model": MODEL,
        "request_format": "/v1/completions", "extras": {"body": {"temperature": 0, **extra}},
    }  # fmt: skip
    data = f"prompt_tokens={load.input_len},output_tokens={load.output_len}"
    return [
        program, "run", "--backend", json.dumps(backend),
        "--profile", f"kind=concurrent,streams={load.concurrency}",
        "--constraint", f"kind=max_requests,count={load.requests}",
        "--tokenizer", f"kind=huggingface_auto,model={TARGET_PATH}",
        "--data", f"kind=synthetic_text,{data}",
        "--output", f"kind=json,path={out / 'result.json'}", "--disable-console",
    ]  # fmt: skip


def guidellm_figures(out: Path) -> Figures:
    (found,) = json.loads((out / "result.json").read_text())["benchmarks"]
    metrics = found["metrics"]

    def mean(name: str) -> float:
        return float(metrics[name]["successful"]["mean"])

    return Figures(
        metrics["request_totals"]["successful"],
        mean("time_to_first_token_ms"),
        mean("inter_token_latency_ms"),
        mean("output_tokens_per_second"),
    )


def aiperf(program: str, load: Load, extra: dict[str, Any], out: Path) -> list[str]:
    body = {"ignore_eos": True, "temperature": 0, **extra}
    return [
        program, "profile", "--model", MODEL, "--url", load.url,
        "--endpoint-type", "completions", "--streaming", "--tokenizer", str(TARGET_PATH),
        "--concurrency", str(load.concurrency), "--request-count", str(load.requests),
        "--num-dataset-entries", str(load.requests),
        "--isl", str(load.input_len), "--isl-stddev", "0",
        "--osl", str(load.output_len), "--osl-stddev", "0",
        "--extra-inputs", json.dumps(body), "--use-server-token-count",
        "--artifact-dir", str(out), "--ui", "none", "--no-gpu-telemetry", "--workers-max", "1",
    ]  # fmt: skip


def aiperf_figures(out: Path) -> Figures:
    found = json.loads((out / "profile_export_aiperf.json").read_text())
    return Figures(
        int(found["request_count"]["avg"]),
        found["time_to_first_token"]["avg"],
        found["inter_token_latency"]["avg"],
        found["output_token_throughput"]["avg"],
    )


Tool = tuple[Callable[[str, Load, dict[str, Any], Path], list[str]], Callable[[Path], Figures]]
TOOLS: dict[str, Tool] = {
    "vllm": (vllm, vllm_figures),
    "guidellm": (guidellm, guidellm_figures),
    "aiperf": (aiperf, aiperf_figures),
}


@asynccontextmanager
async def running(options: StackOptions) -> AsyncIterator[str]:
    """A running system, and the URL of its HTTP."""
    stack = Stack(options, lambda event: None)
    try:
        await stack.start()
        yield f"http://{stack.http}"
    finally:
        await stack.stop()


async def run(command: list[str], out: Path) -> None:
    """Runs a tool. Raises CalledProcessError; its log is in `out`."""
    await asyncio.to_thread(out.mkdir, parents=True)
    environ = {**os.environ, "HF_DATASETS_OFFLINE": "1"}
    if Path(command[0]).name != "aiperf":  # offline it takes names of cached models, no folder
        environ["HF_HUB_OFFLINE"] = "1"
    with (out / "log.txt").open("w") as log:
        program = await asyncio.create_subprocess_exec(
            *command, stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=out
        )
        if await program.wait():
            log.flush()
            print((out / "log.txt").read_text()[-3000:], file=sys.stderr)
            raise subprocess.CalledProcessError(program.returncode or 1, command)


def version(program: str, distribution: str) -> str:
    python = Path(program).parent / "python"
    code = f"from importlib.metadata import version; print(version({distribution!r}))"
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


async def measure(args: argparse.Namespace) -> None:
    programs = {name: getattr(args, name) for name in TOOLS if getattr(args, name)}
    print(json.dumps({name: version(program, name) for name, program in programs.items()}))
    # `vllm bench serve` reports acceptance if /metrics has vLLM's names.
    os.environ["OUTRIDER_ORCHESTRATOR_METRICS_VLLM_NAMES"] = "true"
    options = StackOptions(inflate=args.inflate, port=0, http_port="0", log_dir=args.out / "logs")
    print(f"{HEADER}\n{'|---' * HEADER.count(' | ')}|---|")
    async with running(options) as url:
        load = Load(url, args.requests, args.concurrency, args.input_len, args.output_len)
        for repetition in range(args.repetitions):
            out = args.out / str(repetition)
            before = served(url)
            await run(ours(load, out / "ours"), out / "ours")
            found = our_figures(out / "ours")
            print(line("outrider bench serve", "both", found, before, url), flush=True)
            for name, program in programs.items():
                command, read = TOOLS[name]
                for variant, extra in VARIANTS if repetition % 2 else reversed(VARIANTS):
                    folder, before = out / f"{name}-{variant}", served(url)
                    await run(command(program, load, extra, folder), folder)
                    print(line(name, variant, read(folder), before, url), flush=True)


def served(url: str) -> dict[str, tuple[float, int]]:
    """The orchestrator's own times: of each, the sum in seconds and the number of requests."""
    names = {
        "ttft": "outrider_time_to_first_token_seconds",
        "tpot": "outrider_request_time_per_output_token_seconds",
    }
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines()]

    def total(name: str) -> float:
        return sum(float(words[-1]) for words in lines if words[0].partition("{")[0] == name)

    return {key: (total(f"{n}_sum"), int(total(f"{n}_count"))) for key, n in names.items()}


def line(
    tool: str, variant: str, figures: Figures, before: dict[str, tuple[float, int]], url: str
) -> str:
    """A line of the table; `before`: `served` before the run."""
    cells = []
    for name, (total_s, num) in served(url).items():
        mean_ms = 1e3 * (total_s - before[name][0]) / (num - before[name][1])
        cells.append(f"{getattr(figures, f'{name}_ms'):.1f} · {mean_ms:.1f}")
        if num - before[name][1] != figures.completed:
            cells[-1] += f" of {num - before[name][1]} requests"
    cells = [tool, variant, str(figures.completed), *cells, f"{figures.tokens_per_s:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in TOOLS:
        parser.add_argument(f"--{name}", help=f"the program {name}; left out: not run")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--inflate", help="of outrider up; default 300M")
    parser.add_argument("--out", type=Path, default=Path("bench-results/outside-tools"))
    args = parser.parse_args()
    args.out = args.out.resolve()
    asyncio.run(measure(args))


if __name__ == "__main__":
    main()

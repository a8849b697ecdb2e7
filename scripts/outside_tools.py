"""Runs outside load tools against Outrider's HTTP, unchanged, beside `outrider bench serve --http`.

    .venv/bin/python scripts/outside_tools.py --vllm V/bin/vllm --guidellm G/bin/guidellm \
        --aiperf A/bin/aiperf

The quickstart pair is served as `outrider up` does. All get the same load in turn, with drafts and
without, and their figures are printed side by side: about a minute per tool and repetition.

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
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.cli.stack import Stack
from outrider.cli.stack_options import StackOptions
from outrider.quickstart_pair import TARGET_PATH

MODEL = "quickstart"


@dataclass(frozen=True)
class Load:
    """The load that every tool is given: a closed loop of `concurrency` clients."""

    url: str
    requests: int
    concurrency: int
    input_len: int
    output_len: int
    warm_up: int


@dataclass(frozen=True)
class Figures:
    """Medians of a run; `tpot_ms` is what the tool calls TPOT or inter-token latency."""

    completed: int
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float


def ours(load: Load, out: Path) -> list[str]:
    return [
        str(Path(sys.executable).parent / "outrider"), "bench", "serve", f"--http={load.url}",
        f"--tokenizer={TARGET_PATH}", f"--requests={load.requests}",
        f"--concurrency={load.concurrency}", f"--input-len={load.input_len}",
        f"--output-len={load.output_len}", f"--warm-up={load.warm_up}", "--repetitions=1",
        "--no-html", f"--out={out}", "--name=ours",
    ]  # fmt: skip


def our_figures(out: Path) -> dict[bool, Figures]:
    """With drafts and without: a run of ours measures both."""
    document = json.loads((out / "ours.json").read_text())
    variants = {True: document, False: document["outrider"]["speculation_off"]}
    return {is_on: _vllm_figures(found) for is_on, found in variants.items()}


def _vllm_figures(found: dict[str, Any]) -> Figures:
    names = ("completed", "median_ttft_ms", "median_tpot_ms", "output_throughput")
    return Figures(*(found[name] for name in names))


def vllm(program: str, load: Load, extra: dict[str, Any], out: Path) -> list[str]:
    return [
        program, "bench", "serve", "--backend=openai", f"--base-url={load.url}",
        f"--model={MODEL}", f"--tokenizer={TARGET_PATH}", "--dataset-name=random",
        f"--random-input-len={load.input_len}", f"--random-output-len={load.output_len}",
        f"--num-prompts={load.requests}", f"--max-concurrency={load.concurrency}",
        f"--num-warmups={load.warm_up}", "--temperature=0", "--ignore-eos", "--disable-tqdm",
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

    def median(name: str) -> float:
        return float(metrics[name]["successful"]["median"])

    return Figures(
        metrics["request_totals"]["successful"],
        median("time_to_first_token_ms"),
        median("inter_token_latency_ms"),
        float(metrics["output_tokens_per_second"]["successful"]["mean"]),
    )


def aiperf(program: str, load: Load, extra: dict[str, Any], out: Path) -> list[str]:
    body = {"ignore_eos": True, "temperature": 0, **extra}
    return [
        program, "profile", "--model", MODEL, "--url", load.url,
        "--endpoint-type", "completions", "--streaming", "--tokenizer", str(TARGET_PATH),
        "--concurrency", str(load.concurrency), "--request-count", str(load.requests),
        "--warmup-request-count", str(load.warm_up),
        "--num-dataset-entries", str(load.requests + load.warm_up),
        "--isl", str(load.input_len), "--isl-stddev", "0",
        "--osl", str(load.output_len), "--osl-stddev", "0",
        "--extra-inputs", json.dumps(body), "--use-server-token-count",
        "--artifact-dir", str(out), "--ui", "none", "--no-gpu-telemetry", "--workers-max", "1",
    ]  # fmt: skip


def aiperf_figures(out: Path) -> Figures:
    found = json.loads((out / "profile_export_aiperf.json").read_text())
    return Figures(
        int(found["request_count"]["avg"]),
        found["time_to_first_token"]["p50"],
        found["inter_token_latency"]["p50"],
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
    found: dict[tuple[str, bool], list[Figures]] = {}

    def note(name: str, is_on: bool, figures: Figures) -> None:
        found.setdefault((name, is_on), []).append(figures)
        print(json.dumps({"tool": name, "drafts": is_on, **vars(figures)}), flush=True)

    async with running(options) as url:
        load = Load(
            url, args.requests, args.concurrency, args.input_len, args.output_len, args.warm_up
        )
        for repetition in range(args.repetitions):
            out = args.out / str(repetition)
            await run(ours(load, out / "ours"), out / "ours")
            for is_on, figures in our_figures(out / "ours").items():
                note("outrider", is_on, figures)
            for name, program in programs.items():
                command, read = TOOLS[name]
                for is_on in (True, False) if repetition % 2 else (False, True):
                    folder = out / f"{name}-{'on' if is_on else 'off'}"
                    extra = {} if is_on else {"gamma": 0}
                    await run(command(program, load, extra, folder), folder)
                    note(name, is_on, read(folder))
    print(table(found))


def table(found: dict[tuple[str, bool], list[Figures]]) -> str:
    """Medians over the repetitions, and each figure over ours."""
    names = ("ttft_ms", "tpot_ms", "tokens_per_s")
    medians = {
        key: {name: statistics.median(getattr(one, name) for one in runs) for name in names}
        for key, runs in found.items()
    }
    lines = ["| tool | drafts | TTFT, ms | TPOT, ms | tokens/s |", "|---|---|---|---|---|"]
    for (tool, is_on), figures in sorted(medians.items(), key=lambda item: not item[0][1]):
        own = medians["outrider", is_on]
        cells = [f"{figures[n]:.1f} ({figures[n] / own[n] - 1:+.1%})" for n in names]
        lines.append(f"| {tool} | {'with' if is_on else 'without'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in TOOLS:
        parser.add_argument(f"--{name}", help=f"the program {name}; left out: not run")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--warm-up", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--inflate", help="of outrider up; default 300M")
    parser.add_argument("--out", type=Path, default=Path("bench-results/outside-tools"))
    args = parser.parse_args()
    args.out = args.out.resolve()
    asyncio.run(measure(args))


if __name__ == "__main__":
    main()

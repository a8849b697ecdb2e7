"""`outrider bench serve` end to end: a real process against a simulated system."""

from __future__ import annotations

import asyncio
import html.parser
import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider_bench.commands.serve_options import ServeOptions, planned_visits
from tests.bench.loadtest.conftest import simulated
from tests.cli.processes import ROOT, command, environment
from tests.services.parts import System, nothing_held
from tests.services.proxies import balancer, strict_proxy
from tests.stack import eventually

# Those of `vllm bench serve --save-result` that tools read.
VLLM_KEYS = {
    "date", "backend", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency",
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput",
    "max_output_tokens_per_s", "max_concurrent_requests",
    "spec_decode_acceptance_rate", "spec_decode_acceptance_length", "spec_decode_num_drafts",
    "spec_decode_draft_tokens", "spec_decode_accepted_tokens",
    "spec_decode_per_position_acceptance_rates",
    *(f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p50", "p90", "p95", "p99")
      for name in ("ttft", "tpot", "itl", "e2el")),
}  # fmt: skip
DETAILED_KEYS = {"input_lens", "output_lens", "start_times", "ttfts", "itls", "errors"}


class Fetched(html.parser.HTMLParser):
    """What a page would fetch, and the tags it has."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            is_link = name in ("src", "href", "xlink:href") and not (value or "").startswith("#")
            if is_link and tag not in ("a",):
                self.urls.append(str(value))


async def started(system: System, out: Path, *arguments: str) -> asyncio.subprocess.Process:
    if not any(argument.startswith("--http=") for argument in arguments):
        arguments = (f"--endpoint={system.endpoint}", *arguments)
    return await asyncio.create_subprocess_exec(
        *command("bench", "serve", f"--out={out}", *arguments),
        cwd=ROOT,
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def serve(system: System, out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON and what was printed."""
    process = await started(system, out, *arguments)
    said, failed = await process.communicate()
    assert process.returncode == 0, failed.decode()
    return json.loads((out / "serve.json").read_text("utf-8")), said.decode()


@pytest.mark.slow
async def test_a_run_leaves_a_result_and_a_page(redis_url: str, tmp_path: Path) -> None:
    """In vLLM's shape, with speculation and without; the page fetches nothing."""
    async with simulated(redis_url) as system:
        told, said = await serve(
            system, tmp_path, "--requests=16", "--rate=40", "--burstiness=0.5", "--warm-up=2",
            "--output-len=uniform:4:12", "--slo=e2e=60s", "--detailed", "--priority=2",
            "--turns=uniform:1:2", "--gamma=3",
        )  # fmt: skip
        await eventually(lambda: nothing_held(system))
    assert told.keys() >= VLLM_KEYS | DETAILED_KEYS
    own = told["outrider"]
    # On a machine that stalls Redis may be away for a second, which fails a call; and is counted.
    assert told["num_prompts"] == 16 >= told["completed"] + told["failed"] > 0
    assert sum(own["errors_by_status"].values()) == told["failed"]
    assert told["total_output_tokens"] == sum(told["output_lens"])
    assert told["request_goodput"] == pytest.approx(told["request_throughput"])
    assert own["speculation_off"]["completed"] > 0
    assert own["speculation_off"]["outrider"]["drafting"]["num_drafts"] == 0
    assert own["speed_up"]["tpot_p50"] > 0
    assert own["verify_batch"]["rows"] >= 1
    assert {sample["variant"] for sample in own["samples"]} == {"speculation", "off"}
    assert "speed-up: " in said
    page = Fetched()
    page.feed((tmp_path / "serve.html").read_text("utf-8"))
    assert page.urls == []
    assert page.tags.count("svg") >= 3
    assert "script" not in page.tags


@pytest.mark.slow
@pytest.mark.parametrize("is_listed", [False, True])
async def test_load_reaches_every_orchestrator(
    is_listed: bool, redis_url: str, tmp_path: Path
) -> None:
    """Behind a balancer of connections, and where all are named. They are proxies of one here."""
    async with (
        simulated(redis_url) as system,
        strict_proxy(system.endpoint) as (first, first_seen),
        strict_proxy(system.endpoint) as (second, second_seen),
        balancer([first, second]) as balanced,
    ):
        system.endpoint = f"{first},{second}" if is_listed else balanced
        await serve(
            system, tmp_path, "--requests=24", "--no-html", "--warm-up=0", "--output-len=2",
            "--repetitions=1",
        )  # fmt: skip
    counts = [proxy.methods.count("Generate") for proxy in (first_seen, second_seen)]
    assert sum(counts) == 48
    assert min(counts) >= 6, counts


@pytest.mark.slow
async def test_a_search_and_a_trace(redis_url: str, tmp_path: Path) -> None:
    """Rates double while the promise is kept; lengths are the trace's, arrivals the rate's."""
    trace = tmp_path / "trace.jsonl"
    entry = '{"timestamp": %d, "input_length": 5, "output_length": 3}\n'
    trace.write_text("".join(entry % second for second in range(4)))
    async with simulated(redis_url) as system:
        told, said = await serve(
            system, tmp_path, "--sweep", "--slo=e2e=60s", "--rate=100", f"--trace={trace}",
            "--no-html", "--warm-up=0",
        )  # fmt: skip
    sweep = told["outrider"]["sweep"]
    assert sweep["highest_rate"] == {"speculation": 12_800, "off": 12_800}
    assert [p["rate"] for p in sweep["probes"]] == [100.0 * 2**i for i in range(8)] * 2
    assert told["total_output_tokens"] == 12
    assert "up to 1.28e+04 requests/s" in said
    assert not (tmp_path / "serve.html").exists()


@pytest.mark.slow
async def test_how_long_a_load_takes_is_said_first(redis_url: str, tmp_path: Path) -> None:
    """By the trace's times, by the rate, by the warm-up; a low rate of the warm-up is no claim."""
    trace = tmp_path / "trace.jsonl"
    entry = '{"timestamp": %d, "input_length": 5, "output_length": 2}\n'
    trace.write_text("".join(entry % second for second in (0, 100, 300)))
    short, few = ("--no-html", "--repetitions=1", "--output-len=2"), "--requests=16"
    async with simulated(redis_url) as system:
        _, by_trace = await serve(
            system, tmp_path, *short[:2], f"--trace={trace}", "--trace-speed=100", "--warm-up=1"
        )
        _, by_rate = await serve(system, tmp_path, *short, few, "--rate=8", "--warm-up=1")
        _, by_loop = await serve(system, tmp_path, *short, few, "--concurrency=4")
    assert "2 x 3 requests are sent in about 6 s, according to the trace" in by_trace
    assert "2 x 16 requests are sent in about 4 s, according to 8 requests/s" in by_rate
    assert "2 x 16 requests take about " in by_loop
    assert ", estimated from the warm-up; Ctrl-C reports the results so far" in by_loop
    assert "queue" not in by_trace + by_rate + by_loop


async def test_a_signal_reports_what_was_measured(redis_url: str, tmp_path: Path) -> None:
    async with simulated(redis_url) as system:
        process = await started(
            system, tmp_path, "--requests=100000", "--no-html", "--output-len=4", "--warm-up=0"
        )

        async def has_served() -> bool:
            return (await system.target_load()).num_closed_total > 30

        await eventually(has_served, timeout_s=100)
        process.send_signal(signal.SIGINT)
        said, failed = await process.communicate()
        await eventually(lambda: nothing_held(system))
    assert process.returncode == 128 + signal.SIGINT, failed.decode()
    assert "requests run until all have ended; Ctrl-C reports" in said.decode()
    assert "stopped early: these are the results so far" in said.decode()
    assert " × " not in said.decode(), "who was cut off has not failed"
    told = json.loads((tmp_path / "serve.json").read_text("utf-8"))
    assert told["outrider"]["is_cut"]
    assert 0 < told["completed"] < 100_000
    assert told["failed"] == 0


async def test_nobody_there_is_said(tmp_path: Path) -> None:
    nobody = System.__new__(System)
    nobody.endpoint = "127.0.0.1:1"
    process = await started(nobody, tmp_path, "--no-html")
    _, failed = await process.communicate()
    assert process.returncode == 1
    assert b"nothing answers at 127.0.0.1:1" in failed


async def test_a_run_without_an_answer_has_failed(redis_url: str, tmp_path: Path) -> None:
    """Why is said, and what was measured is there; a prompt beyond the context is not even made."""
    async with simulated(redis_url) as system:
        few = ("--requests=4", "--warm-up=0", "--output-len=4", "--no-html", "--name=[red]")
        process = await started(system, tmp_path, *few, "--gamma=1000")
        said, failed = await process.communicate()
        assert process.returncode == 1
        assert "speculation: no request was answered" in failed.decode()
        assert re.search(r"speculation: 4 × INVALID_ARGUMENT: gamma: ", said.decode())
        assert str(tmp_path / "[red].json") in said.decode()
        assert (tmp_path / "[red].json").exists()
        process = await started(system, tmp_path, *few, "--input-len=99999999")
        _, failed = await process.communicate()
        assert process.returncode == 2
        assert "a prompt of 99999999 tokens; the context has" in failed.decode()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            {"sweep": True, "slo": "e2e=1s", "rate": 1.0, "concurrency": 2},
            "--concurrency: cannot be combined with --sweep",
        ),
        ({"http": "u", "connections": 2}, "--connections: is for gRPC; cannot be combined with"),
        ({"tokenizer": "t"}, "--tokenizer: only with --http or --chat"),
        ({"burstiness": 2.0}, "--burstiness: requires --rate"),
        ({"trace_speed": 2.0}, "--trace-speed: requires --trace"),
        ({"trace": Path("t"), "input_len": "4"}, "--input-len: cannot be combined with --trace"),
        ({"trace": Path("t"), "turns": "2"}, "--turns: cannot be combined with --trace"),
        ({"texts": Path("t"), "input_len": "4"}, "--input-len: cannot be combined with --texts"),
        ({"timeout": 0.0}, "--timeout: 0 is out of range: above 0"),
        ({"timeout": float("inf")}, "--timeout: inf is out of range: above 0"),
        ({"name": "a/b"}, "--name: 'a/b'"),
        ({"name": ""}, "--name: ''"),
        ({"sweep": True, "rate": 1.0}, "--sweep: requires --slo"),
        ({"sweep": True, "slo": "e2e=1s"}, "--sweep: requires --rate"),
        ({"attain": 0.5}, "--attain, --precision: require --sweep"),
        ({"rate": 0.0}, "--rate: 0"),
        ({"input_len": "x"}, "--input-len: 'x'"),
        ({"trace": Path("/nowhere")}, "--trace: /nowhere"),
        ({"texts": Path("/nowhere")}, "--texts: /nowhere"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    options = ServeOptions(**given)

    def plan() -> None:
        options.check()
        planned_visits(options)

    with pytest.raises(ConfigError, match=re.escape(named)):
        plan()


def test_texts_are_prompts_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    path.write_text("one\n\ntwo\n")
    asked = planned_visits(ServeOptions(texts=path, requests=3))
    assert [visit.jobs[0].text for visit in asked] == ["one", "two", "one"]

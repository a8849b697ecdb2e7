"""Results as JSON: the keys of `vllm bench serve`, and our own. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from outrider_bench.loadtest.measures import (
    PERCENTILES,
    Distribution,
    Drafting,
    Summary,
    max_overlapping,
)
from outrider_bench.loadtest.phase_results import PhaseResult, Probe
from outrider_bench.loadtest.records import Record
from outrider_bench.loadtest.slo import Slo


def summary_of(results: Sequence[PhaseResult], slo: Slo | None) -> Summary:
    """Summary of all results of p variant."""
    records = [record for result in results for record in result.records]
    return Summary.of(records, sum(result.duration_s for result in results), slo)


def vllm_shape(
    summary: Summary, results: Sequence[PhaseResult], *, is_detailed: bool
) -> dict[str, Any]:
    """The keys of `vllm bench serve --save-result`, with `is_detailed` also of `--save-detailed`.

    `itl` is measured from message to message, as there. Times are in milliseconds, those of
    `--save-detailed` in seconds.
    """
    document: dict[str, Any] = {
        "duration": summary.duration_s,
        "completed": summary.num_completed,
        "failed": summary.num_requests - summary.num_completed - summary.num_cut,
        "total_input_tokens": summary.num_prompt_tokens,
        "total_output_tokens": summary.num_tokens,
        "request_throughput": summary.requests_per_s,
        "request_goodput": summary.goodput_per_s,
        "output_throughput": summary.tokens_per_s,
        "total_token_throughput": (summary.num_prompt_tokens + summary.num_tokens)
        / max(summary.duration_s, 1e-9),
        "max_output_tokens_per_s": max(map(_most_tokens_in_a_second, results), default=0),
        "max_concurrent_requests": max(map(_most_at_a_time, results), default=0),
    }
    latencies = summary.latencies
    for name, times in (
        ("ttft", latencies.ttft), ("tpot", latencies.tpot),
        ("itl", latencies.itl_chunk), ("e2el", latencies.e2e),
    ):  # fmt: skip
        document |= _times_ms(name, times)
    document |= _spec_decode(summary.drafting)
    return document | (_detailed(results) if is_detailed else {})


def _times_ms(name: str, times: Distribution | None) -> dict[str, float | None]:
    keys = [f"{kind}_{name}_ms" for kind in ("mean", "median", "std")]
    keys += [f"p{percentile}_{name}_ms" for percentile in PERCENTILES]
    if times is None:
        return dict.fromkeys(keys)
    values = [times.mean, times.p50, times.std, *times.percentiles.values()]
    return {key: 1e3 * value for key, value in zip(keys, values, strict=True)}


def _spec_decode(drafting: Drafting | None) -> dict[str, Any]:
    """vLLM's definition: accepted over all draft tokens, in percent.

    All includes draft tokens after a rejection.
    """
    if drafting is None or not drafting.num_drafts:
        return {}
    return {
        "spec_decode_acceptance_rate": 100
        * drafting.num_accepted_tokens
        / drafting.num_draft_tokens,
        "spec_decode_acceptance_length": drafting.tau,
        "spec_decode_num_drafts": drafting.num_drafts,
        "spec_decode_draft_tokens": drafting.num_draft_tokens,
        "spec_decode_accepted_tokens": drafting.num_accepted_tokens,
        "spec_decode_per_position_acceptance_rates": list(drafting.per_position),
    }


def _detailed(results: Sequence[PhaseResult]) -> dict[str, Any]:
    records = [record for result in results for record in result.records]
    return {
        "input_lens": [record.prompt_len for record in records],
        "output_lens": [record.num_tokens for record in records],
        "start_times": [record.sent_s for record in records],
        "ttfts": [record.ttft_s or 0.0 for record in records],
        "itls": [record.chunk_gaps_s for record in records],
        "errors": ["" if r.is_ok else f"{r.status}: {r.detail}" for r in records],
    }


def own_shape(summary: Summary, results: Sequence[PhaseResult]) -> dict[str, Any]:
    """Keys that vLLM's result does not have; times in seconds."""
    latencies = summary.latencies
    return {
        "latencies_s": {name: distribution(d) for name, d in vars(latencies).items()},
        "errors_by_status": summary.errors,
        "num_cut": summary.num_cut,
        "slo_attained": summary.attained,
        "num_cached_prompt_tokens": summary.num_cached_tokens,
        "send_lateness_s": distribution(summary.lateness),
        "drafting": None if summary.drafting is None else vars(summary.drafting),
        "verify_batch": verify_batch(results, summary.drafting),
    }


def distribution(times: Distribution | None) -> dict[str, float] | None:
    """The distribution as JSON."""
    if times is None:
        return None
    percentiles = {f"p{p}": value for p, value in times.percentiles.items()}
    return {"num": times.num, "mean": times.mean, "std": times.std} | percentiles


def verify_batch(
    results: Sequence[PhaseResult], drafting: Drafting | None
) -> dict[str, float | str | None]:
    """Mean rows and tokens per target pass.

    Counted by the replicas; otherwise as the orchestrators report it.
    """
    passes = [result.passes for result in results if result.passes is not None]
    num_steps = sum(p.num_steps for p in passes)
    if num_steps:
        return {
            "rows": sum(p.num_rows for p in passes) / num_steps,
            "tokens": sum(p.num_tokens for p in passes) / num_steps,
            "source": "target replicas",
        }
    rows = drafting.verify_rows if drafting is not None else None
    return {"rows": rows, "tokens": None, "source": "orchestrator"}


def speed_up(on: Summary, off: Summary) -> dict[str, float | None]:
    """Ratios of the metrics, on over off. Throughput is meaningful in a closed loop only."""

    def ratio(name: str, percentile: int) -> float | None:
        times = getattr(on.latencies, name), getattr(off.latencies, name)
        if None in times or not times[0].percentiles[percentile]:
            return None
        return float(times[1].percentiles[percentile] / times[0].percentiles[percentile])

    ratios: dict[str, float | None] = {
        "tokens_per_s": on.tokens_per_s / off.tokens_per_s if off.tokens_per_s else None
    }
    for name in ("tpot", "e2e", "ttft"):
        ratios |= {f"{name}_p50": ratio(name, 50), f"{name}_p99": ratio(name, 99)}
    return ratios


def probe_shape(probe: Probe, slo: Slo) -> dict[str, Any]:
    """A probed rate as JSON."""
    summary = summary_of([probe.result], slo)
    return {
        "variant": probe.variant,
        "rate": probe.rate,
        "attained": probe.attained,
        "has_passed": probe.has_passed,
        "tokens_per_s": summary.tokens_per_s,
        "goodput_per_s": summary.goodput_per_s,
        "errors_by_status": summary.errors,
        "latencies_s": {name: distribution(d) for name, d in vars(summary.latencies).items()},
    }


def sample(record: Record) -> dict[str, Any]:
    """One request, short; times in seconds, rounded to the microsecond."""
    document: dict[str, Any] = {
        "index": record.index,
        "status": record.status,
        "intended_s": _micro(record.intended_s),
        "late_s": _micro(record.lateness_s),
        "ttft_s": _micro(record.ttft_s),
        "tpot_s": _micro(record.tpot_s),
        "e2e_s": _micro(record.e2e_s),
        "num_prompt_tokens": record.prompt_len,
        "num_tokens": record.num_tokens,
        "num_chunks": len(record.chunks),
    }
    if record.retry_after_s is not None:
        document["retry_after_s"] = _micro(record.retry_after_s)
    if record.detail:
        document["detail"] = record.detail
    return document


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _most_tokens_in_a_second(result: PhaseResult) -> int:
    """Most tokens in one full second of the phase."""
    seconds: Counter[int] = Counter()
    for record in result.records:
        for chunk in record.chunks:
            seconds[math.floor(chunk.at_s)] += chunk.num_tokens
    return max(seconds.values(), default=0)


def _most_at_a_time(result: PhaseResult) -> int:
    return max_overlapping((r.sent_s, r.ended_s) for r in result.records if r.ended_s is not None)

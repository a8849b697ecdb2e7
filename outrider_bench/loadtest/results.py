"""Results as JSON: in the shape of `vllm bench serve`, and what that has no keys for. Pure."""

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
    most_running,
)
from outrider_bench.loadtest.records import Record
from outrider_bench.loadtest.slo import Slo
from outrider_bench.loadtest.stretches import Probe, Stretch


def summary_of(stretches: Sequence[Stretch], slo: Slo | None) -> Summary:
    """Of one variant's stretches together."""
    records = [record for stretch in stretches for record in stretch.records]
    return Summary.of(records, sum(stretch.duration_s for stretch in stretches), slo)


def vllm_shape(
    summary: Summary, stretches: Sequence[Stretch], *, is_detailed: bool
) -> dict[str, Any]:
    """The keys of `vllm bench serve --save-result`, and with `is_detailed` of `--save-detailed`.

    `itl` is theirs, from message to message. Times in milliseconds, but for the detailed ones.
    """
    told: dict[str, Any] = {
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
        "max_output_tokens_per_s": max(map(_most_tokens_in_a_second, stretches), default=0),
        "max_concurrent_requests": max(map(_most_at_a_time, stretches), default=0),
    }
    latencies = summary.latencies
    for name, found in (
        ("ttft", latencies.ttft), ("tpot", latencies.tpot),
        ("itl", latencies.itl_chunk), ("e2el", latencies.e2e),
    ):  # fmt: skip
        told |= _times_ms(name, found)
    told |= _spec_decode(summary.drafting)
    return told | (_detailed(stretches) if is_detailed else {})


def _times_ms(name: str, found: Distribution | None) -> dict[str, float | None]:
    keys = [f"{kind}_{name}_ms" for kind in ("mean", "median", "std")]
    keys += [f"p{percentile}_{name}_ms" for percentile in PERCENTILES]
    if found is None:
        return dict.fromkeys(keys)
    values = [found.mean, found.p50, found.std, *found.percentiles.values()]
    return {key: 1e3 * value for key, value in zip(keys, values, strict=True)}


def _spec_decode(drafting: Drafting | None) -> dict[str, Any]:
    """Theirs: the share of all draft tokens, in per cent; those behind a rejection included."""
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


def _detailed(stretches: Sequence[Stretch]) -> dict[str, Any]:
    records = [record for stretch in stretches for record in stretch.records]
    return {
        "input_lens": [record.prompt_len for record in records],
        "output_lens": [record.num_tokens for record in records],
        "start_times": [record.sent_s for record in records],
        "ttfts": [record.ttft_s or 0.0 for record in records],
        "itls": [record.chunk_gaps_s for record in records],
        "errors": ["" if r.is_ok else f"{r.status}: {r.detail}" for r in records],
    }


def own_shape(summary: Summary, stretches: Sequence[Stretch]) -> dict[str, Any]:
    """What vLLM's result has no keys for; times in seconds."""
    latencies = summary.latencies
    return {
        "latencies_s": {name: distribution(d) for name, d in vars(latencies).items()},
        "errors_by_status": summary.errors,
        "num_cut": summary.num_cut,
        "slo_attained": summary.attained,
        "num_cached_prompt_tokens": summary.num_cached_tokens,
        "send_lateness_s": distribution(summary.lateness),
        "drafting": None if summary.drafting is None else vars(summary.drafting),
        "verify_batch": verify_batch(stretches, summary.drafting),
    }


def distribution(found: Distribution | None) -> dict[str, float] | None:
    if found is None:
        return None
    percentiles = {f"p{p}": value for p, value in found.percentiles.items()}
    return {"num": found.num, "mean": found.mean, "std": found.std} | percentiles


def verify_batch(
    stretches: Sequence[Stretch], drafting: Drafting | None
) -> dict[str, float | str | None]:
    """Rows and tokens of a target pass: counted by the replicas, else as orchestrators saw it."""
    passes = [stretch.passes for stretch in stretches if stretch.passes is not None]
    num_steps = sum(one.num_steps for one in passes)
    if num_steps:
        return {
            "rows": sum(one.num_rows for one in passes) / num_steps,
            "tokens": sum(one.num_tokens for one in passes) / num_steps,
            "source": "target replicas",
        }
    rows = drafting.verify_rows if drafting is not None else None
    return {"rows": rows, "tokens": None, "source": "orchestrator"}


def speed_up(on: Summary, off: Summary) -> dict[str, float | None]:
    """How many times as good; throughput says something only where callers wait for answers."""

    def ratio(name: str, percentile: int) -> float | None:
        times = getattr(on.latencies, name), getattr(off.latencies, name)
        if None in times or not times[0].percentiles[percentile]:
            return None
        return float(times[1].percentiles[percentile] / times[0].percentiles[percentile])

    told: dict[str, float | None] = {
        "tokens_per_s": on.tokens_per_s / off.tokens_per_s if off.tokens_per_s else None
    }
    for name in ("tpot", "e2e", "ttft"):
        told |= {f"{name}_p50": ratio(name, 50), f"{name}_p99": ratio(name, 99)}
    return told


def probe_shape(probe: Probe, slo: Slo) -> dict[str, Any]:
    """A rate of a search."""
    summary = summary_of([probe.stretch], slo)
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
    told: dict[str, Any] = {
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
        told["retry_after_s"] = _micro(record.retry_after_s)
    if record.detail:
        told["detail"] = record.detail
    return told


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _most_tokens_in_a_second(stretch: Stretch) -> int:
    """Of the full seconds of its clock."""
    seconds: Counter[int] = Counter()
    for record in stretch.records:
        for chunk in record.chunks:
            seconds[math.floor(chunk.at_s)] += chunk.num_tokens
    return max(seconds.values(), default=0)


def _most_at_a_time(stretch: Stretch) -> int:
    return most_running((r.sent_s, r.ended_s) for r in stretch.records if r.ended_s is not None)

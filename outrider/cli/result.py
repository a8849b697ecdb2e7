"""Result of a generation: as a JSON object for programs, as summary lines for people."""

from __future__ import annotations

from typing import Any

from outrider.cli.paint import ORIGIN_NAMES
from outrider.cli.plain import plain
from outrider.client.client import Output
from outrider.v1 import orchestrator_pb2, sampling_pb2


def to_dict(output: Output) -> dict[str, Any]:
    """The result as plain values; None for fields that do not apply."""
    result = output.result
    matched = result.WhichOneof("stop")
    return {
        "session_id": output.session_id,
        "text": output.text,
        "token_ids": output.token_ids,
        "origins": [ORIGIN_NAMES.get(origin, "unknown") for origin in output.origins],
        "logprobs": [plain(entry) for entry in output.logprobs] or None,
        "finish_reason": finish_reason(result),
        "stopped_by": {matched: getattr(result, matched)} if matched else None,
        "usage": plain(result.usage),
        "speculation": plain(result.speculation)
        | {
            "verification": _verification(result),
            "sources": [
                plain(source) | {"source": _source_name(source)}
                for source in result.speculation.sources
            ],
        },
        "verification": _verification(result),
        "seed": result.seed,
        "recorded": result.recorded,
    }


def finish_reason(result: orchestrator_pb2.GenerateResult) -> str:
    name = orchestrator_pb2.FinishReason.Name(result.finish_reason)
    return name.removeprefix("FINISH_REASON_").lower()


def _verification(result: orchestrator_pb2.GenerateResult) -> str:
    name = sampling_pb2.Verification.Name(result.speculation.verification)
    return name.removeprefix("VERIFICATION_").lower()


def summary(output: Output) -> list[tuple[str, str]]:
    """Summary lines for people: (name, value)."""
    result, stats = output.result, output.result.speculation
    num_tokens = result.usage.completion_tokens
    rows = [("finish", _finish(result)), ("tokens", _tokens(result.usage))]
    speed = f"{stats.tokens_per_s:.1f} tokens/s, " if stats.HasField("tokens_per_s") else ""
    rows.append(("speed", f"{speed}first token after {stats.time_to_first_token_s * 1e3:.0f} ms"))
    if stats.HasField("acceptance_rate"):
        alpha = f"α {stats.acceptance_rate:.2f} accepted"
        tau = f"τ {stats.mean_acceptance_length:.2f} tokens per round with drafts"
        how = f"γ {_gamma(stats)}, {_verification(result)}"
        rows.append(("drafts", f"{alpha}, {tau}, {how}"))
        rows += _sources(stats)
        drafted = f"{stats.num_drafts} with drafts, {stats.num_lookahead_hits} drafted ahead"
        rows.append(("rounds", f"{stats.num_rounds}, {drafted}"))
    else:
        rows.append(("rounds", f"{stats.num_rounds}, without drafts"))
    if num_tokens:
        draft, target = (
            f"{num_bytes / num_tokens:.0f}"
            for num_bytes in (stats.draft_wire_bytes, stats.target_wire_bytes)
        )
        rows.append(("wire", f"{draft} + {target} bytes per token (draft + target)"))
    rows.append(("seed", str(result.seed)))
    if not result.recorded:
        rows.append(("WARNING", "Redis is down: the session lacks tokens of this output"))
    return rows


def _source_name(source: orchestrator_pb2.SourceStats) -> str:
    name = orchestrator_pb2.DraftSource.Name(source.source)
    return name.removeprefix("DRAFT_SOURCE_").lower()


def _sources(stats: orchestrator_pb2.SpeculationStats) -> list[tuple[str, str]]:
    """Line about the sources of the draft tokens, if there is another one than the draft tier."""
    parts = []
    for source in stats.sources:
        if source.num_drafts:
            parts.append(
                f"{_source_name(source)} {source.num_drafts} rounds, α {source.acceptance_rate:.2f}"
            )
    is_shown = any(s.source == orchestrator_pb2.DRAFT_SOURCE_LOOKUP for s in stats.sources)
    return [("sources", "; ".join(parts))] if is_shown and parts else []


def _gamma(stats: orchestrator_pb2.SpeculationStats) -> str:
    if stats.HasField("gamma"):
        return str(stats.gamma)
    by_gamma = stats.num_rounds_per_gamma
    mean = sum(gamma * num for gamma, num in enumerate(by_gamma)) / max(1, sum(by_gamma))
    return f"{mean:.1f} adaptive"


def _finish(result: orchestrator_pb2.GenerateResult) -> str:
    matched = result.WhichOneof("stop")
    if matched is None:
        return finish_reason(result)
    name = {"stop_text": "text", "stop_token_id": "token", "eos_token_id": "end of sequence"}
    return f"{finish_reason(result)}: {name[matched]} {getattr(result, matched)!r}"


def _tokens(usage: orchestrator_pb2.Usage) -> str:
    cached = f", {usage.cached_tokens} of them cached" if usage.cached_tokens else ""
    return f"{usage.completion_tokens} after a prompt of {usage.prompt_tokens}{cached}"

"""Result of a generation: as a JSON object for programs, as summary lines for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outrider.client import Generation, SpeculationStats, Usage

_STOPS = {"stop_text": "text", "stop_token_id": "token", "eos_token_id": "end of sequence"}


def to_dict(output: Generation) -> dict[str, Any]:
    """The result as plain values; None for fields that do not apply."""
    matched = _stop(output)
    return {
        "session_id": output.session_id,
        "text": output.text,
        "token_ids": output.token_ids,
        "origins": output.origins,
        "logprobs": [asdict(entry) for entry in output.logprobs] or None,
        "prompt_logprobs": asdict(output.prompt_logprobs) if output.prompt_logprobs else None,
        "finish_reason": output.finish_reason,
        "stopped_by": {matched: getattr(output, matched)} if matched else None,
        "usage": asdict(output.usage),
        "speculation": asdict(output.speculation),
        "verification": output.speculation.verification,
        "seed": output.seed,
        "recorded": output.recorded,
    }


def _stop(output: Generation) -> str | None:
    """Name of the field that has what ended the output."""
    return next((name for name in _STOPS if getattr(output, name) is not None), None)


def summary(output: Generation) -> list[tuple[str, str]]:
    """Summary lines for people: (name, value)."""
    stats, num_tokens = output.speculation, output.usage.completion_tokens
    rows = [("finish", _finish(output)), ("tokens", _tokens(output.usage))]
    speed = "" if stats.tokens_per_s is None else f"{stats.tokens_per_s:.1f} tokens/s, "
    rows.append(("speed", f"{speed}first token after {stats.time_to_first_token_s * 1e3:.0f} ms"))
    if stats.acceptance_rate is not None:
        alpha = f"α {stats.acceptance_rate:.2f} accepted"
        tau = f"τ {stats.mean_acceptance_length:.2f} tokens per round with drafts"
        how = f"γ {_gamma(stats)}, {stats.verification}"
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
    rows.append(("seed", str(output.seed)))
    if not output.recorded:
        rows.append(("WARNING", "Redis is down: the session lacks tokens of this output"))
    return rows


def _sources(stats: SpeculationStats) -> list[tuple[str, str]]:
    """Line about the sources of the draft tokens, if there is another one than the draft tier."""
    parts = []
    for each in stats.sources:
        if each.num_drafts:
            parts.append(f"{each.source} {each.num_drafts} rounds, α {each.acceptance_rate:.2f}")
    is_shown = any(each.source == "lookup" for each in stats.sources)
    return [("sources", "; ".join(parts))] if is_shown and parts else []


def _gamma(stats: SpeculationStats) -> str:
    if stats.gamma is not None:
        return str(stats.gamma)
    by_gamma = stats.num_rounds_per_gamma
    mean = sum(gamma * num for gamma, num in enumerate(by_gamma)) / max(1, sum(by_gamma))
    return f"{mean:.1f} adaptive"


def _finish(output: Generation) -> str:
    matched = _stop(output)
    if matched is None:
        return output.finish_reason
    return f"{output.finish_reason}: {_STOPS[matched]} {getattr(output, matched)!r}"


def _tokens(usage: Usage) -> str:
    cached = f", {usage.cached_tokens} of them cached" if usage.cached_tokens else ""
    return f"{usage.completion_tokens} after a prompt of {usage.prompt_tokens}{cached}"

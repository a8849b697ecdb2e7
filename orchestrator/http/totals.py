"""Totals of an answer: token usage, and statistics of speculation by vLLM's names."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from orchestrator.generation.counts import SpeculationCounts
from orchestrator.generation.output import Result


def usage(results: Sequence[Result], n: int) -> dict[str, Any]:
    """Token counts of all choices; each prompt is counted once. `n`: choices per prompt."""
    num_prompt = sum(result.num_prompt_tokens for result in results[::n])
    num_output = sum(result.num_completion_tokens for result in results)
    num_cached = sum(result.num_cached_tokens for result in results[::n])
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def running_usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    """Token counts of one choice so far, as vLLM's `continuous_usage_stats`."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


def metrics(results: Sequence[Result], max_gamma: int) -> dict[str, Any]:
    """Statistics of speculation over all choices, by vLLM's names.

    `max_gamma`: most draft tokens of a round; the request's γ, or the limit of an adaptive one.
    `draft_acceptance_rate` is accepted / drafted, as vLLM's; `acceptance_rate` is α, as gRPC's: the
    draft tokens after the first rejection are not counted. Without draft tokens α is None, and
    vLLM's fields have vLLM's values: length 1, rate 0. `acceptance_histogram[j]`: rounds that
    accepted exactly j draft tokens, [num_spec_tokens + 1]. `num_rounds_per_gamma[g]`: rounds with g
    draft tokens, without the prompt's.
    """
    total = SpeculationCounts()
    for result in results:
        _add(total, result.counts)
    num_drafted = total.num_draft_tokens
    histogram = _histogram(total, max_gamma)
    return {
        "speculative_decoding": {
            "mean_acceptance_length": total.mean_acceptance_length or 1.0,
            "draft_acceptance_rate": total.num_accepted_tokens / max(1, num_drafted),
            "acceptance_histogram": histogram,
            "num_spec_steps": total.num_drafts,
            "num_accepted_draft_tokens": total.num_accepted_tokens,
            "num_draft_tokens": num_drafted,
            "num_spec_tokens": len(histogram) - 1,
            "num_rejected_draft_tokens": total.num_rejected_tokens,
            "acceptance_rate": total.acceptance_rate,
            "num_rounds": total.num_rounds,
            "num_lookahead_hits": sum(result.num_lookahead_hits for result in results),
            "num_rounds_per_gamma": total.num_rounds_per_gamma,
        }
    }


def _histogram(counts: SpeculationCounts, max_gamma: int) -> list[int]:
    """Rounds with draft tokens by number of accepted ones, from 0 to at least `max_gamma`."""
    per_pos = counts.num_accepted_per_pos
    at_least = [counts.num_drafts, *per_pos, *[0] * max(1, max_gamma + 1 - len(per_pos))]
    return [more - fewer for more, fewer in pairwise(at_least)]


def _add(total: SpeculationCounts, counts: SpeculationCounts) -> None:
    total.num_rounds += counts.num_rounds
    total.num_drafts += counts.num_drafts
    total.num_draft_tokens += counts.num_draft_tokens
    total.num_accepted_tokens += counts.num_accepted_tokens
    total.num_rejected_tokens += counts.num_rejected_tokens
    _add_each(total.num_accepted_per_pos, counts.num_accepted_per_pos)
    _add_each(total.num_rounds_per_gamma, counts.num_rounds_per_gamma)


def _add_each(total: list[int], counts: Sequence[int]) -> None:
    total += [0] * (len(counts) - len(total))
    for place, num in enumerate(counts):
        total[place] += num

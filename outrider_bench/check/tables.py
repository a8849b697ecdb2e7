"""Terminal tables of `outrider check`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from outrider_bench.check.cost import TokenCost
from outrider_bench.check.inspection import PairInspection, TokenizerComparison, TokenizerMatch
from outrider_bench.check.results import Acceptance, LookupUse, PassCost, SpeedUp
from outrider_bench.check.self_test import SelfTestResult
from outrider_bench.measuring.show import number, share, table, times

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from outrider_bench.check.model_shape import ModelShape

_TIERS = ("target", "draft")
# Positions of a block shown.
_MAX_POSITIONS = 8


def print_inspection(console: Console, inspection: PairInspection) -> None:
    """Prints what the files say: sizes, tokenizers, refusals, notes."""
    shapes = [shape for shape in (inspection.target, inspection.draft) if shape is not None]
    shown = table("before loading", ("", *_TIERS[: len(shapes)]))
    for title, cells in _size_rows(shapes):
        shown.add_row(title, *cells)
    console.print(shown)
    if inspection.parameter_ratio is not None:
        console.print(f"parameters: target / draft = {inspection.parameter_ratio:.1f}")
    if inspection.tokenizers is not None:
        console.print(f"tokenizers: {escape(_tokenizer_text(inspection.tokenizers))}")
    for note in inspection.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    for refusal in inspection.refused:
        console.print(f"[red]refused[/] {escape(refusal)}", soft_wrap=True)
    console.print()


def _size_rows(shapes: list[ModelShape]) -> list[tuple[str, list[str]]]:
    return [
        ("family", [shape.architecture for shape in shapes]),
        ("parameters", [millions(shape.num_parameters) for shape in shapes]),
        ("weights", [f"{mebibytes(s.weight_bytes)} ({s.dtype})" for s in shapes]),
        ("KV per token", [f"{s.kv_bytes_per_token / 1024:.1f} KiB" for s in shapes]),
        ("context", [f"{s.max_context_len} tokens" for s in shapes]),
        ("sliding window", [str(s.sliding_window) if s.sliding_window else "" for s in shapes]),
        ("vocabulary", [str(s.vocab_size) for s in shapes]),
    ]


def _tokenizer_text(tokenizers: TokenizerComparison) -> str:
    """How they differ, with the first ids that do."""
    match = tokenizers.match
    if match in (TokenizerMatch.same, TokenizerMatch.unknown):
        return match.value
    examples = ", ".join(
        f"{token_id} is {_token(target)} · {_token(draft)}"
        for token_id, target, draft in tokenizers.examples
    )
    return (
        f"{match.value}: {tokenizers.num_differing_ids} of {tokenizers.num_ids} ids, "
        f"{tokenizers.num_differing_ordinary_ids} of them ordinary tokens; "
        f"{tokenizers.num_same_tokens} tokens are in both vocabularies; "
        f"for example {examples} (target · draft)"
    )


def _token(token: str | None) -> str:
    return "unused" if token is None else repr(token)


def millions(count: int) -> str:
    """Number of parameters as text."""
    if not count:
        return "unknown"
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def mebibytes(num_bytes: int) -> str:
    """Size as text; MiB, or GiB from one on."""
    gibibytes = num_bytes / 2**30
    return f"{gibibytes:.1f} GiB" if gibibytes >= 1 else f"{num_bytes / 2**20:.1f} MiB"


def self_test_table(results: Iterable[SelfTestResult]) -> Table:
    """Cases of the self-test, by model."""
    columns = ("self-test: largest difference from plain attention", "logits", "allowed", "")
    shown = table("", columns)
    model = ""
    for one in results:
        if one.model != model:
            model = one.model
            shown.add_section()
            shown.add_row(f"[bold]{escape(model)}[/]")
        mark = "[green]passed[/]" if one.is_passed else f"[red]failed[/] {escape(one.error)}"
        shown.add_row(one.name, f"{one.difference:.2g}", f"{one.allowed:.2g}", mark)
    return shown


def acceptance_table(by_task: Sequence[Acceptance], overall: Sequence[Acceptance]) -> Table:
    """α and agreement by task and temperature; the last row is over all tasks."""
    temperatures = list(dict.fromkeys(one.temperature for one in overall))
    columns = [f"T = {t:g}: α (equal argmax)" for t in temperatures]
    shown = table("acceptance along the target's own text", ("task", *columns))
    is_of_loop = any(one.agreement is None for one in overall)
    tasks = list(dict.fromkeys(one.task for one in by_task))
    if len(tasks) > 1:
        for task in tasks:
            own = {one.temperature: one for one in by_task if one.task == task}
            shown.add_row(task, *(_alpha(own.get(t)) for t in temperatures))
        shown.add_section()
    if overall and is_of_loop:
        shown.add_row("real loop", *(f"{_alpha(one)} {one.band}" for one in overall))
        return shown
    if overall:
        shown.add_row("all", *(f"{_alpha(one)} {one.band}" for one in overall))
    if any(one.loop_alpha is not None for one in overall):
        shown.add_row("real loop", *(number(one.loop_alpha) for one in overall))
    return shown


def _alpha(one: Acceptance | None) -> str:
    if one is None:
        return ""
    return f"{one.alpha:.2f}" + ("" if one.agreement is None else f" ({one.agreement:.2f})")


def lookup_table(uses: Sequence[LookupUse]) -> Table:
    """Prompt lookup by task and temperature, with one stream."""
    temperatures = list(dict.fromkeys(use.temperature for use in uses))
    columns = [f"T = {t:g}: speed-up (α, rounds with drafts)" for t in temperatures]
    shown = table("prompt lookup on the target's own text, one stream", ("task", *columns))
    for task in dict.fromkeys(use.task for use in uses):
        own = {use.temperature: use.rounds for use in uses if use.task == task}
        cells = [own.get(t) for t in temperatures]
        shown.add_row(
            task or "all",
            *(
                "" if one is None
                else f"{times(one.speed_up)} ({number(one.alpha)}, {share(one.drafted_share)})"
                for one in cells
            ),
        )  # fmt: skip
    return shown


def survival_table(overall: Sequence[Acceptance]) -> Table:
    """P(at least k draft tokens are accepted) by k, and tokens per round."""
    num = min(_MAX_POSITIONS, max((len(one.survival) for one in overall), default=0))
    shown = table(
        "P(at least k draft tokens of a round are accepted)",
        ("", *map(str, range(1, num + 1)), "γ", "τ", "formula"),
    )
    for one in overall:
        rest = (str(one.gamma), number(one.tokens_per_round), number(one.formula_tokens_per_round))
        shown.add_row(f"T = {one.temperature:g}", *_shares(one.survival, num), *rest)
        if one.loop_survival and one.agreement is not None:
            shown.add_row("  real loop", *_shares(one.loop_survival, num), "", "", "")
    return shown


def _shares(values: Sequence[float], num: int) -> list[str]:
    return [f"{value:.2f}" for value in values[:num]] + [""] * (num - len(values))


def cost_table(costs: Iterable[PassCost]) -> Table:
    """Duration of passes by batch size."""
    shown = table("passes of one token per stream", ("streams", "target ms", "draft ms", "ratio"))
    for one in costs:
        shown.add_row(
            str(one.num_rows), number(1e3 * one.target_s), number(1e3 * one.draft_s),
            number(one.ratio, 3),
        )  # fmt: skip
    return shown


def token_cost_table(costs: Sequence[TokenCost]) -> Table:
    """Cost per million tokens, and draft replicas per target."""
    columns = ("T, streams", "plain", "with drafts", "ratio", "drafts per target", "or targets")
    shown = table("cost per million tokens", columns)
    for one in costs:
        shown.add_row(
            f"{one.temperature:g}, {one.num_streams}", f"{one.plain:.3g}",
            f"{one.with_drafts:.3g}", number(one.with_drafts / one.plain),
            str(one.num_drafts), f"{one.num_targets} per draft" if one.num_drafts == 1 else "",
        )  # fmt: skip
    return shown


def speed_table(speed_ups: Sequence[SpeedUp], rtt_ms: float) -> Table:
    """Predicted and measured speed-ups."""
    network = f", {rtt_ms:g} ms to the draft and back" if rtt_ms else ""
    columns = ("γ", "in turn", "ahead", "measured", "range", "off", "γ used", "hits", "tokens/s")
    shown = table(f"speed-up over γ = 0{network}", ("T, streams", *columns))
    for place, one in enumerate(speed_ups):
        prediction = one.prediction
        spread = "" if one.least is None else f"{one.least:.2f} … {one.most:.2f}"
        following = speed_ups[place + 1].temperature if place + 1 < len(speed_ups) else None
        shown.add_row(
            f"{one.temperature:g}, {one.num_streams}", str(prediction.best_gamma),
            times(max(prediction.in_turn)), times(prediction.speed_up), times(one.measured),
            spread, "" if one.off is None else f"{100 * one.off:+.0f} %",
            number(one.mean_gamma, 1), share(one.hit_rate), number(one.tokens_per_s, 1),
            end_section=following not in (None, one.temperature),
        )  # fmt: skip
    return shown

"""Report of `outrider check`: JSON, tables, verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from outrider_bench.check.inspection import PairInspection, TokenizerComparison, TokenizerMatch

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.engine.loading.model_shape import ModelShape

_TIERS = ("target", "draft")


@dataclass
class DraftCheck:
    """Everything found out about one draft. `draft` None: the target alone."""

    draft: str | None
    inspection: PairInspection

    @property
    def verdict(self) -> str:
        """One line: what to do."""
        if self.inspection.refused:
            return f"do not speculate: {self.inspection.refused[0]}"
        return "nothing in the files is against this pair; not measured"

    @property
    def is_worth_it(self) -> bool:
        return not self.inspection.refused

    def to_dict(self) -> dict[str, Any]:
        return {
            "draft": self.draft,
            "inspection": self.inspection.to_dict(),
            "verdict": self.verdict,
            "is_worth_it": self.is_worth_it,
        }


@dataclass
class CheckReport:
    """Checks of one target with each draft."""

    target: str
    checks: list[DraftCheck] = field(default_factory=list)

    @property
    def is_worth_it(self) -> bool:
        """Whether any draft is worth it."""
        return any(check.is_worth_it for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON of the report."""
        return {
            "target": self.target,
            "is_worth_it": self.is_worth_it,
            "drafts": [check.to_dict() for check in self.checks],
        }


def print_verdicts(console: Console, report: CheckReport) -> None:
    """Prints one line per draft."""
    for check in report.checks:
        colour = "green" if check.is_worth_it else "red"
        name = f"{escape(check.draft)}: " if check.draft and len(report.checks) > 1 else ""
        console.print(f"[bold {colour}]{name}{escape(check.verdict)}[/]", soft_wrap=True)


def print_inspection(console: Console, inspection: PairInspection) -> None:
    """Prints what the files say: sizes, tokenizers, refusals, notes."""
    from rich.table import Table

    shapes = [shape for shape in (inspection.target, inspection.draft) if shape is not None]
    table = Table(title="before loading", title_justify="left", show_edge=False)
    table.add_column("")
    for tier in _TIERS[: len(shapes)]:
        table.add_column(tier, justify="right")
    for title, cells in _rows(shapes):
        table.add_row(title, *cells)
    console.print(table)
    if inspection.parameter_ratio is not None:
        console.print(f"parameters: target / draft = {inspection.parameter_ratio:.1f}")
    if inspection.tokenizers is not None:
        console.print(f"tokenizers: {escape(_tokenizer_text(inspection.tokenizers))}")
    for note in inspection.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    for refusal in inspection.refused:
        console.print(f"[red]refused[/] {escape(refusal)}", soft_wrap=True)
    console.print()


def _rows(shapes: list[ModelShape]) -> list[tuple[str, list[str]]]:
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
        f"{token_id} is {_shown(target)} · {_shown(draft)}"
        for token_id, target, draft in tokenizers.examples
    )
    return (
        f"{match.value}: {tokenizers.num_differing_ids} of {tokenizers.num_ids} ids, "
        f"{tokenizers.num_differing_ordinary_ids} of them ordinary tokens; "
        f"{tokenizers.num_same_tokens} tokens are in both vocabularies; "
        f"for example {examples} (target · draft)"
    )


def _shown(token: str | None) -> str:
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

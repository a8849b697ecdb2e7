"""Results of `outrider bench swap`: phases, events and goals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from outrider_bench.measuring.document import Goal
from outrider_bench.measuring.show import number, table


def summary(phase: str, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = [sample for sample in samples if sample["phase"] == phase]
    done = [sample for sample in found if "error" not in sample]
    accepted, rejected, drafts, rounds = (
        sum(sample[name] for sample in done)
        for name in ("num_accepted", "num_rejected", "num_drafts", "num_rounds")
    )
    ends = [sample["ended_s"] for sample in found]
    seconds = max(ends) - min(ends) if ends else 0.0
    tokens = sum(sample["num_tokens"] for sample in done)
    return {
        "phase": phase,
        "num_generations": len(found),
        "num_failed": len(found) - len(done),
        "num_different": sum(not sample["is_equal"] for sample in done),
        "acceptance_rate": accepted / (accepted + rejected) if accepted + rejected else None,
        "mean_acceptance_length": 1 + accepted / drafts if drafts else None,
        "tokens_per_round": tokens / rounds if rounds else None,
        "tokens_per_s": tokens / seconds if seconds else None,
    }


def goals(
    samples: Sequence[dict[str, Any]],
    phases: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]],
) -> list[Goal]:
    rates = {phase["phase"]: phase["acceptance_rate"] for phase in phases}
    decisions = " ".join(event["decision"] for event in events)
    gain = None
    if rates["old"] is not None and rates["new"] is not None:
        gain = rates["new"] - rates["old"]
    return [
        Goal("failed streams", 0, sum("error" in sample for sample in samples), is_most=True),
        Goal(
            "outputs with other tokens than without a draft",
            0,
            sum(not sample.get("is_equal", True) for sample in samples),
            is_most=True,
        ),
        Goal("α of the new draft minus α of the old one", 0.0, gain),
        Goal("bad drafts rolled back by the orchestrators", 1, decisions.count(" rolled back: ")),
    ]


def phases_table(phases: Sequence[dict[str, Any]]) -> Table:
    columns = ("phase", "generations", "failed", "different", "α", "τ", "tokens/s")
    made = table("Draft swapped under load", columns)
    for phase in phases:
        made.add_row(
            phase["phase"],
            str(phase["num_generations"]),
            str(phase["num_failed"]),
            str(phase["num_different"]),
            number(phase["acceptance_rate"], 3),
            number(phase["mean_acceptance_length"]),
            number(phase["tokens_per_s"], 0),
        )
    return made


def events_table(events: Sequence[dict[str, Any]]) -> Table:
    made = table("Changes of the rollout", ("at", "change"))
    made.columns[1].justify = "left"
    for event in events:
        made.add_row(number(event["at_s"], 1, " s"), event["decision"])
    return made

"""Results of a run: as plain data for JSON, and as a Markdown section."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from outrider_bench.chaos.client import Stream
from outrider_bench.chaos.inject import Occurrence
from outrider_bench.chaos.jobs import ClientBehaviour, SamplingMethod
from outrider_bench.chaos.run import Findings

# A fault's interruption begins within this time. Later ones belong to other faults.
_ONSET_S = 0.5
BEGIN_MARK = "<!-- outrider chaos: begin -->"
END_MARK = "<!-- outrider chaos: end -->"


@dataclass(frozen=True)
class FaultSummary:
    """Results of one type of fault.

    Waits: seconds from the fault to the next token of the streams on its place.
    """

    name: str
    num_times: int
    num_streams: int
    wait_p50_s: float | None
    wait_max_s: float | None


@dataclass(frozen=True)
class Summary:
    """Results of a run. `resume` waits: seconds from a resuming call to its first token."""

    num_generations: int
    num_tokens: int
    duration_s: float
    methods: dict[str, int]
    callers: dict[str, int]
    num_faults: int
    num_resumed_streams: int
    num_resumes: int
    resume_p50_s: float | None
    resume_max_s: float | None
    num_refused_calls: int
    num_fenced_callers: int
    num_lost_to_redis: int
    num_unrecorded: int
    num_ties: int
    num_problems: int
    num_audited: int
    is_cut: bool
    faults: list[FaultSummary]
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(findings: Findings) -> Summary:
    """Summary of the findings."""
    streams = findings.streams
    resumes = [wait for stream in streams for wait in stream.resume_waits_s]
    problems = findings.all_problems
    return Summary(
        num_generations=len(streams),
        num_tokens=sum(len(stream.token_ids) for stream in streams),
        duration_s=findings.duration_s,
        methods={m.value: sum(s.job.case.method is m for s in streams) for m in SamplingMethod},
        callers={c.value: sum(s.job.behaviour is c for s in streams) for c in ClientBehaviour},
        num_faults=len(findings.occurrences),
        num_resumed_streams=sum(stream.num_resumed > 0 for stream in streams),
        num_resumes=sum(stream.num_resumed for stream in streams),
        resume_p50_s=_median(resumes),
        resume_max_s=max(resumes, default=None),
        num_refused_calls=sum(stream.num_refused for stream in streams),
        num_fenced_callers=sum(stream.num_fenced for stream in streams),
        num_lost_to_redis=sum(stream.is_not_resumable for stream in streams),
        num_unrecorded=findings.num_unrecorded,
        num_ties=findings.num_ties,
        num_problems=len(problems),
        num_audited=findings.num_audited,
        is_cut=findings.is_cut,
        faults=_by_name(findings.occurrences),
        problems=problems,
    )


def _by_name(occurrences: Sequence[Occurrence[Stream]]) -> list[FaultSummary]:
    rows = []
    for name in sorted({occurrence.name for occurrence in occurrences}):
        own = [occurrence for occurrence in occurrences if occurrence.name == name]
        waits = [wait for occurrence in own for wait in token_waits_s(occurrence)]
        num_streams = sum(len(occurrence.streams) for occurrence in own)
        longest = max(waits, default=None)
        rows.append(FaultSummary(name, len(own), num_streams, _median(waits), longest))
    return rows


def token_waits_s(occurrence: Occurrence[Stream]) -> list[float]:
    """Longest wait that began with the fault, of each stream that later received a token."""
    began_at, waits = occurrence.began_at, []
    for stream in occurrence.streams:
        times = [began_at, *(at for at in stream.times if at > began_at)]
        own = [later - at for at, later in pairwise(times) if at <= began_at + _ONSET_S]
        if own:
            waits.append(max(own))
    return waits


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def markdown(summary: Summary, command: str, about: dict[str, str]) -> str:
    """Markdown section of two tables and the problems, between the marks of `insert_section`."""
    s = summary
    cut = f"after {s.num_generations} generations; {s.num_audited} of them audited"
    rows = [
        *([("**interrupted**", cut)] if s.is_cut else []),
        ("command", f"`{command}`"),
        *about.items(),
        ("generations", f"{s.num_generations} ({_counts(s.methods)}), {s.num_tokens} tokens"),
        ("clients", _counts(s.callers)),
        ("duration", f"{s.duration_s:.0f} s, {s.num_faults} faults"),
        ("**lost, repeated, different or failed**", f"**{s.num_problems}**"),
        ("resumed", f"{s.num_resumes} times, {s.num_resumed_streams} streams"),
        ("from resuming call to first token", _waits(s.resume_p50_s, s.resume_max_s)),
        ("calls refused before they began, repeated", f"{s.num_refused_calls}"),
        ("second clients of a session refused", f"{s.num_fenced_callers}"),
        ("sent while Redis was unreachable, not recorded", f"{s.num_unrecorded}"),
        ("not resumable because Redis was unreachable", f"{s.num_lost_to_redis}"),
        ("tokens that differ by rounding only", f"{s.num_ties}"),
    ]
    lines = [BEGIN_MARK, "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", "| fault | times | streams | wait for the next token, p50 | longest |"]
    lines += ["|---|---|---|---|---|"]
    for row in s.faults:
        waits = f"{_seconds(row.wait_p50_s)} | {_seconds(row.wait_max_s)}"
        lines.append(f"| {row.name} | {row.num_times} | {row.num_streams} | {waits} |")
    if s.problems:
        lines += ["", "Problems:", "", *(f"- {what}" for what in s.problems)]
    return "\n".join([*lines, END_MARK])


def insert_section(page: str, part: str) -> str:
    """The page with `part` in place of the section between the marks, or appended."""
    before, begins, rest = page.partition(BEGIN_MARK)
    _, ends, after = rest.partition(END_MARK)
    if not begins or not ends:
        return f"{page.rstrip()}\n\n{part}\n".lstrip()
    return f"{before}{part}{after}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _waits(median_s: float | None, longest_s: float | None) -> str:
    return f"p50 {_seconds(median_s)}, longest {_seconds(longest_s)}" if median_s else "none"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def first_problems(problems: Iterable[str], most: int) -> list[str]:
    """The first `most` problems, and the number of further ones."""
    lines = list(problems)
    rest = len(lines) - most
    return lines[:most] + ([f"… and {rest} more"] if rest > 0 else [])

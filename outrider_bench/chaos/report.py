"""A run in numbers: as plain data for JSON, and as a page of Markdown. Runs nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from outrider_bench.chaos.client import Stream
from outrider_bench.chaos.inject import Occurrence
from outrider_bench.chaos.jobs import Caller, Method
from outrider_bench.chaos.run import Findings

# An interruption begins with its fault, but for what was under way. Later ones are other faults'.
_ONSET_S = 0.5
BEGIN_MARK = "<!-- outrider chaos: begin -->"
END_MARK = "<!-- outrider chaos: end -->"


@dataclass(frozen=True)
class FaultSummary:
    """Of one sort of fault. Waits in seconds, from the fault to the next token of streams on it."""

    name: str
    num_times: int
    num_streams: int
    wait_p50_s: float | None
    wait_max_s: float | None


@dataclass(frozen=True)
class Summary:
    """`resume` waits: seconds from a resuming call to its first token."""

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


def summarised(findings: Findings) -> Summary:
    streams = findings.streams
    resumes = [wait for stream in streams for wait in stream.resume_waits_s]
    problems = findings.all_problems
    return Summary(
        num_generations=len(streams),
        num_tokens=sum(len(stream.token_ids) for stream in streams),
        duration_s=findings.duration_s,
        methods={m.value: sum(s.job.case.method is m for s in streams) for m in Method},
        callers={c.value: sum(s.job.caller is c for s in streams) for c in Caller},
        num_faults=len(findings.occurrences),
        num_resumed_streams=sum(stream.num_resumed > 0 for stream in streams),
        num_resumes=sum(stream.num_resumed for stream in streams),
        resume_p50_s=_median(resumes),
        resume_max_s=max(resumes, default=None),
        num_refused_calls=sum(stream.num_refused for stream in streams),
        num_fenced_callers=sum(stream.num_fenced for stream in streams),
        num_lost_to_redis=sum(stream.is_lost_to_redis for stream in streams),
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
        waits = [wait for occurrence in own for wait in waits_s(occurrence)]
        num_streams = sum(len(occurrence.streams) for occurrence in own)
        longest = max(waits, default=None)
        rows.append(FaultSummary(name, len(own), num_streams, _median(waits), longest))
    return rows


def waits_s(occurrence: Occurrence[Stream]) -> list[float]:
    """Of each stream that got a token after the fault: its longest wait that began with it."""
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
    """Two tables and what went wrong, between two marks that `inserted` knows."""
    s = summary
    cut = f"after {s.num_generations} generations; {s.num_audited} of them were audited"
    rows = [
        *([("**interrupted**", cut)] if s.is_cut else []),
        ("command", f"`{command}`"),
        *about.items(),
        ("generations", f"{s.num_generations} ({_counts(s.methods)}), {s.num_tokens} tokens"),
        ("callers", _counts(s.callers)),
        ("took", f"{s.duration_s:.0f} s, {s.num_faults} faults"),
        ("**lost, repeated, different or failed**", f"**{s.num_problems}**"),
        ("resumed", f"{s.num_resumes} times, {s.num_resumed_streams} streams"),
        ("from resuming call to token", _waits(s.resume_p50_s, s.resume_max_s)),
        ("calls refused before they began, made again", f"{s.num_refused_calls}"),
        ("second callers of a session sent away", f"{s.num_fenced_callers}"),
        ("shown while Redis was away, and not recorded", f"{s.num_unrecorded}"),
        ("not resumable, as Redis was away", f"{s.num_lost_to_redis}"),
        ("equally likely tokens that came out the other way", f"{s.num_ties}"),
    ]
    lines = [BEGIN_MARK, "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", "| fault | times | streams on it | wait for the next token, p50 | longest |"]
    lines += ["|---|---|---|---|---|"]
    for row in s.faults:
        waits = f"{_seconds(row.wait_p50_s)} | {_seconds(row.wait_max_s)}"
        lines.append(f"| {row.name} | {row.num_times} | {row.num_streams} | {waits} |")
    if s.problems:
        lines += ["", "What went wrong:", "", *(f"- {what}" for what in s.problems)]
    return "\n".join([*lines, END_MARK])


def inserted(page: str, part: str) -> str:
    """The page with `part` in place of the one between its marks, or at its end."""
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


def first(problems: Iterable[str], most: int) -> list[str]:
    """The first of them, and how many more there are."""
    told = list(problems)
    rest = len(told) - most
    return told[:most] + ([f"… and {rest} more"] if rest > 0 else [])

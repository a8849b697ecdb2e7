"""A run finds what is wrong: against orchestrators that do one thing wrong, once."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import grpc
import pytest

import outrider_bench.chaos.run
from outrider_bench.chaos.calls import Attempt
from outrider_bench.chaos.client import Stream, served_first
from outrider_bench.chaos.faults import Fault, Tier
from outrider_bench.chaos.inject import Occurrence
from outrider_bench.chaos.jobs import Caller, make_cases, make_jobs
from outrider_bench.chaos.report import (
    BEGIN_MARK,
    END_MARK,
    inserted,
    markdown,
    summarised,
    waits_s,
)
from outrider_bench.chaos.run import Findings, Load, Run
from outrider_bench.chaos.shell import ShellFaults
from tests.bench.chaos.fake_orchestrator import Shared, Watched, faking
from tests.cli.processes import descendants, wait_until_dead

LOAD = Load(generations=60, concurrent=6, seed=2, max_tokens=40, num_cases=9)


class NoFaults:
    """Nothing happens, so nothing is excused."""

    def __init__(self) -> None:
        self.occurrences: list[Occurrence[Stream]] = []

    async def run(self, faults: Iterator[Fault]) -> None: ...

    def end(self) -> None: ...

    def happened(self, tier: Tier, replica: int, since: float) -> bool:
        return False


async def found(shared: Shared) -> Findings:
    watched = patch.object(outrider_bench.chaos.run, "Orchestrators", partial(Watched, shared))
    async with faking(shared) as endpoints:
        run = Run(LOAD, endpoints, lambda what, num_done, total: None)
        with watched:
            await run.run(NoFaults(), iter(()), 0)
        assert shared.sessions.keys() <= {f"one-off {i}" for i in range(shared.num_calls + 1)}
        return run.findings


async def test_all_is_well() -> None:
    """Callers who leave and return, who ask twice and resume twice, are served as is right."""
    findings = await found(Shared())
    assert findings.all_problems == []
    summary = summarised(findings)
    assert summary.num_generations >= LOAD.generations
    assert all(summary.callers.values()), "every kind of caller was there"
    assert all(summary.methods.values())
    assert summary.num_resumes > 0
    assert summary.num_fenced_callers > 0
    finished = [s for s in findings.streams if s.job.caller is not Caller.ABANDONS]
    assert all(len(stream.token_ids) == stream.job.max_tokens for stream in finished)


WRONG = {
    "loses a token": "is|tokens, not|different",
    "repeats a token": "is|tokens, not|different",
    "changes a token": "token .* is .*, not|different",
    "resumes a token late": "is|tokens, not|different",
    "loses in Redis": "Redis has",
    "gives a wrong reason": "FINISH_REASON_STOP, not FINISH_REASON_LENGTH",
    "fails": "failed at token .*UNAVAILABLE: the target is gone",
    "serves two at once": "two callers were served at once",
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
async def test_what_is_wrong_once_is_found(wrong: str) -> None:
    """And named, with its session; nothing else is blamed."""
    # Of two who resume at once the wronged one may be the one who is sent away.
    shared = Shared(wrong, faults_left=4 if wrong == "resumes a token late" else 1)
    findings = await found(shared)
    assert shared.faults_left == 0, "it went wrong"
    guilty = [stream for stream in findings.streams if stream.problems]
    assert guilty
    assert len(guilty) == 1 or wrong == "resumes a token late"
    said = " ".join(findings.all_problems)
    assert guilty[0].job.session_id in said
    assert re.search(WRONG[wrong], said), said


async def test_a_broken_system_ends_the_run() -> None:
    """Not after all of its time-outs."""
    findings = await found(Shared("changes a token", faults_left=10_000))
    assert len(findings.all_problems) > 1


async def test_faults_of_the_users_own(tmp_path: Path) -> None:
    """Each command is run, though it takes more outputs than were asked for; failures are told."""
    faults = ShellFaults([f"touch {tmp_path}/broken", "exit 3"], every_s=0.3)
    async with faking(Shared()) as endpoints:
        run = Run(replace(LOAD, generations=1), endpoints, lambda what, num_done, total: None)
        await run.run(faults, iter(()), 2)
    assert run.findings.all_problems == []
    assert (tmp_path / "broken").exists()
    assert set(faults.failures) == {"exit 3: exit status 3"}
    assert summarised(run.findings).num_faults >= 2


async def test_a_command_that_hangs_is_ended() -> None:
    """With all it has started, when the run is stopped."""
    faults = ShellFaults(["sleep 600 & wait"], every_s=0.01)
    running = asyncio.create_task(faults.run(iter(())))
    async with asyncio.timeout(60):
        # Not only the shell, which has both words in its own command.
        while not any(  # noqa: ASYNC110
            line.startswith("sleep 600") for line in descendants(os.getpid()).values()
        ):
            await asyncio.sleep(0.02)
    children = {p: c for p, c in descendants(os.getpid()).items() if "sleep" in c}
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    wait_until_dead(children)


def test_the_wait_after_a_fault() -> None:
    """The longest that began with it; what came later is another fault's."""
    (job,) = itertools.islice(
        make_jobs(
            0, make_cases(0, 1, 9), prefix="p", max_tokens=9, max_gamma=0, num_orchestrators=1
        ),
        1,
    )
    stream = Stream(job, times=[9.0, 10.1, 12.1, 12.2, 20.0])
    other = Stream(job, times=[9.0])
    occurrence = Occurrence("draft-kill", 10.0, streams=[stream, other])
    assert waits_s(occurrence) == [pytest.approx(2.0)]


async def test_the_report_replaces_the_one_before() -> None:
    """Between its marks; what stands around them stays."""
    summary = summarised(await found(Shared()))
    part = markdown(summary, "outrider chaos", {"date": "today"})
    page = inserted("# Title\n\nWords.\n", part)
    assert page.startswith("# Title\n\nWords.\n")
    again = inserted(page + "\nThe end.\n", part.replace("today", "tomorrow"))
    assert again.count(BEGIN_MARK) == again.count(END_MARK) == 1
    assert "tomorrow" in again
    assert "today" not in again
    assert again.endswith("The end.\n")


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_of_two_rivals_the_refused_one_is_not_taken_for_the_served_one(
    is_swapped: bool, num_tokens: int
) -> None:
    """Also where the other's orchestrator froze before its first token."""
    served = Attempt(0, 0.0, token_ids=[7] * num_tokens, is_silent=True)
    refused = Attempt(1, 0.0, code=grpc.StatusCode.ABORTED)
    given = (refused, served) if is_swapped else (served, refused)
    assert served_first(*given) == [served, refused]

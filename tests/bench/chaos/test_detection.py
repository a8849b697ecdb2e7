"""A run detects mistakes: fake orchestrators make one mistake, once."""

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
from outrider_bench.chaos.client import Stream, served_then_refused
from outrider_bench.chaos.faults import Fault, Tier
from outrider_bench.chaos.inject import Occurrence
from outrider_bench.chaos.jobs import ClientBehaviour, make_cases, make_jobs
from outrider_bench.chaos.report import (
    BEGIN_MARK,
    END_MARK,
    insert_section,
    markdown,
    summarise,
    token_waits_s,
)
from outrider_bench.chaos.run import ChaosRun, Findings, LoadSettings
from outrider_bench.chaos.shell import ShellFaults
from tests.bench.chaos.fake_orchestrator import RecordingStubs, SharedState, fake_orchestrators
from tests.cli.processes import descendants, wait_until_dead

LOAD = LoadSettings(generations=60, concurrent=6, seed=2, max_tokens=40, num_cases=9)


class NoFaults:
    """No fault occurs, so none explains a failure."""

    def __init__(self) -> None:
        self.occurrences: list[Occurrence[Stream]] = []

    async def run(self, faults: Iterator[Fault]) -> None: ...

    def stop(self) -> None: ...

    def was_faulted(self, tier: Tier, replica: int, since: float) -> bool:
        return False


async def findings_of(shared: SharedState) -> Findings:
    recorded = patch.object(
        outrider_bench.chaos.run, "OrchestratorStubs", partial(RecordingStubs, shared)
    )
    async with fake_orchestrators(shared) as endpoints:
        run = ChaosRun(LOAD, endpoints, lambda what, num_done, total: None)
        with recorded:
            await run.run(NoFaults(), iter(()), 0)
        assert shared.sessions.keys() <= {f"one-off {i}" for i in range(shared.num_calls + 1)}
        return run.findings


async def test_correct_orchestrators_have_no_problems() -> None:
    """Clients that disconnect, resume or call twice are served correctly."""
    findings = await findings_of(SharedState())
    assert findings.all_problems == []
    summary = summarise(findings)
    assert summary.num_generations >= LOAD.generations
    assert all(summary.callers.values()), "every client behaviour occurred"
    assert all(summary.methods.values())
    assert summary.num_resumes > 0
    assert summary.num_fenced_callers > 0
    finished = [s for s in findings.streams if s.job.behaviour is not ClientBehaviour.ABANDONS]
    assert all(len(stream.token_ids) == stream.job.max_tokens for stream in finished)


EXPECTED_PROBLEM = {
    "loses a token": r"token \d+ is |tokens, expected|differ",
    "repeats a token": r"token \d+ is |tokens, expected|differ",
    "changes a token": r"token \d+ is \d+, expected|differ",
    "resumes a token late": r"token \d+ is |tokens, expected|differ",
    "loses in Redis": "Redis has",
    "gives a wrong reason": "FINISH_REASON_STOP, expected FINISH_REASON_LENGTH",
    "fails": "failed at token .*UNAVAILABLE: the target is gone",
    "serves two at once": "two clients were served at once",
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", EXPECTED_PROBLEM)
async def test_a_single_mistake_is_found(mistake: str) -> None:
    """It is reported with its session; no other stream is blamed."""
    # Of two concurrent resumptions, the one with the mistake may be the refused one.
    shared = SharedState(mistake, mistakes_left=4 if mistake == "resumes a token late" else 1)
    findings = await findings_of(shared)
    assert shared.mistakes_left == 0, "the mistake was made"
    blamed = [stream for stream in findings.streams if stream.problems]
    assert blamed
    assert len(blamed) == 1 or mistake == "resumes a token late"
    problems = " ".join(findings.all_problems)
    assert blamed[0].job.session_id in problems
    assert re.search(EXPECTED_PROBLEM[mistake], problems), problems


async def test_a_broken_system_ends_the_run_early() -> None:
    """It does not wait for every timeout."""
    findings = await findings_of(SharedState("changes a token", mistakes_left=10_000))
    assert len(findings.all_problems) > 1


async def test_shell_commands_run_in_turn_and_failures_are_reported(tmp_path: Path) -> None:
    """Load continues beyond the requested generations until each command has run."""
    faults = ShellFaults([f"touch {tmp_path}/broken", "exit 3"], every_s=0.3)
    async with fake_orchestrators(SharedState()) as endpoints:
        run = ChaosRun(replace(LOAD, generations=1), endpoints, lambda what, num_done, total: None)
        await run.run(faults, iter(()), 2)
    assert run.findings.all_problems == []
    assert (tmp_path / "broken").exists()
    assert set(faults.failures) == {"exit 3: exit status 3"}
    assert summarise(run.findings).num_faults >= 2


async def test_a_hanging_command_is_killed_with_its_children() -> None:
    """When the run is cancelled."""
    faults = ShellFaults(["sleep 600 & wait"], every_s=0.01)
    running = asyncio.create_task(faults.run(iter(())))
    async with asyncio.timeout(60):
        # The child itself; the shell's command line has both words too.
        while not any(  # noqa: ASYNC110
            line.startswith("sleep 600") for line in descendants(os.getpid()).values()
        ):
            await asyncio.sleep(0.02)
    children = {p: c for p, c in descendants(os.getpid()).items() if "sleep" in c}
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    wait_until_dead(children)


def test_wait_of_a_fault_is_the_longest_that_began_with_it() -> None:
    """Later waits belong to other faults."""
    (job,) = itertools.islice(
        make_jobs(
            0, make_cases(0, 1, 9), prefix="p", max_tokens=9, max_gamma=0, num_orchestrators=1
        ),
        1,
    )
    stream = Stream(job, times=[9.0, 10.1, 12.1, 12.2, 20.0])
    other = Stream(job, times=[9.0])
    occurrence = Occurrence("draft-kill", 10.0, streams=[stream, other])
    assert token_waits_s(occurrence) == [pytest.approx(2.0)]


async def test_report_replaces_the_previous_one() -> None:
    """Only the text between its marks changes."""
    summary = summarise(await findings_of(SharedState()))
    part = markdown(summary, "outrider chaos", {"date": "today"})
    page = insert_section("# Title\n\nWords.\n", part)
    assert page.startswith("# Title\n\nWords.\n")
    again = insert_section(page + "\nThe end.\n", part.replace("today", "tomorrow"))
    assert again.count(BEGIN_MARK) == again.count(END_MARK) == 1
    assert "tomorrow" in again
    assert "today" not in again
    assert again.endswith("The end.\n")


@pytest.mark.parametrize("is_swapped", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_refused_call_of_two_is_not_taken_for_the_served_one(
    is_swapped: bool, num_tokens: int
) -> None:
    """Also if the orchestrator of the other one froze before its first token."""
    served = Attempt(0, 0.0, token_ids=[7] * num_tokens, has_timed_out=True)
    refused = Attempt(1, 0.0, code=grpc.StatusCode.ABORTED)
    given = (refused, served) if is_swapped else (served, refused)
    assert served_then_refused(*given) == [served, refused]

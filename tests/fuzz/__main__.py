"""`python -m tests.fuzz SERVICE --messages 100000 --seed 0`: the long version, on real processes.

Prints what was sent and answered; exit status 1 if anything was found.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.fuzz.campaign import Report, fuzz
from tests.fuzz.corpus import VOCAB_SIZE
from tests.fuzz.fronts import SERVICES, connected
from tests.fuzz.healthy import SimulatedTruth
from tests.fuzz.system import running


async def _run(service: str, num_messages: int, seed: int, log_dir: Path) -> Report:
    is_whole = service == "orchestrator"
    # A draft that is always right is one whose every proposal can be foretold.
    survival = 0.7 if is_whole else 1.0
    async with (
        running(log_dir, survival=survival, with_orchestrator=is_whole) as system,
        connected(system.addresses) as fronts,
    ):
        report = await fuzz(
            fronts,
            service,
            SimulatedTruth(VOCAB_SIZE),
            num_messages=num_messages,
            seed=seed,
            pid=system.pids[service],
        )
    for name in system.addresses:
        for line in system.raised(name):
            report.findings.defect(f"in the log of {name}: {line}")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("service", choices=SERVICES)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="a folder for the programs' logs, to be kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="outrider-fuzz-") as folder:
        logs = given.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        report = asyncio.run(_run(given.service, given.messages, given.seed, logs))
    print(report)
    return 1 if report.findings.defects else 0


if __name__ == "__main__":
    sys.exit(main())

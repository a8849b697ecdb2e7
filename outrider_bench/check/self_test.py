"""Self-test of the engine on this device with these models, in a child process.

`python -m outrider_bench.check.self_test` reads engine options as JSON from standard input and
prints a line of JSON per case. `engine_cases` has the cases.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outrider.errors import ModelError
from outrider_bench.check.options import CheckOptions
from outrider_bench.measuring.child import print_lines, run_child

if TYPE_CHECKING:
    from rich.console import Console

    from outrider.engine.options import EngineOptions
    from outrider_bench.measuring.show import Report


@dataclass(frozen=True)
class SelfTestResult:
    """A case of one model's self-test; see `SelfTestCase`. `error`: why the model was refused."""

    model: str
    name: str
    difference: float
    allowed: float
    is_passed: bool
    error: str = ""


def wants_self_test(options: CheckOptions) -> bool:
    """As the flag says; without it, if the models will run on a GPU."""
    if options.self_test is not None:
        return options.self_test
    if options.files_only:
        return False
    from outrider.engine.loading.placement import served_device

    return served_device(options.device).type == "cuda"


async def run_self_test(
    options: CheckOptions,
    draft: str | None,
    found: list[SelfTestResult],
    console: Console,
    report: Report,
) -> None:
    """Adds the cases of both models to `found`. Raises ConfigError if one cannot be loaded."""
    from outrider_bench.measuring.show import progress

    models = [(options.target, options.device)]
    if draft is not None:
        models.append((draft, options.draft_device or options.device))
    with progress(console, len(models), report, found) as step:
        for model, device in models:
            step(f"self-test of {model}")
            how = {"model": model, "dtype": options.dtype, "device": device}
            await run_child(
                __name__, [], lambda case: found.append(SelfTestResult(**case)), json.dumps(how)
            )


def main() -> int:
    """Exit status 2: the model cannot be loaded; the last line of standard error is why."""
    from outrider.engine.options import EngineOptions

    return print_lines(_cases(EngineOptions(**json.load(sys.stdin))))


def _cases(options: EngineOptions) -> Iterator[dict[str, Any]]:
    from outrider_bench.check.engine_cases import full_self_test

    try:
        for case in full_self_test(options):
            yield {
                "model": options.model, "name": case.name, "difference": case.difference,
                "allowed": case.allowed, "is_passed": case.is_passed,
            }  # fmt: skip
    except ModelError as error:
        yield {
            "model": options.model, "name": "at load", "difference": 0.0, "allowed": 0.0,
            "is_passed": False, "error": str(error),
        }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

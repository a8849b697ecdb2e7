"""Renamed settings: the former flag and variable still work, and are reported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.settings.fields import setting
from outrider.settings.loader import load
from outrider.settings.services import OrchestratorConfig
from tests.services.programs import ended, program


@dataclass(frozen=True)
class Switch:
    is_on: bool = setting(True, "whether it is on", renamed_from="works")


FLAG, FORMER_FLAG = "--verify-timeout-s", "--verdict-timeout-s"
VARIABLE = "OUTRIDER_ORCHESTRATOR_VERIFY_TIMEOUT_S"
FORMER_VARIABLE = "OUTRIDER_ORCHESTRATOR_VERDICT_TIMEOUT_S"


def loaded(argv: list[str], environ: dict[str, str]) -> tuple[float, list[tuple[str, str]]]:
    renamed: list[tuple[str, str]] = []

    def note(former: str, present: str) -> None:
        renamed.append((former, present))

    config = load(OrchestratorConfig, "orchestrator", argv, environ, note)
    return config.verify_timeout_s, renamed


@pytest.mark.parametrize(
    ("argv", "environ", "value", "renamed"),
    [
        ([], {}, 120.0, []),
        ([f"{FLAG}=7"], {}, 7.0, []),
        ([], {VARIABLE: "7"}, 7.0, []),
        ([f"{FORMER_FLAG}=7"], {}, 7.0, [(FORMER_FLAG, FLAG)]),
        ([], {FORMER_VARIABLE: "7"}, 7.0, [(FORMER_VARIABLE, VARIABLE)]),
        # A flag beats a variable, whichever names they have.
        ([f"{FLAG}=7"], {FORMER_VARIABLE: "8"}, 7.0, [(FORMER_VARIABLE, VARIABLE)]),
        ([f"{FORMER_FLAG}=7"], {VARIABLE: "8"}, 7.0, [(FORMER_FLAG, FLAG)]),
    ],
)
def test_the_former_name_works_and_is_reported(
    argv: list[str], environ: dict[str, str], value: float, renamed: list[tuple[str, str]]
) -> None:
    assert loaded(argv, environ) == (value, renamed)


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        ([f"{FLAG}=7", f"{FORMER_FLAG}=7"], {}, f"{FORMER_FLAG}: cannot be combined with {FLAG}"),
        ([], {VARIABLE: "7", FORMER_VARIABLE: "7"}, f"{FORMER_VARIABLE}: cannot be combined with "),
        ([f"{FORMER_FLAG}=soon"], {}, "verdict_timeout_s: 'soon' is not of type float"),
        ([], {FORMER_VARIABLE: "soon"}, f"{FORMER_VARIABLE}: 'soon' is not of type float"),
    ],
)
def test_mistakes_are_named_as_they_were_written(
    argv: list[str], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        loaded(argv, environ)


def test_help_shows_the_present_name_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(OrchestratorConfig, "orchestrator", ["--help"], {})
    shown = capsys.readouterr().out
    assert FLAG in shown
    assert FORMER_FLAG not in shown


def test_a_renamed_switch() -> None:
    """Boolean flags keep both forms under the former name."""

    assert load(Switch, "switch", ["--no-works"], {}) == Switch(is_on=False)
    assert load(Switch, "switch", [], {"OUTRIDER_SWITCH_WORKS": "0"}) == Switch(is_on=False)


async def test_a_program_logs_a_warning(tmp_path: Path) -> None:
    """One line with both names; it ends because its tokenizer does not exist."""
    tokenizer = f"--tokenizer={tmp_path / 'absent' / 'model'}"
    async with program("orchestrator", f"{FORMER_FLAG}=7", tokenizer) as process:
        end = await ended(process)
    assert end.status == 2, end
    (line,) = [line for line in end.stderr.splitlines() if "renamed_setting" in line]
    assert "[warning" in line
    assert f"old={FORMER_FLAG}" in line
    assert f"new={FLAG}" in line

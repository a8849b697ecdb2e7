"""Specification of a simulated tier: parsing, formatting, and errors that name the key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.cli.stack import Stack
from outrider.cli.stack_options import StackOptions
from outrider.errors import ConfigError
from outrider.settings.loader import load
from outrider.settings.services import DraftConfig, TargetConfig
from outrider.settings.simulation import Simulation

TIMES = st.floats(0, 60_000)
PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=64).map(tuple)
STEPS = st.dictionaries(st.integers(1, 4096), TIMES, min_size=1, max_size=6).map(
    lambda points: tuple(sorted(points.items()))
)
# A single point holds for any number of tokens.
SIMULATIONS = st.builds(
    Simulation,
    step_ms=STEPS,
    row_ms=TIMES,
    vocab_size=st.integers(16, 1 << 24),
    context_len=st.integers(16, 1 << 30),
    seed=st.integers(-(1 << 63), 1 << 63),
    survival=PROBABILITIES,
    ranks=st.lists(st.floats(0, 1 / 7), min_size=1, max_size=7).map(tuple),
    fails_after_s=st.floats(0),
    name=st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    texts=st.from_regex(r"[A-Za-z0-9._/=-]{0,64}", fullmatch=True),
)


@given(SIMULATIONS)
def test_formatting_and_parsing_are_inverse(simulation: Simulation) -> None:
    assert Simulation.parse(str(simulation)) == simulation


def test_defaults_are_not_written() -> None:
    """A target's line must have no keys of drafts, which the target refuses."""
    assert str(Simulation()) == "step_ms=1:10.0"
    line = str(Simulation(step_ms=((1, 25.0), (64, 40.5)), row_ms=0.5))
    assert line == "step_ms=1:25.0/64:40.5,row_ms=0.5"
    assert Simulation.parse(line, is_draft=False).step_ms == ((1, 25.0), (64, 40.5))


def test_defaults() -> None:
    assert Simulation.parse("") == Simulation()
    assert Simulation.parse("step_ms=25").step_ms == ((1, 25.0),)
    assert Simulation.parse("survival=0.9/0.5").survival == (0.9, 0.5)


def test_costs_follow_the_line() -> None:
    """Linear between and beyond the points, constant before the first; plus rows beyond one."""
    costs = Simulation.parse("step_ms=1:10/5:10/9:20,row_ms=0.5").costs
    assert costs.pass_s(3, 1) == pytest.approx(0.010)
    assert costs.pass_s(7, 1) == pytest.approx(0.015)
    assert costs.pass_s(13, 3) == pytest.approx(0.031)
    assert Simulation.parse("step_ms=4").costs.pass_s(500, 1) == pytest.approx(0.004)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("step=1", "'step=1'; expected KEY=VALUE of step_ms, row_ms, .*survival, ranks"),
        ("step_ms", "'step_ms'; expected KEY=VALUE of"),
        ("step_ms=1,step_ms=2", "step_ms: is given twice"),
        (
            "step_ms=fast",
            "step_ms: 'fast' is invalid; must be 0 to 60000 milliseconds, or TOKENS:MS",
        ),
        ("step_ms=-1", "step_ms: '-1' is invalid; must be 0 to 60000"),
        ("step_ms=nan", "step_ms: 'nan' is invalid; must be 0 to 60000"),
        ("step_ms=inf", "step_ms: 'inf' is invalid; must be 0 to 60000"),
        ("step_ms=8:1/4:2", "step_ms: .* with rising numbers of tokens"),
        ("step_ms=0:1", "step_ms: '0:1' is invalid"),
        ("step_ms=1:5/9", "step_ms: '1:5/9' is invalid"),
        ("row_ms=60001", "row_ms: '60001' is invalid; must be 0 to 60000 milliseconds"),
        ("vocab_size=15", "vocab_size: '15' is invalid; must be 16 to 16777216"),
        ("vocab_size=1e3", "vocab_size: '1e3' is invalid; must be 16 to"),
        ("context_len=15", "context_len: '15' is invalid; must be 16 or more"),
        ("seed=x", "seed: 'x' is invalid; must be an integer"),
        (
            "survival=1.01",
            r"survival: '1.01' is invalid; must be 1 to 64 probabilities in \[0, 1\]",
        ),
        ("survival=", "survival: '' is invalid"),
        (
            "survival=" + "/".join(["1"] * 65),
            "survival: .* is invalid; must be 1 to 64 probabilities",
        ),
        (
            "ranks=0.6/0.5",
            "ranks: '0.6/0.5' is invalid; must be 1 to 7 probabilities, at most 1 in sum",
        ),
        ("ranks=" + "/".join(["0.1"] * 8), "ranks: .* is invalid; must be 1 to 7 probabilities"),
    ],
)
def test_an_error_names_the_allowed_values(line: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"simulate: {named}"):
        load(DraftConfig, "draft", [f"--simulate={line}"], {})


def test_a_target_refuses_keys_of_drafts() -> None:
    """They would have no effect."""
    with pytest.raises(
        ConfigError,
        match=r"'survival=0.5'; expected KEY=VALUE of .*seed, fails_after_s, name, texts$",
    ):
        load(TargetConfig, "target", ["--simulate=survival=0.5"], {})


def test_a_simulated_tier_has_no_model() -> None:
    with pytest.raises(ConfigError, match="simulate: cannot be combined with a model"):
        TargetConfig(model="m", simulate="step_ms=1")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (StackOptions(simulate_draft="step_ms=1"), "--simulate-draft: needs --simulate-target"),
        (StackOptions(simulate_target="step_ms=1", target="m"), "cannot be combined with --target"),
        (StackOptions(simulate_target="step_ms=1", draft="m"), "cannot be combined with --draft"),
        (
            StackOptions(simulate_target="step_ms=1", simulate_draft="step_ms=1", draft="none"),
            "cannot be combined with --draft",
        ),
        (StackOptions(simulate_target="survival=1"), "simulate: 'survival=1'"),
        (
            StackOptions(simulate_target="seed=1", simulate_draft="seed=2"),
            "--simulate-draft: its seed must be the target's",
        ),
        (
            StackOptions(simulate_target="vocab_size=64", simulate_draft="step_ms=1"),
            "--simulate-draft: its vocab_size must be the target's",
        ),
    ],
)
async def test_inconsistent_simulations_are_refused_before_the_start(
    options: StackOptions, named: str
) -> None:
    stack = Stack(options, lambda event: None)
    try:
        with pytest.raises(ConfigError, match=named):
            await stack.start()
    finally:
        await stack.stop()
    assert stack.addresses == {}

"""Generated reference pages match the code."""

from __future__ import annotations

from tests.deploy.sources import script

reference = script("reference")


def test_generated_pages_are_up_to_date() -> None:
    assert reference.outdated() == [], f"run {reference.COMMAND}"


def test_pages_cover_flags_commands_metrics_errors_and_models() -> None:
    """One row per flag, metric, error and model family; one section per command."""
    flags, metrics = reference.flags(), reference.metrics()
    for _, _, kind in reference.PROGRAMS:
        for entry in reference.fields(kind):
            assert f"`--{entry.name.replace('_', '-')}`" in flags, entry.name
    for metric in reference.CATALOGUE:
        assert metrics.count(f"| `{metric.exported_name}` |") == 1, metric.name
    for family in (*reference.FAMILIES, *reference.REFUSALS):
        assert reference.models().count(f"| `{family.model_type}` |") == 1, family.model_type
    assert "`NonFiniteLogits` | `INTERNAL`" in reference.errors_page()
    assert "## `outrider generate`" in reference.commands()

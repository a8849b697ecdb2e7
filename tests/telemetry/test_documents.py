"""The pages on telemetry name the metrics of the catalogue."""

from __future__ import annotations

import re
from pathlib import Path

from outrider.telemetry.catalogue import BY_NAME, CATALOGUE
from outrider.telemetry.metric import MetricKind

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("reference/metrics", "how-to/observe", "how-to/troubleshoot", "how-to/deploy")
DOCUMENT = "\n".join((DOCS / f"{page}.md").read_text("utf-8") for page in PAGES)
_SUFFIXES = ("_total", "_bucket", "_sum", "_count")


def test_every_metric_is_documented_and_no_other() -> None:
    """With its kind and vLLM's name. Expressions name existing metrics only."""
    for metric in CATALOGUE:
        (row,) = re.findall(rf"^\| `{metric.exported_name}`.*$", DOCUMENT, re.MULTILINE)
        assert f"| {metric.kind.value} |" in row
        assert (f"`vllm:{metric.vllm}" in row) == (metric.vllm is not None)
    for name in re.findall(r"outrider_(\w+)", DOCUMENT):
        bare = name
        for suffix in _SUFFIXES:
            bare = bare.removesuffix(suffix)
        assert bare in BY_NAME, name


def test_the_catalogue_is_consistent() -> None:
    """Unique names; only histograms have bounds, which rise."""
    assert len(BY_NAME) == len(CATALOGUE) > 40
    for metric in CATALOGUE:
        assert (metric.kind is MetricKind.HISTOGRAM) == bool(metric.bounds)
        assert list(metric.bounds) == sorted(set(metric.bounds))
        assert re.fullmatch(r"[a-z0-9_]+", metric.name)

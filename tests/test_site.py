"""The documentation site builds without a warning, and needs nothing from the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Strict: a broken link, a missing anchor or a page without a place is an error."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    site = tmp_path / "site"
    pages = [page for page in (ROOT / "docs").rglob("*.md") if page.name != "README.md"]
    assert len(pages) > 50
    for page in pages:
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).exists(), page
    for page in pages:
        text = page.read_text("utf-8")
        built = (site / page.relative_to(ROOT / "docs").with_suffix(".html")).read_text("utf-8")
        for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
            assert re.search(rf"<img[^>]*{re.escape(image)}", built), f"{page}: {image}"
            assert (site / page.relative_to(ROOT / "docs").parent / image).exists(), image
    index = (site / "index.html").read_text("utf-8")
    loaded = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="?(https?:[^" >]+)', index)
    assert loaded == []
    assert "(../" not in (site / "get-started.html").read_text("utf-8")

"""Files of recorded traffic: private, rotated, deleted by size and age; never another's files."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from orchestrator.traffic.files import Retention, TrafficFiles
from outrider.errors import ConfigError

_LINE = "x" * 999 + "\n"
_DAY_S = 86_400.0


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("traffic-*.jsonl"))


def test_lines_are_appended_to_a_private_file(tmp_path: Path) -> None:
    files = TrafficFiles(tmp_path / "new" / "traffic", Retention(1 << 20, _DAY_S))
    files.append(["a\n", "b\n"])
    files.append(["c\n"])
    (path,) = _files(tmp_path / "new" / "traffic")
    assert path.read_text() == "a\nb\nc\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_oldest_files_are_deleted_beyond_the_size(tmp_path: Path) -> None:
    """The total stays within the limit; the latest lines are kept."""
    files = TrafficFiles(tmp_path, Retention(max_bytes=64_000, max_age_s=_DAY_S))
    for number in range(200):
        files.append([f"{number:<999}\n"])
        for age, path in enumerate(reversed(_files(tmp_path))):  # one clock tick may cover several
            os.utime(path, (time.time() - age, time.time() - age))
    found = _files(tmp_path)
    assert sum(path.stat().st_size for path in found) <= 64_000
    assert len(found) > 8
    numbers = {int(line) for path in found for line in path.read_text().split()}
    assert 199 in numbers
    assert 0 not in numbers


def test_files_are_deleted_by_age(tmp_path: Path) -> None:
    """Files of other orchestrators too, and nothing else in the directory."""
    old, other = tmp_path / "traffic-1-elsewhere-7-1.jsonl", tmp_path / "notes.jsonl"
    for path in (old, other):
        path.write_text(_LINE)
        os.utime(path, (0, 0))
    files = TrafficFiles(tmp_path, Retention(1 << 20, _DAY_S))
    files.append([_LINE])
    assert not old.exists()
    assert other.exists()
    assert len(_files(tmp_path)) == 1
    files.delete_old()
    assert len(_files(tmp_path)) == 1


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="traffic_dir"):
        TrafficFiles(tmp_path / "file" / "traffic", Retention(1, 1))

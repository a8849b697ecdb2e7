"""`scripts/gpu_check` rehearsed on a CPU: every step runs, and the report says what came of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.cli.processes import ROOT, environment
from tests.deploy.sources import script

SCRIPT = ROOT / "scripts/gpu_check"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=560, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rehearsal_reports_every_step(tmp_path: Path) -> None:
    done = run("run", "--device=cpu", "--dtype=float32", "--size=tiny", f"--out={tmp_path}")
    report = (tmp_path / "gpu_check.md").read_text("utf-8")
    assert done.returncode == 0, report
    titles = ("Tests of the CUDA path", "Synthetic pair", "One stream", "Many streams")
    for title in titles:
        assert re.search(rf"^\| {title} \| passed \| \d+ \|", report, re.MULTILINE), report
    assert re.search(r"^\| full \| 1 \| [\d.]+ \| [\d.]+× \|$", report, re.MULTILINE)
    assert re.search(r"^\| full \| 2 \| [\d.]+ \| [\d.]+× \|$", report, re.MULTILINE)
    assert re.search(r"^\| torch \| \d", report, re.MULTILINE)
    assert {"gpu-speed.json", "gpu-concurrency.json"} <= {path.name for path in tmp_path.iterdir()}


def test_wheels_are_unpacked_as_installed(tmp_path: Path) -> None:
    """Programs can be executed, scripts are in bin; a package that is there is left alone."""
    wheels, packages = tmp_path / "wheels", tmp_path / "packages"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "absent_one-1.0-py3-none-any.whl", "w") as wheel:
        program = zipfile.ZipInfo("absent_one/deep/in/program")
        program.external_attr = 0o755 << 16
        wheel.writestr(program, "#!/bin/sh\n")
        wheel.writestr("absent_one-1.0.data/scripts/tool", "#!/bin/sh\n")
        wheel.writestr("absent_one-1.0.data/purelib/absent_two.py", "")
    (wheels / "pytest-1.0-py3-none-any.whl").write_bytes(b"not opened")
    assert script("gpu_check").unpack(wheels, packages) == ["absent_one"]
    assert os.access(packages / "absent_one/deep/in/program", os.X_OK)
    assert os.access(packages / "bin/tool", os.X_OK)
    assert (packages / "absent_two.py").is_file()


def test_without_time_left_the_report_says_what_did_not_run(tmp_path: Path) -> None:
    done = run("run", "--device=cpu", "--budget-s=1", f"--out={tmp_path}")
    assert done.returncode == 1
    report = (tmp_path / "gpu_check.md").read_text("utf-8")
    assert report.count("| not run: no time left | 0 |") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_device_nothing_is_claimed(tmp_path: Path) -> None:
    done = run("run", f"--out={tmp_path}")
    assert done.returncode == 1
    assert "--device cuda: torch finds no CUDA device" in done.stderr
    assert not (tmp_path / "gpu_check.md").exists()

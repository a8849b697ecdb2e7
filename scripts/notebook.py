"""Runs the code of a notebook, and stores what it prints as the cells' outputs.

    .venv/bin/python scripts/notebook.py examples/speculative_decoding.ipynb

One namespace, one cell after the other, as `Restart and run all` does. A cell that fails ends the
run, and the notebook stays as it was.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run_cells(notebook: dict[str, Any]) -> list[str]:
    """Runs the code cells; returns what each of them printed, and stores it as its output."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, cell in enumerate(cell for cell in notebook["cells"] if _is_code(cell)):
        source = "".join(cell["source"])
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(source, f"<cell {number + 1}>", "exec"), namespace)
        text = output.getvalue()
        printed.append(text)
        cell["execution_count"] = number + 1
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell["outputs"] = [stream] if text else []
    return printed


def _is_code(cell: dict[str, Any]) -> bool:
    return bool(cell["cell_type"] == "code")


def main() -> None:
    path = Path(sys.argv[1])
    notebook = json.loads(path.read_text("utf-8"))
    for text in run_cells(notebook):
        print(text, end="")
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()

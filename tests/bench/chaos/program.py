"""Test program like the system's: prints its address, then counts in a file until SIGTERM."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from types import FrameType


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    print("listening on 127.0.0.1:7", flush=True)
    path = Path(sys.argv[1])
    new = path.with_suffix(".new")
    for count in range(100_000):
        new.write_text(str(count), "utf-8")
        new.replace(path)  # readers never see an empty file
        time.sleep(0.01)

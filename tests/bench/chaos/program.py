"""A program as the system's are: says where it listens, then counts in a file until it is told."""

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
        new.replace(path)  # a reader never finds the file empty
        time.sleep(0.01)

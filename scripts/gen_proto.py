"""Generates outrider/v1 from proto/; with --check, exits with an error if it is out of date.

Runs in an environment of its own (`make proto`): grpcio-tools 1.76.0 requires an older protobuf
than the lock has. Its stubs work with both.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("outrider") / "v1"


def generate(out: Path) -> None:
    sources = sorted(str(path) for path in (ROOT / "proto").rglob("*.proto"))
    flags = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    well_known = files("grpc_tools") / "_proto"
    if protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{well_known}", *flags, *sources]):
        sys.exit("protoc failed")
    for stub in (out / PACKAGE).glob("*_pb2_grpc.py"):
        if "Stub" not in stub.read_text():  # a file without services
            stub.unlink()


def stubs(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (root / PACKAGE).glob("*_pb2*")}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        generate(Path(directory))
        made = stubs(Path(directory))
    present = stubs(ROOT)
    if "--check" in sys.argv:
        differing = sorted(n for n in made.keys() | present.keys() if made.get(n) != present.get(n))
        sys.exit(f"out of date: {differing}; run `make proto`" if differing else 0)
    for name in present.keys() - made.keys():
        (ROOT / PACKAGE / name).unlink()
    for name, text in made.items():
        (ROOT / PACKAGE / name).write_text(text)


if __name__ == "__main__":
    main()

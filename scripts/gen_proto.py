"""Regenerates outrider/v1 from proto/; run in the `proto` extra's environment (grpcio-tools 1.76.0)."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    out = ROOT / "outrider" / "v1"
    for stale in (*out.glob("*_pb2*.py"), *out.glob("*_pb2*.pyi")):
        stale.unlink()
    sources = sorted(str(path) for path in (ROOT / "proto").rglob("*.proto"))
    flags = [f"--{kind}_out={ROOT}" for kind in ("python", "pyi", "grpc_python")]
    well_known = files("grpc_tools") / "_proto"
    status: int = protoc.main(
        ["protoc", f"-I{ROOT / 'proto'}", f"-I{well_known}", *flags, *sources]
    )
    for stub in out.glob("*_pb2_grpc.py"):
        if "Stub" not in stub.read_text():  # a file without services
            stub.unlink()
    return status


if __name__ == "__main__":
    sys.exit(main())

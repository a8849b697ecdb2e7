"""Python client of an orchestrator: `Client` blocks, `AsyncClient` is its asynchronous form.

    from outrider.client import Client

    with Client("127.0.0.1:50051") as client:
        for chunk in client.generate("def fibonacci(n):", max_tokens=64):
            print(chunk.text, end="", flush=True)

Imports neither torch nor numpy. Errors are those of `outrider.errors`: CallFailed has the gRPC
status and the field that was refused.
"""

from outrider.client.channel import Access
from outrider.client.client import AsyncClient, GenerationStream
from outrider.client.info import Models, Session, SessionList
from outrider.client.request import RequestFields
from outrider.client.results import (
    Chunk,
    Generation,
    SpeculationStats,
    TokenLogprobs,
    Usage,
)
from outrider.client.sync import Client, SyncStream
from outrider.errors import CallFailed, InvalidRequest, OutriderError, ResumeFailed

__all__ = [
    "Access",
    "AsyncClient",
    "CallFailed",
    "Chunk",
    "Client",
    "Generation",
    "GenerationStream",
    "InvalidRequest",
    "Models",
    "OutriderError",
    "RequestFields",
    "ResumeFailed",
    "Session",
    "SessionList",
    "SpeculationStats",
    "SyncStream",
    "TokenLogprobs",
    "Usage",
]
